"""The operator's view of the tailnet, from ``tailscale status --json`` (fields: tailscale.com/kb, ipnstate.Status)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from clawdlets_ops import hostfiles
from clawdlets_ops.errors import ClawdletsError, UnreachableError
from clawdlets_ops.process import Command, Runner

STATUS_TIMEOUT_S = 15.0
MIN_KEY_LIFE = timedelta(days=hostfiles.data("tailnet.json")["minKeyLifeDays"])
"""A node whose key runs out sooner is about to leave the tailnet: nothing else is closed because of it."""


@dataclass(frozen=True)
class Peer:
    """A node of the tailnet. ``addresses`` by family; ``key_expiry`` None when the node's key does not expire; ``created``
    is RFC 3339 in UTC, "" when it is not told."""

    name: str
    addresses: dict[int, str]
    online: bool
    key_expiry: datetime | None = None
    created: str = ""


def peers(status: Any) -> tuple[Peer, ...]:
    """The peers in a status document; UnreachableError when this machine is not on the tailnet itself."""
    state = status.get("BackendState", "unknown")
    if state != "Running":
        raise UnreachableError(
            f"this machine is not on the tailnet (tailscale says {state})",
            where="tailscale status",
            fix="tailscale up, then run again",
        )
    found = []
    for entry in (status.get("Peer") or {}).values():
        addresses: dict[int, str] = {
            ipaddress.ip_address(text).version: text for text in entry.get("TailscaleIPs") or ()
        }
        expiry = entry.get("KeyExpiry")
        found.append(
            Peer(
                name=entry.get("HostName", ""),
                addresses=addresses,
                online=bool(entry.get("Online")),
                key_expiry=datetime.fromisoformat(expiry.replace("Z", "+00:00")) if expiry else None,
                created=entry.get("Created") or "",
            )
        )
    return tuple(found)


def look(runner: Runner) -> tuple[Peer, ...]:
    """Every peer that this machine's tailscale sees; ClawdletsError when it cannot be asked."""
    result = runner.run(Command(["tailscale", "status", "--json"], "look at the tailnet", timeout_s=STATUS_TIMEOUT_S))
    if not result.ok:
        raise ClawdletsError(
            f"tailscale status failed: {result.tail()}", where="tailscale", fix="is tailscaled running on this machine?"
        )
    return peers(result.json())


def named(seen: Iterable[Peer], host: str) -> Peer | None:
    """The online peer whose host name is ``host``, or None. Its name proves nothing: the pinned host key does. Pure.

    Of several the youngest: a host that was made anew has a forerunner, which counts as online until it is missed.
    """
    candidates = [peer for peer in seen if peer.name == host and peer.addresses and peer.online]
    return max(candidates, key=lambda peer: peer.created, default=None)


def find_peer(runner: Runner, host: str) -> Peer | None:
    """``named`` of what is seen now."""
    return named(look(runner), host)
