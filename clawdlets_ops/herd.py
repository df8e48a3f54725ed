"""The ``cattle`` section of ``fleet/clawdlets.json``: throw-away servers that bots may ask for, and the caps on them.

Whoever is not named gets nothing: a bot without an entry in ``bots`` may ask for no server, a persona gets the variables
and secrets of its own entry only. Where several values are allowed (images, server types, locations) the first is the
default. Durations are a number and a unit: ``90s``, ``5m``, ``2h``, ``1d``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from clawdlets_ops.declared import HostName, LabelKey, LabelValue, Model, ResourceName, SecretName

# At most 24 characters: a server's name is cattle-<persona>-<12 of the job's id>, and 63 are the limit.
PersonaName = Annotated[str, StringConstraints(pattern=r"^[a-z](?:[a-z0-9-]{0,22}[a-z0-9])?$")]
BotName = Annotated[str, StringConstraints(pattern=r"^[a-z](?:[a-z0-9_-]{0,29}[a-z0-9])?$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Z_][A-Z0-9_]{0,62}$")]
Duration = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,5}[smhd]$")]
Image = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")]
"""A system image's name, or a snapshot's id."""
Tag = Annotated[str, StringConstraints(pattern=r"^tag:[a-z][a-z0-9-]{0,48}$")]
Word = Annotated[str, StringConstraints(pattern=r"^[!-~][ -~]{0,254}$")]
PlainText = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x08\x0a-\x1f\x7f]{0,1024}$")]

SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MIN_TTL_S: Final = 60
MAX_TTL_S: Final = 7 * 86400
MAX_KEY_TTL_S: Final = 3600
MIN_TOKEN_TTL_S: Final = 30
MAX_TOKEN_TTL_S: Final = 3600

OWN_LABELS: Final = (
    "managed-by",
    "clawdlets-host",
    "clawdlets-cattle",
    "clawdlets-orchestrator",
    "clawdlets-job",
    "clawdlets-order",
    "clawdlets-persona",
    "clawdlets-bot",
    "clawdlets-ttl",
    "clawdlets-deadline",
)
"""Set by us on every cattle server; ``cattle.labels`` may add others, never these."""

OPERATORS_OWN: Final = frozenset(
    {
        "admin_password_hash",
        "breakglass_password_hash",
        "hcloud_token",
        "tailscale_auth_key",
        "tailscale_cattle_auth_key",
        "tailscale_oauth_client_secret",
        "headscale_api_key",
        "clf_database_url",
    }
)
"""Secrets that no persona may be given: whoever has one of these is no guest any more."""

# The loader and the shells read these before the task does: a variable that changes which program runs is no setting.
_NOT_VARIABLES = re.compile(
    r"^(?:LD_.*|PATH|HOME|USER|SHELL|IFS|ENV|BASH_ENV|PYTHON(?:PATH|HOME|STARTUP)|CLAWDLETS_.*)$"
)

RULES: Final = {
    "ownLabels": OWN_LABELS,
    "operatorsOwn": sorted(OPERATORS_OWN),
    "notVariables": _NOT_VARIABLES.pattern,
    "seconds": SECONDS,
    "minTtl": MIN_TTL_S,
    "maxTtl": MAX_TTL_S,
    "maxKeyTtl": MAX_KEY_TTL_S,
    "minTokenTtl": MIN_TOKEN_TTL_S,
    "maxTokenTtl": MAX_TOKEN_TTL_S,
}
"""What the validators below go by, for whoever validates in another language (``x-rules`` of the JSON Schema)."""


def seconds(duration: str) -> int:
    """A declared duration in seconds; ValueError when it is none."""
    if not re.fullmatch(r"[1-9][0-9]{0,5}[smhd]", duration):
        raise ValueError(f"{duration!r} is not a duration such as 90s, 5m, 2h or 1d")
    return int(duration[:-1]) * SECONDS[duration[-1]]


class Persona(Model):
    """What a task runs as. Its files are those in ``fleet/personas/<name>/``, and are public.

    ``command`` runs in the folder of these files as an unprivileged user, with the task on standard input; what it prints
    is the result. ``variables`` are public settings; ``secrets`` maps a variable to the secret of the orchestrator's host
    that fills it. All of them have to be there, but of each group in ``anyOf`` one is enough.
    """

    command: Annotated[tuple[Word, ...], Field(min_length=1, max_length=16)] = ("./run",)
    variables: dict[Variable, PlainText] = Field(default_factory=dict)
    secrets: dict[Variable, SecretName] = Field(default_factory=dict)
    any_of: tuple[Annotated[tuple[Variable, ...], Field(min_length=2)], ...] = ()

    @model_validator(mode="after")
    def _sound(self) -> Persona:
        for name in sorted({*self.variables, *self.secrets}):
            if _NOT_VARIABLES.fullmatch(name):
                raise ValueError(f"{name} is set on the machine, and is not for a persona to declare")
        if both := sorted(self.variables.keys() & self.secrets.keys()):
            raise ValueError(f"{both[0]} is both in variables and in secrets")
        for name, secret in self.secrets.items():
            if secret in OPERATORS_OWN:
                raise ValueError(f"secrets.{name}: {secret} never leaves the host")
        for group in self.any_of:
            for name in group:
                if name not in self.secrets:
                    raise ValueError(f"anyOf names {name}, which is not in secrets")
        return self


class BotLimits(Model):
    """What one bot may ask for. ``personas`` are those it may use; the others narrow what holds for all."""

    personas: Annotated[tuple[PersonaName, ...], Field(min_length=1)]
    max_instances: Annotated[int, Field(ge=1, le=1000)] | None = None
    max_ttl: Duration | None = None
    images: tuple[Image, ...] | None = None
    server_types: tuple[ResourceName, ...] | None = None
    locations: tuple[ResourceName, ...] | None = None


class CattleTailnet(Model):
    """How cattle gets onto the tailnet. ``minted``: a key for each machine, ephemeral, tagged, for one use, for ``keyTtl``,
    from Tailscale's API with the secret ``tailscale_oauth_client_secret``. ``headscale``: the same from a headscale at
    ``apiEndpoint`` for ``headscaleUser``, with the secret ``headscale_api_key``. ``static``: the one key in ``tailscale_cattle_auth_key``, which
    every machine holds; it is to be replaced every ``rotateAfterDays``."""

    key: Literal["minted", "headscale", "static"] = "minted"
    headscale_user: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9@._-]{0,62}$")] = "clawdlets"
    tag: Tag = "tag:clawdlets-cattle"
    key_ttl: Duration = "10m"
    rotate_after_days: Annotated[int, Field(ge=1, le=90)] = 30
    api_endpoint: Annotated[str, StringConstraints(pattern=r"^https?://[A-Za-z0-9.\[\]:-]+(?:/[A-Za-z0-9/_.-]*)?$")] = (
        "https://api.tailscale.com"
    )

    @field_validator("key_ttl")
    @classmethod
    def _short(cls, value: str) -> str:
        if not MIN_TTL_S <= seconds(value) <= MAX_KEY_TTL_S:
            raise ValueError("a key for one machine lives 1m to 1h")
        return value


class Cattle(Model):
    """Throw-away servers, their caps, and who may have which. ``host`` is the one whose orchestrator orders them.

    ``egress``: ``smtp-only`` drops outbound mail as on the hosts; ``tailnet-only`` lets a task reach nothing but the
    tailnet; ``none`` is no rule. Every one of them keeps a task from the metadata service.
    """

    enabled: bool = False
    host: HostName | None = None
    images: Annotated[tuple[Image, ...], Field(min_length=1)] = ("debian-12",)
    server_types: Annotated[tuple[ResourceName, ...], Field(min_length=1)] = ("cx23",)
    locations: Annotated[tuple[ResourceName, ...], Field(min_length=1)] = ("nbg1",)
    max_instances: Annotated[int, Field(ge=1, le=1000)] = 10
    max_per_bot: Annotated[int, Field(ge=1, le=1000)] = 3
    default_ttl: Duration = "1h"
    max_ttl: Duration = "8h"
    token_ttl: Duration = "10m"  # noqa: S105 - how long one lives, not one
    max_result_bytes: Annotated[int, Field(ge=1024, le=1048576)] = 65536
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    tailnet: CattleTailnet = Field(default_factory=CattleTailnet)
    egress: Literal["smtp-only", "tailnet-only", "none"] = "smtp-only"
    bots: dict[BotName, BotLimits] = Field(default_factory=dict)
    personas: dict[PersonaName, Persona] = Field(default_factory=dict)

    @field_validator("labels")
    @classmethod
    def _not_our_own(cls, values: dict[str, str]) -> dict[str, str]:
        for name in values:
            if name in OWN_LABELS or "hetzner.cloud/" in name:
                raise ValueError(f"the label {name} is set by clawdlets or Hetzner, and is not to be declared")
        return values

    @field_validator("token_ttl")
    @classmethod
    def _token_is_short(cls, value: str) -> str:
        if not MIN_TOKEN_TTL_S <= seconds(value) <= MAX_TOKEN_TTL_S:
            raise ValueError("a bootstrap token lives 30s to 1h")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Cattle:
        if not MIN_TTL_S <= seconds(self.default_ttl) <= seconds(self.max_ttl) <= MAX_TTL_S:
            raise ValueError(
                f"defaultTtl {self.default_ttl} and maxTtl {self.max_ttl}: 1m to maxTtl, which is 7d at most"
            )
        if self.max_per_bot > self.max_instances:
            raise ValueError("maxPerBot is more than maxInstances")
        for name, bot in self.bots.items():
            for persona in bot.personas:
                if persona not in self.personas:
                    raise ValueError(f"bots.{name}.personas: there is no persona {persona}")
            if bot.max_ttl is not None and not MIN_TTL_S <= seconds(bot.max_ttl) <= seconds(self.max_ttl):
                raise ValueError(f"bots.{name}.maxTtl: 1m to maxTtl ({self.max_ttl})")
            if bot.max_instances is not None and bot.max_instances > self.max_instances:
                raise ValueError(f"bots.{name}.maxInstances is more than maxInstances")
            for key, wanted, all_of_them in (
                ("images", bot.images, self.images),
                ("serverTypes", bot.server_types, self.server_types),
                ("locations", bot.locations, self.locations),
            ):
                if wanted is not None and (not wanted or not set(wanted) <= set(all_of_them)):
                    raise ValueError(f"bots.{name}.{key}: one or more of {', '.join(all_of_them)}")
        if self.enabled and self.host is None:
            raise ValueError("host is not named: the one whose orchestrator orders the servers")
        return self


def secrets_of(cattle: Cattle) -> Mapping[str, tuple[str, ...]]:
    """Every secret that some persona may be given, with the personas that it is for."""
    found: dict[str, list[str]] = {}
    for name, persona in cattle.personas.items():
        for secret in sorted(set(persona.secrets.values())):
            found.setdefault(secret, []).append(name)
    return {secret: tuple(names) for secret, names in sorted(found.items())}
