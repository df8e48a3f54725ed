"""The emulated cloud: its state, its rules and its actions, apart from any transport and from what makes machines real.

Requests and answers are JSON objects in the API's own shape. What a server's machine has to do is done by one worker
thread per server, in the order asked for, while the action that stands for it is `running`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from clawdlets_ops.lab import edge, grammar
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
from clawdlets_ops.lab.edge import Rules
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.ledger import DELETED, Ledger
from clawdlets_ops.lab.orders import chosen, server_order
from clawdlets_ops.lab.records import Action, Firewall, Server, ServerState, SshKey, State, by_id

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

# command: (the action's name, the server's status meanwhile, its status afterwards)
_POWER: Final = {
    "poweron": ("start_server", "starting", "running"),
    "poweroff": ("stop_server", "stopping", "off"),
    "shutdown": ("shutdown_server", "stopping", "off"),
    "reboot": ("reboot_server", "starting", "running"),
    "reset": ("reset_server", "starting", "running"),
}


def _now() -> datetime:
    return datetime.now(UTC)


class Cloud:
    """Servers, keys, firewalls and actions of one project.

    With a ``state_file`` (JSON, 0600) the state survives a restart: actions that ran are then errors and their servers
    `unknown`, and firewall rules that were not in force yet are handed to the backend again, from the constructor on.
    Methods raise ApiError; LabError or SettingsError when the state file is not usable. No server has a root password.
    """

    def __init__(
        self,
        *,
        backend: MachineBackend,
        addresses: AddressPool,
        state_file: Path | None,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._backend = backend
        self._addresses = addresses
        self._ledger = Ledger(state_file, clock)
        self._ledger.resume(self._enforce)

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
            return tuple(
                ServerState(server.id, server.name, server.status, server.ipv4, server.ipv6, dict(server.labels))
                for server in self._state.servers.values()
            )

    def rows(self, kind: str) -> list[Json]:
        """All of one kind: locations, server_types, images, ssh_keys, firewalls, servers, primary_ips or actions."""
        if kind in CATALOGUE:
            return list(CATALOGUE[kind])
        with self._ledger.lock:
            if kind == "primary_ips":
                return [address for server in self._state.servers.values() for address in server.primary_ips()]
            if kind == "actions":
                return [action.view() for action in self._state.actions.values()]
            return [self._view(record) for record in self._state.named(kind).values()]

    def row(self, kind: str, row_id: int) -> Json:
        if kind in ("ssh_keys", "firewalls", "servers"):
            with self._ledger.lock:
                return self._view(self._record(kind, row_id))
        found = next((row for row in self.rows(kind) if row["id"] == row_id), None)
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

    # Changing

    def create(self, kind: str, body: Json) -> Json:
        match kind:
            case "ssh_keys":
                return self._create_key(body)
            case "firewalls":
                return self._create_firewall(body)
            case "servers":
                return self._create_server(body)
        raise grammar.not_implemented(f"create {kind}")

    def update(self, kind: str, row_id: int, body: Json) -> Json:
        """Change name and labels, those that are given and not null."""
        name = None if body.get("name") is None else grammar.text(body, "name")
        labels = None if body.get("labels") is None else grammar.labels(body["labels"])
        if kind == "servers" and name is not None:
            grammar.host_name(name)
        with self._ledger.mutation():
            record = self._record(kind, row_id)
            if name is not None:
                self._require_unique_name(kind, name, but=row_id)
            with self._edge() as settle:
                record.name = name or record.name
                record.labels = record.labels if labels is None else labels
                settle()
            return {kind.removesuffix("s"): self._view(record)}

    def delete(self, kind: str, row_id: int) -> Json | None:
        """A server's deletion is an action; the others are gone at once (None)."""
        with self._ledger.mutation():
            record = self._record(kind, row_id)
            if isinstance(record, Server):
                if record.protected:
                    raise ApiError(423, "protected", "server deletion is protected")
                action = self._ledger.claim(record, "delete_server", "deleting")
                self._ledger.start(
                    record, [action], lambda spec, _: self._backend.delete(spec.server_id), status=DELETED
                )
                return {"action": action.view()}
            if isinstance(record, Firewall):
                if record.servers or record.selectors:
                    raise ApiError(422, "resource_in_use", f"firewall with ID {row_id} is still in use")
                del self._state.firewalls[row_id]
            else:
                del self._state.ssh_keys[row_id]
            return None

    def act(self, kind: str, row_id: int, command: str, body: Json) -> Json:
        """POST /{kind}/{id}/actions/{command}."""
        with self._ledger.mutation():
            record = self._record(kind, row_id)
            if isinstance(record, Firewall):
                return self._act_on_firewall(record, command, body)
            if isinstance(record, Server):
                return {"action": self._act_on_server(record, command, body).view(), "root_password": None}
        raise grammar.not_implemented(f"{kind} action {command}")

    def close(self, timeout_s: float = 30.0) -> None:
        """Let the workers finish what is queued, for at most ``timeout_s`` seconds each."""
        self._ledger.close(timeout_s)

    # Keys and firewalls

    def _create_key(self, body: Json) -> Json:
        name, public_key = grammar.text(body, "name"), grammar.text(body, "public_key")
        labels, fingerprint = grammar.labels(body.get("labels")), grammar.ssh_fingerprint(public_key)
        with self._ledger.mutation():
            self._require_unique_name("ssh_keys", name)
            if any(key.fingerprint == fingerprint for key in self._state.ssh_keys.values()):
                raise grammar.not_unique("fingerprint", "SSH key with the same fingerprint already exists")
            key = SshKey(
                self._state.take_id("ssh_keys"), name, self._ledger.timestamp(), labels, public_key, fingerprint
            )
            self._state.ssh_keys[key.id] = key
            return {"ssh_key": key.view()}

    def _create_firewall(self, body: Json) -> Json:
        name, labels = grammar.text(body, "name"), grammar.labels(body.get("labels"))
        rules = grammar.firewall_rules(body)
        with self._ledger.mutation(), self._edge() as settle:
            self._require_unique_name("firewalls", name)
            firewall = Firewall(self._state.next_ids["firewalls"], name, self._ledger.timestamp(), labels, rules)
            edge.attach(self._state, firewall, edge.resources(self._state, body, "apply_to"))
            self._state.firewalls[self._state.take_id("firewalls")] = firewall
            actions = [self._ledger.done("set_firewall_rules", firewall), *settle(firewall)]
            return {"firewall": self._view(firewall), "actions": [action.view() for action in actions]}

    def _act_on_firewall(self, firewall: Firewall, command: str, body: Json) -> Json:
        actions = []
        with self._edge() as settle:
            match command:
                case "set_rules":
                    firewall.rules = grammar.firewall_rules(body)
                    actions.append(self._ledger.done("set_firewall_rules", firewall))
                case "apply_to_resources":
                    edge.attach(self._state, firewall, edge.resources(self._state, body, "apply_to"))
                case "remove_from_resources":
                    edge.detach(self._state, firewall, edge.resources(self._state, body, "remove_from"))
                case _:
                    raise grammar.not_implemented(f"firewall action {command}")
            actions += settle(firewall)
        return {"actions": [action.view() for action in actions]}

    @contextmanager
    def _edge(self) -> Iterator[Callable[..., list[Action]]]:
        """Remember every server's edge; ``settle(*resources)`` starts what brings the changed ones into force."""
        before = {server.id: self._edge_of(server) for server in self._state.servers.values()}

        def settle(*resources: Firewall) -> list[Action]:
            actions = []
            for server in self._state.servers.values():
                (was, _), (now, _) = before[server.id], self._edge_of(server)
                if before[server.id] == self._edge_of(server):
                    continue
                command = "remove_firewall" if set(now) < set(was) else "apply_firewall"
                server.edge_wanted += 1
                actions.append(self._ledger.action(command, server, *resources))
                self._enforce(server, actions[-1:])
            return actions

        yield settle

    def _edge_of(self, server: Server) -> tuple[list[int], Rules]:
        return [firewall.id for firewall in edge.attached(self._state, server)], edge.effective(self._state, server)

    def _enforce(self, server: Server, actions: Sequence[Action]) -> None:
        self._ledger.start(
            server, actions, lambda spec, rules: self._backend.set_rules(spec.server_id, rules), enforces=True
        )

    # Servers

    def _create_server(self, body: Json) -> Json:
        order = server_order(body)
        with self._ledger.mutation():
            self._require_unique_name("servers", order.name)
            keys = [self._key(sent).public_key.strip() for sent in order.ssh_keys]
            firewalls = [self._firewall(firewall_id) for firewall_id in order.firewalls]
            slot = self._state.free_slot()
            ipv4, ipv6 = self._allocate(slot)
            server = Server(
                id=self._state.take_id("servers"),
                name=order.name,
                created=self._ledger.timestamp(),
                labels=order.labels,
                status="initializing",
                server_type=order.server_type["id"],
                image=order.image["id"],
                location=order.location["id"],
                slot=slot,
                ipv4=ipv4,
                ipv4_id=self._state.take_id("primary_ips"),
                ipv6=ipv6,
                ipv6_id=self._state.take_id("primary_ips"),
                user_data=order.user_data,
                authorized_keys=keys,
            )
            self._state.servers[server.id] = server
            for firewall in firewalls:
                firewall.servers.append(server.id)
            return self._boot(server, start=order.start)

    def _boot(self, server: Server, *, start: bool) -> Json:
        """Make the machine. Firewalls of the request are in force before its first boot, label selectors only later."""

        def create(spec: MachineSpec, rules: Rules) -> None:
            self._backend.create(spec, rules)
            if not start:
                self._backend.power_off(spec.server_id, graceful=False)

        created = self._ledger.claim(server, "create_server", "initializing")
        following = [self._ledger.action("start_server", server)] if start else []
        status = "running" if start else "off"
        self._ledger.start(server, [created, *following], create, status=status, enforces=True, direct_only=True)
        if edge.attached(self._state, server) != edge.attached(self._state, server, direct_only=True):
            server.edge_wanted += 1
            self._enforce(server, [self._ledger.action("apply_firewall", server)])
        return {
            "server": self._view(server),
            "action": created.view(),
            "next_actions": [action.view() for action in following],
            "root_password": None,
        }

    def _act_on_server(self, server: Server, command: str, body: Json) -> Action:
        if command == "change_protection":
            wanted = {body.get("delete", server.protected), body.get("rebuild", server.protected)}
            if wanted not in ({True}, {False}):
                raise grammar.invalid("delete", "delete and rebuild must be booleans of the same value")
            server.protected = wanted == {True}
            return self._ledger.done("change_protection", server)
        if command == "rebuild":
            if server.protected:
                raise ApiError(423, "protected", "server rebuild is protected")
            architecture = by_id("server_types", server.server_type)["architecture"]
            image = chosen("images", body.get("image"), "image", architecture)
            user_data = grammar.user_data(body["user_data"]) if "user_data" in body else server.user_data
            action = self._ledger.claim(server, "rebuild_server", "rebuilding")
            server.image, server.user_data = image["id"], user_data
            self._ledger.start(server, [action], self._backend.rebuild, status="running", enforces=True)
            return action
        if command not in _POWER:
            raise grammar.not_implemented(f"server action {command}")
        calls: dict[str, Callable[[int], None]] = {
            "poweron": self._backend.power_on,
            "poweroff": lambda server_id: self._backend.power_off(server_id, graceful=False),
            "shutdown": lambda server_id: self._backend.power_off(server_id, graceful=True),
            "reboot": lambda server_id: self._backend.reboot(server_id, hard=False),
            "reset": lambda server_id: self._backend.reboot(server_id, hard=True),
        }
        name, meanwhile, afterwards = _POWER[command]
        restarts = command in ("reboot", "reset")
        if restarts and server.status == "off":
            raise ApiError(422, "service_error", "server is not running")
        if server.status == afterwards and not restarts:
            return self._ledger.done(name, server)
        action = self._ledger.claim(server, name, meanwhile)
        self._ledger.start(server, [action], lambda spec, _: calls[command](spec.server_id), status=afterwards)
        return action

    def _allocate(self, slot: int) -> tuple[str, str]:
        try:
            return self._addresses.allocate(slot)
        except BackendError as error:
            raise ApiError(403, error.code, error.message) from error

    # Lookups

    def _record(self, kind: str, row_id: int) -> SshKey | Firewall | Server:
        record = self._state.named(kind).get(row_id)
        if record is None:
            raise grammar.not_found(kind, row_id)
        return record

    def _firewall(self, firewall_id: int) -> Firewall:
        if firewall_id not in self._state.firewalls:
            raise grammar.not_found("firewalls", firewall_id)
        return self._state.firewalls[firewall_id]

    def _key(self, sent: object) -> SshKey:
        for key in self._state.ssh_keys.values():
            if sent in (key.id, str(key.id), key.name):
                return key
        raise grammar.not_found("ssh_keys", str(sent))

    def _require_unique_name(self, kind: str, name: str, *, but: int | None = None) -> None:
        if any(record.name == name and record.id != but for record in self._state.named(kind).values()):
            raise grammar.not_unique("name", "name is already used")

    def _view(self, record: SshKey | Firewall | Server) -> Json:
        if isinstance(record, Firewall):
            return record.view([edge.hits(self._state, expression) for expression in record.selectors])
        if isinstance(record, Server):
            return record.view([firewall.id for firewall in edge.attached(self._state, record)])
        return record.view()
