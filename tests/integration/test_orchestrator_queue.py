"""The queue on a real SQLite file: leases, attempts, cancel, idempotency, and what the disk and the clock may do to it."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.errors import StoreError
from clawdlets_ops.orchestrator.app import LIST_RESULTS_BYTES, overview
from clawdlets_ops.orchestrator.jobs import (
    Canceled,
    Context,
    Fatal,
    Job,
    Kind,
    Later,
    Retry,
    Status,
    Stopping,
    backoff_ms,
)
from clawdlets_ops.orchestrator.queue import (
    KEEP_MS,
    Ack,
    IdempotencyConflict,
    NoSuchJob,
    NotCancelable,
    Queue,
    TooMany,
)
from clawdlets_ops.orchestrator.rows import IDEMPOTENCY_WINDOW_MS
from clawdlets_ops.orchestrator.store import Store, open_sqlite
from clawdlets_ops.orchestrator.worker import Worker

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

START_MS = 1_700_000_000_000
LEASES = {"work": 60}


class HandClock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.now = START_MS

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def queue(store: Store, clock: HandClock) -> Queue:
    return Queue(store, clock)


def leased(queue: Queue, worker: str = "w") -> Job:
    job = queue.lease(worker, LEASES)
    assert job is not None
    return job


def test_a_job_is_asked_for_leased_and_done(queue: Queue, clock: HandClock) -> None:
    job_id = queue.enqueue("work", {"a": [1, "ü"], "unknown": None}, requester="scout")
    job = leased(queue)
    assert (job.job_id, job.attempt, job.status, job.payload) == (
        job_id,
        1,
        Status.RUNNING,
        {"a": [1, "ü"], "unknown": None},
    )
    assert queue.lease("other", LEASES) is None
    assert queue.complete(job, {"ok": 1}) is Ack.TAKEN
    done = queue.get(job_id)
    assert (done.status, done.result, done.finished_at, done.lease_id) == (Status.DONE, {"ok": 1}, clock.now, None)
    assert [event.type for event in queue.events(job_id)] == ["enqueue", "claim", "ack"]


def test_what_is_due_comes_by_priority_then_by_time(queue: Queue, clock: HandClock) -> None:
    late = queue.enqueue("work", {}, requester="a", run_at=clock.now + 1000)
    first = queue.enqueue("work", {}, requester="a")
    clock.now += 1
    second = queue.enqueue("work", {}, requester="a")
    urgent = queue.enqueue("work", {}, requester="a", priority=5)
    other = queue.enqueue("other-kind", {}, requester="a", priority=9)
    assert [leased(queue).job_id for _ in range(3)] == [urgent, first, second]
    assert queue.lease("w", LEASES) is None
    clock.now += 1000
    assert leased(queue).job_id == late
    assert queue.get(other).status is Status.QUEUED


def test_attempts_end_also_when_it_is_the_lease_that_runs_out(queue: Queue, clock: HandClock) -> None:
    job_id = queue.enqueue("work", {}, requester="a", max_attempts=2)
    for attempt in (1, 2):
        assert leased(queue).attempt == attempt
        assert queue.lease("other", LEASES) is None
        clock.now += 60_000
    assert queue.lease("other", LEASES) is None
    dead = queue.get(job_id)
    assert dead.status is Status.FAILED
    assert dead.last_error == "the worker was lost in attempt 2 of 2"
    assert [event.type for event in queue.events(job_id)][-1] == "dead"


def test_a_retry_waits_longer_each_time_and_then_is_dead(queue: Queue, clock: HandClock) -> None:
    job_id = queue.enqueue("work", {}, requester="a", max_attempts=3)
    for attempt, wait in ((1, 5_000), (2, 10_000)):
        queue.fail(leased(queue), "not now")
        assert queue.get(job_id).run_at == clock.now + wait == clock.now + backoff_ms(attempt)
        clock.now += wait - 1
        assert queue.lease("w", LEASES) is None
        clock.now += 1
    queue.fail(leased(queue), "not now")
    assert queue.get(job_id).status is Status.FAILED
    assert backoff_ms(60) == 300_000


def test_a_heartbeat_keeps_the_lease_and_an_old_lease_has_no_say(queue: Queue, clock: HandClock) -> None:
    queue.enqueue("work", {}, requester="a")
    old = leased(queue, "first")
    clock.now += 59_000
    assert queue.heartbeat(old, 60) is Ack.TAKEN
    clock.now += 59_000
    assert queue.lease("second", LEASES) is None
    clock.now += 1_000
    new = leased(queue, "second")
    assert new.attempt == 2
    for say in (
        lambda: queue.heartbeat(old, 60),
        lambda: queue.complete(old, 1),
        lambda: queue.fail(old, "late"),
        lambda: queue.release(old),
        lambda: queue.canceled(old),
    ):
        assert say() is Ack.LEASE_LOST
    assert queue.remember(old, {"server": 1}) is None
    assert queue.complete(new, 2) is Ack.TAKEN
    assert queue.complete(new, 3) is Ack.LEASE_LOST
    assert queue.get(new.job_id).result == 2


def test_state_survives_the_worker(queue: Queue, clock: HandClock) -> None:
    queue.enqueue("work", {}, requester="a")
    first = leased(queue)
    queue.remember(first, {"name": "cattle-x"})
    assert queue.remember(first, {"serverId": 7}) == {"name": "cattle-x", "serverId": 7}
    clock.now += 60_000
    assert leased(queue).state == {"name": "cattle-x", "serverId": 7}


def test_the_same_key_is_the_same_job_for_a_day_and_another_payload_is_refused(queue: Queue, clock: HandClock) -> None:
    first = queue.enqueue("work", {"a": 1, "b": 2}, requester="a", idempotency_key="k")
    assert queue.enqueue("work", {"b": 2, "a": 1}, requester="a", idempotency_key="k") == first
    with pytest.raises(IdempotencyConflict):
        queue.enqueue("work", {"a": 2}, requester="a", idempotency_key="k")
    with pytest.raises(IdempotencyConflict):
        queue.enqueue("other", {"a": 1, "b": 2}, requester="a", idempotency_key="k")
    assert queue.enqueue("work", {"a": 2}, requester="b", idempotency_key="k") != first
    clock.now += IDEMPOTENCY_WINDOW_MS - 1
    assert queue.enqueue("work", {"a": 1, "b": 2}, requester="a", idempotency_key="k") == first
    clock.now += 1
    assert queue.enqueue("work", {"a": 2}, requester="a", idempotency_key="k") != first


def test_fifty_at_once_with_one_key_make_one_job(queue: Queue) -> None:
    barrier = threading.Barrier(50)
    made: list[str] = []

    def ask() -> None:
        barrier.wait()
        made.append(queue.enqueue("work", {"a": 1}, requester="a", idempotency_key="k"))

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 50
    assert len(set(made)) == 1


def test_caps_hold_for_one_bot_and_for_all(queue: Queue) -> None:
    caps = {"max_unfinished": 2, "max_unfinished_in_all": 3}
    for _ in range(2):
        queue.enqueue("work", {}, requester="a", **caps)
    with pytest.raises(TooMany, match="a has 2"):
        queue.enqueue("work", {}, requester="a", **caps)
    queue.enqueue("work", {}, requester="b", **caps)
    with pytest.raises(TooMany, match="there are 3"):
        queue.enqueue("work", {}, requester="b", **caps)
    queue.complete(leased(queue), None)
    queue.enqueue("work", {}, requester="b", **caps)


def test_asking_and_canceling_does_not_fill_the_store(queue: Queue, clock: HandClock) -> None:
    for _ in range(20 * 2):
        queue.cancel(queue.enqueue("work", {}, requester="a", max_unfinished=2))
    with pytest.raises(TooMany, match="a has asked for 40 work jobs within an hour"):
        queue.enqueue("work", {}, requester="a", max_unfinished=2)
    assert queue.enqueue("work", {}, requester="b", max_unfinished=2)
    assert queue.enqueue("other", {}, requester="a", max_unfinished=2)
    queue.cancel(queue.enqueue("work", {}, requester="a"))  # whom nothing bounds
    clock.now -= 7_200_000
    queue.cancel(queue.enqueue("work", {}, requester="a", max_unfinished=2))
    clock.now += 7_200_000 + 3_600_001
    queue.cancel(queue.enqueue("work", {}, requester="a", max_unfinished=2))


def test_a_job_nobody_had_is_canceled_at_once_and_not_twice(queue: Queue) -> None:
    job_id = queue.enqueue("work", {}, requester="a")
    with pytest.raises(NoSuchJob):
        queue.cancel(job_id, requester="b")
    queue.cancel(job_id, requester="a")
    assert queue.get(job_id).status is Status.CANCELED
    with pytest.raises(NotCancelable, match="canceled"):
        queue.cancel(job_id)
    assert queue.lease("w", LEASES) is None


def test_a_running_job_is_canceled_by_its_worker(queue: Queue) -> None:
    job_id = queue.enqueue("work", {}, requester="a")
    job = leased(queue)
    queue.cancel(job_id)
    queue.cancel(job_id)
    assert (queue.get(job_id).status, queue.get(job_id).cancel_requested) == (Status.RUNNING, True)
    assert queue.heartbeat(job, 60) is Ack.CANCEL_REQUESTED
    assert queue.complete(job, {"server": 1}) is Ack.CANCEL_REQUESTED
    assert queue.canceled(job) is Ack.TAKEN
    assert queue.get(job_id).status is Status.CANCELED


def test_a_list_has_room_for_some_results_and_says_which_it_left_out(queue: Queue, clock: HandClock) -> None:
    for size in (10, 200_000, 300_000, 20):  # the newest comes first
        clock.now += 1
        queue.enqueue("work", {}, requester="a")
        queue.complete(leased(queue), {"text": "x" * size})
    clock.now += 1
    queue.enqueue("work", {}, requester="a")
    shown = overview(queue.list_jobs())
    assert ["result" in one for one in shown] == [False, True, False, True, True]
    assert [one.get("resultLeftOut", False) for one in shown] == [False, False, True, False, False]
    assert len(json.dumps(shown)) < LIST_RESULTS_BYTES + 5 * 1000
    assert queue.get(shown[2]["jobId"]).result == {"text": "x" * 300_000}


def test_others_jobs_are_not_to_be_seen(queue: Queue) -> None:
    mine, theirs = queue.enqueue("work", {}, requester="a"), queue.enqueue("work", {}, requester="b")
    assert [job.job_id for job in queue.list_jobs(requester="a")] == [mine]
    assert {job.job_id for job in queue.list_jobs()} == {mine, theirs}
    with pytest.raises(NoSuchJob):
        queue.get(theirs, requester="a")


def test_lists_are_filtered_and_newest_first(queue: Queue, clock: HandClock) -> None:
    ids = []
    for number in range(4):
        clock.now += 1
        ids.append(queue.enqueue("work" if number % 2 else "play", {}, requester="a"))
    assert [job.job_id for job in queue.list_jobs(limit=3)] == ids[:0:-1]
    assert {job.job_id for job in queue.list_jobs(kinds=["play"])} == {ids[0], ids[2]}
    queue.cancel(ids[3])
    assert [job.job_id for job in queue.list_jobs(statuses=[Status.CANCELED])] == [ids[3]]


def test_prune_forgets_what_ended_long_ago_and_nothing_else(queue: Queue, store: Store, clock: HandClock) -> None:
    ended, open_one = queue.enqueue("work", {}, requester="a"), queue.enqueue("later", {}, requester="a")
    queue.complete(leased(queue), None)
    clock.now += KEEP_MS
    assert queue.prune().jobs == 0
    clock.now += 1
    assert queue.prune(keep_ms=KEEP_MS).jobs == 1
    with pytest.raises(NoSuchJob):
        queue.get(ended)
    assert queue.events(ended) == []
    assert queue.get(open_one).status is Status.QUEUED
    assert queue.prune(keep_ms=0).jobs == 0


def test_what_was_pruned_is_gone_from_the_files(queue: Queue, store: Store, path: Path, clock: HandClock) -> None:
    needle = b"canary-in-a-payload-9d1f"

    def found() -> list[str]:
        return [file.name for file in path.parent.iterdir() if needle in file.read_bytes()]

    for _ in range(20):
        queue.enqueue("work", {"message": needle.decode() * 50}, requester="a")
    assert found()
    for _ in range(20):
        queue.complete(leased(queue), None)
    clock.now += KEEP_MS + 1
    assert queue.prune().jobs == 20
    store.tidy()
    assert found() == []
    # a fresh connection sets the file's own defaults, so this is what the file says of itself
    assert sqlite3.connect(path).execute("PRAGMA auto_vacuum").fetchone() == (2,)


@pytest.mark.parametrize("jump", [-10 * 3600_000, 10 * 3600_000], ids=["back", "ahead"])
def test_a_clock_that_jumps_neither_loses_nor_stops_a_job(queue: Queue, clock: HandClock, jump: int) -> None:
    """The queue itself, with a clock that does jump (the daemon's does not, see clock.SteadyClock)."""
    job_id = queue.enqueue("work", {}, requester="a", max_attempts=3)
    held = leased(queue)
    clock.now += jump
    taken_over = queue.lease("other", LEASES)
    if jump < 0:
        # the lease lies further ahead than any lease can: it was given before the clock was set back
        assert taken_over is not None
    assert taken_over is not None
    assert queue.complete(held, 1) is Ack.LEASE_LOST
    queue.fail(taken_over, "again")
    clock.now += jump
    if jump > 0 or queue.get(job_id).run_at > clock.now + backoff_ms(9):
        again = leased(queue)
        assert again.attempt == 3
        assert queue.complete(again, 2) is Ack.TAKEN


# --- the disk ---


def test_files_are_private_from_the_first_moment(path: Path) -> None:
    before = os.umask(0)
    try:
        store = open_sqlite(path)
        Queue(store, HandClock()).enqueue("work", {}, requester="a")
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in path.parent.iterdir()}
        store.close()
    finally:
        os.umask(before)
    assert modes == {"state.sqlite": "0o600", "state.sqlite-wal": "0o600", "state.sqlite-shm": "0o600"}


@pytest.mark.parametrize("wider", ["", "state.sqlite", "state.sqlite-wal", "state.sqlite-shm"])
def test_wider_modes_are_refused_at_the_start(path: Path, wider: str) -> None:
    store = open_sqlite(path)
    try:
        Queue(store, HandClock()).enqueue("work", {}, requester="a")
        victim = path.parent / wider if wider else path.parent
        victim.chmod(0o750 if not wider else 0o644)
        with pytest.raises(StoreError, match=r"chmod [67]00") as caught:
            open_sqlite(path)
        assert caught.value.reason == "modes"
        victim.chmod(0o700 if not wider else 0o600)
        open_sqlite(path).close()
    finally:
        store.close()


def test_a_link_in_the_place_of_the_database_is_refused(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes(b"")
    path.symlink_to(path.parent / "elsewhere")
    with pytest.raises(StoreError):
        open_sqlite(path)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE clf_schema SET version = 2", "schema version 2"),
        ("UPDATE clf_schema SET version = 0", "schema version 0"),
        ("DELETE FROM clf_schema", "schema version none"),
        ("DROP TABLE clf_schema", "somebody else's"),
    ],
)
def test_an_unknown_version_is_refused_and_left_alone(path: Path, statement: str, words: str) -> None:
    open_sqlite(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=words) as caught:
        open_sqlite(path)
    assert caught.value.reason == "unknown"
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["garbage", "torn"])
def test_a_damaged_database_is_named_so(path: Path, damage: str) -> None:
    store = open_sqlite(path)
    queue = Queue(store, HandClock())
    for _ in range(200):
        queue.enqueue("work", {"text": "x" * 200}, requester="a")
    store.close()
    size = path.stat().st_size
    with path.open("r+b") as handle:
        if damage == "garbage":
            handle.write(b"not a database, not a database..")
        else:
            handle.seek(4096)
            handle.write(b"\xff" * (size - 8192))
    with pytest.raises(StoreError, match=r"damaged|not a SQLite database") as caught:
        open_sqlite(path)
    assert caught.value.reason == "corrupt"


def test_a_locked_database_is_an_error_in_words_and_then_works_again(path: Path) -> None:
    store = open_sqlite(path, busy_timeout_ms=50)
    queue = Queue(store, HandClock())
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked") as caught:
        queue.enqueue("work", {"secret": "canary-payload"}, requester="a")
    assert caught.value.reason == "busy"
    assert "canary" not in str(caught.value)
    other.execute("ROLLBACK")
    other.close()
    assert queue.enqueue("work", {}, requester="a")
    store.close()


def test_a_locked_database_keeps_nobody_waiting_for_the_others(path: Path) -> None:
    """Many at once have one answer, after one wait."""
    store = open_sqlite(path, busy_timeout_ms=200)
    queue = Queue(store, HandClock())
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    commits = 0
    real = store._committer.commit

    def commit(batch: Any) -> Any:
        nonlocal commits
        commits += 1
        return real(batch)

    store._committer.commit = commit  # type: ignore[method-assign]
    with store._turn:  # the writer waits, so that all are there
        waiting = [store.submit(queue._asking("work", {}, requester="a")[1]) for _ in range(50)]
    assert {future.exception().reason for future in waiting} == {"busy"}  # type: ignore[union-attr]
    assert commits <= 2  # the first of them may have been alone
    other.execute("ROLLBACK")
    other.close()
    assert queue.enqueue("work", {}, requester="a")
    store.close()


def test_a_full_disk_is_an_error_in_words_and_then_works_again(path: Path) -> None:
    """SQLite's own bound on pages answers as a full disk does (SQLITE_FULL)."""
    store = open_sqlite(path)
    queue = Queue(store, HandClock())
    queue.enqueue("work", {}, requester="a")

    def pages(statement: str) -> Any:
        return store.write(lambda connection: connection.exec_driver_sql(statement).scalar())

    used = pages("PRAGMA page_count")
    pages(f"PRAGMA max_page_count = {used}")
    with pytest.raises(StoreError, match="full") as caught:
        queue.enqueue("work", {"text": "x" * 100_000}, requester="a")
    assert caught.value.reason == "full"
    assert len(queue.list_jobs()) == 1
    pages("PRAGMA max_page_count = 1000000")
    queue.enqueue("work", {"text": "x" * 100_000}, requester="a")
    assert len(queue.list_jobs()) == 2
    store.close()


def test_a_read_only_database_is_an_error_in_words(path: Path) -> None:
    store = open_sqlite(path)
    store.write(lambda connection: connection.exec_driver_sql("PRAGMA query_only = ON"))
    with pytest.raises(StoreError, match="cannot be written") as caught:
        Queue(store, HandClock()).enqueue("work", {}, requester="a")
    assert caught.value.reason == "readonly"
    store.close()


def test_a_failing_companion_does_not_take_others_down(store: Store, queue: Queue) -> None:
    """Many at once, some of which fail or are refused: every good one is there, and only those."""
    futures: list[Any] = []
    asking = ThreadPoolExecutor(60)
    for number in range(60):
        if number % 3 == 0:
            futures.append(store.submit(lambda connection: connection.exec_driver_sql("no such statement")))
        elif number % 3 == 1:
            futures.append(asking.submit(queue.enqueue, "work", {"n": number}, requester="a", max_unfinished=10))
        else:
            futures.append(asking.submit(queue.enqueue, "work", {"n": number}, requester="b"))
    asking.shutdown()
    errors = [type(future.exception()).__name__ for future in futures if future.exception() is not None]
    assert errors.count("StoreError") == 20
    assert errors.count("TooMany") == 10
    assert len(queue.list_jobs(requester="a", limit=500)) == 10
    assert len(queue.list_jobs(requester="b", limit=500)) == 20


# --- workers ---


def kind(handler: Any, **more: Any) -> Kind:
    return Kind("work", validate=lambda payload, requester: (), handler=handler, **more)


def test_a_worker_says_what_became_of_a_job(queue: Queue, clock: HandClock) -> None:
    def handler(job: Job, context: Context) -> Any:
        if job.payload["how"] == "retry":
            raise Retry("try later", after_s=7)
        if job.payload["how"] == "fatal":
            raise Fatal("never")
        if job.payload["how"] == "bug":
            raise ValueError("canary-secret-value")
        context.check()
        context.note("half-way")
        return {"how": job.payload["how"]}

    worker = Worker(queue, [kind(handler)], name="w", clock=clock)
    ids = {how: queue.enqueue("work", {"how": how}, requester="a") for how in ("done", "retry", "fatal", "bug")}
    while worker.run_one():
        pass
    found = {how: queue.get(job_id) for how, job_id in ids.items()}
    assert (found["done"].status, found["done"].result) == (Status.DONE, {"how": "done"})
    assert (found["retry"].status, found["retry"].run_at) == (Status.QUEUED, clock.now + 7000)
    assert (found["fatal"].status, found["fatal"].last_error) == (Status.FAILED, "never")
    assert (found["bug"].status, found["bug"].last_error) == (Status.QUEUED, "the handler failed (ValueError)")
    assert [event.message for event in queue.events(ids["done"])] == ["", "w", "half-way", ""]


@pytest.mark.parametrize("when", ["during", "too-late", "before", "given-back"])
def test_a_canceled_job_is_cleaned_up(queue: Queue, clock: HandClock, when: str) -> None:
    cleaned: list[Any] = []

    def handler(job: Job, context: Context) -> Any:
        context.remember(serverName="cattle-1")
        if when == "before":
            raise Retry("later", after_s=0)
        if when == "given-back":
            raise Stopping(job.job_id)
        queue.cancel(job.job_id)
        if when == "during":
            context.check()
            raise AssertionError("it goes on although it was canceled")
        return "made"

    def clean_up(job: Job, context: Context) -> None:
        context.check()
        cleaned.append(job.state)
        if len(cleaned) == 1:
            raise Retry("not now")

    worker = Worker(queue, [kind(handler, clean_up=clean_up)], name="w", clock=clock)
    job_id = queue.enqueue("work", {}, requester="a")
    assert worker.run_one()
    if when in ("before", "given-back"):
        queue.cancel(job_id)
        assert worker.run_one()
    clock.now += backoff_ms(2)
    assert worker.run_one()
    assert cleaned == [{"serverName": "cattle-1"}] * 2
    assert queue.get(job_id).status is Status.CANCELED


def test_a_worker_that_lost_its_lease_changes_nothing(queue: Queue, clock: HandClock) -> None:
    def handler(job: Job, context: Context) -> Any:
        clock.now += 120_000
        taken = queue.lease("other", LEASES)
        assert taken is not None
        context.check()
        raise AssertionError("it goes on without a lease")

    worker = Worker(queue, [kind(handler)], name="w", clock=clock)
    job_id = queue.enqueue("work", {}, requester="a")
    worker.run_one()
    assert (queue.get(job_id).status, queue.get(job_id).worker) == (Status.RUNNING, "other")


def test_a_worker_that_is_stopped_gives_the_job_back_uncounted(queue: Queue, clock: HandClock) -> None:
    def handler(job: Job, context: Context) -> Any:
        worker.stopping.set()
        context.sleep(30)
        raise AssertionError("it goes on although it was stopped")

    worker = Worker(queue, [kind(handler)], name="w", clock=clock)
    job_id = queue.enqueue("work", {}, requester="a", max_attempts=1)
    worker.run_one()
    assert (queue.get(job_id).status, queue.get(job_id).attempt) == (Status.QUEUED, 0)
    assert leased(queue).job_id == job_id


def test_a_job_that_can_only_be_put_off_costs_no_attempt_and_says_why_once(queue: Queue, clock: HandClock) -> None:
    def handler(job: Job, context: Context) -> Any:
        raise Later("there is no room", after_s=20)

    worker = Worker(queue, [kind(handler)], name="w", clock=clock)
    job_id = queue.enqueue("work", {}, requester="a", max_attempts=1)
    for _ in range(5):
        assert worker.run_one()
        assert not worker.run_one()
        job = queue.get(job_id)
        assert (job.status, job.attempt, job.last_error) == (Status.QUEUED, 0, "there is no room")
        assert job.run_at == clock.now + 20_000
        clock.now += 20_000
    assert [event.type for event in queue.events(job_id)].count("wait") == 1


@pytest.mark.parametrize("begun", [False, True])
def test_a_clock_that_was_set_back_puts_off_nothing_that_was_due(queue: Queue, clock: HandClock, begun: bool) -> None:
    job_id = queue.enqueue("work", {}, requester="a", max_attempts=1)
    if begun:
        clock.now += 600_000
        job = leased(queue)
        queue.remember(job, {"serverId": 7})
        queue.release(job)
    planned = queue.enqueue("work", {}, requester="a", run_at=clock.now + 7_200_000)
    clock.now -= 3_600_000
    assert leased(queue).job_id == job_id
    assert queue.lease("w", LEASES) is None
    assert queue.get(planned).status is Status.QUEUED


def test_a_clock_that_was_set_back_takes_no_wait_away(queue: Queue, clock: HandClock) -> None:
    job_id = queue.enqueue("work", {}, requester="a", max_attempts=5)
    clock.now -= 3_600_000
    queue.put_off(leased(queue), "there is no room", after_ms=20_000)
    assert queue.lease("w", LEASES) is None
    clock.now += 20_000
    queue.fail(leased(queue), "not now")
    assert queue.lease("w", LEASES) is None
    clock.now += backoff_ms(1)
    assert leased(queue).job_id == job_id


def test_a_clean_up_while_the_worker_is_stopped_waits_where_it_says_so(queue: Queue, clock: HandClock) -> None:
    beats: list[int] = []
    worker: Worker

    def clean_up(job: Job, context: Context) -> None:
        worker.stopping.set()
        context.sleep(0.5)

    class Counting(Queue):
        def heartbeat(self, job: Job, lease_s: int) -> Ack:
            beats.append(1)
            return super().heartbeat(job, lease_s)

    counting = Counting(queue._store, clock)
    job_id = counting.enqueue("work", {}, requester="a")
    counting.remember(leased(counting), {"serverId": 7})
    counting.cancel(job_id)
    clock.now += 120_000
    worker = Worker(counting, [replace(kind(lambda job, context: None), clean_up=clean_up)], name="w", clock=clock)
    assert worker.run_one()
    assert queue.get(job_id).status is Status.CANCELED
    assert len(beats) <= 3


def test_heartbeats_go_on_while_a_handler_takes_no_notice(queue: Queue, store: Store) -> None:
    released = threading.Event()
    beats: list[int] = []

    class Counting(Queue):
        def heartbeat(self, job: Job, lease_s: int) -> Ack:
            beats.append(1)
            if len(beats) == 2:
                released.set()
            return super().heartbeat(job, lease_s)

    def handler(job: Job, context: Context) -> Any:
        assert released.wait(30)
        return None

    clock = HandClock()
    counting = Counting(store, clock)
    worker = Worker(counting, [kind(handler, lease_s=5)], name="w", clock=clock)
    counting.enqueue("work", {}, requester="a")
    assert worker.run_one()
    assert len(beats) >= 2


def test_canceled_and_stopping_are_not_ordinary_errors() -> None:
    assert not issubclass(Canceled, Retry)
    assert not issubclass(Stopping, Retry)
