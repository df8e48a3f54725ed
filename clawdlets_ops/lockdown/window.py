"""A breakglass window: public SSH for some networks and some minutes, on a host that is locked down. It closes by itself.

Three clocks close it, each without the others: the host's own timer, the watchdog on this machine, and whoever reads the
label on the cloud firewall, which says until when (``clawdlets doctor`` does). The edge opens last and closes first.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from clawdlets_ops import provision
from clawdlets_ops.errors import ClawdletsError, LockdownError, UnreachableError
from clawdlets_ops.files import locked
from clawdlets_ops.fleet import Host, parse_cidr, world_open
from clawdlets_ops.hetzner import WINDOW_LABEL, WINDOW_RULE, WINDOW_TIME, Cloud, Firewall, FirewallRule, Server
from clawdlets_ops.install import ADMIN
from clawdlets_ops.lockdown import edge, watchdog
from clawdlets_ops.lockdown import host as on_host
from clawdlets_ops.lockdown.plan import Timing, refuse_wrong_clock
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.verify.exposure import Exposure, measure_exposure

SHORTEST, LONGEST = timedelta(minutes=1), timedelta(hours=4)
MOST_NETWORKS = 8
OPEN_WITHIN_S = 60.0
LOCK_WAIT_S = 60.0
_DURATION = re.compile(r"([1-9][0-9]{0,4})(s|m|h)")
_UNIT_S = {"s": 1, "m": 60, "h": 3600}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Window:
    """An open window: from which networks, until when (UTC), and on which sides it was opened; ``by_hand`` is what to type on
    the host's console where it could not be told."""

    host: str
    networks: tuple[str, ...]
    until: datetime
    by_hand: str = ""


def parse_duration(text: str) -> timedelta:
    """``90s``, ``30m`` or ``2h``, from a minute to four hours; LockdownError."""
    found = _DURATION.fullmatch(text)
    length = timedelta(seconds=int(found[1]) * _UNIT_S[found[2]]) if found else timedelta()
    if not SHORTEST <= length <= LONGEST:
        raise LockdownError(
            f"{text!r} is not a length from 1m to 4h",
            where="--for",
            fix="write it like 90s, 30m or 2h; for longer, close it and open another",
        )
    return length


def parse_networks(texts: Sequence[str]) -> tuple[str, ...]:
    """Canonical CIDRs; LockdownError for none, too many, what is no network, and what amounts to the internet at large."""
    try:
        networks = [parse_cidr(text) for text in texts]
    except ValueError as error:
        raise LockdownError(str(error), where="--cidr", fix="write it like 203.0.113.7/32 or 2001:db8::/64") from None
    if not 1 <= len(networks) <= MOST_NETWORKS:
        raise LockdownError(f"{len(networks)} networks", where="--cidr", fix=f"name 1 to {MOST_NETWORKS}")
    if wide := world_open(networks):
        raise LockdownError(
            f"{', '.join(map(str, wide))} is the internet at large",
            where="--cidr",
            fix="name the address that you come from (/32, /128), or your provider's network",
        )
    for network in networks:
        if network.is_loopback or network.is_multicast:
            raise LockdownError(f"nobody comes from {network}", where="--cidr", fix="name the address you come from")
    return tuple(sorted(str(network) for network in set(networks)))


def open_until(firewall: Firewall | None) -> datetime | None:
    """Until when the firewall's label says that a window is open; None without one. LockdownError when it is not understood."""
    text = firewall.labels.get(WINDOW_LABEL) if firewall else None
    if text is None:
        return None
    try:
        return datetime.strptime(text, WINDOW_TIME).replace(tzinfo=UTC)
    except ValueError:
        raise LockdownError(
            f"its label {WINDOW_LABEL} says {text!r}, which is no time", where=firewall.name if firewall else ""
        ) from None


def open_window(
    project: Project,
    host: str,
    networks: tuple[str, ...],
    length: timedelta,
    *,
    runner: Runner,
    cloud: Cloud,
    server: Server,
    pin: str,
    say: Say = lambda _: None,
    journal: Path | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Window:
    """Arm the watchdog, open the host, open the edge; LockdownError when the host is not locked down, or has a window.

    A host that cannot be reached (the tailnet is down, which is what windows are for) is opened at the edge alone, and
    ``by_hand`` says what to type on its console.
    """
    declared = project.fleet.host(host)
    with _alone(project, host, "opening"):
        firewall = _locked_firewall(project, host, declared, cloud, server)
        until = (now() + length).replace(microsecond=0)
        order = _order(project, host, declared, firewall, server, pin, length, until, runner, journal)
        guard = watchdog.arm(project.layout, order, token=project.token, environ=project.environ)
        say(f"the watchdog is armed: process {guard.background.pid}, closes at {until:%H:%M:%S} UTC")
        seconds = int(length.total_seconds())
        by_hand = ""
        base = on_host.base_target(project, host, pin)
        try:
            try:
                inside = [base.at(address) for address in order.ways]
                if inside:
                    refuse_wrong_clock(host, on_host.read_account(inside[0]), now=now())
                words = f"open {seconds} {order.owner}"
                way = on_host.tell_by_any(inside, words, stdin="".join(f"{one}\n" for one in networks))
                say(f"the host lets {', '.join(networks)} in (told over {way.address}); its own timer ends that")
            except UnreachableError as error:
                by_hand = f"printf '%s\\n' {' '.join(networks)} | clawdlets-exposure open {seconds} {order.owner}"
                say(f"the host could not be told: {str(error).splitlines()[0]}")
            edge.mark_closing(project.layout, order)
            description = f"{WINDOW_RULE} until {until:%Y-%m-%d %H:%M} UTC, by {project.operator}"
            rule = FirewallRule("in", "tcp", "22", networks, description[:255])
            kept = tuple(one for one in order.rules if one != provision.NEVER_MATCHES)
            labels = {**order.labels, WINDOW_LABEL: until.strftime(WINDOW_TIME)}
            edge.put_back(cloud, replace(order, rules=(*kept, rule), labels=labels), within_s=OPEN_WITHIN_S)
            say(f"the edge lets {', '.join(networks)} in, applied; its label says until when")
        except ClawdletsError as error:
            raise _taken_back(project, host, error, order, guard, cloud) from error
        return Window(host, networks, until, by_hand)


def close_window(
    project: Project,
    host: str,
    *,
    runner: Runner,
    cloud: Cloud,
    server: Server,
    pin: str,
    say: Say = lambda _: None,
) -> Exposure:
    """Close the edge, then the host, and look from outside; again, nothing is changed. LockdownError when something is still
    open, or the host could not be told and does not close by itself, and when what is open is no window: a door that is
    open since before a lockdown is closed by one, which proves first that there is another."""
    declared = project.fleet.host(host)
    if declared.ssh_exposure.mode != "tailnet":
        raise _not_locked(host, declared)
    with _alone(project, host, "closing"):
        firewall = cloud.firewall(provision.firewall_name(host))
        if firewall is None:
            raise LockdownError("its firewall is not there", where=host, fix="run the provision stage")
        _refuse_without_window(host, firewall)
        earlier = edge.unfinished(project.layout, host)
        _refuse_lockdown(host, earlier)
        labels = {name: value for name, value in firewall.labels.items() if name != WINDOW_LABEL}
        rules = provision.edge_rules(declared, window_open=False)
        order = _order_of(project, host, firewall, server, pin, rules, labels, timedelta(minutes=5), None, (), "")
        changed = edge.put_back(cloud, order, within_s=OPEN_WITHIN_S)
        say("the edge is closed, read back from the API" if changed else "the edge was closed already")
        watchdog.dismiss_earlier(project.layout, host, earlier)
        if earlier is not None:
            edge.decide(project.layout, earlier, watchdog.CLOSED)
        addresses = on_host.tailnet_addresses(runner, host, declared)
        base = on_host.base_target(project, host, pin)
        try:
            on_host.tell_by_any(on_host.ways_in(base, addresses, server), f"revert {order.owner}")
        except UnreachableError as error:
            raise LockdownError(
                f"the edge is closed, and the host could not be told ({error.what.splitlines()[0]}); its own timer closes it",
                where=host,
                fix="run again once the tailnet is back, or wait for the end of the window",
            ) from error
        say("the host is as it was kept")
        after = measure_exposure(project.vantages, server.addresses, addresses, runner=runner)
        if doors := after.open_from_internet():
            raise LockdownError(f"port 22 is still reachable from outside: {', '.join(doors)}", where=host)
        return after


def _alone(project: Project, host: str, what: str) -> AbstractContextManager[int]:
    holder = f"{what} a window of {host} by {project.operator}"
    return locked(project.layout.lock(host), what=f"the exposure of {host}", wait_s=LOCK_WAIT_S, holder=holder)


def _not_locked(host: str, declared: Host) -> LockdownError:
    return LockdownError(
        f"is declared {declared.ssh_exposure.mode}: a window is for a host that is locked down",
        where=f"hosts.{host}.sshExposure.mode",
        fix="its admin networks are provisioning.adminCidrs; change these and provision, or declare tailnet and lock down",
    )


def _refuse_without_window(host: str, firewall: Firewall) -> None:
    """LockdownError when tcp/22 is open at the edge by other rules than a window's, and no label says that there is one. Pure."""
    others = [rule for rule in firewall.rules if rule.covers_tcp(22) and not rule.description.startswith(WINDOW_RULE)]
    if others and WINDOW_LABEL not in firewall.labels:
        raise LockdownError(
            "has no window: tcp/22 is open at the edge by other rules, and nothing was closed",
            where=host,
            fix=f"clawdlets lockdown --host {host}, which proves the tailnet before it closes anything",
        )


def _refuse_lockdown(host: str, earlier: edge.Order | None) -> None:
    """LockdownError when a lockdown did not come to its end: the rules that it goes back to would be forgotten, and its
    watchdog sent away. One whose rules are the closed edge's (it was to end a window) wants what closing does. Pure."""
    if earlier is not None and earlier.kind == "lockdown" and earlier.opens:
        raise LockdownError(
            f"a lockdown of {earlier.taken_at} did not come to its end, and this is no window; nothing was changed",
            where=host,
            fix=f"clawdlets lockdown --host {host}: it goes on from there",
        )


def _locked_firewall(project: Project, host: str, declared: Host, cloud: Cloud, server: Server) -> Firewall:
    if declared.ssh_exposure.mode != "tailnet":
        raise _not_locked(host, declared)
    firewall = cloud.firewall(provision.firewall_name(host))
    if firewall is None or firewall.id not in server.firewalls:
        raise LockdownError("its firewall is not there, or not attached", where=host, fix="run the provision stage")
    if (until := open_until(firewall)) is not None:
        raise LockdownError(
            f"has a window already, until {until:%Y-%m-%d %H:%M:%S} UTC", where=host, fix=f"clawdlets close {host}"
        )
    if firewall.ssh_is_open:
        raise LockdownError(
            "is not locked down: tcp/22 is open at the edge", where=host, fix=f"clawdlets lockdown --host {host}"
        )
    if edge.unfinished(project.layout, host) is not None and watchdog.lives(project.layout, host):
        raise LockdownError("a lockdown or window is under way", where=host, fix="wait for it to end")
    return firewall


def _order(
    project: Project,
    host: str,
    declared: Host,
    firewall: Firewall,
    server: Server,
    pin: str,
    length: timedelta,
    until: datetime,
    runner: Runner,
    journal: Path | None,
) -> edge.Order:
    try:
        ways = tuple(on_host.tailnet_addresses(runner, host, declared).values())
    except ClawdletsError:  # this machine is off the tailnet itself
        ways = ()
    rules = firewall.rules or provision.edge_rules(declared, window_open=False)  # no rules at all cannot be asked for
    return _order_of(
        project, host, firewall, server, pin, rules, dict(firewall.labels), length, until, ways, str(journal or "")
    )


def _order_of(
    project: Project,
    host: str,
    firewall: Firewall,
    server: Server,
    pin: str,
    rules: tuple[FirewallRule, ...],
    labels: dict[str, str],
    length: timedelta,
    until: datetime | None,
    ways: tuple[str, ...],
    journal: str,
) -> edge.Order:
    return edge.Order(
        id=secrets.token_hex(8),
        kind="window",
        host=host,
        operator=project.operator,
        endpoint=project.hcloud_endpoint,
        server_id=server.id,
        firewall_id=firewall.id,
        firewall=firewall.name,
        rules=rules,
        labels=labels,
        taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
        deadline_s=length.total_seconds(),
        restore_s=Timing().restore_s,
        poll_s=project.poll_interval_s,
        owner=on_host.owner_of(project.layout),
        user=ADMIN,
        identity_file=str(project.ssh_identity_file(host)),
        pin=pin,
        ways=ways,
        public=tuple(server.addresses.values()),
        journal=journal,
        until=until.isoformat() if until else "",
    )


def _taken_back(
    project: Project,
    host: str,
    cause: ClawdletsError,
    order: edge.Order,
    guard: watchdog.Guard,
    cloud: Cloud,
) -> ClawdletsError:
    told = []
    try:
        edge.put_back(cloud, order, within_s=OPEN_WITHIN_S)
        told.append("the edge is closed")
    except ClawdletsError as error:
        told.append(f"THE EDGE MAY BE OPEN ({error.what}); the watchdog closes it at its deadline")
        return LockdownError(f"the window was not opened as asked: {cause}\n  now: {'; '.join(told)}", where=host)
    try:
        targets = [on_host.base_target(project, host, order.pin).at(address) for address in order.ways]
        on_host.tell_by_any(targets, f"revert {order.owner}")
        told.append("the host is as it was kept")
    except ClawdletsError as error:
        told.append(f"the host could not be told ({error.what.splitlines()[0]}), and closes by itself if it was opened")
    guard.dismiss(watchdog.CLOSED)
    return LockdownError(f"the window was not opened: {cause}\n  now: {'; '.join(told)}", where=host)
