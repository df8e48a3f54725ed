"""What the emulated cloud remembers of things beside servers: networks, volumes, primary IPs, groups and snapshots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Any, ClassVar

from clawdlets_ops.lab.catalogue import Json, by_id
from clawdlets_ops.lab.tracked import Tracked

# Names of the lab's own: `.invalid` is nobody's (RFC 6761).
DEFAULT_POINTER_ZONE = "clients.lab.invalid"


@dataclass
class Network(Tracked):
    """subnets and routes are in the API's shape, without the gateway; who is attached is with the servers."""

    id: int
    name: str
    created: str
    labels: Mapping[str, str]
    ip_range: str
    subnets: Sequence[Mapping[str, Any]] = ()
    routes: Sequence[Mapping[str, Any]] = ()
    protected: bool = False
    expose_routes_to_vswitch: bool = False

    @property
    def gateway(self) -> IPv4Address:
        """The network's first address, whatever the subnet."""
        return IPv4Network(self.ip_range)[1]

    def view(self, servers: Sequence[int]) -> Json:
        return {
            "id": self.id,
            "name": self.name,
            "ip_range": self.ip_range,
            "subnets": [{**subnet, "gateway": str(self.gateway)} for subnet in self.subnets],
            "routes": [dict(route) for route in self.routes],
            "servers": list(servers),
            "load_balancers": [],
            "protection": {"delete": self.protected},
            "labels": dict(self.labels),
            "created": self.created,
            "expose_routes_to_vswitch": self.expose_routes_to_vswitch,
        }


@dataclass
class Volume(Tracked):
    """server is the one it is attached to; size in GB."""

    id: int
    name: str
    created: str
    labels: Mapping[str, str]
    size: int
    location: int
    format: str | None
    server: int | None = None
    protected: bool = False

    status: ClassVar = "available"

    def view(self) -> Json:
        return {
            "id": self.id,
            "name": self.name,
            "created": self.created,
            "labels": dict(self.labels),
            "size": self.size,
            "location": by_id("locations", self.location),
            "server": self.server,
            "format": self.format,
            "status": self.status,
            "linux_device": f"/dev/disk/by-id/scsi-0HC_Volume_{self.id}",
            "protection": {"delete": self.protected},
        }


@dataclass
class PlacementGroup(Tracked):
    """Of type spread, the only one there is; its members are with the servers."""

    id: int
    name: str
    created: str
    labels: Mapping[str, str]

    type: ClassVar = "spread"

    def view(self, servers: Sequence[int]) -> Json:
        return {
            "id": self.id,
            "name": self.name,
            "labels": dict(self.labels),
            "created": self.created,
            "type": self.type,
            "servers": list(servers),
        }


@dataclass
class PrimaryIp(Tracked):
    """One half of an address slot: its IPv4 address, or its IPv6 /64; pointers are reverse names by address."""

    id: int
    name: str
    created: str
    labels: Mapping[str, str]
    type: str
    ip: str
    slot: int
    location: int
    auto_delete: bool
    assignee: int | None = None
    pointers: Mapping[str, str] = field(default_factory=dict)
    protected: bool = False

    @property
    def pointer(self) -> str:
        """The reverse name of an IPv4 address, which has one from the beginning."""
        default = f"static.{'.'.join(reversed(self.ip.split('.')))}.{DEFAULT_POINTER_ZONE}"
        return self.pointers.get(self.ip, default)

    def dns_ptr(self) -> list[Json]:
        pointers = {self.ip: self.pointer} if self.type == "ipv4" else self.pointers
        return [{"ip": address, "dns_ptr": name} for address, name in pointers.items()]

    def view(self, *, unassigned_type: str) -> Json:
        return {
            "id": self.id,
            "name": self.name,
            "type": self.type,
            "ip": self.ip,
            "assignee_id": self.assignee,
            "assignee_type": unassigned_type if self.assignee is None else "server",
            "auto_delete": self.auto_delete,
            "blocked": False,
            "dns_ptr": self.dns_ptr(),
            "labels": dict(self.labels),
            "protection": {"delete": self.protected},
            "location": by_id("locations", self.location),
            "created": self.created,
        }


@dataclass
class Snapshot(Tracked):
    """An image made of a server: type is snapshot or backup; a backup is bound to its server."""

    id: int
    description: str
    created: str
    labels: Mapping[str, str]
    type: str
    status: str
    server: int
    server_name: str
    disk_size: int
    architecture: str
    os_flavor: str
    os_version: str | None
    protected: bool = False

    @property
    def bound_to(self) -> int | None:
        return self.server if self.type == "backup" else None

    def view(self) -> Json:
        return {
            "id": self.id,
            "type": self.type,
            "status": self.status,
            "name": None,
            "description": self.description,
            "image_size": None if self.status == "creating" else 1.0,
            "disk_size": self.disk_size,
            "created": self.created,
            "created_from": {"id": self.server, "name": self.server_name},
            "bound_to": self.bound_to,
            "os_flavor": self.os_flavor,
            "os_version": self.os_version,
            "architecture": self.architecture,
            "rapid_deploy": False,
            "protection": {"delete": self.protected},
            "deprecated": None,
            "deprecation": None,
            "deleted": None,
            "labels": dict(self.labels),
        }
