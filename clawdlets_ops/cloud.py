"""What there is in a Hetzner Cloud project, as plain values, and the labels by which we know our own.

Field names and limits: docs.hetzner.cloud.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

MANAGED_BY = "managed-by"
MANAGER = "clawdlets"
HOST_LABEL = "clawdlets-host"
OURS = f"{MANAGED_BY}={MANAGER}"
WINDOW_LABEL = "clawdlets-window"
"""On a firewall with a breakglass window: when it ends (UTC), in the form of ``WINDOW_TIME``."""
WINDOW_TIME = "%Y%m%dT%H%M%SZ"
WINDOW_RULE = "breakglass window"
"""How the description of such a window's rule begins (``lockdown/window.py``)."""


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

    def without_window(self) -> Firewall:
        """As if no breakglass window had been opened in it."""
        if WINDOW_LABEL not in self.labels:
            return self
        labels = {name: value for name, value in self.labels.items() if name != WINDOW_LABEL}
        rules = tuple(rule for rule in self.rules if not rule.description.startswith(WINDOW_RULE))
        return replace(self, labels=labels, rules=rules)


@dataclass(frozen=True)
class Server:
    """A server as the API shows it. ``firewalls`` maps each attached firewall's id to its status (applied, pending),
    ``primary_ips`` the family (ipv4, ipv6) to the id of its address. ``protected``: it can be neither deleted nor rebuilt.
    ``created`` is RFC 3339, by the API's clock."""

    id: int
    name: str
    status: str
    labels: Mapping[str, str]
    server_type: str
    location: str
    ipv4: str | None
    ipv6: str | None
    firewalls: Mapping[int, str]
    protected: bool = False
    volumes: frozenset[int] = frozenset()
    primary_ips: Mapping[str, int] = field(default_factory=dict)
    placement_group: int | None = None
    image: str | None = None
    created: str = ""
    private_addresses: tuple[str, ...] = ()

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
    public_key: str = ""


@dataclass(frozen=True)
class Volume:
    """A volume; ``server`` is the id of the one that it is attached to, if any."""

    id: int
    name: str
    labels: Mapping[str, str]
    size_gb: int
    server: int | None
    protected: bool = False


@dataclass(frozen=True)
class PrimaryIp:
    """A public address; ``family`` is ipv4 or ipv6. With ``auto_delete`` it goes when its server goes."""

    id: int
    name: str
    labels: Mapping[str, str]
    family: str
    server: int | None
    auto_delete: bool = False
    protected: bool = False


@dataclass(frozen=True)
class PlacementGroup:
    """A placement group and the ids of the servers in it."""

    id: int
    name: str
    labels: Mapping[str, str]
    servers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Offer:
    """A server type: where it can be ordered now."""

    name: str
    architecture: str
    available_in: frozenset[str]


@dataclass(frozen=True)
class Labelled:
    """Something in the project that has given labels."""

    kind: str
    id: int
    name: str

    def __str__(self) -> str:
        called = {"primary_ips": "primary IP", "ssh_keys": "SSH key"}
        return f"{called.get(self.kind, self.kind.removesuffix('s').replace('_', ' '))} {self.name} (id {self.id})"


@dataclass(frozen=True)
class Budget:
    """What the API said last of the project's request budget: ``resets_at`` (Unix seconds) is when it is whole again."""

    limit: int
    remaining: int
    resets_at: int


def fingerprint_md5(public_key: str) -> str:
    """The fingerprint that the API knows a key by: MD5 over the key's body, colon-separated hex."""
    body = base64.b64decode(public_key.split()[1])
    digest = hashlib.md5(body, usedforsecurity=False).hexdigest()
    return ":".join(digest[i : i + 2] for i in range(0, len(digest), 2))


def is_ours(labels: Mapping[str, str], host: str) -> bool:
    """Whether labels say that this project made the thing for ``host``."""
    return labels.get(MANAGED_BY) == MANAGER and labels.get(HOST_LABEL) == host
