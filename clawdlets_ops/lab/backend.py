"""The seams between the emulated cloud and whatever makes its servers real, and stand-ins for both without machines."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Literal, Protocol, runtime_checkable


class BackendError(Exception):
    """A machine could not be brought into the state asked for; code and message become the action's error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Rule:
    """One firewall rule, canonical.

    protocol is tcp, udp, icmp, esp or gre; icmp stands for ICMPv4 and ICMPv6, as far as the networks' families allow.
    port is "80" or "1024-5000" for tcp and udp (the API's "any" has become "1-65535"), None otherwise. networks are CIDRs
    in canonical form with a prefix length: sources of direction "in", destinations of direction "out".
    """

    direction: Literal["in", "out"]
    protocol: str
    port: str | None
    networks: tuple[str, ...]
    description: str | None


@dataclass(frozen=True)
class MachineSpec:
    """What a server is made of; ipv6_network is a /64 ("2001:2:0:110::/64") and the machine itself has ::1 in it."""

    server_id: int
    name: str
    ipv4: str
    ipv6_network: str
    image: str
    authorized_keys: tuple[str, ...]
    user_data: str


class MachineBackend(Protocol):
    """Makes servers real.

    Every method is called from a worker thread, one at a time for a server, never under the cloud's lock; it blocks until
    done and raises BackendError on failure. delete must also take a server whose
    create failed half way, or that is gone already (the lab was stopped before it could note that).

    Rules are the whole effective set, the union of all attached firewalls: None means no firewall is attached and
    everything is open; a set without a rule of direction "in" drops all that comes in; out is open until a rule of
    direction "out" exists.
    """

    def create(self, spec: MachineSpec, rules: tuple[Rule, ...] | None) -> None:
        """Make and boot the machine, with the rules in force before its first boot."""

    def power_on(self, server_id: int) -> None: ...

    def power_off(self, server_id: int, *, graceful: bool) -> None: ...

    def reboot(self, server_id: int, *, hard: bool) -> None: ...

    def rebuild(self, spec: MachineSpec, rules: tuple[Rule, ...] | None) -> None:
        """Replace the disk by a fresh one of spec.image and boot; addresses and rules stay."""

    def delete(self, server_id: int) -> None: ...

    def set_rules(self, server_id: int, rules: tuple[Rule, ...] | None) -> None:
        """Replace the whole effective rule set in one transaction."""


class StubBackend:
    """No machines, and every optional protocol: records the calls as (method, arguments…), in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[tuple[object, ...]] = []

    @property
    def calls(self) -> tuple[tuple[object, ...], ...]:
        with self._lock:
            return tuple(self._calls)

    def _record(self, *call: object) -> None:
        with self._lock:
            self._calls.append(call)

    def create(self, spec: MachineSpec, rules: tuple[Rule, ...] | None) -> None:
        self._record("create", spec, rules)

    def power_on(self, server_id: int) -> None:
        self._record("power_on", server_id)

    def power_off(self, server_id: int, *, graceful: bool) -> None:
        self._record("power_off", server_id, graceful)

    def reboot(self, server_id: int, *, hard: bool) -> None:
        self._record("reboot", server_id, hard)

    def rebuild(self, spec: MachineSpec, rules: tuple[Rule, ...] | None) -> None:
        self._record("rebuild", spec, rules)

    def delete(self, server_id: int) -> None:
        self._record("delete", server_id)

    def set_rules(self, server_id: int, rules: tuple[Rule, ...] | None) -> None:
        self._record("set_rules", server_id, rules)

    def set_addresses(self, spec: MachineSpec) -> None:
        self._record("set_addresses", spec)

    def enable_rescue(self, server_id: int, authorized_keys: tuple[str, ...]) -> None:
        self._record("enable_rescue", server_id, authorized_keys)

    def disable_rescue(self, server_id: int) -> None:
        self._record("disable_rescue", server_id)

    def create_image(self, server_id: int, image_id: int) -> None:
        self._record("create_image", server_id, image_id)

    def delete_image(self, image_id: int) -> None:
        self._record("delete_image", image_id)


class AddressPool(Protocol):
    """Public addresses by slot; a slot is free again after its server is deleted."""

    def allocate(self, slot: int) -> tuple[str, str]:
        """Slot 0, 1, 2, … to (IPv4 address, IPv6 /64 network whose text ends in "::/64").

        Raises BackendError when the pool has no such slot.
        """


class LoopbackPool:
    """For the stub: 127.0.1.1 upwards, and ::/64, whose ::1 is loopback too; a client that dials them stays here."""

    _LIMIT = 65_000

    def allocate(self, slot: int) -> tuple[str, str]:
        if not 0 <= slot < self._LIMIT:
            raise BackendError("resource_limit_exceeded", f"the loopback pool has {self._LIMIT} addresses")
        return str(IPv4Address("127.0.1.1") + slot), "::/64"


@runtime_checkable
class RescueBackend(Protocol):
    """What a MachineBackend may also do: boot a machine into a rescue system.

    The order counts for the next boot only, whoever causes it (reboot, reset, power on, the guest itself); the boot after
    that is from the disk again. It is called like a MachineBackend's methods, for a machine that is on or off, and changes
    nothing until that next boot. A rebuild forgets an order.
    """

    def enable_rescue(self, server_id: int, authorized_keys: tuple[str, ...]) -> None:
        """Order it, with these keys for root; ordering again replaces the keys."""

    def disable_rescue(self, server_id: int) -> None:
        """Take the order back; none is fine."""


@runtime_checkable
class AddressingBackend(Protocol):
    """What a MachineBackend may also do: have machines with any public addresses.

    Without it every MachineSpec has both addresses, of one slot of the pool, for the machine's life. With it ipv4 or
    ipv6_network may be "" (none), they may be of different slots, and they change while a machine is off.
    """

    def set_addresses(self, spec: MachineSpec) -> None:
        """The addresses that count from the next boot on."""


@runtime_checkable
class SnapshotBackend(Protocol):
    """What a MachineBackend may also do: keep a copy of a machine's disk.

    create and rebuild with a MachineSpec whose image is ``str(image_id)`` start from the copy. Called like a
    MachineBackend's methods, by one thread at a time for the same image.
    """

    def create_image(self, server_id: int, image_id: int) -> None:
        """Copy the disk of a machine that is on or off."""

    def delete_image(self, image_id: int) -> None:
        """Remove the copy; none is fine, servers made from it stay."""
