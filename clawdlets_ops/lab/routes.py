"""The paths of the emulated API and what each of them asks of the cloud."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from clawdlets_ops.lab import catalogue, grammar
from clawdlets_ops.lab.catalogue import Json
from clawdlets_ops.lab.cloud import Cloud
from clawdlets_ops.lab.grammar import ApiError, Query
from clawdlets_ops.lab.metrics import metrics

API_PREFIX: Final = "/v1"
CHANGELOG: Final = "https://docs.hetzner.cloud/changelog"

_CREATABLE: Final = ("ssh_keys", "firewalls", "servers", "networks", "volumes", "placement_groups", "primary_ips")
_CHANGEABLE: Final = (*_CREATABLE, "images")
_READABLE: Final = (*_CHANGEABLE, "locations", "server_types", "isos")
_HAVE_ACTIONS: Final = ("firewalls", "servers", "networks", "volumes", "primary_ips", "images")
# Known to the real API and to its clients; here they get a clear answer instead of a puzzling 404.
_ABSENT: Final = (
    "certificates",
    "floating_ips",
    "load_balancer_types",
    "load_balancers",
    "zones",
)

Reply = tuple[int, object]
_Handler = Callable[[Cloud, tuple[str, ...], Query, Json], Reply]


def _list(cloud: Cloud, names: tuple[str, ...], query: Query, _: Json) -> Reply:
    chosen, pagination = cloud.page(names[0], query)
    return 200, {names[0]: chosen, "meta": {"pagination": pagination}}


def _page(kind: str, rows: list[Json], query: Query) -> Reply:
    chosen, pagination = grammar.page(grammar.choose(kind, rows, query), query)
    return 200, {kind: chosen, "meta": {"pagination": pagination}}


def _get(cloud: Cloud, names: tuple[str, ...], _query: Query, _: Json) -> Reply:
    return 200, {names[0].removesuffix("s"): cloud.row(names[0], int(names[1]))}


def _create(cloud: Cloud, names: tuple[str, ...], _query: Query, body: Json) -> Reply:
    return 201, cloud.create(names[0], body)


def _update(cloud: Cloud, names: tuple[str, ...], _query: Query, body: Json) -> Reply:
    return 200, cloud.update(names[0], int(names[1]), body)


def _delete(cloud: Cloud, names: tuple[str, ...], _query: Query, _: Json) -> Reply:
    payload = cloud.delete(names[0], int(names[1]))
    return (204 if payload is None else 200), payload


def _act(cloud: Cloud, names: tuple[str, ...], _query: Query, body: Json) -> Reply:
    return 201, cloud.act(names[0], int(names[1]), names[2], body)


def _actions(cloud: Cloud, _names: tuple[str, ...], query: Query, _: Json) -> Reply:
    if not query.get("id"):
        details = {
            "announcement": "https://docs.hetzner.cloud/changelog#2023-07-20-actions-list-endpoint-is-deprecated"
        }
        raise ApiError(410, "deprecated_api_endpoint", "listing all actions is gone; ask for them by id", details)
    return _list(cloud, ("actions",), query, {})


def _action(cloud: Cloud, names: tuple[str, ...], _query: Query, _: Json) -> Reply:
    return 200, {"action": cloud.row("actions", int(names[-1]))}


def _actions_of(cloud: Cloud, names: tuple[str, ...], query: Query, _: Json) -> Reply:
    return _page("actions", cloud.actions_of(names[0], int(names[1]) if len(names) > 1 else None), query)


def _pricing(_cloud: Cloud, _names: tuple[str, ...], _query: Query, _: Json) -> Reply:
    return 200, {"pricing": catalogue.pricing()}


def _metrics(cloud: Cloud, names: tuple[str, ...], query: Query, _: Json) -> Reply:
    cloud.row("servers", int(names[0]))
    return 200, metrics(query)


def _members(cloud: Cloud, names: tuple[str, ...], query: Query, _: Json) -> Reply:
    return _page("members", cloud.members(int(names[0])), query)


def _datacenters(_cloud: Cloud, names: tuple[str | None, ...], query: Query, _: Json) -> Reply:
    rows = catalogue.datacenters()
    if names[0] is None:
        return _page("datacenters", rows, query)
    for row in rows:
        if row["id"] == int(names[0]):
            return 200, {"datacenter": row}
    raise grammar.not_found("datacenters", names[0])


def _absent(_cloud: Cloud, names: tuple[str, ...], _query: Query, _: Json) -> Reply:
    raise grammar.not_implemented(f"/{names[0]}")


_ID: Final = r"[0-9]{1,18}"


def _routes() -> tuple[tuple[str, re.Pattern[str], _Handler], ...]:
    any_of = "|".join
    templates: tuple[tuple[str, str, _Handler], ...] = (
        ("GET", r"/actions", _actions),
        ("GET", rf"/actions/({_ID})", _action),
        ("GET", rf"/({any_of(_READABLE)})", _list),
        ("GET", rf"/({any_of(_READABLE)})/({_ID})", _get),
        ("POST", rf"/({any_of(_CREATABLE)})", _create),
        ("PUT", rf"/({any_of(_CHANGEABLE)})/({_ID})", _update),
        ("DELETE", rf"/({any_of(_CHANGEABLE)})/({_ID})", _delete),
        ("POST", rf"/({any_of(_HAVE_ACTIONS)})/({_ID})/actions/([a-z_]+)", _act),
        ("GET", rf"/({any_of(_HAVE_ACTIONS)})/actions", _actions_of),
        ("GET", rf"/({any_of(_HAVE_ACTIONS)})/({_ID})/actions", _actions_of),
        ("GET", rf"/({any_of(_HAVE_ACTIONS)})/(?:{_ID}/)?actions/({_ID})", _action),
        ("GET", rf"/servers/({_ID})/metrics", _metrics),
        ("GET", rf"/networks/({_ID})/members", _members),
        ("GET", r"/pricing", _pricing),
        ("GET", rf"/datacenters(?:/({_ID}))?", _datacenters),
        *((method, rf"/({any_of(_ABSENT)})(?:/.*)?", _absent) for method in ("GET", "POST", "PUT", "DELETE")),
    )
    return tuple((method, re.compile(pattern), handler) for method, pattern, handler in templates)


_ROUTES: Final = _routes()


class Routes:
    """``datacenters`` offers /datacenters to old clients; the API answers 410."""

    def __init__(self, cloud: Cloud, *, datacenters: bool) -> None:
        self._cloud = cloud
        self._datacenters = datacenters

    def answer(self, method: str, path: str, query: Query, body: Json) -> Reply:
        """Status and payload; ApiError when it is refused."""
        below = path.removeprefix(API_PREFIX) if path.startswith(f"{API_PREFIX}/") else ""
        if below.startswith("/datacenters") and not self._datacenters:
            details = {"announcement": CHANGELOG}
            raise ApiError(410, "deprecated_api_endpoint", "/datacenters is gone; use /locations", details)
        known = False
        for wanted, pattern, handler in _ROUTES:
            if found := pattern.fullmatch(below):
                if wanted == method:
                    return handler(self._cloud, found.groups(), query, body)
                known = True
        if known:
            raise ApiError(405, "method_not_allowed", f"{method} is not for {path}")
        raise ApiError(404, "not_found", f"{path} does not exist")
