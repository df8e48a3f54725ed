"""Who reads which secret: the other's maps of environment variables and files, as owners of files under /run/secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from clawdlets_ops.bots import bot_user
from clawdlets_ops.fleet import RESERVED_SECRETS
from clawdlets_ops.peer.reading import Note, Part

SECRET_NAME = r"[a-z][a-z0-9_]{0,62}"  # noqa: S105  (the form of a name)
BOT_NAME = r"[a-z](?:[a-z0-9-]{0,24}[a-z0-9])?"
MODES = ("0400", "0440", "0600", "0640")


@dataclass
class Readers:
    """Of each secret: the bots that read it ("" for the fleet), and the mode that was asked for."""

    bots: dict[str, set[str]] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def add(self, part: Part, key: str, secret: object, bot: str, mode: str = "") -> None:
        """``bot`` reads ``secret``, as is said at ``key``."""
        if not isinstance(secret, str):
            part.note(key, "refused", "names no secret")
            return
        name = secret.strip().lower().replace("-", "_")
        if not re.fullmatch(SECRET_NAME, name) or name.endswith("_unencrypted"):
            part.note(key, "refused", "the secret's name cannot be one here: small letters, digits and low lines")
            return
        if self.names.setdefault(name, secret.strip()) != secret.strip():
            part.note(key, "refused", f"two secrets would be called {name}")
            return
        if name in RESERVED_SECRETS:
            part.note(key, "left out", f"{name} is {RESERVED_SECRETS[name]}")
            return
        if name != secret.strip() and name not in self.bots:
            part.note(key, "changed", f"the secret is called {name} here")
        self.bots.setdefault(name, set()).add(bot)
        if mode:
            self.modes[name] = mode

    def maps(self, part: Part, keys: Iterable[str], bot: str) -> None:
        """Every ``ENV: secret`` of the maps at ``keys``."""
        for key in keys:
            named = part.part(key)
            for variable, secret in named.value.items():
                self.add(named, variable, secret, bot)

    def files(self, part: Part, bot: str) -> None:
        """Every entry of ``secretFiles``."""
        for name, entry in part.parts("secretFiles"):
            secret, mode = entry.take("secretName", str, ""), entry.take("mode", str, "0400")
            target = entry.take("targetPath", str, "")
            entry.leave(("owner", "group", "format"), "the file is the value, and belongs to the bot that reads it")
            entry.finish()
            kept = mode if mode in MODES else "0400"
            if kept != mode:
                entry.note("mode", "changed", f"{mode} is tightened to {kept}")
            entry.note("targetPath", "changed", f"{target} is /run/secrets/{secret.lower().replace('-', '_')} here")
            self.add(part, f"secretFiles.{name}.secretName", secret, bot, kept)

    def wiring(self, bots: Iterable[str], notes: list[Note], path: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """The host's ``secrets``, and for each bot the names of its own."""
        everyone = sorted(bots)
        secrets: dict[str, Any] = {}
        own: dict[str, list[str]] = {bot: [] for bot in everyone}
        for name, said in self.bots.items():
            readers = everyone if "" in said else sorted(said & set(everyone))
            wired: dict[str, str] = {"mode": self.modes[name]} if name in self.modes else {}
            if len(readers) == 1:
                wired["owner"] = bot_user(readers[0])
                own[readers[0]].append(name)
            elif readers:
                why = (
                    f"{', '.join(readers)} read it, and here a secret has one owner: root, until you give each its own"
                )
                notes.append(Note(f"{path}.secrets.{name}", "changed", why))
            secrets[name] = wired
        return secrets, own
