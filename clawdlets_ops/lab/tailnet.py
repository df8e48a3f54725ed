"""The lab's tailnet: the real programs (``headscale.py``), or a stand-in: a plain second network, a join protocol, and a
status in Tailscale's form.

The stand-in has no encryption, no coordination, no ACLs; what it does have is what the workflow depends on: a machine is
on the tailnet only after it has shown a valid auth key, its ``tailscale0`` is gone after a reboot until it joins again, and
whoever is on the tailnet reaches it there and not through the internet.

On the stand-in a guest joins with ``POST http://198.19.N.4:8080/join`` and ``{"authKey": …, "hostname": …}``. Who it is, is told by the
source address of its connection, not by what it says. 200 ``{"addresses": […]}``, else ``{"error": …}``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import socket
import socketserver
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Protocol

from clawdlets_ops.errors import LabError
from clawdlets_ops.files import read_private, write_atomic
from clawdlets_ops.lab.addressing import CONTROL_PORT, JOIN_PORT
from clawdlets_ops.lab.headscale import STAND_IN, Programs, RealTailnet
from clawdlets_ops.lab.network import Network, in_namespace
from clawdlets_ops.lab.registry import LabRecord
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Runner
from clawdlets_ops.sensitive import Secret

log = logging.getLogger(__name__)

BANNER: Final = b"clawdlets lab control\r\n"
DOMAIN: Final = "lab.internal"
TAGS: Final = ("tag:clawdlets",)

_BODY_LIMIT_BYTES = 4096
_CLIENT_TIMEOUT_S = 5.0
_HOSTNAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class _Node:
    hostname: str
    addresses: tuple[str, str]
    online: bool


class Tailnet(Protocol):
    """What the lab asks of its tailnet, whichever it is."""

    def left(self, server_id: int) -> None:
        """The machine is down, or reboots."""

    def addresses(self, machines: Mapping[int, str]) -> dict[int, tuple[str, ...]]:
        """By id, the tailnet addresses of those of these machines (id to host name) that are on it now; CommandError."""

    def status(self, known: frozenset[int]) -> dict[str, Any]:
        """What the operator's ``tailscale status --json`` says, of these servers; CommandError."""

    def account(self) -> dict[str, Any]:
        """``{kind, works, evidence}``: which of the two it is, whether all of it runs, and what shows that."""

    def close(self) -> None:
        """End what runs for it."""


def bring_up(record: LabRecord, network: Network, runner: Runner) -> Tailnet:
    """The tailnet that the lab on record has, on its networks, and the auth key of its machines in
    ``<lab>/tailnet_auth_key`` (0600); LabError, CommandError."""
    key_file = record.lab_dir / "tailnet_auth_key"
    if record.tailnet == STAND_IN:
        return StandInTailnet(network, Secret(read_private(key_file).strip()))
    programs = Programs.find(Layout(record.root).cache / "tools")
    if programs is None:
        raise LabError("headscale and tailscaled are gone", where=str(record.root), fix="make tailnet")
    real = RealTailnet(record.net, programs, record.lab_dir / "tailnet", runner, path=record.path)
    real.start()
    try:
        if not key_file.exists():
            write_atomic(key_file, real.mint().reveal() + "\n")
    except BaseException:
        real.close()
        raise
    return real


class StandInTailnet:
    """Who is on the tailnet. A machine that went down stays known, offline, until it is forgotten."""

    def __init__(self, network: Network, auth_key: Secret) -> None:
        self._network = network
        self._auth_key = auth_key
        self._lock = threading.Lock()
        self._nodes: dict[int, _Node] = {}

    def join(self, source: str, auth_key: str, hostname: str) -> tuple[str, str]:
        """Let the machine with this public address in; its tailnet addresses. PermissionError, ValueError, LabError."""
        server_id = self._network.server_at(source)
        if server_id is None or not hmac.compare_digest(auth_key.encode(), self._auth_key.reveal().encode()):
            raise PermissionError("invalid key")
        if not _HOSTNAME.fullmatch(hostname):
            raise ValueError("the host name is none")
        addresses = self._network.join(server_id)
        with self._lock:
            self._nodes[server_id] = _Node(hostname, addresses, True)
        log.info("%s joined the tailnet as %s", hostname, addresses[0])
        return addresses

    def left(self, server_id: int) -> None:
        """The machine is down, or reboots."""
        with self._lock:
            if node := self._nodes.get(server_id):
                self._nodes[server_id] = replace(node, online=False)

    def addresses(self, machines: Mapping[int, str]) -> dict[int, tuple[str, ...]]:
        """By id, the tailnet addresses of those of these machines that are on it now."""
        with self._lock:
            online = {server_id: node.addresses for server_id, node in self._nodes.items() if node.online}
        return {server_id: online[server_id] for server_id in machines if server_id in online}

    def status(self, known: frozenset[int]) -> dict[str, Any]:
        """The part of ``tailscale status --json`` that we read. Servers that are not ``known`` any more are forgotten.

        KeyExpiry is null: the keys of tagged nodes do not expire (tailscale.com/kb/1068).
        """
        net = self._network.net
        with self._lock:
            self._nodes = {server_id: node for server_id, node in self._nodes.items() if server_id in known}
            nodes = {f"server-{server_id}": node for server_id, node in sorted(self._nodes.items())}
        nodes["member"] = _Node("member", net.tailnet(2), True)
        names: set[str] = set()
        peers = {}
        for identity, node in nodes.items():
            peers[_node_key(f"{net.prefix}-{identity}")] = _peer(node, _unique(node.hostname, names))
        return {
            "Version": "lab stand-in",
            "BackendState": "Running",
            "Self": _peer(_Node("operator", net.tailnet(1), True), _unique("operator", names)),
            "MagicDNSSuffix": DOMAIN,
            "Peer": peers,
        }

    def account(self) -> dict[str, Any]:
        """``{kind, works, evidence}``."""
        with self._lock:
            online = sum(node.online for node in self._nodes.values())
        said = f"a second network without encryption; {online} of {len(self._nodes)} machines are on it"
        return {"kind": STAND_IN, "works": True, "evidence": said}

    def close(self) -> None:
        """Nothing runs for it."""


def _peer(node: _Node, name: str) -> dict[str, Any]:
    return {
        "HostName": node.hostname,
        "DNSName": f"{name}.{DOMAIN}.",
        "TailscaleIPs": list(node.addresses),
        "Online": node.online,
        "KeyExpiry": None,
        "Tags": list(TAGS),
    }


def _node_key(identity: str) -> str:
    return f"nodekey:{hashlib.sha256(identity.encode()).hexdigest()}"


def _unique(hostname: str, taken: set[str]) -> str:
    """Tailscale gives the second machine of a name a number."""
    name, number = hostname, 0
    while name in taken:
        number += 1
        name = f"{hostname}-{number}"
    taken.add(name)
    return name


class _ControlListener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class's signature
        log.debug("a probe of the control went away")


class _ControlListener6(_ControlListener):
    address_family = socket.AF_INET6


class _Greeter(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(BANNER)


class _JoinServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], tailnet: StandInTailnet) -> None:
        self.tailnet = tailnet
        super().__init__(address, _JoinHandler)

    def server_bind(self) -> None:
        # Without HTTPServer's reverse look-up of its own name: there is no resolver in that namespace.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class _JoinHandler(BaseHTTPRequestHandler):
    timeout = _CLIENT_TIMEOUT_S
    server: _JoinServer

    def do_POST(self) -> None:
        if self.path != "/join":
            self._answer(404, {"error": "not found"})
            return
        try:
            body = self._body()
            addresses = self.server.tailnet.join(self.client_address[0], body["authKey"], body["hostname"])
        except PermissionError as error:
            self._answer(403, {"error": str(error)})
        except (ValueError, KeyError, TypeError, AttributeError):
            self._answer(400, {"error": "expected a JSON object with authKey and hostname"})
        except LabError as error:
            log.warning("a join failed: %s", error)
            self._answer(503, {"error": "try again"})
        else:
            self._answer(200, {"addresses": list(addresses)})

    def _body(self) -> Mapping[str, Any]:
        length = int(self.headers.get("Content-Length", "0"))
        if not 0 < length <= _BODY_LIMIT_BYTES:
            raise ValueError("size")
        body = json.loads(self.rfile.read(length))
        if not isinstance(body, dict):
            raise ValueError("shape")
        return body

    def _answer(self, status: int, payload: object) -> None:
        content = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("join server: " + format, *args)


class Listeners:
    """The sockets that the lab opens in its namespaces: the probes' positive controls, and the stand-in's join server.

    They belong to the process that started them, and end with it. The controls of a real tailnet are at its nodes' own
    addresses, which have to be there already.
    """

    def __init__(self, network: Network, tailnet: Tailnet) -> None:
        net = network.net
        self._servers: list[socketserver.BaseServer] = []
        places = [(net.internet_ns, net.outside(3))]
        if isinstance(tailnet, StandInTailnet):
            places += [(net.tailnet_ns, net.tailnet(3))]
            self._servers.append(
                in_namespace(net.internet_ns, lambda: _JoinServer((net.outside(4)[0], JOIN_PORT), tailnet))
            )
        else:
            places += [(net.tailnet_ns, net.tailnet(1)), (net.member_ns, net.tailnet(2))]
        for namespace, addresses in places:
            self._servers += in_namespace(namespace, lambda found=addresses: _controls(*found))  # type: ignore[misc]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, name=type(server).__name__, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        for server in self._servers:
            server.shutdown()
            server.server_close()


def _controls(ipv4: str, ipv6: str) -> list[socketserver.BaseServer]:
    return [_ControlListener((ipv4, CONTROL_PORT), _Greeter), _ControlListener6((ipv6, CONTROL_PORT), _Greeter)]
