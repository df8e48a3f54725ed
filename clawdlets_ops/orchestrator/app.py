"""The unix socket's API: the peer's protocol, version 1, with its defects repaired (docs/reference/orchestrator.md).

Who asks comes from the connection (``identity``). A bot sees and cancels its own jobs; for it another's job is one that does
not exist. Everything is judged when it is asked for, and every fault is named with its field.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from clawdlets_ops.errors import StoreError
from clawdlets_ops.orchestrator.identity import Identify, Who
from clawdlets_ops.orchestrator.jobs import FieldError, Job, Json, Kind, Status, compact
from clawdlets_ops.orchestrator.queue import IdempotencyConflict, NoSuchJob, NotCancelable, Queue, TooMany

log = logging.getLogger("clf.api")

PROTOCOL = 1
BODY_BYTES = 262_144
LIST_DEFAULT = 50
LIST_MAX = 500
NESTING_MAX = 64
LIST_RESULTS_BYTES = 262_144
"""How much of a list may be results: a client reads an answer in one piece, and with a bound (``client``)."""
PRIORITY_MAX = 100
RUN_AT_MAX_MS = 30 * 24 * 3600 * 1000
KNOWN = ("protocolVersion", "requester", "idempotencyKey", "kind", "payload", "runAt", "priority")
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,200}")
STORE_STATUS = {"full": 507}


class Answer(Exception):
    """Ends a request with an error."""

    def __init__(
        self, status: int, message: str, fields: Iterable[FieldError] = (), *, retry_s: int = 0, close: bool = False
    ) -> None:
        self.status = status
        self.message = message
        self.fields = tuple(fields)
        self.headers = ({"retry-after": str(retry_s)} if retry_s else {}) | ({"connection": "close"} if close else {})
        super().__init__(message)


def make_app(
    queue: Queue, kinds: Iterable[Kind], identify: Identify, *, on_enqueued: Callable[[], object] = lambda: None
) -> ASGIApp:
    """The ASGI application. Its server puts the asking ``uid`` into the request's state (``serving``)."""
    api = _Api(queue, {kind.name: kind for kind in kinds}, identify, on_enqueued)
    app = Starlette(
        routes=[
            Route("/healthz", api.health, methods=["GET"]),
            Route("/v1/jobs/enqueue", api.enqueue, methods=["POST"]),
            Route("/v1/jobs", api.list_jobs, methods=["GET"]),
            Route("/v1/jobs/{job_id}", api.show, methods=["GET"]),
            Route("/v1/jobs/{job_id}/cancel", api.cancel, methods=["POST"]),
        ],
        exception_handlers={
            Answer: _refuse,
            StoreError: _store_failed,
            HTTPException: _http,
            ClientDisconnect: _gone,
            Exception: _bug,
        },
    )
    app.router.redirect_slashes = False

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        """Asking for a job is most of what is asked: it goes past the router, which matches every route in turn."""
        if scope["type"] != "http" or scope["path"] != "/v1/jobs/enqueue" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await api.enqueue(request)
        except Answer as error:
            response = await _refuse(request, error)
        except StoreError as error:
            response = await _store_failed(request, error)
        except ClientDisconnect as error:
            response = await _gone(request, error)
        except Exception as error:
            response = await _bug(request, error)
        await response(scope, receive, send)

    return called


def quiet(app: Any) -> Any:
    """``app``, whose bugs were answered with 500 and logged by type: a traceback could hold what a body held."""

    async def called(scope: Any, receive: Any, send: Any) -> None:
        with contextlib.suppress(Exception):
            await app(scope, receive, send)

    return called


class _Api:
    def __init__(
        self, queue: Queue, kinds: Mapping[str, Kind], identify: Identify, on_enqueued: Callable[[], object]
    ) -> None:
        self._queue = queue
        self._kinds = kinds
        self._identify = identify
        self._on_enqueued = on_enqueued

    async def health(self, _: Request) -> Response:
        await run_in_threadpool(partial(self._queue.list_jobs, limit=1))
        return reply({"ok": True})

    async def enqueue(self, request: Request) -> Response:
        who = self._who(request)
        body = await read_object(request, BODY_BYTES)
        kind, faults = self._judge(body, who)
        if faults or kind is None:
            raise Answer(400, "the request is not acceptable", faults)
        try:
            job_id = await self._queue.ask(
                kind.name,
                body["payload"],
                requester=who.name,
                idempotency_key=body.get("idempotencyKey", ""),
                priority=body.get("priority", 0),
                run_at=_parse_time(body["runAt"]) if body.get("runAt") else None,
                max_attempts=kind.max_attempts,
                max_unfinished=None if who.operator else kind.max_unfinished,
                max_unfinished_in_all=kind.max_unfinished_in_all,
            )
        except IdempotencyConflict as error:
            message = f"the idempotency key belongs to job {error} with another kind or payload"
            raise Answer(409, message, [FieldError("idempotencyKey", message)]) from None
        except TooMany as error:
            raise Answer(429, str(error), retry_s=30) from None
        self._on_enqueued()
        answer = b'{"protocolVersion":%d,"jobId":"%s"}' % (PROTOCOL, job_id.encode())  # an id needs no quoting
        return _Plain(answer, 200)

    async def list_jobs(self, request: Request) -> Response:
        who = self._who(request)
        asked = request.query_params
        scope = who.scope
        if requester := asked.get("requester", "").strip():
            if scope is not None and requester not in (who.name, who.user):
                raise Answer(
                    403, f"{who.name} sees its own jobs only", [FieldError("requester", f"you are {who.name}")]
                )
            scope = scope or requester
        statuses = _words(asked.get("status", ""))
        known = [status for status in Status if status.value in statuses]
        kinds = _words(asked.get("kind", ""))
        if statuses and not known:
            return reply({"protocolVersion": PROTOCOL, "jobs": []})
        limit = asked.get("limit", "")
        count = min(max(int(limit), 1), LIST_MAX) if limit.isascii() and limit.isdigit() and len(limit) < 9 else 0
        found = await run_in_threadpool(
            partial(
                self._queue.list_jobs,
                requester=scope,
                statuses=known,
                kinds=sorted(kinds),
                limit=count or (LIST_DEFAULT if not limit.isdigit() else LIST_MAX),
            )
        )
        return reply({"protocolVersion": PROTOCOL, "jobs": overview(found)})

    async def show(self, request: Request) -> Response:
        who = self._who(request)
        try:
            job = await run_in_threadpool(partial(self._queue.get, request.path_params["job_id"], requester=who.scope))
        except NoSuchJob:
            raise Answer(404, "job not found") from None
        shown = summary(job) | {"payload": job.payload}
        if job.task_result is not None:
            shown["taskResult"] = job.task_result
        return reply({"protocolVersion": PROTOCOL, "job": shown})

    async def cancel(self, request: Request) -> Response:
        who = self._who(request)
        await read_object(request, BODY_BYTES)
        job_id = request.path_params["job_id"]
        try:
            await run_in_threadpool(partial(self._queue.cancel, job_id, requester=who.scope, by=who.name))
        except NoSuchJob:
            raise Answer(404, "job not found") from None
        except NotCancelable as error:
            raise Answer(409, f"job not cancelable (status={error.status})") from None
        self._on_enqueued()
        return reply({"protocolVersion": PROTOCOL, "ok": True})

    def _who(self, request: Request) -> Who:
        uid = request.scope["state"]["uid"]
        who = self._identify(uid)
        if who is None:
            log.warning("refused: uid %d is neither a bot nor an operator", uid)
            raise Answer(403, "this user is neither a bot of this host nor an operator")
        return who

    def _judge(self, body: Mapping[str, Json], who: Who) -> tuple[Kind | None, list[FieldError]]:
        """The kind asked for, and everything that is wrong."""
        faults = [FieldError(name, "unknown field") for name in body if name not in KNOWN]
        if body.get("protocolVersion") != PROTOCOL or isinstance(body.get("protocolVersion"), bool):
            faults.append(FieldError("protocolVersion", f"must be {PROTOCOL}"))
        requester = body.get("requester", "")
        if not isinstance(requester, str):
            faults.append(FieldError("requester", "must be text"))
        elif not who.operator and requester not in ("", who.name, who.user):
            raise Answer(
                403, f"you are {who.name}, and ask for nobody else", [FieldError("requester", f"you are {who.name}")]
            )
        key = body.get("idempotencyKey", "")
        if not isinstance(key, str) or (key and not IDEMPOTENCY_KEY.fullmatch(key)):
            faults.append(FieldError("idempotencyKey", "must be 1 to 200 printable ASCII characters without spaces"))
        priority = body.get("priority", 0)
        if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > PRIORITY_MAX:
            faults.append(FieldError("priority", f"must be a whole number from -{PRIORITY_MAX} to {PRIORITY_MAX}"))
        faults += self._judge_time(body.get("runAt", ""))
        name = body.get("kind")
        kind = self._kinds.get(name) if isinstance(name, str) else None
        if kind is None or (kind.operators_only and not who.operator):
            mine = sorted(kind.name for kind in self._kinds.values() if who.operator or not kind.operators_only)
            faults.append(FieldError("kind", f"must be one of: {', '.join(mine) or 'none is served here'}"))
            kind = None
        payload = body.get("payload")
        if not isinstance(payload, dict):
            faults.append(FieldError("payload", "must be an object"))
        elif kind is not None:
            faults += kind.validate(payload, who.name)
        return kind, faults

    def _judge_time(self, value: Json) -> list[FieldError]:
        if value == "":
            return []
        try:
            at = _parse_time(value)
        except (TypeError, ValueError, OverflowError):
            return [FieldError("runAt", "must be a time such as 2030-01-31T12:00:00Z")]
        if at > self._queue.now() + RUN_AT_MAX_MS:
            return [FieldError("runAt", "must be within 30 days")]
        return []


async def read_object(request: Request, limit: int) -> dict[str, Json]:
    """The request's JSON object ({} for an empty body); Answer 400, 413 or 415. Its time is bounded in ``serving``."""
    kind, announced = b"", b""
    # Names are in lower case. To ask Headers for two of them costs as much as all the rest of this.
    for name, value in request.scope["headers"]:
        if name == b"content-type":
            kind = value
        elif name == b"content-length":
            announced = value
    if kind and kind.partition(b";")[0].strip().lower() != b"application/json":
        raise Answer(415, "the content type must be application/json")
    too_large = partial(Answer, 413, f"request body too large (limit {limit})", close=True)
    if announced.isdigit() and int(announced) > 2 * limit:
        raise too_large()
    parts, more = bytearray(), True
    while more:
        message = await request.receive()
        if message["type"] != "http.request":
            raise ClientDisconnect
        parts += message.get("body", b"")
        more = message.get("more_body", False)
        if len(parts) > 2 * limit:
            raise too_large()
    if len(parts) > limit:  # was read to its end, so that who sends a little too much is told, and not just cut off
        raise too_large()
    if not parts:
        return {}
    try:
        value = _DECODER.decode(parts.decode())
        if b"\\u" in parts:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except UnicodeError:
        raise Answer(400, "invalid JSON body: it is not Unicode text") from None
    except json.JSONDecodeError as error:
        raise Answer(400, f"invalid JSON body: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise Answer(400, f"invalid JSON body: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise Answer(400, "invalid JSON body: it must be an object")
    if parts.count(b"[") + parts.count(b"{") > NESTING_MAX and _nests_deeper(value, NESTING_MAX):
        raise Answer(400, f"invalid JSON body: it nests deeper than {NESTING_MAX}")
    return value


def _nests_deeper(value: Json, levels: int) -> bool:
    """Whether there are more than ``levels`` objects and arrays in one another. What is read here is written again with more
    around it, and must not be what the writer's own bound refuses."""
    layer = [value]
    for _ in range(levels):
        layer = [one for parent in layer for one in (parent.values() if isinstance(parent, dict) else parent)]
        layer = [one for one in layer if isinstance(one, dict | list)]
    return bool(layer)


def summary(job: Job) -> dict[str, Json]:
    """A job as lists show it."""
    shown: dict[str, Json] = {
        "jobId": job.job_id,
        "kind": job.kind,
        "status": job.status.value,
        "requester": job.requester,
        "idempotencyKey": job.idempotency_key,
        "createdAt": iso(job.created_at),
        "updatedAt": iso(job.updated_at),
        "runAt": iso(job.run_at),
        "attempt": job.attempt,
        "maxAttempts": job.max_attempts,
        "lastError": job.last_error,
    }
    if job.result is not None:
        shown["result"] = job.result
    if job.cancel_requested:
        shown["cancelRequested"] = True
    return shown


def overview(found: Iterable[Job], *, limit: int = LIST_RESULTS_BYTES) -> list[dict[str, Json]]:
    """Jobs as a list shows them. A result for which there is no room is not there, and ``resultLeftOut`` says so: the job itself
    shows it."""
    shown, left = [], limit
    for job in found:
        one = summary(job)
        if "result" in one:
            size = len(json.dumps(one["result"], ensure_ascii=False).encode(errors="surrogatepass"))
            if size > left:
                del one["result"]
                one["resultLeftOut"] = True
            else:
                left -= size
        shown.append(one)
    return shown


def iso(at_ms: int) -> str:
    """ISO 8601 with milliseconds, in UTC."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def reply(content: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Compact JSON."""
    body = compact(content).encode(errors="surrogatepass")
    if headers:
        return Response(body, status, headers, media_type="application/json")
    return _Plain(body, status)


class _Plain(Response):
    """JSON with the two headers that every answer has; Starlette's own way to them costs as much as all else about an answer."""

    def __init__(self, body: bytes, status: int) -> None:
        self.status_code, self.body, self.background = status, body, None
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]


def _words(text: str) -> set[str]:
    return {word.strip() for word in text.split(",") if word.strip()}


def _parse_time(text: str) -> int:
    at = datetime.fromisoformat(text)
    return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(
            f"{text[:20]} is larger than any number here"
        )  # it would be written as Infinity, which is not JSON
    return number


def _no_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)


def error_body(message: str, fields: Iterable[FieldError] = ()) -> dict[str, Json]:
    """The peer's form; ``fields`` is ours."""
    error: dict[str, Json] = {"message": message[:200]}
    if listed := [{"field": one.field, "message": one.message} for one in fields]:
        error["fields"] = listed
        error["message"] = f"{message}: {listed[0]['field']}: {listed[0]['message']}"[:200]
    return {"protocolVersion": PROTOCOL, "error": error}


async def _refuse(_: Request, error: Exception) -> Response:
    if not isinstance(error, Answer):
        raise error
    return reply(error_body(error.message, error.fields), error.status, error.headers)


async def _store_failed(_: Request, error: Exception) -> Response:
    if not isinstance(error, StoreError):
        raise error
    log.error("%s", error)
    headers = {"retry-after": "5"} if error.reason == "busy" else {}
    return reply(error_body(f"the store cannot be used: {error.what}"), STORE_STATUS.get(error.reason, 503), headers)


async def _http(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    words = {404: "not found", 405: "method not allowed"}
    return reply(error_body(words.get(error.status_code, str(error.detail))), error.status_code, error.headers)


async def _gone(_: Request, error: Exception) -> Response:
    del error
    return reply(error_body("the body was cut off"), 400)


async def _bug(_: Request, error: Exception) -> Response:
    log.error("a request failed (%s)", type(error).__name__)
    return reply(error_body("internal error"), 500)
