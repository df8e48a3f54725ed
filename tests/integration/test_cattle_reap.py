"""The reaper over the real emulator: orphans go within one cycle, strangers stay."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from clawdlets_ops.cattle import labels, reap, wiring
from clawdlets_ops.cattle.keys import NoKeys
from clawdlets_ops.cattle.labels import Brand
from clawdlets_ops.errors import LabError
from clawdlets_ops.lab.backend import StubBackend
from clawdlets_ops.orchestrator.jobs import Status
from clawdlets_ops.orchestrator.worker import Worker
from clawdlets_ops.sensitive import Secret
from tests.cattle_desk import HOST, Desk, Killed, running_desk

JOB = "0f9c2a34-5b6d-4e7f-8a9b-0c1d2e3f4a5b"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with running_desk(tmp_path) as found:
        yield found


def order(desk: Desk, name: str, with_labels: dict[str, str]) -> int:
    return desk.cloud.order_server(
        name, image="debian-12", server_type="cx23", location="nbg1", labels=with_labels, user_data=Secret("#cloud-config\n"),
        firewalls=(),
    ).id  # fmt: skip


def test_what_a_dead_job_left_is_gone_after_one_cycle_and_a_stranger_stays(desk: Desk) -> None:
    job_id = desk.enqueue()
    for _ in range(5):  # every attempt dies, so nobody is left to clean up
        desk.cloud.before = lambda name: (_ for _ in ()).throw(Killed()) if name == "server_by_id" else None
        with pytest.raises(Killed):
            desk.worker().run_one()
        desk.end_lease(job_id)
    desk.cloud.before = lambda name: None
    desk.worker().run_one()
    assert desk.job(job_id).status is Status.FAILED
    assert len(desk.servers()) == 1
    whole = Brand(HOST, JOB, "0123456789abcdef", "rex", "maren", 60, 1_000_000_000).labels({})
    stranger = order(desk, "cattle-lookalike", {name: value for name, value in whole.items() if name != labels.TTL})
    reap_id = desk.queue.enqueue(wiring.REAP, {"dryRun": True}, requester="operator:olive")
    desk.worker().run_one()
    assert len(desk.job(reap_id).result["wouldDelete"]) == 1  # type: ignore[index]
    assert len(desk.servers()) == 2
    reap_id = desk.queue.enqueue(wiring.REAP, {}, requester="operator:olive")
    desk.worker().run_one()
    result = desk.job(reap_id).result
    assert result is not None
    assert len(result["deletedIds"]) == 1
    assert "clawdlets-ttl" in result["strange"][0]
    assert [one.id for one in desk.servers()] == [stranger]


def test_a_server_whose_job_is_not_known_lives_out_its_time_by_both_clocks(desk: Desk) -> None:
    now_s = desk.clock() // 1000
    brand = Brand(HOST, JOB, "0123456789abcdef", "rex", "maren", 60, now_s + 60)
    ident = order(desk, "cattle-rex-1", brand.labels({}))
    assert desk.reaper.observe().go == ()
    desk.clock._offset += 86_400_000  # this host's clock jumps a day ahead: the API's does not
    assert desk.reaper.observe().go == ()
    desk.fault("clock-skew api seconds=86400")
    (doomed,) = desk.reaper.observe().go
    assert (doomed.id, doomed.why) == (ident, "its time is up")
    assert reap.apply(desk.cloud, desk.reaper.observe()) == ([ident], [])
    assert desk.servers() == ()


def test_a_server_that_is_labelled_anew_between_look_and_deletion_is_left_alone(desk: Desk) -> None:
    brand = Brand(HOST, JOB, "0123456789abcdef", "rex", "maren", 60, 1_000_000_000)
    ident = order(desk, "cattle-rex-1", brand.labels({}))
    desk.clock._offset += 120_000
    desk.fault("clock-skew api seconds=120")
    found = desk.reaper.observe()
    assert len(found.go) == 1
    desk.cloud._cloud._client.servers.get_by_id(ident).update(labels={"kept": "by-olive"})
    assert reap.apply(desk.cloud, found) == ([], ["cattle-rex-1 is labelled differently now, and is left alone"])
    assert desk.cloud.server_by_id(ident) is not None


def doomed(desk: Desk, *names: str) -> reap.Plan:
    """What an operator has named: these servers, made now."""
    whole = Brand(HOST, JOB, "0123456789abcdef", "rex", "maren", 60, 1_000_000_000).labels({})
    return reap.Plan(tuple(reap.Doomed(order(desk, name, whole), name, JOB, "named") for name in names))


def test_a_server_is_said_to_be_deleted_when_it_is_gone_and_not_when_its_deletion_has_begun(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go = threading.Event()
    monkeypatch.setattr(StubBackend, "delete", lambda self, ident: may_go.wait(20))
    found = doomed(desk, "cattle-rex-1", "cattle-rex-2")
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        assert {one.status for one in desk.servers()} == {"deleting"}  # both were asked before the first is waited for
        waited.append(seconds)
        may_go.set()
        desk.until(lambda: desk.servers() == ())

    assert reap.apply(desk.cloud, found, sleep=sleep) == ([one.id for one in found.go], [])
    assert len(waited) == 1


def test_a_deletion_that_does_not_come_to_an_end_or_ends_in_error_is_a_fault(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go = threading.Event()
    monkeypatch.setattr(StubBackend, "delete", lambda self, ident: may_go.wait(20))
    said = ["cattle-rex-1 was asked to go, and is still there"]
    assert reap.apply(desk.cloud, doomed(desk, "cattle-rex-1"), gone_s=0.1, sleep=lambda _: None) == ([], said)
    may_go.set()

    def fail(self: StubBackend, ident: int) -> None:
        raise LabError("no", where=str(ident))

    monkeypatch.setattr(StubBackend, "delete", fail)
    said = ["cattle-rex-2 was asked to go, and is still there"]
    assert reap.apply(desk.cloud, doomed(desk, "cattle-rex-2"), gone_s=0.1, sleep=lambda _: None) == ([], said)


def test_a_deletion_whose_answer_was_lost_is_looked_after_and_one_that_was_refused_is_told(desk: Desk) -> None:
    found = doomed(desk, "cattle-rex-1")
    desk.fault("lost-answer DELETE times=1")
    assert reap.apply(desk.cloud, found) == ([found.go[0].id], [])
    found = doomed(desk, "cattle-rex-2", "cattle-rex-3")
    desk.fault("answer locked DELETE times=1")
    deleted, faults = reap.apply(desk.cloud, found)
    assert deleted == [found.go[1].id]
    assert len(faults) == 1
    assert "cattle-rex-2" in faults[0]
    assert "locked" in faults[0]


def test_where_the_api_stops_answering_nothing_is_said_to_be_gone(desk: Desk) -> None:
    found = doomed(desk, "cattle-rex-1")

    def silent(name: str) -> None:
        if desk.cloud.calls.count("delete_server"):
            desk.cloud.before = lambda name: None
            desk.fault("cut GET /servers/*")

    desk.cloud.before = silent
    deleted, faults = reap.apply(desk.cloud, found)
    assert deleted == []
    assert "whether it has is not known" in faults[0]


def test_where_cattle_is_switched_off_what_runs_is_ended_and_nothing_new_begins(desk: Desk) -> None:
    job_id = desk.enqueue()
    desk.cloud.after = lambda name: (_ for _ in ()).throw(Killed()) if name == "order_server" else None
    with pytest.raises(Killed):
        desk.worker().run_one()
    desk.cloud.after = lambda name: None
    desk.end_lease(job_id)
    assert len(desk.servers()) == 1
    kind = wiring.ending_kind(replace(desk.spawner, keys=NoKeys()))
    assert [fault.message for fault in kind.validate({}, "maren")] == ["cattle is not enabled"]
    assert Worker(desk.queue, [kind], name="w", clock=desk.clock).run_one()
    assert (desk.job(job_id).status, desk.job(job_id).last_error) == (Status.FAILED, "cattle is not enabled any more")
    assert desk.servers() == ()
