"""Which firewalls are attached to which server, and the rules that come of it; questions about a State, and two edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from clawdlets_ops.lab import grammar
from clawdlets_ops.lab.backend import Rule
from clawdlets_ops.lab.catalogue import Json
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.records import Firewall, Server, State

FIREWALLS_PER_SERVER: Final = 5
EFFECTIVE_RULES: Final = 500

Rules = tuple[Rule, ...] | None


def hits(state: State, expression: str) -> list[int]:
    """The servers that a label selector selects."""
    matches = grammar.selector(expression)
    return [server.id for server in state.servers.values() if matches(server.labels)]


def _selected(state: State, firewall: Firewall) -> set[int]:
    return {server_id for expression in firewall.selectors for server_id in hits(state, expression)}


def attached(state: State, server: Server, *, direct_only: bool = False) -> list[Firewall]:
    return [
        firewall
        for firewall in state.firewalls.values()
        if server.id in firewall.servers or (not direct_only and _selects(firewall, server))
    ]


def _selects(firewall: Firewall, server: Server) -> bool:
    return any(grammar.selector(expression)(server.labels) for expression in firewall.selectors)


def effective(state: State, server: Server, *, direct_only: bool = False) -> Rules:
    """The union of all attached firewalls' rules; None when no firewall is attached."""
    firewalls = attached(state, server, direct_only=direct_only)
    if not firewalls:
        return None
    return tuple(dict.fromkeys(grammar.machine_rule(rule) for firewall in firewalls for rule in firewall.rules))


def resources(state: State, body: Json, field: str) -> list[int | str]:
    """What a request names as firewall resources: servers as ids, label selectors as text."""
    named: list[int | str] = []
    for item in grammar.objects(body, field):
        match item:
            case {"type": "server", "server": {"id": server_id}}:
                found = grammar.number(server_id, f"{field}.server")
                if found not in state.servers:
                    raise ApiError(404, "firewall_resource_not_found", f"server with ID '{found}' not found")
                named.append(found)
            case {"type": "label_selector", "label_selector": {"selector": str(expression)}}:
                grammar.selector(expression)
                named.append(expression)
            case _:
                raise grammar.invalid(field, "must be servers or label selectors")
    return list(dict.fromkeys(named))


def attach(state: State, firewall: Firewall, named: Sequence[int | str]) -> None:
    """Attach to all of the resources or, with ApiError, to none."""
    for resource in named:
        if resource in firewall.servers or resource in firewall.selectors:
            raise ApiError(422, "firewall_already_applied", f"firewall is already applied to '{resource}'")
        if isinstance(resource, int) and len(attached(state, state.servers[resource])) >= FIREWALLS_PER_SERVER:
            raise ApiError(403, "resource_limit_exceeded", f"at most {FIREWALLS_PER_SERVER} firewalls per server")
        if isinstance(resource, int) and state.servers[resource].ipv4 is state.servers[resource].ipv6 is None:
            raise ApiError(422, "private_net_only_server", f"server with ID {resource} has no public interface")
    affected = {server_id for one in named for server_id in ([one] if isinstance(one, int) else hits(state, one))}
    for server_id in affected:
        others = [other for other in attached(state, state.servers[server_id]) if other.id != firewall.id]
        require_few_rules([*others, firewall])
    firewall.servers = [*firewall.servers, *(resource for resource in named if isinstance(resource, int))]
    firewall.selectors = [*firewall.selectors, *(resource for resource in named if isinstance(resource, str))]


def replace_rules(state: State, firewall: Firewall, rules: list[Json]) -> None:
    """Put these rules in place of the firewall's, or none of them with ApiError."""
    before, firewall.rules = firewall.rules, rules
    try:
        require_few_rules([firewall])
        for server_id in {*firewall.servers, *_selected(state, firewall)}:
            require_few_rules(attached(state, state.servers[server_id]))
    except ApiError:
        firewall.rules = before
        raise


def require_few_rules(firewalls: Sequence[Firewall]) -> None:
    """At most 500 rules in effect together; a rule counts once for each of its networks (chosen: no source says how)."""
    count = sum(len(rule["source_ips"]) + len(rule["destination_ips"]) for one in firewalls for rule in one.rules)
    if count > EFFECTIVE_RULES:
        raise ApiError(403, "resource_limit_exceeded", f"at most {EFFECTIVE_RULES} effective rules, these are {count}")


def detach(state: State, firewall: Firewall, named: Sequence[int | str]) -> None:
    """Detach from all of the resources or, with ApiError, from none."""
    for resource in named:
        if resource in firewall.servers or resource in firewall.selectors:
            continue
        if resource in _selected(state, firewall):
            raise ApiError(422, "firewall_managed_by_label_selector", "detach the label selector instead")
        raise ApiError(404, "firewall_resource_not_found", f"firewall is not applied to '{resource}'")
    firewall.servers = [server_id for server_id in firewall.servers if server_id not in named]
    firewall.selectors = [expression for expression in firewall.selectors if expression not in named]
