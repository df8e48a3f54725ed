"""The doctor from beginning to end: look, judge, and say what counts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from clawdlets_ops.doctor.catalogue import checks_of
from clawdlets_ops.doctor.judging import WARNINGS, Check, Verdict, unknown
from clawdlets_ops.doctor.snapshot import Scope, Snapshot
from clawdlets_ops.finding import Finding, State, exit_code
from clawdlets_ops.guard.report import printable

VANTAGE = "operator"


@dataclass(frozen=True)
class Judged:
    """A finding with the check that it is of."""

    check: Check
    finding: Finding

    @property
    def warning(self) -> bool:
        """A failure that counts only when the doctor is asked to be strict."""
        return self.finding.state is State.FAIL and self.check.severity in WARNINGS

    def as_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            **self.finding.as_json(),
            "severity": self.check.severity,
            "scope": str(self.check.scope),
            "warning": self.warning,
        }


@dataclass(frozen=True)
class Diagnosis:
    """Every finding, in the order of the catalogue."""

    scope: Scope
    judged: tuple[Judged, ...]

    def exit_code(self, *, strict: bool = False) -> int:
        """As ``finding.exit_code``, of all findings but warnings. Strict: 1 as soon as anything failed or is unknown."""
        if strict:
            states = {each.finding.state for each in self.judged}
            return 1 if states & {State.FAIL, State.UNKNOWN} else exit_code(each.finding for each in self.judged)
        return exit_code(each.finding for each in self.judged if not each.warning)

    @property
    def summary(self) -> str:
        """One line: how many findings of each kind."""
        counts = Counter("warning" if each.warning else str(each.finding.state) for each in self.judged)
        words = [f"{counts[word]} {name}" for word, name in _WORDS.items() if counts[word]]
        return f"doctor ({self.scope}): {', '.join(words)}"


_WORDS = {
    "fail": "failed",
    "warning": "with a warning",
    "unknown": "unknown",
    "pass": "passed",
    "not-applicable": "not applicable",
}
_MARK = {State.PASS: "ok", State.FAIL: "FAIL", State.UNKNOWN: "unknown", State.NOT_APPLICABLE: "n/a"}


def judge(snapshot: Snapshot, scope: Scope) -> Diagnosis:
    """Every check of ``scope`` over one snapshot; one that has nothing to say is unknown."""
    judged = []
    for check in checks_of(scope):
        verdicts = list(check.judge(snapshot)) or [unknown("nothing was there to be looked at")]
        judged += [Judged(check, _finding(check, verdict)) for verdict in verdicts]
    return Diagnosis(scope, tuple(judged))


def _finding(check: Check, verdict: Verdict) -> Finding:
    fix = "" if verdict.state in (State.PASS, State.NOT_APPLICABLE) else verdict.fix or check.fix
    return Finding(check.id, verdict.state, check.claim, verdict.host, printable(verdict.observed), VANTAGE, fix)


def text(diagnosis: Diagnosis) -> str:
    """For people: a line for each finding, with the claim and what to do below those that do not hold."""
    hosts = max((len(each.finding.host) for each in diagnosis.judged), default=0)
    lines: list[str] = []
    for each in diagnosis.judged:
        found = each.finding
        mark = "warning" if each.warning else _MARK[found.state]
        lines.append(f"{mark:8}{found.check:8} {found.host:{hosts}}  {found.observed}".rstrip())
        if found.fix:
            lines += [f"{'':17}{found.claim}", f"{'':17}→ {found.fix}"]
    return "\n".join([*lines, diagnosis.summary])


def as_json(diagnosis: Diagnosis, *, strict: bool) -> str:
    """For programs."""
    document = {
        "scope": str(diagnosis.scope),
        "strict": strict,
        "exitCode": diagnosis.exit_code(strict=strict),
        "summary": diagnosis.summary,
        "findings": [each.as_json() for each in diagnosis.judged],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)
