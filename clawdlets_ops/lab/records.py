"""What the emulated cloud remembers, and how each of it looks in an answer.

A record's fields are JSON-able, so that the state file is the records as they are; what no answer may show (user_data,
authorised keys, address slot) is simply not part of the view. A server's view is in ``views``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from clawdlets_ops.lab.catalogue import Json, find
from clawdlets_ops.lab.resources import Network, PlacementGroup, PrimaryIp, Snapshot, Volume

STATE_VERSION: Final = 2
ACTIONS_KEPT: Final = 500
# One range of ids per kind: they do not depend on the order of parallel requests, and a mixed-up id is not found.
FIRST_IDS: Final[Mapping[str, int]] = {
    "servers": 1001,
    "ssh_keys": 2001,
    "firewalls": 3001,
    "primary_ips": 4001,
    "networks": 5001,
    "volumes": 6001,
    "placement_groups": 7001,
    "images": 400000001,
    "actions": 10001,
}


@dataclass
class SshKey:
    id: int
    name: str
    created: str
    labels: dict[str, str]
    public_key: str
    fingerprint: str

    def view(self) -> Json:
        return {
            "id": self.id,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "public_key": self.public_key,
            "labels": dict(self.labels),
            "created": self.created,
        }


@dataclass
class Firewall:
    """rules are in the API's shape; servers are direct attachments, selectors those by label selector."""

    id: int
    name: str
    created: str
    labels: dict[str, str]
    rules: list[Json]
    servers: list[int] = field(default_factory=list)
    selectors: list[str] = field(default_factory=list)

    def view(self, selected: Sequence[Sequence[int]]) -> Json:
        """The API's object; ``selected`` are the servers that each of the selectors hits."""
        direct: list[Json] = [{"type": "server", "server": {"id": server_id}} for server_id in self.servers]
        by_label: list[Json] = [
            {
                "type": "label_selector",
                "label_selector": {"selector": expression},
                "applied_to_resources": [{"type": "server", "server": {"id": server_id}} for server_id in hits],
            }
            for expression, hits in zip(self.selectors, selected, strict=True)
        ]
        return {
            "id": self.id,
            "name": self.name,
            "labels": dict(self.labels),
            "created": self.created,
            "rules": list(self.rules),
            "applied_to": direct + by_label,
        }


@dataclass
class Server:
    """edge_wanted counts the changes of the effective firewall rules, edge_in_force is the last one that is in force.

    ipv4 and ipv6 are ids of primary IPs; private_net is in the API's shape; disk is in GB.
    """

    id: int
    name: str
    created: str
    labels: dict[str, str]
    status: str
    server_type: int
    image: int
    location: int
    ipv4: int | None
    ipv6: int | None
    user_data: str
    authorized_keys: list[str]
    disk: int
    locked: bool = False
    protected: bool = False
    rescue: bool = False
    iso: int | None = None
    backup_window: str | None = None
    placement_group: int | None = None
    private_net: list[Json] = field(default_factory=list)
    edge_wanted: int = 1
    edge_in_force: int = 0


@dataclass
class Action:
    """status is running, success or error; error is {"code", "message"} or None."""

    id: int
    command: str
    status: str
    started: str
    resources: list[Json]
    finished: str | None = None
    error: Json | None = None

    def view(self) -> Json:
        return {
            "id": self.id,
            "command": self.command,
            "status": self.status,
            "progress": 0 if self.status == "running" else 100,
            "started": self.started,
            "finished": self.finished,
            "resources": list(self.resources),
            "error": self.error,
        }

    def settle(self, finished: str, error: Json | None) -> None:
        self.status, self.finished, self.error = "success" if error is None else "error", finished, error

    def concerns(self, server: Server) -> bool:
        return {"id": server.id, "type": "server"} in self.resources


@dataclass(frozen=True)
class ServerState:
    """A server as the lab's own commands want to know it."""

    server_id: int
    name: str
    status: str
    ipv4: str
    ipv6_network: str
    labels: dict[str, str]


Record = SshKey | Firewall | Server | Network | Volume | PlacementGroup | PrimaryIp | Snapshot

RESOURCE_TYPES: Final[Mapping[type, str]] = {
    SshKey: "ssh_key",
    Firewall: "firewall",
    Server: "server",
    Network: "network",
    Volume: "volume",
    PlacementGroup: "placement_group",
    PrimaryIp: "primary_ip",
    Snapshot: "image",
}


@dataclass
class State:
    """All that survives a restart: the records by id, and the next free id of each kind. images are snapshots only."""

    ssh_keys: dict[int, SshKey] = field(default_factory=dict)
    firewalls: dict[int, Firewall] = field(default_factory=dict)
    servers: dict[int, Server] = field(default_factory=dict)
    networks: dict[int, Network] = field(default_factory=dict)
    volumes: dict[int, Volume] = field(default_factory=dict)
    placement_groups: dict[int, PlacementGroup] = field(default_factory=dict)
    primary_ips: dict[int, PrimaryIp] = field(default_factory=dict)
    images: dict[int, Snapshot] = field(default_factory=dict)
    actions: dict[int, Action] = field(default_factory=dict)
    next_ids: dict[str, int] = field(default_factory=lambda: dict(FIRST_IDS))

    def named(self, kind: str) -> Mapping[int, Record]:
        """All records of a kind that clients can change; KeyError for another kind."""
        tables: Mapping[str, Mapping[int, Record]] = {
            "ssh_keys": self.ssh_keys,
            "firewalls": self.firewalls,
            "servers": self.servers,
            "networks": self.networks,
            "volumes": self.volumes,
            "placement_groups": self.placement_groups,
            "primary_ips": self.primary_ips,
            "images": self.images,
        }
        return tables[kind]

    def take_id(self, kind: str) -> int:
        taken = self.next_ids[kind]
        self.next_ids[kind] = taken + 1
        return taken

    def free_slot(self, *families: str) -> int:
        """The lowest address slot of which these halves (ipv4, ipv6) are free."""
        taken = {address.slot for address in self.primary_ips.values() if address.type in families}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def addresses(self, server: Server) -> tuple[PrimaryIp | None, PrimaryIp | None]:
        """The server's public IPv4 and IPv6."""
        ipv4 = None if server.ipv4 is None else self.primary_ips[server.ipv4]
        ipv6 = None if server.ipv6 is None else self.primary_ips[server.ipv6]
        return ipv4, ipv6

    def image(self, image_id: int) -> Json | None:
        """A system image or a snapshot; None for a snapshot that is gone."""
        if image_id in self.images:
            return self.images[image_id].view()
        return find("images", image_id)

    def forget_server(self, server: Server) -> None:
        """Remove it and what goes with it; what stays is detached."""
        del self.servers[server.id]
        for firewall in self.firewalls.values():
            firewall.servers = [server_id for server_id in firewall.servers if server_id != server.id]
        for volume in self.volumes.values():
            volume.server = None if volume.server == server.id else volume.server
        for address in [address for address in self.primary_ips.values() if address.assignee == server.id]:
            address.assignee = None
            if address.auto_delete:
                del self.primary_ips[address.id]
        for image in [one for one in self.images.values() if one.type == "backup" and one.server == server.id]:
            del self.images[image.id]

    def forget_old_actions(self) -> None:
        for action in list(self.actions.values())[:-ACTIONS_KEPT]:
            if action.status != "running":
                del self.actions[action.id]

    def to_json(self) -> str:
        # The records hold what JSON has and nothing else: their fields are written as they are.
        tables = {kind: [vars(record) for record in getattr(self, kind).values()] for kind in _TABLES}
        return json.dumps({"version": STATE_VERSION, "nextIds": self.next_ids, **tables})

    @classmethod
    def from_json(cls, text: str) -> State:
        """Raises ValueError, KeyError or TypeError when the text is not a state of this version."""
        stored = json.loads(text)
        if stored["version"] != STATE_VERSION:
            raise ValueError(f"version {stored['version']} is not {STATE_VERSION}")
        state = cls(next_ids=stored["nextIds"])
        for kind, record in _TABLES.items():
            getattr(state, kind).update({row["id"]: record(**row) for row in stored[kind]})
        return state


_TABLES: Final[Mapping[str, type]] = {
    "ssh_keys": SshKey,
    "firewalls": Firewall,
    "servers": Server,
    "networks": Network,
    "volumes": Volume,
    "placement_groups": PlacementGroup,
    "primary_ips": PrimaryIp,
    "images": Snapshot,
    "actions": Action,
}
