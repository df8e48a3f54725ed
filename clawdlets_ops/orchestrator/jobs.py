"""What a job is, what a kind of job needs, and what a handler is given. Nothing here touches a store.

A kind is registered once and says three things: how a payload is judged (fully, when it is asked for), what does the work,
and what undoes it when the job is canceled::

    Kind("cattle.spawn", validate=..., handler=spawn, clean_up=delete_server, max_attempts=3, lease_s=120)

Handlers run at least once: a worker may be killed at any instruction, and the job is leased again. What a handler is about to do
in the world it first writes down with ``context.remember``, and on a later attempt it looks for it (``job.state``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

Json = Any
"""A value as json.loads returns it."""

compact: Callable[[Json], str] = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
"""JSON in as few characters as it takes."""

Clock = Callable[[], int]
"""Milliseconds since the epoch."""

BACKOFF_FIRST_MS = 5_000
BACKOFF_MAX_MS = 300_000
LEASE_MIN_S = 5
LEASE_MAX_S = 3600
MAX_ATTEMPTS = 20


class Status(StrEnum):
    """The peer's words. A job whose attempts are used up is ``failed``; its last event is then ``dead``."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELED = "canceled"


FINISHED = (Status.DONE, Status.FAILED, Status.CANCELED)


@dataclass(frozen=True)
class Job:
    """A job as stored. Times are milliseconds since the epoch; ``state`` is what its handlers wrote down so far.

    ``lease_id`` is new with every lease: what a worker says about a job counts only under the lease it was given.
    ``task_result`` is what the machine itself sent back.
    """

    job_id: str
    kind: str
    payload: Mapping[str, Json]
    requester: str
    idempotency_key: str
    status: Status
    priority: int
    run_at: int
    created_at: int
    updated_at: int
    attempt: int
    max_attempts: int
    lease_id: str | None = None
    lease_until: int | None = None
    worker: str | None = None
    cancel_requested: bool = False
    last_error: str = ""
    result: Json | None = None
    state: Mapping[str, Json] = field(default_factory=dict)
    finished_at: int | None = None
    task_result: Json | None = None


@dataclass(frozen=True)
class Event:
    """Something that happened to a job: enqueue, claim, note, ack, retry, fail, dead, cancel."""

    at: int
    type: str
    message: str
    attempt: int


@dataclass(frozen=True)
class FieldError:
    """One thing that is wrong with a request: ``field`` is a key path such as ``payload.task.message``."""

    field: str
    message: str


class Retry(Exception):
    """A handler could not do it now; the job is tried again while it has attempts. The message never holds a secret."""

    def __init__(self, message: str, *, after_s: float | None = None) -> None:
        self.after_s = after_s
        super().__init__(message)


class Later(Retry):
    """As Retry, and the attempt does not count: nothing was tried, or what was begun stands and is seen to later. Who raises it
    bounds for how long."""


class Fatal(Exception):
    """A handler will never be able to do it; the job fails at once."""


class Canceled(Exception):
    """Raised by ``context.check`` when somebody asked for the job to be canceled: let it pass through."""


class Stopping(Exception):
    """Raised by ``context.check`` when the orchestrator is being stopped: let it pass through; the attempt does not count."""


class LeaseLost(Exception):
    """This worker no longer holds the job: do nothing more to the world, another worker may be at it."""


class Context(Protocol):
    """What a handler may do while it runs; every call may raise LeaseLost, ``check`` and ``sleep`` Canceled and Stopping too."""

    @property
    def clock(self) -> Clock:
        """Milliseconds since the epoch."""

    @property
    def worker(self) -> str:
        """This worker's name, for logs."""

    def check(self) -> None:
        """Renew the lease; Canceled when the job is to be canceled, LeaseLost when it is no longer ours."""

    def remember(self, **facts: Json) -> Mapping[str, Json]:
        """Merge ``facts`` into the job's state and return it. Durable before it returns: call it before the API call."""

    def note(self, message: str) -> None:
        """An event of the job, for people. Never a secret."""

    def sleep(self, seconds: float) -> None:
        """Wait with the lease kept; raises as ``check`` does, at once."""

    def task_result(self) -> Json | None:
        """What the machine sent back for this job, or None so far."""


class Handler(Protocol):
    """Does the work; what it returns (JSON) is the job's result. Retry, Later, Fatal, Canceled and LeaseLost mean what they say;
    any other exception is tried again while there are attempts, and only its type is told to the bot."""

    def __call__(self, job: Job, context: Context) -> Json: ...


class Validate(Protocol):
    """All that is wrong with a payload that ``requester`` (a bot's name, or ``operator:<user>``) asks for; pure."""

    def __call__(self, payload: Mapping[str, Json], requester: str) -> Sequence[FieldError]: ...


class CleanUp(Protocol):
    """Undoes what a canceled job has done so far, by ``job.state``; called until it succeeds or attempts run out."""

    def __call__(self, job: Job, context: Context) -> None: ...


@dataclass(frozen=True)
class Kind:
    """A kind of job. ``lease_s`` is how long a silent worker is believed to be at work (5 s to 1 h). ``max_unfinished`` is
    how many unfinished jobs of this kind one bot may have; ``max_unfinished_in_all`` all of them together; None is no bound."""

    name: str
    validate: Validate
    handler: Handler
    clean_up: CleanUp | None = None
    max_attempts: int = 3
    lease_s: int = 120
    max_unfinished: int | None = 100
    max_unfinished_in_all: int | None = 1000
    operators_only: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_attempts <= MAX_ATTEMPTS:
            raise ValueError(f"max_attempts of {self.name} is not in 1..{MAX_ATTEMPTS}")
        if not LEASE_MIN_S <= self.lease_s <= LEASE_MAX_S:
            raise ValueError(f"lease_s of {self.name} is not in {LEASE_MIN_S}..{LEASE_MAX_S}")


def backoff_ms(attempt: int) -> int:
    """How long after the failed attempt ``attempt`` (from 1) the next one may begin: 5 s doubled, at most 5 min."""
    return int(min(BACKOFF_FIRST_MS * 2 ** (attempt - 1), BACKOFF_MAX_MS))
