"""A fleet from the configuration of the other clawdlets (TypeScript; later clawlets): versions 7 to 12, and infra 2.

Its reader drops keys that it does not know, compares world-open networks as text, and accepts hosts that nobody can reach.
So nothing is taken on trust here: what would be opened wider than somebody has said, what cannot be reached and what is
unknown is refused by name; what has no counterpart is left out and named. Secrets are not imported: their values are
encrypted to other keys, and are given anew with ``clawdlets secrets init``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from clawdlets_ops import fleetfile
from clawdlets_ops.errors import FleetError
from clawdlets_ops.fleet import parse_fleet
from clawdlets_ops.peer import hosts
from clawdlets_ops.peer.hosts import Decisions
from clawdlets_ops.peer.reading import Note, Part
from clawdlets_ops.peer.secrets import BOT_NAME, Readers

__all__ = ["Decisions", "Imported", "Note", "read"]

INFRA = 2
LAST_WITH_LEGACY_KEYS = 8
FIRST_WITH_FLEET_KEYS = 10
_LEGACY_MAPS = ("envSecrets", "modelSecrets")


@dataclass(frozen=True)
class Imported:
    """``document`` is a fleet file's content; it is one to be used when nothing in ``notes`` is refused."""

    document: dict[str, Any]
    notes: tuple[Note, ...]

    @property
    def refused(self) -> tuple[Note, ...]:
        """What somebody has to decide first."""
        return tuple(note for note in self.notes if note.kind == "refused")


def read(text: str, *, where: str, said: Decisions | None = None, only: Collection[str] = ()) -> Imported:
    """The other's file ``text`` as ours. FleetError when it is not JSON, or of a version that is not read here.

    ``said`` is what the operator decides in its place, ``only`` the hosts to be taken (default: all).
    """
    raw = fleetfile.parse(text, where=where)
    version = raw.get("schemaVersion") if isinstance(raw, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version not in (INFRA, *fleetfile.PEER_VERSIONS):
        raise FleetError(
            f"schemaVersion {version!r} is not read here; 7 to 12 are, and 2 (infra)",
            where=where,
            fix="bring the file to one of these with its own tool first (config migrate)",
        )
    notes: list[Note] = []
    top = Part(raw, "", notes)
    top.take("schemaVersion", int, 0)
    top.leave(("$schema", "defaultHost", "baseFlake"), "hosts are named, and the flake is this repository's")
    readers, fleet_keys = Readers(), []
    fleet = top.part("fleet")
    readers.maps(fleet, ("secretEnv", *(_LEGACY_MAPS if version in range(7, LAST_WITH_LEGACY_KEYS + 1) else ())), "")
    readers.files(fleet, "")
    if version == INFRA or version >= FIRST_WITH_FLEET_KEYS:
        fleet_keys = fleet.texts("sshAuthorizedKeys")
        fleet.leave(("sshKnownHosts",), "host keys are made here before the host is, and pinned in secrets/keys")
    bots = _bots(fleet, readers, version) if version != INFRA else []
    fleet.leave(("codex", "backups"), "there is no such feature here")
    fleet.finish()
    top.leave(("cattle",), "personas and what each may have are declared anew: cattle in the fleet file")
    made = _hosts(top, version, readers, bots, fleet_keys, said or Decisions(), only)
    top.finish()
    document = {"$schema": "./clawdlets.schema.json", "schemaVersion": fleetfile.SCHEMA_VERSION, "hosts": made}
    try:
        parse_fleet(json.dumps(document), where="the result")
    except FleetError as error:
        for line in error.what.splitlines()[1:]:
            path, _, why = line.strip().partition(": ")
            if not any(note.path.startswith(path) or path.startswith(note.path) for note in notes if note.kind == "refused"):  # fmt: skip
                notes.append(Note(path, "refused", why))
    return Imported(document, tuple(notes))


def _hosts(
    top: Part,
    version: int,
    readers: Readers,
    fleet_bots: Sequence[str],
    keys: Sequence[str],
    said: Decisions,
    only: Collection[str],
) -> dict[str, Any]:
    found = list(top.parts("hosts"))
    for name in only:
        if name not in [host for host, _ in found]:
            raise FleetError(
                f"there is no host {name!r}", where="hosts", fix=f"there are: {', '.join(h for h, _ in found)}"
            )
    made: dict[str, Any] = {}
    for name, host in found:
        if only and name not in only:
            continue
        entry = hosts.read(host, version, keys, said)
        own_readers, bots = readers, list(fleet_bots)
        if version == INFRA:
            own_readers = Readers({key: set(value) for key, value in readers.bots.items()}, dict(readers.modes), dict(readers.names))  # fmt: skip
            bots = _named_bots(host, "gateways", "gatewaysOrder", own_readers, version)
        secrets, own = own_readers.wiring(bots, host.notes, host.path)
        if secrets:
            entry["secrets"] = secrets
        if bots:
            entry["bots"] = {bot: {"secrets": own[bot]} if own[bot] else {} for bot in bots}
        host.finish()
        made[name] = entry
    return made


def _bots(fleet: Part, readers: Readers, version: int) -> list[str]:
    if version in range(7, LAST_WITH_LEGACY_KEYS + 1):
        fleet.leave(("guildId", "botOverrides", "routingOverrides"), "is of the bots' own configuration")
    return _named_bots(fleet, "bots", "botOrder", readers, version)


def _named_bots(part: Part, key: str, order: str, readers: Readers, version: int) -> list[str]:
    """The bots at ``key``, under the names that they have here; what they read goes to ``readers``."""
    part.take(order, list, [])
    if isinstance(part.value.get(key), list):  # as it was before there was anything to say of each
        part = Part({**part.value, key: {str(name): {} for name in part.value[key]}}, part.path, part.notes, part.known)
    names: list[str] = []
    for said, bot in part.parts(key):
        name = said.replace("_", "-")
        if not re.fullmatch(BOT_NAME, name):
            part.note(
                f"{key}.{said}",
                "refused",
                "cannot be a bot's name here: small letters, digits, inner dashes, 26 at most",
            )
            continue
        if name in names:
            part.note(f"{key}.{said}", "refused", f"two bots would be called {name}")
            continue
        if name != said:
            part.note(f"{key}.{said}", "changed", f"the bot is called {name} here")
        names.append(name)
        profile = bot.part("profile")
        maps = ("secretEnv", *(_LEGACY_MAPS if version in range(7, LAST_WITH_LEGACY_KEYS + 1) else ()))
        readers.maps(profile, maps, name)
        readers.files(profile, name)
        if version in range(7, LAST_WITH_LEGACY_KEYS + 1) and (token := profile.take("discordTokenSecret", str, "")):
            readers.add(profile, "discordTokenSecret", token, name)
        # What a profile may hold besides is not the other's to check, and so not ours to refuse.
        profile.leave([key for key in profile.value if key not in profile.known], "is of the bot's own configuration")
        bot.leave([key for key in bot.value if key != "profile"], "is of the bot's own configuration")
    return names
