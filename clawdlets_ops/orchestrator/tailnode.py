"""This host's own node on the tailnet: the address to listen on, and which machine an address belongs to.

tailscaled answers ``whois`` on its local socket (the LocalAPI that ``tailscale whois`` uses): the tailnet's own word for who is at
the other end, as WireGuard has authenticated it.
"""

from __future__ import annotations

import fcntl
import http.client
import ipaddress
import json
import socket
import struct
from collections.abc import Callable
from urllib.parse import quote

from clawdlets_ops.errors import OrchestratorError
from clawdlets_ops.orchestrator.unixhttp import TooLarge, ask

TAILNETS = (ipaddress.ip_network("100.64.0.0/10"), ipaddress.ip_network("fd7a:115c:a1e0::/48"))
"""Tailscale's ranges: tailscale.com/kb/1015."""
INTERFACE = "tailscale0"
TAILSCALED = "/run/tailscale/tailscaled.sock"
SIOCGIFADDR = 0x8915

NodeOf = Callable[[str, int], str | None]
"""The tailnet's name of the machine at an address and port. None: the tailnet is not asked. OrchestratorError: it is
asked, and does not answer."""


def listen_address(text: str) -> str:
    """``text`` as an address of the tailnet, or for ``auto`` this host's; OrchestratorError for a wildcard or any other."""
    if text == "auto":
        return own_address()
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise OrchestratorError(
            "is not an address", where="bootstrap.listen", fix="auto, or one of 100.64/10"
        ) from None
    if address.is_unspecified:
        raise OrchestratorError("is a wildcard: everybody could ask", where="bootstrap.listen", fix="auto")
    if not any(address in network for network in TAILNETS):
        raise OrchestratorError(f"{address} is not an address of the tailnet", where="bootstrap.listen", fix="auto")
    return str(address)


def own_address(interface: str = INTERFACE) -> str:
    """The IPv4 address of ``interface`` (netdevice(7)); OrchestratorError while it has none of the tailnet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            raise OrchestratorError(
                f"has no address ({error.strerror})", where=interface, fix="is tailscaled up?"
            ) from None
    return listen_address(socket.inet_ntoa(answer[20:24]))


def whois(address: str, port: int, *, path: str = TAILSCALED) -> str:
    """The host name of the node at ``address``, as tailscaled knows it; OrchestratorError when it does not answer or know."""
    where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    target = f"/localapi/v0/whois?addr={quote(where)}"
    try:
        answer = ask(path, "GET", target, timeout_s=5, host="local-tailscaled.sock")
        node = json.loads(answer.body)["Node"] if answer.status == 200 else None
        name = None if node is None else node["Hostinfo"].get("Hostname") or node["ComputedName"]
    except (OSError, http.client.HTTPException, TooLarge, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OrchestratorError(f"tailscaled does not say who {address} is ({type(error).__name__})") from None
    if not isinstance(name, str) or not name:
        raise OrchestratorError(f"tailscaled does not know {address} (status {answer.status})")
    return name
