"""What the API showed for one host."""

from __future__ import annotations

from dataclasses import dataclass

from clawdlets_ops.hetzner import Firewall, PlacementGroup, PrimaryIp, Server, SshKey, Volume


@dataclass(frozen=True)
class Observed:
    """``volumes`` and ``primary_ips`` are those that are ours for this host, and those of a name that it needs.

    ``whole`` is False when only server and firewall were read, which is enough where nothing was declared anew.
    """

    server: Server | None
    firewall: Firewall | None
    ssh_key: SshKey | None
    volumes: tuple[Volume, ...] = ()
    primary_ips: tuple[PrimaryIp, ...] = ()
    placement_group: PlacementGroup | None = None
    whole: bool = True
    host: str = ""
