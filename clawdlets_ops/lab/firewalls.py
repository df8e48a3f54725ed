"""Firewalls of the emulated cloud: their rules, what they are attached to, and bringing changes into force."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from clawdlets_ops.lab import edge, grammar
from clawdlets_ops.lab.backend import MachineBackend
from clawdlets_ops.lab.catalogue import Json
from clawdlets_ops.lab.desk import Desk
from clawdlets_ops.lab.edge import Rules
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.ledger import Ledger
from clawdlets_ops.lab.records import Action, Firewall, Server

FIREWALLS_PER_PROJECT: Final = 50


class Firewalls(Desk[Firewall]):
    kind = "firewalls"

    def __init__(self, ledger: Ledger, backend: MachineBackend) -> None:
        super().__init__(ledger)
        self._backend = backend

    def create(self, body: Json) -> Json:
        name, labels = self.named(body)
        rules = grammar.firewall_rules(body)
        if len(self.state.firewalls) >= FIREWALLS_PER_PROJECT:
            raise ApiError(403, "resource_limit_exceeded", f"at most {FIREWALLS_PER_PROJECT} firewalls per project")
        firewall = Firewall(self.state.next_id(self.kind), name, self.ledger.timestamp(), labels, rules)
        resources = edge.resources(self.state, body, "apply_to")
        with self.settling() as settle:
            edge.attach(self.state, firewall, resources)
            self.state.add(firewall)
            actions = [self.ledger.done("set_firewall_rules", firewall), *settle(firewall)]
        return {"firewall": self.view(firewall), "actions": [action.view() for action in actions]}

    def delete(self, record: Firewall) -> None:
        if record.servers or record.selectors:
            raise ApiError(422, "resource_in_use", f"firewall with ID {record.id} is still in use")
        self.state.remove(record)

    def act(self, record: Firewall, command: str, body: Json) -> Json:
        actions = []
        with self.settling() as settle:
            match command:
                case "set_rules":
                    edge.replace_rules(self.state, record, grammar.firewall_rules(body))
                    actions.append(self.ledger.done("set_firewall_rules", record))
                case "apply_to_resources":
                    edge.attach(self.state, record, edge.resources(self.state, body, "apply_to"))
                case "remove_from_resources":
                    edge.detach(self.state, record, edge.resources(self.state, body, "remove_from"))
                case _:
                    raise grammar.not_implemented(f"firewall action {command}")
            actions += settle(record)
        return {"actions": [action.view() for action in actions]}

    @contextmanager
    def settling(self, only: Sequence[Server] | None = None) -> Iterator[Callable[..., list[Action]]]:
        """Remember every server's edge; ``settle(*resources)`` starts what brings the changed ones into force.

        ``only``: whose edge can change; default all.
        """
        servers = list(self.state.servers.values()) if only is None else only
        before = {server.id: self._edge_of(server) for server in servers}

        def settle(*resources: Firewall) -> list[Action]:
            actions = []
            for server in servers:
                is_now = self._edge_of(server)
                if before[server.id] == is_now:
                    continue
                command = "remove_firewall" if set(is_now[0]) < set(before[server.id][0]) else "apply_firewall"
                server.edge_wanted += 1
                actions.append(self.ledger.action(command, server, *resources))
                self.enforce(server, actions[-1:])
            return actions

        yield settle

    def enforce(self, server: Server, actions: Sequence[Action]) -> None:
        """Have the server's worker hand over the rules that are wanted when its turn comes."""
        self.ledger.start(
            server, actions, lambda spec, rules: self._backend.set_rules(spec.server_id, rules), enforces=True
        )

    def _edge_of(self, server: Server) -> tuple[list[int], Rules]:
        return [firewall.id for firewall in edge.attached(self.state, server)], edge.effective(self.state, server)
