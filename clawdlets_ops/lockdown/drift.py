"""Declared, cloud, host and measured: four accounts of one door, and where they do not agree. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from clawdlets_ops.errors import LockdownError
from clawdlets_ops.hetzner import Firewall
from clawdlets_ops.lockdown.plan import WINDOW, HostExposure
from clawdlets_ops.lockdown.window import open_until
from clawdlets_ops.verify.exposure import Exposure


@dataclass(frozen=True)
class Door:
    """What each of them says of one host. ``edge`` is the attached firewall and ``status`` what the server shows of it; ``host``
    None when it could not be asked (``why_not``); ``unfinished`` says that a lockdown from here was left undecided, and
    ``guarded`` that its watchdog, or a window's, is on guard."""

    declared: str
    edge: Firewall | None
    status: str
    host: HostExposure | None
    measured: Exposure
    why_not: str = ""
    unfinished: str = ""
    guarded: bool = False


@dataclass(frozen=True)
class Drift:
    """What does not agree, and what could not be seen."""

    faults: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()
    agreed: str = ""


@dataclass
class _Notes:
    faults: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)


def drift(door: Door) -> Drift:
    """Compare the four; an account that is missing is a gap, never an agreement."""
    notes = _Notes()
    closed = door.declared == "tailnet"
    if door.edge is None:
        notes.faults.append("the cloud has no firewall of ours attached")
    else:
        if door.status != "applied":
            notes.faults.append(
                f"the cloud's firewall is {door.status}, so that its rules say nothing of what is in force"
            )
        if closed and door.edge.ssh_is_open:
            notes.faults.append("declared tailnet, and the cloud's firewall lets tcp/22 in")
        if not closed and not door.edge.ssh_is_open:
            notes.faults.append(f"declared {door.declared}, and the cloud's firewall lets no tcp/22 in")
    if door.host is None:
        notes.gaps.append(f"the host was not asked: {door.why_not or 'it does not answer'}")
    else:
        if door.host.mode != door.declared:
            notes.faults.append(f"declared {door.declared}, and the host's own firewall is {door.host.mode}")
        if door.host.armed:
            notes.faults.append("the host's firewall is on trial, and reverts by itself")
    reached = door.measured.open_from_internet()
    if closed and reached:
        notes.faults.append(f"declared tailnet, and port 22 was reached from {', '.join(reached)}")
    if blocked := door.measured.closed_from_tailnet():
        notes.faults.append(f"port 22 was not reached over the tailnet from {', '.join(blocked)}")
    if not closed and reached and door.edge is not None and not door.edge.ssh_is_open:
        notes.faults.append(f"the cloud says closed, and port 22 was reached from {', '.join(reached)}")
    notes.gaps += door.measured.unknown()
    if not door.measured.cells:
        notes.gaps.append("nothing was measured")
    agreed = f"declared, cloud, host and measured are {door.declared}"
    return Drift(tuple(notes.faults), tuple(notes.gaps), agreed)


def overdue(door: Door, now: datetime) -> list[str]:
    """What should have closed by itself, or been decided, and has not."""
    faults = []
    try:
        until = open_until(door.edge)
    except LockdownError as error:
        return [error.what]
    if until is not None and now >= until:
        faults.append(
            f"a breakglass window was to close at {until:%Y-%m-%d %H:%M:%S} UTC, and its label is still there"
        )
    if until is None and door.host is not None and door.host.mode == WINDOW:
        faults.append("the host has a breakglass window that the cloud's firewall knows nothing of")
    if door.unfinished and not door.guarded:
        faults.append(f"a lockdown of {door.unfinished} did not come to its end, and its watchdog is gone")
    return faults


def open_windows(door: Door, now: datetime) -> list[str]:
    """Windows that are open and may be."""
    try:
        until = open_until(door.edge)
    except LockdownError:
        return []
    if until is None or now >= until:
        return []
    guard = "" if door.guarded else "; no watchdog on this machine closes its edge"
    return [f"a breakglass window is open until {until:%Y-%m-%d %H:%M:%S} UTC{guard}"]
