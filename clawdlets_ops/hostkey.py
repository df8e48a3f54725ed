"""SSH host keys (ed25519), made in process. Formats: OpenSSH's PROTOCOL.key, sshd(8)."""

from __future__ import annotations

import re

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clawdlets_ops.errors import SecretsError
from clawdlets_ops.sensitive import Secret


def generate(host: str) -> tuple[Secret, str]:
    """A new key pair: the private half (OpenSSH format, no passphrase) and the public line with ``host`` as comment."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    ).decode()
    secret = Secret(private, f"SSH host key of {host}")
    return secret, f"{public_of(secret)} {host}"


def public_of(private: Secret) -> str:
    """The public half as ``ssh-ed25519 AAAA…``, without comment; SecretsError unless ``private`` is such a key."""
    try:
        key = serialization.load_ssh_private_key(private.reveal().encode(), password=None)
    except (ValueError, TypeError):
        raise SecretsError("is not an OpenSSH private key without passphrase", where=private.name) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SecretsError("is not an ed25519 key", where=private.name)
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def parse_public(line: str, *, where: str = "") -> str:
    """``line`` (one public key, comment allowed) without its comment; SecretsError unless it is ssh-ed25519."""
    fields = line.split()
    shape = len(fields) >= 2 and fields[0] == "ssh-ed25519" and re.fullmatch(r"AAAA[A-Za-z0-9+/]{64}", fields[1])
    if not shape or len(line.strip().splitlines()) != 1:
        raise SecretsError("is not an ssh-ed25519 public key", where=where)
    return f"{fields[0]} {fields[1]}"
