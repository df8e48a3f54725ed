"""The emulated cloud over HTTP: routes, bearer token, error envelope, paging, and a journal of every request.

HTTP/1.1 with keep-alive, one thread per connection, JSON only. Facts are those of the API reference
(docs.hetzner.cloud) and of what the provider, the hcloud CLI and python-hcloud were seen to need.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs

from clawdlets_ops.files import PRIVATE_FILE
from clawdlets_ops.lab.catalogue import Json
from clawdlets_ops.lab.cloud import Cloud
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.ratelimit import Budget, Rate
from clawdlets_ops.lab.routes import API_PREFIX as API_PREFIX
from clawdlets_ops.lab.routes import Routes

log = logging.getLogger(__name__)

ExtraRoutes = Mapping[tuple[str, str], Callable[[Mapping[str, str]], object]]

TOKEN_LENGTH: Final = 64
BODY_LIMIT_BYTES: Final = 1024 * 1024


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


Faults = Callable[[Request], Answer | None]


class Emulator:
    """Serves a Cloud on loopback to clients that know the token.

    ``extra_routes`` are for the lab's own commands: (method, path) to a function of the query or, if there is one, the
    JSON body; they need the same token and answer under their path with or without /v1. The journal (JSON lines, 0600)
    has for each request ts, method, path, query, status, userAgent, requestId, body and mutates (whether it changed the
    cloud's state; for an extra route: whether it is no GET and succeeded). It never has a header's token, user_data or
    what an extra route was told: those are {"bytes", "sha256"}. ``faults`` is asked after authentication and before
    routing, not for extra routes: an Answer (of which status and payload count) replaces the handling; it may block, and
    raise ApiError. ``budget`` is what the token may ask of /v1 (3600 an hour when none is given; the lab's own routes and
    refused tokens are free of it). ``datacenters`` offers /datacenters to old clients; the API answers 410. Raises ValueError for a token that no client could use.
    """

    def __init__(
        self,
        cloud: Cloud,
        *,
        token: str,
        journal_file: Path | None,
        host: str = "127.0.0.1",
        port: int = 0,
        extra_routes: ExtraRoutes | None = None,
        faults: Faults | None = None,
        budget: Budget | None = None,
        datacenters: bool = False,
    ) -> None:
        if len(token) != TOKEN_LENGTH:
            raise ValueError(
                f"the provider takes tokens of exactly {TOKEN_LENGTH} characters, this one has {len(token)}"
            )
        self._cloud = cloud
        self._authorization = f"Bearer {token}".encode()
        self._journal_file = journal_file
        self._address = (host, port)
        self._extra_routes = dict(extra_routes or {})
        self._faults = faults
        self._budget = budget or Budget()
        self._routes = Routes(cloud, datacenters=datacenters)
        self._request_ids = itertools.count(time.time_ns())
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def endpoint(self) -> str:
        """The base URL for clients, without a trailing slash; RuntimeError when not started."""
        if self._server is None:
            raise RuntimeError("the emulator is not started")
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}{API_PREFIX}"

    def start(self) -> None:
        """Make the journal, bind, and serve in a background thread; OSError when the port is taken."""
        self._append("")
        self._server = _Server(self._address, self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="lab-api", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop serving and end all connections; the cloud and its workers are left alone."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join()
        self._server.close_connections()
        self._server.server_close()
        self._server = self._thread = None

    def handle(self, request: Request) -> Answer:
        """Answer one request and journal it; what is wrong with it is in the answer, never an exception."""
        request_id = f"{next(self._request_ids):016x}"
        path, _, query_text = request.target.partition("?")
        query = parse_qs(query_text, keep_blank_values=True)
        body: Json | None = None
        before = self._cloud.mutations()
        extra = self._extra_routes.get((request.method, path.removeprefix(API_PREFIX)))
        try:
            self._authenticate(request)
            body = _json_object(request.body)
            if extra is not None:
                status, payload = 200, extra(body or {name: values[-1] for name, values in query.items()})
            elif self._faults is not None and (fault := self._faults(request)) is not None:
                status, payload = fault.status, fault.payload
            else:
                self._spend()
                status, payload = self._routes.answer(request.method, path, query, body)
        except ApiError as error:
            status, payload = error.status, _envelope(error)
        except Exception:
            # The client needs an answer, the log the traceback.
            log.exception("the lab's API could not answer %s %s", request.method, path)
            status, payload = 500, _envelope(ApiError(500, "server_error", "see the log of the lab"))
        mutates = self._cloud.mutations() > before
        said: Json = {"query": query, "body": body or None}
        if extra is not None:
            said = {name: _digest(value) if value else None for name, value in said.items()}
            mutates = request.method != "GET" and status < 400
        elif body and body.get("user_data") is not None:
            said["body"] = {**body, "user_data": _digest(body["user_data"])}
        self._note(request, path, said, status, request_id, mutates)
        return Answer(status, payload, request_id, self._budget.look())

    def _authenticate(self, request: Request) -> None:
        sent = request.headers.get("authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(sent, self._authorization):
            raise ApiError(401, "unauthorized", "unable to authenticate")

    def _spend(self) -> None:
        granted, rate = self._budget.take()
        if not granted:
            raise ApiError(429, "rate_limit_exceeded", f"limit of {rate.limit} requests per hour reached")

    def _note(self, request: Request, path: str, said: Json, status: int, request_id: str, mutates: bool) -> None:
        entry = {
            "ts": self._cloud.now().isoformat(),
            "method": request.method,
            "path": path,
            **said,
            "status": status,
            "userAgent": request.headers.get("user-agent"),
            "requestId": request_id,
            "mutates": mutates,
        }
        self._append(json.dumps(entry) + "\n")

    def _append(self, line: str) -> None:
        if self._journal_file is None:
            return
        # One write per line: lines of parallel requests do not mix, and a killed lab leaves whole lines.
        fd = os.open(self._journal_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, PRIVATE_FILE)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)


def _json_object(raw: bytes) -> Json:
    if not raw.strip():
        return {}
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise ApiError(400, "json_error", "the body is not JSON") from error
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise ApiError(400, "json_error", "the body is not a JSON object")
    return body


def _envelope(error: ApiError) -> Json:
    return {"error": {"code": error.code, "message": error.message, "details": error.details}}


def _digest(value: object) -> Json:
    raw = value.encode(errors="surrogatepass") if isinstance(value, str) else json.dumps(value, sort_keys=True).encode()
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], emulator: Emulator) -> None:
        self.emulator = emulator
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        super().__init__(address, _Connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._connections_lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._connections_lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """End kept-alive connections, whose threads would else go on answering for a stopped emulator."""
        with self._connections_lock:
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    log.debug("a connection was gone already")

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class's signature
        if isinstance(sys.exception(), ConnectionError):
            log.debug("a client went away in the middle")
        else:
            log.exception("a connection of the lab's API failed")


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one segment
    server: _Server

    def _serve(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not length.isdecimal() or int(length) > BODY_LIMIT_BYTES:
            self.close_connection = True
            refusal = ApiError(
                413, "invalid_input", f"a body needs a Content-Length of at most {BODY_LIMIT_BYTES} bytes"
            )
            self._send(Answer(refusal.status, _envelope(refusal), "0"))
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, self.rfile.read(int(length)))
        self._send(self.server.emulator.handle(request))

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _send(self, answer: Answer) -> None:
        content = b"" if answer.payload is None else json.dumps(answer.payload).encode()
        self.send_response(answer.status)
        self.send_header("X-Correlation-Id", answer.request_id)
        if answer.rate is not None:
            self.send_header("RateLimit-Limit", str(answer.rate.limit))
            self.send_header("RateLimit-Remaining", str(answer.rate.remaining))
            self.send_header("RateLimit-Reset", str(answer.rate.reset))
        if content:
            self.send_header("Content-Type", "application/json")
        if answer.status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        return "clawdlets-lab"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are in the journal; standard error is the lab's own."""
