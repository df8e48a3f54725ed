"""What a check returns: yes, no or unknown, with the evidence. Unknown is never read as safe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """How a check came out."""

    PASS = "pass"  # noqa: S105 - a result, not a password
    FAIL = "fail"
    UNKNOWN = "unknown"
    NOT_APPLICABLE = "not-applicable"


@dataclass(frozen=True)
class Finding:
    """One check's outcome on one host.

    ``check`` is the id in the catalogue (``SSH-01``); ``claim`` the sentence it stands for; ``observed`` what was seen,
    never a secret's value; ``vantage`` where it was seen from; ``fix`` what to do about it.
    """

    check: str
    state: State
    claim: str
    host: str = ""
    observed: str = ""
    vantage: str = ""
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "state": str(self.state)}


def exit_code(findings: Iterable[Finding]) -> int:
    """0 when all passed, 1 when one failed, 2 when none failed but something is unknown, or nothing was checked."""
    states = {finding.state for finding in findings}
    if State.FAIL in states:
        return 1
    if State.UNKNOWN in states or not states - {State.NOT_APPLICABLE}:
        return 2
    return 0
