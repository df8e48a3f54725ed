"""Our own OpenAPI description of the implemented subset of the Hetzner Cloud API: what the property tests generate from.

It describes requests (what a client may send) and which answers may come; the shape of answers is held by the contract
tests with the real clients. Field names and limits: docs.hetzner.cloud.
"""

from __future__ import annotations

from typing import Any, Final

Schema = dict[str, Any]

_LABELS: Final[Schema] = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}}
_NAME: Final[Schema] = {"type": "string", "minLength": 1, "maxLength": 63}
_ID: Final[Schema] = {"type": "integer", "minimum": 1, "maximum": 2**53}
_REFERENCE: Final[Schema] = {"oneOf": [_ID, {"type": "string", "minLength": 1}]}
_BOOL: Final[Schema] = {"type": "boolean"}
_CIDRS: Final[Schema] = {
    "type": "array",
    "maxItems": 100,
    "items": {"type": "string", "enum": ["0.0.0.0/0", "::/0", "198.51.100.0/24", "203.0.113.7/32", "2001:db8::/32"]},
}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _enum(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _many(item: Schema, most: int = 5) -> Schema:
    return {"type": "array", "items": item, "maxItems": most}


_RULE: Final = _object(
    ("direction", "protocol"),
    direction=_enum("in", "out"),
    protocol=_enum("tcp", "udp", "icmp", "esp", "gre"),
    port={"type": "string", "pattern": "^([1-9][0-9]{0,3}|[1-9][0-9]{0,3}-[1-9][0-9]{0,3}|any)$"},
    source_ips=_CIDRS,
    destination_ips=_CIDRS,
    description={"type": "string", "maxLength": 255},
)
_TARGET: Final = _object(
    ("type",),
    type=_enum("server", "label_selector"),
    server=_object(("id",), id=_ID),
    label_selector=_object(("selector",), selector={"type": "string", "minLength": 1}),
)
_SUBNET: Final = _object(
    ("type", "network_zone"),
    type=_enum("cloud", "server"),
    network_zone=_enum("eu-central"),
    ip_range=_enum("10.0.1.0/24", "10.0.2.0/24", "192.168.1.0/24"),
)
_PUBLIC_NET: Final = _object(enable_ipv4=_BOOL, enable_ipv6=_BOOL, ipv4=_ID, ipv6=_ID)

CREATE: Final[dict[str, Schema]] = {
    "ssh_keys": _object(("name", "public_key"), name=_NAME, public_key={"type": "string"}, labels=_LABELS),
    "firewalls": _object(("name",), name=_NAME, labels=_LABELS, rules=_many(_RULE, 6), apply_to=_many(_TARGET, 3)),
    "servers": _object(
        ("name", "server_type", "image"),
        name={"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,20}[a-z0-9])?$"},
        server_type=_enum("cx23", "cx33", "cax11", "none-such"),
        image=_enum("debian-12", "ubuntu-24.04", "none-such"),
        location=_enum("fsn1", "nbg1", "hel1", "none-such"),
        start_after_create=_BOOL,
        ssh_keys=_many(_REFERENCE),
        firewalls=_many(_object(("firewall",), firewall=_ID), 3),
        networks=_many(_ID, 2),
        volumes=_many(_ID, 2),
        placement_group=_ID,
        user_data={"type": "string", "maxLength": 40000},
        labels=_LABELS,
        public_net=_PUBLIC_NET,
    ),
    "networks": _object(
        ("name", "ip_range"),
        name=_NAME,
        ip_range=_enum("10.0.0.0/16", "192.168.0.0/16", "8.8.8.0/24"),
        subnets=_many(_SUBNET, 2),
        labels=_LABELS,
    ),
    "volumes": _object(
        ("name", "size"),
        name=_NAME,
        size={"type": "integer", "minimum": -1, "maximum": 20000},
        location=_enum("fsn1", "nbg1"),
        server=_ID,
        automount=_BOOL,
        format=_enum("ext4", "xfs"),
        labels=_LABELS,
    ),
    "placement_groups": _object(("name", "type"), name=_NAME, type=_enum("spread"), labels=_LABELS),
    "primary_ips": _object(
        ("name", "type"),
        name=_NAME,
        type=_enum("ipv4", "ipv6"),
        location=_enum("fsn1", "nbg1"),
        assignee_type=_enum("server"),
        assignee_id=_ID,
        auto_delete=_BOOL,
        labels=_LABELS,
    ),
}

_UPDATE: Final = _object(name=_NAME, labels=_LABELS)
_PROTECTION: Final = _object(delete=_BOOL, rebuild=_BOOL)
_POINTER: Final = _object(("ip", "dns_ptr"), ip={"type": "string"}, dns_ptr={"type": ["string", "null"]})

ACTIONS: Final[dict[str, dict[str, Schema]]] = {
    "firewalls": {
        "set_rules": _object(rules={"oneOf": [_many(_RULE, 6), {"type": "null"}]}),
        "apply_to_resources": _object(("apply_to",), apply_to=_many(_TARGET, 3)),
        "remove_from_resources": _object(("remove_from",), remove_from=_many(_TARGET, 3)),
    },
    "servers": {
        **dict.fromkeys(("poweron", "poweroff", "shutdown", "reboot", "reset"), _object()),
        "rebuild": _object(("image",), image=_enum("debian-12", "none-such"), user_data={"type": "string"}),
        "change_protection": _PROTECTION,
        "change_type": _object(
            ("server_type", "upgrade_disk"), server_type=_enum("cx23", "cx33", "cx43"), upgrade_disk=_BOOL
        ),
        "attach_to_network": _object(
            ("network",), network=_ID, ip={"type": "string"}, alias_ips=_many({"type": "string"})
        ),
        "detach_from_network": _object(("network",), network=_ID),
        "change_dns_ptr": _POINTER,
        "add_to_placement_group": _object(("placement_group",), placement_group=_ID),
        "remove_from_placement_group": _object(),
        "create_image": _object(description={"type": "string"}, type=_enum("snapshot", "backup"), labels=_LABELS),
        **dict.fromkeys(("enable_backup", "disable_backup", "detach_iso", "disable_rescue"), _object()),
        "enable_rescue": _object(type=_enum("linux64"), ssh_keys=_many(_ID, 2)),
    },
    "networks": {
        "add_subnet": _SUBNET,
        "delete_subnet": _object(("ip_range",), ip_range={"type": "string"}),
        "change_ip_range": _object(("ip_range",), ip_range={"type": "string"}),
        "change_protection": _object(delete=_BOOL),
    },
    "volumes": {
        "attach": _object(("server",), server=_ID, automount=_BOOL),
        "detach": _object(),
        "resize": _object(("size",), size={"type": "integer"}),
        "change_protection": _object(delete=_BOOL),
    },
    "primary_ips": {
        "assign": _object(("assignee_id",), assignee_id=_ID, assignee_type=_enum("server")),
        "unassign": _object(),
        "change_dns_ptr": _POINTER,
        "change_protection": _object(delete=_BOOL),
    },
}

READABLE: Final = (*CREATE, "images", "locations", "server_types", "isos")

# Every status that a request may be answered with; a refusal always carries the error envelope.
DONE: Final = frozenset({200, 201, 204})
REFUSED: Final = frozenset({400, 401, 403, 404, 405, 409, 410, 412, 413, 422, 423, 429, 501})


def document() -> Schema:
    """The whole description, OpenAPI 3.1."""
    paths: dict[str, Schema] = {}
    for kind in READABLE:
        paths.setdefault(f"/{kind}", {})["get"] = _operation(f"list {kind}")
        paths.setdefault(f"/{kind}/{{id}}", {})["get"] = _operation(f"get one of {kind}", with_id=True)
    for kind, schema in CREATE.items():
        paths[f"/{kind}"]["post"] = _operation(f"create one of {kind}", body=schema)
        paths[f"/{kind}/{{id}}"]["put"] = _operation(f"update one of {kind}", body=_UPDATE, with_id=True)
        paths[f"/{kind}/{{id}}"]["delete"] = _operation(f"delete one of {kind}", with_id=True)
    for kind, actions in ACTIONS.items():
        for action, schema in actions.items():
            operation = _operation(f"{action} of {kind}", body=schema, with_id=True)
            paths[f"/{kind}/{{id}}/actions/{action}"] = {"post": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "the lab's subset of the Hetzner Cloud API", "version": "1"},
        "servers": [{"url": "/v1"}],
        "paths": paths,
    }


def _operation(summary: str, *, body: Schema | None = None, with_id: bool = False) -> Schema:
    operation: Schema = {
        "summary": summary,
        "responses": {str(status): {"description": ""} for status in sorted(DONE | REFUSED)},
    }
    if with_id:
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": _ID}]
    if body is not None:
        operation["requestBody"] = {"content": {"application/json": {"schema": body}}}
    return operation
