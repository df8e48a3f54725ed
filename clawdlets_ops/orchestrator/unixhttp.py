"""HTTP over a unix socket, with the standard library alone: clf's way to the orchestrator, and the orchestrator's to tailscaled."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

QUEUE_FULL_S = 0.01


class TooLarge(Exception):
    """The answer is larger than what was to be read."""


@dataclass(frozen=True)
class Answer:
    """``body`` at most as large as was asked for."""

    status: int
    body: bytes


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float, host: str) -> None:
        super().__init__(host, timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        deadline = time.monotonic() + (self.timeout or 0.0)
        while True:
            try:
                self.sock.connect(self._path)
                return
            except BlockingIOError:  # unix(7): the queue of the listener is full for this moment
                if time.monotonic() >= deadline:
                    raise TimeoutError("the listener's queue is full") from None
                time.sleep(QUEUE_FULL_S)


def ask(
    path: str,
    method: str,
    target: str,
    *,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 10.0,
    limit_bytes: int = 1_048_576,
    host: str = "localhost",
) -> Answer:
    """One request. OSError when nobody is there or nothing comes in time, http.client.HTTPException for garbage, TooLarge."""
    connection = _Connection(path, timeout_s, host)
    try:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all of the body was taken: read why
            connection.request(method, target, body=body, headers=dict(headers or {}))
        response = connection.getresponse()
        content = response.read(limit_bytes + 1)
        if len(content) > limit_bytes:
            raise TooLarge(f"more than {limit_bytes} bytes")
        return Answer(response.status, content)
    finally:
        connection.close()
