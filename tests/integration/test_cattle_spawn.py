"""The life of a cattle server, over the real emulator and the real queue: one server, whatever dies and whatever is answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.cattle import labels, userdata
from clawdlets_ops.cattle.spawn import Spawner
from clawdlets_ops.errors import UnreachableError
from clawdlets_ops.orchestrator.jobs import Status
from clawdlets_ops.sensitive import Secret
from tests.cattle_desk import AUTH_KEY, HOST, Desk, Killed, herd, running_desk


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with running_desk(tmp_path) as found:
        yield found


def let_run(desk: Desk, job_id: str) -> None:
    """A worker sees the job through; the machine's result comes as soon as there is a server."""
    with desk.working():
        desk.until(lambda: "runningAt" in desk.job(job_id).state)
        desk.finish(job_id)
        desk.until(lambda: desk.job(job_id).status in (Status.DONE, Status.FAILED))


def die(at: str, when: str, times: int = 1) -> Callable[[str], None]:
    """Kills the worker at the n-th call of this name."""
    left = [times]

    def spy(name: str) -> None:
        if name == at:
            left[0] -= 1
            if left[0] == 0:
                raise Killed(f"{when} {at}")

    return spy


def test_a_spawn_makes_one_server_waits_for_the_result_and_deletes_it(desk: Desk) -> None:
    job_id = desk.enqueue()
    let_run(desk, job_id)
    job = desk.job(job_id)
    assert job.status is Status.DONE
    assert job.result is not None
    assert job.result["task"] == {"status": "ok", "output": "hello"}
    assert list(job.result["timeline"]) == ["enqueuedAt", "orderedAt", "postedAt", "runningAt", "resultAt", "goneAt"]
    assert desk.servers() == ()
    assert desk.cloud.calls.count("order_server") == 1


def test_the_server_carries_the_whole_label_set_and_no_way_in(desk: Desk) -> None:
    job_id = desk.enqueue(ttl="5m")
    with desk.working():
        desk.until(lambda: "serverId" in desk.job(job_id).state)
        (server,) = desk.servers()
        brand = labels.read(server.labels)
        assert brand is not None
        assert (brand.job_id, brand.persona, brand.bot, brand.ttl_s) == (job_id, "rex", "maren", 300)
        assert brand.order == desk.job(job_id).state["order"]["order"]
        assert server.name == labels.server_name("rex", job_id)
        assert len(server.firewalls) == 1
        desk.finish(job_id)
        desk.until(lambda: desk.job(job_id).status is Status.DONE)


@pytest.mark.parametrize(
    ("at", "when"),
    [
        ("servers_with", "before"),
        ("make_firewall", "before"),
        ("make_firewall", "after"),
        ("order_server", "before"),
        ("order_server", "after"),
        ("server_by_id", "before"),
        ("server_by_id", "after"),
        ("delete_server", "before"),
        ("delete_server", "after"),
    ],
)
def test_a_worker_that_dies_at_a_call_leaves_one_server_at_most_and_the_next_one_goes_on(
    desk: Desk, at: str, when: str
) -> None:
    job_id = desk.enqueue()
    desk.finish(job_id)
    setattr(desk.cloud, when, die(at, when))
    with pytest.raises(Killed):
        desk.worker("dies").run_one()
    assert len(desk.servers()) <= 1
    setattr(desk.cloud, when, lambda name: None)
    desk.end_lease(job_id)
    assert desk.worker("next").run_one()
    assert desk.job(job_id).status is Status.DONE
    assert desk.servers() == ()
    assert desk.cloud.calls.count("order_server") <= 2


def test_a_leased_again_job_adopts_the_server_with_its_label(desk: Desk) -> None:
    job_id = desk.enqueue()
    desk.cloud.after = die("order_server", "after")
    with pytest.raises(Killed):
        desk.worker("dies").run_one()
    (before,) = desk.servers()
    assert "serverId" not in desk.job(job_id).state
    desk.cloud.after = lambda name: None
    desk.end_lease(job_id)
    let_run(desk, job_id)
    assert desk.job(job_id).result["server"]["id"] == before.id  # type: ignore[index]
    assert desk.cloud.calls.count("order_server") == 1
    assert any("adopted" in event.message for event in desk.queue.events(job_id))


def test_a_server_that_arrives_late_has_void_tokens_and_goes_first(desk: Desk) -> None:
    """The order of a killed worker is carried out after the next one has looked: same name, so there are never two."""
    job_id = desk.enqueue()
    held: list[dict[str, Any]] = []
    real = desk.cloud._cloud.order_server

    def hold(name: str, **more: Any) -> Any:
        if not held:
            held.append({"name": name, **more})
            raise Killed("the request is on its way")
        late = dict(held[0])
        if not late.pop("done", None):
            held[0]["done"] = True
            real(late.pop("name"), **late)
        return real(name, **more)

    desk.cloud._cloud.order_server = hold  # type: ignore[method-assign, assignment]
    with pytest.raises(Killed):
        desk.worker("dies").run_one()
    desk.end_lease(job_id)
    let_run(desk, job_id)
    assert desk.job(job_id).status is Status.DONE
    assert desk.servers() == ()
    assert any("whose tokens are void" in event.message for event in desk.queue.events(job_id))


@pytest.mark.parametrize(
    ("fault", "orders"),
    [
        ("answer 500 POST /servers times=1", 2),
        ("answer 429 POST /servers times=1", 2),
        ("answer resource_unavailable POST /servers times=1", 2),
        ("answer conflict POST /servers times=1", 2),
        ("cut POST /servers times=1", 2),
        ("lost-answer POST /servers times=1", 1),
        ("timeout POST /servers seconds=4 times=1", 2),
        ("slow POST /servers seconds=1 times=1", 1),
        ("answer 500 DELETE /servers/* times=2", 1),
        ("lost-answer DELETE /servers/* times=1", 1),
        ("answer 500 GET /servers times=1", 1),
    ],
)
def test_whatever_the_api_answers_there_is_one_server_and_the_job_ends(
    desk: Desk, fault: str, orders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clawdlets_ops.cattle.spawn._WAIT", {"rate_limit_exceeded": 0.0, "locked": 0.0})
    monkeypatch.setattr("clawdlets_ops.orchestrator.queue.backoff_ms", lambda attempt: 0)
    desk.fault(fault)
    job_id = desk.enqueue()
    most = 0
    with desk.working():
        desk.until(lambda: "serverId" in desk.job(job_id).state, timeout_s=30)
        most = max(most, len(desk.servers()))
        desk.finish(job_id)
        desk.until(lambda: desk.job(job_id).status is Status.DONE, timeout_s=30)
    assert most == 1
    assert desk.servers() == ()
    assert desk.cloud.calls.count("order_server") <= orders
    assert len(set(desk.ever_made())) == 1


def test_a_type_that_is_sold_out_is_replaced_by_another_that_is_allowed(desk: Desk) -> None:
    desk.fault("answer resource_unavailable POST /servers times=2")
    job_id = desk.enqueue()
    with desk.working():
        desk.until(lambda: "serverId" in desk.job(job_id).state)
        (server,) = desk.servers()
        assert (server.server_type, server.location) == ("cx33", "nbg1")
        desk.finish(job_id)
        desk.until(lambda: desk.job(job_id).status is Status.DONE)


def test_what_was_asked_for_by_name_is_not_replaced(desk: Desk) -> None:
    desk.fault("answer resource_unavailable POST /servers times=9")
    job_id = desk.enqueue(serverType="cx33", location="fsn1")
    assert desk.worker().run_one()
    assert desk.cloud.calls.count("order_server") == 1
    assert "resource" in desk.job(job_id).last_error


def test_caps_hold_in_all_and_per_bot_with_several_workers_at_once(desk: Desk) -> None:
    desk.cattle = herd(maxInstances=2, maxPerBot=2)
    jobs = [desk.enqueue() for _ in range(3)] + [desk.enqueue("otto"), desk.enqueue("otto")]
    most, of_otto = 0, 0
    with desk.working(5):

        def step() -> bool:
            nonlocal most, of_otto
            now = desk.servers()
            most = max(most, len(now))
            of_otto = max(of_otto, sum(one.labels[labels.BOT] == "otto" for one in now))
            for job_id in jobs:
                job = desk.job(job_id)
                if "runningAt" in job.state and job.task_result is None:
                    desk.finish(job_id)
            return all(desk.job(job_id).status is Status.DONE for job_id in jobs)

        desk.until(step, timeout_s=40)
    assert 1 <= most <= 2
    assert of_otto <= 1
    assert desk.servers() == ()


def test_a_machine_at_work_costs_the_projects_request_budget_little(desk: Desk) -> None:
    """Two at work all the time, looked at every two seconds, would take all that there is."""
    job_id = desk.enqueue()
    with desk.working(look_s=3600.0):
        desk.until(lambda: "runningAt" in desk.job(job_id).state)  # said by the last look that there is
        before = len(desk.cloud.calls)
        time.sleep(0.5)  # 25 times poll_s
        assert desk.cloud.calls[before:] == []
        desk.finish(job_id)
        desk.until(lambda: desk.job(job_id).status is Status.DONE)
    assert desk.servers() == ()
    assert Spawner.look_s >= 20.0


def test_an_api_that_does_not_answer_costs_a_machine_at_work_nothing(desk: Desk) -> None:
    job_id = desk.enqueue()
    with desk.working():
        desk.until(lambda: "runningAt" in desk.job(job_id).state)
        desk.fault("answer 503 GET /servers/*")
        desk.until(lambda: any("is not known" in event.message for event in desk.queue.events(job_id)))
        asked = len(desk.cloud.calls)
        desk.until(lambda: len(desk.cloud.calls) > asked + 20)
        assert (desk.job(job_id).status, desk.job(job_id).attempt) == (Status.RUNNING, 1)
        desk.finish(job_id)
        desk.until(lambda: "resultAt" in desk.job(job_id).state)
        desk.book.clear(None)
        desk.until(lambda: desk.job(job_id).status is Status.DONE)
    assert desk.servers() == ()
    assert desk.cloud.calls.count("order_server") == 1


def test_an_api_that_does_not_answer_before_the_order_costs_no_attempt(desk: Desk) -> None:
    desk.fault("answer 503 GET /servers")
    desk.fault("answer 503 GET /firewalls")
    job_id = desk.enqueue()
    for _ in range(8):  # more often than there are attempts
        desk.until(lambda: desk.worker().run_one())
    assert (desk.job(job_id).status, desk.job(job_id).attempt) == (Status.QUEUED, 0)
    desk.book.clear(None)
    let_run(desk, job_id)
    assert desk.job(job_id).status is Status.DONE


def test_an_api_that_is_silent_for_too_long_is_a_failure(desk: Desk) -> None:
    desk.fault("answer 503 GET /firewalls")
    desk.fault("answer 503 GET /servers")
    job_id = desk.enqueue()
    assert desk.worker().run_one()
    desk.clock._offset += 24 * 3_600_000
    assert desk.worker().run_one()
    assert (desk.job(job_id).status, desk.job(job_id).attempt) == (Status.QUEUED, 1)


def test_an_order_without_an_answer_and_an_api_that_stays_silent_end_as_well(desk: Desk) -> None:
    """Each new order has a new deadline: that is no bound."""
    desk.fault("timeout POST /servers seconds=3 times=1")
    job_id = desk.enqueue()
    assert desk.worker().run_one()  # whether there is a server is not known
    assert "postedAt" in desk.job(job_id).state
    desk.fault("answer 503 GET /firewalls")
    for _ in range(3):
        desk.clock._offset += 20_000
        assert desk.worker().run_one()
    assert (
        desk.job(job_id).attempt == 2
    )  # the second attempt was put off once, and failed when it had been silent for 30 s


def test_who_waits_for_room_asks_the_api_where_the_orders_do_not_say_it(desk: Desk) -> None:
    desk.cattle = herd(maxInstances=1, maxPerBot=1)
    first = desk.enqueue()
    with desk.working():
        desk.until(lambda: "runningAt" in desk.job(first).state)
        waiting = [desk.enqueue() for _ in range(5)]
        other, before = desk.worker("other"), desk.cloud.calls.count("servers_with")
        for _ in range(20):
            desk.until(lambda: other.run_one())
        assert all("waits for room" in desk.job(job_id).last_error for job_id in waiting)
        assert desk.cloud.calls.count("servers_with") == before
        for job_id in waiting:
            desk.queue.cancel(job_id)
        desk.finish(first)
        desk.until(lambda: desk.job(first).status is Status.DONE)


def test_a_clock_that_was_set_back_ends_no_waiting_for_room(desk: Desk) -> None:
    desk.cattle = herd(maxInstances=1, maxPerBot=1)
    first = desk.enqueue()
    with desk.working():
        desk.until(lambda: "runningAt" in desk.job(first).state)
        second, other = desk.enqueue(), desk.worker("other")
        desk.until(lambda: other.run_one())
        desk.clock._offset -= 600_000
        desk.until(lambda: other.run_one())
        assert desk.job(second).status is Status.QUEUED
        assert "waits for room" in desk.job(second).last_error
        desk.queue.cancel(second)
        desk.finish(first)
        desk.until(lambda: desk.job(first).status is Status.DONE)


def test_who_waits_for_room_leaves_the_worker_to_others_and_gets_its_whole_time(desk: Desk) -> None:
    first = desk.enqueue("otto")
    with desk.working(1):
        desk.until(lambda: "runningAt" in desk.job(first).state)
        # one worker has the machine; another leases what has no room, and then is free for maren's
        second, other = desk.enqueue("otto", ttl="1m"), desk.enqueue("maren")
        free = desk.worker("free")
        desk.until(lambda: free.run_one() and "waits for room" in desk.job(second).last_error)
        desk.clock._offset += 120_000  # longer than it is to live
        desk.finish(first)
        desk.until(lambda: desk.job(first).status is Status.DONE)
        for job_id in (other, second):
            desk.until(lambda job_id=job_id: "runningAt" in desk.job(job_id).state)  # type: ignore[misc]
            order = desk.job(job_id).state["order"]
            assert order["deadline"] * 1000 >= desk.job(job_id).state["postedAt"] + 55_000
            desk.finish(job_id)
            desk.until(lambda job_id=job_id: desk.job(job_id).status is Status.DONE)  # type: ignore[misc]
    assert len(desk.ever_made()) == 3


def test_a_job_for_which_there_is_no_room_for_too_long_fails(desk: Desk) -> None:
    desk.cattle = herd(maxInstances=1, maxPerBot=1)
    other = labels.Brand(
        HOST, "0f9c2a34-5b6d-4e7f-8a9b-0c1d2e3f4a5b", "0123456789abcdef", "rex", "otto", 3600, 2_000_000_000
    )
    desk.cloud._cloud.order_server(
        "cattle-rex-1", image="debian-12", server_type="cx23", location="nbg1", labels=other.labels({}),
        user_data=Secret("#cloud-config\n"), firewalls=(),
    )  # fmt: skip
    job_id = desk.enqueue()
    assert desk.worker().run_one()
    assert desk.job(job_id).attempt == 0
    desk.clock._offset += 60_000
    assert desk.worker().run_one()
    assert desk.job(job_id).status is Status.FAILED
    assert "there was no room for 30 s" in desk.job(job_id).last_error


def test_a_worker_that_was_away_does_not_delete_its_successors_server(desk: Desk) -> None:
    """Frozen between its word and its order for longer than its lease: the next one has ordered under the same name."""
    job_id = desk.enqueue()

    def away(name: str) -> None:
        if name == "order_server":
            desk.cloud.before = lambda name: None
            desk.end_lease(job_id)
            with desk.working():
                desk.until(lambda: "runningAt" in desk.job(job_id).state)

    desk.cloud.before = away
    assert desk.worker("away").run_one()
    (server,) = desk.servers()
    assert server.id == desk.job(job_id).state["serverId"]
    let_run(desk, job_id)
    assert desk.job(job_id).status is Status.DONE
    assert len(desk.ever_made()) == 1


def test_a_server_that_is_switched_off_counts_and_its_job_ends(desk: Desk) -> None:
    job_id = desk.enqueue()
    with desk.working():
        desk.until(lambda: "runningAt" in desk.job(job_id).state)
        (server,) = desk.servers()
        desk.cloud._cloud._client.servers.get_by_id(server.id).power_off()
        desk.until(lambda: desk.job(job_id).status is Status.FAILED)
    assert desk.servers() == ()
    assert "sent no result" in desk.job(job_id).last_error


def canceled(desk: Desk) -> str:
    """A job that is canceled when it has its server."""
    job_id = desk.enqueue()
    with desk.working():
        desk.until(lambda: "serverId" in desk.job(job_id).state)
        desk.queue.cancel(job_id)
        desk.until(lambda: desk.job(job_id).status is Status.CANCELED)
    assert desk.servers() == ()
    return job_id


def test_a_canceled_job_leaves_no_server_and_no_token(desk: Desk) -> None:
    job_id = canceled(desk)
    assert desk.tokens.revoke(job_id) == 0
    assert desk.keys.revoked == ["k1"]


def test_an_auth_key_that_no_machine_has_used_is_revoked_and_one_that_joined_is_left(desk: Desk) -> None:
    desk.fault("answer resource_unavailable POST /servers times=9")
    refused = desk.enqueue()
    assert desk.worker().run_one()
    assert desk.cloud.calls.count("order_server") > 1
    assert (len(desk.keys.given), desk.keys.revoked) == (1, ["k1"])  # one key, however many offers were tried
    assert "keyId" not in {name for name, value in desk.job(refused).state.items() if value is not None}
    desk.queue.cancel(refused)
    desk.book.clear(None)
    done = desk.enqueue()
    let_run(desk, done)
    assert desk.job(done).status is Status.DONE
    assert (len(desk.keys.given), desk.keys.revoked) == (2, ["k1"])


def test_the_key_of_a_worker_that_died_is_revoked_before_another_is_minted(desk: Desk) -> None:
    job_id = desk.enqueue()
    desk.cloud.before = die("order_server", "before")
    with pytest.raises(Killed):
        desk.worker("dies").run_one()
    desk.cloud.before = lambda name: None
    desk.end_lease(job_id)
    let_run(desk, job_id)
    assert (len(desk.keys.given), desk.keys.revoked) == (2, ["k1"])


def test_a_key_that_cannot_be_revoked_is_told_and_keeps_no_job_from_its_end(desk: Desk) -> None:
    desk.keys.fault = UnreachableError("does not answer", where="tailnet")
    job_id = canceled(desk)
    assert any(
        "k1 is not revoked, and runs out by itself: does not answer" in event.message
        for event in desk.queue.events(job_id)
    )


def test_a_job_whose_time_is_up_leaves_no_server(desk: Desk) -> None:
    job_id = desk.enqueue()
    with desk.working():
        desk.until(lambda: "serverId" in desk.job(job_id).state)
        desk.clock._offset += 3_600_000  # an hour passes
        desk.until(lambda: desk.job(job_id).status is Status.FAILED)
    assert desk.servers() == ()


def test_a_name_that_somebody_else_has_is_not_taken_over(desk: Desk) -> None:
    job_id = desk.enqueue()
    desk.cloud._cloud.order_server(
        labels.server_name("rex", job_id), image="debian-12", server_type="cx23", location="nbg1", labels={"whose": "not-ours"},
        user_data=Secret("#cloud-config\n"), firewalls=(),
    )  # fmt: skip
    assert desk.worker().run_one()
    assert desk.job(job_id).status is Status.FAILED
    assert "not this job's" in desk.job(job_id).last_error
    (left,) = desk.cloud._cloud._client.servers.get_all()
    assert left.labels == {"whose": "not-ours"}


def test_no_job_state_event_or_result_holds_a_token_or_a_key(desk: Desk) -> None:
    job_id = desk.enqueue()
    let_run(desk, job_id)
    document = desk.cloud.documents[0]
    token = next(entry for entry in userdata.entries(document) if entry.path.endswith("bootstrap.json")).content
    secret = token.decode().split('"token": "')[1].split('"')[0]
    assert len(secret) == 64
    stored = (desk.folder / "state" / "state.sqlite").read_bytes() + (
        desk.folder / "state" / "state.sqlite-wal"
    ).read_bytes()
    assert job_id.encode() in stored  # the search can find something
    assert secret.encode() not in stored
    assert AUTH_KEY[:17].encode() not in stored
    assert secret not in str(desk.queue.events(job_id))
