"""A match with what stands around it: what a rule is asked about. Pure."""

from __future__ import annotations

from dataclasses import dataclass

REACH = 1024
"""How far before and after a match a rule may look, in bytes; also the longest match."""

LONG_RUN = 43
"""As many characters as 32 bytes have in base64."""


@dataclass(frozen=True)
class Candidate:
    """A match: ``text[start:end]`` is group 1, ``whole`` where the whole match begins."""

    text: bytes
    start: int
    end: int
    whole: int

    @property
    def secret(self) -> bytes:
        """What the rule takes for the secret."""
        return self.text[self.start : self.end]

    @property
    def before(self) -> bytes:
        """What stands before the secret, at most REACH bytes."""
        return self.text[max(0, self.start - REACH) : self.start]

    @property
    def after(self) -> bytes:
        """What follows the secret, at most REACH bytes."""
        return self.text[self.end : self.end + REACH]

    @property
    def line_before(self) -> bytes:
        """What stands before the secret on its line."""
        return self.before.rpartition(b"\n")[2]

    def stands_alone(self, joined: bytes) -> bool:
        """True when no letter or digit, and none of ``joined``, touches either side."""
        near = self.text[self.start - 1 : self.start] if self.start else b"", self.text[self.end : self.end + 1]
        return not any(byte.isalnum() or (byte and byte in joined) for byte in near)
