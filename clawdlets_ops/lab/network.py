"""Makes the networks of ``addressing.py`` real with ``ip`` and ``nft``, and work inside their namespaces possible.

Nothing outside the lab's own namespaces changes but the operator's two legs with their addresses and routes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from clawdlets_ops.errors import LabError
from clawdlets_ops.lab.addressing import (
    Addressing,
    Batch,
    plan_attach,
    plan_join,
    plan_nodes,
    plan_second_network,
    plan_up,
)
from clawdlets_ops.lab.backend import Rule
from clawdlets_ops.lab.packet_filter import render_cloud, render_operator, render_tailnet
from clawdlets_ops.process import Command, Result, Runner

NETNS_DIR: Final = Path("/run/netns")

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_TIMEOUT_S = 20.0
_QUIET = {  # every address is there at once, and only those that we give
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/default/disable_ipv6": "0",
    "net/ipv6/conf/all/accept_ra": "0",
    "net/ipv6/conf/default/accept_ra": "0",
    "net/ipv6/conf/default/accept_dad": "0",
}
# Whoever asked for a machine before it joined must not wait a second to ask again.
_RETRANS_MS = "100"
_FAMILIES = ("net/ipv4", "net/ipv6")
_ROUTER = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
}

T = TypeVar("T")


class Network:
    """The networks of one lab; its methods may be called from any thread."""

    def __init__(self, net: Addressing, runner: Runner, *, cut_established: bool = False) -> None:
        self.net = net
        self.cut_established = cut_established
        self.nodes = False
        self._runner = runner
        self._lock = threading.RLock()
        self._addresses: dict[int, tuple[str, str]] = {}
        self._tailnet_keys: dict[int, int] = {}
        self._joined: set[int] = set()

    def up(self, *, nodes: bool = False) -> None:
        """Make everything but the servers; CommandError. ``nodes``: with places for the nodes of a real tailnet instead
        of the second network that stands in for one."""
        net, self.nodes = self.net, nodes
        for namespace in (net.internet_ns, net.stranger_ns, net.tailnet_ns, net.member_ns):
            self._add_namespace(namespace)
        in_namespace(net.internet_ns, lambda: _sysctl(_ROUTER))
        self._apply(plan_up(net)[:1])
        for leg in net.operator_legs:
            _sysctl({f"net/ipv6/conf/{leg}/disable_ipv6": "0", f"net/ipv6/conf/{leg}/accept_ra": "0"})
        self.filter({})
        self._apply(plan_up(net)[1:])
        if nodes:
            in_namespace(net.tailnet_ns, lambda: _sysctl(_ROUTER))
            self._nft(net.tailnet_ns, render_operator())
            self._apply(plan_nodes(net))
            return
        self._apply(plan_second_network(net))
        # After the bridge: loaded before there is one, the chain sees no packet (measured, Linux 6.18, nft 1.0.6).
        self._nft(net.tailnet_ns, render_tailnet())
        _sysctl({f"{family}/neigh/{net.operator_legs[1]}/retrans_time_ms": _RETRANS_MS for family in _FAMILIES})
        in_namespace(
            net.member_ns,
            lambda: _sysctl({f"{family}/neigh/tailscale0/retrans_time_ms": _RETRANS_MS for family in _FAMILIES}),
        )

    def filter(self, edges: Mapping[int, tuple[Rule, ...] | None]) -> None:
        """Put the cloud firewall of all servers into force, in one transaction.

        With ``cut_established``, which may be set at any time and counts from the next call, flows that the new rules do
        not let begin end.
        """
        self._nft(self.net.internet_ns, render_cloud(edges, cut_established=self.cut_established))

    def attach(self, server_id: int, ipv4: str, ipv6_network: str) -> None:
        """A fresh namespace for the server, with its internet leg; "" for an address that it has not. What an earlier boot
        left is removed first."""
        with self._lock:
            self.detach(server_id)
            self._add_namespace(self.net.machine_ns(server_id))
            self._apply(plan_attach(self.net, server_id, ipv4, ipv6_network))
            self._addresses[server_id] = ipv4, ipv6_network

    def detach(self, server_id: int) -> None:
        """Remove the server's namespace and both legs; nothing to do is fine."""
        with self._lock:
            self._addresses.pop(server_id, None)
            self._joined.discard(server_id)
            self._delete_link(self.net.internet_ns, f"s{server_id}")
            self._delete_link(self.net.tailnet_ns, f"t{server_id}")
            self._delete_namespace(self.net.machine_ns(server_id))

    def forget(self, server_id: int) -> None:
        """The server is gone for good: what was its own on the tailnet is free."""
        with self._lock:
            self._tailnet_keys.pop(server_id, None)

    def public(self, server_id: int) -> tuple[str, ...]:
        """The public addresses, IPv4 first, of a server that is attached; none of another."""
        with self._lock:
            found = self._addresses.get(server_id, ())
        return tuple(address.replace("::/64", "::1") for address in found if address)

    def server_at(self, address: str) -> int | None:
        """The attached server with this public address."""
        with self._lock:
            attached = list(self._addresses)
        return next((server_id for server_id in attached if address in self.public(server_id)), None)

    def join(self, server_id: int) -> tuple[str, str]:
        """Give the server its ``tailscale0``, unless it has it; its tailnet addresses. LabError when it is not there."""
        with self._lock:
            if server_id not in self._addresses:
                raise LabError("is not running", where=f"server {server_id}")
            key = self._tailnet_keys.get(server_id)
            if key is None:
                key = self.net.tailnet_key(self.public(server_id), self._tailnet_keys.values())
                self._tailnet_keys[server_id] = key
            if server_id not in self._joined:
                self._apply(plan_join(self.net, server_id, key))
                self._joined.add(server_id)
            return self.net.tailnet(key)

    def joined(self, server_id: int) -> tuple[str, str] | None:
        """The server's tailnet addresses while it is on the tailnet."""
        with self._lock:
            return self.net.tailnet(self._tailnet_keys[server_id]) if server_id in self._joined else None

    def sweep(self) -> None:
        """Remove all that a lab of this number has, whoever made it, and end what runs in its namespaces."""
        prefix = f"{self.net.prefix}-"
        namespaces = sorted(path.name for path in NETNS_DIR.glob(f"{prefix}*")) if NETNS_DIR.is_dir() else []
        for namespace in namespaces:
            found = self._ip("netns", "pids", namespace)
            for pid in found.stdout.split() if found.ok else ():
                _kill(int(pid))
        for leg in self.net.operator_legs:  # first: their routes must not outlive what they lead to
            self._delete_link(None, leg)
        for namespace in namespaces:
            self._delete_namespace(namespace)

    def leftovers(self) -> list[str]:
        """Names of this lab's number that exist now: namespaces and root links."""
        names = [path.name for path in NETNS_DIR.glob(f"{self.net.prefix}-*")]
        return names + [leg for leg in self.net.operator_legs if Path(f"/sys/class/net/{leg}").exists()]

    def _add_namespace(self, name: str) -> None:
        self._ip("netns", "add", name).check()
        in_namespace(name, lambda: _sysctl(_QUIET))

    def _delete_namespace(self, name: str) -> None:
        if (NETNS_DIR / name).exists():
            self._ip("netns", "delete", name).check()

    def _delete_link(self, namespace: str | None, name: str) -> None:
        """Ask first: to delete what is not there is an error like any other."""
        inside = ("-n", namespace) if namespace else ()
        if namespace and not (NETNS_DIR / namespace).exists():
            return
        if self._ip(*inside, "link", "show", name).ok:
            self._ip(*inside, "link", "delete", name).check()

    def _apply(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            inside = ("-n", batch.namespace) if batch.namespace else ()
            self._ip(*inside, "-batch", "-", stdin="\n".join(batch.lines) + "\n").check()

    def _ip(self, *words: str, stdin: str | None = None) -> Result:
        return self._runner.run(Command(["ip", *words], "set up the lab's network", stdin=stdin, timeout_s=_TIMEOUT_S))

    def _nft(self, namespace: str, text: str) -> None:
        argv = ["ip", "netns", "exec", namespace, "nft", "-f", "-"]
        self._runner.run(Command(argv, "load the cloud firewall", stdin=text, timeout_s=_TIMEOUT_S)).check()


def in_namespace(name: str, work: Callable[[], T]) -> T:
    """What ``work`` returns (or raises) when run in this network namespace.

    It runs in a thread of its own that ends with it; a socket opened there stays in that namespace for its life.
    Source: setns(2), network namespaces are a property of the thread.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            fd = os.open(NETNS_DIR / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(fd, _CLONE_NEWNET) != 0:
                    raise LabError(f"cannot be entered: {os.strerror(ctypes.get_errno())}", where=f"namespace {name}")
            finally:
                os.close(fd)
            results.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=enter, name=f"in-{name}")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _sysctl(settings: Mapping[str, str]) -> None:
    """Set those that this kernel has; of the namespace that the calling thread is in."""
    for name, value in settings.items():
        path = Path("/proc/sys") / name
        if path.exists():
            path.write_text(value)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
