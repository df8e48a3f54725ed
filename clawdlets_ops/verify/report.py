"""The report of one verification: a page that needs nothing else, and the same as JSON. Pure but for reading the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from clawdlets_ops import pages
from clawdlets_ops.finding import State

REPORT_VERSION = 1
WORDS = {
    State.FAIL: ("fail", "failed"),
    State.UNKNOWN: ("unknown", "unknown"),
    State.PASS: ("pass", "passed"),
    State.NOT_APPLICABLE: ("na", "not applicable"),
}
_SEVERITIES = ("critical", "high", "medium", "low")


def summary(findings: Sequence[Mapping[str, Any]]) -> str:
    """The result in one line: ``20 passed, 1 failed, 2 unknown, 1 not applicable``."""
    counts = counted(findings)
    order = (State.PASS, State.FAIL, State.UNKNOWN, State.NOT_APPLICABLE)
    return ", ".join(f"{counts[state]} {WORDS[state][1]}" for state in order if counts[state] or state is State.PASS)


def counted(findings: Sequence[Mapping[str, Any]]) -> dict[State, int]:
    """How many findings are in each state."""
    return {state: sum(1 for finding in findings if finding["state"] == state) for state in State}


def document(
    *,
    expected: Mapping[str, Any],
    findings: Sequence[Mapping[str, Any]],
    exposure: Sequence[Mapping[str, Any]],
    evidence_sha256: str,
    at: datetime,
    duration_s: float,
    exit_code: int,
) -> dict[str, Any]:
    """The report as JSON: what was judged, when, from where, and how it came out."""
    return {
        "reportVersion": REPORT_VERSION,
        "host": expected["host"],
        "at": at.isoformat(timespec="seconds"),
        "durationS": round(duration_s, 3),
        "mode": expected["mode"],
        "address": expected["ssh"]["address"],
        "network": expected["ssh"]["network"],
        "pinFingerprint": expected["ssh"]["pinFingerprint"],
        "vantages": [{"name": one["name"], "side": one["side"]} for one in expected["vantages"]],
        "exitCode": exit_code,
        "summary": summary(findings),
        "findings": list(findings),
        "exposure": list(exposure),
        "evidenceSha256": evidence_sha256,
    }


def page(report: Mapping[str, Any]) -> str:
    """The report as one HTML page without scripts or anything from elsewhere."""
    return pages.render(
        "clawdlets_ops.verify",
        "report.html.j2",
        report=report,
        groups=_groups(report["findings"]),
        counts=[(*WORDS[state], number) for state, number in counted(report["findings"]).items() if number],
        rows=_rows(report["exposure"]),
    )


def _groups(findings: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """Findings by state, the worst first, and within a state by severity."""

    def weight(finding: Mapping[str, Any]) -> tuple[int, str]:
        severity = finding.get("severity", "medium")
        return (_SEVERITIES.index(severity) if severity in _SEVERITIES else len(_SEVERITIES), finding["check"])

    return [
        (*words, sorted((finding for finding in findings if finding["state"] == state), key=weight))
        for state, words in WORDS.items()
        if any(finding["state"] == state for finding in findings)
    ]


def _rows(exposure: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a vantage: ``{name, side, cells: {4: cell, 6: cell}}``."""
    rows: dict[str, dict[str, Any]] = {}
    for cell in exposure:
        row = rows.setdefault(cell["vantage"], {"name": cell["vantage"], "side": cell["side"], "cells": {}})
        row["cells"][cell["family"]] = cell
    return list(rows.values())
