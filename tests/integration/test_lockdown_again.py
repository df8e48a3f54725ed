"""A lockdown of an edge that is not as it should be when it begins: left closed by one that died, or with a window in it.

Real watchdogs, a cloud of lists; the host is a function. The watchdogs talk to an API that is not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops import process, provision, ssh
from clawdlets_ops.errors import BusyError, ClawdletsError, LockdownError, UnreachableError
from clawdlets_ops.fleet import parse_fleet
from clawdlets_ops.hetzner import WINDOW_LABEL, WINDOW_RULE, Firewall, FirewallRule, Server
from clawdlets_ops.layout import Layout
from clawdlets_ops.lockdown import (
    HostAccount,
    LockdownOutcome,
    Timing,
    apply,
    close_window,
    edge,
    open_window,
    transaction,
    watchdog,
)
from clawdlets_ops.lockdown import host as on_host
from clawdlets_ops.lockdown.proof import Proof
from clawdlets_ops.project import Project
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.testing import FakeCloud, FakeRunner
from clawdlets_ops.verify.exposure import Exposure

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s canary@example"
LABELS = {"managed-by": "clawdlets"}
SSH = FirewallRule("in", "tcp", "22", ("203.0.113.0/24",), "SSH for the admin networks")
WINDOW = FirewallRule("in", "tcp", "22", ("198.51.100.7/32",), f"{WINDOW_RULE} until then, by olive")
NOWHERE = "http://127.0.0.1:9"
SHORT = Timing(trial_s=60, watchdog_s=60.0, edge_s=2.0, tailnet_s=1.0, restore_s=2.0)

LOCKED = HostAccount("tailnet", armed=False, kept="tailnet", owner="", left_s=None, now=0, tailnet="x")
OPEN = replace(LOCKED, mode="bootstrap", kept="bootstrap")


@dataclass
class Desk:
    """A project with one host, declared tailnet; ``fails`` is how the host answers ``try``."""

    project: Project
    cloud: FakeCloud
    fails: ClawdletsError | None = None
    told: list[str] = field(default_factory=list)
    account: HostAccount = OPEN

    @property
    def layout(self) -> Layout:
        return self.project.layout

    @property
    def firewall(self) -> Firewall:
        return self.cloud.firewalls[0]

    @property
    def closed(self) -> tuple[FirewallRule, ...]:
        return provision.edge_rules(self.project.fleet.host("alpha"), window_open=False)

    def at_the_edge(self, *rules: FirewallRule, window: bool = False) -> None:
        labels = {**LABELS, WINDOW_LABEL: "20991127T120000Z"} if window else LABELS
        self.cloud.firewalls = [Firewall(3, "alpha-edge", labels, tuple(sorted(rules)))]

    def order(self, kind: edge.Kind, rules: tuple[FirewallRule, ...], ident: str = "first") -> edge.Order:
        return edge.Order(
            id=ident, kind=kind, host="alpha", operator="olive", endpoint=NOWHERE, server_id=7, firewall_id=3,
            firewall="alpha-edge", rules=rules, labels=LABELS, taken_at="yesterday", deadline_s=3600.0, restore_s=1.0,
            poll_s=0.05, owner=on_host.owner_of(self.layout), user="admin", identity_file="/k", pin="ssh-ed25519 A",
        )  # fmt: skip

    def left_by_a_lockdown_that_died(self) -> edge.Order:
        order = self.order("lockdown", (SSH, *self.closed))
        edge.write_order(self.layout, order)
        edge.mark_closing(self.layout, order)
        self.at_the_edge(*self.closed)
        return order

    def with_an_open_window(self) -> edge.Order:
        order = self.order("window", self.closed)
        watchdog.arm(self.layout, order, token=self.project.token, environ={})
        edge.mark_closing(self.layout, order)
        self.at_the_edge(*self.closed, WINDOW, window=True)
        return order

    def lock_down(self) -> LockdownOutcome:
        server = self.cloud.servers[0]
        return apply(self.project, "alpha", runner=FakeRunner(), cloud=self.cloud, server=server, pin="x", timing=SHORT)

    def close(self) -> Exposure:
        server = self.cloud.servers[0]
        return close_window(self.project, "alpha", runner=FakeRunner(), cloud=self.cloud, server=server, pin="x")

    def kept(self) -> edge.Order:
        order = edge.read_order(self.layout, "alpha")
        assert order is not None
        return order


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    host = {
        "provisioning": {"adminCidrs": ["203.0.113.0/24"]},
        "sshAuthorizedKeys": [KEY],
        "sshExposure": {"mode": "tailnet"},
        "targetHost": "100.64.0.7",
    }
    fleet = parse_fleet(json.dumps({"schemaVersion": 1, "hosts": {"alpha": host}}))
    token = Secret("a" * 64, "hcloud_token")
    project = Project(
        Layout(tmp_path), fleet, "olive", {}, hcloud_endpoint=NOWHERE, hcloud_token=token, poll_interval_s=0.05
    )
    server = Server(7, "alpha", "running", {}, "cx23", "nbg1", "192.0.2.9", None, {3: "applied"})
    made = Desk(project, FakeCloud(servers=[server]))

    def tell(target: ssh.Target, words: str, **_: Any) -> None:
        made.told.append(words)
        if made.fails is not None and words.startswith("try"):
            raise made.fails

    def tell_by_any(targets: object, words: str, **_: Any) -> None:
        made.told.append(words)

    monkeypatch.setattr(Project, "ssh_identity_file", lambda _, host: tmp_path / host)
    monkeypatch.setattr(on_host, "tell", tell)
    monkeypatch.setattr(on_host, "tell_by_any", tell_by_any)
    monkeypatch.setattr(transaction, "wait_for_tailnet", lambda *_, **__: {4: "100.64.0.7"})
    monkeypatch.setattr(transaction, "prove", lambda *_, **__: Proof(made.account, 3, "", "never", ""))
    monkeypatch.setattr(transaction, "measure_exposure", lambda *_, **__: Exposure(()))
    yield made
    order = edge.read_order(made.layout, "alpha")
    if order is not None:
        watchdog.dismiss_earlier(made.layout, "alpha", order)
    for one in process._LEFT:
        one.wait(30)


DROPPED = UnreachableError("the tailnet dropped", where="alpha")
BUSY = BusyError("somebody else is changing its exposure", where="alpha")


@pytest.mark.parametrize("fails", [DROPPED, BUSY])
def test_a_lockdown_that_goes_on_from_a_dead_one_and_fails_early_opens_the_edge(
    desk: Desk, fails: ClawdletsError
) -> None:
    desk.left_by_a_lockdown_that_died()
    desk.fails = fails
    with pytest.raises(LockdownError, match="the edge is open again as it was; the host's firewall is as before"):
        desk.lock_down()
    assert desk.firewall.rules == tuple(sorted((SSH, *desk.closed)))
    assert edge.unfinished(desk.layout, "alpha") is None
    assert not watchdog.lives(desk.layout, "alpha")


def test_one_that_died_after_the_host_confirmed_is_not_opened_by_the_next(desk: Desk) -> None:
    desk.left_by_a_lockdown_that_died()
    desk.account, desk.fails = LOCKED, DROPPED
    with pytest.raises(LockdownError, match="the tailnet dropped"):
        desk.lock_down()
    assert desk.firewall.rules == desk.closed


def test_where_the_edge_cannot_be_opened_either_the_next_one_still_knows_its_rules(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = desk.left_by_a_lockdown_that_died()
    desk.fails = DROPPED

    def refuse(*_: object) -> None:
        raise KeyError("code")

    monkeypatch.setattr(desk.cloud, "set_rules", refuse)
    with pytest.raises(LockdownError, match=r"THE EDGE COULD NOT BE OPENED AGAIN .*\(KeyError\)"):
        desk.lock_down()
    left = edge.unfinished(desk.layout, "alpha")
    assert left is not None
    assert (left.id == dead.id, left.rules) == (False, dead.rules)
    assert edge.may_be_closed(desk.layout, left)


def test_an_edge_that_is_as_it_should_be_is_left_alone_when_a_lockdown_fails_early(desk: Desk) -> None:
    desk.at_the_edge(SSH, *desk.closed)
    desk.fails = DROPPED
    with pytest.raises(LockdownError, match="now: the host's firewall is as before"):
        desk.lock_down()
    assert not edge.may_be_closed(desk.layout, desk.kept())
    desk.fails = BUSY
    with pytest.raises(BusyError):
        desk.lock_down()
    assert desk.firewall.rules == tuple(sorted((SSH, *desk.closed)))


@pytest.mark.parametrize("fails", [DROPPED, BUSY])
def test_a_lockdown_over_a_window_that_fails_early_closes_it_and_says_so(desk: Desk, fails: ClawdletsError) -> None:
    desk.with_an_open_window()
    desk.fails = fails
    with pytest.raises(LockdownError, match="the breakglass window that was there is closed; the host's firewall"):
        desk.lock_down()
    assert (desk.firewall.rules, dict(desk.firewall.labels)) == (desk.closed, LABELS)
    assert edge.unfinished(desk.layout, "alpha") is None
    assert not watchdog.lives(desk.layout, "alpha")


def test_somebody_elses_window_is_left_to_them_while_they_are_at_the_host(desk: Desk) -> None:
    desk.at_the_edge(*desk.closed, WINDOW, window=True)
    desk.fails = BUSY
    with pytest.raises(BusyError):
        desk.lock_down()
    assert desk.firewall.ssh_is_open
    assert WINDOW_LABEL in desk.firewall.labels


def no_watchdog(*_: object, **__: object) -> None:
    raise LockdownError("the watchdog could not be armed; nothing was changed", where="alpha")


def test_a_watchdog_that_cannot_be_armed_leaves_the_earlier_order_standing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = desk.left_by_a_lockdown_that_died()
    monkeypatch.setattr(process, "spawn", no_watchdog)
    with pytest.raises(LockdownError, match="could not be armed"):
        desk.lock_down()
    assert edge.unfinished(desk.layout, "alpha") == dead
    assert edge.may_be_closed(desk.layout, dead)
    assert desk.firewall.rules == desk.closed


def test_a_window_whose_watchdog_went_for_one_that_could_not_be_armed_is_closed(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.with_an_open_window()
    with monkeypatch.context() as patched:
        patched.setattr(process, "spawn", no_watchdog)
        with pytest.raises(LockdownError, match="the breakglass window is closed at the edge, as its watchdog is gone"):
            desk.lock_down()
    assert (desk.firewall.rules, dict(desk.firewall.labels)) == (desk.closed, LABELS)
    assert edge.unfinished(desk.layout, "alpha") is None


def test_a_watchdog_that_does_not_go_keeps_its_window(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    window = desk.with_an_open_window()
    monkeypatch.setattr(watchdog, "END_WITHIN_S", -1.0)
    with monkeypatch.context() as patched:
        patched.setattr(edge, "decide", lambda *_: None)  # it does not hear it
        with pytest.raises(LockdownError, match=r"does not end \(process [0-9]+\)"):
            desk.lock_down()
    assert edge.unfinished(desk.layout, "alpha") == window
    assert watchdog.lives(desk.layout, "alpha")
    monkeypatch.undo()
    assert desk.firewall.ssh_is_open


def test_closing_refuses_a_lockdown_that_died_and_keeps_its_rules(desk: Desk) -> None:
    dead = desk.left_by_a_lockdown_that_died()
    with pytest.raises(LockdownError, match=r"did not come to its end[\s\S]*clawdlets lockdown --host alpha"):
        desk.close()
    assert edge.unfinished(desk.layout, "alpha") == dead
    assert desk.told == []


def test_closing_ends_a_window_and_its_watchdog_also_one_that_a_lockdown_was_to_end(desk: Desk) -> None:
    desk.with_an_open_window()
    desk.close()
    assert (desk.firewall.rules, dict(desk.firewall.labels)) == (desk.closed, LABELS)
    assert not watchdog.lives(desk.layout, "alpha")
    edge.write_order(desk.layout, replace(desk.order("lockdown", desk.closed, "second"), closing=True))
    desk.at_the_edge(*desk.closed, WINDOW, window=True)
    desk.close()
    assert not desk.firewall.ssh_is_open
    assert edge.unfinished(desk.layout, "alpha") is None


def test_a_window_is_closed_before_opentofu_is_asked_and_its_label_goes_last(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.with_an_open_window()
    asked: list[str] = []

    def noting(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(*words: Any) -> None:
            asked.append(name)
            real(*words)

        return call

    def opentofu(*_: object, **__: object) -> None:
        asked.append("opentofu")
        raise LockdownError("enough seen", where="alpha")

    monkeypatch.setattr(desk.cloud, "set_rules", noting("rules", desk.cloud.set_rules))
    monkeypatch.setattr(desk.cloud, "set_labels", noting("labels", desk.cloud.set_labels))
    monkeypatch.setattr(provision, "apply", opentofu)
    with pytest.raises(LockdownError, match="enough seen"):
        desk.lock_down()
    assert asked == ["rules", "labels", "opentofu"]


def test_a_window_of_an_edge_with_no_rules_at_all_can_be_closed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.at_the_edge()
    real = desk.cloud.set_rules

    def as_the_api_is_asked(firewall: Firewall, rules: tuple[FirewallRule, ...]) -> None:
        assert rules, "an empty rule set is never asked for"
        real(firewall, rules)

    def unreachable(*_: object, **__: object) -> None:
        raise UnreachableError("no way in", where="alpha")

    monkeypatch.setattr(desk.cloud, "set_rules", as_the_api_is_asked)
    monkeypatch.setattr(on_host, "tell_by_any", unreachable)
    monkeypatch.setattr(on_host, "read_account", unreachable)
    open_window(
        desk.project, "alpha", ("198.51.100.7/32",), timedelta(minutes=5),
        runner=FakeRunner(), cloud=desk.cloud, server=desk.cloud.servers[0], pin="x",
    )  # fmt: skip
    assert desk.firewall.ssh_is_open
    assert edge.put_back(desk.cloud, desk.kept(), within_s=1.0)  # what its watchdog does at the deadline
    assert (desk.firewall.rules, dict(desk.firewall.labels)) == (desk.closed, LABELS)
