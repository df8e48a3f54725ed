"""Declaring a host: what a person says of it on a command line, as an entry of the fleet file.

Nothing is guessed that opens anything: who may reach the host before lockdown, and with which key, is always said, or
taken from a host that is named with ``like``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from clawdlets_ops import fleetfile
from clawdlets_ops.errors import FleetError
from clawdlets_ops.fleet import Fleet, parse_fleet

ARM_TYPES = "cax"
"""What Hetzner's Arm server types begin with (docs.hetzner.com, "Server types")."""
LIKE_LEAVES_OUT = ("targetHost", "bots")
"""What is one host's own and never its likeness's: where it is reached, and who runs there (whose secrets are its own)."""


@dataclass(frozen=True)
class Wish:
    """What was said of a host; empty means not said. ``secrets`` are ``NAME=OWNER`` (or ``NAME``, for root)."""

    admin_cidrs: Sequence[str] = ()
    ssh_pubkey_file: str = ""
    server_type: str = ""
    location: str = ""
    system: str = ""
    disk_device: str = ""
    exposure: str = ""
    tailnet: str = ""
    secrets: Sequence[str] = ()
    authorized_keys: Sequence[str] = ()
    """The lines of public keys. A key that is only named by its file is not seen by the flake, unless git tracks the file."""


def filled(wish: Wish, *, admin_cidrs: Sequence[str], ssh_pubkey_file: str) -> Wish:
    """``wish`` with these where nothing was said."""
    return replace(
        wish,
        admin_cidrs=wish.admin_cidrs or admin_cidrs,
        ssh_pubkey_file=wish.ssh_pubkey_file or ssh_pubkey_file,
    )


def entry(wish: Wish, like: dict[str, Any] | None = None) -> dict[str, Any]:
    """The host's entry: that of ``like``, with all that was said put over it."""
    made: dict[str, Any] = copy.deepcopy(like) if like else {}
    for name in LIKE_LEAVES_OUT:
        made.pop(name, None)
    if wish.server_type and "hetzner" in made:
        made["hetzner"].pop("serverTypeFallbacks", None)  # they were chosen for the other type
    system = wish.system or ("aarch64-linux" if wish.server_type.startswith(ARM_TYPES) else "")
    said: list[tuple[tuple[str, ...], Any]] = [
        (("system",), system),
        (("diskDevice",), wish.disk_device),
        (("hetzner", "serverType"), wish.server_type),
        (("hetzner", "location"), wish.location),
        (("provisioning", "adminCidrs"), list(wish.admin_cidrs)),
        (("provisioning", "sshPubkeyFile"), wish.ssh_pubkey_file),
        (("sshAuthorizedKeys",), list(wish.authorized_keys)),
        (("sshExposure", "mode"), wish.exposure),
        (("tailnet", "mode"), wish.tailnet),
        (("secrets",), dict(_secret(text) for text in wish.secrets)),
    ]
    for keys, value in said:
        if not value:
            continue
        part = made
        for key in keys[:-1]:
            part = part.setdefault(key, {})
        part[keys[-1]] = value
    return made


def add_host(text: str, name: str, wish: Wish, *, like: str = "", where: str) -> str:
    """The fleet file ``text`` with the host ``name`` added; FleetError when either is not acceptable.

    All else in the file stays as it is, byte for byte.
    """
    fleet = parse_fleet(text, where=where)
    if name in fleet.hosts:
        raise FleetError(
            f"there is already a host {name!r}", where=where, fix="choose another name, or edit hosts." + name
        )
    model = None
    if like:
        fleet.host(like)
        model = fleetfile.parse(text, where=where)["hosts"][like]
    changed = fleetfile.add_member(text, ["hosts"], name, entry(wish, model))
    parse_fleet(changed, where=f"{name} cannot be added to {where}: the result")
    return changed


def overview(fleet: Fleet) -> list[dict[str, Any]]:
    """What a list of the hosts shows of each: name, hetzner, system, exposure, tailnet, egress, secrets."""
    return [
        {
            "host": name,
            "serverType": host.hetzner.server_type,
            "location": host.hetzner.location,
            "system": host.system,
            "sshExposure": host.ssh_exposure.mode,
            "tailnet": host.tailnet.mode,
            "egress": host.egress.mode,
            "secrets": len(host.secrets),
        }
        for name, host in fleet.hosts.items()
    ]


def _secret(text: str) -> tuple[str, dict[str, str]]:
    name, _, owner = text.partition("=")
    return name, {"owner": owner} if owner else {}
