"""What a request to create or rebuild a server asks for, checked as far as that goes without the state of the cloud."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clawdlets_ops.lab import grammar
from clawdlets_ops.lab.catalogue import CATALOGUE, Json
from clawdlets_ops.lab.edge import FIREWALLS_PER_SERVER
from clawdlets_ops.lab.grammar import ApiError

DEFAULT_LOCATION = "fsn1"


@dataclass(frozen=True)
class ServerOrder:
    """ssh_keys are as sent: ids, numeric strings or names.

    ipv4 and ipv6 are True for a new address, False for none, or the id of a primary IP.
    """

    name: str
    labels: dict[str, str]
    user_data: str
    server_type: Json
    location: Json
    image: Json
    ssh_keys: tuple[object, ...]
    firewalls: tuple[int, ...]
    networks: tuple[int, ...]
    volumes: tuple[int, ...]
    placement_group: int | None
    ipv4: bool | int
    ipv6: bool | int
    start: bool


def server_order(body: Json, snapshots: Sequence[Json]) -> ServerOrder:
    """The order of POST /servers; ApiError for bad input."""
    if body.get("datacenter"):
        raise grammar.invalid("datacenter", "was removed from the API in July 2026; use location")
    public_net = body.get("public_net") or {}
    if not isinstance(public_net, dict):
        raise grammar.invalid("public_net", "must be an object")
    group = body.get("placement_group")
    server_type = chosen("server_types", body.get("server_type"), "server_type")
    ssh_keys = body.get("ssh_keys") or []
    if not isinstance(ssh_keys, list):
        raise grammar.invalid("ssh_keys", "must be a list")
    firewalls = [grammar.number(item.get("firewall"), "firewalls") for item in grammar.objects(body, "firewalls")]
    if len(set(firewalls)) > FIREWALLS_PER_SERVER:
        raise ApiError(403, "resource_limit_exceeded", f"at most {FIREWALLS_PER_SERVER} firewalls per server")
    return ServerOrder(
        name=grammar.host_name(grammar.text(body, "name")),
        labels=grammar.labels(body.get("labels")),
        user_data=grammar.user_data(body.get("user_data")),
        server_type=server_type,
        location=chosen("locations", body.get("location") or DEFAULT_LOCATION, "location"),
        image=image_for(server_type, body.get("image"), snapshots, server_type["disk"]),
        ssh_keys=tuple(ssh_keys),
        firewalls=tuple(dict.fromkeys(firewalls)),
        networks=_ids(body, "networks"),
        volumes=_ids(body, "volumes"),
        placement_group=None if group is None else grammar.number(group, "placement_group"),
        ipv4=_address(public_net, "ipv4"),
        ipv6=_address(public_net, "ipv6"),
        start=grammar.flag(body, "start_after_create", True),
    )


def image_for(server_type: Json, sent: object, snapshots: Sequence[Json], disk_gb: int) -> Json:
    """The image that a request names, if a server of this type and disk can have it."""
    image = chosen("images", sent, "image", server_type["architecture"], snapshots)
    if image["status"] != "available":
        raise grammar.invalid("image", "is not available yet")
    if image["disk_size"] > disk_gb:
        raise grammar.invalid("image", "the image's disk is bigger than the server's")
    return image


def chosen(kind: str, sent: object, field: str, architecture: str | None = None, more: Sequence[Json] = ()) -> Json:
    """A row of the catalogue or of ``more`` by id, numeric string or name; a name is looked up within the architecture."""
    for row in (*CATALOGUE[kind], *more):
        fits = architecture in (None, row.get("architecture"))
        by_id = sent in (row["id"], str(row["id"])) and not isinstance(sent, bool)
        if by_id and not fits:
            raise grammar.invalid(field, f"'{sent}' is not for the architecture {architecture}")
        if fits and (by_id or (sent is not None and sent == row["name"])):
            return row
    raise grammar.invalid(field, f"'{sent}' does not exist")


def _ids(body: Json, field: str) -> tuple[int, ...]:
    sent = body.get(field) or []
    if not isinstance(sent, list):
        raise grammar.invalid(field, "must be a list")
    return tuple(dict.fromkeys(grammar.number(one, field) for one in sent))


def _address(public_net: Json, family: str) -> bool | int:
    enabled = grammar.flag(public_net, f"enable_{family}", True)
    if enabled and public_net.get(family):
        return grammar.number(public_net[family], f"public_net.{family}")
    return enabled
