"""The rows of jobs and their events: how they are read, when one may be leased, and how they are changed.

Pieces of the queue's transactions; each takes the connection that the transaction runs on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from clawdlets_ops.orchestrator.jobs import BACKOFF_MAX_MS, LEASE_MAX_S, Job, Json, Status
from clawdlets_ops.orchestrator.store import events, jobs

IDEMPOTENCY_WINDOW_MS = 24 * 3600 * 1000
JUMP_GUARD_MS = LEASE_MAX_S * 1000 + 60_000
"""A lease further in the future than this was given before the clock was set back, and has run out."""


def digest(kind: str, payload: Mapping[str, Json]) -> str:
    """What an idempotency key is bound to."""
    canonical = json.dumps([kind, payload], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def row_of(connection: Connection, job_id: str, *, lock: bool = False) -> RowMapping | None:
    """The job's row, or None."""
    query = sa.select(jobs).where(jobs.c.job_id == job_id)
    return connection.execute(query.with_for_update() if lock else query).mappings().first()


def held(connection: Connection, job: Job) -> RowMapping | None:
    """The job's row, if ``job``'s lease is the one that counts. A lease that ran out counts until somebody else has it."""
    query = sa.select(jobs).where(
        jobs.c.job_id == job.job_id, jobs.c.lease_id == job.lease_id, jobs.c.status == Status.RUNNING.value
    )
    return connection.execute(query.with_for_update()).mappings().first()


def due(now: int) -> sa.ColumnElement[bool]:
    """Waits, and need not any more. Not by its time alone, for the clock may have been set back: what was due when it was asked
    for, or given back, still is (who is put off has a time after the last change), and what was begun is never put off further than the longest backoff."""
    begun = sa.or_(jobs.c.attempt > 0, jobs.c.state_json != "{}")
    return sa.and_(
        jobs.c.status == Status.QUEUED.value,
        sa.or_(
            jobs.c.run_at <= now,
            sa.and_(jobs.c.run_at <= jobs.c.created_at, jobs.c.run_at <= jobs.c.updated_at),
            sa.and_(begun, jobs.c.run_at > now + BACKOFF_MAX_MS),
        ),
    )


def lease_ran_out(now: int) -> sa.ColumnElement[bool]:
    """Is at work, by a worker of whom nothing was heard in time."""
    return sa.and_(
        jobs.c.status == Status.RUNNING.value,
        sa.or_(jobs.c.lease_until <= now, jobs.c.lease_until > now + JUMP_GUARD_MS),
    )


def used_up(now: int) -> sa.Select[Any]:
    """The jobs whose last attempt's lease ran out."""
    query = sa.select(jobs).where(lease_ran_out(now), jobs.c.attempt >= jobs.c.max_attempts)
    return query.with_for_update(skip_locked=True)


def bury(connection: Connection, row: RowMapping, now: int) -> None:
    """The last attempt's worker is gone: the job is dead, or canceled when that was asked for."""
    message = f"the worker was lost in attempt {row['attempt']} of {row['max_attempts']}"
    ended = Status.FAILED if row["cancel_requested_at"] is None else Status.CANCELED
    finish(connection, row["job_id"], now, ended, last_error=message)
    write_event(connection, row["job_id"], now, "dead", message, row["attempt"])


def change(connection: Connection, job_id: str, now: int, **values: Any) -> None:
    """Set these columns."""
    connection.execute(jobs.update().where(jobs.c.job_id == job_id).values(updated_at=now, **values))


def finish(connection: Connection, job_id: str, now: int, status: Status, **values: Any) -> None:
    """The job has ended."""
    change(connection, job_id, now, status=status.value, finished_at=now, lease_id=None, lease_until=None, **values)


def write_event(connection: Connection, job_id: str, now: int, kind: str, message: str, attempt: int) -> None:
    """Something happened to the job."""
    row = {"job_id": job_id, "at": now, "type": kind, "message": message, "attempt": attempt}
    connection.execute(events.insert(), row)


def bound_to_key(connection: Connection, requester: str, key: str, now: int) -> RowMapping | None:
    """The job that the key stands for; after a day the key is free again. A key from the future is of a clock set back."""
    mine = sa.and_(jobs.c.requester == requester, jobs.c.idempotency_key == key)
    row = connection.execute(sa.select(jobs).where(mine)).mappings().first()
    if row is not None and row["created_at"] <= now - IDEMPOTENCY_WINDOW_MS:
        connection.execute(jobs.update().where(mine).values(idempotency_key=""))
        return None
    return row


def job_of(row: Mapping[str, Any] | RowMapping) -> Job:
    """The job in a row."""
    return Job(
        job_id=row["job_id"],
        kind=row["kind"],
        payload=json.loads(row["payload_json"]),
        requester=row["requester"],
        idempotency_key=row["idempotency_key"],
        status=Status(row["status"]),
        priority=row["priority"],
        run_at=row["run_at"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        attempt=row["attempt"],
        max_attempts=row["max_attempts"],
        lease_id=row["lease_id"],
        lease_until=row["lease_until"],
        worker=row["worker"],
        cancel_requested=row["cancel_requested_at"] is not None,
        last_error=row["last_error"],
        result=None if row["result_json"] is None else json.loads(row["result_json"]),
        state=json.loads(row["state_json"]),
        finished_at=row["finished_at"],
        task_result=None if row["task_result_json"] is None else json.loads(row["task_result_json"]),
    )
