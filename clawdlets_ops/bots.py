"""``hosts.<host>.egress`` and ``hosts.<host>.bots`` of the fleet file: who runs on a host, and what may be reached from it.

A bot ``maren`` is the user ``bot-maren`` and the confined unit ``clawdlets-bot-maren.service``. Three words say what may go
out, for a host as for a single bot:

* ``smtp-only`` — everything but TCP 25, 465, 587 and 2525;
* ``proxy-allowlist`` — bots reach loopback alone, and by way of the proxy there the allowed domains on ports 80 and 443;
  mail is dropped for the whole host, and nothing is forwarded for containers;
* ``none`` — nothing is held back.

In every mode the metadata service (169.254.169.254) answers root alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints, field_validator, model_validator

from clawdlets_ops.declared import Model

EgressMode = Literal["smtp-only", "proxy-allowlist", "none"]

# With "bot-" before it still a name of a user: 31 characters at most (useradd(8)).
BotName = Annotated[str, StringConstraints(pattern=r"^[a-z](?:[a-z0-9-]{0,24}[a-z0-9])?$")]
# As systemd reads a command: an absolute path, then words (systemd.service(5)). Printable ASCII, so one line.
ExecStart = Annotated[str, StringConstraints(pattern=r"^/[ -~]+$")]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Z_][A-Z0-9_]{0,62}$")]
VariableValue = Annotated[str, StringConstraints(pattern=r"^[ -~]*$", max_length=4096)]
# Labels of RFC 1035 in lower case, a last one that begins with a letter (so no address is one); a dot first: all below too.
DOMAIN = r"^\.?(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?$"
DOMAIN_MAX_LENGTH = 254  # 253 of the name (RFC 1035 in text) and the dot before it

PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
MAX_BOTS = 64


def check_domain(value: object) -> object:
    """``value`` when it is one entry of an allow list; ValueError that says what to write in its place."""
    if not isinstance(value, str):
        return value  # pydantic says what it wants
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", value) or "/" in value:
        raise ValueError(f"{value!r} is an address of a page; write only the name, without scheme and path")
    if value.startswith("["):
        raise ValueError(f"{value!r} is an IP address; only names are allowed, which the proxy resolves and checks")
    if re.search(r":\d*$", value) and value.count(":") == 1:
        raise ValueError(f"{value!r} has a port; the proxy lets 443 and 80 through and no other")
    if "*" in value:
        raise ValueError(f"{value!r} has a wildcard; write .example.org for example.org and all names below it")
    if not value.isascii():
        raise ValueError(f"{value!r} is not ASCII; write the name as it goes over the wire ({_wire_form(value)})")
    if value != value.lower():
        raise ValueError(f"{value!r} has capital letters; write {value.lower()!r}")
    if value.endswith("."):
        raise ValueError(f"{value!r} ends with a dot; write {value.rstrip('.')!r}")
    if ":" in value or re.fullmatch(r"[0-9.]+|(?:.*\.)?0x[0-9a-f]*", value):
        raise ValueError(f"{value!r} is an IP address; only names are allowed, which the proxy resolves and checks")
    if len(value) > DOMAIN_MAX_LENGTH or not re.fullmatch(DOMAIN, value):
        raise ValueError(f"{value!r} is not a domain name of at least two labels")
    return value


def _wire_form(value: str) -> str:
    try:
        return value.strip(".").encode("idna").decode()
    except UnicodeError:
        return "xn--…"


DomainName = Annotated[
    str, StringConstraints(pattern=DOMAIN, max_length=DOMAIN_MAX_LENGTH), BeforeValidator(check_domain)
]


def covers(entry: str, name: str) -> bool:
    """Whether the entry of an allow list lets ``name`` (lower case, no dot at the end) through: itself, or all below."""
    return name == entry.removeprefix(".") or (entry.startswith(".") and name.endswith(entry))


def no_entry_twice(entries: Iterable[str]) -> None:
    """ValueError when one entry says what another says already (squid refuses such a list)."""
    listed = tuple(entries)
    for position, entry in enumerate(listed):
        for other in (*listed[:position], *listed[position + 1 :]):
            if covers(other, entry.removeprefix(".")) and (not entry.startswith(".") or other.startswith(".")):
                raise ValueError(f"{entry!r} is covered by {other!r}; take one of them out")


class Egress(Model):
    """What may go out of the host. ``allowedDomains`` counts in mode proxy-allowlist; ``.example.org`` is example.org and
    every name below it, ``example.org`` that name alone."""

    mode: EgressMode = "smtp-only"
    allowed_domains: tuple[DomainName, ...] = ()

    @field_validator("allowed_domains")
    @classmethod
    def _each_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        no_entry_twice(values)
        return values

    @model_validator(mode="after")
    def _domains_where_used(self) -> Egress:
        if self.mode == "proxy-allowlist" and not self.allowed_domains:
            raise ValueError("egress.mode proxy-allowlist needs at least one entry in allowedDomains")
        return self


class BotEgress(Model):
    """What differs for one bot; what is not said here is as for its host. ``allowedDomains`` replaces the host's list."""

    mode: EgressMode | None = None
    allowed_domains: tuple[DomainName, ...] | None = None

    @field_validator("allowed_domains")
    @classmethod
    def _each_once(cls, values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        no_entry_twice(values or ())
        return values


class Limits(Model):
    """What a bot may use of its host. ``cpuQuotaPercent``: 100 is one processor; without it there is no limit."""

    memory_max_mb: Annotated[int, Field(ge=16, le=1 << 20)] = 1024
    tasks_max: Annotated[int, Field(ge=4, le=65536)] = 256
    cpu_quota_percent: Annotated[int, Field(ge=1, le=6400)] | None = None


class Bot(Model):
    """One bot. Without ``execStart`` the unit's command is left to your NixOS configuration (``ExecStart`` of the unit).

    ``secrets`` are the names of those it reads from ``/run/secrets``; they belong to its user. ``environment`` is public.
    """

    exec_start: ExecStart | None = None
    environment: dict[VariableName, VariableValue] = Field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    egress: BotEgress = Field(default_factory=BotEgress)
    limits: Limits = Field(default_factory=Limits)

    @field_validator("environment")
    @classmethod
    def _not_the_proxy(cls, values: dict[str, str]) -> dict[str, str]:
        for name in values:
            if name in PROXY_VARIABLES:
                raise ValueError(f"{name} is set from the egress policy; it is not to be declared")
        return values


Bots = Annotated[dict[BotName, Bot], Field(max_length=MAX_BOTS)]


def bot_user(bot: str) -> str:
    """The user (and group) that a bot runs as."""
    return f"bot-{bot}"


def bot_unit(bot: str) -> str:
    """The unit that runs a bot."""
    return f"clawdlets-bot-{bot}.service"
