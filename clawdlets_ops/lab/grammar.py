"""What clients of the emulated API may say: names, labels, selectors, firewall rules, SSH keys, filters, sort and page.

Pure functions from what was sent to canonical values; ApiError says no. Facts are those of the API reference
(docs.hetzner.cloud) unless marked.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from ipaddress import ip_network
from typing import Any, Final, Literal, TypeVar, cast

from clawdlets_ops.lab.backend import Rule
from clawdlets_ops.lab.catalogue import Json

Query = Mapping[str, Sequence[str]]
R = TypeVar("R")

USER_DATA_LIMIT_BYTES: Final = 32 * 1024
RULES_PER_FIREWALL: Final = 50
NETWORKS_PER_RULE: Final = 100
PER_PAGE_DEFAULT: Final = 25
PER_PAGE_MAX: Final = 50

_HOST_LABEL = r"[A-Za-z0-9](?:[-A-Za-z0-9]{0,61}[A-Za-z0-9])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_HOST_LABEL}(?:\.{_HOST_LABEL})*")
_WORD = r"[A-Za-z0-9](?:[-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?"
_PREFIX = r"(?=[^/]{1,253}/)[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*/"
_KEY = rf"(?:{_PREFIX})?{_WORD}"
_LABEL_KEY = re.compile(_KEY)
_LABEL_VALUE = re.compile(rf"(?:{_WORD})?")
_REQUIREMENT = re.compile(
    rf"(?P<absent>!\s*)?(?P<key>{_KEY})"
    rf"(?:\s*(?P<equality>!=|==|=)\s*(?P<value>(?:{_WORD})?)|\s+(?P<membership>in|notin)\s*\((?P<values>[^()]*)\))?"
)
_OUTSIDE_PARENTHESES = re.compile(r",(?![^(]*\))")
_ID = re.compile(r"[0-9]{1,18}")
_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")

_FILTERS: Final[Mapping[str, Sequence[str]]] = {
    "actions": ("id", "status"),
    "images": ("name", "type", "status", "architecture", "bound_to"),
    "isos": ("name", "architecture"),
    "placement_groups": ("name", "type"),
    "primary_ips": ("name", "ip"),
    "servers": ("name", "status"),
    "ssh_keys": ("name", "fingerprint"),
    "volumes": ("name", "status"),
}
_SORT_KEYS: Final[Mapping[str, Sequence[str]]] = {
    "actions": ("id", "command", "status", "progress", "started", "finished"),
}


class ApiError(Exception):
    """The API says no: HTTP status, error code, message, and details (a JSON object) for the error envelope."""

    def __init__(self, status: int, code: str, message: str, details: Json | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details


def invalid(field: str, message: str) -> ApiError:
    """422 invalid_input; clients decode details.fields[].name."""
    details = {"fields": [{"name": field, "messages": [message]}]}
    return ApiError(422, "invalid_input", f"invalid input in field '{field}': {message}", details)


def not_unique(field: str, message: str) -> ApiError:
    return ApiError(409, "uniqueness_error", message, {"fields": [{"name": field}]})


def not_found(kind: str, row_id: int | str) -> ApiError:
    return ApiError(404, "not_found", f"{kind.removesuffix('s')} with ID '{row_id}' not found")


def not_implemented(what: str) -> ApiError:
    return ApiError(501, "not_implemented", f"the lab's emulator does not do this: {what}")


def text(body: Json, field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value.strip():
        raise invalid(field, "must be a non-empty string")
    return value


def objects(body: Json, field: str) -> list[Json]:
    """A list of objects; absent and null are an empty one, which is what clients mean by them."""
    value = body.get(field) or []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise invalid(field, "must be a list of objects")
    return value


def number(value: object, field: str) -> int:
    """An id; old clients send it as a numeric string."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _ID.fullmatch(value):
        return int(value)
    raise invalid(field, "must be an ID")


def flag(body: Json, field: str, default: bool) -> bool:
    """A boolean; absent and null are the default."""
    value = body.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise invalid(field, "must be a boolean")
    return value


def is_host_name(value: str) -> bool:
    return _HOST_NAME.fullmatch(value) is not None


def host_name(value: str) -> str:
    """RFC 1123, as for server names."""
    if not is_host_name(value):
        raise invalid("name", "must be a valid hostname per RFC 1123")
    return value


def user_data(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise invalid("user_data", "must be a string")
    if len(value.encode(errors="surrogatepass")) > USER_DATA_LIMIT_BYTES:
        raise invalid("user_data", f"must be at most {USER_DATA_LIMIT_BYTES} bytes")
    return value


def labels(value: object) -> dict[str, str]:
    """Keys and values like those of Kubernetes, with hetzner.cloud/ reserved; absent and null are no labels."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid("labels", "must be an object")
    for key, content in value.items():
        if not _LABEL_KEY.fullmatch(key) or key.startswith("hetzner.cloud/"):
            raise invalid("labels", f"label key '{key}' is not allowed")
        if not isinstance(content, str) or not _LABEL_VALUE.fullmatch(content):
            raise invalid("labels", f"the value of label '{key}' is not allowed")
    return dict(value)


@lru_cache(maxsize=256)
def selector(expression: str) -> Callable[[Mapping[str, str]], bool]:
    """The predicate of a label selector: k, !k, k=v, k==v, k!=v, k in (a,b), k notin (a,b), comma for AND.

    != and notin also match where the key is absent, as in Kubernetes (inferred: the reference does not say).
    """
    requirements: list[tuple[str, frozenset[str] | None, bool]] = []
    for part in _OUTSIDE_PARENTHESES.split(expression):
        found = _REQUIREMENT.fullmatch(part.strip())
        if found is None:
            raise invalid("label_selector", f"'{expression}' is not a label selector")
        operator = found["equality"] or found["membership"]
        values: frozenset[str] | None = None
        if found["equality"]:
            values = frozenset({found["value"]})
        elif found["membership"]:
            values = frozenset(value.strip() for value in found["values"].split(","))
            if not all(_LABEL_VALUE.fullmatch(value) for value in values) or values == {""}:
                raise invalid("label_selector", f"'{expression}' has a set with unusable values")
        if found["absent"] and operator:
            raise invalid("label_selector", f"'{expression}' has a '!' before a comparison")
        requirements.append((found["key"], values, bool(found["absent"]) or operator in ("!=", "notin")))

    def matches(owned: Mapping[str, str]) -> bool:
        return all(
            (key in owned if values is None else owned.get(key) in values) != negated
            for key, values, negated in requirements
        )

    return matches


def ssh_fingerprint(public_key: str) -> str:
    """MD5 of the key blob as colon-separated hex (RFC 4716, section 4); refuses what is not one OpenSSH public key."""
    words = public_key.split()
    try:
        blob = base64.b64decode(words[1], validate=True)
    except (IndexError, ValueError) as error:  # binascii.Error is one, and so is a character beyond ASCII
        raise invalid("public_key", "must be an OpenSSH public key") from error
    name = words[0].encode(errors="replace")
    if blob[: 4 + len(name)] != len(name).to_bytes(4, "big") + name or "\n" in public_key.strip():
        raise invalid("public_key", "must be one OpenSSH public key")
    return hashlib.md5(blob, usedforsecurity=False).digest().hex(":")


def _networks(rule: Json, field: str) -> list[str]:
    sent = rule.get(field) or []
    if not isinstance(sent, list) or len(sent) > NETWORKS_PER_RULE:
        raise invalid(f"rules.{field}", f"must be a list of at most {NETWORKS_PER_RULE} CIDRs")
    canonical = []
    for entry in sent:
        if not isinstance(entry, str) or "/" not in entry:
            raise invalid(f"rules.{field}", f"'{entry}' is not in CIDR notation")
        try:
            canonical.append(str(ip_network(entry)))
        except ValueError as error:
            raise invalid(f"rules.{field}", f"'{entry}' is not a network: {error}") from error
    return canonical


def firewall_rules(body: Json) -> list[Json]:
    """The rules of a request in the API's shape, all six keys present, CIDRs canonical; null is an empty list."""
    sent = objects(body, "rules")
    if len(sent) > RULES_PER_FIREWALL:
        raise invalid("rules", f"must be at most {RULES_PER_FIREWALL}")
    return [_firewall_rule(rule) for rule in sent]


def _firewall_rule(rule: Json) -> Json:
    direction, protocol, port = rule.get("direction"), rule.get("protocol"), rule.get("port") or None
    if direction not in ("in", "out"):
        raise invalid("rules.direction", "must be in or out")
    if protocol not in ("tcp", "udp", "icmp", "esp", "gre"):
        raise invalid("rules.protocol", "must be tcp, udp, icmp, esp or gre")
    if (port is not None) != (protocol in ("tcp", "udp")):
        raise invalid("rules.port", "is required for tcp and udp, and forbidden otherwise")
    if port is not None and port != "any":
        found = _PORT.fullmatch(port) if isinstance(port, str) else None
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last <= 65535:
            raise invalid("rules.port", f"'{port}' is neither a port nor a range of ports")
    wanted, other = ("source_ips", "destination_ips") if direction == "in" else ("destination_ips", "source_ips")
    if rule.get(other):
        raise invalid(f"rules.{other}", f"is not for rules of direction {direction}")
    networks = _networks(rule, wanted)
    if not networks:
        raise invalid(f"rules.{wanted}", f"must not be empty for rules of direction {direction}")
    description = rule.get("description")
    if description is not None and (not isinstance(description, str) or len(description) > 255):
        raise invalid("rules.description", "must be a string of at most 255 characters")
    return {
        "direction": direction,
        "protocol": protocol,
        "port": port,
        wanted: networks,
        other: [],
        "description": description,
    }


def machine_rule(rule: Json) -> Rule:
    """The backend's form of a rule that firewall_rules has checked."""
    return Rule(
        direction=cast("Literal['in', 'out']", rule["direction"]),
        protocol=rule["protocol"],
        port="1-65535" if rule["port"] == "any" else rule["port"],
        networks=tuple(rule["source_ips"] or rule["destination_ips"]),
        description=rule["description"],
    )


def choose(kind: str, rows: Sequence[R], query: Query) -> list[R]:
    """The rows that a list request asks for by filter and label selector, in the order it asks for.

    A row is a JSON object, or a record whose attributes are called as the object's fields.
    """
    chosen = list(rows)
    for field in _FILTERS.get(kind, ("name",)):
        if field in query:
            # A primary IP is found by its address alone, an IPv6 one without the mask.
            chosen = [row for row in chosen if str(_field(row, field)).partition("/")[0] in query[field]]
    if kind == "images" and query.get("include_deprecated", ["false"])[-1] != "true":
        chosen = [row for row in chosen if _field(row, "deprecation") is None]
    for expression in query.get("label_selector", ()):
        matches = selector(expression)
        chosen = [row for row in chosen if matches(_field(row, "labels") or {})]
    allowed = _SORT_KEYS.get(kind, ("id", "name", "created"))
    for order in reversed(query.get("sort", ())):
        key, _, way = order.partition(":")
        if key not in allowed or way not in ("", "asc", "desc"):
            raise invalid("sort", f"'{order}' is not one of {', '.join(allowed)} with :asc or :desc")
        chosen.sort(key=_sort_key(key), reverse=way == "desc")
    return chosen


def _sort_key(field: str) -> Callable[[object], tuple[bool, Any]]:
    return lambda row: (_field(row, field) is not None, _field(row, field))


def _field(row: object, name: str) -> Any:
    return row.get(name) if isinstance(row, dict) else getattr(row, name, None)


def page(rows: Sequence[R], query: Query) -> tuple[list[R], Json]:
    """One page of the rows, and the pagination object that goes with it; per_page above 50 is 50."""
    number_of, size = _count(query, "page", 1), min(_count(query, "per_page", PER_PAGE_DEFAULT), PER_PAGE_MAX)
    last = max(1, -(-len(rows) // size))
    return list(rows[(number_of - 1) * size : number_of * size]), {
        "page": number_of,
        "per_page": size,
        "previous_page": number_of - 1 if number_of > 1 else None,
        "next_page": number_of + 1 if number_of < last else None,
        "last_page": last,
        "total_entries": len(rows),
    }


def _count(query: Query, field: str, default: int) -> int:
    sent = query.get(field, [str(default)])[-1]
    if not _ID.fullmatch(sent) or int(sent) == 0:
        raise invalid(field, "must be a number from 1")
    return int(sent)
