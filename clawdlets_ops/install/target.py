"""What stands at a host's addresses, and what is therefore to be done; seen from outside, without a login."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from clawdlets_ops import nixos_anywhere, ssh, tailnet
from clawdlets_ops.errors import ClawdletsError, HostKeyError, UnreachableError
from clawdlets_ops.fleet import Host
from clawdlets_ops.hetzner import Server
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Runner


class TargetState(StrEnum):
    """What stands at the address. UNKNOWN is never treated as FRESH."""

    ABSENT = "absent"
    FRESH = "fresh"
    INSTALLED = "installed"
    STRANGER = "stranger"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Known:
    """What earlier runs wrote down about this very server (its id is compared). It is only ever a reason to refuse, or
    to finish what was begun: that a host is installed is read from the key it shows.

    ``installer_pin``: the key of the fresh server, pinned at first sight. ``installed``: a receipt is there.
    ``unfinished``: an installation was begun and its receipt is not written.
    """

    installer_pin: str | None = None
    installed: bool = False
    unfinished: bool = False


@dataclass(frozen=True)
class Seen:
    """What was seen of a target. ``address`` is the one that showed ``key``."""

    state: TargetState
    address: str = ""
    key: str = ""


@dataclass(frozen=True)
class InstallPlan:
    """``phases`` is empty when nothing is to be installed; ``finish`` when the proof and the receipt are still missing."""

    host: str
    phases: tuple[str, ...]
    why: str
    finish: bool = False

    @property
    def empty(self) -> bool:
        """True when the host is installed and its receipt written."""
        return not self.phases and not self.finish

    def __str__(self) -> str:
        return f"{self.why}: {', '.join(self.phases)}" if self.phases else self.why


def read_known(layout: Layout, host: str, server: Server) -> Known:
    """What this runtime dir knows of ``server``."""
    server_id, _, key = _text(layout.installer_pin(host)).strip().partition(" ")
    pin = key if key and server_id == str(server.id) else None
    return Known(
        installer_pin=pin,
        installed=_receipt_server(_text(layout.install_receipt(host))) == server.id,
        unfinished=pin is not None or layout.install_dir(host).exists(),
    )


def plan(host: str, seen: Seen, *, edge_open: bool = True, unfinished: bool = False) -> InstallPlan:
    """What to do for a target in this state; pure. HostKeyError for a stranger.

    A server that does not answer may still be booting: with its edge open, ``apply`` waits for it and looks again before
    it does anything. Behind a closed edge an answer can only come over the tailnet: UnreachableError.
    """
    match seen.state:
        case TargetState.INSTALLED if unfinished:
            return InstallPlan(host, (), "prove the installation and write its receipt", finish=True)
        case TargetState.INSTALLED:
            return InstallPlan(host, (), "installed (shows its pinned host key)")
        case TargetState.ABSENT | TargetState.FRESH:
            return InstallPlan(host, nixos_anywhere.PHASES, "install NixOS")
        case TargetState.STRANGER:
            raise stranger(host, seen.address, seen.key)
        case TargetState.UNKNOWN if edge_open:
            return InstallPlan(host, nixos_anywhere.PHASES, "wait for the server to answer, and install what is fresh")
        case TargetState.UNKNOWN:
            raise UnreachableError(
                "the server exists and is locked down, but does not answer over the tailnet",
                where=host,
                fix="is this machine on the tailnet? Else use the server's console; "
                "a host that cannot be looked at is never installed over",
            )


def plan_reinstall(host: str, server: Server | None, declared: Host) -> InstallPlan:
    """The plan for a host that the operator named for it; pure."""
    if server is None:
        return plan(host, Seen(TargetState.ABSENT))
    return InstallPlan(
        host, nixos_anywhere.PHASES, f"WIPE {host}: rebuild it from {declared.hetzner.image}, then install NixOS"
    )


def classify(key: str | None, *, pin: str | None, known: Known = Known()) -> TargetState:
    """What a presented host key says about the target; pure.

    A server that was installed and now shows a key that nobody knows is a rescue system, or somebody else: never fresh.
    """
    if key is None:
        return TargetState.UNKNOWN
    if pin is not None and key == pin:
        return TargetState.INSTALLED
    if key == known.installer_pin or (known.installer_pin is None and not known.installed):
        return TargetState.FRESH
    return TargetState.STRANGER


def stranger(host: str, address: str, key: str) -> HostKeyError:
    """The refusal of a target that shows a key which is none of those it may show."""
    return HostKeyError(
        f"shows the host key {ssh.fingerprint(key)}, which is neither the host's own nor the one that the fresh server had",
        where=f"{host} ({address})",
        fix="somebody else may be answering, or the server runs its rescue system or was rebuilt: find out before going "
        f"on; to overwrite the server, say so by name: --data reinstall={host}",
    )


def look(runner: Runner, host: str, *, server: Server | None, pin: str | None, known: Known) -> Seen:
    """See what stands at the host's addresses: the tailnet first, where a locked-down host answers at once. No login."""
    if server is None:
        return Seen(TargetState.ABSENT)
    for address in _tailnet_addresses(runner, host) if pin else ():
        # Only the pinned key means anything here: a name in a tailnet is anybody's.
        if ssh.presented_key(address, timeout_s=ssh.LOOK_TIMEOUT_S) == pin:
            return Seen(TargetState.INSTALLED, address, pin or "")
    for address in server.addresses.values():
        key = ssh.presented_key(address, timeout_s=ssh.LOOK_TIMEOUT_S)
        state = classify(key, pin=pin, known=known)
        if state is not TargetState.UNKNOWN:
            return Seen(state, address, key or "")
    return Seen(TargetState.UNKNOWN)


def _tailnet_addresses(runner: Runner, host: str) -> tuple[str, ...]:
    """Where the tailnet says that the host is; nothing when this machine is not on it, which is no fault here."""
    if runner.which("tailscale") is None:
        return ()
    try:
        peer = tailnet.find_peer(runner, host)
    except ClawdletsError:
        return ()
    return tuple(peer.addresses.values()) if peer else ()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _receipt_server(text: str) -> object:
    try:
        return json.loads(text)["serverId"] if text else None
    except (ValueError, KeyError, TypeError):
        return None
