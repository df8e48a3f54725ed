"""Reading another tool's file key by key: every key is taken, left out with a reason, or refused. None is overlooked."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["changed", "left out", "refused"]


@dataclass(frozen=True)
class Note:
    """What became of ``path``, and why. ``refused``: nothing is imported until somebody has decided it."""

    path: str
    kind: Kind
    why: str

    def __str__(self) -> str:
        return f"{self.kind:8}  {self.path}: {self.why}"


@dataclass
class Part:
    """An object of the file at ``path``. ``finish`` refuses every key that was not asked for."""

    value: dict[str, Any]
    path: str
    notes: list[Note]
    known: set[str] = field(default_factory=set)

    def note(self, key: str, kind: Kind, why: str) -> None:
        """Say what became of ``key``."""
        self.notes.append(Note(self.at(key), kind, why))

    def at(self, key: str) -> str:
        """The path of ``key``."""
        return ".".join(part for part in (self.path, key) if part)

    def take(self, key: str, kind: type, default: Any) -> Any:
        """The value, when it is of that kind; refused and ``default`` when it is of another."""
        self.known.add(key)
        value = self.value.get(key, default)
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            self.note(key, "refused", f"is not of the kind {_KINDS[kind]}")
            return default
        return value.strip() if isinstance(value, str) else value

    def texts(self, key: str) -> list[str]:
        """A list of texts; refused where it is none."""
        values = self.take(key, list, [])
        if any(not isinstance(value, str) for value in values):
            self.note(key, "refused", "is not a list of texts")
            return []
        return [value.strip() for value in values]

    def part(self, key: str) -> Part:
        """The object at ``key``; an empty one when there is none."""
        return Part(self.take(key, dict, {}), self.at(key), self.notes)

    def parts(self, key: str) -> Iterator[tuple[str, Part]]:
        """The objects of the map at ``key``, by name."""
        named = self.part(key)
        for name in named.value:
            yield name, named.part(name)

    def leave(self, keys: Collection[str], why: str) -> None:
        """Take no notice of these keys, and say so where they say something."""
        for key in keys:
            self.known.add(key)
            if says(self.value.get(key)):
                self.note(key, "left out", why)

    def finish(self) -> None:
        """Refuse what nobody asked for."""
        for key in self.value:
            if key not in self.known:
                near = difflib.get_close_matches(key, self.known, n=1, cutoff=0.6)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                self.note(key, "refused", f"no such key in this version; the other drops it without a word{hint}")


_KINDS = {str: "text", bool: "true or false", int: "number", list: "list", dict: "object"}


def says(value: object) -> bool:
    """Whether a value says anything: not one that is empty, or a block that is switched off."""
    if isinstance(value, dict):
        if value.get("enable") is False or value.get("enabled") is False:
            return False
        return any(says(part) for part in value.values())
    return bool(value)
