"""Servers of the emulated cloud: ordered, booted, switched, rebuilt and deleted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from clawdlets_ops.lab import edge, grammar, networks, views
from clawdlets_ops.lab.backend import MachineBackend, MachineSpec
from clawdlets_ops.lab.catalogue import Json, by_id
from clawdlets_ops.lab.desk import Desk, answer
from clawdlets_ops.lab.edge import Rules
from clawdlets_ops.lab.firewalls import Firewalls
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.images import Images
from clawdlets_ops.lab.ledger import DELETED
from clawdlets_ops.lab.orders import image_for, server_order
from clawdlets_ops.lab.primary_ips import PrimaryIps
from clawdlets_ops.lab.records import Action, Server, State
from clawdlets_ops.lab.server_actions import ServerActions, ssh_key
from clawdlets_ops.lab.volumes import VOLUMES_PER_SERVER, Volumes, attach, attachable

SERVERS_PER_GROUP: Final = 10

# command: (the action's name, the server's status meanwhile, its status afterwards)
_POWER: Final = {
    "poweron": ("start_server", "starting", "running"),
    "poweroff": ("stop_server", "stopping", "off"),
    "shutdown": ("shutdown_server", "stopping", "off"),
    "reboot": ("reboot_server", "starting", "running"),
    "reset": ("reset_server", "starting", "running"),
}


class Servers(Desk[Server]):
    kind = "servers"

    def __init__(
        self, backend: MachineBackend, firewalls: Firewalls, primary_ips: PrimaryIps, volumes: Volumes, images: Images
    ) -> None:
        super().__init__(firewalls.ledger)
        self._backend = backend
        self._firewalls = firewalls
        self._primary_ips = primary_ips
        self._volumes = volumes
        self._more = ServerActions(self.ledger, backend, images)

    def create(self, body: Json) -> Json:
        order = server_order(body, self._snapshots())
        self.require_unique_name(order.name)
        keys = [ssh_key(self.state, sent).public_key.strip() for sent in order.ssh_keys]
        firewalls = [self._firewalls.get(firewall_id) for firewall_id in order.firewalls]
        edge.require_few_rules(firewalls)
        volumes = [self._volumes.get(volume_id) for volume_id in order.volumes]
        if order.placement_group is not None:
            require_room(self.state, order.placement_group)
        addresses = self._primary_ips.plan(order, order.location["id"])
        if firewalls and not addresses:
            raise ApiError(422, "private_net_only_server", "a server without public interface has no firewall")
        server = Server(
            id=self.state.next_id(self.kind),
            name=order.name,
            created=self.ledger.timestamp(),
            labels=order.labels,
            status="initializing",
            server_type=order.server_type["id"],
            image=order.image["id"],
            location=order.location["id"],
            ipv4=None,
            ipv6=None,
            user_data=order.user_data,
            authorized_keys=keys,
            disk=order.server_type["disk"],
            placement_group=order.placement_group,
        )
        for volume in volumes:
            attachable(self.state, server, volume)
        if len(volumes) > VOLUMES_PER_SERVER:
            raise ApiError(403, "resource_limit_exceeded", f"at most {VOLUMES_PER_SERVER} volumes per server")
        for network_id in order.networks:
            if network_id not in self.state.networks:
                raise grammar.not_found("networks", network_id)
            networks.attach(self.state, server, self.state.networks[network_id], {})
        self.state.add(server)
        self._primary_ips.settle(server, addresses)
        for firewall in firewalls:
            firewall.servers = [*firewall.servers, server.id]
        made = self._boot(server, start=order.start)
        for network_id in order.networks:
            following = self.ledger.done("attach_to_network", server, self.state.networks[network_id])
            made["next_actions"].append(following.view())
        made["next_actions"] += [attach(self._volumes, server, volume).view() for volume in volumes]
        return {"server": self.view(server), **made}

    def check_update(self, record: Server, body: Json) -> Json:  # noqa: ARG002 - nothing of it
        if body.get("name") is not None:
            grammar.host_name(body["name"])
        return {}

    def delete(self, record: Server) -> Json:
        if record.protected:
            raise ApiError(423, "protected", "server deletion is protected")
        action = self.ledger.claim(record, "delete_server", "deleting")
        self.ledger.start(record, [action], lambda spec, _: self._backend.delete(spec.server_id), status=DELETED)
        return answer(action)

    def act(self, record: Server, command: str, body: Json) -> Json:
        if command in _POWER:
            return answer(self._power(record, command))
        match command:
            case "rebuild":
                return answer(self._rebuild(record, body), root_password=None)
            case "change_protection":
                wanted = {grammar.flag(body, field, record.protected) for field in ("delete", "rebuild")}
                if len(wanted) != 1:
                    raise grammar.invalid("delete", "delete and rebuild must be booleans of the same value")
                record.protected = wanted == {True}
                return answer(self.ledger.done("change_protection", record))
            case "add_to_placement_group":
                return answer(self._join_group(record, body))
            case "remove_from_placement_group":
                return answer(self._leave_group(record))
        return self._more.act(record, command, body)

    def _boot(self, server: Server, *, start: bool) -> Json:
        """Make the machine. Firewalls of the request are in force before its first boot, label selectors only later."""

        def create(spec: MachineSpec, rules: Rules) -> None:
            self._backend.create(spec, rules)
            if not start:
                self._backend.power_off(spec.server_id, graceful=False)

        created = self.ledger.claim(server, "create_server", "initializing")
        following = [self.ledger.action("start_server", server)] if start else []
        status = "running" if start else "off"
        self.ledger.start(server, [created, *following], create, status=status, enforces=True, direct_only=True)
        if edge.attached(self.state, server) != edge.attached(self.state, server, direct_only=True):
            server.edge_wanted += 1
            self._firewalls.enforce(server, [self.ledger.action("apply_firewall", server)])
        return answer(created, next_actions=[action.view() for action in following], root_password=None)

    def _power(self, server: Server, command: str) -> Action:
        calls: dict[str, Callable[[int], None]] = {
            "poweron": self._backend.power_on,
            "poweroff": lambda server_id: self._backend.power_off(server_id, graceful=False),
            "shutdown": lambda server_id: self._backend.power_off(server_id, graceful=True),
            "reboot": lambda server_id: self._backend.reboot(server_id, hard=False),
            "reset": lambda server_id: self._backend.reboot(server_id, hard=True),
        }
        name, meanwhile, afterwards = _POWER[command]
        if command in ("reboot", "reset") and server.status == "off":
            raise ApiError(422, "service_error", "server is not running")
        if afterwards == "off" and server.status == "off":
            return self.ledger.done(name, server)
        if command == "poweron" and server.status == "running":
            meanwhile = "running"  # a guest can have powered itself off: only the backend knows
        action = self.ledger.claim(server, name, meanwhile)
        self.ledger.start(
            server,
            [action],
            lambda spec, _: calls[command](spec.server_id),
            status=afterwards,
            then=lambda error: rescue_is_used(server, error) if afterwards == "running" else None,
        )
        return action

    def _rebuild(self, server: Server, body: Json) -> Action:
        if server.protected:
            raise ApiError(423, "protected", "server rebuild is protected")
        server_type = by_id("server_types", server.server_type)
        image = image_for(server_type, body.get("image"), self._snapshots(), server.disk)
        user_data = grammar.user_data(body["user_data"]) if body.get("user_data") is not None else server.user_data
        action = self.ledger.claim(server, "rebuild_server", "rebuilding")
        server.image, server.user_data = image["id"], user_data
        self.ledger.start(
            server,
            [action],
            self._backend.rebuild,
            status="running",
            enforces=True,
            then=lambda error: rescue_is_used(server, error),
        )
        return action

    def _join_group(self, server: Server, body: Json) -> Action:
        group = grammar.number(body.get("placement_group"), "placement_group")
        require_room(self.state, group)
        if server.placement_group is not None:
            raise ApiError(422, "server_already_added", "server is in a placement group already")
        self.ledger.require_unlocked(server)
        if server.status != "off":
            raise ApiError(422, "server_not_stopped", "server must be stopped")
        # The real thing moves the server to another host and starts it.
        action = self.ledger.claim(server, "add_to_placement_group", "starting", self.state.placement_groups[group])
        server.placement_group = group
        self.ledger.start(server, [action], lambda spec, _: self._backend.power_on(spec.server_id), status="running")
        return action

    def _leave_group(self, server: Server) -> Action:
        if server.placement_group is None:
            raise ApiError(422, "service_error", "server is in no placement group")
        group, server.placement_group = self.state.placement_groups[server.placement_group], None
        return self.ledger.done("remove_from_placement_group", server, group)

    def _snapshots(self) -> list[Json]:
        return [image.view() for image in self.state.images.values()]


def require_room(state: State, group_id: int) -> None:
    if group_id not in state.placement_groups:
        raise grammar.not_found("placement_groups", group_id)
    if len(views.members(state, group_id)) >= SERVERS_PER_GROUP:
        raise ApiError(422, "placement_error", f"at most {SERVERS_PER_GROUP} servers per placement group")


def rescue_is_used(server: Server, error: Json | None) -> None:
    """Rescue mode counts for one boot."""
    if error is None:
        server.rescue = False
