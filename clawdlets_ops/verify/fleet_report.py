"""The report of a verification of several hosts, for people and programs. Pure but for reading the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from clawdlets_ops import pages
from clawdlets_ops import sarif as sarif_file
from clawdlets_ops.finding import State
from clawdlets_ops.journal import printable
from clawdlets_ops.verify import report
from clawdlets_ops.verify.catalogue import Check

_LEVELS = {"critical": "error", "high": "error", "medium": "warning", "low": "note"}
NEW = "new"  # a check that was not made before


def summary(hosts: int, findings: Sequence[Mapping[str, Any]]) -> str:
    """The result in one line: ``3 hosts: 60 passed, 1 failed, 2 unknown``."""
    return f"{hosts} host{'s' if hosts != 1 else ''}: {report.summary(findings)}"


def text(document: Mapping[str, Any], page: str) -> str:
    """For a terminal: what did not pass first, with what to do; then a line a host, what changed, and the summary."""
    lines: list[str] = []
    for word, state in (("FAIL", State.FAIL), ("unknown", State.UNKNOWN)):
        for one in document["findings"]:
            if one["state"] == state:
                lines.append(f"{word:8}{one['host']}  {one['check']} ({one['severity']}): {one['observed']}")
                lines.append(f"        {one['claim']}")
                lines += [f"        → {one['fix']}"] if one["fix"] else []
    lines += [f"{row['host']}: {row['summary']}" for row in document["hosts"]]
    for change in document["changes"]:
        lines.append(f"changed {change['host']}  {change['check']}: {change['was'] or NEW} → {change['now']}")
    return "\n".join(_shown(line) for line in (*lines, document["summary"], f"report: {page}"))


def _shown(words: str) -> str:
    """For a terminal: nothing that it would obey, and what has several lines does not look like something else of ours."""
    return "\n        ".join(printable(line) for line in words.splitlines())


def sarif(document: Mapping[str, Any], checks: Sequence[Check]) -> str:
    """SARIF 2.1.0; a rule is a check. What failed is a result, what is unknown a notification, never a result."""
    known = {check.id: check for check in checks}
    met = {one["check"] for one in document["findings"]}
    results = [
        {
            "ruleId": one["check"],
            "level": _LEVELS.get(one["severity"], "warning"),
            "message": {"text": f"{one['host']}: {one['observed']} To do: {one['fix']}"},
            "locations": [
                {
                    "physicalLocation": {"artifactLocation": {"uri": "fleet/clawdlets.json"}},
                    "logicalLocations": [{"name": one["host"], "kind": "resource"}],
                }
            ],
            "partialFingerprints": {"clawdletsVerify/v1": f"{one['host']}/{one['check']}"},
        }
        for one in document["findings"]
        if one["state"] == State.FAIL
    ]
    return sarif_file.document(
        "clawdlets verify",
        rules=[
            sarif_file.rule(ident, check.claim, severity=check.severity, help_text=f"{check.how} To do: {check.fix}")
            for ident, check in known.items()
            if ident in met
        ],
        results=results,
        notifications=[
            sarif_file.notification(f"{one['host']}: {one['check']} is unknown: {one['observed']}")
            for one in document["findings"]
            if one["state"] == State.UNKNOWN
        ],
        exit_code=document["exitCode"],
    )


def junit(document: Mapping[str, Any]) -> str:
    """JUnit XML: a suite a host, a case a check. Unknown is an error, not applicable is skipped."""
    suites = ElementTree.Element("testsuites", name="clawdlets verify", time=str(document["durationS"]))
    for row in document["hosts"]:
        mine = [one for one in document["findings"] if one["host"] == row["host"]]
        counts = report.counted(mine)
        suite = ElementTree.SubElement(
            suites,
            "testsuite",
            name=row["host"],
            timestamp=document["at"],
            tests=str(len(mine)),
            failures=str(counts[State.FAIL]),
            errors=str(counts[State.UNKNOWN]),
            skipped=str(counts[State.NOT_APPLICABLE]),
        )
        for one in mine:
            case = ElementTree.SubElement(
                suite, "testcase", classname=row["host"], name=one["check"], time=str(one.get("durationS", 0))
            )
            told = {"message": _xml(one["observed"])}
            match State(one["state"]):
                case State.FAIL:
                    ElementTree.SubElement(case, "failure", told).text = _xml(f"{one['claim']}\nTo do: {one['fix']}")
                case State.UNKNOWN:
                    ElementTree.SubElement(case, "error", told).text = _xml(f"{one['claim']}\nTo do: {one['fix']}")
                case State.NOT_APPLICABLE:
                    ElementTree.SubElement(case, "skipped", told)
                case State.PASS:
                    ElementTree.SubElement(case, "system-out").text = _xml(one["observed"])
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def page(document: Mapping[str, Any], checks: Sequence[Check]) -> str:
    """One HTML page: checks by hosts, evidence on demand. No script, nothing from elsewhere; the filter is CSS alone."""
    return pages.render(
        "clawdlets_ops.verify",
        "fleet_report.html.j2",
        report=document,
        counts=[
            (*report.WORDS[state], number) for state, number in report.counted(document["findings"]).items() if number
        ],
        rows=_rows(document["findings"], {check.id: check for check in checks}),
        hosts=[row["host"] for row in document["hosts"]],
        unknown=[one for one in document["findings"] if one["state"] == State.UNKNOWN],
        words={"": ("", NEW), **{str(state): words for state, words in report.WORDS.items()}},
    )


def _rows(findings: Sequence[Mapping[str, Any]], known: Mapping[str, Check]) -> list[dict[str, Any]]:
    """One row a check: ``{id, severity, claim, how, cells: {host: finding}, clean}``; clean when no host is red or unseen."""
    rows: dict[str, dict[str, Any]] = {}
    for one in findings:
        how = known[one["check"]].how if one["check"] in known else ""
        row = rows.setdefault(
            one["check"],
            {"id": one["check"], "severity": one["severity"], "claim": one["claim"], "how": how, "cells": {}},
        )
        row["cells"][one["host"]] = one
    for row in rows.values():
        row["clean"] = all(one["state"] in (State.PASS, State.NOT_APPLICABLE) for one in row["cells"].values())
    return [rows[ident] for ident in sorted(rows)]


def _xml(words: str) -> str:
    """``words`` without the signs that XML 1.0 cannot hold in any form."""
    return "".join(
        letter if letter in "\t\n" or letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in words
    )
