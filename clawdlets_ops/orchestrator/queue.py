"""Jobs in the store: enqueue, lease, heartbeat, complete, fail, cancel, prune.

Semantics, where they differ from the peer's (facts, section 7.5): a lease that ran out counts as an attempt, so a job whose
workers die is dead after ``max_attempts``; what a worker says counts only under the lease it holds; a running job is canceled by
its worker, after its clean-up; an idempotency key is bound to its payload, for a day.

The clock is passed in. Several workers share one SQLite file through one process, or one PostgreSQL through many
(``FOR UPDATE SKIP LOCKED``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from clawdlets_ops.orchestrator.batch import Operation, Refusal, Row
from clawdlets_ops.orchestrator.jobs import (
    BACKOFF_MAX_MS,
    FINISHED,
    LEASE_MAX_S,
    LEASE_MIN_S,
    MAX_ATTEMPTS,
    Clock,
    Event,
    Job,
    Json,
    Status,
    backoff_ms,
    compact,
)
from clawdlets_ops.orchestrator.rows import (
    IDEMPOTENCY_WINDOW_MS,
    bound_to_key,
    bury,
    change,
    digest,
    due,
    finish,
    held,
    job_of,
    lease_ran_out,
    row_of,
    used_up,
    write_event,
)
from clawdlets_ops.orchestrator.store import Ids, Store, events, jobs

HOUR_MS = 3_600_000
AN_HOUR = 20
"""How many times as many jobs a requester may ask for within an hour as it may have unfinished."""
KEEP_MS = 7 * 24 * 3600 * 1000
ERROR_CHARS = 500


class IdempotencyConflict(Refusal):
    """The key was used for another payload within the last day."""


class TooMany(Refusal):
    """The requester, or all together, have as many unfinished jobs of this kind as they may."""


class NoSuchJob(Refusal):
    """There is none, or none that this requester may see."""


class NotCancelable(Refusal):
    """The job has ended; ``status`` says how."""

    def __init__(self, status: str) -> None:
        self.status = status
        super().__init__(status)


class Ack(Enum):
    """What became of a worker's word about a job."""

    TAKEN = "taken"
    LEASE_LOST = "lease lost"
    CANCEL_REQUESTED = "cancel requested"


@dataclass(frozen=True)
class Pruned:
    """What a prune removed."""

    jobs: int


class Queue:
    """Jobs in ``store``, by ``clock``."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._ids = Ids(clock)

    def now(self) -> int:
        """The time that counts here, in ms."""
        return self._clock()

    # --- asking ---

    def enqueue(self, kind: str, payload: Mapping[str, Json], *, requester: str, **how: Any) -> str:
        """The id of the new job, or of the same one asked for before; durable. See ``ask`` for ``how``."""
        job_id, operation = self._asking(kind, payload, requester=requester, **how)
        return self._store.submit(operation).result() or job_id

    async def ask(self, kind: str, payload: Mapping[str, Json], *, requester: str, **how: Any) -> str:
        """As ``enqueue``, in an event loop.

        ``how``: ``idempotency_key``, ``priority``, ``run_at`` (ms; None is now), ``max_attempts``, ``max_unfinished`` of this
        requester (and AN_HOUR times as many within an hour) and ``max_unfinished_in_all`` of this kind (None: as many as they
        like). IdempotencyConflict, TooMany.
        """
        job_id, operation = self._asking(kind, payload, requester=requester, **how)
        return await self._store.submit_here(operation) or job_id

    def _asking(
        self,
        kind: str,
        payload: Mapping[str, Json],
        *,
        requester: str,
        idempotency_key: str = "",
        priority: int = 0,
        run_at: int | None = None,
        max_attempts: int = 3,
        max_unfinished: int | None = None,
        max_unfinished_in_all: int | None = None,
    ) -> tuple[str, Operation[str | None] | Row]:
        """A new job's id, and what puts it into the store; the operation's answer is the id that counts, if it is another."""
        now = self._clock()
        job_id = self._ids()
        row = {
            "job_id": job_id,
            "kind": kind,
            "payload_json": compact(payload),
            "payload_digest": digest(kind, payload) if idempotency_key else "",
            "requester": requester,
            "idempotency_key": idempotency_key,
            "status": Status.QUEUED.value,
            "priority": priority,
            "run_at": now if run_at is None else max(now, run_at),
            "created_at": now,
            "updated_at": now,
            "attempt": 0,
            "max_attempts": max(1, min(max_attempts, MAX_ATTEMPTS)),
        }
        if not idempotency_key and max_unfinished is None and max_unfinished_in_all is None:
            return job_id, (jobs, row)

        def checked(connection: Connection) -> str | None:
            if idempotency_key:
                same = bound_to_key(connection, requester, idempotency_key, now)
                if same is not None:
                    if same["payload_digest"] != row["payload_digest"]:
                        raise IdempotencyConflict(same["job_id"])
                    return str(same["job_id"])
            _within_caps(connection, kind, requester, now, max_unfinished, max_unfinished_in_all)
            connection.execute(jobs.insert(), row)
            return None

        return job_id, checked

    def get(self, job_id: str, *, requester: str | None = None) -> Job:
        """The job; NoSuchJob also when it is another's and ``requester`` is named."""
        row = self._store.read(lambda connection: row_of(connection, job_id))
        if row is None or (requester is not None and row["requester"] != requester):
            raise NoSuchJob(job_id)
        return job_of(row)

    def list_jobs(
        self,
        *,
        requester: str | None = None,
        statuses: Sequence[Status] = (),
        kinds: Sequence[str] = (),
        limit: int = 50,
    ) -> list[Job]:
        """The newest jobs first; empty filters mean all."""
        query = sa.select(jobs).order_by(jobs.c.created_at.desc(), jobs.c.job_id).limit(limit)
        if requester is not None:
            query = query.where(jobs.c.requester == requester)
        if statuses:
            query = query.where(jobs.c.status.in_([status.value for status in statuses]))
        if kinds:
            query = query.where(jobs.c.kind.in_(list(kinds)))
        return self._store.read(lambda connection: [job_of(row) for row in connection.execute(query).mappings()])

    def events(self, job_id: str) -> list[Event]:
        """What happened to a job, in order. That it was asked for, its own row tells: a row less to be made durable."""
        query = sa.select(events).where(events.c.job_id == job_id).order_by(events.c.id)
        created = sa.select(jobs.c.created_at).where(jobs.c.job_id == job_id)

        def operation(connection: Connection) -> list[Event]:
            rows = connection.execute(query).mappings().all()
            told = [Event(row["at"], row["type"], row["message"], row["attempt"]) for row in rows]
            asked_at = connection.execute(created).scalar()
            if asked_at is not None and (not told or told[0].type != "enqueue"):  # older stores have that row
                told.insert(0, Event(asked_at, "enqueue", "", 0))
            return told

        return self._store.read(operation)

    def cancel(self, job_id: str, *, requester: str | None = None, by: str = "") -> None:
        """A job that no worker ever had is canceled at once; else its worker, or the next one, cleans up and cancels it.

        NoSuchJob, or NotCancelable when it has ended. Asked twice, the second changes nothing.
        """
        now = self._clock()

        def operation(connection: Connection) -> None:
            row = row_of(connection, job_id, lock=True)
            if row is None or (requester is not None and row["requester"] != requester):
                raise NoSuchJob(job_id)
            if row["status"] in FINISHED:
                raise NotCancelable(row["status"])
            if row["cancel_requested_at"] is not None:
                return
            # An attempt that was given back does not count, but what it wrote down may stand for something that is there.
            if row["status"] == Status.QUEUED and row["attempt"] == 0 and not json.loads(row["state_json"]):
                changes: dict[str, Any] = {"status": Status.CANCELED.value, "finished_at": now}
            else:
                changes = {"cancel_requested_at": now}
                if row["status"] == Status.QUEUED:
                    changes["run_at"] = now
            change(connection, job_id, now, **changes)
            write_event(connection, job_id, now, "cancel", f"asked for by {by or row['requester']}", row["attempt"])

        self._store.write(operation)

    # --- working ---

    def lease(self, worker: str, kinds: Mapping[str, int]) -> Job | None:
        """The next due job of one of ``kinds`` (name → seconds of the lease), now this worker's; None when none is due.

        Jobs whose last attempt's lease ran out are declared dead on the way.
        """
        now = self._clock()

        def operation(connection: Connection) -> Job | None:
            for spent in connection.execute(used_up(now)).mappings().all():
                bury(connection, spent, now)
            candidate = (
                sa.select(jobs)
                .where(sa.or_(due(now), lease_ran_out(now)), jobs.c.attempt < jobs.c.max_attempts)
                .where(jobs.c.kind.in_(list(kinds)))
                .order_by(jobs.c.priority.desc(), jobs.c.run_at, jobs.c.created_at, jobs.c.job_id)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            row = connection.execute(candidate).mappings().first()
            if row is None:
                return None
            lease_s = max(LEASE_MIN_S, min(kinds[row["kind"]], LEASE_MAX_S))
            changes = {
                "status": Status.RUNNING.value,
                "attempt": row["attempt"] + 1,
                "worker": worker,
                "lease_id": self._ids(),
                "lease_until": now + lease_s * 1000,
            }
            if row["status"] == Status.RUNNING:
                message = f"the lease of {row['worker']} ran out"
                write_event(connection, row["job_id"], now, "expire", message, row["attempt"])
            change(connection, row["job_id"], now, **changes)
            write_event(connection, row["job_id"], now, "claim", worker, row["attempt"] + 1)
            return job_of({**row, **changes, "updated_at": now})

        return self._store.write(operation)

    def heartbeat(self, job: Job, lease_s: int) -> Ack:
        """Hold the job for another ``lease_s`` seconds; says whether it is still ours and whether it is to be canceled."""
        now = self._clock()
        until = now + max(LEASE_MIN_S, min(lease_s, LEASE_MAX_S)) * 1000

        def operation(connection: Connection) -> Ack:
            row = held(connection, job)
            if row is None:
                return Ack.LEASE_LOST
            connection.execute(jobs.update().where(jobs.c.job_id == job.job_id).values(lease_until=until))
            return Ack.TAKEN if row["cancel_requested_at"] is None else Ack.CANCEL_REQUESTED

        return self._store.write(operation)

    def remember(self, job: Job, facts: Mapping[str, Json]) -> Mapping[str, Json] | None:
        """Merge ``facts`` into the job's state and return the whole; None when the lease is lost."""
        now = self._clock()

        def operation(connection: Connection) -> Mapping[str, Json] | None:
            row = held(connection, job)
            if row is None:
                return None
            state = {**json.loads(row["state_json"]), **facts}
            change(connection, job.job_id, now, state_json=json.dumps(state, separators=(",", ":")))
            return state

        return self._store.write(operation)

    def note(self, job: Job, message: str) -> None:
        """An event of the job, for people."""
        now = self._clock()
        self._store.write(
            lambda connection: write_event(connection, job.job_id, now, "note", message[:ERROR_CHARS], job.attempt)
        )

    def complete(self, job: Job, result: Json) -> Ack:
        """The job is done. CANCEL_REQUESTED: it is not, clean up and call ``canceled``."""
        now = self._clock()

        def operation(connection: Connection) -> Ack:
            row = held(connection, job)
            if row is None:
                return Ack.LEASE_LOST
            if row["cancel_requested_at"] is not None:
                return Ack.CANCEL_REQUESTED
            text = None if result is None else json.dumps(result, separators=(",", ":"))
            finish(connection, job.job_id, now, Status.DONE, result_json=text, last_error="")
            write_event(connection, job.job_id, now, "ack", "", job.attempt)
            return Ack.TAKEN

        return self._store.write(operation)

    def canceled(self, job: Job, message: str = "") -> Ack:
        """The job was canceled and nothing of it is left."""
        return self._end(job, Status.CANCELED, "cancel", message)

    def fail(self, job: Job, error: str, *, retry: bool = True, after_ms: int | None = None) -> Ack:
        """The attempt failed: tried again after a backoff while attempts are left (and ``retry``), else it is dead."""
        if not retry:
            return self._end(job, Status.FAILED, "fail", error)
        if job.attempt >= job.max_attempts:
            return self._end(job, None, "dead", error)
        wait_ms = backoff_ms(job.attempt) if after_ms is None else max(0, min(after_ms, BACKOFF_MAX_MS))
        return self._requeue(job, "retry", error, wait_ms, job.attempt)

    def release(self, job: Job) -> Ack:
        """The worker is being stopped: the job is due again at once, and the attempt does not count."""
        return self._requeue(job, "release", "the worker is being stopped", None, job.attempt - 1)

    def put_off(self, job: Job, why: str, *, after_ms: int) -> Ack:
        """Nothing was tried: the job is due again after a while, and the attempt does not count."""
        return self._requeue(job, "wait", why, max(0, min(after_ms, BACKOFF_MAX_MS)), job.attempt - 1)

    def _requeue(self, job: Job, event: str, message: str, wait_ms: int | None, attempt: int) -> Ack:
        """``wait_ms``: None is due whatever the clock says later. What a job waits for is an event once."""
        now = self._clock()
        told = message[:ERROR_CHARS]

        def operation(connection: Connection) -> Ack:
            if held(connection, job) is None:
                return Ack.LEASE_LOST
            change(
                connection,
                job.job_id,
                now,
                status=Status.QUEUED.value,
                run_at=min(now, job.created_at) if wait_ms is None else now + wait_ms,
                attempt=attempt,
                last_error=job.last_error if event == "release" else told,
                lease_id=None,
                lease_until=None,
                worker=None,
            )
            if event != "wait" or told != job.last_error:
                write_event(connection, job.job_id, now, event, told, job.attempt)
            return Ack.TAKEN

        return self._store.write(operation)

    def put_task_result(self, job_id: str, result: Json) -> None:
        """What the job's machine sent back; the first counts. NoSuchJob when there is none."""
        now = self._clock()
        text = json.dumps(result, separators=(",", ":"))

        def operation(connection: Connection) -> None:
            row = row_of(connection, job_id, lock=True)
            if row is None:
                raise NoSuchJob(job_id)
            if row["task_result_json"] is None:
                change(connection, job_id, now, task_result_json=text)
                write_event(connection, job_id, now, "result", f"{len(text.encode())} bytes", row["attempt"])

        self._store.write(operation)

    def prune(self, *, keep_ms: int = KEEP_MS) -> Pruned:
        """Forget jobs that ended more than ``keep_ms`` ago (never within the idempotency window), with their events."""
        before = self._clock() - max(keep_ms, IDEMPOTENCY_WINDOW_MS)
        statement = jobs.delete().where(jobs.c.finished_at.is_not(None), jobs.c.finished_at < before)
        removed = self._store.write(lambda connection: connection.execute(statement).rowcount)
        return Pruned(int(removed))

    def _end(self, job: Job, status: Status | None, event: str, message: str) -> Ack:
        now = self._clock()

        def operation(connection: Connection) -> Ack:
            row = held(connection, job)
            if row is None:
                return Ack.LEASE_LOST
            asked = row["cancel_requested_at"] is not None
            ended = status or (Status.CANCELED if asked else Status.FAILED)
            finish(connection, job.job_id, now, ended, last_error=message[:ERROR_CHARS])
            write_event(connection, job.job_id, now, event, message[:ERROR_CHARS], job.attempt)
            return Ack.TAKEN

        return self._store.write(operation)


def _within_caps(
    connection: Connection, kind: str, requester: str, now: int, mine: int | None, everyones: int | None
) -> None:
    """TooMany where there are as many as there may be; what has ended is stored for a while too, so a requester's jobs are
    counted by the hour as well."""

    def count(*where: sa.ColumnElement[bool]) -> int:
        query = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.kind == kind, *where)
        return int(connection.execute(query).scalar_one())

    unfinished = jobs.c.status.in_([Status.QUEUED.value, Status.RUNNING.value])
    of_requester = jobs.c.requester == requester
    if mine is not None:
        if count(unfinished, of_requester) >= mine:
            raise TooMany(f"{requester} has {mine} unfinished {kind} jobs, which is the most")
        if count(of_requester, jobs.c.created_at.between(now - HOUR_MS, now)) >= AN_HOUR * mine:
            raise TooMany(f"{requester} has asked for {AN_HOUR * mine} {kind} jobs within an hour, which is the most")
    if everyones is not None and count(unfinished) >= everyones:
        raise TooMany(f"there are {everyones} unfinished {kind} jobs, which is the most")
