"""What else can be done to a server of the emulated cloud: type, rescue, backups, ISO, networks, pointers, console."""

from __future__ import annotations

from typing import Any, Final

from clawdlets_ops.lab import grammar, networks
from clawdlets_ops.lab.backend import MachineBackend, RescueBackend
from clawdlets_ops.lab.catalogue import Json, by_id
from clawdlets_ops.lab.desk import answer
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.images import Images
from clawdlets_ops.lab.ledger import Ledger
from clawdlets_ops.lab.orders import chosen
from clawdlets_ops.lab.primary_ips import change_pointer
from clawdlets_ops.lab.records import Server, SshKey, State
from clawdlets_ops.lab.resources import Network

# Clients show it to people: it says what it is worth.
NO_PASSWORD: Final = "canary-no-password-opens-a-machine-of-the-lab"  # noqa: S105
BACKUP_WINDOW: Final = "22-02"


class ServerActions:
    """POST /servers/{id}/actions/… that neither switch a server nor replace its disk."""

    def __init__(self, ledger: Ledger, backend: MachineBackend, images: Images) -> None:
        self._ledger = ledger
        self._backend = backend
        self._images = images

    @property
    def _state(self) -> State:
        return self._ledger.state

    def act(self, server: Server, command: str, body: Json) -> Json:
        match command:
            case "change_type":
                return self._change_type(server, body)
            case "create_image":
                return self._images.of_server(server, body)
            case "enable_rescue" | "disable_rescue":
                return self._rescue(server, command, body)
            case "enable_backup" | "disable_backup":
                return self._backup(server, command)
            case "attach_iso" | "detach_iso":
                return self._iso(server, command, body)
            case "attach_to_network" | "detach_from_network" | "change_alias_ips":
                return self._network(server, command, body)
            case "change_dns_ptr":
                change_pointer([address for address in self._state.addresses(server) if address is not None], body)
                return answer(self._ledger.done(command, server))
            case "reset_password":
                if server.status != "running":
                    raise ApiError(422, "service_error", "server is not running")
                return answer(self._ledger.done("reset_password", server), root_password=NO_PASSWORD)
            case "request_console":
                url = f"wss://console.lab.invalid/?server_id={server.id}"
                return answer(self._ledger.done("request_console", server), wss_url=url, password=NO_PASSWORD)
        raise grammar.not_implemented(f"server action {command}")

    def _change_type(self, server: Server, body: Json) -> Json:
        wanted = chosen("server_types", body.get("server_type"), "server_type")
        upgrade = body.get("upgrade_disk")
        if not isinstance(upgrade, bool):
            raise grammar.invalid("upgrade_disk", "must be a boolean")
        now = by_id("server_types", server.server_type)
        if wanted["architecture"] != now["architecture"] or wanted["id"] == now["id"]:
            raise ApiError(422, "invalid_server_type", "the server cannot have this server type")
        if wanted["disk"] < server.disk:
            raise ApiError(422, "invalid_server_type", "the server's disk is bigger than the server type's")
        self._ledger.require_unlocked(server)
        if server.status != "off":
            raise ApiError(422, "server_not_stopped", "server must be stopped")
        server.server_type = wanted["id"]
        server.disk = wanted["disk"] if upgrade else server.disk
        return answer(self._ledger.done("change_server_type", server))

    def _rescue(self, server: Server, command: str, body: Json) -> Json:
        enable = command == "enable_rescue"
        keys = []
        if enable:
            if body.get("type") not in (None, "linux64"):
                raise grammar.invalid("type", "must be linux64")
            if server.rescue:
                raise ApiError(422, "service_error", "rescue mode is enabled already")
            sent = body.get("ssh_keys") or []
            if not isinstance(sent, list):
                raise grammar.invalid("ssh_keys", "must be a list")
            keys = [ssh_key(self._state, one).public_key.strip() for one in sent]
        more: dict[str, Any] = {"root_password": NO_PASSWORD} if enable else {}
        self._ledger.require_unlocked(server)
        before, server.rescue = server.rescue, enable
        backend = self._backend
        if not isinstance(backend, RescueBackend):
            return answer(self._ledger.done(command, server), **more)

        def settled(error: Json | None) -> None:
            if error is not None:
                server.rescue = before

        action = self._ledger.claim(server, command, server.status)
        self._ledger.start(
            server,
            [action],
            lambda spec, _: (
                backend.enable_rescue(spec.server_id, tuple(keys)) if enable else backend.disable_rescue(spec.server_id)
            ),
            status=server.status,
            failed=server.status,
            then=settled,
        )
        return answer(action, **more)

    def _backup(self, server: Server, command: str) -> Json:
        self._ledger.require_unlocked(server)
        server.backup_window = BACKUP_WINDOW if command == "enable_backup" else None
        if server.backup_window is None:
            for image in [one for one in self._state.images.values() if one.type == "backup"]:
                if image.server == server.id:
                    self._state.remove(image)
        return answer(self._ledger.done(command, server))

    def _iso(self, server: Server, command: str, body: Json) -> Json:
        iso = None
        if command == "attach_iso":
            iso = chosen("isos", body.get("iso"), "iso")
            architecture = by_id("server_types", server.server_type)["architecture"]
            if iso["architecture"] not in (None, architecture):
                raise grammar.invalid("iso", f"'{iso['name']}' is not for the architecture {architecture}")
        self._ledger.require_unlocked(server)
        server.iso = iso["id"] if iso else None
        return answer(self._ledger.done(command, server))

    def _network(self, server: Server, command: str, body: Json) -> Json:
        network = self._network_of(body)
        self._ledger.require_unlocked(server)
        match command:
            case "attach_to_network":
                networks.attach(self._state, server, network, body)
            case "detach_from_network":
                networks.interface_of(server, network.id)
                server.private_net = [one for one in server.private_net if one["network"] != network.id]
            case _:
                networks.change_aliases(self._state, server, network, body)
        return answer(self._ledger.done(command, server, network))

    def _network_of(self, body: Json) -> Network:
        network_id = grammar.number(body.get("network"), "network")
        if network_id not in self._state.networks:
            raise grammar.not_found("networks", network_id)
        return self._state.networks[network_id]


def ssh_key(state: State, sent: object) -> SshKey:
    """The key that a request names by id, numeric string or name."""
    for key in state.ssh_keys.values():
        if sent in (key.id, str(key.id), key.name):
            return key
    raise grammar.not_found("ssh_keys", str(sent))
