"""The gates before the first byte: what must be true of a target, and of what is shipped to it, before it is formatted.

Pure functions over what was observed. Each answers yes, no or unknown. Unknown refuses too, but for the flake's
attribute: where Nix is not there to ask, nixos-anywhere itself stops before it reaches the target.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from clawdlets_ops.errors import InstallRefused
from clawdlets_ops.finding import Finding, State
from clawdlets_ops.fleet import Host

ARCHITECTURE: Final = {"x86_64-linux": "x86_64", "aarch64-linux": "aarch64"}
MEMORY_BYTES: Final = 1_500_000_000
"""What the kexec installer needs without swap (nixos-anywhere, docs/requirements.md)."""
STABLE_NAMES: Final = ("/dev/disk/by-id/", "/dev/disk/by-path/")
SYSTEM_PARTITION: Final = "disk-main-root"
"""The label that disko gives the root partition of a host."""

CLAIMS: Final = {
    "INSTALL-01": "the server's architecture is the declared one",
    "INSTALL-02": "the server has 1.5 GB of memory",
    "INSTALL-03": "diskDevice names one disk, without doubt",
    "INSTALL-04": "no installed NixOS answers",
    "INSTALL-05": "no host of ours lies on the disks",
    "INSTALL-06": "the host can decrypt every secret with its own key",
    "INSTALL-07": "the payload is the one that the repository makes now",
    "INSTALL-08": "the flake has the host's configuration",
}
MAY_BE_UNKNOWN: Final = frozenset({"INSTALL-08"})


@dataclass(frozen=True, slots=True)
class Target:
    """What a login to the target showed; an empty field could not be read.

    ``machine``: ``uname -m``. ``memory_bytes``: MemTotal. ``block_devices``: ``lsblk --json --bytes --output
    PATH,TYPE,SIZE,RO,PARTLABEL``. ``device``: what the declared diskDevice is a link to, or itself. ``marker``: the
    install marker that lies on the running system or below ``/mnt``, unless it is the installer's.
    """

    machine: str
    os_release: str
    memory_bytes: int | None
    block_devices: str
    device: str
    marker: str = ""

    @property
    def is_installer(self) -> bool:
        """Whether the kexec installer runs."""
        return is_installer(self.os_release)


@dataclass(frozen=True, slots=True)
class Shipment:
    """What this machine knows of what is to be installed.

    ``secrets``: what is wrong with them, or nothing. ``payload``: current, stale or absent. ``configurations``: the names
    in the flake's ``nixosConfigurations``, None when they could not be asked for; ``flake`` is then why.
    """

    secrets: str
    payload: str
    configurations: tuple[str, ...] | None
    flake: str = ""


def is_installer(os_release: str) -> bool:
    """Whether this os-release is the kexec installer's."""
    return "VARIANT_ID=installer" in os_release.replace('"', "").splitlines()


def target_gates(host: str, declared: Host, seen: Target) -> tuple[Finding, ...]:
    """What the target itself says; pure."""
    return (
        _architecture(host, declared, seen),
        _memory(host, seen),
        _disk(host, declared, seen),
        _installed(host, seen),
        _ours(host, seen),
    )


def shipment_gates(host: str, ships: Shipment) -> tuple[Finding, ...]:
    """What can be known before the target is met; pure."""
    secrets = _finding(
        "INSTALL-06",
        host,
        State.FAIL if ships.secrets else State.PASS,
        ships.secrets or "every file opens with the host's key",
        "run secrets reconcile, then this again",
    )
    payload = _finding(
        "INSTALL-07",
        host,
        State.PASS if ships.payload == "current" else State.FAIL,
        f"the payload is {ships.payload}",
        f"pyinfra inventory/prod.py deploys/payload.py --limit @clawdlets/{host}",
    )
    return (secrets, payload, _flake(host, ships))


def refuse(host: str, findings: Iterable[Finding]) -> None:
    """InstallRefused that names every gate which is closed; nothing when none is."""
    closed = [
        finding
        for finding in findings
        if finding.state is State.FAIL or (finding.state is State.UNKNOWN and finding.check not in MAY_BE_UNKNOWN)
    ]
    if not closed:
        return
    lines = [f"{finding.check}: {finding.observed}" for finding in closed]
    fixes = dict.fromkeys(finding.fix for finding in closed if finding.fix)
    raise InstallRefused("is not installed, and nothing on it was changed\n  " + "\n  ".join(lines),
                         where=host, fix="; ".join(fixes))  # fmt: skip


def _finding(check: str, host: str, state: State, observed: str, fix: str = "") -> Finding:
    return Finding(check, state, CLAIMS[check], host=host, observed=observed, fix="" if state is State.PASS else fix)


def _architecture(host: str, declared: Host, seen: Target) -> Finding:
    wanted = ARCHITECTURE[declared.system]
    state = State.UNKNOWN if not seen.machine else State.PASS if seen.machine == wanted else State.FAIL
    return _finding(
        "INSTALL-01",
        host,
        state,
        f"is {seen.machine or 'of an architecture that it does not tell'}, declared is {declared.system}",
        f"correct hosts.{host}.system, or choose another hetzner.serverType",
    )


def _memory(host: str, seen: Target) -> Finding:
    if seen.memory_bytes is None:
        return _finding("INSTALL-02", host, State.UNKNOWN, "does not tell its memory", "look at /proc/meminfo there")
    enough = seen.memory_bytes >= MEMORY_BYTES
    return _finding(
        "INSTALL-02",
        host,
        State.PASS if enough else State.FAIL,
        f"has {seen.memory_bytes / 1e9:.1f} GB of memory, the installer needs {MEMORY_BYTES / 1e9:.1f} GB",
        "choose a larger hetzner.serverType",
    )


def _disk(host: str, declared: Host, seen: Target) -> Finding:
    def answer(state: State, observed: str, fix: str = "") -> Finding:
        return _finding("INSTALL-03", host, state, observed, fix)

    by_id = f"name the disk by {STABLE_NAMES[0]}… in hosts.{host}.diskDevice"
    try:
        disks = _whole_disks(seen.block_devices)
    except (ValueError, KeyError, TypeError, AttributeError):
        return answer(State.UNKNOWN, "does not tell its disks", "what does lsblk --json say there?")
    names = ", ".join(f"{path} ({size / 1e9:.0f} GB)" for path, size in disks.items())
    if seen.device not in disks:
        said = f"{declared.disk_device} is no whole, writable disk; there are: {names or 'none'}"
        return answer(State.FAIL, said, f"correct hosts.{host}.diskDevice")
    if len(disks) > 1 and not declared.disk_device.startswith(STABLE_NAMES):
        said = f"has {len(disks)} disks ({names}), and {declared.disk_device} may be another after the next boot"
        return answer(State.FAIL, said, by_id)
    return answer(State.PASS, f"{declared.disk_device} is {seen.device}")


def _installed(host: str, seen: Target) -> Finding:
    fields = seen.os_release.replace('"', "").splitlines()
    if not fields:
        return _finding("INSTALL-04", host, State.UNKNOWN, "does not tell which system it runs")
    installed = "ID=nixos" in fields and not seen.is_installer
    said = (
        "an installed NixOS answers here, with another host key than ours: it is not formatted"
        if installed
        else "a system to install from"
    )
    return _finding("INSTALL-04", host, State.FAIL if installed else State.PASS, said, _by_name(host))


def _ours(host: str, seen: Target) -> Finding:
    """The installer that we started is about to make, or has made, the very partition that this looks for."""
    found = ""
    if not seen.is_installer:
        if seen.marker:
            found = "an install marker of ours"
        elif any(label == SYSTEM_PARTITION for label in _labels(seen.block_devices)):
            found = f"a partition {SYSTEM_PARTITION}, as an installed host has it (does the rescue system run?)"
    said = f"there is {found}: it is not formatted" if found else "neither marker nor partition of an installed host"
    return _finding("INSTALL-05", host, State.FAIL if found else State.PASS, said, _by_name(host))


def _flake(host: str, ships: Shipment) -> Finding:
    if ships.configurations is None:
        return _finding("INSTALL-08", host, State.UNKNOWN, ships.flake or "the flake was not asked")
    there = host in ships.configurations
    names = ", ".join(ships.configurations) or "none"
    said = f"nixosConfigurations.{host} is there" if there else f"no nixosConfigurations.{host}; there are: {names}"
    if not there and ships.flake:
        said = f"no nixosConfigurations.{host}: {ships.flake}"
    return _finding(
        "INSTALL-08", host, State.PASS if there else State.FAIL, said, "declare it in flake.nix, and git add"
    )


def _by_name(host: str) -> str:
    return f"if it is to be overwritten, say so by name: --data reinstall={host}"


def _whole_disks(block_devices: str) -> dict[str, int]:
    """Path to size in bytes of every disk that could be written: no CD, loop or memory device."""
    memory = ("/dev/zram", "/dev/ram", "/dev/loop", "/dev/nbd", "/dev/fd")
    return {
        entry["path"]: int(entry["size"])
        for entry in json.loads(block_devices)["blockdevices"]
        if entry["type"] == "disk"
        and str(entry["ro"]).lower() in ("false", "0")
        and int(entry["size"]) > 0
        and not entry["path"].startswith(memory)
    }


def _labels(block_devices: str) -> list[str]:
    def below(entries: list[dict[str, Any]]) -> list[str]:
        return [
            label
            for entry in entries
            for label in (str(entry.get("partlabel") or ""), *below(entry.get("children") or []))
        ]

    try:
        return below(json.loads(block_devices)["blockdevices"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # INSTALL-03 says so
