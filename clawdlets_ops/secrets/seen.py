"""What was last seen in each encrypted file, without its plaintext: the reason why a run that changes nothing is free.

For every file a keyed digest (HMAC-SHA256) of its bytes and of the value inside. A file whose bytes still have the
recorded digest holds the recorded value, so that a given value can be compared with it without a sops process. The key
is random, lies in the same 0600 file as the digests, and makes them useless to whoever sees only the digests; who can
read the file can read the operator's age key beside it anyway. The file is a cache: deleted or damaged, it is made anew.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clawdlets_ops.errors import SettingsError
from clawdlets_ops.files import read_private
from clawdlets_ops.sensitive import Secret

VERSION = 1
KEY_BYTES = 32


@dataclass(frozen=True)
class Entry:
    """``cipher`` and ``plain`` are digests of the file and its value; ``password`` of the password that a hash was made
    of, where that was given; ``public`` the public half, in clear, of a key pair that the file holds."""

    cipher: str
    plain: str = ""
    password: str = ""
    public: str = ""


@dataclass(frozen=True)
class Seen:
    """The record of one host, keyed by the file's path relative to the project."""

    key: bytes = field(repr=False)
    entries: Mapping[str, Entry]

    def digest(self, value: str | Secret) -> str:
        """The keyed digest of ``value``."""
        text = value.reveal() if isinstance(value, Secret) else value
        return hmac.digest(self.key, text.encode(), "sha256").hex()

    def entry(self, name: str, text: str) -> Entry | None:
        """What is known of the file ``name`` if it still holds exactly ``text``."""
        entry = self.entries.get(name)
        return entry if entry and hmac.compare_digest(entry.cipher, self.digest(text)) else None

    def to_json(self, entries: Mapping[str, Entry]) -> str:
        """The record with ``entries`` in the place of its own, as the text to keep."""
        files = {
            name: {part: value for part, value in vars(entry).items() if value}
            for name, entry in sorted(entries.items())
        }
        return json.dumps({"version": VERSION, "key": self.key.hex(), "files": files}, indent=1) + "\n"


def load_seen(path: Path, *, random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> Seen:
    """The record in ``path``; an empty one with a new key when there is none or it cannot be trusted."""
    try:
        raw = json.loads(read_private(path))
        key = bytes.fromhex(raw["key"])
        if raw["version"] == VERSION and len(key) == KEY_BYTES:
            return Seen(key, {name: Entry(**entry) for name, entry in raw["files"].items()})
    except (SettingsError, ValueError, KeyError, TypeError, AttributeError):
        pass  # a cache that says nothing: everything is decrypted once more
    return Seen(random_bytes(KEY_BYTES), {})
