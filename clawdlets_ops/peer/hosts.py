"""One host of the other's file as one of ours. What it would open wider than it says is refused, not repaired."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clawdlets_ops.fleet import TARGET_HOST, check_public_key, parse_cidr, world_open
from clawdlets_ops.peer.reading import Part

TAILNET_RANGES = (ipaddress.ip_network("100.64.0.0/10"), ipaddress.ip_network("fd7a:115c:a1e0::/48"))
"""What Tailscale gives its nodes (tailscale.com/kb/1033)."""
EMPTY_EXPOSURE = {7: "tailnet", 12: "bootstrap", 2: "bootstrap"}
"""What the other takes where nothing is said; of the versions between it is not known, and the closed one is taken."""
FIRST_WITHOUT_HOST_KEYS = 10


@dataclass(frozen=True)
class Decisions:
    """What the operator says in the place of the file: for every host; empty means nothing was said."""

    admin_cidrs: Sequence[str] = ()
    ssh_pubkey_file: str = ""


def read(host: Part, version: int, keys: Sequence[str], said: Decisions) -> dict[str, Any]:
    """The entry of our fleet file, without bots and secrets. Notes are left in ``host``."""
    infra2 = version == 2  # the infra schema of the later product
    made: dict[str, Any] = {}
    if not host.take("enable", bool, False):
        host.note(
            "enable",
            "changed",
            "there is no such switch here: what is declared is deployed when it is named, or with the fleet",
        )
    made["diskDevice"] = host.take("diskDevice", str, "/dev/sda")
    if "CHANGE_ME" in made["diskDevice"]:
        host.note("diskDevice", "refused", "is still to be filled in; on Hetzner Cloud it is /dev/sda")
    flake_host = host.take("flakeHost", str, "")
    if flake_host and flake_host != host.path.rpartition(".")[2]:
        host.note("flakeHost", "left out", "a host is called the same in the flake")
    _target(host, made)
    made["hetzner"], made["tailnet"] = _hetzner(host, made, infra2=infra2)
    made["provisioning"] = _provisioning(host, said, infra2=infra2)
    _exposure(host, made, version)
    made["sshAuthorizedKeys"] = _keys(host, version, keys)
    if not made["sshAuthorizedKeys"] and not made["provisioning"].get("sshPubkeyFile"):
        host.note("provisioning.sshPubkeyFile", "refused", "no key could log in as admin: give --ssh-pubkey-file")
    host.leave(("cache",), "binary caches belong into your NixOS configuration (nix.settings)")
    host.leave(("operator",), "no operator gets more sudo than the modules give")
    host.leave(("selfUpdate",), "updates are not taken over; an unsigned or http source of them least of all")
    host.leave(("agentModelPrimary", "theme", "openclaw"), "is of the bots' own configuration")
    if infra2:
        host.leave(("aws",), "only Hetzner Cloud is provisioned here")
    return {key: value for key, value in made.items() if value not in ([], {})}


def _target(host: Part, made: dict[str, Any]) -> None:
    target = host.take("targetHost", str, "").replace("[", "").replace("]", "")
    if not target:
        return
    address = target.rpartition("@")[2]
    try:
        inside = any(ipaddress.ip_address(address) in network for network in TAILNET_RANGES)
    except ValueError:
        inside = address.endswith(".ts.net")
    if inside and re.fullmatch(TARGET_HOST, target):
        made["targetHost"] = target
    else:
        host.note("targetHost", "left out", "is no address of the tailnet; the host's is found by its name")


def _hetzner(host: Part, made: dict[str, Any], *, infra2: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    part = host.part("hetzner")
    order: dict[str, Any] = {
        "serverType": part.take("serverType", str, "cpx32" if infra2 else "cx43"),
        "location": part.take("location", str, "fsn1" if infra2 else "nbg1"),
    }
    if order["serverType"].startswith("cax"):
        made["system"] = "aarch64-linux"
        part.note("serverType", "changed", "is an Arm type, so system is aarch64-linux")
    image = part.take("image", str, "")
    if re.fullmatch(r"(?:debian|ubuntu)-[0-9.]+", image):
        order["image"] = image
    elif image:
        part.note("image", "left out", "the installation starts from a stock image, not from one of your own")
    net = host.part("tailnet")
    tailnet: dict[str, Any] = {"mode": net.take("mode", str, "tailscale")}
    net.finish()
    if infra2:
        tailnet["allowUdpIngress"] = part.take("allowTailscaleUdpIngress", bool, True)
        if size := part.take("volumeSizeGb", int, 0):
            order["volumes"] = {"data": {"sizeGb": size}}
            part.note(
                "volumeSizeGb",
                "changed",
                "is the volume data here; where it is mounted is for your NixOS configuration",
            )
        part.leave(("volumeLinuxDevice",), "a volume is found by its id")
    part.finish()
    return order, tailnet


def _provisioning(host: Part, said: Decisions, *, infra2: bool) -> dict[str, Any]:
    part = host.part("provisioning")
    if infra2 and (provider := part.take("provider", str, "hetzner")) != "hetzner":
        part.note("provider", "refused", f"{provider} is not provisioned here")
    cidr, open_wide = part.take("adminCidr", str, ""), part.take("adminCidrAllowWorldOpen", bool, False)
    key = part.take("sshPubkeyFile", str, "").replace("$HOME/", "~/", 1)
    part.finish()
    made: dict[str, Any] = {"adminCidrs": list(said.admin_cidrs) or _networks(part, cidr, open_wide=open_wide)}
    if said.admin_cidrs and cidr:
        part.note("adminCidr", "changed", "--admin-cidr takes its place")
    elif open_wide and made["adminCidrs"]:
        made["adminCidrAllowWorldOpen"] = True
    if said.ssh_pubkey_file or key:
        made["sshPubkeyFile"] = said.ssh_pubkey_file or key
    return made


def _networks(part: Part, cidr: str, *, open_wide: bool) -> list[str]:
    if not cidr:
        part.note("adminCidr", "refused", "is empty, and nobody could reach the host to install it: give --admin-cidr")
        return []
    try:
        network = parse_cidr(cidr)
    except ValueError as error:
        part.note("adminCidr", "refused", str(error))
        return []
    if world_open([network]) and not open_wide:
        why = f"is {network}, the internet at large, and adminCidrAllowWorldOpen does not say so: give --admin-cidr"
        part.note("adminCidr", "refused", why)
        return []
    return [str(network)]


def _exposure(host: Part, made: dict[str, Any], version: int) -> None:
    part = host.part("sshExposure")
    mode = part.take("mode", str, "")
    part.finish()
    if not mode:
        mode = EMPTY_EXPOSURE.get(version, "tailnet")
        part.note("mode", "changed", f"nothing was said, and {mode} is taken")
    made["sshExposure"] = {"mode": mode}
    if mode == "tailnet" and made["tailnet"]["mode"] == "none":
        part.note("mode", "refused", "is tailnet where tailnet.mode is none: a host that nobody can reach")
    if mode == "bootstrap":
        part.note("mode", "changed", "here bootstrap stays open and every verification says so; tailnet is the goal")


def _keys(host: Part, version: int, of_fleet: Sequence[str]) -> list[str]:
    """Those of the fleet and, in versions that had such, of the host; each once."""
    own: list[str] = []
    if version in range(7, FIRST_WITHOUT_HOST_KEYS):
        own = host.texts("sshAuthorizedKeys")
        host.leave(("sshKnownHosts",), "host keys are made here before the host is, and pinned in secrets/keys")
    accepted: list[str] = []
    for line in dict.fromkeys((*of_fleet, *own)):
        try:
            check_public_key(line)
            accepted.append(line)
        except ValueError as error:
            host.note("sshAuthorizedKeys", "refused", str(error))
    return accepted
