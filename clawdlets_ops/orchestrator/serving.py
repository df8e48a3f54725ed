"""uvicorn with bounds on its connections, and the sockets it listens on.

A client may be slow, silent or many without taking anything from the others: connections are bounded in all and for each uid
(or address), a request's head has HEAD_S and HEAD_BYTES, its body BODY_S, an idle connection IDLE_S. The size of a body is bounded in
``app``.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import socket
import stat
from asyncio.events import TimerHandle
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from clawdlets_ops.errors import OrchestratorError
from clawdlets_ops.orchestrator.identity import peer_uid

HEAD_S = 5.0
HEAD_BYTES = 16_384
BODY_S = 10.0
IDLE_S = 30
BACKLOG = 1024
LISTEN_FDS_START = 3


@dataclass
class Bounds:
    """How many connections there may be; ``open`` counts them by uid or address."""

    in_all: int = 1024
    of_one: int = 64
    head_s: float = HEAD_S
    open: Counter[str] = field(default_factory=Counter)
    refused: int = 0

    def take(self, who: str) -> bool:
        """Count a connection in, unless there are too many."""
        if self.open[who] >= self.of_one or self.open.total() >= self.in_all:
            self.refused += 1
            return False
        self.open[who] += 1
        return True

    def give(self, who: str) -> None:
        """Count it out."""
        self.open[who] -= 1
        if self.open[who] <= 0:
            del self.open[who]


class _Whole:
    """A transport on which the head of an answer waits for its body: one call of the kernel for both, and whoever reads is woken
    once. uvicorn writes one right after the other."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self.bodiless = False
        """The answer has a head only: to HEAD."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send ``data`` and the head before it, or keep it when it is one."""
        if (
            not self._head
            and not self.bodiless
            and data.startswith(b"HTTP/1.1 ")
            and data.endswith(b"\r\n\r\n")
            and data[9:10] != b"1"
        ):
            self._head = data
            return
        self._transport.write(self._head + data)
        self._head = b""

    def close(self) -> None:
        """Close it when everything was sent."""
        if self._head:
            self.write(b"")
        self._transport.close()


def bounded(bounds: Bounds) -> type[HttpToolsProtocol]:
    """The protocol class for one server."""

    class Bounded(HttpToolsProtocol):
        _who = ""
        _timer: TimerHandle | None = None
        _head_bytes = 0
        _in_head = True
        _complete = False
        _refused = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(cast(asyncio.Transport, _Whole(transport)))
            connection = transport.get_extra_info("socket")
            if connection.family == socket.AF_UNIX:
                uid = peer_uid(connection)
                self.app_state = {**self.app_state, "uid": uid}
                who = f"uid {uid}"
            else:
                address = transport.get_extra_info("peername")[0]
                self.app_state = {**self.app_state, "address": address}
                who = address
            if bounds.take(who):
                self._who = who
                self._timer = self.loop.call_later(bounds.head_s, self._too_slow)
            else:
                self._refuse(b"503 Service Unavailable", b"too many connections")

        def connection_lost(self, exc: Exception | None) -> None:
            if self._who:
                bounds.give(self._who)
                self._who = ""
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            if self._in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._refused or self.transport.is_closing():
                return
            if self._timer is None and (not self._complete or self.cycle is None or self.cycle.response_complete):
                # A request that came in one piece, as most do, needs no timer at all: it is being answered. What came when nothing
                # is, and is no request yet, has ended uvicorn's own wait.
                self._timer = self.loop.call_later(bounds.head_s if self._in_head else BODY_S, self._too_slow)
            if self._in_head and self._head_bytes > HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large", b"the head of the request is too large")

        def on_message_begin(self) -> None:
            self._in_head, self._complete = True, False
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_head = False
            self._head_bytes = 0
            self._stop_timer()
            cast(_Whole, self.transport).bodiless = self.parser.get_method() == b"HEAD"
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._in_head, self._complete = True, True
            self._stop_timer()
            super().on_message_complete()

        def _too_slow(self) -> None:
            self._timer = None
            if not self.transport.is_closing():
                self._refuse(b"408 Request Timeout", b"the request did not come in time")

        def _refuse(self, status: bytes, words: bytes) -> None:
            self._refused = True
            body = b'{"protocolVersion":1,"error":{"message":"%s"}}' % words
            self.transport.write(
                b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
                % (status, len(body), body)
            )
            self.transport.close()

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Bounded


class Server(uvicorn.Server):
    """Leaves the signals to the process, which has more than one server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None of them."""
        yield


def server(app: Any, bounds: Bounds) -> Server:
    """A server for ``app``; run it with ``serve(sockets=[…])`` in a running loop."""
    return Server(
        uvicorn.Config(
            app,
            http=bounded(bounds),
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=5,
            backlog=BACKLOG,
        )
    )


def passed_socket(environ: Mapping[str, str], pid: int) -> socket.socket | None:
    """The unix socket that systemd passed to this process (sd_listen_fds(3)), or None; OrchestratorError for another kind."""
    if environ.get("LISTEN_PID") != str(pid) or not environ.get("LISTEN_FDS"):
        return None
    if environ["LISTEN_FDS"] != "1":
        raise OrchestratorError("is passed more than one socket", where="LISTEN_FDS", fix="one ListenStream= only")
    passed = socket.socket(fileno=LISTEN_FDS_START)
    os.set_inheritable(passed.fileno(), False)
    if passed.family != socket.AF_UNIX or passed.type != socket.SOCK_STREAM:
        raise OrchestratorError("is not a unix stream socket", where="LISTEN_FDS")
    return passed


def own_socket(path: Path, group: str) -> socket.socket:
    """A listening socket at ``path``, 0660 for ``group`` from its first moment; one that nobody listens on is replaced."""
    try:
        gid = grp.getgrnam(group).gr_gid
    except KeyError:
        raise OrchestratorError(f"there is no group {group}", where=str(path)) from None
    if _answers(path):
        raise OrchestratorError("somebody is listening there already", where=str(path))
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        made.bind(str(path))
        os.chown(path, -1, gid)
        path.chmod(0o660)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise OrchestratorError(f"cannot be made ({error.strerror})", where=str(path)) from error
    finally:
        os.umask(before)
    return made


def check_socket(listening: socket.socket, group: str) -> Path:
    """The socket's path; OrchestratorError unless it is at most 0660, of ``group``, in a folder others cannot write to."""
    path = Path(str(listening.getsockname()))
    if not path.is_absolute():
        raise OrchestratorError("is not an absolute path", where=str(path))
    try:
        folder, gid = path.parent.stat(), grp.getgrnam(group).gr_gid
        try:
            info = path.lstat()
        except PermissionError:
            # We are of neither: whoever the folder lets in is root or the group, whatever the socket's own mode.
            if folder.st_gid == gid and not stat.S_IMODE(folder.st_mode) & 0o027:
                return path
            raise
    except (OSError, KeyError) as error:
        raise OrchestratorError(f"cannot be checked: {error}", where=str(path)) from error
    mode = stat.S_IMODE(info.st_mode)
    if not stat.S_ISSOCK(info.st_mode):
        raise OrchestratorError("is not a socket", where=str(path))
    if stat.S_IMODE(folder.st_mode) & 0o022:
        raise OrchestratorError("can be written by group or others", where=str(path.parent), fix="chmod 750")
    if mode & ~0o660:
        raise OrchestratorError(f"is open to others ({mode:04o})", where=str(path), fix="SocketMode=0660")
    if mode & 0o060 and info.st_gid != gid:
        raise OrchestratorError(f"is for another group than {group}", where=str(path), fix=f"SocketGroup={group}")
    return path


def _answers(path: Path) -> bool:
    """Whether somebody listens at ``path``; a socket that nobody listens on is removed, anything else is in the way."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(info.st_mode):
        raise OrchestratorError("is in the way and not a socket", where=str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return False
        except OSError:
            return True
    return True
