"""What a check says: a verdict with what it saw. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from clawdlets_ops.doctor.snapshot import Blind, NotHere, Scope, Snapshot, Wrong
from clawdlets_ops.finding import State

SHOWN = 5
"""How many faults of one check are written out; the rest is counted."""

Severity = Literal["critical", "high", "medium", "low"]
WARNINGS: tuple[Severity, ...] = ("medium", "low")
"""A failed check of one of these is a warning: it counts only when the doctor is asked to be strict."""


@dataclass(frozen=True)
class Verdict:
    """``observed`` is what was seen, never a secret; ``fix`` what to do, where it is not what the check always says."""

    state: State
    observed: str
    host: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Check:
    """One entry of the catalogue. ``claim`` is what holds when it passes, ``how`` what is looked at."""

    id: str
    scope: Scope
    severity: Severity
    claim: str
    how: str
    fix: str
    judge: Callable[[Snapshot], Iterable[Verdict]]


def passed(observed: str, host: str = "") -> Verdict:
    """It holds."""
    return Verdict(State.PASS, observed, host)


def failed(observed: str, host: str = "", fix: str = "") -> Verdict:
    """It does not hold."""
    return Verdict(State.FAIL, observed, host, fix)


def unknown(observed: str, host: str = "", fix: str = "") -> Verdict:
    """It could not be seen."""
    return Verdict(State.UNKNOWN, observed, host, fix)


def beside(observed: str, host: str = "") -> Verdict:
    """There is nothing here that it is about."""
    return Verdict(State.NOT_APPLICABLE, observed, host)


def settled(faults: Sequence[str], holds: str, host: str = "", *, gaps: Sequence[str] = (), fix: str = "") -> Verdict:
    """Failed when there are ``faults``, unknown when there are only ``gaps``, passed with the words ``holds`` otherwise."""
    if faults:
        return failed(some([*faults, *(f"not seen: {gap}" for gap in gaps)]), host, fix)
    return unknown(some(gaps), host) if gaps else passed(holds, host)


def some(words: Sequence[str]) -> str:
    """The first few of ``words``, and how many more there are."""
    rest = len(words) - SHOWN
    return "; ".join([*words[:SHOWN], *([f"and {rest} more"] if rest > 0 else [])])


def without(part: Blind | Wrong | NotHere, host: str = "") -> Verdict:
    """The verdict on what is not there to be judged: wrong fails, blind is unknown, not here is not applicable."""
    if isinstance(part, Wrong):
        return failed(part.why, host)
    return unknown(part.why, host) if isinstance(part, Blind) else beside(part.why, host)
