"""Four orchestrators on one real PostgreSQL: each job is done once, and a killed one's jobs are done by the others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from clawdlets_ops.errors import StoreError
from clawdlets_ops.orchestrator.clock import SteadyClock
from clawdlets_ops.orchestrator.jobs import Status
from clawdlets_ops.orchestrator.queue import Queue
from clawdlets_ops.orchestrator.store import open_postgresql
from clawdlets_ops.orchestrator.tokens import Asker, Grant, Purpose, Refused, Tokens
from tests.integration.orchestrator_process import Process, short_folder, start, until
from tests.integration.test_provision_backends import PASSWORD, Postgres, postgres

__all__ = ["postgres"]

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

JOBS = 60


def url(postgres: Postgres) -> str:
    return f"postgresql://clawdlets:{PASSWORD}@/postgres?host={postgres.folder}&sslmode=disable"


def started(folder: Path, postgres: Postgres, *, workers: int) -> Process:
    (folder / "secrets").mkdir(parents=True)
    (folder / "secrets" / "clf_database_url").write_text(url(postgres))
    return start(folder, store="postgresql", workers=workers, environ={"LEASE_S": "5"})


def test_four_orchestrators_do_each_job_once(postgres: Postgres) -> None:
    with short_folder() as folder:
        log = folder / "counted"
        processes = [started(folder / str(number), postgres, workers=2) for number in range(4)]
        try:
            asked = [processes[n % 4].enqueue("count", {"log": str(log)}).body["jobId"] for n in range(JOBS)]
            for job_id in asked:
                processes[0].until(job_id, "done")
            ended = [line.split() for line in log.read_text().splitlines() if line.startswith("end ")]
            assert Counter(job_id for _, job_id, _, _ in ended) == Counter(asked)
            assert {attempt for _, _, attempt, _ in ended} == {"1"}
            assert len({pid for _, _, _, pid in ended}) > 1, "more than one of them was at work"
            for process in processes:
                assert PASSWORD not in process.log
        finally:
            for process in processes:
                process.kill()


def test_a_killed_orchestrators_job_is_another_ones(postgres: Postgres) -> None:
    with short_folder() as folder:
        first = started(folder / "1", postgres, workers=1)
        second = None
        try:
            job_id = first.enqueue("slow").body["jobId"]
            first.until(job_id, "running")
            second = started(folder / "2", postgres, workers=1)
            first.kill()
            until(lambda: second is not None and second.job(job_id)["attempt"] == 2, "the job to be leased again")
        finally:
            first.kill()
            if second is not None:
                second.kill()


def test_an_unknown_version_in_postgresql_is_refused(postgres: Postgres) -> None:
    open_postgresql(url(postgres)).close()
    postgres.psql("update clf_schema set version = 99")
    with pytest.raises(StoreError, match="schema version 99"):
        open_postgresql(url(postgres))
    postgres.psql("drop table clf_schema")
    with pytest.raises(StoreError, match="somebody else's"):
        open_postgresql(url(postgres))


def test_queue_and_tokens_are_the_same_on_postgresql(postgres: Postgres) -> None:
    store = open_postgresql(url(postgres))
    queue, tokens = Queue(store, SteadyClock()), Tokens(store, SteadyClock())
    job_id = queue.enqueue("work", {"a": 1}, requester="a", idempotency_key="k", max_unfinished=1)
    assert queue.enqueue("work", {"a": 1}, requester="a", idempotency_key="k", max_unfinished=1) == job_id
    job = queue.lease("w", {"work": 60})
    assert job is not None
    assert queue.remember(job, {"x": 1}) == {"x": 1}
    token = tokens.issue(Grant(job_id, "a", "node", Purpose.ENVIRONMENT)).reveal()
    tokens.bind(job_id, server_id=7)
    asker = Asker("100.64.0.1", "node", 7)
    assert tokens.redeem(token, Purpose.ENVIRONMENT, asker, lambda grant: grant.job_id) == job_id
    with pytest.raises(Refused, match="used"):
        tokens.redeem(token, Purpose.ENVIRONMENT, asker, lambda grant: grant.job_id)
    queue.cancel(job_id)
    queue.canceled(job)
    assert queue.get(job_id).status is Status.CANCELED
    assert queue.prune().jobs == 0
    store.close()


def test_a_wrong_password_is_said_and_shown_to_nobody(postgres: Postgres) -> None:
    wrong = url(postgres).replace(PASSWORD, "canary-wrong-password")
    with pytest.raises(StoreError, match="does not answer") as caught:
        open_postgresql(wrong)
    assert "canary" not in str(caught.value)
