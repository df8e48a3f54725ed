"""A bot's side of the socket: what ``clf`` does, and what a Python program may use. Needs the standard library alone."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any
from urllib.parse import quote, urlencode

from clawdlets_ops.errors import OrchestratorError
from clawdlets_ops.orchestrator.unixhttp import TooLarge, ask

RESPONSE_BYTES = 4_194_304
"""A job shows its payload, and its result twice, which may have 1 MiB (``cattle.maxResultBytes``)."""
TIMEOUT_S = 10.0
TIMEOUT_MIN_S = 0.25
TIMEOUT_MAX_S = 60.0
POLL_S = 1.0
FINISHED = ("done", "failed", "canceled")


class Exit(IntEnum):
    """How ``clf`` ends, as the peer's: OTHER also when a wait ran out, JOB also for a job that failed or is not there."""

    OK = 0
    OTHER = 1
    USER = 2
    UNREACHABLE = 3
    JOB = 4


class ClientError(OrchestratorError):
    """The orchestrator refused, or is not there; ``exit`` is how a program should end."""

    def __init__(self, what: str, *, exit: Exit, where: str = "", fix: str = "", fields: Sequence[Any] = ()) -> None:
        self.exit = exit
        self.fields = tuple(fields)
        super().__init__(what, where=where, fix=fix)


@dataclass(frozen=True)
class Client:
    """The orchestrator behind ``socket_path``."""

    socket_path: str
    timeout_s: float = TIMEOUT_S

    def enqueue(
        self,
        kind: str,
        payload: Mapping[str, Any],
        *,
        idempotency_key: str = "",
        run_at: str = "",
        priority: int = 0,
    ) -> str:
        """The id of the job, which is durable now."""
        body: dict[str, Any] = {"protocolVersion": 1, "kind": kind, "payload": payload}
        optional = {"idempotencyKey": idempotency_key, "runAt": run_at, "priority": priority}
        body |= {name: value for name, value in optional.items() if value}
        return str(self._ask("POST", "/v1/jobs/enqueue", body)["jobId"])

    def list_jobs(self, *, status: str = "", kind: str = "", requester: str = "", limit: int = 50) -> list[Any]:
        """Summaries, the newest first."""
        given = {"status": status, "kind": kind, "requester": requester, "limit": limit}
        query = urlencode({name: value for name, value in given.items() if value})
        return list(self._ask("GET", f"/v1/jobs?{query}")["jobs"])

    def show(self, job_id: str) -> Mapping[str, Any]:
        """The job with its payload."""
        found: Mapping[str, Any] = self._ask("GET", f"/v1/jobs/{quote(job_id, safe='')}")["job"]
        return found

    def cancel(self, job_id: str) -> None:
        """Ask for the job to be canceled."""
        self._ask("POST", f"/v1/jobs/{quote(job_id, safe='')}/cancel", {})

    def wait(
        self,
        job_id: str,
        *,
        timeout_s: float,
        sleep: Callable[[float], None] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> Mapping[str, Any]:
        """The job once it has ended; ClientError OTHER when it has not within ``timeout_s``."""
        deadline = monotonic() + timeout_s
        while True:
            job = self.show(job_id)
            if job["status"] in FINISHED:
                return job
            if monotonic() >= deadline:
                raise ClientError(
                    f"the job is still {job['status']} after {timeout_s:g} s", exit=Exit.OTHER, where=job_id
                )
            sleep(min(POLL_S, max(0.0, deadline - monotonic())))

    def _ask(self, method: str, target: str, body: Any = None) -> Mapping[str, Any]:
        timeout_s = max(TIMEOUT_MIN_S, min(self.timeout_s, TIMEOUT_MAX_S))
        try:
            answer = ask(
                self.socket_path,
                method,
                target,
                body=None if body is None else json.dumps(body).encode(),
                headers={} if body is None else {"content-type": "application/json"},
                timeout_s=timeout_s,
                limit_bytes=RESPONSE_BYTES,
            )
        except (FileNotFoundError, ConnectionRefusedError, PermissionError) as error:
            fix = (
                "is this user in the group clf-bots?"
                if isinstance(error, PermissionError)
                else "is clf-orchestrator up?"
            )
            what = f"cannot be reached ({error.strerror})"
            raise ClientError(what, exit=Exit.UNREACHABLE, where=self.socket_path, fix=fix) from None
        except TimeoutError:
            raise ClientError(f"no answer in {timeout_s:g} s", exit=Exit.OTHER, where=self.socket_path) from None
        except TooLarge:
            raise ClientError(f"the answer has {RESPONSE_BYTES} bytes or more", exit=Exit.OTHER) from None
        except (OSError, http.client.HTTPException) as error:
            raise ClientError(f"broke off ({type(error).__name__})", exit=Exit.OTHER, where=self.socket_path) from None
        try:
            content = json.loads(answer.body)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise ClientError(f"answered with status {answer.status} and no JSON object", exit=Exit.OTHER)
        if answer.status == 200:
            return content
        given = content.get("error")
        error_part: Mapping[str, Any] = given if isinstance(given, dict) else {}
        raise ClientError(
            str(error_part.get("message", f"status {answer.status}")),
            exit=_exit(answer.status, target),
            fields=error_part.get("fields", ()),
        )


def _exit(status: int, target: str) -> Exit:
    if status in (404, 409) and target != "/v1/jobs/enqueue":
        return Exit.JOB
    return Exit.USER if 400 <= status < 500 else Exit.OTHER
