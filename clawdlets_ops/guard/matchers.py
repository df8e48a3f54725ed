"""Which rules may occur in a piece of text, and where: hyperscan and google-re2, or the standard library's ``re`` alone.

All find the same (tests/contract/test_guard_engine.py). One automaton of RE2 takes some 450 MB/s whatever is in it, so it
alone cannot look for everything at 300; hyperscan compiles to instructions that look at many bytes at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from clawdlets_ops.guard.candidate import LONG_RUN
from clawdlets_ops.guard.rules import Rule

re2: Any
hyperscan: Any
try:
    import re2  # type: ignore[import-not-found,import-untyped,no-redef,unused-ignore]
except ImportError:  # an optional speed-up: everything works without it
    re2 = None
try:
    import hyperscan  # type: ignore[import-not-found,no-redef,unused-ignore]
except ImportError:  # likewise
    hyperscan = None

_DFA_MEMORY_BYTES = 512 * 1024 * 1024  # a ceiling, reserved only as far as it is used; RE2 fails silently at it
_NEEDLE_TRIGGER_BYTES = 10  # of each form; the whole is then searched for where this occurs
_NEEDLE_START_BYTES = 24  # the same for hyperscan, which takes seconds to compile the whole forms of a fleet's secrets
LONG_TRIGGER = rb"[A-Za-z0-9]{64}|[A-Za-z0-9+/]{43}="
"""In every match of a rule with ``long_run``."""


class Matcher(Protocol):
    """Finds patterns in bytes. ``present`` gives the indices of rules that may occur in ``text``, in order; one more
    than there are rules stands for the needles."""

    name: str

    def present(self, text: bytes) -> Sequence[int]:
        """Which patterns may occur."""
        ...

    def find(self, index: int, text: bytes) -> Iterable[Any]:
        """The matches of one pattern, as ``re.finditer`` gives them."""
        ...


def best(rules: Sequence[Rule], forms: Sequence[bytes]) -> Matcher:
    """The fastest that is installed and that this processor can run."""
    if re2 is None:
        return ReMatcher(rules, forms)
    if hyperscan is None:
        return Re2Matcher(rules, forms)
    try:
        return HyperscanMatcher(rules, forms)
    except hyperscan.error:  # an older processor
        return Re2Matcher(rules, forms)


class ReMatcher:
    """The standard library: a word search first, then each rule that may occur."""

    name = "re"

    def __init__(self, rules: Sequence[Rule], forms: Sequence[bytes]) -> None:
        self._rules = rules
        self._patterns = [re.compile(rule.pattern) for rule in rules]
        self._triggers = [re.compile(rule.trigger or rule.pattern) for rule in rules]
        self._long = re.compile(LONG_TRIGGER)
        self._forms = forms

    def present(self, text: bytes) -> Sequence[int]:
        """A search for each rule's words, then for its trigger."""
        low, long_run = text.lower(), _has_long_run(text) and self._long.search(text)
        found = [
            index
            for index, (rule, trigger) in enumerate(zip(self._rules, self._triggers, strict=True))
            if (not rule.keywords or any(word in low for word in rule.keywords))
            and (long_run if rule.long_run else trigger.search(text))
        ]
        return [*found, len(self._rules)] if any(form in text for form in self._forms) else found

    def find(self, index: int, text: bytes) -> Iterable[Any]:
        """``re``'s own search for one pattern."""
        return self._patterns[index].finditer(text)


class Re2Matcher:
    """One Set of all triggers and of what the needles' forms begin with."""

    name = "re2"

    def __init__(self, rules: Sequence[Rule], forms: Sequence[bytes]) -> None:
        options = re2.Options()
        options.max_mem = _DFA_MEMORY_BYTES
        options.encoding = re2.Options.Encoding.LATIN1
        self._set = re2.Set.SearchSet(options)
        self._patterns = [re2.compile(rule.pattern, options) for rule in rules]
        self._long_trigger = re2.compile(LONG_TRIGGER, options)
        self._long = [index for index, rule in enumerate(rules) if rule.long_run]
        self._numbers = [index for index, rule in enumerate(rules) if not rule.long_run]
        for index in self._numbers:
            self._set.Add(rules[index].trigger or rules[index].pattern)
        if forms:
            self._numbers.append(len(rules))
            self._set.Add(b"|".join(sorted({_literal(form[:_NEEDLE_TRIGGER_BYTES]) for form in forms})))
        self._set.Compile()

    def present(self, text: bytes) -> Sequence[int]:
        """One pass of the Set; long runs apart, whose counting would multiply the automaton's states."""
        found = [self._numbers[place] for place in self._set.Match(text) or ()]
        if self._long and _has_long_run(text) and self._long_trigger.search(text):
            found += self._long
        return sorted(found)

    def find(self, index: int, text: bytes) -> Iterator[Any]:
        """RE2's own search for one pattern."""
        found: Iterator[Any] = self._patterns[index].finditer(text)
        return found


class HyperscanMatcher(Re2Matcher):
    """Triggers with a word in them and the needles in one database of hyperscan, triggers that only count in another.

    Together they would lose their short cuts. Only what occurs is looked for with RE2. ``hyperscan.error`` on a
    processor that it does not know.
    """

    name = "hyperscan+re2"

    def __init__(self, rules: Sequence[Rule], forms: Sequence[bytes]) -> None:
        super().__init__(rules, ())
        self._seen: list[int] = []
        worded: list[tuple[bytes, int]] = []
        counting: list[tuple[bytes, int]] = []
        for index, rule in enumerate(rules):
            kind = worded if rule.keywords or not rule.long_run else counting
            kind.append((rule.trigger or rule.pattern, index))
        worded += [(_literal(start), len(rules)) for start in sorted({form[:_NEEDLE_START_BYTES] for form in forms})]
        self._databases = [_database(patterns) for patterns in (worded, counting) if patterns]

    def present(self, text: bytes) -> Sequence[int]:
        """A pass of each database; it calls back for what occurs, and hardly anything does."""
        for database in self._databases:
            database.scan(text, match_event_handler=self._note)
        if not self._seen:
            return ()
        found = sorted(set(self._seen))
        self._seen.clear()
        return found

    def _note(self, index: int, start: int, end: int, flags: int, context: object) -> None:  # noqa: ARG002
        self._seen.append(index)


def _database(patterns: Sequence[tuple[bytes, int]]) -> Any:
    database = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
    database.compile(
        expressions=[pattern for pattern, _ in patterns],
        ids=[number for _, number in patterns],
        elements=len(patterns),
        flags=[hyperscan.HS_FLAG_SINGLEMATCH | hyperscan.HS_FLAG_DOTALL] * len(patterns),
    )
    return database


_RUNS = bytes(97 if chr(byte).isascii() and (chr(byte).isalnum() or byte in b"+/") else 32 for byte in range(256))
_RUN = b"a" * LONG_RUN


def _has_long_run(text: bytes) -> bool:
    """Quicker than a pattern that counts."""
    return _RUN in text.translate(_RUNS)


def _literal(form: bytes) -> bytes:
    return b"".join(b"\\x%02x" % byte if not (48 <= byte <= 57) else b"%c" % byte for byte in form)
