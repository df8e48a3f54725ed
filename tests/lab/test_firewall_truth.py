"""Firewall truth table: what the documented semantics say of every probe, against what real packets do.

Rule sets go through the API (so union, validation and order of the emulated cloud are part of what is tested), the probes
are real TCP connections, UDP datagrams and ICMP echoes from four places on both families. The expectation is a small model
of the documentation that shares no code with the lab.
"""

from __future__ import annotations

import errno
import ipaddress
import itertools
import json
import os
import random
import resource
import selectors
import shutil
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hcloud import Client
from hcloud.firewalls.client import BoundFirewall
from hcloud.firewalls.domain import FirewallResource, FirewallRule
from hcloud.images.domain import Image
from hcloud.server_types.domain import ServerType
from hcloud.servers.client import BoundServer

from clawdlets_ops.lab import control
from clawdlets_ops.lab.network import in_namespace
from clawdlets_ops.lab.registry import LabRecord, read_record
from clawdlets_ops.layout import Layout

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
TARGETS = 8
TCP_PORTS = (22, 80, 443, 1023, 1024, 5000, 5001, 65535)
UDP_PORTS = (53, 1024, 5000, 5001, 41641)
CONTROL_PORT = 4242
SILENCE_S = 1.6
RESEND_S = 0.4
SEED = 20260
MIN_OF_EACH = 30

Firewalls = list[list[FirewallRule]]


# The model


def admits(rule: FirewallRule, peer: str, protocol: str, port: int | None) -> bool:
    networks = rule.source_ips if rule.direction == "in" else rule.destination_ips
    if rule.protocol != protocol or not any(ipaddress.ip_address(peer) in ipaddress.ip_network(n) for n in networks):
        return False
    if protocol == "icmp":
        return True
    low, _, high = rule.port.partition("-")
    return int(low) <= (port or 0) <= int(high or low)


def passes(firewalls: Firewalls, direction: str, peer: str, protocol: str, port: int | None) -> bool:
    rules = [rule for firewall in firewalls for rule in firewall if rule.direction == direction]
    if not firewalls or (direction == "out" and not rules):
        return True
    return any(admits(rule, peer, protocol, port) for rule in rules)


# The packets


class Probe(NamedTuple):
    """One question to the network: can ``source`` reach this address?"""

    source: str
    target: str
    address: str
    protocol: str
    port: int | None


class Packets:
    """Asks many questions at once. Source ports and echo ids are used once: no flow is taken for an earlier one."""

    def __init__(self, namespaces: dict[str, str | None]) -> None:
        self._namespaces = namespaces
        self._numbers = itertools.count(10_000)  # below what the kernel gives out by itself
        self.sent = 0

    def ask(self, probes: Sequence[Probe]) -> dict[Probe, str]:
        """open or silent, or what else happened."""
        self.sent += len(probes)
        answers: dict[Probe, str] = {}
        with ExitStack() as stack, selectors.DefaultSelector() as selector:
            for source, mine in itertools.groupby(sorted(probes, key=lambda p: p.source), key=lambda p: p.source):
                asked = list(mine)
                opened = self._inside(source, lambda a=asked: [_socket(probe, self._numbers) for probe in a])
                for probe, (sock, number) in zip(asked, opened, strict=True):
                    stack.enter_context(sock)
                    events = selectors.EVENT_WRITE if probe.protocol == "tcp" else selectors.EVENT_READ
                    selector.register(sock, events, (probe, number))
            started = time.monotonic()
            resend = started
            while selector.get_map() and time.monotonic() < started + SILENCE_S:
                if time.monotonic() >= resend:
                    for key in list(selector.get_map().values()):
                        _send(key.fileobj, *key.data)
                    resend += RESEND_S
                for key, _ in selector.select(0.05):
                    probe, number = key.data
                    if answer := _answer(key.fileobj, probe, number):
                        answers[probe] = answer
                        selector.unregister(key.fileobj)
        return {probe: answers.get(probe, "silent") for probe in probes}

    def _inside(self, source: str, work: Any) -> Any:
        namespace = self._namespaces[source]
        return work() if namespace is None else in_namespace(namespace, work)


def _socket(probe: Probe, numbers: Iterator[int]) -> tuple[socket.socket, int]:
    family = socket.AF_INET6 if ":" in probe.address else socket.AF_INET
    if probe.protocol == "icmp":
        sock, number = socket.socket(family, socket.SOCK_RAW, 58 if family == socket.AF_INET6 else 1), next(numbers)
    else:
        sock = socket.socket(family, socket.SOCK_STREAM if probe.protocol == "tcp" else socket.SOCK_DGRAM)
        number = _bind(sock, numbers)
    sock.setblocking(False)
    sock.connect_ex((probe.address, probe.port or 0))
    return sock, number


def _bind(sock: socket.socket, numbers: Iterator[int]) -> int:
    for number in numbers:
        try:
            sock.bind(("::" if sock.family == socket.AF_INET6 else "0.0.0.0", number))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # somebody else's on this machine
                raise
        else:
            return number
    raise AssertionError("no number is left")


def _send(sock: Any, probe: Probe, number: int) -> None:
    try:
        if probe.protocol == "udp":
            sock.send(b"probe")
        elif probe.protocol == "icmp":
            sock.send(_echo(number, 128 if ":" in probe.address else 8))
    except ConnectionRefusedError:
        return  # the next read tells


def _echo(number: int, kind: int) -> bytes:
    packet = struct.pack("!BBHHH", kind, 0, 0, number, 1)
    total = sum(struct.unpack("!4H", packet))  # of ICMPv6 the kernel makes the checksum
    return struct.pack("!BBHHH", kind, 0, ~(total + (total >> 16)) & 0xFFFF, number, 1)


def _answer(sock: Any, probe: Probe, number: int) -> str:
    if probe.protocol == "tcp":
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return "open" if error == 0 else os.strerror(error)
    try:
        data = sock.recv(256)
    except OSError as error:
        return os.strerror(error.errno or 0)
    if probe.protocol == "udp":
        return "open" if data == b"probe" else repr(data)
    kind, code, _, echoed, _ = struct.unpack("!BBHHH", data[:8] if ":" in probe.address else data[20:28])
    return "open" if (kind, code, echoed) in ((0, 0, number), (129, 0, number)) else ""


class Echoes:
    """Answers on every probed port at these addresses: takes TCP connections, sends UDP datagrams back."""

    def __init__(self, places: dict[str, tuple[str, ...]], *, taken: tuple[int, ...]) -> None:
        self._selector = selectors.DefaultSelector()
        self._stop = threading.Event()
        self._sockets = [
            sock
            for namespace, addresses in places.items()
            for sock in in_namespace(namespace, lambda a=addresses: list(_listeners(a, taken)))
        ]
        for sock in self._sockets:
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(0.1):
                sock: Any = key.fileobj
                if sock.type == socket.SOCK_STREAM:
                    sock.accept()[0].close()
                else:
                    data, peer = sock.recvfrom(256)
                    sock.sendto(data, peer)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for sock in self._sockets:
            sock.close()


def _listeners(addresses: tuple[str, ...], taken: tuple[int, ...]) -> Iterator[socket.socket]:
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for port in TCP_PORTS:
            if port not in taken:
                yield socket.create_server((address, port), family=family, backlog=64)
        for port in UDP_PORTS:
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.bind((address, port))
            yield sock


# The lab


@dataclass
class Place:
    """Someone on the internet: name, namespace, IPv4 and IPv6 address."""

    name: str
    namespace: str | None
    addresses: tuple[str, str]


@dataclass
class Truth:
    client: Client
    servers: dict[str, BoundServer]
    places: dict[str, Place]
    packets: Packets
    guarded: Firewalls

    def attach(self, name: str, firewalls: Firewalls) -> list[BoundFirewall]:
        """Through the API; returns when the rules are in force."""
        server = FirewallResource(type="server", server=self.servers[name])
        made = []
        for number, rules in enumerate(firewalls):
            answer = self.client.firewalls.create(f"{name}-{number}", rules, resources=[server])
            for action in answer.actions or []:
                action.wait_until_finished()
            made.append(answer.firewall)
        return made

    def detach(self, name: str, firewalls: list[BoundFirewall]) -> None:
        server = FirewallResource(type="server", server=self.servers[name])
        for firewall in firewalls:
            for action in firewall.remove_from_resources([server]):
                action.wait_until_finished()
            firewall.delete()

    def probes_of(self, name: str) -> list[Probe]:
        """Everything that is asked of one server: who gets in, and where it gets out to."""
        questions = [("tcp", port) for port in TCP_PORTS] + [("udp", port) for port in UDP_PORTS] + [("icmp", None)]
        pairs = [(vantage, name) for vantage in ("operator", "stranger", "other")]
        pairs += [(name, destination) for destination in ("stranger", "other", "guarded")]
        return [
            Probe(source, target, address, protocol, port)
            for source, target in pairs
            for address in self.places[target].addresses
            for protocol, port in questions
        ]

    def expected(self, probe: Probe, firewalls: dict[str, Firewalls]) -> str:
        """What the model says."""
        family = 1 if ":" in probe.address else 0
        here = self.places[probe.source].addresses[family]
        what = (probe.protocol, probe.port)
        leaves = passes(firewalls.get(probe.source, []), "out", probe.address, *what)
        enters = passes(firewalls.get(probe.target, []), "in", here, *what)
        return "open" if leaves and enters else "silent"

    def controls(self, record: LabRecord) -> list[Probe]:
        """Where every place must always get to."""
        outside = record.net.outside(3)
        return [
            Probe(vantage, "control", address, "tcp", CONTROL_PORT)
            for vantage in ("operator", "stranger", "other")
            for address in outside
        ]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabRecord]:
    root = tmp_path_factory.mktemp("truth")
    (root / "fleet").mkdir()
    shutil.copy(ROOT / "fleet" / "clawdlets.json", root / "fleet")
    (root / ".cache").symlink_to(ROOT / ".cache")
    layout = Layout(root)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, limits[1]), limits[1]))
    try:
        control.up(layout, os.environ, tailnet="stand-in")
        found = read_record(layout.lab)
        assert found is not None
        yield found
    finally:
        control.down(layout, os.environ)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture(scope="module")
def truth(record: LabRecord) -> Iterator[Truth]:
    token = (record.lab_dir / "token").read_text().strip()
    client = Client(token, api_endpoint=record.endpoint, poll_interval=0.03)
    servers = {}
    for name in ["other", "guarded", *(f"t{n}" for n in range(TARGETS))]:
        made = client.servers.create(name, ServerType("cx23"), Image(name="debian-12"))
        servers[name] = made.server
        made.action.wait_until_finished()
    net = record.net
    places = {
        "operator": Place("operator", None, net.operator),
        "stranger": Place("stranger", net.stranger_ns, net.outside(2)),
    }
    for name, server in servers.items():
        public = server.public_net
        ipv6 = public.ipv6.ip.replace("::/64", "::1")
        places[name] = Place(name, net.machine_ns(server.id), (public.ipv4.ip, ipv6))
    # The guests' own sshd has port 22.
    guests = {place.namespace: place.addresses for place in places.values() if place.name in servers}
    with ExitStack() as stack:
        for found, taken in ((guests, (22,)), ({net.stranger_ns: net.outside(2)}, ())):
            echoes = Echoes({str(name): addresses for name, addresses in found.items()}, taken=taken)
            stack.callback(echoes.close)
        packets = Packets({name: place.namespace for name, place in places.items()})
        made_truth = Truth(
            client, servers, places, packets, [[rule("in", "tcp", "80", *WORLD), rule("in", "icmp", None, "::/0")]]
        )
        made_truth.attach("guarded", made_truth.guarded)
        yield made_truth


WORLD = ("0.0.0.0/0", "::/0")


def rule(direction: str, protocol: str, port: str | None, *networks: str) -> FirewallRule:
    side = "source_ips" if direction == "in" else "destination_ips"
    return FirewallRule(direction=direction, protocol=protocol, port=port, **{side: list(networks)})


def named_sets(places: dict[str, Place]) -> dict[str, Firewalls]:
    def of(name: str) -> tuple[str, str]:
        ipv4, ipv6 = places[name].addresses
        return f"{ipv4}/32", f"{ipv6}/128"

    operator, stranger, other = of("operator"), of("stranger"), of("other")
    crowd = [f"203.0.113.{n}/32" for n in range(98)]
    ssh = rule("in", "tcp", "22", *operator)
    return {
        "none attached": [],
        "attached without rules": [[]],
        "ssh from the operator": [[ssh]],
        "ssh from the operator, v4 only": [[rule("in", "tcp", "22", operator[0])]],
        "ssh from the operator, v6 only": [[rule("in", "tcp", "22", operator[1])]],
        "a tcp range": [[rule("in", "tcp", "1024-5000", *WORLD)]],
        "a tcp port, v4 world only": [[rule("in", "tcp", "80", "0.0.0.0/0")]],
        "a tcp port, v6 world only": [[rule("in", "tcp", "80", "::/0")]],
        "the last tcp port": [[rule("in", "tcp", "65535", *WORLD)]],
        "a udp port": [[rule("in", "udp", "41641", *WORLD)]],
        "a udp range from the stranger": [[rule("in", "udp", "1024-5000", *stranger)]],
        "icmp": [[rule("in", "icmp", None, *WORLD)]],
        "icmp, v4 only": [[rule("in", "icmp", None, "0.0.0.0/0")]],
        "icmp from the operator, v6 only": [[rule("in", "icmp", None, operator[1])]],
        "from another server": [[rule("in", "tcp", "443", *other), rule("in", "udp", "53", other[0])]],
        "esp and gre": [[rule("in", "esp", None, *WORLD), rule("in", "gre", None, *WORLD)]],
        "overlapping networks": [[rule("in", "tcp", "22", "198.18.0.0/15", "198.18.0.0/24", operator[0], "::/0", "2001:2::/48")]],
        "one of a hundred": [[rule("in", "tcp", "443", *crowd, *stranger)]],
        "several firewalls": [[ssh], [rule("in", "udp", "5000-5001", *WORLD)], [rule("in", "icmp", None, *stranger)]],
        "one of two is empty": [[], [ssh]],
        "out to a tcp port": [[ssh, rule("out", "tcp", "443", *WORLD)]],
        "out, v4 only": [[rule("out", "tcp", "80", "0.0.0.0/0")]],
        "out by udp to one place": [[rule("out", "udp", "53", *stranger)]],
        "out by icmp, v6 only": [[rule("out", "icmp", None, "::/0")]],
        "out in one, in in the other": [[rule("in", "tcp", "1024-5000", *WORLD)], [rule("out", "tcp", "5000", *other)]],
    }  # fmt: skip


def drawn_sets(places: dict[str, Place], count: int) -> dict[str, Firewalls]:
    """Rule sets by lot, always the same ones."""
    lots = random.Random(SEED)  # noqa: S311 - rule sets, not secrets
    networks = ["0.0.0.0/0", "::/0", "198.18.0.0/24", "198.18.0.0/15", "2001:2::/64", "192.0.2.0/24", "2001:db8::/32"]
    for name in ("operator", "stranger", "other", "guarded"):
        ipv4, ipv6 = places[name].addresses
        networks += [f"{ipv4}/32", f"{ipv6}/128", str(ipaddress.ip_network(f"{ipv6}/64", strict=False))]
    ports = ["22", "53", "80", "443", "1023-1024", "1024-5000", "5001", "1-65535", "41641", "2-64", "65535"]

    def draw() -> FirewallRule:
        protocol = lots.choice(["tcp", "tcp", "udp", "udp", "icmp", "icmp", "esp"])
        port = lots.choice(ports) if protocol in ("tcp", "udp") else None
        return rule(lots.choice(["in", "in", "out"]), protocol, port, *lots.sample(networks, lots.randint(1, 4)))

    return {
        f"drawn {n}": [[draw() for _ in range(lots.randint(0, 4))] for _ in range(lots.randint(1, 3))]
        for n in range(count)
    }


def eventually_open(truth: Truth) -> None:
    """Before any firewall: every guest answers everything, and every neighbour is known."""
    deadline = time.monotonic() + 30
    probes = [probe for name in truth.servers if name.startswith("t") for probe in truth.probes_of(name)]
    while True:
        answers = truth.packets.ask(probes)
        left = [p for p in probes if answers[p] != truth.expected(p, {"guarded": truth.guarded})]
        if not left:
            return
        assert time.monotonic() < deadline, (len(left), left[:5])


def test_packets_do_what_the_documentation_says(
    truth: Truth, record: LabRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    eventually_open(truth)
    sets = {**named_sets(truth.places), **drawn_sets(truth.places, 39)}
    waiting = list(sets.items())
    targets = [name for name in truth.servers if name.startswith("t")]
    differences: list[str] = []
    seen: Counter[tuple[str, ...]] = Counter()
    with ThreadPoolExecutor(TARGETS) as pool:
        while waiting:
            batch = {name: waiting.pop(0) for name in targets[: len(waiting)]}
            wanted = [found for _, found in batch.values()]
            in_force = list(pool.map(truth.attach, batch, wanted))
            firewalls = {"guarded": truth.guarded, **dict(zip(batch, wanted, strict=True))}
            probes = [probe for name in batch for probe in truth.probes_of(name)]
            controls = truth.controls(record)
            answers = truth.packets.ask([*probes, *controls])
            assert {answers[probe] for probe in controls} == {"open"}, "a vantage point cannot look"
            for probe in probes:
                expected = truth.expected(probe, firewalls)
                direction = "out" if probe.source in batch else "in"
                seen[direction, probe.protocol, "6" if ":" in probe.address else "4", expected] += 1
                if answers[probe] != expected:
                    which = batch[probe.source if direction == "out" else probe.target][0]
                    differences.append(f"{which}: {json.dumps(probe)} expected {expected}, measured {answers[probe]}")
            list(pool.map(truth.detach, batch, in_force))
    with capsys.disabled():
        sys.stdout.write(
            f"\nfirewall truth table: {len(sets)} rule sets, {seen.total()} cells"
            f" ({sum(n for key, n in seen.items() if key[3] == 'open')} open), {truth.packets.sent} probes in all,"
            f" {len(differences)} differences\n"
        )
    assert differences == []
    # A table of one answer would prove nothing: each part of it holds both.
    for part in itertools.product(("in", "out"), ("tcp", "udp", "icmp"), "46"):
        counts = [seen[(*part, answer)] for answer in ("open", "silent")]
        assert min(counts) >= MIN_OF_EACH, (part, counts)


def test_flows_go_on_when_the_rules_that_let_them_begin_are_replaced(truth: Truth) -> None:
    everything = [rule("in", protocol, "1-65535", *WORLD) for protocol in ("tcp", "udp")]
    (firewall,) = truth.attach("t0", [everything])
    place = truth.places["t0"]
    assert place.namespace is not None
    try:
        with ExitStack() as stack:
            flows = []
            for vantage, address in itertools.product(("operator", "stranger", "other"), place.addresses):
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                listener = in_namespace(
                    place.namespace, lambda a=address, f=family: socket.create_server((a, 0), family=f)
                )
                stack.enter_context(listener)
                port = listener.getsockname()[1]
                namespace = truth.places[vantage].namespace

                def connect(a: str = address, p: int = port) -> socket.socket:
                    return socket.create_connection((a, p), timeout=5)

                client = stack.enter_context(connect() if namespace is None else in_namespace(namespace, connect))
                server, _ = listener.accept()
                server.settimeout(5)
                flows.append((client, stack.enter_context(server)))
            for action in firewall.set_rules([]):
                action.wait_until_finished()
            new = [p for p in truth.probes_of("t0") if p.target == "t0"]
            assert set(truth.packets.ask(new).values()) == {"silent"}
            for client, server in flows:
                client.sendall(b"question")
                assert server.recv(16) == b"question"
                server.sendall(b"answer")
                assert client.recv(16) == b"answer"
    finally:
        truth.detach("t0", [firewall])


def test_the_resolvers_are_reached_whatever_the_rules_say(truth: Truth) -> None:
    (firewall,) = truth.attach("t1", [[rule("out", "tcp", "9", "192.0.2.1/32")]])
    try:
        asked = [
            Probe("t1", "resolver", address, protocol, port)
            for address in ("185.12.64.1", "185.12.64.2", "2a01:4ff:ff00::add:1", "2a01:4ff:ff00::add:2")
            for protocol, port in (("udp", 53), ("tcp", 53), ("tcp", 54))
        ]
        answers = truth.packets.ask(asked)
        # Nothing listens there: a refusal is proof that the question arrived.
        assert {(p.port, answers[p]) for p in asked} == {(53, "Connection refused"), (54, "silent")}
    finally:
        truth.detach("t1", [firewall])
