"""What the API shows of the whole fleet, read once by label for all hosts, and anew where something was changed.

For plans and for verification, which only look. A stage that changes something reads for itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TypeVar

from clawdlets_ops.hetzner import (
    Cloud,
    Firewall,
    FirewallRule,
    Labelled,
    Offer,
    PlacementGroup,
    PrimaryIp,
    Server,
    SshKey,
    Volume,
)

MAX_AGE_S: Final = 60.0
_SERVERS, _FIREWALLS, _KEYS, _GROUPS, _VOLUMES, _ADDRESSES = (
    "servers", "firewalls", "keys", "groups", "volumes", "addresses",
)  # fmt: skip

T = TypeVar("T")


class FleetReader(Cloud, Protocol):
    """A Cloud that can list what is ours. ``hetzner.HetznerCloud`` is one."""

    def managed_servers(self) -> tuple[Server, ...]:
        """Every server with our label."""
        ...

    def managed_firewalls(self) -> tuple[Firewall, ...]:
        """Every firewall with our label."""
        ...

    def managed_placement_groups(self) -> tuple[PlacementGroup, ...]:
        """Every placement group with our label."""
        ...


class Snapshot:
    """A Cloud whose reads are at most ``MAX_AGE_S`` old; may be used from any thread.

    What is not among the things with our label (there is none, or somebody else's has the name) is asked for by name, so
    the answer is never "none" only because a label is missing. Changes are not offered: NotImplementedError.
    """

    def __init__(self, cloud: FleetReader, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._cloud = cloud
        self._clock = clock
        self._lock = threading.RLock()
        self._read: dict[str, tuple[float, Any]] = {}
        self._forgotten: dict[str, float] = {}

    def forget(self, host: str) -> None:
        """Something was changed for ``host``: what was read before does not count for it, and lists not for anybody."""
        with self._lock:
            self._forgotten[host] = self._clock()
            for kind in (_KEYS, _GROUPS, _VOLUMES, _ADDRESSES):
                self._read.pop(kind, None)

    def look(self) -> None:
        """Read the list of our servers now, unless that was done lately."""
        with self._lock:
            self._listed(_SERVERS, self._cloud.managed_servers)

    def server(self, name: str) -> Server | None:
        """As of the list of our servers, else asked for by name."""
        return self._named(_SERVERS, name, self._cloud.managed_servers, self._cloud.server, host=name)

    def firewall(self, name: str) -> Firewall | None:
        """As of the list of our firewalls, else asked for by name."""
        host = name.rpartition("-")[0]
        return self._named(_FIREWALLS, name, self._cloud.managed_firewalls, self._cloud.firewall, host=host)

    def placement_group(self, name: str) -> PlacementGroup | None:
        """As of the list of our placement groups, else asked for by name."""
        return self._named(_GROUPS, name, self._cloud.managed_placement_groups, self._cloud.placement_group)

    def ssh_key(self, fingerprint: str) -> SshKey | None:
        """Asked for once for all hosts that have this key."""
        return self._once(f"{_KEYS} {fingerprint}", lambda: self._cloud.ssh_key(fingerprint))

    def volumes(self) -> tuple[Volume, ...]:
        """Every volume of the project."""
        return self._once(_VOLUMES, self._cloud.volumes)

    def primary_ips(self) -> tuple[PrimaryIp, ...]:
        """Every primary IP of the project."""
        return self._once(_ADDRESSES, self._cloud.primary_ips)

    def offers(self) -> tuple[Offer, ...]:
        """Every server type."""
        return self._once("offers", self._cloud.offers)

    def has_image(self, name: str, architecture: str) -> bool:
        """Whether there is a system image of this name for this architecture."""
        return self._once(f"image {name} {architecture}", lambda: self._cloud.has_image(name, architecture))

    def may_write(self) -> bool:
        """Whether the token may change things."""
        return self._once("may write", self._cloud.may_write)

    def labelled(self, labels: Mapping[str, str]) -> tuple[Labelled, ...]:
        """Not remembered: it is asked to prove that nothing is left."""
        return self._cloud.labelled(labels)

    def rebuild(self, server: Server, image: str) -> None:
        """Refused: a snapshot changes nothing."""
        raise NotImplementedError(f"{server.name}: a snapshot is for looking, not for a rebuild from {image}")

    def set_rules(self, firewall: Firewall, rules: tuple[FirewallRule, ...]) -> None:
        """Refused: a snapshot changes nothing."""
        raise NotImplementedError(f"{firewall.name}: a snapshot is for looking, not for {len(rules)} rules")

    def set_labels(self, firewall: Firewall, labels: Mapping[str, str]) -> None:
        """Refused: a snapshot changes nothing."""
        raise NotImplementedError(f"{firewall.name}: a snapshot is for looking, not for {len(labels)} labels")

    def _named(
        self,
        kind: str,
        name: str,
        list_ours: Callable[[], tuple[T, ...]],
        ask: Callable[[str], T | None],
        *,
        host: str | None = None,
    ) -> T | None:
        with self._lock:
            listed = self._listed(kind, list_ours)
            stale = host is not None and self._forgotten.get(host, -1.0) >= self._read[kind][0]
        if name in listed and not stale:
            return listed[name]
        return ask(name)

    def _listed(self, kind: str, list_ours: Callable[[], tuple[T, ...]]) -> dict[str, T]:
        return self._once(kind, lambda: {str(getattr(one, "name", "")): one for one in list_ours()})

    def _once(self, kind: str, read: Callable[[], T]) -> T:
        """What was read within ``MAX_AGE_S``, or what is read now. One thread reads, the others wait for it."""
        with self._lock:
            found = self._read.get(kind)
            if found is None or self._clock() - found[0] > MAX_AGE_S:
                started = self._clock()  # as old as its oldest part
                found = self._read[kind] = (started, read())
            value: T = found[1]
            return value
