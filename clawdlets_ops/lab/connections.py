"""HTTP/1.1 for the emulated API: keep-alive, one thread a connection, JSON answers, and limits for whoever is slow or large.

Only what the API's clients use: a request has a Content-Length or no body. Written for it, because the standard library's
server parses a head with the mail package, which takes longer than everything else about a request (measured).

Whoever opens connections and says nothing is let wait; a request that has begun must arrive whole within its time, and so
must its answer. Beyond the greatest number of connections new ones wait in the kernel's queue, kept-alive ones are ended
with their answer, and those that have said nothing for a while are ended. Source of the syntax: RFC 9112.
"""

from __future__ import annotations

import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final

from clawdlets_ops.lab.catalogue import Json
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.ratelimit import Rate

log = logging.getLogger(__name__)

HEAD_LIMIT_BYTES: Final = 32 * 1024
BODY_LIMIT_BYTES: Final = 1024 * 1024
REQUEST_TIMEOUT_S: Final = 30.0
MAX_CONNECTIONS: Final = 512

_QUEUE = 4096
_PIECE_BYTES = 64 * 1024
_LOOK_UP_S = 1.0
_PATIENCE_S = 5.0
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH"})
_REASONS = {status.value: status.phrase for status in HTTPStatus}
_encode = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class Request:
    """What arrived, still to be judged; headers by lower-case name."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """status, the JSON value (None: no body), the id under which the journal has the request, and the budget left."""

    status: int
    payload: object
    request_id: str
    rate: Rate | None = None


def envelope(error: ApiError) -> Json:
    """The body that tells an error."""
    return {"error": {"code": error.code, "message": error.message, "details": error.details}}


class _Gone(Exception):
    """The client has ended the connection, or does not read."""


@dataclass(frozen=True)
class _Head:
    method: str
    target: str
    headers: Mapping[str, str]
    body_bytes: int
    keep_alive: bool


class Connections:
    """Listens from ``start`` to ``stop``; ``answer`` is called by many threads, ``now`` is the time in ``Date``.

    A ConnectionError of ``answer`` ends that connection without a word.
    """

    def __init__(
        self,
        address: tuple[str, int],
        answer: Callable[[Request], Answer],
        *,
        now: Callable[[], datetime],
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        """Binds; OSError when the port is taken."""
        self._answer = answer
        self._now = now
        self._request_timeout_s = request_timeout_s
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._stopped = threading.Event()
        self._date = (0, "")
        self._listener = socket.create_server(address, backlog=_QUEUE)
        self._listener.settimeout(_LOOK_UP_S)
        host, port = self._listener.getsockname()[:2]
        self.address: tuple[str, int] = (str(host), int(port))
        self._thread = threading.Thread(target=self._accept, name="lab-api", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop listening, and end all connections: kept-alive ones would else go on being answered."""
        with self._changed:
            self._stopped.set()
            self._changed.notify_all()
            for connection in self._open:
                _shut(connection)
        _shut(self._listener)
        self._thread.join()
        self._listener.close()

    @property
    def _crowded(self) -> bool:
        return len(self._open) >= MAX_CONNECTIONS

    def _accept(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped.is_set() or not self._crowded, timeout=_LOOK_UP_S)
                if self._stopped.is_set():
                    return
                if self._crowded:
                    continue
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if not self._stopped.is_set():  # no more files, for a moment
                    log.warning("the lab's API cannot take a connection: %s", error)
                    time.sleep(0.05)
                continue
            with self._changed:
                self._open.add(connection)
                if self._stopped.is_set():
                    _shut(connection)
            try:
                threading.Thread(target=self._serve, args=(connection,), name="lab-api-client", daemon=True).start()
            except RuntimeError:  # no more threads, for a moment
                log.warning("the lab's API has no thread for a connection")
                self._close(connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            client = _Client(connection, self._request_timeout_s)
            while self._serve_one(client):
                pass
        except (_Gone, OSError) as error:
            log.debug("a client of the lab's API went away: %s", error)
        except Exception:
            log.exception("a connection of the lab's API failed")
        finally:
            self._close(connection)

    def _serve_one(self, client: _Client) -> bool:
        """Whether another request may come."""
        client.wait(lambda: self._crowded)
        try:
            head = client.head()
            body = client.body(head)
        except ApiError as error:
            # What comes after this is anybody's guess.
            client.send(self._render(Answer(error.status, envelope(error), "0"), keep_alive=False))
            client.let_go()
            return False
        answer = self._answer(Request(head.method, head.target, head.headers, body))
        keep_alive = head.keep_alive and not self._crowded
        client.send(self._render(answer, keep_alive=keep_alive))
        return keep_alive

    def _render(self, answer: Answer, *, keep_alive: bool) -> bytes:
        content = b"" if answer.payload is None else _encode(answer.payload).encode()
        lines = [
            f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, 'Unknown')}",
            f"Date: {self._now_text()}",
            f"X-Correlation-Id: {answer.request_id}",
        ]
        if (rate := answer.rate) is not None:
            lines.append(
                f"RateLimit-Limit: {rate.limit}\r\nRateLimit-Remaining: {rate.remaining}\r\nRateLimit-Reset: {rate.reset}"
            )
        if content:
            lines.append("Content-Type: application/json")
        if answer.status != HTTPStatus.NO_CONTENT:
            lines.append(f"Content-Length: {len(content)}")
        if not keep_alive:
            lines.append("Connection: close")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + content

    def _now_text(self) -> str:
        now = self._now()
        second, text = self._date
        if second != (asked := int(now.timestamp())):
            text = now.astimezone(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
            self._date = asked, text
        return text

    def _close(self, connection: socket.socket) -> None:
        with self._changed:
            self._open.discard(connection)
            self._changed.notify_all()
        connection.close()


class _Client:
    """One connection, read request by request."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        # The kernel's time limits: with Python's every read and write takes three system calls instead of one.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(min(_LOOK_UP_S, timeout_s)))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))
        self._connection = connection
        self._timeout_s = timeout_s
        self._read = b""
        self._deadline = 0.0

    def wait(self, crowded: Callable[[], bool]) -> None:
        """For the first byte of a request, as long as it takes, unless others wait for the place."""
        since = time.monotonic()
        while not self._read:
            if not self._receive() and crowded() and time.monotonic() - since > _PATIENCE_S:
                raise _Gone("others wait for its place")
        self._deadline = time.monotonic() + self._timeout_s

    def head(self) -> _Head:
        """ApiError when it is none."""
        while (end := self._read.find(b"\r\n\r\n")) < 0 and len(self._read) <= HEAD_LIMIT_BYTES:
            self._receive_in_time()
        if end < 0 or end > HEAD_LIMIT_BYTES:
            raise ApiError(431, "invalid_input", f"the head of a request has at most {HEAD_LIMIT_BYTES} bytes")
        raw, self._read = self._read[:end], self._read[end + 4 :]
        return _parse(raw.decode("latin-1"))

    def body(self, head: _Head) -> bytes:
        """ApiError when it does not come."""
        if head.headers.get("expect", "").lower() == "100-continue" and len(self._read) < head.body_bytes:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(self._read) < head.body_bytes:
            self._receive_in_time()
        body, self._read = self._read[: head.body_bytes], self._read[head.body_bytes :]
        return body

    def send(self, data: bytes) -> None:
        """OSError when the client does not read it."""
        self._connection.sendall(data)

    def let_go(self) -> None:
        """Say that nothing more comes, and take what the client still sends: else the system would throw away an answer
        that it has not read yet."""
        self._connection.shutdown(socket.SHUT_WR)
        until = time.monotonic() + _LOOK_UP_S
        while time.monotonic() < until and self._receive():
            self._read = b""

    def _receive_in_time(self) -> None:
        if time.monotonic() >= self._deadline:
            message = f"the request did not arrive within {self._timeout_s:g} seconds"
            raise ApiError(408, "request_timeout", message)
        self._receive()

    def _receive(self) -> bool:
        """Read what there is, waiting for a moment; whether there was anything."""
        try:
            piece = self._connection.recv(_PIECE_BYTES)
        except BlockingIOError:
            return False
        if not piece:
            raise _Gone("end of the connection")
        self._read += piece
        return True


def _parse(text: str) -> _Head:
    first, *lines = text.split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise ApiError(400, "invalid_input", "the request line is not one of HTTP/1.1")
    method, target, version = words
    if method not in _METHODS:
        raise ApiError(405, "method_not_allowed", "the method is not one of the API")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or not name or name != name.strip() or (name == "content-length" and name in headers):
            raise ApiError(400, "invalid_input", "a header line is not one of HTTP/1.1")
        headers[name] = value.strip(" \t")
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not (length.isascii() and length.isdecimal()):
        raise ApiError(413, "invalid_input", f"a body needs a Content-Length of at most {BODY_LIMIT_BYTES} bytes")
    if len(length) > 18 or int(length) > BODY_LIMIT_BYTES:
        raise ApiError(413, "invalid_input", f"a body has at most {BODY_LIMIT_BYTES} bytes")
    keep_alive = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    return _Head(method, target, headers, int(length), keep_alive)


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        log.debug("a connection was gone already")
