"""The emulated cloud over HTTP: routes, bearer token, error envelope, paging, and a journal of every request.

The connections are in ``connections``. Facts are those of the API reference (docs.hetzner.cloud) and of what the provider,
the hcloud CLI and python-hcloud were seen to need.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs

from clawdlets_ops.files import PRIVATE_FILE
from clawdlets_ops.lab.catalogue import Json
from clawdlets_ops.lab.cloud import Cloud
from clawdlets_ops.lab.connections import REQUEST_TIMEOUT_S, Connections, envelope
from clawdlets_ops.lab.connections import Answer as Answer
from clawdlets_ops.lab.connections import Request as Request
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.ratelimit import Budget, Rate
from clawdlets_ops.lab.routes import API_PREFIX as API_PREFIX
from clawdlets_ops.lab.routes import Routes

log = logging.getLogger(__name__)

ExtraRoutes = Mapping[tuple[str, str], Callable[[Mapping[str, str]], object]]

TOKEN_LENGTH: Final = 64


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
    refused tokens are free of it). ``datacenters`` offers /datacenters to old clients; the API answers 410.
    A request that does not arrive whole within ``request_timeout_s`` is answered with 408, and its connection ended. Raises ValueError for a token that no client could use.
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
        request_timeout_s: float = REQUEST_TIMEOUT_S,
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
        self._request_timeout_s = request_timeout_s
        self._connections: Connections | None = None
        self._journal_lock = threading.Lock()
        self._journal_fd: int | None = None

    @property
    def endpoint(self) -> str:
        """The base URL for clients, without a trailing slash; RuntimeError when not started."""
        if self._connections is None:
            raise RuntimeError("the emulator is not started")
        host, port = self._connections.address
        return f"http://{host}:{port}{API_PREFIX}"

    def now(self) -> datetime:
        """The cloud's time, which its ``Date`` header has too."""
        return self._cloud.now()

    def start(self) -> None:
        """Make the journal, bind, and serve in a background thread; OSError when the port is taken."""
        self._append("")
        self._connections = Connections(
            self._address, self.handle, now=self.now, request_timeout_s=self._request_timeout_s
        )
        self._connections.start()

    def stop(self) -> None:
        """Stop serving and end all connections; the cloud and its workers are left alone."""
        if self._connections is not None:
            self._connections.stop()
            self._connections = None
        with self._journal_lock:
            if self._journal_fd is not None:
                os.close(self._journal_fd)
                self._journal_fd = None

    def handle(self, request: Request) -> Answer:
        """Answer one request and journal it; what is wrong with it is in the answer, never an exception."""
        request_id = f"{next(self._request_ids):016x}"
        path, _, query_text = request.target.partition("?")
        query = parse_qs(query_text, keep_blank_values=True) if query_text else {}
        body: Json | None = None
        rate: Rate | None = None
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
                rate = self._spend()
                status, payload = self._routes.answer(request.method, path, query, body)
        except ApiError as error:
            status, payload = error.status, envelope(error)
        except Exception:
            # The client needs an answer, the log the traceback.
            log.exception("the lab's API could not answer %s %s", request.method, path)
            status, payload = 500, envelope(ApiError(500, "server_error", "see the log of the lab"))
        mutates = self._cloud.mutations() > before
        said: Json = {"query": query, "body": body or None}
        if extra is not None:
            said = {name: _digest(value) if value else None for name, value in said.items()}
            mutates = request.method != "GET" and status < 400
        elif body and body.get("user_data") is not None:
            said["body"] = {**body, "user_data": _digest(body["user_data"])}
        self._note(request, path, {**said, **self.remarks(payload)}, status, request_id, mutates)
        return Answer(status, payload, request_id, rate or self._budget.look())

    def remarks(self, payload: object) -> Json:  # noqa: ARG002 - for those who have something to say
        """What else the journal is to have of the request that this thread is answering with ``payload``."""
        return {}

    def _authenticate(self, request: Request) -> None:
        sent = request.headers.get("authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(sent, self._authorization):
            raise ApiError(401, "unauthorized", "unable to authenticate")

    def _spend(self) -> Rate:
        granted, rate = self._budget.take()
        if not granted:
            raise ApiError(429, "rate_limit_exceeded", f"limit of {rate.limit} requests per hour reached")
        return rate

    def _note(self, request: Request, path: str, said: Json, status: int, request_id: str, mutates: bool) -> None:
        if self._journal_file is None:
            return
        entry = {
            "ts": self._cloud.now().isoformat(),
            "method": request.method,
            "path": path,
            "status": status,
            "userAgent": request.headers.get("user-agent"),
            "requestId": request_id,
            "mutates": mutates,
            **said,
        }
        try:
            self._append(json.dumps(entry) + "\n")
        except OSError:
            log.exception("the journal of the lab's API lacks a request")  # what it did is done: it gets its answer

    def _append(self, line: str) -> None:
        if self._journal_file is None:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        with self._journal_lock:
            if self._journal_fd is None:
                self._journal_fd = os.open(self._journal_file, flags, PRIVATE_FILE)
            # One write per line: a killed lab leaves whole lines.
            os.write(self._journal_fd, line.encode())


def _json_object(raw: bytes) -> Json:
    if not raw.strip():
        return {}
    try:
        body = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "json_error", "the body is not JSON") from error
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise ApiError(400, "json_error", "the body is not a JSON object")
    return body


def _no_number(text: str) -> Json:
    raise ValueError(f"{text} is not JSON")


def _digest(value: object) -> Json:
    raw = value.encode(errors="surrogatepass") if isinstance(value, str) else json.dumps(value, sort_keys=True).encode()
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
