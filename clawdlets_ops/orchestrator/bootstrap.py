"""The tailnet listener's API: what a machine may have once, and what it sends back once.

``GET /v1/cattle/env`` with ``Authorization: Bearer <token>`` and ``X-Clf-Server-Id: <id>`` answers
``{"ok":true,"env":{…},"result":{"path":"/v1/cattle/result","token":"…"}}``. ``X-Clf-Fetch-Id: <8 to 64 letters or digits>``, the
same for every retry of one fetch, makes a fetch whose answer was lost repeatable for a minute. ``POST /v1/cattle/result`` with the
result's own token and a JSON object answers ``{"ok":true}``, and the machine may go.

Errors are ``{"ok":false,"error":{"message":…}}``: 401 not good (no reason is given), 503 try again, 500 the host lacks something (the
token stays good), 413, 415, 429. Plain HTTP: the tailnet is the encryption, and the listener is on no other address.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from clawdlets_ops.errors import ClawdletsError, OrchestratorError, StoreError
from clawdlets_ops.orchestrator.app import Answer, read_object, reply
from clawdlets_ops.orchestrator.jobs import FINISHED, Json
from clawdlets_ops.orchestrator.queue import NoSuchJob, Queue
from clawdlets_ops.orchestrator.tailnode import NodeOf
from clawdlets_ops.orchestrator.tokens import Asker, Grant, Purpose, Refused, Tokens
from clawdlets_ops.orchestrator.vending import Vending

log = logging.getLogger("clf.bootstrap")

T = TypeVar("T")

RESULT_BYTES = 65_536
RESULT_TTL_S = 8 * 24 * 3600
RESULT_PATH = "/v1/cattle/result"
TRIES = 10
TRIES_PER_S = 0.5
REMEMBERED = 10_000
FETCH_ID = re.compile(r"[A-Za-z0-9]{8,64}")
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


class RateLimit:
    """A bucket of ``tries`` for each address, filled at ``per_s``; the least used addresses are forgotten first."""

    def __init__(
        self, tries: int = TRIES, per_s: float = TRIES_PER_S, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._tries = tries
        self._per_s = per_s
        self._monotonic = monotonic
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, address: str) -> bool:
        """Whether ``address`` may try now; counts the try."""
        now = self._monotonic()
        left, at = self._left.pop(address, (float(self._tries), now))
        left = min(self._tries, left + (now - at) * self._per_s)
        allowed = left >= 1
        self._left[address] = (left - 1 if allowed else left, now)
        while len(self._left) > REMEMBERED:
            self._left.popitem(last=False)
        return allowed


def make_bootstrap_app(
    tokens: Tokens,
    queue: Queue,
    vending: Vending,
    node_of: NodeOf,
    *,
    on_result: Callable[[], object] = lambda: None,
    result_bytes: int = RESULT_BYTES,
    rate: RateLimit | None = None,
) -> Starlette:
    """The ASGI application; its server puts the asking ``address`` into the request's state (``serving``)."""
    api = _Bootstrap(tokens, queue, vending, node_of, on_result, result_bytes, rate or RateLimit())
    app = Starlette(
        routes=[
            Route("/healthz", api.health, methods=["GET"]),
            Route("/v1/cattle/env", api.environment, methods=["GET"]),
            Route(RESULT_PATH, api.result, methods=["POST"]),
        ],
        exception_handlers={
            Answer: _refuse,
            HTTPException: _http,
            ClientDisconnect: _gone,
            StoreError: _store_failed,
            Exception: _bug,
        },
    )
    app.router.redirect_slashes = False
    return app


class _Bootstrap:
    def __init__(
        self,
        tokens: Tokens,
        queue: Queue,
        vending: Vending,
        node_of: NodeOf,
        on_result: Callable[[], object],
        result_bytes: int,
        rate: RateLimit,
    ) -> None:
        self._tokens = tokens
        self._queue = queue
        self._vending = vending
        self._node_of = node_of
        self._on_result = on_result
        self._result_bytes = result_bytes
        self._rate = rate

    async def health(self, _: Request) -> Response:
        return _reply({"ok": True})

    async def environment(self, request: Request) -> Response:
        return await run_in_threadpool(self._environment, request)

    def _environment(self, request: Request) -> Response:
        token, asker = self._asker(request)

        def prepare(grant: Grant) -> tuple[Grant, Mapping[str, str]]:
            if self._queue.get(grant.job_id).status in FINISHED:
                raise Refused("job-ended")
            return grant, {name: value.reveal() for name, value in self._vending.environment(grant).items()}

        grant, env = self._redeem(token, Purpose.ENVIRONMENT, asker, prepare)
        own = replace(grant, purpose=Purpose.RESULT, env_keys=(), public_env={}, address=asker.address)
        result_token = self._tokens.issue(own, ttl_s=RESULT_TTL_S)
        return _reply({"ok": True, "env": env, "result": {"path": RESULT_PATH, "token": result_token.reveal()}})

    async def result(self, request: Request) -> Response:
        token, asker = await run_in_threadpool(self._asker, request)
        body = await read_object(request, self._result_bytes)
        grant = await run_in_threadpool(self._take_result, token, asker, body)
        log.info("result of job %s taken from %s", grant.job_id, asker.address)
        self._on_result()
        return _reply({"ok": True})

    def _take_result(self, token: str, asker: Asker, body: Mapping[str, Json]) -> Grant:
        def prepare(grant: Grant) -> Grant:
            self._queue.put_task_result(grant.job_id, body)  # the first counts; then the token is used up
            return grant

        return self._redeem(token, Purpose.RESULT, asker, prepare)

    def _asker(self, request: Request) -> tuple[str, Asker]:
        address = str(request.scope["state"]["address"])
        if not self._rate.allows(address):
            log.warning("token of %s: refused (too many tries)", address)
            raise Answer(429, "too many tries", retry_s=5)
        scheme, _, token = request.headers.get("authorization", "").replace("\t", " ").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            log.warning("token of %s: refused (missing)", address)
            raise Answer(401, "missing bearer token")
        server = request.headers.get("x-clf-server-id", "")
        fetch = request.headers.get("x-clf-fetch-id", "")
        client = request.client
        try:
            node = self._node_of(address, client.port if client else 0)
        except OrchestratorError as error:
            log.error("token of %s: not judged: %s", address, error)
            raise Answer(503, "who you are cannot be established now", retry_s=2) from None
        return token.strip(), Asker(
            address=str(ipaddress.ip_address(address)),
            node=node,
            server_id=int(server) if server.isascii() and server.isdigit() and len(server) < 19 else None,
            fetch_id=fetch if FETCH_ID.fullmatch(fetch) else "",
        )

    def _redeem(self, token: str, purpose: Purpose, asker: Asker, prepare: Callable[[Grant], T]) -> T:
        """Every try is logged, and none with its token."""
        who = f"{asker.address} ({asker.node or 'node not asked'}, server {asker.server_id})"
        try:
            answer = self._tokens.redeem(token, purpose, asker, prepare)
        except Refused as refused:
            log.warning("%s token of %s: refused (%s)", purpose, who, refused.reason)
            if refused.reason == "not-bound":
                raise Answer(503, "this server is not known yet", retry_s=2) from None
            raise Answer(401, "invalid/expired token") from None
        except NoSuchJob:
            log.warning("%s token of %s: refused (no such job)", purpose, who)
            raise Answer(401, "invalid/expired token") from None
        except StoreError:
            raise
        except ClawdletsError as error:
            log.error("%s token of %s: kept, as the answer cannot be made: %s", purpose, who, error)
            raise Answer(500, error.what) from None
        log.info("%s token of %s: redeemed", purpose, who)
        return answer


def _reply(content: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return reply(content, status, {**HEADERS, **(headers or {})})


def _error(message: str) -> Json:
    return {"ok": False, "error": {"message": message}}


async def _refuse(_: Request, error: Exception) -> Response:
    if not isinstance(error, Answer):
        raise error
    return _reply(_error(error.message), error.status, error.headers)


async def _http(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    words = {404: "not found", 405: "method not allowed"}
    return _reply(_error(words.get(error.status_code, str(error.detail))), error.status_code, error.headers)


async def _gone(_: Request, error: Exception) -> Response:
    del error
    return _reply(_error("the body was cut off"), 400)


async def _store_failed(_: Request, error: Exception) -> Response:
    log.error("%s", error)
    return _reply(_error("the store cannot be used now"), 503, {"retry-after": "5"})


async def _bug(_: Request, error: Exception) -> Response:
    log.error("a request failed (%s)", type(error).__name__)
    return _reply(_error("internal error"), 500)
