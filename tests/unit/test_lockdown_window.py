"""What may be asked of a breakglass window, who a canary holds back, and what provision makes of a window."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest

from clawdlets_ops import provision, workflow
from clawdlets_ops.commands.lockdown import choose
from clawdlets_ops.errors import FleetError, LockdownError, SettingsError, UnreachableError
from clawdlets_ops.fleet import parse_fleet
from clawdlets_ops.hetzner import WINDOW_LABEL, WINDOW_RULE, Firewall, FirewallRule, Server
from clawdlets_ops.journal import Journal
from clawdlets_ops.layout import Layout
from clawdlets_ops.lockdown import close_window, open_until, parse_duration, parse_networks
from clawdlets_ops.lockdown import host as on_host
from clawdlets_ops.project import Project
from clawdlets_ops.pyinfra_plugin.canaries import failed_canaries
from clawdlets_ops.testing import FakeCloud, FakeRunner

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s canary@example"

UDP = FirewallRule("in", "udp", "41641", ("0.0.0.0/0", "::/0"))
WINDOW = FirewallRule("in", "tcp", "22", ("203.0.113.7/32",), f"{WINDOW_RULE} until then, by olive")


@pytest.mark.parametrize(("text", "seconds"), [("1m", 60), ("60s", 60), ("30m", 1800), ("4h", 14400)])
def test_a_window_has_a_length(text: str, seconds: int) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text", ["", "30", "59s", "5h", "241m", "0m", "-5m", "1.5h", "30 m", "30m ", "٣0m", "99999999m"]
)
def test_lengths_that_are_refused(text: str) -> None:
    with pytest.raises(LockdownError, match="is not a length from 1m to 4h"):
        parse_duration(text)


def test_networks_are_canonical_and_each_counts_once() -> None:
    assert parse_networks(["203.0.113.7", "203.0.113.7/32", "2001:db8::/64"]) == ("2001:db8::/64", "203.0.113.7/32")


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ([], "0 networks"),
        (["0.0.0.0/0"], "the internet at large"),
        (["::/0"], "the internet at large"),
        (["0.0.0.0/1", "128.0.0.0/1"], "the internet at large"),
        (["203.0.113.7/24"], "host bits"),
        (["here"], "not a network"),
        (["127.0.0.1/32"], "nobody comes from"),
        (["198.51.100.1/32; reboot"], "not a network"),
        ([f"198.51.100.{number}/32" for number in range(9)], "9 networks"),
    ],
)
def test_networks_that_are_refused(texts: list[str], why: str) -> None:
    with pytest.raises(LockdownError, match=why):
        parse_networks(texts)


def test_the_label_says_until_when_and_nonsense_is_not_read_as_none() -> None:
    closed = Firewall(3, "alpha-edge", {}, (UDP,))
    assert open_until(None) is None
    assert open_until(closed) is None
    opened = replace(closed, labels={WINDOW_LABEL: "20261127T120000Z"})
    assert open_until(opened) == datetime(2026, 11, 27, 12, tzinfo=UTC)
    with pytest.raises(LockdownError, match="which is no time"):
        open_until(replace(closed, labels={WINDOW_LABEL: "noon"}))


def test_a_firewall_without_its_window_is_the_one_before() -> None:
    before = Firewall(3, "alpha-edge", {"managed-by": "clawdlets"}, (UDP,))
    opened = replace(before, labels={**before.labels, WINDOW_LABEL: "20261127T120000Z"}, rules=(WINDOW, UDP))
    assert opened.without_window() == before
    assert before.without_window() is before
    # a rule of that name without the label is no window: it is not overlooked
    assert replace(before, rules=(WINDOW, UDP)).without_window().ssh_is_open


@pytest.mark.parametrize(
    ("count", "host", "failed", "held_by"),
    [
        ("0", "c", {"a"}, []),
        ("1", "a", set(), []),
        ("1", "b", {"a"}, ["a"]),
        ("2", "b", {"a"}, []),
        ("2", "c", {"a", "b"}, ["a", "b"]),
        ("9", "c", {"a"}, []),
    ],
)
def test_a_failed_canary_holds_back_those_after_it(count: str, host: str, failed: set[str], held_by: list[str]) -> None:
    assert failed_canaries(["a", "b", "c"], count, host, failed) == held_by


@pytest.mark.parametrize("count", ["one", "-1", "1.5", "²"])
def test_a_number_of_canaries_is_a_number(count: str) -> None:
    with pytest.raises(SettingsError, match="no number of hosts"):
        failed_canaries(["a"], count, "a", set())


def project(tmp_path: Path, **modes: str) -> Project:
    hosts = {
        name: {
            "provisioning": {"adminCidrs": ["203.0.113.0/24"]},
            "sshAuthorizedKeys": [KEY],
            "sshExposure": {"mode": mode},
        }
        for name, mode in modes.items()
    }
    fleet = parse_fleet(json.dumps({"schemaVersion": 1, "hosts": hosts}))
    return Project(Layout(tmp_path), fleet, "olive", {})


def test_which_hosts_are_meant(tmp_path: Path) -> None:
    made = project(tmp_path, a="tailnet", b="public", c="tailnet")
    assert choose(made, (), every=True) == ["a", "c"]
    assert choose(made, ("c", "a", "c"), every=False) == ["c", "a"]
    for hosts, every in (((), False), (("a",), True)):
        with pytest.raises(click.UsageError):
            choose(made, hosts, every=every)
    with pytest.raises(LockdownError, match="is declared public, and nothing is closed that is declared open"):
        choose(made, ("b",), every=False)
    with pytest.raises(FleetError, match="there is no host 'aa'"):
        choose(made, ("aa",), every=False)
    with pytest.raises(LockdownError, match="no host is declared tailnet"):
        choose(project(tmp_path, b="public"), (), every=True)


ADMINS = FirewallRule("in", "tcp", "22", ("203.0.113.0/24",), "SSH for the admin networks")


@pytest.mark.parametrize(
    ("labels", "rules", "closed"),
    [
        ({}, (ADMINS, UDP), False),  # open since before a lockdown: that there is another way in was never proved
        ({}, (ADMINS, WINDOW, UDP), False),
        ({WINDOW_LABEL: "20261127T120000Z"}, (WINDOW, UDP), True),
        ({}, (WINDOW, UDP), True),
    ],
)
def test_only_a_window_is_closed_without_a_proof(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    labels: dict[str, str],
    rules: tuple[FirewallRule, ...],
    closed: bool,
) -> None:
    server = Server(7, "a", "running", {}, "cx23", "nbg1", "192.0.2.9", None, {3: "applied"})
    cloud = FakeCloud(servers=[server], firewalls=[Firewall(3, "a-edge", labels, tuple(sorted(rules)))])

    def unreachable(targets: object, words: str) -> None:
        raise UnreachableError("no way in", where="a")

    monkeypatch.setattr(on_host, "tell_by_any", unreachable)
    monkeypatch.setattr(on_host, "tailnet_addresses", lambda *_: {})
    monkeypatch.setattr(Project, "ssh_identity_file", lambda _, host: tmp_path / host)
    said = "the edge is closed, and the host could not be told" if closed else "has no window"
    with pytest.raises(LockdownError, match=said):
        close_window(project(tmp_path, a="tailnet"), "a", runner=FakeRunner(), cloud=cloud, server=server, pin="x")
    assert cloud.firewalls[0].ssh_is_open is not closed


def test_a_host_that_is_not_there_is_not_waited_for(tmp_path: Path) -> None:
    tools = workflow.Tools(FakeRunner(), FakeCloud(), Journal(tmp_path / "run"))
    with pytest.raises(
        LockdownError, match="does not answer as an installed host with the pinned host key; nothing was closed"
    ):
        workflow.apply("lockdown", project(tmp_path, a="tailnet"), "a", tools)


def test_provision_takes_a_window_for_no_drift_and_a_lockdown_does(tmp_path: Path) -> None:
    declared = project(tmp_path, a="tailnet").fleet.host("a")
    labels = {"managed-by": "clawdlets", "clawdlets-host": "a"}
    closed = provision.edge_rules(declared, window_open=False)
    firewall = Firewall(3, "a-edge", {**labels, WINDOW_LABEL: "20261127T120000Z"}, tuple(sorted((*closed, WINDOW))))
    order = declared.hetzner
    server = Server(
        7, "a", "running", labels, order.server_types[0], order.location, "192.0.2.9", "2001:db8::1", {3: "applied"},
        protected=order.delete_protection,
    )  # fmt: skip
    seen = provision.Observed(server, firewall, None, whole=False, host="a")

    def steps(window_open: bool | None) -> str:
        made = provision.plan("a", declared, seen, public_key=KEY, endpoint="https://x", window_open=window_open)
        return "\n".join(step for step in made.steps if "firewall" in step)

    assert steps(None) == ""
    assert "close in tcp/22 203.0.113.7/32" in steps(False)
