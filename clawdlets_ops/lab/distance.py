"""Links that are slow, lossy or dead: nftables outside the servers, and a relay that holds frames back.

netem is not needed, which not every kernel has. Loss and closed ports are rules of their own tables in the lab's two
routing namespaces. Latency is a rule at the egress of a server's leg (nftables ``netdev``, Linux 5.16) that hands the
frame to a TAP device; a thread of the lab's process holds it for the time asked for and sends it on, marked, so that the
rule lets it pass. Only the way to the server is long, so a round trip takes exactly that much more.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from clawdlets_ops.lab.addressing import NODES, Addressing
from clawdlets_ops.lab.faults import ANY, Fault
from clawdlets_ops.lab.network import Network, in_namespace
from clawdlets_ops.process import Runner

log = logging.getLogger(__name__)

KINDS: Final = ("latency", "loss", "never-boots", "sshd-late")
MARK: Final = 0x6661756C  # on what the relay has held back already

_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_FRAME_BYTES = 65_600
_QUEUE_FRAMES = 20_000  # more is lost, as on a real link
_AFTER_THE_CLOUD_FIREWALL = 10
_NAME_BYTES = 15


@dataclass(frozen=True)
class Side:
    """One of the two networks: its namespace, nftables' family for it, and the letter of its servers' legs."""

    namespace: str
    family: str
    letter: str
    sources: Mapping[str, tuple[str, str]]  # vantage point → its addresses

    def concerns(self, fault: Fault) -> bool:
        return fault.vantage in (ANY, *self.sources)


@dataclass(frozen=True)
class Delay:
    """Frames for this leg, from these addresses (none: from everywhere), go through this TAP device."""

    tap: str
    leg: str
    milliseconds: float
    sources: tuple[str, ...]


def sides(net: Addressing, *, nodes: bool = False) -> tuple[Side, ...]:
    """The internet and the tailnet. A real tailnet (``nodes``) has no links of its own: what comes from the operator's node
    or the member's crosses the internet, encrypted."""
    internet = {"operator": net.operator, "stranger": net.outside(2)}
    tailnet = {"operator-tailnet": net.tailnet(1), "member": net.tailnet(2)}
    if nodes:
        over = {name: net.outside(last) for name, last in zip(tailnet, NODES.values(), strict=True)}
        return (Side(net.internet_ns, "inet", "s", {**internet, **over}),)
    return Side(net.internet_ns, "inet", "s", internet), Side(net.tailnet_ns, "bridge", "t", tailnet)


def render_rules(side: Side, rules: Iterable[tuple[Fault, str]]) -> str:
    """The table ``faults`` of one side; ``rules`` are faults with the leg each is about."""
    towards: list[str] = []
    away: list[str] = []
    for fault, leg in rules:
        addresses = side.sources.get(fault.vantage, ())
        sources = [f"{_family(address)} saddr {address} " for address in addresses] or [""]
        targets = [f"{_family(address)} daddr {address} " for address in addresses] or [""]
        match fault.kind:
            case "loss":
                share = max(1, round(fault.percent * 1000))
                verdict = f"numgen random mod 100000 < {share} drop" if share < 100_000 else "drop"
            case "sshd-late":
                # A bridge has no reject where it forwards.
                verdict = "tcp dport 22 " + ("reject with tcp reset" if side.family == "inet" else "drop")
                targets = []
            case _:
                verdict = "drop"
        towards += [f'oifname "{leg}" {source}{verdict}' for source in sources]
        away += [f'iifname "{leg}" {target}{verdict}' for target in targets]
    table = f"{side.family} faults"
    chains = {"forward": [*towards, *away], "input": away, "output": towards}
    body = [
        line
        for hook, lines in chains.items()
        for line in (
            f"  chain {hook} {{",
            f"    type filter hook {hook} priority {_AFTER_THE_CLOUD_FIREWALL}; policy accept;",
            *(f"    {line}" for line in lines),
            "  }",
        )
    ]
    return "\n".join([f"table {table}", f"delete table {table}", f"table {table} {{", *body, "}", ""])


def render_delays(delays: Sequence[Delay]) -> str:
    """The table ``netdev faults`` of one side: a chain per leg, in whose order the first match counts."""
    body = []
    for leg in sorted({delay.leg for delay in delays}):
        body += [
            f"  chain to_{leg} {{",
            f'    type filter hook egress device "{leg}" priority 0; policy accept;',
            f"    meta mark {MARK:#x} accept",
        ]
        for delay in (delay for delay in delays if delay.leg == leg):
            matches = [f"{_family(address)} saddr {address}" for address in delay.sources]
            body += [f'    {match} fwd to "{delay.tap}"' for match in matches or ["meta protocol { ip, ip6 }"]]
        body += ["  }"]
    table = "netdev faults"
    return "\n".join([f"table {table}", f"delete table {table}", f"table {table} {{", *body, "}", ""])


def _family(address: str) -> str:
    return "ip6" if ":" in address else "ip"


class Relay:
    """Holds every frame that comes out of a TAP device back for a while, and then sends it on over a leg."""

    def __init__(self, namespace: str, delay: Delay) -> None:
        self._delay = delay
        self._tap, self._out = in_namespace(namespace, self._open)
        self._wake, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._run, name=f"late-{delay.leg}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; what is held back is lost, and the device is gone."""
        os.close(self._stop)
        self._thread.join()
        os.close(self._wake)
        os.close(self._tap)
        self._out.close()

    def _open(self) -> tuple[int, socket.socket]:
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", self._delay.tap.encode(), _IFF_TAP | _IFF_NO_PI))
            out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            out.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
            out.bind((self._delay.leg, 0))
        except BaseException:
            os.close(tap)
            raise
        return tap, out

    def _run(self) -> None:
        held: deque[tuple[float, bytes]] = deque()
        watch = select.poll()
        watch.register(self._tap, select.POLLIN)
        watch.register(self._wake, select.POLLIN)
        while True:
            wait_ms = None if not held else max(0.0, (held[0][0] - time.monotonic()) * 1000)
            ready = dict(watch.poll(wait_ms))
            if self._wake in ready:
                return
            if self._tap in ready:
                with suppress(BlockingIOError):
                    while len(held) < _QUEUE_FRAMES:
                        frame = os.read(self._tap, _FRAME_BYTES)
                        held.append((time.monotonic() + self._delay.milliseconds / 1000, frame))
            while held and held[0][0] <= time.monotonic():
                try:
                    self._out.send(held.popleft()[1])
                except OSError as error:  # the server went, or its leg is busy: a lost packet
                    log.debug("%s: %s", self._delay.leg, error)


class FaultyNetwork(Network):
    """The lab's network with link faults, which follow a server through its reboots."""

    def __init__(self, net: Addressing, runner: Runner, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(net, runner)
        self._clock = clock
        self._fault_lock = threading.RLock()
        self._faults: dict[str, Fault] = {}
        self._names: dict[int, str] = {}
        self._born: dict[int, float] = {}
        self._legs: set[str] = set()
        self._relays: dict[str, list[Relay]] = {}
        self._loaded = False
        self._timer: threading.Timer | None = None

    def named(self, server_id: int, name: str) -> None:
        """Tell which host a server is; faults are by host."""
        with self._fault_lock:
            self._names[server_id] = name

    def add_fault(self, ident: str, fault: Fault) -> None:
        """Put it into force, for servers that are there and that come; CommandError, and then it is not in force."""
        with self._fault_lock:
            self._faults[ident] = fault
            try:
                self._enforce()
            except BaseException:
                del self._faults[ident]
                self._enforce()
                raise

    def clear_fault(self, ident: str) -> None:
        with self._fault_lock:
            if self._faults.pop(ident, None) is not None:
                self._enforce()

    def attach(self, server_id: int, ipv4: str, ipv6_network: str) -> None:
        super().attach(server_id, ipv4, ipv6_network)
        with self._fault_lock:
            self._born[server_id] = self._clock()
            self._legs.add(f"s{server_id}")
            self._enforce()

    def join(self, server_id: int) -> tuple[str, str]:
        addresses = super().join(server_id)
        with self._fault_lock:
            if f"t{server_id}" not in self._legs:
                self._legs.add(f"t{server_id}")
                self._enforce()
        return addresses

    def detach(self, server_id: int) -> None:
        with self._fault_lock:
            if legs := self._legs & {f"s{server_id}", f"t{server_id}"}:
                self._legs -= legs
                self._enforce()
        super().detach(server_id)

    def close_faults(self) -> None:
        """End all relays and rules."""
        with self._fault_lock:
            self._faults.clear()
            self._enforce()

    # How it is done

    def _enforce(self) -> None:
        """Make rules and relays what the faults and the legs ask for."""
        if not self._faults and not self._loaded:
            return
        self._loaded = True
        self._arm()
        for side in sides(self.net, nodes=self.nodes):
            chosen = self._chosen(side)
            delays = [
                Delay(f"{ident}{leg}"[:_NAME_BYTES], leg, fault.milliseconds, side.sources.get(fault.vantage, ()))
                for ident, fault, leg in chosen
                if fault.kind == "latency"
            ]
            # Rules first go, then the devices that they name.
            self._nft(side.namespace, render_delays(()))
            for relay in self._relays.pop(side.namespace, ()):
                relay.close()
            self._relays[side.namespace] = started = []
            for delay in delays:
                started.append(Relay(side.namespace, delay))
                self._ip("-n", side.namespace, "link", "set", delay.tap, "up").check()
            self._nft(side.namespace, render_delays(delays))
            rules = [(fault, leg) for _, fault, leg in chosen if fault.kind != "latency"]
            self._nft(side.namespace, render_rules(side, rules))
        self._loaded = bool(self._faults)

    def _chosen(self, side: Side) -> list[tuple[str, Fault, str]]:
        """Each fault of this side with each leg that it is about, now."""
        found = []
        for ident, fault in self._faults.items():
            for leg in sorted(leg for leg in self._legs if leg[0] == side.letter):
                server_id = int(leg[1:])
                late = fault.kind == "sshd-late" and self._opens(server_id, fault) <= self._clock()
                if side.concerns(fault) and fault.concerns(self._names.get(server_id, "")) and not late:
                    found.append((ident, fault, leg))
        return found

    def _opens(self, server_id: int, fault: Fault) -> float:
        return self._born.get(server_id, 0.0) + fault.seconds

    def _arm(self) -> None:
        """Come back when the next closed port is due to open."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock()
        late = [fault for fault in self._faults.values() if fault.kind == "sshd-late"]
        due = [self._opens(server_id, fault) - now for fault in late for server_id in self._born]
        if waits := [wait for wait in due if wait > 0]:
            self._timer = threading.Timer(min(waits) + 0.01, self._later)
            self._timer.daemon = True
            self._timer.start()

    def _later(self) -> None:
        with self._fault_lock:
            self._enforce()
