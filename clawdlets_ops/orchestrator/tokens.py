"""One-time tokens: 32 random bytes, of which the store keeps only a hash.

A token belongs to a job and to the machine made for it: the name that the machine will have on the tailnet is known when the token
is issued, the server's id is bound to it when the API has answered, the address at the first use. Redeeming is one UPDATE, so
of many at once one wins. For GRACE_S afterwards the same fetch (same address, same fetch id) may be repeated, because its answer
may have been lost; without a fetch id there is no grace.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from clawdlets_ops.orchestrator.jobs import Clock
from clawdlets_ops.orchestrator.store import Store, tokens
from clawdlets_ops.sensitive import Secret

T = TypeVar("T")

TTL_MIN_S = 30
TTL_MAX_S = 3600
TTL_DEFAULT_S = 600
RESULT_TTL_MAX_S = 8 * 24 * 3600
GRACE_S = 60
SKEW_MS = 60_000
"""A token that was issued further in the future than this is from before the clock was set back: refused."""
FORM = re.compile(r"[0-9a-f]{64}")


class Purpose(StrEnum):
    """What a token is good for, and nothing else."""

    ENVIRONMENT = "environment"
    RESULT = "result"


@dataclass(frozen=True)
class Grant:
    """What a token stands for. ``env_keys`` are variables that may be vended, ``public_env`` those that are no secret."""

    job_id: str
    requester: str
    node: str
    purpose: Purpose
    env_keys: tuple[str, ...] = ()
    public_env: Mapping[str, str] = field(default_factory=dict)
    server_id: int | None = None
    address: str | None = None


@dataclass(frozen=True)
class Asker:
    """Who shows a token: their address on the tailnet, the name the tailnet knows it by (None: not asked), the server id
    they say they have, and the number of their fetch: the same for every retry of one fetch, new for another."""

    address: str
    node: str | None
    server_id: int | None
    fetch_id: str = ""


class Refused(Exception):
    """The token is not good; ``reason`` is for the log: malformed, unknown, expired, used, other-purpose, other-machine,
    not-bound. The asker learns only that it is not good."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def clamp_ttl_s(ttl: object, purpose: Purpose = Purpose.ENVIRONMENT) -> int:
    """``ttl`` in seconds, brought into 30 s..1 h; TTL_DEFAULT_S for what is no number at all.

    Milliseconds given by mistake end at 1 h, never at more. A result's token is no secret's key, is never in user data, and
    has to outlive the task: at most RESULT_TTL_MAX_S.
    """
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or (isinstance(ttl, float) and math.isnan(ttl)):
        return TTL_DEFAULT_S
    return int(max(TTL_MIN_S, min(ttl, TTL_MAX_S if purpose is Purpose.ENVIRONMENT else RESULT_TTL_MAX_S)))


class Tokens:
    """Tokens in ``store``, by ``clock``."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def issue(self, grant: Grant, *, ttl_s: object = TTL_DEFAULT_S) -> Secret:
        """A new token for ``grant``, durable. Unused older ones of the same job and purpose are void from now on."""
        now = self._clock()
        token = Secret(secrets.token_hex(32), f"{grant.purpose} token")
        row = {
            "token_hash": _hash(token.reveal()),
            "purpose": grant.purpose.value,
            "job_id": grant.job_id,
            "requester": grant.requester,
            "node": grant.node,
            "server_id": grant.server_id,
            "address": grant.address,
            "created_at": now,
            "expires_at": now + clamp_ttl_s(ttl_s, grant.purpose) * 1000,
            "spec_json": json.dumps({"envKeys": sorted(set(grant.env_keys)), "publicEnv": dict(grant.public_env)}),
        }

        def operation(connection: Connection) -> None:
            connection.execute(
                tokens.delete().where(
                    tokens.c.job_id == grant.job_id,
                    tokens.c.purpose == grant.purpose.value,
                    tokens.c.used_at.is_(None),
                )
            )
            connection.execute(tokens.insert(), row)

        self._store.write(operation)
        return token

    def bind(self, job_id: str, *, server_id: int, address: str | None = None) -> int:
        """All tokens of a job belong to this server from now on; how many they are. Before that none can be redeemed."""
        values: dict[str, Any] = {"server_id": server_id}
        if address is not None:
            values["address"] = address
        statement = tokens.update().where(tokens.c.job_id == job_id).values(**values)
        return int(self._store.write(lambda connection: connection.execute(statement).rowcount))

    def revoke(self, job_id: str) -> int:
        """Forget all tokens of a job; how many there were."""
        statement = tokens.delete().where(tokens.c.job_id == job_id)
        return int(self._store.write(lambda connection: connection.execute(statement).rowcount))

    def redeem(self, token: str, purpose: Purpose, asker: Asker, prepare: Callable[[Grant], T]) -> T:
        """What ``prepare`` makes of the token's grant; the token is used up only if that succeeds. Refused otherwise.

        ``prepare`` runs before the token is touched: what it raises leaves the token good.
        """
        if not FORM.fullmatch(token):
            raise Refused("malformed")
        digest = _hash(token)
        now = self._clock()
        row = self._store.read(
            lambda connection: (
                connection.execute(sa.select(tokens).where(tokens.c.token_hash == digest)).mappings().first()
            )
        )
        if row is None or not hmac.compare_digest(row["token_hash"], digest):
            raise Refused("unknown")
        if row["purpose"] != purpose.value:
            raise Refused("other-purpose")
        if now >= row["expires_at"] or row["created_at"] > now + SKEW_MS:
            raise Refused("expired")
        if row["server_id"] is None:
            raise Refused("not-bound")
        if (
            row["server_id"] != asker.server_id
            or (row["address"] is not None and row["address"] != asker.address)
            or (asker.node is not None and row["node"] != asker.node)
        ):
            raise Refused("other-machine")
        if row["used_at"] is not None and not _within_grace(row, asker, now):
            raise Refused("used")
        spec = json.loads(row["spec_json"])
        prepared = prepare(
            Grant(
                job_id=row["job_id"],
                requester=row["requester"],
                node=row["node"],
                purpose=purpose,
                env_keys=tuple(spec["envKeys"]),
                public_env=spec["publicEnv"],
                server_id=row["server_id"],
                address=row["address"],
            )
        )
        if not self._use(digest, asker, now):
            raise Refused("used")
        return prepared

    def prune(self) -> int:
        """Forget tokens that expired more than an hour ago; how many."""
        statement = tokens.delete().where(tokens.c.expires_at < self._clock() - TTL_MAX_S * 1000)
        return int(self._store.write(lambda connection: connection.execute(statement).rowcount))

    def _use(self, digest: str, asker: Asker, now: int) -> bool:
        """One UPDATE takes the token, or finds that this same asker took it a moment ago."""
        take = (
            tokens.update()
            .where(
                tokens.c.token_hash == digest,
                tokens.c.used_at.is_(None),
                tokens.c.expires_at > now,
                tokens.c.server_id == asker.server_id,
            )
            .values(used_at=now, used_by=_fetch(asker), address=asker.address)
        )
        again = sa.select(tokens.c.used_at, tokens.c.used_by).where(tokens.c.token_hash == digest)

        def operation(connection: Connection) -> bool:
            if connection.execute(take).rowcount == 1:
                return True
            row = connection.execute(again).mappings().first()
            return row is not None and row["used_at"] is not None and _within_grace(row, asker, now)

        return self._store.write(operation)


def _within_grace(row: Mapping[Any, Any], asker: Asker, now: int) -> bool:
    if not asker.fetch_id or not 0 <= now - row["used_at"] <= GRACE_S * 1000:
        return False
    return hmac.compare_digest(row["used_by"], _fetch(asker))


def _fetch(asker: Asker) -> str:
    """What one fetch of one machine is recognised by; the fetch id itself is not stored."""
    return _hash(f"{asker.address} {asker.fetch_id}")


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
