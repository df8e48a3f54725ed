"""The metadata service at 169.254.169.254, as a server of Hetzner's sees it: no token, no header, any local process.

It listens in the lab's internet, one for all servers, and tells who asks by the address that the connection comes from.
Whoever is no running server gets 404 (the firewall keeps them out anyway). No firewall rule can block it. A server
without an IPv4 address does not reach it (chosen: no source says how Hetzner's does).

Paths and fields: Hetzner's server documentation, and what cloud-init's data source reads.
"""

from __future__ import annotations

import json
import logging
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import yaml

from clawdlets_ops.lab.addressing import METADATA, METADATA_PORT
from clawdlets_ops.lab.backend import MachineSpec
from clawdlets_ops.lab.network import Network, in_namespace

log = logging.getLogger(__name__)

METADATA_PATH: Final = "/hetzner/v1/metadata"
USERDATA_PATH: Final = "/hetzner/v1/userdata"

# A MachineSpec says nothing of the place.
_ZONE = "fsn1-dc14"
_REGION = "eu-central"
_CLIENT_TIMEOUT_S = 5.0


def answer(path: str, spec: MachineSpec) -> str | None:
    """The body for a GET of this path by this server; None where there is nothing."""
    path = path.partition("?")[0].rstrip("/")
    if path == USERDATA_PATH:
        return spec.user_data
    document = _document(spec)
    if path == METADATA_PATH:
        return yaml.safe_dump(document, sort_keys=False)
    leaves = {**document, "private-networks": []}
    folder, _, name = path.rpartition("/")
    if folder != METADATA_PATH or name not in leaves:
        return None
    value = leaves[name]
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _document(spec: MachineSpec) -> dict[str, Any]:
    ipv6 = spec.ipv6_network.replace("::/", "::1/")
    subnets: list[dict[str, Any]] = [{"ipv4": True, "type": "dhcp"}]
    if ipv6:
        subnets.append({"ipv6": True, "type": "static", "address": ipv6, "gateway": "fe80::1", "dns_nameservers": []})
    return {
        "availability-zone": _ZONE,
        "hostname": spec.name,
        "instance-id": spec.server_id,
        "local-ipv4": "",
        "public-ipv4": spec.ipv4,
        "region": _REGION,
        "public-keys": list(spec.authorized_keys),
        "network-config": {"version": 1, "config": [{"type": "physical", "name": "eth0", "subnets": subnets}]},
        "vendor_data": "",
    }


class MetadataService:
    """Serves until it is closed, or its process ends. ``spec_at`` knows the server at a public address.

    OSError, LabError when it cannot listen.
    """

    def __init__(self, network: Network, spec_at: Callable[[str], MachineSpec | None]) -> None:
        self._server = in_namespace(network.net.internet_ns, lambda: _Server(spec_at))
        self._thread = threading.Thread(target=self._server.serve_forever, name="metadata", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, spec_at: Callable[[str], MachineSpec | None]) -> None:
        self.spec_at = spec_at
        super().__init__((METADATA, METADATA_PORT), _Handler)

    def server_bind(self) -> None:
        # Without HTTPServer's reverse look-up of its own name: there is no resolver in that namespace.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = METADATA, METADATA_PORT

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class's signature
        log.debug("a client of the metadata service went away", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _CLIENT_TIMEOUT_S
    server: _Server

    def do_GET(self) -> None:
        spec = self.server.spec_at(self.client_address[0])
        body = None if spec is None else answer(self.path, spec)
        content = ("not found\n" if body is None else body).encode()
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("metadata: " + format, *args)
