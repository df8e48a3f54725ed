"""Runs the rules over a stream of bytes with bounded memory.

A matcher says which rules may occur in a piece of text; only those are then located, and confirmed one by one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from clawdlets_ops.errors import SettingsError
from clawdlets_ops.guard import matchers
from clawdlets_ops.guard.candidate import REACH, Candidate
from clawdlets_ops.guard.matchers import Matcher
from clawdlets_ops.guard.needles import Needle
from clawdlets_ops.guard.rules import RULES, Rule

PIECE_BYTES = 131_072
"""How much is matched at a time; what is read at a time is as much."""
_AHEAD = 2 * REACH  # a match, and what its rule may look at after it
_FINGERPRINT_CHARS = 16
_LINE_REACH = 200


@dataclass(frozen=True)
class Hit:
    """A confirmed match. ``line`` counts from 1; ``masked`` shows at most four characters; never the secret."""

    rule: str
    what: str
    fix: str
    line: int
    masked: str
    fingerprint: str


class Engine:
    """The rules and the known secrets, ready to scan with the ``matcher`` that is asked for, else with the fastest here.

    SettingsError when a rule does not catch its own sample: an engine that is blind must not say that all is well.
    """

    def __init__(
        self,
        needles: Iterable[Needle] = (),
        *,
        rules: Sequence[Rule] = RULES,
        matcher: Callable[[Sequence[Rule], Sequence[bytes]], Matcher] = matchers.best,
    ) -> None:
        self.needles = tuple(needles)
        self._rules = tuple(rules)
        self._forms = [(form, needle) for needle in self.needles for form in needle.forms()]
        forms = [form for form, _ in self._forms]
        self._matcher = matcher(self._rules, forms)
        self._prove()

    @property
    def name(self) -> str:
        """What it matches with: ``hyperscan+re2``, ``re2`` or ``re``."""
        return self._matcher.name

    @property
    def rule_count(self) -> int:
        """How many rules it has, each proven on its sample."""
        return len(self._rules)

    def is_silent(self, texts: Sequence[bytes]) -> bool:
        """True when nothing in any of ``texts`` (together at most PIECE_BYTES or so) can be a hit of ``scan``.

        One question for many small files: asking for each would cost as much again. False says nothing.
        """
        text = texts[0] if len(texts) == 1 else b"\n".join(texts)
        return b"\0" not in text and not self._matcher.present(text)

    def scan(self, pieces: Iterable[bytes]) -> Iterator[Hit]:
        """Every hit in the concatenation of ``pieces``, which may be of any size; memory is bounded by the largest.

        What looks like UTF-16 is scanned without its zero bytes.
        """
        wide: bool | None = None
        held, first, line = b"", True, 1
        for piece in _sized(pieces):
            if wide is None:
                wide = _is_wide(piece)
            piece = piece.replace(b"\0", b"") if wide else piece
            held = held + piece if held else piece
            if len(held) < PIECE_BYTES + REACH + _AHEAD:
                continue
            start, stop = 0 if first else REACH, len(held) - _AHEAD
            yield from self._within(held, start, stop, line)
            line += held.count(b"\n", 0, stop - REACH)
            held, first = held[stop - REACH :], False
        yield from self._within(held, 0 if first else REACH, len(held), line)

    def _within(self, text: bytes, start: int, stop: int, line: int) -> Iterator[Hit]:
        """Confirmed hits that begin in ``text[start:stop]``; what lies outside is there to be looked at."""
        for index in self._matcher.present(text):
            if index == len(self._rules):
                yield from self._needle_hits(text, start, stop, line)
                continue
            rule = self._rules[index]
            for match in self._matcher.find(index, text):
                at, end = match.start(1), match.end(1)
                if start <= at < stop and rule.confirm(Candidate(text, at, end, match.start())):
                    number = line + text.count(b"\n", 0, at)
                    yield Hit(rule.id, rule.what, rule.fix, number, _mask(text[at:end]), _fingerprint(text, at, end))

    def _needle_hits(self, text: bytes, start: int, stop: int, line: int) -> Iterator[Hit]:
        seen: set[tuple[str, int]] = set()
        for form, needle in self._forms:
            at = text.find(form, start)
            while 0 <= at < stop:
                number = line + text.count(b"\n", 0, at)
                if (needle.name, number) not in seen:
                    seen.add((needle.name, number))
                    yield Hit(
                        "known-secret",
                        f"the secret {needle.name} (sha256 {needle.digest}) of this project",
                        "take it out, and rotate it: it is a secret that is in use",
                        number,
                        f"{needle.size} characters",
                        _fingerprint(text, at, at + len(form)),
                    )
                at = text.find(form, at + len(form))

    def _prove(self) -> None:
        for rule in self._rules:
            if not any(hit.rule == rule.id for hit in self.scan([b"# canary\n", rule.sample, b"\n"])):
                raise SettingsError(
                    f"the rule {rule.id} does not catch its own sample",
                    where=f"engine {self.name}",
                    fix="reinstall clawdlets-ops; scan with --engine kingfisher meanwhile",
                )
        for needle in self.needles:
            if not any(hit.rule == "known-secret" for hit in self.scan([needle.forms()[0]])):
                raise SettingsError(f"the known secret {needle.name} is not found again", where=f"engine {self.name}")


def _sized(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        if len(piece) <= PIECE_BYTES:
            yield piece
            continue
        for at in range(0, len(piece), PIECE_BYTES):
            yield piece[at : at + PIECE_BYTES]


def _is_wide(head: bytes) -> bool:
    sample = head[:4096]
    if b"\0" not in sample:
        return False
    if sample[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return True
    zeros = max(sample[0::2].count(0), sample[1::2].count(0))
    return len(sample) >= 8 and zeros * 2 >= len(sample) * 0.8


def _mask(secret: bytes) -> str:
    shown = secret[:4].decode("ascii", "backslashreplace") if len(secret) >= 16 else ""
    return f"{shown}… ({len(secret)} characters)"


def _fingerprint(text: bytes, start: int, end: int) -> str:
    """Of the line that the secret is on, or of as much of a long line as is near."""
    left = text[max(0, start - _LINE_REACH) : start].rpartition(b"\n")[2]
    right = text[end : end + _LINE_REACH].partition(b"\n")[0]
    return hashlib.sha256((left + text[start:end] + right).strip()).hexdigest()[:_FINGERPRINT_CHARS]


def fingerprint_of_line(path: Path, number: int) -> str:
    """The fingerprint of a whole line of a file, for findings that come without a place on it."""
    with path.open("rb") as handle:
        line = next(islice(handle, number - 1, None), b"")
    return hashlib.sha256(line.strip()).hexdigest()[:_FINGERPRINT_CHARS]
