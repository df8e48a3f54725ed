"""Workers: lease a job, run its kind's handler under heartbeats, and say what became of it.

A worker may be killed at any instruction: its lease runs out, and the job is leased again while it has attempts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from clawdlets_ops.errors import ClawdletsError, StoreError
from clawdlets_ops.orchestrator.jobs import Canceled, Clock, Fatal, Job, Json, Kind, Later, LeaseLost, Retry, Stopping
from clawdlets_ops.orchestrator.queue import Ack, NoSuchJob, Queue

log = logging.getLogger("clf.worker")

POLL_S = 1.0
HEARTBEATS_PER_LEASE = 3
STORE_PAUSE_S = 5.0


@dataclass
class LeaseContext:
    """A Context over the queue; see ``jobs.Context``."""

    queue: Queue
    job: Job
    lease_s: int
    clock: Clock
    stopping: threading.Event
    worker: str
    cleaning_up: bool = False
    lost: bool = False

    def check(self) -> None:
        """Renew the lease; Canceled or LeaseLost."""
        if self.lost:
            raise LeaseLost(self.job.job_id)
        ack = self.queue.heartbeat(self.job, self.lease_s)
        if ack is Ack.LEASE_LOST:
            self.lost = True
            raise LeaseLost(self.job.job_id)
        if ack is Ack.CANCEL_REQUESTED and not self.cleaning_up:
            raise Canceled(self.job.job_id)
        if self.stopping.is_set() and not self.cleaning_up:
            raise Stopping(self.job.job_id)

    def remember(self, **facts: Json) -> Mapping[str, Json]:
        """Merge into the job's state, durably."""
        state = self.queue.remember(self.job, facts)
        if state is None:
            self.lost = True
            raise LeaseLost(self.job.job_id)
        self.job = replace(self.job, state=state)
        return state

    def note(self, message: str) -> None:
        """An event of the job."""
        self.queue.note(self.job, message)

    def sleep(self, seconds: float) -> None:
        """Wait with the lease kept."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            (self.stopping.wait if not self.cleaning_up else time.sleep)(min(left, 1.0))
        self.check()

    def task_result(self) -> Json | None:
        """What the machine sent back."""
        return self.queue.get(self.job.job_id).task_result


class Worker:
    """One worker. ``run_one`` is a step of its loop, for tests and for a process that is not to stay."""

    def __init__(self, queue: Queue, kinds: Iterable[Kind], *, name: str, clock: Clock) -> None:
        self._queue = queue
        self._kinds = {kind.name: kind for kind in kinds}
        self._leases = {kind.name: kind.lease_s for kind in self._kinds.values()}
        self._name = name
        self._clock = clock
        self.stopping = threading.Event()

    def run(self, *, poll_s: float = POLL_S, wake: threading.Event | None = None) -> None:
        """Work until ``stopping`` is set; ``wake`` says that there may be something to do before ``poll_s`` is over."""
        while not self.stopping.is_set():
            try:
                busy = self.run_one()
            except StoreError as error:
                log.error("worker %s: %s", self._name, error)
                self.stopping.wait(STORE_PAUSE_S)
                continue
            if not busy:
                (wake or self.stopping).wait(poll_s)
                if wake is not None:
                    wake.clear()

    def run_one(self) -> bool:
        """Lease a job and see it through; False when none is due."""
        job = self._queue.lease(self._name, self._leases)
        if job is None:
            return False
        kind = self._kinds[job.kind]
        context = LeaseContext(self._queue, job, kind.lease_s, self._clock, self.stopping, self._name)
        with _heartbeats(context):
            self._see_through(kind, context)
        return True

    def _see_through(self, kind: Kind, context: LeaseContext) -> None:
        job = context.job
        try:
            if job.cancel_requested:
                raise Canceled(job.job_id)
            result = kind.handler(job, context)
            if self._queue.complete(job, result) is Ack.CANCEL_REQUESTED:
                raise Canceled(job.job_id)
        except Canceled:
            self._clean_up(kind, context)
        except Stopping:
            self._queue.release(job)
        except (LeaseLost, NoSuchJob):
            log.warning("job %s: another worker has it now, attempt %d is given up", job.job_id, job.attempt)
        except Fatal as error:
            self._queue.fail(job, str(error), retry=False)
        except Later as error:
            self._queue.put_off(job, str(error), after_ms=int((error.after_s or 0) * 1000))
        except Retry as error:
            after_ms = None if error.after_s is None else int(error.after_s * 1000)
            self._queue.fail(job, str(error), after_ms=after_ms)
        except StoreError:
            raise
        except Exception as error:
            self._queue.fail(job, _told(error))
            log.warning("job %s (%s), attempt %d: %s", job.job_id, job.kind, job.attempt, _told(error))

    def _clean_up(self, kind: Kind, context: LeaseContext) -> None:
        context.cleaning_up = True
        try:
            if kind.clean_up is not None:
                kind.clean_up(context.job, context)
        except (LeaseLost, Stopping):
            return  # leased again when this lease is over
        except StoreError:
            raise
        except Exception as error:
            self._queue.fail(context.job, f"clean-up after the cancel: {_told(error)}")
            return
        self._queue.canceled(context.job)


def _told(error: Exception) -> str:
    """Our own errors hold no secret; of a stranger's only the type is told."""
    if isinstance(error, ClawdletsError):
        return error.what if not error.where else f"{error.where}: {error.what}"
    if isinstance(error, Retry | Fatal):
        return str(error)
    return f"the handler failed ({type(error).__name__})"


class _heartbeats:
    """Renews the lease while the handler is at work, so that a long call needs no attention to it."""

    def __init__(self, context: LeaseContext) -> None:
        self._context = context
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"clf-lease-{context.job.job_id[:8]}", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        context = self._context
        while not self._done.wait(context.lease_s / HEARTBEATS_PER_LEASE):
            try:
                if context.queue.heartbeat(context.job, context.lease_s) is Ack.LEASE_LOST:
                    context.lost = True
                    return
            except StoreError as error:
                log.error("job %s: no heartbeat: %s", context.job.job_id, error)


def start_workers(
    count: int, make: Callable[[str], Worker], *, name: str, **how: Any
) -> list[tuple[Worker, threading.Thread]]:
    """``count`` workers, each in a thread of its own; end them by ``stopping`` and ``join``."""
    started = []
    for number in range(count):
        worker = make(f"{name}/{number}")
        thread = threading.Thread(target=worker.run, kwargs=how, name=f"clf-worker-{number}", daemon=True)
        thread.start()
        started.append((worker, thread))
    return started
