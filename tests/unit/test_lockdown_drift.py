"""Four accounts of one door: where they do not agree is a finding, and so is a window that is open or overdue."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.doctor import doors
from clawdlets_ops.doctor.snapshot import Blind, Field, NotHere, Snapshot, Wrong
from clawdlets_ops.errors import CloudError
from clawdlets_ops.finding import State
from clawdlets_ops.fleet import parse_fleet
from clawdlets_ops.hetzner import WINDOW_LABEL, WINDOW_TIME, Firewall, FirewallRule
from clawdlets_ops.layout import Layout
from clawdlets_ops.lockdown import HostExposure
from clawdlets_ops.lockdown.drift import Door, drift, open_windows, overdue
from clawdlets_ops.project import Project
from clawdlets_ops.testing import FakeCloud, FakeRunner
from clawdlets_ops.verify.exposure import Cell, Exposure, Reach

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
SSH = FirewallRule("in", "tcp", "22", ("203.0.113.0/24",))
UDP = FirewallRule("in", "udp", "41641", ("0.0.0.0/0", "::/0"))


def measured(stranger: Reach = "no", member: Reach = "yes") -> Exposure:
    return Exposure(
        (
            Cell("stranger", "internet", 4, "192.0.2.1", 22, stranger, "blind" if stranger == "unknown" else ""),
            Cell("member", "tailnet", 4, "100.64.0.2", 22, member),
        )
    )


def firewall(*rules: FirewallRule, ends: datetime | str | None = None) -> Firewall:
    label = ends.strftime(WINDOW_TIME) if isinstance(ends, datetime) else ends
    return Firewall(3, "alpha-edge", {WINDOW_LABEL: label} if label else {}, rules)


LOCKED = Door("tailnet", firewall(UDP), "applied", HostExposure("tailnet", armed=False), measured())


@pytest.mark.parametrize(
    ("door", "fault"),
    [
        (replace(LOCKED, edge=firewall(SSH)), "the cloud's firewall lets tcp/22 in"),
        (replace(LOCKED, edge=None), "no firewall of ours attached"),
        (replace(LOCKED, status="pending"), "is pending"),
        (replace(LOCKED, host=HostExposure("bootstrap", armed=False)), "the host's own firewall is bootstrap"),
        (replace(LOCKED, host=HostExposure("tailnet", armed=True)), "on trial"),
        (replace(LOCKED, measured=measured("yes")), "reached from stranger over IPv4"),
        (replace(LOCKED, measured=measured(member="no")), "not reached over the tailnet from member"),
        (replace(LOCKED, declared="public"), "lets no tcp/22 in"),
        (
            replace(LOCKED, declared="public", host=HostExposure("public", armed=False), measured=measured("yes")),
            "closed, and",
        ),
    ],
)
def test_each_disagreement_is_a_fault(door: Door, fault: str) -> None:
    found = drift(door).faults
    assert any(fault in one for one in found), found
    assert drift(LOCKED).faults == ()


@pytest.mark.parametrize(
    ("door", "gap"),
    [
        (replace(LOCKED, host=None, why_not="no connection"), "no connection"),
        (replace(LOCKED, measured=measured("unknown")), "blind"),
        (replace(LOCKED, measured=Exposure(())), "nothing was measured"),
    ],
)
def test_what_was_not_seen_is_a_gap_and_never_an_agreement(door: Door, gap: str) -> None:
    found = drift(door)
    assert found.faults == ()
    assert any(gap in one for one in found.gaps)


@pytest.mark.parametrize(
    ("door", "late", "opened"),
    [
        (LOCKED, 0, 0),
        (replace(LOCKED, edge=firewall(SSH, ends=NOW + timedelta(minutes=1)), guarded=True), 0, 1),
        (replace(LOCKED, edge=firewall(SSH, ends=NOW)), 1, 0),
        (replace(LOCKED, edge=firewall(SSH, ends="tomorrow")), 1, 0),
        (replace(LOCKED, host=HostExposure("window", armed=True)), 1, 0),
        (replace(LOCKED, unfinished="2026-11-27T11:00:00+00:00"), 1, 0),
        (replace(LOCKED, unfinished="2026-11-27T11:00:00+00:00", guarded=True), 0, 0),
    ],
)
def test_windows_and_what_is_overdue(door: Door, late: int, opened: int) -> None:
    assert (len(overdue(door, NOW)), len(open_windows(door, NOW))) == (late, opened)


def test_a_window_whose_watchdog_is_gone_says_so() -> None:
    door = replace(LOCKED, edge=firewall(SSH, ends=NOW + timedelta(minutes=1)))
    assert "no watchdog" in open_windows(door, NOW)[0]
    assert "no watchdog" not in open_windows(replace(door, guarded=True), NOW)[0]


def snapshot(door: Door | Blind | NotHere) -> Snapshot:
    field = Field({}, (), NotHere(""), NotHere(""), doors={"alpha": door})
    return Snapshot(Path(), ("alpha",), Wrong(""), Wrong(""), field=field)


SOON = datetime.now(UTC) + timedelta(hours=1)


@pytest.mark.parametrize(
    ("door", "agree", "due", "window"),
    [
        (LOCKED, State.PASS, State.PASS, State.PASS),
        (replace(LOCKED, edge=firewall(SSH)), State.FAIL, State.PASS, State.PASS),
        (replace(LOCKED, host=None), State.UNKNOWN, State.PASS, State.PASS),
        (replace(LOCKED, unfinished="then"), State.PASS, State.FAIL, State.PASS),
        (replace(LOCKED, edge=firewall(UDP, ends=SOON)), State.PASS, State.PASS, State.FAIL),
        (Blind("no token"), State.UNKNOWN, State.UNKNOWN, State.UNKNOWN),
        (NotHere("no server"), State.NOT_APPLICABLE, State.NOT_APPLICABLE, State.NOT_APPLICABLE),
    ],
)
def test_what_the_doctor_says_of_it(door: Door | Blind | NotHere, agree: State, due: State, window: State) -> None:
    checks = (doors.accounts_agree, doors.nothing_is_overdue, doors.no_window_is_open)
    assert [next(iter(check(snapshot(door)))).state for check in checks] == [agree, due, window]


def test_doors_are_looked_at_side_by_side_and_each_is_its_own_hosts() -> None:
    """Every look waits until as many others are under way: one after the other, none would ever end."""
    together = threading.Barrier(doors.AT_ONCE, timeout=30)
    declared: dict[str, Any] = json.loads((Path(__file__).parents[2] / "fleet" / "clawdlets.json").read_text())
    declared.pop("cattle", None)
    declared["hosts"] = {f"host-{number}": declared["hosts"]["alpha"] for number in range(doors.AT_ONCE)}
    project = Project(Layout(Path("/nonexistent")), parse_fleet(json.dumps(declared)), "olive", {})

    class Cloud(FakeCloud):
        def server(self, name: str) -> None:
            together.wait()
            if name == "host-3":
                raise CloudError("is not to be seen", where=name)

    seen = doors.look_at_doors(project, list(project.fleet.hosts), runner=FakeRunner(), cloud_of=lambda _: Cloud())
    assert list(seen) == list(project.fleet.hosts)
    assert {host for host, one in seen.items() if isinstance(one, Blind)} == {"host-3"}
    assert sum(isinstance(one, NotHere) for one in seen.values()) == doors.AT_ONCE - 1
