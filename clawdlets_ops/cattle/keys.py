"""Where a machine's auth key for the tailnet comes from: minted for it alone, or the one that all have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from clawdlets_ops.errors import CattleError
from clawdlets_ops.sensitive import Secret

STATIC: Final = "tailscale_cattle_auth_key"
STATIC_WARNING: Final = (
    "STATIC AUTH KEY: every cattle machine joins the tailnet with the same key, which whoever reads the user data of one can "
    "use too; set cattle.tailnet.key to minted"
)


@dataclass(frozen=True)
class AuthKey:
    """A key to join with. ``warning``: what is wrong with it, for everybody to see."""

    secret: Secret
    key_id: str = ""
    warning: str = ""


class KeyDesk(Protocol):
    """Gives a machine its key."""

    def mint(self, name: str, *, ttl_s: int) -> AuthKey:
        """A key for the machine of this name; CattleError, UnreachableError."""
        ...

    def revoke(self, key_id: str) -> None:
        """Nobody joins with this key any more; CattleError, UnreachableError."""
        ...


class Mints(Protocol):
    """What a tailnet's API does (``tailscale_api``)."""

    def mint(self, description: str, *, tag: str, ttl_s: int) -> tuple[str, Secret]:
        """The id and the key: ephemeral, tagged, for one use, for ``ttl_s`` seconds."""
        ...

    def revoke(self, key_id: str) -> None:
        """The key is good for nothing any more."""
        ...


@dataclass(frozen=True)
class MintedKeys:
    """A key for each machine, from the tailnet's API."""

    api: Mints
    tag: str

    def mint(self, name: str, *, ttl_s: int) -> AuthKey:
        """Ephemeral, tagged, for one use, short."""
        key_id, secret = self.api.mint(name, tag=self.tag, ttl_s=ttl_s)
        return AuthKey(secret, key_id)

    def revoke(self, key_id: str) -> None:
        """What has joined with it stays."""
        self.api.revoke(key_id)


@dataclass(frozen=True)
class StaticKey:
    """The one key; each use of it is told."""

    read: Callable[[], Secret]

    def mint(self, name: str, *, ttl_s: int) -> AuthKey:
        """The same key as ever; ``ttl_s`` cannot be kept."""
        del name, ttl_s
        secret = self.read()
        if not secret:
            raise CattleError("is empty", where=STATIC)
        return AuthKey(secret, warning=STATIC_WARNING)

    def revoke(self, key_id: str) -> None:
        """It has no id: it is everybody's, and an operator's to replace."""


class NoKeys:
    """Where cattle is not enabled: none is given, and what was given runs out by itself."""

    def mint(self, name: str, *, ttl_s: int) -> AuthKey:
        """CattleError."""
        del ttl_s
        raise CattleError("cattle is not enabled", where=name)

    def revoke(self, key_id: str) -> None:
        """CattleError: there is nobody to ask."""
        raise CattleError("cattle is not enabled", where=key_id)
