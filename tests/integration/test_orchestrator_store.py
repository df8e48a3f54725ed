"""Group commit on a real SQLite file: what an event loop asks for in one turn, who commits it, and when callers are answered."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from clawdlets_ops.errors import StoreError
from clawdlets_ops.orchestrator import store as module
from clawdlets_ops.orchestrator.queue import Queue, TooMany
from clawdlets_ops.orchestrator.store import Ids, Store, open_sqlite

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

START_MS = 1_700_000_000_000
THREAD = "clf-store"


@pytest.fixture
def queue(store: Store) -> Queue:
    return Queue(store, lambda: START_MS)


@pytest.fixture
def commits(store: Store) -> Counter[str]:
    """Commits by the name of the thread that did them; reading ends with one of its own, and is not counted."""
    found: Counter[str] = Counter()

    @event.listens_for(store.engine, "commit")
    def _(connection: object) -> None:
        del connection
        found[threading.current_thread().name] += 1

    return found


async def ask(queue: Queue, how_many: int) -> list[str]:
    return await asyncio.gather(*(queue.ask("work", {"n": number}, requester="a") for number in range(how_many)))


def test_what_a_loop_asks_for_at_one_time_is_one_commit_of_its_own(queue: Queue, commits: Counter[str]) -> None:
    jobs = asyncio.run(ask(queue, 50))
    assert commits == {"MainThread": 1}
    assert {job.job_id for job in queue.list_jobs(limit=100)} == set(jobs)
    assert all(len(queue.events(job_id)) == 1 for job_id in jobs)


def test_a_connection_that_has_gone_stale_costs_nobody_his_answer(queue: Queue, store: Store) -> None:
    """As after a restart of PostgreSQL: the first commit meets the old connection."""
    real, failed = store._committer.commit, []

    def commit(batch: Any) -> Any:
        if not failed:
            failed.append(len(batch))
            raise StoreError("the database does not answer", reason="unreachable")
        return real(batch)

    store._committer.commit = commit  # type: ignore[method-assign]
    with store._turn:
        waiting = [store.submit(queue._asking("work", {}, requester="a")[1]) for _ in range(20)]
    assert [future.exception() for future in waiting] == [None] * 20
    assert len(failed) == 1


def test_an_answer_comes_after_the_commit(queue: Queue, path: Path) -> None:
    """Another connection sees the job by the time its caller is told of it."""
    other = sqlite3.connect(path)

    async def one() -> None:
        job_id = await queue.ask("work", {}, requester="a")
        assert other.execute("SELECT count(*) FROM jobs WHERE job_id = ?", (job_id,)).fetchone() == (1,)

    async def many() -> None:
        for _ in range(5):
            await asyncio.gather(*(one() for _ in range(20)))

    asyncio.run(many())
    other.close()


def test_a_bound_on_one_commit_holds(queue: Queue, commits: Counter[str]) -> None:
    asyncio.run(ask(queue, module.BATCH * 2 + 1))
    assert commits == {"MainThread": 3}
    assert len(queue.list_jobs(limit=10_000)) == module.BATCH * 2 + 1


def test_a_refused_and_a_failing_companion_do_not_take_others_down(queue: Queue, store: Store) -> None:
    async def all_at_once() -> list[str | BaseException]:
        good = [queue.ask("work", {"n": number}, requester="b") for number in range(10)]
        capped = [queue.ask("work", {"n": number}, requester="a", max_unfinished=3) for number in range(10)]
        bad = [store.submit_here(lambda connection: connection.exec_driver_sql("no such statement").scalar())]
        return list(await asyncio.gather(*good, *bad, *capped, return_exceptions=True))

    answers = asyncio.run(all_at_once())
    assert [type(answer) for answer in answers[:10]] == [str] * 10
    assert isinstance(answers[10], StoreError)
    assert Counter(type(answer) for answer in answers[11:]) == {str: 3, TooMany: 7}
    assert len(queue.list_jobs(limit=100)) == 13


def test_a_loop_does_not_wait_for_a_lock_the_thread_does(path: Path) -> None:
    store = open_sqlite(path, busy_timeout_ms=10_000)
    queue = Queue(store, lambda: START_MS)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

    async def asked_while_locked() -> tuple[float, str]:
        await queue.ask("work", {}, requester="a")
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.ensure_future(queue.ask("work", {}, requester="a"))
        longest, before = 0.0, time.monotonic()
        for _ in range(100):
            await asyncio.sleep(0.005)
            longest, before = max(longest, time.monotonic() - before), time.monotonic()
        assert not waiting.done()
        other.execute("ROLLBACK")
        return longest, await waiting

    longest, job_id = asyncio.run(asked_while_locked())
    assert longest < 5, "the loop stood still for the lock"
    assert queue.get(job_id).kind == "work"
    other.close()
    store.close()


def test_a_slow_disk_is_the_threads_for_a_while(
    queue: Queue, commits: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUICK_S", 0.0)  # every disk is slower than that
    monkeypatch.setattr(module, "THREAD_FOR_S", 3600.0)
    asyncio.run(ask(queue, 3))
    assert commits == {"MainThread": 1}
    asyncio.run(ask(queue, 3))
    assert commits["MainThread"] == 1
    assert commits[THREAD] >= 1


def test_a_loop_that_finds_the_thread_at_work_leaves_its_own_to_it(
    queue: Queue, store: Store, commits: Counter[str]
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(connection: object) -> None:
        del connection
        begun.set()
        assert go_on.wait(60)

    async def beside() -> str:
        first = store.submit(slow)
        assert await asyncio.to_thread(begun.wait, 60)
        asked = asyncio.ensure_future(queue.ask("work", {}, requester="a"))
        for _ in range(10):  # turns of the loop, of which it needs three to commit or to give up
            await asyncio.sleep(0)
        assert not asked.done()
        go_on.set()
        job_id = await asked
        first.result(60)
        return job_id

    job_id = asyncio.run(beside())
    assert queue.get(job_id).requester == "a"
    assert commits == {THREAD: 2}


def test_a_closed_store_says_so_in_a_loop_too(path: Path) -> None:
    store = open_sqlite(path)
    queue = Queue(store, lambda: START_MS)
    asyncio.run(ask(queue, 2))
    store.close()
    with pytest.raises(StoreError, match="closed"):
        asyncio.run(ask(queue, 1))


def test_ids_are_of_version_7_and_in_the_order_of_time() -> None:
    now = START_MS
    ids = Ids(lambda: now)
    found = []
    for _ in range(5000):
        found.append(ids())
        now += 1
    assert found == sorted(set(found))
    form = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
    assert all(form.fullmatch(one) for one in found)
    assert found[0].startswith(f"{START_MS:012x}"[:8])
    assert len({one[-12:] for one in found}) == 5000
    of_one_moment = Ids(lambda: START_MS)
    assert len({of_one_moment() for _ in range(5000)}) == 5000
    variants = Counter(one[19] for one in found)
    assert set(variants) == set("89ab"), "two of its bits are random"
