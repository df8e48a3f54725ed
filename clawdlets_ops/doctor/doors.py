"""Port 22 of hosts that run: what the fleet file, the cloud, the host and real connections say of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

from clawdlets_ops import lockdown, provision
from clawdlets_ops.doctor.judging import Verdict, failed, passed, settled, without
from clawdlets_ops.doctor.looking import attempt
from clawdlets_ops.doctor.snapshot import Blind, NotHere, Snapshot, Wrong
from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.hetzner import Cloud
from clawdlets_ops.lockdown import edge, watchdog
from clawdlets_ops.lockdown import host as on_host
from clawdlets_ops.lockdown.drift import Door, drift, open_windows, overdue
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.vault import declared_pin
from clawdlets_ops.ssh import Target
from clawdlets_ops.verify.exposure import measure_exposure

AT_ONCE = 8
"""A look at a door is mostly waiting, for what does not answer."""


class Doors(Protocol):
    """``look_at_doors``, or what stands in its place in a test."""

    def __call__(
        self, project: Project | Wrong, hosts: Collection[str], *, runner: Runner, cloud_of: Callable[[Project], Cloud]
    ) -> Mapping[str, Door | Blind | NotHere]:
        """What is seen, by host."""
        ...


def look_at_doors(
    project: Project | Wrong, hosts: Collection[str], *, runner: Runner, cloud_of: Callable[[Project], Cloud]
) -> Mapping[str, Door | Blind | NotHere]:
    """Two GETs, one login and the probes for each host that has a server; AT_ONCE hosts side by side."""
    if isinstance(project, Wrong):
        return {host: Blind(project.why) for host in hosts}
    try:
        cloud = cloud_of(project)
    except ClawdletsError as error:
        return {host: Blind(error.what) for host in hosts}
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        return dict(
            zip(hosts, pool.map(lambda host: attempt(partial(_look, project, host, runner, cloud)), hosts), strict=True)
        )


def _look(project: Project, host: str, runner: Runner, cloud: Cloud) -> Door | NotHere:
    declared = project.fleet.host(host)
    server = cloud.server(host)
    if server is None:
        return NotHere("there is no such server")
    firewall = cloud.firewall(provision.firewall_name(host))
    attached = firewall is not None and firewall.id in server.firewalls
    addresses: dict[int, str] = {}
    said, why_not = None, ""
    try:
        addresses = lockdown.tailnet_addresses(runner, host, declared)
        pin = declared_pin(project.layout, host)
        if pin is None:
            why_not = "it has no pinned key"
        else:
            base = on_host.base_target(project, host, pin)
            said, why_not = _ask([target.address for target in on_host.ways_in(base, addresses, server)], base)
    except ClawdletsError as error:
        why_not = error.what.splitlines()[0]
    unfinished = edge.unfinished(project.layout, host)
    return Door(
        declared=declared.ssh_exposure.mode,
        edge=firewall if attached else None,
        status=server.firewalls.get(firewall.id, "") if firewall else "",
        host=said,
        measured=measure_exposure(project.vantages, server.addresses, addresses, runner=runner),
        why_not=why_not,
        unfinished=unfinished.taken_at if unfinished and unfinished.kind == "lockdown" else "",
        guarded=watchdog.lives(project.layout, host),
    )


def _ask(addresses: list[str], base: Target) -> tuple[lockdown.HostExposure | None, str]:
    why_not = "it has no address"
    for address in addresses:
        try:
            return lockdown.read_status(base.at(address)), ""
        except ClawdletsError as error:
            why_not = error.what.splitlines()[0]
    return None, why_not


def _doors(snapshot: Snapshot) -> Iterator[tuple[str, Door | Blind | NotHere]]:
    if snapshot.field is None:
        raise ValueError("what is deployed was not looked at")
    for host in snapshot.hosts:
        yield host, snapshot.field.doors[host]


def accounts_agree(snapshot: Snapshot) -> Iterator[Verdict]:
    """DRF-03."""
    for host, door in _doors(snapshot):
        if isinstance(door, Blind | NotHere):
            yield without(door, host)
            continue
        seen = drift(door)
        yield settled(seen.faults, seen.agreed, host, gaps=seen.gaps)


def nothing_is_overdue(snapshot: Snapshot) -> Iterator[Verdict]:
    """WIN-01."""
    for host, door in _doors(snapshot):
        if isinstance(door, Blind | NotHere):
            yield without(door, host)
            continue
        yield settled(overdue(door, datetime.now(UTC)), "no window is overdue, no lockdown unfinished", host)


def no_window_is_open(snapshot: Snapshot) -> Iterator[Verdict]:
    """WIN-02."""
    for host, door in _doors(snapshot):
        if isinstance(door, Blind | NotHere):
            yield without(door, host)
            continue
        found = open_windows(door, datetime.now(UTC))
        yield failed("; ".join(found), host) if found else passed("no breakglass window is open", host)
