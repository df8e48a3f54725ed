"""What we read from the Hetzner Cloud API, through python-hcloud, as plain values. Changes go through OpenTofu, with one
exception that OpenTofu has no word for: rebuilding a named server from its image.

The only importer of ``hcloud``. Facts about the API: docs.hetzner.cloud.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import hcloud
import requests
from hcloud.actions import ActionException

from clawdlets_ops.errors import CloudError, SettingsError
from clawdlets_ops.sensitive import Redactor, Secret

REQUEST_TIMEOUT_S = 30.0
REBUILD_POLLS = 600
MANAGED_BY = "managed-by"
MANAGER = "clawdlets"
HOST_LABEL = "clawdlets-host"

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class FirewallRule:
    """One rule of a cloud firewall. ``networks`` are canonical CIDRs: sources of an ``in`` rule, targets of an ``out`` one."""

    direction: str
    protocol: str
    port: str | None
    networks: tuple[str, ...]
    description: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.direction} {self.protocol}{'/' + self.port if self.port else ''} {', '.join(self.networks)}"

    def covers_tcp(self, port: int) -> bool:
        """Whether this rule lets tcp/``port`` in from anywhere at all."""
        if self.direction != "in" or self.protocol != "tcp":
            return False
        if self.port in (None, "any"):
            return True
        first, _, last = str(self.port).partition("-")
        return int(first) <= port <= int(last or first)


@dataclass(frozen=True)
class Firewall:
    """A cloud firewall as the API shows it."""

    id: int
    name: str
    labels: Mapping[str, str]
    rules: tuple[FirewallRule, ...]

    @property
    def ssh_is_open(self) -> bool:
        """Whether tcp/22 is let in from anywhere at all."""
        return any(rule.covers_tcp(22) for rule in self.rules)


@dataclass(frozen=True)
class Server:
    """A server as the API shows it. ``firewalls`` maps each attached firewall's id to its status (applied, pending)."""

    id: int
    name: str
    status: str
    labels: Mapping[str, str]
    server_type: str
    location: str
    ipv4: str | None
    ipv6: str | None
    firewalls: Mapping[int, str]

    @property
    def addresses(self) -> dict[int, str]:
        """The public addresses by family."""
        pairs = ((4, self.ipv4), (6, self.ipv6))
        return {family: address for family, address in pairs if address}


@dataclass(frozen=True)
class SshKey:
    """An SSH public key stored in the project."""

    id: int
    name: str
    labels: Mapping[str, str]
    fingerprint: str


class Cloud(Protocol):
    """The reads that the stages need. ``HetznerCloud`` asks the API, ``testing.FakeCloud`` a dictionary."""

    def server(self, name: str) -> Server | None:
        """The server called ``name``, or None."""
        ...

    def firewall(self, name: str) -> Firewall | None:
        """The firewall called ``name``, or None."""
        ...

    def ssh_key(self, fingerprint: str) -> SshKey | None:
        """The key with this MD5 fingerprint, or None."""
        ...

    def rebuild(self, server: Server, image: str) -> None:
        """Overwrite the server's disk with ``image`` and wait until that is done."""
        ...


def fingerprint_md5(public_key: str) -> str:
    """The fingerprint that the API knows a key by: MD5 over the key's body, colon-separated hex."""
    body = base64.b64decode(public_key.split()[1])
    digest = hashlib.md5(body, usedforsecurity=False).hexdigest()
    return ":".join(digest[i : i + 2] for i in range(0, len(digest), 2))


def is_ours(labels: Mapping[str, str], host: str) -> bool:
    """Whether labels say that this project made the thing for ``host``."""
    return labels.get(MANAGED_BY) == MANAGER and labels.get(HOST_LABEL) == host


class HetznerCloud:
    """Reads through python-hcloud. CloudError for every refusal, with the API's code and correlation id."""

    def __init__(self, token: Secret, endpoint: str, *, poll_interval_s: float = 1.0) -> None:
        self._endpoint = endpoint
        self._redactor = Redactor([token])
        self._client = hcloud.Client(
            token=token.reveal(),
            api_endpoint=endpoint,
            application_name="clawdlets-ops",
            poll_interval=poll_interval_s,
            timeout=REQUEST_TIMEOUT_S,
        )

    def server(self, name: str) -> Server | None:
        """The server called ``name``, or None; one request."""
        found = self._ask(f"server {name}", lambda: self._client.servers.get_by_name(name))
        return _server(found) if found else None

    def firewall(self, name: str) -> Firewall | None:
        """The firewall called ``name``, or None; one request."""
        found = self._ask(f"firewall {name}", lambda: self._client.firewalls.get_by_name(name))
        return _firewall(found) if found else None

    def ssh_key(self, fingerprint: str) -> SshKey | None:
        """The key with this MD5 fingerprint, or None; one request."""
        found = self._ask("SSH key", lambda: self._client.ssh_keys.get_by_fingerprint(fingerprint))
        if not found:
            return None
        return SshKey(int(found.id or 0), found.name or "", dict(found.labels or {}), found.fingerprint or "")

    def rebuild(self, server: Server, image: str) -> None:
        """Overwrite the server's disk with ``image`` (its name) and wait until that is done; never tried twice here."""

        def call() -> None:
            bound = self._client.servers.get_by_id(server.id)
            architecture = bound.server_type.architecture if bound.server_type else None
            found = self._client.images.get_by_name_and_architecture(image, architecture or "x86")
            if found is None:
                raise CloudError(f"there is no image {image!r}", where=f"hosts.{server.name}.hetzner.image")
            bound.rebuild(image=found).action.wait_until_finished(max_retries=REBUILD_POLLS)

        try:
            self._ask(f"server {server.name} (rebuild)", call)
        except ActionException as error:
            raise CloudError(f"the rebuild did not succeed: {error}", where=server.name) from error

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except hcloud.APIException as error:
            if error.code in ("unauthorized", 401):
                raise SettingsError(
                    "the API does not accept this token",
                    where="HCLOUD_TOKEN",
                    fix="make a token with read and write permission in the project's console, and put it in place",
                ) from None
            code = f"{error.code}, correlation id {error.correlation_id}" if error.correlation_id else str(error.code)
            raise CloudError(f"{what}: {error.message} ({code})", where=self._endpoint) from error
        except requests.exceptions.RequestException as error:
            raise CloudError(
                f"{what}: the API does not answer ({self._redactor.scrub(type(error).__name__)})",
                where=self._endpoint,
                fix="check the network; with the lab: is it up (clawdlets lab status)?",
            ) from None


def _server(found: Any) -> Server:
    public = found.public_net
    ipv6 = None
    if public and public.ipv6:
        ipv6 = str(ipaddress.ip_network(public.ipv6.ip)[1])  # Hetzner gives a /64; the machine takes the first address
    return Server(
        id=found.id,
        name=found.name,
        status=found.status,
        labels=dict(found.labels or {}),
        server_type=found.server_type.name,
        location=found.location.name if getattr(found, "location", None) else "",
        ipv4=public.ipv4.ip if public and public.ipv4 else None,
        ipv6=ipv6,
        firewalls={part.firewall.id: part.status for part in (public.firewalls if public else ())},
    )


def _firewall(found: Any) -> Firewall:
    return Firewall(
        id=found.id,
        name=found.name,
        labels=dict(found.labels or {}),
        rules=tuple(
            sorted(
                FirewallRule(
                    direction=rule.direction,
                    protocol=rule.protocol,
                    port=rule.port,
                    networks=tuple(sorted(rule.source_ips if rule.direction == "in" else rule.destination_ips)),
                    description=rule.description or "",
                )
                for rule in found.rules or ()
            )
        ),
    )
