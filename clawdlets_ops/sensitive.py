"""Values that must not be seen, and the scrubbing of text that may hold them."""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterable
from typing import NoReturn
from urllib.parse import quote

MASK = "[secret]"
MIN_SCRUB_CHARS = 6
"""Shorter values are not scrubbed from text: they would blank out ordinary words."""


class Secret:
    """A string that shows itself only to ``.reveal()``: repr, str and format are masked, pickling is refused."""

    __slots__ = ("_value", "name")

    def __init__(self, value: str, name: str = "secret") -> None:
        self._value = value
        self.name = name

    def reveal(self) -> str:
        """The value in clear. Every call of this is a place to look at in a review."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret({self.name})"

    def __str__(self) -> str:
        return MASK

    def __format__(self, spec: str) -> str:
        return MASK

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __bool__(self) -> bool:
        return bool(self._value)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} is not to be pickled or copied")


class Redactor:
    """Scrubs known secrets, in the forms a tool may echo them, out of text."""

    def __init__(self, secrets: Iterable[Secret] = ()) -> None:
        forms: set[str] = set()
        for secret in secrets:
            value = secret.reveal()
            for raw in {value, value.strip(), *value.splitlines()}:
                if len(raw) >= MIN_SCRUB_CHARS:
                    forms |= {raw, quote(raw, safe=""), base64.b64encode(raw.encode()).decode().rstrip("=")}
        # longest first, so that a secret that contains another is masked whole
        self._forms = sorted(forms, key=len, reverse=True)

    def scrub(self, text: str) -> str:
        """``text`` with every known form replaced by the mask."""
        for form in self._forms:
            text = text.replace(form, MASK)
        return text
