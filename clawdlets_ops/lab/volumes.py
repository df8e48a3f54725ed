"""Volumes of the emulated cloud: created, attached, grown. State of the API only: no block device appears."""

from __future__ import annotations

from typing import Final

from clawdlets_ops.lab import grammar
from clawdlets_ops.lab.catalogue import Json
from clawdlets_ops.lab.desk import Desk, answer, change_protection, require_unprotected, server_of
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.orders import chosen
from clawdlets_ops.lab.records import Action, Server, State
from clawdlets_ops.lab.resources import Volume

SIZES_GB: Final = range(10, 10241)
VOLUMES_PER_SERVER: Final = 16


class Volumes(Desk[Volume]):
    kind = "volumes"

    def create(self, body: Json) -> Json:
        name, labels = self.named(body)
        size, fmt = _size(body), body.get("format") or None
        if fmt not in (None, "ext4", "xfs"):
            raise grammar.invalid("format", "must be ext4 or xfs")
        server = None if body.get("server") is None else server_of(self.state, body["server"], "server")
        if (server is None) == (body.get("location") in (None, "")):
            raise grammar.invalid("location", "either location or server is needed, and not both")
        grammar.flag(body, "automount", False)
        location = server.location if server else chosen("locations", body["location"], "location")["id"]
        volume = Volume(self.state.next_id(self.kind), name, self.ledger.timestamp(), labels, size, location, fmt)
        if server is not None:
            self.ledger.require_unlocked(server)
            attachable(self.state, server, volume)
        self.state.add(volume)
        created = self.ledger.done("create_volume", volume)
        following = [attach(self, server, volume).view()] if server else []
        return answer(created, volume=volume.view(), next_actions=following)

    def delete(self, record: Volume) -> None:
        require_unprotected(record, "volume deletion is protected")
        if record.server is not None:
            raise ApiError(422, "resource_in_use", f"volume with ID {record.id} is still in use")
        self.state.remove(record)

    def act(self, record: Volume, command: str, body: Json) -> Json:
        match command:
            case "attach":
                server = server_of(self.state, body.get("server"), "server")
                grammar.flag(body, "automount", False)
                self.ledger.require_unlocked(server)
                attachable(self.state, server, record)
                return answer(attach(self, server, record))
            case "detach":
                if record.server is None:
                    raise ApiError(422, "service_error", "volume is not attached to a server")
                server = self.state.servers[record.server]
                self.ledger.require_unlocked(server)
                record.server = None
                return answer(self.ledger.done("detach_volume", server, record))
            case "resize":
                size = _size(body)
                if size <= record.size:
                    raise grammar.invalid("size", "a volume can only grow")
                record.size = size
                return answer(self.ledger.done("resize_volume", record))
            case "change_protection":
                return change_protection(self.ledger, record, body)
        raise grammar.not_implemented(f"volume action {command}")


def attachable(state: State, server: Server, volume: Volume) -> None:
    if volume.server is not None:
        raise ApiError(422, "volume_already_attached", "volume is already attached to a server")
    if volume.location != server.location:
        raise grammar.invalid("server", "server and volume must be in the same location")
    if sum(other.server == server.id for other in state.volumes.values()) >= VOLUMES_PER_SERVER:
        raise ApiError(403, "resource_limit_exceeded", f"at most {VOLUMES_PER_SERVER} volumes per server")


def attach(desk: Desk[Volume], server: Server, volume: Volume) -> Action:
    """What ``attachable`` has allowed."""
    volume.server = server.id
    return desk.ledger.done("attach_volume", server, volume)


def _size(body: Json) -> int:
    size = body.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size not in SIZES_GB:
        raise grammar.invalid("size", f"must be a number of GB from {SIZES_GB[0]} to {SIZES_GB[-1]}")
    return size
