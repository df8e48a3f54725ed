"""What the emulated cloud remembers, and how each of it looks in an answer.

A record's fields are JSON-able, so that the state file is the records as they are; what no answer may show (user_data,
authorised keys, address slot) is simply not part of the view.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from clawdlets_ops.lab.catalogue import CATALOGUE, Json

STATE_VERSION: Final = 1
ACTIONS_KEPT: Final = 500
# One range of ids per kind: they do not depend on the order of parallel requests, and a mixed-up id is not found.
FIRST_IDS: Final[Mapping[str, int]] = {
    "servers": 1001,
    "ssh_keys": 2001,
    "firewalls": 3001,
    "primary_ips": 4001,
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
    """edge_wanted counts the changes of the effective firewall rules, edge_in_force is the last one that is in force."""

    id: int
    name: str
    created: str
    labels: dict[str, str]
    status: str
    server_type: int
    image: int
    location: int
    slot: int
    ipv4: str
    ipv4_id: int
    ipv6: str
    ipv6_id: int
    user_data: str
    authorized_keys: list[str]
    locked: bool = False
    protected: bool = False
    edge_wanted: int = 1
    edge_in_force: int = 0

    def view(self, firewalls: Sequence[int]) -> Json:
        """The API's object; `datacenter` is left out, as the API does since July 2026."""
        server_type = by_id("server_types", self.server_type)
        edge = "applied" if self.edge_in_force == self.edge_wanted else "pending"
        return {
            "id": self.id,
            "name": self.name,
            "status": self.status,
            "created": self.created,
            "public_net": {
                "ipv4": {"id": self.ipv4_id, "ip": self.ipv4, "blocked": False, "dns_ptr": self.name},
                "ipv6": {"id": self.ipv6_id, "ip": self.ipv6, "blocked": False, "dns_ptr": []},
                "floating_ips": [],
                "firewalls": [{"id": firewall_id, "status": edge} for firewall_id in firewalls],
            },
            "private_net": [],
            "server_type": server_type,
            "location": by_id("locations", self.location),
            "image": by_id("images", self.image),
            "iso": None,
            "rescue_enabled": False,
            "locked": self.locked,
            "backup_window": None,
            "outgoing_traffic": 0,
            "ingoing_traffic": 0,
            "included_traffic": server_type["prices"][0]["included_traffic"],
            "protection": {"delete": self.protected, "rebuild": self.protected},
            "labels": dict(self.labels),
            "volumes": [],
            "load_balancers": [],
            "primary_disk_size": server_type["disk"],
            "placement_group": None,
        }

    def primary_ips(self) -> list[Json]:
        """The two primary IPs that came with the server and go with it."""
        return [
            {
                "id": row_id,
                "name": f"primary_ip-{row_id}",
                "type": family,
                "ip": address,
                "assignee_id": self.id,
                "assignee_type": "server",
                "auto_delete": True,
                "blocked": False,
                "dns_ptr": [],
                "labels": {},
                "protection": {"delete": False},
                "location": by_id("locations", self.location),
                "created": self.created,
            }
            for row_id, family, address in ((self.ipv4_id, "ipv4", self.ipv4), (self.ipv6_id, "ipv6", self.ipv6))
        ]


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


_BY_ID: Final = {kind: {row["id"]: row for row in rows} for kind, rows in CATALOGUE.items()}


def by_id(kind: str, row_id: int) -> Json:
    """A row of the catalogue."""
    return _BY_ID[kind][row_id]


@dataclass
class State:
    """All that survives a restart: the records by id, and the next free id of each kind."""

    ssh_keys: dict[int, SshKey] = field(default_factory=dict)
    firewalls: dict[int, Firewall] = field(default_factory=dict)
    servers: dict[int, Server] = field(default_factory=dict)
    actions: dict[int, Action] = field(default_factory=dict)
    next_ids: dict[str, int] = field(default_factory=lambda: dict(FIRST_IDS))

    def named(self, kind: str) -> Mapping[int, SshKey | Firewall | Server]:
        """ssh_keys, firewalls or servers."""
        tables: Mapping[str, Mapping[int, SshKey | Firewall | Server]] = {
            "ssh_keys": self.ssh_keys,
            "firewalls": self.firewalls,
            "servers": self.servers,
        }
        return tables[kind]

    def take_id(self, kind: str) -> int:
        taken = self.next_ids[kind]
        self.next_ids[kind] = taken + 1
        return taken

    def free_slot(self) -> int:
        """The lowest address slot that no server has."""
        taken = {server.slot for server in self.servers.values()}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def forget_old_actions(self) -> None:
        for action in list(self.actions.values())[:-ACTIONS_KEPT]:
            if action.status != "running":
                del self.actions[action.id]

    def to_json(self) -> str:
        tables = (self.ssh_keys, self.firewalls, self.servers, self.actions)
        keys, firewalls, servers, actions = ([asdict(record) for record in table.values()] for table in tables)
        return json.dumps(
            {
                "version": STATE_VERSION,
                "nextIds": self.next_ids,
                "sshKeys": keys,
                "firewalls": firewalls,
                "servers": servers,
                "actions": actions,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> State:
        """Raises ValueError, KeyError or TypeError when the text is not a state of this version."""
        stored = json.loads(text)
        if stored["version"] != STATE_VERSION:
            raise ValueError(f"version {stored['version']} is not {STATE_VERSION}")
        return cls(
            ssh_keys={row["id"]: SshKey(**row) for row in stored["sshKeys"]},
            firewalls={row["id"]: Firewall(**row) for row in stored["firewalls"]},
            servers={row["id"]: Server(**row) for row in stored["servers"]},
            actions={row["id"]: Action(**row) for row in stored["actions"]},
            next_ids=stored["nextIds"],
        )
