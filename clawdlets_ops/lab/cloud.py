"""The emulated cloud: its state, its rules and its actions, apart from any transport and from what makes machines real.

Requests and answers are JSON objects in the API's own shape. What a server's machine has to do is done by a worker
thread, for each server in the order asked for, while the action that stands for it is `running`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from clawdlets_ops.lab import grammar, networks, views
from clawdlets_ops.lab.backend import (
    AddressPool,
    BackendError,
    LoopbackPool,
    MachineBackend,
    MachineSpec,
    Rule,
    StubBackend,
)
from clawdlets_ops.lab.catalogue import CATALOGUE, Json
from clawdlets_ops.lab.desk import Desk, PlacementGroups, SshKeys
from clawdlets_ops.lab.firewalls import Firewalls
from clawdlets_ops.lab.grammar import ApiError, Query
from clawdlets_ops.lab.images import Images
from clawdlets_ops.lab.ledger import Ledger
from clawdlets_ops.lab.networks import Networks
from clawdlets_ops.lab.primary_ips import PrimaryIps
from clawdlets_ops.lab.records import KINDS, Server, ServerState, State
from clawdlets_ops.lab.servers import Servers
from clawdlets_ops.lab.volumes import Volumes

__all__ = [
    "AddressPool",
    "ApiError",
    "BackendError",
    "Cloud",
    "LoopbackPool",
    "MachineBackend",
    "MachineSpec",
    "Rule",
    "ServerState",
    "StubBackend",
]


def _now() -> datetime:
    return datetime.now(UTC)


class Cloud:
    """All resources of one project.

    With a ``state_file`` (JSON, 0600) the state survives a restart: actions that ran are then errors and their servers
    `unknown`, and firewall rules that were not in force yet are handed to the backend again, from the constructor on.
    ``unassigned_type`` is the assignee_type of a primary IP that is nobody's; the API said `server` until August 2026.
    Methods raise ApiError; LabError or SettingsError when the state file is not usable. No server has a root password.
    """

    def __init__(
        self,
        *,
        backend: MachineBackend,
        addresses: AddressPool,
        state_file: Path | None,
        clock: Callable[[], datetime] = _now,
        unassigned_type: Literal["unassigned", "server"] = "unassigned",
    ) -> None:
        self._ledger = ledger = Ledger(state_file, clock)
        self._unassigned_type = unassigned_type
        self._firewalls = firewalls = Firewalls(ledger, backend)
        primary_ips = PrimaryIps(ledger, backend, addresses, unassigned_type=unassigned_type)
        volumes, images = Volumes(ledger), Images(ledger, backend)
        desks: tuple[Desk[Any], ...] = (
            SshKeys(ledger),
            firewalls,
            Servers(backend, firewalls, primary_ips, volumes, images),
            Networks(ledger),
            volumes,
            PlacementGroups(ledger),
            primary_ips,
            images,
        )
        self._desks = {desk.kind: desk for desk in desks}
        ledger.resume(firewalls.enforce)

    @property
    def _state(self) -> State:
        return self._ledger.state

    # Reading

    def now(self) -> datetime:
        return self._ledger.now()

    def mutations(self) -> int:
        """How many changes of the state the calling thread has made so far; the journal compares before and after."""
        return self._ledger.mutations()

    def servers(self) -> tuple[ServerState, ...]:
        with self._ledger.lock:
            return tuple(self._server_state(server) for server in self._state.servers.values())

    def rows(self, kind: str) -> list[Json]:
        """All of one kind: of the catalogue, of the project (images: of both), or actions."""
        found = list(CATALOGUE.get(kind, ()))
        with self._ledger.lock:
            if kind in KINDS:
                found += [self._view(record) for record in self._state.named(kind).values()]
        return found

    def page(self, kind: str, query: Query) -> tuple[list[Json], Json]:
        """The rows of one kind that a list request asks for, and the pagination object; only these are made."""
        with self._ledger.lock:
            found: list[Any] = [*CATALOGUE.get(kind, ()), *(self._state.named(kind).values() if kind in KINDS else ())]
            chosen, pagination = grammar.page(grammar.choose(kind, found, query), query)
            return [row if isinstance(row, dict) else self._view(row) for row in chosen], pagination

    def row(self, kind: str, row_id: int) -> Json:
        with self._ledger.lock:
            if kind in KINDS and (record := self._state.named(kind).get(row_id)) is not None:
                return self._view(record)
        found = next((row for row in CATALOGUE.get(kind, ()) if row["id"] == row_id), None)
        if found is None:
            raise grammar.not_found(kind, row_id)
        return found

    def actions_of(self, kind: str, row_id: int | None) -> list[Json]:
        """Actions that concern one resource, or any of a kind when ``row_id`` is None."""
        if row_id is not None:
            self.row(kind, row_id)
        resource = kind.removesuffix("s")
        return [
            action
            for action in self.rows("actions")
            if any(r["type"] == resource and row_id in (None, r["id"]) for r in action["resources"])
        ]

    def members(self, network_id: int) -> list[Json]:
        """GET /networks/{id}/members."""
        with self._ledger.lock:
            self.row("networks", network_id)
            return networks.member_rows(self._state, self._state.networks[network_id])

    # Changing

    def create(self, kind: str, body: Json) -> Json:
        desk = self._desk(kind)
        with self._ledger.mutation():
            return desk.create(body)

    def update(self, kind: str, row_id: int, body: Json) -> Json:
        """Change name, labels and what else a kind has, as far as given and not null."""
        desk = self._desk(kind)
        with self._ledger.mutation():
            record = desk.get(row_id)
            if isinstance(desk, Images):
                return desk.update(record, body)
            name = None if body.get("name") is None else grammar.text(body, "name")
            labels = None if body.get("labels") is None else grammar.labels(body["labels"])
            more = desk.check_update(record, body)
            if name is not None:
                desk.require_unique_name(name, but=row_id)
            with self._firewalls.settling([record] if isinstance(record, Server) else []) as settle:
                record.name = name or record.name
                record.labels = record.labels if labels is None else labels
                for field, value in more.items():
                    setattr(record, field, value)
                settle()
            return {kind.removesuffix("s"): self._view(record)}

    def delete(self, kind: str, row_id: int) -> Json | None:
        """A server's deletion is an action; the others are gone at once (None)."""
        desk = self._desk(kind)
        with self._ledger.mutation():
            return desk.delete(desk.get(row_id))

    def act(self, kind: str, row_id: int, command: str, body: Json) -> Json:
        """POST /{kind}/{id}/actions/{command}."""
        desk = self._desk(kind)
        with self._ledger.mutation():
            return desk.act(desk.get(row_id), command, body)

    def mark_off(self, server_id: int) -> None:
        """Note that a machine has powered itself off; nothing for a server that is gone, or that an action has."""
        with self._ledger.mutation() as state:
            server = state.servers.get(server_id)
            if server is not None and not server.locked and server.status == "running":
                server.status = "off"

    def close(self, timeout_s: float = 30.0) -> None:
        """Let the workers finish what is queued, for at most ``timeout_s`` seconds."""
        self._ledger.close(timeout_s)

    def _desk(self, kind: str) -> Desk[Any]:
        if kind not in self._desks:
            raise grammar.not_implemented(f"changes of {kind}")
        return self._desks[kind]

    def _view(self, record: Any) -> Json:
        return views.view(self._state, record, unassigned_type=self._unassigned_type)

    def _server_state(self, server: Server) -> ServerState:
        ipv4, ipv6 = self._state.addresses(server)
        return ServerState(
            server.id,
            server.name,
            server.status,
            ipv4.ip if ipv4 else "",
            ipv6.ip if ipv6 else "",
            dict(server.labels),
        )
