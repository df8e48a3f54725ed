"""Password hashes for /etc/shadow, made by Debian's ``mkpasswd`` (package whois). The password goes by standard input.

Facts: crypt(5) for the shapes; tests/contract/test_mkpasswd.py for the program's limits.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass

from clawdlets_ops.errors import SecretsError, ToolMissingError
from clawdlets_ops.process import Command, Runner
from clawdlets_ops.sensitive import Secret

MAX_PASSWORD_BYTES = 511
"""crypt(3) refuses more (CRYPT_MAX_PASSPHRASE_SIZE is 512 with the final zero)."""

_ITOA64 = "[./A-Za-z0-9]"
# setting (method, cost, salt) and hash; the setting alone is what crypt(3) takes to hash a password the same way again
_SHAPES = (
    rf"(?P<setting>\$g?y\${_ITOA64}{{1,12}}\${_ITOA64}{{1,86}})\${_ITOA64}{{43}}",
    rf"(?P<setting>\$7\${_ITOA64}{{11,97}})\${_ITOA64}{{43}}",
    rf"(?P<setting>\$6\$(?:rounds=[1-9][0-9]{{3,8}}\$)?{_ITOA64}{{1,16}})\${_ITOA64}{{86}}",
    rf"(?P<setting>\$2b\$(?:0[4-9]|[12][0-9]|3[01])\${_ITOA64}{{22}}){_ITOA64}{{31}}",
)


def is_crypt_hash(text: str) -> bool:
    """True for a whole yescrypt, gost-yescrypt, scrypt, SHA-512 or bcrypt hash."""
    return _setting(text) is not None


def check_password(password: Secret) -> None:
    """SecretsError unless mkpasswd would hash ``password`` as it stands (it reads one line, cut at a NUL)."""
    text = password.reveal()
    if not text:
        raise SecretsError("is empty", where=password.name)
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise SecretsError("holds a line break or another control character", where=password.name)
    if len(text.encode(errors="replace")) > MAX_PASSWORD_BYTES:
        raise SecretsError(f"is longer than {MAX_PASSWORD_BYTES} bytes", where=password.name)


@dataclass(frozen=True)
class Mkpasswd:
    """The program ``mkpasswd``, run by ``runner``."""

    runner: Runner

    def hash(self, password: Secret) -> Secret:
        """A yescrypt hash of ``password`` with a new salt; SecretsError, ToolMissingError, CommandError."""
        return self._run(password, "--method=yescrypt")

    def matches(self, password: Secret, hashed: Secret) -> bool:
        """Whether ``hashed`` was made of ``password``; SecretsError when it is no hash that we accept."""
        setting = _setting(hashed.reveal())
        if setting is None:
            raise SecretsError("is not a password hash", where=hashed.name)
        # the setting is method, cost and salt: it tells nothing about the password
        again = self._run(password, f"--salt={setting}")
        return hmac.compare_digest(again.reveal(), hashed.reveal())

    def _run(self, password: Secret, option: str) -> Secret:
        check_password(password)
        if self.runner.which("mkpasswd") is None:
            raise ToolMissingError(
                f"{password.name} is a password and mkpasswd, which hashes it, is not on PATH",
                where="mkpasswd",
                fix="install the Debian package whois, or give the hash instead of the password",
            )
        command = Command(
            ["mkpasswd", "--stdin", option],
            why=f"hash {password.name}",
            stdin=password,
            timeout_s=30.0,
        )
        hashed = self.runner.run(command).check().stdout.strip()
        if not is_crypt_hash(hashed):
            raise SecretsError("mkpasswd printed no hash", where=password.name)
        return Secret(hashed, f"hash of {password.name}")


def _setting(text: str) -> str | None:
    for shape in _SHAPES:
        if match := re.fullmatch(shape, text):
            return match["setting"]
    return None
