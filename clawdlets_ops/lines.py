"""Lines out of a stream of bytes that comes in pieces, may hold anything, and need not end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from clawdlets_ops.sensitive import Redactor

LINE_LIMIT_BYTES: Final = 16 * 1024


class Lines:
    """Hands lines on as they become whole; of one that does not end, only the beginning."""

    def __init__(self, redactor: Redactor, on_line: Callable[[str], None] | None) -> None:
        self._redactor, self._on_line = redactor, on_line
        self._rest, self._skipping = b"", False

    def feed(self, data: bytes) -> None:
        """Take what was read."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            self._hand_on(line)
            self._skipping = False
        if len(self._rest) > 2 * LINE_LIMIT_BYTES:
            self.end()
            self._skipping = True

    def end(self) -> None:
        """No more comes: what is left is the last line."""
        rest, self._rest = self._rest, b""
        if rest:
            self._hand_on(rest)

    def _hand_on(self, line: bytes) -> None:
        if self._on_line is not None and not self._skipping:
            self._on_line(self._redactor.scrub(line.decode(errors="replace").rstrip("\r"))[:LINE_LIMIT_BYTES])
