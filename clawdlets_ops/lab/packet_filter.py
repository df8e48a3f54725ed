"""The cloud firewall as nftables text, for the lab's internet: outside the servers, where they cannot change it. Pure.

Semantics as documented by Hetzner: stateful; allow-only; inbound is dropped as soon as a firewall is attached, also one
without rules; outbound is open until a rule of direction ``out`` exists; neighbour discovery always passes. Flows that
are established when the rules change go on (the API's documentation says nothing about them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network

from clawdlets_ops.lab.backend import Rule

TABLE = "inet cloud"

_ALWAYS = (
    "ct state established,related return",
    "icmpv6 type { nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } return",
)


def render_cloud(edges: Mapping[int, tuple[Rule, ...] | None], *, operator_leg: str = "op") -> str:
    """The whole table, to be loaded in one transaction. ``edges`` maps a server's id to its rules (None: no firewall).

    Forged source addresses are dropped. Nothing opens a connection to the operator, who is a real machine.
    """
    chains: list[str] = []
    towards, away = [], []
    for server_id, rules in sorted(edges.items()):
        towards.append(f'oifname "s{server_id}" jump in_{server_id}')
        away.append(f'iifname "s{server_id}" jump out_{server_id}')
        chains += _chain(f"in_{server_id}", rules, "in", drops=rules is not None)
        has_out = any(rule.direction == "out" for rule in rules or ())
        chains += _chain(f"out_{server_id}", rules, "out", drops=has_out)
    guard = [
        "fib saddr . iif oif missing drop",
        f'oifname "{operator_leg}" ct state established,related accept',
        f'oifname "{operator_leg}" drop',
    ]
    return "\n".join(
        [
            f"table {TABLE}",
            f"delete table {TABLE}",
            f"table {TABLE} {{",
            *chains,
            *_hook("forward", [*away, *guard, *towards]),
            *_hook("input", away),
            *_hook("output", towards),
            "}",
            "",
        ]
    )


def render_tailnet(operator_leg: str = "op") -> str:
    """The tailnet's bridge: whoever is on it may answer the operator's machine, but not open a connection to it."""
    return f"""table bridge tailnet
delete table bridge tailnet
table bridge tailnet {{
  chain forward {{
    type filter hook forward priority -200; policy accept;
    oifname "{operator_leg}" tcp flags & (syn | ack) == syn drop
    oifname "{operator_leg}" meta l4proto udp drop
  }}
}}
"""


def _hook(name: str, lines: Iterable[str]) -> list[str]:
    return _block(name, [f"type filter hook {name} priority 0; policy accept;", *lines])


def _chain(name: str, rules: tuple[Rule, ...] | None, direction: str, *, drops: bool) -> list[str]:
    """A server's chain. What passes is returned, not accepted: between two servers both chains have a say."""
    if not drops:
        return _block(name, ["return"])
    allowed = [line for rule in rules or () if rule.direction == direction for line in _matches(rule)]
    return _block(name, [*_ALWAYS, *allowed, "drop"])


def _block(name: str, lines: Iterable[str]) -> list[str]:
    return [f"  chain {name} {{", *(f"    {line}" for line in lines), "  }"]


def _matches(rule: Rule) -> list[str]:
    """One line per address family; networks that overlap are merged, which nft's sets insist on."""
    networks = [ip_network(text) for text in rule.networks]
    v4 = [str(net) for net in collapse_addresses(net for net in networks if isinstance(net, IPv4Network))]
    v6 = [str(net) for net in collapse_addresses(net for net in networks if isinstance(net, IPv6Network))]
    side = "saddr" if rule.direction == "in" else "daddr"
    return [
        f"{family} {side} {{ {', '.join(of_family)} }} {_payload(rule, family)} return"
        for family, of_family in (("ip", v4), ("ip6", v6))
        if of_family
    ]


def _payload(rule: Rule, family: str) -> str:
    if rule.port is not None:
        return f"{rule.protocol} dport {rule.port}"
    if rule.protocol == "icmp":
        return f"meta l4proto {'icmp' if family == 'ip' else 'icmpv6'}"
    return f"meta l4proto {rule.protocol}"
