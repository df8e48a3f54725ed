"""age key pairs (X25519), in process through pyrage. Source: the age format, C2SP age.md."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pyrage  # type: ignore[import-untyped]

from clawdlets_ops.errors import SecretsError
from clawdlets_ops.sensitive import Secret


@dataclass(frozen=True)
class Identity:
    """``secret`` is the ``AGE-SECRET-KEY-1…`` line, ``recipient`` the ``age1…`` that things are encrypted to."""

    secret: Secret
    recipient: str


def generate() -> Identity:
    """A new key pair, from the operating system's randomness."""
    key = pyrage.x25519.Identity.generate()
    return Identity(Secret(str(key), "age identity"), str(key.to_public()))


def from_secret(secret: Secret) -> Identity:
    """The pair that ``secret`` (one key, no comments) belongs to; SecretsError when it is malformed."""
    text = secret.reveal().strip()
    try:
        key = pyrage.x25519.Identity.from_str(text)
    except pyrage.IdentityError:
        raise SecretsError("is not an age identity (AGE-SECRET-KEY-1…)", where=secret.name) from None
    return Identity(Secret(text, secret.name), str(key.to_public()))


def from_key_file(text: Secret) -> Identity:
    """The one identity in a key file as age-keygen writes it: comments, blank lines, one key; SecretsError."""
    lines = [line.strip() for line in text.reveal().splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if len(keys) != 1:
        raise SecretsError(f"holds {len(keys)} keys; exactly one is expected", where=text.name)
    return from_secret(Secret(keys[0], text.name))


def to_key_file(identity: Identity) -> Secret:
    """``identity`` as a key file that age and sops read."""
    return Secret(f"# public key: {identity.recipient}\n{identity.secret.reveal()}\n", identity.secret.name)


def parse_recipient(text: str, *, where: str = "") -> str:
    """The one X25519 recipient in ``text``, surrounding space removed; SecretsError when it is malformed."""
    recipient = text.strip()
    try:
        if not re.fullmatch(r"age1[a-z0-9]+", recipient):
            raise ValueError(recipient)
        pyrage.x25519.Recipient.from_str(recipient)
    except (pyrage.RecipientError, ValueError):
        raise SecretsError("is not an age recipient (age1…)", where=where) from None
    return recipient
