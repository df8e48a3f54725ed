"""The watchdog's decisions, and putting an edge back, with a cloud of lists and a clock that moves when told to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from clawdlets_ops.errors import CloudError, SettingsError
from clawdlets_ops.files import locked
from clawdlets_ops.hetzner import WINDOW_LABEL, Firewall, FirewallRule, Server
from clawdlets_ops.layout import Layout
from clawdlets_ops.lockdown import HostAccount, edge, watchdog
from clawdlets_ops.testing import FakeCloud

SSH = FirewallRule("in", "tcp", "22", ("203.0.113.0/24",), "SSH for the admin networks")
UDP = FirewallRule("in", "udp", "41641", ("0.0.0.0/0", "::/0"))
LOCKED = HostAccount("tailnet", armed=False, kept="tailnet", owner="", left_s=None, now=0, tailnet="x")
ON_TRIAL = replace(LOCKED, armed=True, kept="bootstrap", owner="0123456789abcdef", left_s=40)


def order(**changed: object) -> edge.Order:
    made = edge.Order(
        id="t1", kind="lockdown", host="alpha", operator="olive", endpoint="https://api.example", server_id=7,
        firewall_id=3, firewall="alpha-edge", rules=(SSH, UDP), labels={"managed-by": "clawdlets"}, taken_at="now",
        deadline_s=30.0, restore_s=10.0, poll_s=0.5, owner="0123456789abcdef", user="admin", identity_file="/k", pin="ssh-ed25519 A",
    )  # fmt: skip
    return replace(made, **changed)  # type: ignore[arg-type]


@dataclass
class World:
    layout: Layout
    order: edge.Order = field(default_factory=order)
    at: float = 0.0
    gone: bool = False
    account: HostAccount | None = None
    stopped: bool = False
    status: str = "applied"
    rules: tuple[FirewallRule, ...] = (UDP,)
    then: Callable[[float], None] = lambda _: None

    def __post_init__(self) -> None:
        edge.write_order(self.layout, self.order)
        self.cloud = FakeCloud(
            servers=[Server(7, "alpha", "running", {}, "cx22", "fsn1", "192.0.2.1", None, {3: self.status})],
            firewalls=[Firewall(3, "alpha-edge", {"managed-by": "clawdlets"}, self.rules)],
        )

    def sleep(self, seconds: float) -> None:
        self.at += seconds
        self.then(self.at)

    def run(self) -> tuple[str, str]:
        return watchdog.Watch(
            layout=self.layout, order=self.order, cloud=self.cloud, operator_is_gone=lambda: self.gone,
            look=lambda: self.account, revert_host=lambda: "host told", stopped=lambda: self.stopped,
            clock=lambda: self.at, sleep=self.sleep,
        ).run()  # fmt: skip

    @property
    def open(self) -> bool:
        return self.cloud.firewalls[0].ssh_is_open


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


@pytest.mark.parametrize("decision", [watchdog.CONFIRMED, watchdog.UNDONE, watchdog.CLOSED])
def test_a_decision_ends_it_and_nothing_is_changed(layout: Layout, decision: str) -> None:
    world = World(layout)
    edge.mark_closing(layout, world.order)
    world.then = lambda at: edge.decide(layout, world.order, decision) if at > 3 else None
    assert world.run() == (f"the operator's command said {decision}", "nothing to do")
    assert not world.open
    assert 3 < world.at < 5


@pytest.mark.parametrize(
    ("change", "saw"),
    [
        ({"gone": True}, "the operator's command is gone without a word"),
        ({"stopped": True}, "was told to end"),
        ({}, "no word within 30 s"),
    ],
)
def test_silence_opens_the_edge_again(layout: Layout, change: dict[str, bool], saw: str) -> None:
    world = World(layout, account=ON_TRIAL, **change)  # type: ignore[arg-type]
    edge.mark_closing(layout, world.order)
    said, did = world.run()
    assert (said, did) == (f"{saw}; the host says tailnet, on trial", "opened the edge again; host told")
    assert world.cloud.firewalls[0].rules == tuple(sorted((SSH, UDP)))
    assert edge.decision_of(layout, world.order) == watchdog.UNDONE


def test_a_host_that_has_confirmed_is_past_the_point_of_no_return(layout: Layout) -> None:
    world = World(layout, gone=True, account=LOCKED)
    edge.mark_closing(layout, world.order)
    said, did = world.run()
    assert "closed for good" in said
    assert did == "left the edge closed"
    assert not world.open
    assert edge.decision_of(layout, world.order) == watchdog.CONFIRMED


@pytest.mark.parametrize("account", [None, replace(LOCKED, kept="bootstrap"), replace(LOCKED, armed=True)])
def test_anything_less_than_confirmed_opens_it(layout: Layout, account: HostAccount | None) -> None:
    world = World(layout, gone=True, account=account)
    edge.mark_closing(layout, world.order)
    world.run()
    assert world.open


def test_an_edge_that_nobody_touched_is_left_alone(layout: Layout) -> None:
    world = World(layout, gone=True)
    assert world.run()[1] == "left the edge alone, which was not touched yet; host told"
    assert not world.open  # as it was: somebody else's business


def test_an_edge_that_was_closed_before_this_began_is_opened_though_nothing_was_touched_yet(layout: Layout) -> None:
    world = World(layout, order(closing=True), gone=True, account=replace(LOCKED, kept="bootstrap"))
    assert world.run()[1] == "opened the edge again; host told"
    assert world.open


@pytest.mark.parametrize("account", [None, ON_TRIAL, LOCKED])
def test_a_window_that_a_lockdown_began_over_is_closed_whatever_the_host_says(
    layout: Layout, account: HostAccount | None
) -> None:
    world = World(layout, order(closing=True, rules=(UDP,)), gone=True, account=account, rules=(SSH, UDP))
    assert world.run()[1] == "closed the edge again; host told"
    assert not world.open
    assert edge.unfinished(layout, "alpha") is None


def test_a_window_closes_at_its_deadline_and_not_when_its_command_ends(layout: Layout) -> None:
    world = World(layout, order(kind="window", rules=(UDP,)), gone=True, rules=(SSH, UDP))
    said, did = world.run()
    assert (said, did) == ("no word within 30 s", "closed the edge again")
    assert not world.open
    assert world.at >= 30


def test_an_edge_that_does_not_come_back_is_said_aloud_and_left_undecided(layout: Layout) -> None:
    world = World(layout, gone=True, status="pending")
    edge.mark_closing(layout, world.order)
    did = world.run()[1]
    assert did.startswith("THE EDGE COULD NOT BE OPENED AGAIN: not as before within 10 s")
    assert "pending" in did
    assert edge.unfinished(layout, "alpha") == world.order


def test_it_waits_for_an_opentofu_that_outlived_its_command_and_says_when_that_does_not_end(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "TOFU_ENDS_WITHIN_S", 0.0)
    world = World(layout, gone=True)
    edge.mark_closing(layout, world.order)
    with locked(layout.lock("provision-alpha"), what="alpha", holder="tofu"):
        did = world.run()[1]
    assert did.startswith("opened the edge again (alpha in the cloud is still being worked on by tofu)")


def test_rules_are_asked_for_only_where_they_differ(layout: Layout) -> None:
    world = World(layout, rules=(SSH, UDP))

    def refuse(*_: object) -> None:
        raise AssertionError("nothing differs")

    world.cloud.set_rules = refuse  # type: ignore[method-assign,assignment]
    assert edge.put_back(world.cloud, world.order, within_s=5, clock=lambda: world.at, sleep=world.sleep) is False


def test_a_cloud_that_fails_is_asked_again_until_the_time_is_up(layout: Layout) -> None:
    world = World(layout)
    real, asked = world.cloud.set_rules, []

    def fail_twice(firewall: Firewall, rules: tuple[FirewallRule, ...]) -> None:
        asked.append(world.at)
        if len(asked) < 3:
            raise CloudError("server error")
        real(firewall, rules)

    world.cloud.set_rules = fail_twice  # type: ignore[method-assign]
    assert edge.put_back(world.cloud, world.order, within_s=5, clock=lambda: world.at, sleep=world.sleep) is True
    assert asked == [0.0, 0.5, 1.0]
    world.cloud.firewalls.clear()
    with pytest.raises(CloudError, match="no firewall alpha-edge with id 3"):
        edge.put_back(world.cloud, world.order, within_s=2, clock=lambda: world.at, sleep=world.sleep)


@pytest.mark.parametrize(
    "stumble", [KeyError("code"), TypeError("list indices"), AttributeError("get"), ValueError("json")]
)
def test_an_answer_that_nobody_expects_does_not_end_the_last_resort(layout: Layout, stumble: Exception) -> None:
    world = World(layout, gone=True, account=ON_TRIAL)
    edge.mark_closing(layout, world.order)
    real, asked = world.cloud.firewall, []

    def stumble_twice(name: str) -> Firewall | None:
        asked.append(world.at)
        if len(asked) < 3:
            raise stumble
        return real(name)

    world.cloud.firewall = stumble_twice  # type: ignore[method-assign]
    assert world.run()[1] == "opened the edge again; host told"
    assert world.open


def test_an_answer_that_is_never_understood_is_said_by_its_kind_alone(layout: Layout) -> None:
    world = World(layout, gone=True, account=ON_TRIAL)
    edge.mark_closing(layout, world.order)

    def stumble(name: str) -> Firewall | None:
        raise KeyError("canary: whatever the answer held")

    world.cloud.firewall = stumble  # type: ignore[method-assign]
    did = world.run()[1]
    assert "THE EDGE COULD NOT BE OPENED AGAIN" in did
    assert "(KeyError)" in did
    assert "canary" not in did
    assert edge.unfinished(layout, "alpha") == world.order


def test_a_windows_label_goes_only_once_its_rule_is_seen_to_be_gone(layout: Layout) -> None:
    world = World(layout, order(kind="window", rules=(UDP,)), rules=(SSH, UDP))
    world.cloud.set_labels(world.cloud.firewalls[0], {**world.order.labels, WINDOW_LABEL: "20261127T120000Z"})
    real = world.cloud.set_rules

    def refuse(*_: object) -> None:
        raise CloudError("server error")

    def back() -> bool:
        return edge.put_back(world.cloud, world.order, within_s=2, clock=lambda: world.at, sleep=world.sleep)

    world.cloud.set_rules = refuse  # type: ignore[method-assign,assignment]
    with pytest.raises(CloudError, match="server error"):
        back()
    assert WINDOW_LABEL in world.cloud.firewalls[0].labels
    world.cloud.set_rules = real  # type: ignore[method-assign]
    applied, world.cloud.servers = world.cloud.servers, [replace(world.cloud.servers[0], firewalls={3: "pending"})]
    with pytest.raises(CloudError, match="it is pending"):
        back()
    assert (world.open, WINDOW_LABEL in world.cloud.firewalls[0].labels) == (False, True)
    world.cloud.servers = applied
    assert back()
    assert world.cloud.firewalls[0].labels == world.order.labels


def test_a_windows_label_is_there_before_its_rule(layout: Layout) -> None:
    opened = order(kind="window", labels={WINDOW_LABEL: "20261127T120000Z"})
    world = World(layout, opened)

    def refuse(*_: object) -> None:
        raise CloudError("server error")

    world.cloud.set_labels = refuse  # type: ignore[method-assign,assignment]
    with pytest.raises(CloudError, match="server error"):
        edge.put_back(world.cloud, opened, within_s=2, clock=lambda: world.at, sleep=world.sleep)
    assert not world.open


def test_an_order_comes_back_as_it_was_kept_and_holds_nothing_secret(layout: Layout) -> None:
    kept = order(ways=("100.64.0.2",), journal="/runs/1", until="x", extra={"cidrs": ["198.51.100.7/32"]})
    edge.write_order(layout, kept)
    assert edge.read_order(layout, "alpha") == kept
    assert edge.unfinished(layout, "alpha") == kept
    path = layout.lockdown_dir("alpha") / edge.ORDER
    assert path.stat().st_mode & 0o777 == 0o600
    assert "token" not in path.read_text().lower()
    edge.decide(layout, kept, watchdog.CONFIRMED)
    assert edge.unfinished(layout, "alpha") is None
    # another order's decision is not this one's
    edge.write_order(layout, replace(kept, id="t2"))
    assert edge.unfinished(layout, "alpha") is not None
    path.write_text(json.dumps({"id": "t3"}))
    with pytest.raises(SettingsError, match="not as we write it"):
        edge.read_order(layout, "alpha")


def test_whether_a_watchdog_lives_is_asked_of_its_lock(layout: Layout) -> None:
    assert not watchdog.lives(layout, "alpha")
    with locked(layout.lock("watchdog-alpha"), what="it"):
        assert watchdog.lives(layout, "alpha")
    assert not watchdog.lives(layout, "alpha")
