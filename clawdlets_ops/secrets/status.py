"""In what state every secret is, as a table. Pure: declared and observed values in, rows out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

AGE_KEY = "(age key)"
SSH_KEY = "(SSH host key)"


class State(StrEnum):
    """The worst comes first. Unreadable is never the same as missing: the value may be there, and good."""

    UNREADABLE = "unreadable"
    MISSING = "missing"
    PLACEHOLDER = "placeholder"
    STALE = "stale"
    OVER_SHARED = "over-shared"
    UNDER_SHARED = "under-shared"
    PRESENT = "present"


@dataclass(frozen=True)
class Expected:
    """A file that must be there, ``file`` relative to the project; ``readers`` None: the host has no key yet."""

    host: str
    name: str
    kind: str
    why: str
    file: str
    readers: frozenset[str] | None


@dataclass(frozen=True)
class Observed:
    """A file that is there: whom its metadata name; why it could not be read; why its value cannot be used."""

    recipients: frozenset[str]
    unreadable: str = ""
    unusable: str = ""


@dataclass(frozen=True)
class Row:
    """One secret of one host. ``states`` worst first; ``readers`` by name, a recipient that nobody declared in full."""

    host: str
    name: str
    kind: str
    states: tuple[State, ...]
    readers: tuple[str, ...]
    why: str
    file: str
    observed: str = ""
    fix: str = ""

    @property
    def state(self) -> State:
        """The worst."""
        return self.states[0]

    def as_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            **{name: getattr(self, name) for name in ("host", "name", "kind", "why", "file", "observed", "fix")},
            "state": str(self.state),
            "states": [str(state) for state in self.states],
            "readers": list(self.readers),
        }


def rows(
    expected: Iterable[Expected],
    stale: Iterable[tuple[str, str]],
    observed: Mapping[str, Observed],
    names: Mapping[str, str],
) -> list[Row]:
    """One row for each file that must be there or that no host needs (``stale``: host and file), sorted by host.

    ``names`` says what each declared recipient is called.
    """
    found = [_row(item, observed.get(item.file), names) for item in expected]
    for host, file in stale:
        seen = observed.get(file, Observed(frozenset()))
        found.append(
            Row(
                host,
                file.rpartition("/")[2],
                "file",
                (State.UNREADABLE, State.STALE) if seen.unreadable else (State.STALE,),
                _names(seen.recipients, names),
                "no host of the fleet needs it",
                file,
                seen.unreadable,
                "remove it by hand" if seen.unreadable else "clawdlets secrets reconcile",
            )
        )
    return sorted(found, key=lambda row: (row.host, row.kind != "host-key", row.kind == "file"))


def exit_code(table: Collection[Row]) -> int:
    """0 when every secret is present for exactly its readers, 1 when one is not, 2 when all that is wrong is unreadable."""
    states = {state for row in table for state in row.states} - {State.PRESENT}
    if states - {State.UNREADABLE}:
        return 1
    return 2 if states or not table else 0


def _row(item: Expected, seen: Observed | None, names: Mapping[str, str]) -> Row:
    states: list[State] = []
    said: list[str] = []
    fixes: list[str] = []
    by_hand = f"clawdlets secrets set {item.name} --host {item.host}"
    if item.kind == "host-key" or item.readers is None:
        by_hand = f"clawdlets secrets init --host {item.host}"
    if seen is None:
        states.append(State.MISSING)
        fixes.append(by_hand)
    else:
        if seen.unreadable:
            states.append(State.UNREADABLE)
            said.append(seen.unreadable)
            fixes.append("let an operator who can read it run clawdlets secrets reconcile, or restore it from git")
        elif seen.unusable:
            states.append(State.UNREADABLE if item.kind == "host-key" else State.PLACEHOLDER)
            said.append(seen.unusable)
            fixes.append("restore it from git" if item.kind == "host-key" else by_hand)
        if item.readers is not None and seen.recipients:
            for state, odd, words in (
                (State.OVER_SHARED, seen.recipients - item.readers, "also read by"),
                (State.UNDER_SHARED, item.readers - seen.recipients, "not read by"),
            ):
                if odd:
                    states.append(state)
                    said.append(f"{words} {', '.join(_names(odd, names))}")
                    fixes.append("clawdlets secrets reconcile")
    readers = _names(seen.recipients, names) if seen else ()
    shown = tuple(states) or (State.PRESENT,)
    fix = "; ".join(dict.fromkeys(fixes))
    return Row(item.host, item.name, item.kind, shown, readers, item.why, item.file, "; ".join(said), fix)


def _names(recipients: Iterable[str], names: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(sorted(names.get(recipient, recipient) for recipient in recipients))
