"""What the emulated cloud remembers, and how each of it looks in an answer.

A record's fields are JSON-able, so that the state file is the records as they are; what no answer may show (user_data,
authorised keys, address slot) is simply not part of the view. A server's view is in ``views``. ``store`` keeps the state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from clawdlets_ops.lab.catalogue import Json, find
from clawdlets_ops.lab.resources import Network, PlacementGroup, PrimaryIp, Snapshot, Volume
from clawdlets_ops.lab.tracked import Tracked

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
class SshKey(Tracked):
    id: int
    name: str
    created: str
    labels: Mapping[str, str]
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
class Firewall(Tracked):
    """rules are in the API's shape; servers are direct attachments, selectors those by label selector."""

    id: int
    name: str
    created: str
    labels: Mapping[str, str]
    rules: Sequence[Json]
    servers: Sequence[int] = ()
    selectors: Sequence[str] = ()

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
class Server(Tracked):
    """edge_wanted counts the changes of the effective firewall rules, edge_in_force is the last one that is in force.

    ipv4 and ipv6 are ids of primary IPs; private_net is in the API's shape; disk is in GB.
    """

    id: int
    name: str
    created: str
    labels: Mapping[str, str]
    status: str
    server_type: int
    image: int
    location: int
    ipv4: int | None
    ipv6: int | None
    user_data: str
    authorized_keys: Sequence[str]
    disk: int
    locked: bool = False
    protected: bool = False
    rescue: bool = False
    iso: int | None = None
    backup_window: str | None = None
    placement_group: int | None = None
    private_net: Sequence[Mapping[str, Any]] = ()
    edge_wanted: int = 1
    edge_in_force: int = 0


@dataclass
class Action(Tracked):
    """status is running, success or error; error is {"code", "message"} or None."""

    id: int
    command: str
    status: str
    started: str
    resources: Sequence[Json]
    finished: str | None = None
    error: Json | None = None

    def view(self) -> Json:
        return {
            "id": self.id,
            "command": self.command,
            "status": self.status,
            "progress": self.progress,
            "started": self.started,
            "finished": self.finished,
            "resources": list(self.resources),
            "error": self.error,
        }

    @property
    def progress(self) -> int:
        return 0 if self.status == "running" else 100

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
    labels: Mapping[str, str]


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
KINDS: Final[Mapping[str, type[Tracked]]] = {
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
_KIND_OF: Final = {record: kind for kind, record in KINDS.items()}


class State:
    """All that survives a restart: the records by id, and the next free id of each kind. images are snapshots only.

    ``changed`` names, as (kind, id), what was added, changed or removed since somebody last cleared it.
    """

    def __init__(self, next_ids: Mapping[str, int] = FIRST_IDS) -> None:
        self.next_ids = dict(next_ids)
        self.changed: set[tuple[str, int]] = set()
        self._tables: dict[str, dict[int, Any]] = {kind: {} for kind in KINDS}
        self._note: Callable[[Tracked], None] = self._changes
        self.ssh_keys: Mapping[int, SshKey] = self._tables["ssh_keys"]
        self.firewalls: Mapping[int, Firewall] = self._tables["firewalls"]
        self.servers: Mapping[int, Server] = self._tables["servers"]
        self.networks: Mapping[int, Network] = self._tables["networks"]
        self.volumes: Mapping[int, Volume] = self._tables["volumes"]
        self.placement_groups: Mapping[int, PlacementGroup] = self._tables["placement_groups"]
        self.primary_ips: Mapping[int, PrimaryIp] = self._tables["primary_ips"]
        self.images: Mapping[int, Snapshot] = self._tables["images"]
        self.actions: Mapping[int, Action] = self._tables["actions"]

    def named(self, kind: str) -> Mapping[int, Any]:
        """All records of a kind; KeyError for another kind."""
        return self._tables[kind]

    def next_id(self, kind: str) -> int:
        """The id that the next record of this kind is made with; it is taken when the record is added."""
        return self.next_ids[kind]

    def add(self, record: Record | Action) -> None:
        kind = _KIND_OF[type(record)]
        self._tables[kind][record.id] = record
        self.next_ids[kind] = max(self.next_ids[kind], record.id + 1)
        record.watch(self._note)
        self._note(record)

    def remove(self, record: Record | Action) -> None:
        """What happens to the record afterwards concerns nobody."""
        del self._tables[_KIND_OF[type(record)]][record.id]
        self._note(record)
        record.watch(None)

    def _changes(self, record: Any) -> None:
        self.changed.add((_KIND_OF[type(record)], record.id))

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
        self.remove(server)
        for firewall in self.firewalls.values():
            if server.id in firewall.servers:
                firewall.servers = [server_id for server_id in firewall.servers if server_id != server.id]
        for volume in self.volumes.values():
            if volume.server == server.id:
                volume.server = None
        for address in [address for address in self.primary_ips.values() if address.assignee == server.id]:
            address.assignee = None
            if address.auto_delete:
                self.remove(address)
        for image in [one for one in self.images.values() if one.type == "backup" and one.server == server.id]:
            self.remove(image)

    def forget_old_actions(self) -> None:
        for action in list(islice(self.actions.values(), max(0, len(self.actions) - ACTIONS_KEPT))):
            if action.status != "running":
                self.remove(action)

    def to_json(self) -> str:
        # The records hold what JSON has and nothing else: their fields are written as they are.
        tables = {kind: [vars(record) for record in table.values()] for kind, table in self._tables.items()}
        return json.dumps({"version": STATE_VERSION, "nextIds": self.next_ids, **tables})

    @classmethod
    def from_json(cls, text: str) -> State:
        """Raises ValueError, KeyError or TypeError when the text is not a state of this version."""
        stored = json.loads(text)
        if stored["version"] != STATE_VERSION:
            raise ValueError(f"version {stored['version']} is not {STATE_VERSION}")
        state = cls(stored["nextIds"])
        for kind, record in KINDS.items():
            for row in stored[kind]:
                state._put(kind, row["id"], record(**row))
        return state

    def apply(self, change: Json) -> None:
        """A change as ``store`` writes it: by kind and id what a record is now, None for one that is gone.

        Raises ValueError, KeyError or TypeError when it is none.
        """
        for kind, rows in change.items():
            if kind == "nextIds":
                self.next_ids = dict(rows)
                continue
            for row_id, row in rows.items():
                if row is None:
                    self._tables[kind].pop(int(row_id), None)
                else:
                    self._put(kind, int(row_id), KINDS[kind](**row))

    def _put(self, kind: str, row_id: int, record: Tracked) -> None:
        self._tables[kind][row_id] = record
        record.watch(self._note)
