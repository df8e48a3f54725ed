"""SSH to one host: always against a pinned key, never an agent, never the user's own configuration.

Fabric carries our own sessions; ``shim`` pins the OpenSSH client for a tool that insists on calling it. The only importer
of fabric, paramiko and socket outside the lab.
"""

from __future__ import annotations

import base64
import io
import logging
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import fabric
import paramiko
from invoke.exceptions import CommandTimedOut
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    retry_if_result,
    stop_after_attempt,
    stop_after_delay,
    wait_fixed,
)

from clawdlets_ops.errors import CommandError, CommandTimeout, HostKeyError, UnreachableError
from clawdlets_ops.files import ensure_dir, write_atomic
from clawdlets_ops.sensitive import Secret

CONNECT_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 120.0
LOOK_TIMEOUT_S = 3.0
LOGIN_TRIES = 3
DEAD_AFTER_S = 45.0
"""A link that takes no packet for so long is dead. The kernel's own patience is a quarter of an hour."""
KEEPALIVE_S = 10
END_TOLD_WITHIN_S = 1.0
BOOTING_POLL_S = 5.0
"""Rarely: newer sshd make a source wait that is refused too often (PerSourcePenalties)."""
SSH_PORT = 22
TRY_AGAIN = "run again; if it stays so, look at the network between here and there"

# What paramiko says of a port that is not ready yet is a traceback a try; our own errors say it once, in a sentence.
_WIRE = logging.getLogger("clawdlets_ops.wire")
_WIRE.addHandler(logging.NullHandler())
_WIRE.propagate = False


@dataclass(frozen=True)
class Target:
    """Where and as whom to log in. ``pin`` is the public host key (type and base64) that it must show."""

    host: str
    address: str
    user: str
    identity_file: Path
    pin: str
    port: int = SSH_PORT

    def at(self, address: str) -> Target:
        """The same host by another of its addresses."""
        return replace(self, address=address)

    def __str__(self) -> str:
        return f"{self.user}@{self.host} ({self.address})"


@dataclass(frozen=True)
class Answer:
    """What a remote command gave back."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        """True for exit status 0."""
        return self.exit_code == 0


class _Whole(io.StringIO):
    """Read in one go: invoke asks a stream that is no terminal for one character at a time, a hundred in a second."""

    def read(self, size: int | None = -1, /) -> str:
        return super().read(-1 if size else size)


class Session:
    """An authenticated session; made by ``session``."""

    def __init__(self, connection: fabric.Connection, target: Target) -> None:
        self._connection = connection
        self._target = target

    def run(self, command: str, *, timeout_s: float = COMMAND_TIMEOUT_S, stdin: str | Secret | None = None) -> Answer:
        """Run ``command`` in the login shell; UnreachableError when the connection breaks, CommandTimeout after ``timeout_s``."""
        text = stdin.reveal() if isinstance(stdin, Secret) else stdin
        given = False if text is None else _Whole(text)
        try:
            result = self._connection.run(command, hide=True, warn=True, in_stream=given, timeout=timeout_s)
        except CommandTimedOut:
            raise CommandTimeout(f"did not end within {timeout_s:g} s: {command}", where=str(self._target)) from None
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise UnreachableError(f"the connection broke ({error})", where=str(self._target), fix=TRY_AGAIN) from error
        if result.exited < 0 and self._has_ended():  # a command that a signal ended has no status either
            raise UnreachableError("the connection broke while it ran", where=str(self._target), fix=TRY_AGAIN)
        return Answer(result.exited, result.stdout, result.stderr)

    def _has_ended(self) -> bool:
        """Whether the connection is over. Channels are told so a moment before the transport is."""
        transport = self._connection.transport
        if transport is not None:
            transport.join(END_TOLD_WITHIN_S)
        return not self._connection.is_connected

    def check(self, command: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Standard output of ``command``; CommandError when its exit status is not 0."""
        answer = self.run(command, timeout_s=timeout_s)
        if not answer.ok:
            said = (answer.stderr or answer.stdout).strip()[-800:]
            raise CommandError(
                f"{command!r} ended with status {answer.exit_code}: {said}",
                where=str(self._target),
                exit_code=answer.exit_code,
            )
        return answer.stdout


@contextmanager
def session(target: Target, *, timeout_s: float = CONNECT_TIMEOUT_S, booting_s: float = 0.0) -> Iterator[Session]:
    """A fresh login (new TCP connection, no multiplexing). HostKeyError, UnreachableError.

    A login that was begun and broke off, as on a link that loses packets, is begun anew, ``LOGIN_TRIES`` times in all:
    nothing was asked of the host yet. A port that does not answer and a key that is refused are not tried again, the
    latter unless within ``booting_s``: a system that starts lets nobody in but root until it is up (pam_nologin(8)).
    """
    booting = Retrying(
        stop=stop_after_delay(booting_s), wait=wait_fixed(BOOTING_POLL_S), retry=retry_if_exception_type(_KeyRefused), reraise=True,
    )  # fmt: skip
    retrying = Retrying(stop=stop_after_attempt(LOGIN_TRIES), retry=retry_if_exception_type(_LoginBroke), reraise=True)
    connection, stream = booting(retrying, _log_in, target, timeout_s)
    try:
        yield Session(connection, target)
    finally:
        connection.close()
        stream.close()


class _LoginBroke(UnreachableError):
    """The server answered, and the login did not come to an end."""


class _KeyRefused(UnreachableError):
    """The server does not let the key in."""


def _log_in(target: Target, timeout_s: float) -> tuple[fabric.Connection, socket.socket]:
    config = fabric.Config(overrides={"load_ssh_configs": False}, lazy=True)
    stream = _open(target, timeout_s)
    connection = fabric.Connection(
        host=target.address,
        user=target.user,
        port=target.port,
        config=config,
        connect_timeout=int(timeout_s),
        connect_kwargs={
            "sock": stream,
            "key_filename": str(target.identity_file),
            "look_for_keys": False,
            "allow_agent": False,
            "banner_timeout": timeout_s,
            "auth_timeout": timeout_s,
            "channel_timeout": DEAD_AFTER_S,
        },
    )
    kind, body = target.pin.split()[:2]
    name = target.address if target.port == SSH_PORT else f"[{target.address}]:{target.port}"
    connection.client.set_log_channel(_WIRE.name)
    connection.client.set_missing_host_key_policy(paramiko.RejectPolicy())
    connection.client.get_host_keys().add(name, kind, paramiko.PKey.from_type_string(kind, base64.b64decode(body)))
    try:
        _open_connection(connection, target)
    except BaseException:
        connection.close()
        stream.close()
        raise
    return connection, stream


def _open_connection(connection: fabric.Connection, target: Target) -> None:
    try:
        connection.open()
        connection.transport.set_keepalive(KEEPALIVE_S)
    except paramiko.BadHostKeyException as error:
        raise HostKeyError(
            f"shows the host key {_fingerprint(error.key)}, pinned is {fingerprint(target.pin)}",
            where=str(target),
            fix="somebody else may be answering, or the host was rebuilt behind our back: find out before going on",
        ) from None
    except paramiko.AuthenticationException as error:
        if "timeout" in str(error).lower():  # paramiko's word for a server that fell silent: nothing was refused
            raise _LoginBroke(f"no SSH session: {error}", where=str(target), fix=TRY_AGAIN) from error
        raise _KeyRefused(
            f"refuses the key {target.identity_file.name} for {target.user} ({error})",
            where=str(target),
            fix="is this operator's key among the host's sshAuthorizedKeys?",
        ) from None
    except (OSError, EOFError, paramiko.SSHException) as error:
        raise _LoginBroke(f"no SSH session: {error}", where=str(target), fix=TRY_AGAIN) from error


def presented_key(address: str, *, port: int = SSH_PORT, timeout_s: float = CONNECT_TIMEOUT_S) -> str | None:
    """The ed25519 host key that answers at ``address`` (``ssh-ed25519 AAAA…``), or None when no SSH server answers.

    No login is attempted. None means "could not look", never "nobody there".
    """
    transport = None
    try:
        stream = socket.create_connection((address, port), timeout=timeout_s)
    except OSError:
        return None
    try:
        transport = paramiko.Transport(stream)
        transport.set_log_channel(_WIRE.name)
        transport.get_security_options().key_types = ("ssh-ed25519",)
        transport.start_client(timeout=timeout_s)
        key = transport.get_remote_server_key()
        return f"{key.get_name()} {key.get_base64()}"
    except (OSError, EOFError, paramiko.SSHException):
        return None
    finally:
        if transport is not None:
            transport.close()
        stream.close()


def wait_for_key(
    addresses: list[str],
    wanted: frozenset[str],
    *,
    why: str,
    timeout_s: float,
    poll_s: float = 1.0,
    port: int = SSH_PORT,
) -> tuple[str, str]:
    """Wait until one of ``addresses`` shows one of the ``wanted`` keys (any key when empty); returns address and key.

    HostKeyError when only other keys were seen by the deadline, UnreachableError when nothing answered.
    """
    seen: dict[str, str] = {}

    def look() -> tuple[str, str] | None:
        for address in addresses:
            key = presented_key(address, port=port, timeout_s=LOOK_TIMEOUT_S)
            if key:
                seen[address] = key
                if not wanted or key in wanted:
                    return address, key
        return None

    def give_up(_: RetryCallState) -> tuple[str, str]:
        if seen:
            shown = ", ".join(f"{address} shows {fingerprint(key)}" for address, key in seen.items())
            raise HostKeyError(
                f"{why}: {shown}; expected {', '.join(sorted(fingerprint(key) for key in wanted))}",
                where=", ".join(addresses),
                fix="find out who is answering before going on",
            )
        raise UnreachableError(
            f"{why}: no SSH server answered within {timeout_s:g} s",
            where=", ".join(addresses),
            fix="look at the server's console; run again when it is up",
        )

    retrying = Retrying(
        stop=stop_after_delay(timeout_s),
        wait=wait_fixed(poll_s),
        retry=retry_if_result(lambda found: found is None),
        retry_error_callback=give_up,
    )
    found = retrying(look)
    if found is None:
        raise UnreachableError(f"{why}: no answer", where=", ".join(addresses))
    return found


def fingerprint(public_key: str) -> str:
    """The SHA256 fingerprint of a public key line, as OpenSSH prints it."""
    kind, body = public_key.split()[:2]
    return _fingerprint(paramiko.PKey.from_type_string(kind, base64.b64decode(body)))


def shim(folder: Path, *, real_ssh: Path, known_hosts: Path, identity_file: Path) -> Path:
    """Write an ``ssh`` program into ``folder`` that puts our pins before whatever its caller says; returns ``folder``.

    The OpenSSH client takes the first value it is given for an option, so what stands here cannot be overruled
    (ssh_config(5)); nixos-anywhere itself asks for no host key checking at all.
    """
    options = {
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": str(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "IdentitiesOnly": "yes",
        "IdentityFile": str(identity_file),
        "IdentityAgent": "none",
        "BatchMode": "yes",
        "ConnectTimeout": "10",
        "ServerAliveInterval": "10",
        "ServerAliveCountMax": "3",
    }
    words = " ".join(f"-o {shlex.quote(f'{key}={value}')}" for key, value in options.items())
    ensure_dir(folder)
    # An IPv6 address stands in brackets where it is part of a URL, as for nix copy; ssh itself takes none.
    script = f"""#!/bin/sh
for word; do
  shift
  case $word in
    root@"["*"]") word=root@${{word#"root@["}} word=${{word%"]"}} ;;
  esac
  set -- "$@" "$word"
done
exec {shlex.quote(str(real_ssh))} -F /dev/null {words} "$@"
"""
    write_atomic(folder / "ssh", script, mode=0o700)
    return folder


def known_hosts_lines(pins: dict[str, str]) -> str:
    """A known_hosts file: address to key."""
    return "".join(f"{address} {key}\n" for address, key in sorted(pins.items()))


def _open(target: Target, timeout_s: float) -> socket.socket:
    try:
        stream = socket.create_connection((target.address, target.port), timeout=timeout_s)
    except OSError as error:
        raise UnreachableError(f"no connection: {error}", where=str(target), fix=TRY_AGAIN) from None
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # paramiko's small packets cost 40 ms each without it
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(DEAD_AFTER_S * 1000))
    return stream


def _fingerprint(key: paramiko.PKey) -> str:
    return str(key.fingerprint)
