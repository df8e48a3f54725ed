"""The cloud firewall as nftables text, for the lab's internet: outside the servers, where they cannot change it. Pure.

Semantics as documented by Hetzner: stateful; allow-only; inbound is dropped as soon as a firewall is attached, also one
without rules; outbound is open until a rule of direction ``out`` exists; neighbour discovery, DHCP, the resolvers and the
metadata service always pass. Flows that are established when the rules change go on, unless they are to be cut: the API's
documentation says nothing about them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network

from clawdlets_ops.lab.addressing import METADATA, METADATA_PORT, RESOLVERS
from clawdlets_ops.lab.backend import Rule

TABLE = "inet cloud"

_DISCOVERY = "icmpv6 type { nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } return"
_RESOLVERS = {
    family: ", ".join(address for address in RESOLVERS if (":" in address) is (family == "ip6"))
    for family in ("ip", "ip6")
}
# What passes whatever the rules say; answers to it pass as part of the flow.
_ALWAYS = {
    "in": (_DISCOVERY, "ip saddr 172.31.1.1 udp sport 67 udp dport 68 return"),
    "out": (
        _DISCOVERY,
        "ip daddr { 172.31.1.1, 255.255.255.255 } udp sport 68 udp dport 67 return",
        f"ip daddr {METADATA} tcp dport {METADATA_PORT} return",
        *(
            f"{family} daddr {{ {found} }} meta l4proto {{ tcp, udp }} th dport 53 return"
            for family, found in _RESOLVERS.items()
        ),
    ),
}
_FLOWS = ("ct state established,related return",)
# Whoever opened the flow must be let through by the rules of this moment, packet by packet; only answers pass unasked.
_FLOWS_CUT = ("ct state related return", "ct state established ct direction reply return")


def render_cloud(
    edges: Mapping[int, tuple[Rule, ...] | None], *, operator_leg: str = "op", cut_established: bool = False
) -> str:
    """The whole table, to be loaded in one transaction. ``edges`` maps a server's id to its rules (None: no firewall).

    Forged source addresses are dropped. Nothing opens a connection to the operator, who is a real machine. The metadata
    service answers servers only. With ``cut_established`` a flow ends when the rules that let it begin are gone.
    """
    flows = _FLOWS_CUT if cut_established else _FLOWS
    chains: list[str] = []
    towards, away = [], []
    for server_id, rules in sorted(edges.items()):
        towards.append(f'oifname "s{server_id}" jump in_{server_id}')
        away.append(f'iifname "s{server_id}" jump out_{server_id}')
        chains += _chain(f"in_{server_id}", rules, "in", flows, drops=rules is not None)
        has_out = any(rule.direction == "out" for rule in rules or ())
        chains += _chain(f"out_{server_id}", rules, "out", flows, drops=has_out)
    guard = [
        "fib saddr . iif oif missing drop",
        f'oifname "{operator_leg}" ct state established,related accept',
        f'oifname "{operator_leg}" drop',
    ]
    for_servers = ", ".join((METADATA, *_RESOLVERS["ip"].split(", ")))
    strangers = [
        f'iifname {{ "{operator_leg}", "out" }} ip daddr {{ {for_servers} }} drop',
        f'iifname {{ "{operator_leg}", "out" }} ip6 daddr {{ {_RESOLVERS["ip6"]} }} drop',
    ]
    return "\n".join(
        [
            f"table {TABLE}",
            f"delete table {TABLE}",
            f"table {TABLE} {{",
            *chains,
            *_hook("forward", [*away, *guard, *towards]),
            *_hook("input", [*strangers, *away]),
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


def render_operator() -> str:
    """The operator's node carries what the root namespace sends, with its own address, and lets nobody in to it."""
    return """table inet operator
delete table inet operator
table inet operator {
  chain forward {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname "op" oifname "tailscale0" accept
  }
  chain postrouting {
    type nat hook postrouting priority 100;
    oifname "tailscale0" masquerade
  }
}
"""


def _hook(name: str, lines: Iterable[str]) -> list[str]:
    return _block(name, [f"type filter hook {name} priority 0; policy accept;", *lines])


def _chain(
    name: str, rules: tuple[Rule, ...] | None, direction: str, flows: tuple[str, ...], *, drops: bool
) -> list[str]:
    """A server's chain. What passes is returned, not accepted: between two servers both chains have a say."""
    if not drops:
        return _block(name, ["return"])
    allowed = [line for rule in rules or () if rule.direction == direction for line in _matches(rule)]
    return _block(name, [*flows, *_ALWAYS[direction], *allowed, "drop"])


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
