"""What a request to create or rebuild a server asks for, checked as far as that goes without the state of the cloud."""

from __future__ import annotations

from dataclasses import dataclass

from clawdlets_ops.lab import grammar
from clawdlets_ops.lab.catalogue import CATALOGUE, Json
from clawdlets_ops.lab.edge import FIREWALLS_PER_SERVER
from clawdlets_ops.lab.grammar import ApiError

DEFAULT_LOCATION = "fsn1"


@dataclass(frozen=True)
class ServerOrder:
    """ssh_keys are as sent: ids, numeric strings or names."""

    name: str
    labels: dict[str, str]
    user_data: str
    server_type: Json
    location: Json
    image: Json
    ssh_keys: tuple[object, ...]
    firewalls: tuple[int, ...]
    start: bool


def server_order(body: Json) -> ServerOrder:
    """The order of POST /servers; ApiError for bad input, and for what the lab has not."""
    _refuse_what_the_lab_has_not(body)
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
        image=chosen("images", body.get("image"), "image", server_type["architecture"]),
        ssh_keys=tuple(ssh_keys),
        firewalls=tuple(dict.fromkeys(firewalls)),
        start=body.get("start_after_create", True) is not False,
    )


def chosen(kind: str, sent: object, field: str, architecture: str | None = None) -> Json:
    """A row of the catalogue by id, numeric string or name; a name is looked up within the architecture."""
    for row in CATALOGUE[kind]:
        fits = architecture in (None, row.get("architecture"))
        if sent in (row["id"], str(row["id"])) and not fits:
            raise grammar.invalid(field, f"'{sent}' is not for the architecture {architecture}")
        if fits and sent in (row["id"], str(row["id"]), row["name"]):
            return row
    raise grammar.invalid(field, f"'{sent}' does not exist")


def _refuse_what_the_lab_has_not(body: Json) -> None:
    for field in ("networks", "volumes", "placement_group"):
        if body.get(field):
            raise grammar.not_implemented(f"a server with {field}")
    if body.get("datacenter"):
        raise grammar.invalid("datacenter", "was removed from the API in July 2026; use location")
    public_net = body.get("public_net") or {}
    if not isinstance(public_net, dict) or not all(
        public_net.get(f"enable_{v}", True) is True for v in ("ipv4", "ipv6")
    ):
        raise grammar.not_implemented("a server without a public IPv4 and IPv6 address")
    if public_net.get("ipv4") or public_net.get("ipv6"):
        raise grammar.not_implemented("a server with a primary IP made before")
