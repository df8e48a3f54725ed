"""``.clawdlets-guard.toml``: what may stay although a rule finds it, each entry with its reason. Pure."""

from __future__ import annotations

import fnmatch
import tomllib
from dataclasses import dataclass

FILE = ".clawdlets-guard.toml"
_KEYS = {"path", "rule", "fingerprint", "reason"}


@dataclass(frozen=True)
class Entry:
    """One leave: ``path`` is a pattern (``*`` crosses slashes), rule and fingerprint are as the report prints them."""

    path: str
    rule: str
    fingerprint: str
    reason: str

    def covers(self, *, path: str, rule: str, fingerprint: str) -> bool:
        """Whether this is what was let pass."""
        return rule == self.rule and fingerprint == self.fingerprint and fnmatch.fnmatchcase(path, self.path)


def parse(content: bytes) -> tuple[tuple[Entry, ...], list[str]]:
    """The usable entries of the file, and one sentence for each that is not."""
    try:
        document = tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return (), [f"is not valid TOML: {error}"]
    faults = [f"has the unknown key {key!r}" for key in document if key != "allow"]
    entries: list[Entry] = []
    listed = document.get("allow", [])
    if not isinstance(listed, list):
        return (), ["allow is not a list of tables; write [[allow]]"]
    for number, raw in enumerate(listed, start=1):
        if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
            faults.append(f"entry {number} is not a table of strings")
        elif missing := sorted(key for key in _KEYS if not raw.get(key, "").strip()):
            faults.append(f"entry {number} lacks {', '.join(missing)}")
        elif unknown := sorted(set(raw) - _KEYS):
            faults.append(f"entry {number} has the unknown key {unknown[0]!r}")
        else:
            entries.append(Entry(**raw))
    return tuple(entries), faults
