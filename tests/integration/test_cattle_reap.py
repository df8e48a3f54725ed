"""The reaper over the real emulator: orphans go within one cycle, strangers stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clawdlets_ops.cattle import labels, wiring
from clawdlets_ops.cattle.labels import Brand
from clawdlets_ops.orchestrator.jobs import Status
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
    desk.until(lambda: [one.id for one in desk.servers()] == [stranger])


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
    assert desk.reaper.apply(desk.reaper.observe()) == ([ident], [])


def test_a_server_that_is_labelled_anew_between_look_and_deletion_is_left_alone(desk: Desk) -> None:
    brand = Brand(HOST, JOB, "0123456789abcdef", "rex", "maren", 60, 1_000_000_000)
    ident = order(desk, "cattle-rex-1", brand.labels({}))
    desk.clock._offset += 120_000
    desk.fault("clock-skew api seconds=120")
    found = desk.reaper.observe()
    assert len(found.go) == 1
    desk.cloud._cloud._client.servers.get_by_id(ident).update(labels={"kept": "by-olive"})
    assert desk.reaper.apply(found)[0] == []
    assert desk.cloud.server_by_id(ident) is not None
