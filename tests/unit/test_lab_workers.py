"""The jobs of servers: in order for each, side by side for all."""

from __future__ import annotations

import threading

from clawdlets_ops.lab.workers import MOST_THREADS, Workers

WITHIN_S = 20.0


def test_a_servers_jobs_come_one_after_another_and_hold_no_other_server_up() -> None:
    workers, gate, other = Workers(), threading.Event(), threading.Event()
    done: list[int] = []

    def first() -> None:
        assert gate.wait(WITHIN_S)
        done.append(0)

    workers.submit(1, first)
    for number in range(1, 50):
        workers.submit(1, lambda number=number: done.append(number))  # type: ignore[misc]
    workers.submit(2, other.set)
    assert other.wait(WITHIN_S)
    assert done == []
    assert not workers.wait(0.01)
    gate.set()
    assert workers.wait(WITHIN_S)
    assert done == list(range(50))


def test_many_servers_share_a_bounded_number_of_threads() -> None:
    workers, lock = Workers(), threading.Lock()
    done: list[int] = []

    def job(number: int) -> None:
        with lock:
            done.append(number)
        if number % 7 == 0:
            raise ZeroDivisionError("canary: a job that fails ends no thread")

    before = threading.active_count()
    for number in range(1000):
        workers.submit(number, lambda number=number: job(number))  # type: ignore[misc]
        assert threading.active_count() - before <= MOST_THREADS
    assert workers.wait(WITHIN_S)
    assert sorted(done) == list(range(1000))
