"""Names and addresses of a lab's networks, and the ``ip`` commands that make them. Pure.

An internet, a tailnet and the places to look from, all in network namespaces.

A lab has a number N (1 … 255) and every name of it begins ``clfN``. The root namespace holds nothing of it but the
operator's two legs, ``clfNi`` (internet) and ``clfNt`` (tailnet). Addresses are those of RFC 2544 and RFC 5180
(benchmarking) and of the ranges that Tailscale uses, so that none of them can be a real server's:

======================  ==================  ============================
operator, internet      198.18.0.N          2001:2:0:0::N
server of slot S        198.18.N.(10+S)     2001:2:0:NNKK::1 (KK = 10+S in hex)
stranger                198.19.N.2          2001:2:0:NN00::2
control                 198.19.N.3          2001:2:0:NN00::3   (port 4242)
tailnet control server  198.19.N.4          none               (port 443 or 8080)
operator's node         198.19.N.5          2001:2:0:NN00::5   (real tailnet)
member's node           198.19.N.6          2001:2:0:NN00::6   (real tailnet)
operator, tailnet       100.64.N.1          fd7a:115c:a1e0:N::1
member                  100.64.N.2          fd7a:115c:a1e0:N::2
control, tailnet        100.64.N.3          fd7a:115c:a1e0:N::3   (stand-in, port 4242)
joined server           100.64.N.(10+S)     fd7a:115c:a1e0:N::(10+S)   (stand-in)
metadata service        169.254.169.254     none               (port 80)
resolvers               185.12.64.1, .2     2a01:4ff:ff00::add:1, :2
======================  ==================  ============================

The last two are in every lab's internet, for its servers alone: no route of the root namespace leads there. Nothing
listens at the resolvers' addresses (they are Hetzner's): a question is refused at once.

The tailnet is one of two things. The stand-in is a bridge that joined servers hang on. The real one needs no network of
its own: its nodes are the operator's (in the tailnet's namespace, through which the root namespace reaches it), the
member's and the servers', and their packets go over the internet. There headscale gives the addresses, in the order of
joining; operator and member are the first two. The positive control of each of these two is then the other.

A server hangs on a routed point-to-point leg with the gateways 172.31.1.1 and fe80::1, as at Hetzner. The internet has
no way out: a packet that is not for the lab ends there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final

from clawdlets_ops.lab.backend import BackendError

MAX_NUMBER: Final = 255
CONTROL_PORT: Final = 4242
JOIN_PORT: Final = 8080
METADATA: Final = "169.254.169.254"
METADATA_PORT: Final = 80
RESOLVERS: Final = ("185.12.64.1", "185.12.64.2", "2a01:4ff:ff00::add:1", "2a01:4ff:ff00::add:2")
NODES: Final = {"operator": 5, "member": 6}  # the lab's own nodes on a real tailnet: where they are on the internet

_FIRST_KEY = 10  # below are the operator, the stranger, the member and the controls
_LAST_KEY = 254


@dataclass(frozen=True)
class Addressing:
    """Every name and address of the lab with this number."""

    number: int

    @property
    def prefix(self) -> str:
        return f"clf{self.number}"

    @property
    def internet_ns(self) -> str:
        return f"{self.prefix}-net"

    @property
    def stranger_ns(self) -> str:
        return f"{self.prefix}-out"

    @property
    def tailnet_ns(self) -> str:
        return f"{self.prefix}-tail"

    @property
    def member_ns(self) -> str:
        return f"{self.prefix}-mem"

    @property
    def operator_legs(self) -> tuple[str, str]:
        """Internet leg, tailnet leg: all that the root namespace holds."""
        return f"{self.prefix}i", f"{self.prefix}t"

    def machine_ns(self, server_id: int) -> str:
        return f"{self.prefix}-m{server_id}"

    @property
    def operator(self) -> tuple[str, str]:
        return f"198.18.0.{self.number}", f"2001:2::{self.number:x}"

    def outside(self, last: int) -> tuple[str, str]:
        """An address of the internet that is no server's: 2 the stranger, 3 the control, 4 the control server, 5 and 6 the
        nodes of operator and member."""
        return f"198.19.{self.number}.{last}", str(ip_address(f"2001:2:0:{self.number << 8:x}::{last:x}"))

    def tailnet(self, last: int) -> tuple[str, str]:
        """An address of the tailnet: 1 the operator, 2 the member; on the stand-in 3 the control, from 10 on the servers."""
        return f"100.64.{self.number}.{last}", f"fd7a:115c:a1e0:{self.number:x}::{last:x}"

    def server(self, key: int) -> tuple[str, str]:
        """IPv4 address and IPv6 /64 of the server with this key (10 … 254)."""
        network = IPv6Network(f"2001:2:0:{self.number << 8 | key:x}::/64")
        return f"198.18.{self.number}.{key}", str(network)

    def key_of(self, address: str) -> int | None:
        """The key of the server that has this public address (IPv4 or IPv6), or None."""
        parsed = ip_address(address)
        if parsed in IPv4Network(f"198.18.{self.number}.0/24"):
            key = int(parsed) & 0xFF
        elif parsed in IPv6Network(f"2001:2:0:{self.number << 8:x}::/56"):
            key = int(parsed) >> 64 & 0xFF
        else:
            return None
        return key if _FIRST_KEY <= key <= _LAST_KEY else None

    def tailnet_key(self, addresses: Iterable[str], taken: Collection[int]) -> int:
        """The key on the stand-in tailnet of a server with these public addresses: one of theirs, else the first free one."""
        free = [key for key in range(_FIRST_KEY, _LAST_KEY + 1) if key not in taken]
        return next((key for key in map(self.key_of, addresses) if key in free), free[0])

    @property
    def networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """All that belongs to this lab alone; while it is up, no packet for these leaves through another interface."""
        return (
            IPv4Network(f"198.18.{self.number}.0/24"),
            IPv4Network(f"198.19.{self.number}.0/24"),
            IPv6Network(f"2001:2:0:{self.number << 8:x}::/56"),
            IPv4Network(f"100.64.{self.number}.0/24"),
            IPv6Network(f"fd7a:115c:a1e0:{self.number:x}::/64"),
            IPv4Network(f"{self.operator[0]}/32"),
            IPv6Network(f"{self.operator[1]}/128"),
        )

    def allocate(self, slot: int) -> tuple[str, str]:
        """The AddressPool of the emulated cloud: slot 0, 1, … to (IPv4 address, IPv6 /64)."""
        if not 0 <= slot <= _LAST_KEY - _FIRST_KEY:
            raise BackendError("resource_limit_exceeded", f"the lab has {_LAST_KEY - _FIRST_KEY + 1} addresses")
        return self.server(_FIRST_KEY + slot)

    def vantages(self, *, nodes: bool = False) -> list[dict[str, object]]:
        """What ``.clawdlets/vantages.json`` holds. ``nodes``: the tailnet is one of real nodes."""
        near, far = (self.tailnet(2), self.tailnet(1)) if nodes else (self.tailnet(3), self.tailnet(3))

        def entry(name: str, side: str, namespace: str | None, controls: tuple[str, str]) -> dict[str, object]:
            via = ["ip", "netns", "exec", namespace] if namespace else []
            reachable = {"4": [controls[0], CONTROL_PORT], "6": [controls[1], CONTROL_PORT]}
            return {"name": name, "side": side, "via": via, "controls": reachable}

        return [
            entry("operator", "internet", None, self.outside(3)),
            entry("stranger", "internet", self.stranger_ns, self.outside(3)),
            entry("operator-tailnet", "tailnet", None, near),
            entry("member", "tailnet", self.member_ns, far),
        ]


@dataclass(frozen=True)
class Batch:
    """Lines for ``ip -batch`` in one namespace (None: the root namespace)."""

    namespace: str | None
    lines: tuple[str, ...]


def plan_up(net: Addressing) -> list[Batch]:
    """The internet without any server, and the operator's legs. The namespaces exist already."""
    (op4, op6), (out4, out6) = net.operator, net.outside(2)
    to_internet, to_tailnet = net.operator_legs
    services = [*net.outside(3), net.outside(4)[0], METADATA, *RESOLVERS]
    return [
        Batch(
            None,
            (
                f"link add {to_internet} type veth peer name op netns {net.internet_ns}",
                f"link add {to_tailnet} type veth peer name op netns {net.tailnet_ns}",
            ),
        ),
        Batch(
            net.internet_ns,
            (
                "link set lo up",
                *(f"address add {address} dev lo{_nodad(address)}" for address in services),
                f"link add out type veth peer name eth0 netns {net.stranger_ns}",
                *_router_leg("op", op4, f"{op6}/128"),
                *_router_leg("out", out4, f"{out6}/128"),
            ),
        ),
        Batch(
            None,
            (
                *_leg(to_internet),
                f"address add {op4}/32 dev {to_internet}",
                f"address add {op6}/128 dev {to_internet} nodad",
                *(
                    f"route add {network} via 172.31.1.1 dev {to_internet} onlink src {op4}"
                    if network.version == 4
                    else f"route add {network} via fe80::1 dev {to_internet} src {op6}"
                    for network in net.networks[:3]
                ),
            ),
        ),
        Batch(net.stranger_ns, ("link set lo up", *_guest_leg("eth0", out4, f"{out6}/128"))),
        Batch(net.tailnet_ns, ("link set lo up",)),
        Batch(net.member_ns, ("link set lo up",)),
    ]


def plan_second_network(net: Addressing) -> list[Batch]:
    """The stand-in for a tailnet, on top of ``plan_up``: a bridge with the operator and the member on it."""
    return [
        Batch(
            net.tailnet_ns,
            (
                "link add br0 type bridge stp_state 0 mcast_snooping 0",
                "link set br0 up",
                f"address add {net.tailnet(3)[0]}/24 dev br0",
                f"address add {net.tailnet(3)[1]}/64 dev br0 nodad",
                f"link add mem type veth peer name tailscale0 netns {net.member_ns}",
                "link set op master br0 up",
                "link set mem master br0 up",
            ),
        ),
        Batch(None, _tailnet_leg(net.operator_legs[1], net.tailnet(1))),
        Batch(net.member_ns, _tailnet_leg("tailscale0", net.tailnet(2))),
    ]


def plan_nodes(net: Addressing) -> list[Batch]:
    """Places for the real nodes of operator and member, on top of ``plan_up``: legs to the internet, and the operator's
    way to its node."""
    (op4, op6), (_, leg) = net.operator, net.operator_legs
    v4, v6 = f"100.64.{net.number}.0/24", f"fd7a:115c:a1e0:{net.number:x}::/64"
    batches = [
        Batch(
            net.tailnet_ns,
            (
                *_leg("op"),
                "address add 172.31.1.2/32 dev op",
                f"route add {op4}/32 dev op",
                f"route add {op6}/128 via fe80::1 dev op",
            ),
        ),
        Batch(
            None,
            (
                *_leg(leg, "fe80::1"),
                f"route add {v4} via 172.31.1.2 dev {leg} onlink src {op4}",
                f"route add {v6} via fe80::2 dev {leg} src {op6}",
            ),
        ),
    ]
    for (name, last), namespace in zip(NODES.items(), (net.tailnet_ns, net.member_ns), strict=True):
        ipv4, ipv6 = net.outside(last)
        batches += [
            Batch(
                net.internet_ns,
                (
                    f"link add n-{name} type veth peer name eth0 netns {namespace}",
                    *_router_leg(f"n-{name}", ipv4, f"{ipv6}/128"),
                ),
            ),
            Batch(namespace, _guest_leg("eth0", ipv4, f"{ipv6}/128")),
        ]
    return batches


def plan_attach(net: Addressing, server_id: int, ipv4: str, ipv6_network: str) -> list[Batch]:
    """One server's leg to the internet; "" for an address that it has not. Its namespace exists already and is empty."""
    leg = f"s{server_id}"
    return [
        Batch(
            net.internet_ns,
            (
                f"link add {leg} type veth peer name eth0 netns {net.machine_ns(server_id)}",
                *_router_leg(leg, ipv4, ipv6_network),
            ),
        ),
        Batch(
            net.machine_ns(server_id),
            ("link set lo up", *_guest_leg("eth0", ipv4, ipv6_network.replace("::/", "::1/"))),
        ),
    ]


def plan_join(net: Addressing, server_id: int, key: int) -> list[Batch]:
    """One server's leg to the tailnet."""
    namespace, leg = net.machine_ns(server_id), f"t{server_id}"
    # One address, one MAC: whoever knew the machine before its reboot would send to the old one for seconds.
    mac = f"02:64:00:{net.number:02x}:{key:02x}:01"
    return [
        Batch(
            net.tailnet_ns,
            (
                f"link add {leg} type veth peer name tailscale0 address {mac} netns {namespace}",
                f"link set {leg} master br0 up",
            ),
        ),
        Batch(namespace, _tailnet_leg("tailscale0", net.tailnet(key))),
    ]


def _nodad(address: str) -> str:
    return " nodad" if ":" in address else ""


def _leg(device: str, link_local: str = "fe80::2") -> tuple[str, ...]:
    """A link up with the one link-local address that we choose: no waiting for duplicate address detection."""
    return (
        f"link set {device} addrgenmode none",
        f"link set {device} up",
        f"address add {link_local}/64 dev {device} nodad",
    )


def _router_leg(device: str, ipv4: str, ipv6_network: str) -> tuple[str, ...]:
    via = "" if ipv6_network.endswith("/128") else "via fe80::2 "
    return (
        f"link set {device} addrgenmode none",
        f"link set {device} up",
        f"address add 172.31.1.1/32 dev {device}",
        f"address add fe80::1/64 dev {device} nodad",
        *([f"route add {ipv4}/32 dev {device}"] if ipv4 else []),
        *([f"route add {ipv6_network} {via}dev {device}"] if ipv6_network else []),
    )


def _guest_leg(device: str, ipv4: str, ipv6: str) -> tuple[str, ...]:
    v4 = (f"address add {ipv4}/32 dev {device}", f"route add default via 172.31.1.1 dev {device} onlink")
    v6 = (f"address add {ipv6} dev {device} nodad", f"route add ::/0 via fe80::1 dev {device}")
    return (*_leg(device), *(v4 if ipv4 else ()), *(v6 if ipv6 else ()))


def _tailnet_leg(device: str, addresses: tuple[str, str]) -> tuple[str, ...]:
    return (
        *_leg(device, f"fe80::{addresses[1].rpartition(':')[2]}"),  # they share one link: no two are the same
        f"address add {addresses[0]}/24 dev {device}",
        f"address add {addresses[1]}/64 dev {device} nodad",
    )
