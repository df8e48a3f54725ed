"""Lockdown: close public SSH at the edge and on the host, only after the way in over the tailnet has been used.

Order: log in over the tailnet twice with the pinned key → put the host's firewall to tailnet-only *on trial* (it reverts by
itself unless confirmed) → close the edge and read it back → log in over the tailnet afresh → probe from outside on both
address families → confirm. Anything else opens both again. A probe that could not look is *unknown*: the doors stay closed
and the outcome says so, because closed and unproven is safer than open.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from tenacity import RetryCallState, Retrying, retry_if_result, stop_after_delay, wait_fixed

from clawdlets_ops import provision, ssh, tailnet
from clawdlets_ops.errors import ClawdletsError, LockdownError, PlanRefused, UnreachableError
from clawdlets_ops.files import ensure_dir, locked, write_atomic
from clawdlets_ops.fleet import Host
from clawdlets_ops.hetzner import Cloud, Server
from clawdlets_ops.install import ADMIN
from clawdlets_ops.layout import HOST_PROGRAMS
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.verify.exposure import Exposure, measure_exposure

EXPOSURE = f"sudo -n {HOST_PROGRAMS}/clawdlets-exposure"
TAILNET_WITHIN_S = 120.0
LOCK_WAIT_S = 600.0
_STATUS = re.compile(r"^mode=(bootstrap|tailnet|public) armed=(yes|no)$")


@dataclass(frozen=True)
class HostExposure:
    """What the host's own firewall does: ``mode`` in force, and whether it is on trial (will revert by itself)."""

    mode: str
    armed: bool


@dataclass(frozen=True)
class LockdownPlan:
    """What to do, for people; empty when edge and host are as declared."""

    host: str
    steps: tuple[str, ...]

    @property
    def empty(self) -> bool:
        """True when there is nothing to do."""
        return not self.steps

    def __str__(self) -> str:
        return "\n".join(self.steps) or "nothing to do"


@dataclass(frozen=True)
class LockdownOutcome:
    """Port 22 as measured before and after, from every vantage."""

    host: str
    before: Exposure
    after: Exposure


def plan(host: str, declared: Host, *, edge_open: bool, on_host: HostExposure | None) -> LockdownPlan:
    """What separates the host from its declared exposure; pure. ``on_host`` is None when the host is not installed yet."""
    mode = declared.ssh_exposure.mode
    later = "" if on_host else "after the installation: "
    steps = []
    if mode == "tailnet":
        if on_host is None or on_host.mode != "tailnet" or on_host.armed:
            steps.append(f"{later}put the host's firewall to SSH on tailscale0 only")
        if edge_open:
            steps.append(f"{later}close tcp/22 at the edge")
    elif on_host is not None and (on_host.mode != mode or on_host.armed):
        steps.append(f"put the host's firewall to {mode}")
    if steps and mode == "tailnet":
        steps.insert(0, f"{later}log in over the tailnet, twice, with the pinned key")
        steps.append(f"{later}probe from outside on IPv4 and IPv6, and over the tailnet; else open again")
    return LockdownPlan(host, tuple(steps))


def parse_status(text: str) -> HostExposure:
    """The host's own account; LockdownError when it is not understood."""
    if not (found := _STATUS.match(text.strip())):
        raise LockdownError(f"the host's exposure status is not understood: {text.strip()[:200]!r}")
    return HostExposure(found[1], found[2] == "yes")


def read_status(target: ssh.Target) -> HostExposure:
    """Ask the host; one login."""
    with ssh.session(target) as shell:
        return parse_status(shell.check(f"{EXPOSURE} status"))


def tailnet_addresses(runner: Runner, host: str, declared: Host) -> dict[int, str]:
    """Where the host is on the tailnet, by family: ``targetHost`` if declared, else what tailscale says; {} if unknown."""
    if declared.target_host:
        address = declared.target_host.rpartition("@")[2]
        return {6 if ":" in address else 4: address}
    peer = tailnet_peer(runner, host, declared)
    return peer.addresses if peer else {}


def tailnet_peer(runner: Runner, host: str, declared: Host) -> tailnet.Peer | None:
    """The host as this machine's tailscale sees it; None when it is not seen, or cannot be asked."""
    if declared.tailnet.mode == "none" or runner.which("tailscale") is None:
        return None
    return tailnet.find_peer(runner, host)


def refuse_short_lived(host: str, peer: tailnet.Peer | None, *, now: datetime) -> None:
    """LockdownError when the node's key is about to run out: the tailnet would then be no way in. Pure."""
    if peer is not None and peer.key_expiry is not None and peer.key_expiry - now < tailnet.MIN_KEY_LIFE:
        raise LockdownError(
            f"its key on the tailnet runs out at {peer.key_expiry:%Y-%m-%d %H:%M} UTC; nothing was closed",
            where=host,
            fix="disable the node's key expiry in the admin console, or give it a tag, and run again",
        )


def apply(
    project: Project,
    host: str,
    *,
    runner: Runner,
    cloud: Cloud,
    server: Server,
    pin: str,
    say: Callable[[str], None] = lambda _: None,
) -> LockdownOutcome:
    """Close both doors, or leave both open and say why (LockdownError). See the module's docstring for the order."""
    declared = project.fleet.host(host)
    base = ssh.Target(host, "", ADMIN, project.ssh_identity_file(host), pin)
    with locked(project.layout.lock(host), what=f"the lockdown of {host}", wait_s=LOCK_WAIT_S):
        if declared.ssh_exposure.mode != "tailnet":
            return _open_as_declared(project, host, declared, runner=runner, server=server, base=base)
        addresses = _wait_for_tailnet(project, runner, host, declared, say)
        if not declared.target_host:
            refuse_short_lived(host, tailnet_peer(runner, host, declared), now=datetime.now(UTC))
        inside = base.at(next(iter(addresses.values())))
        for _ in range(2):
            status = read_status(inside)
        say(f"logged in twice over the tailnet ({inside.address}), host is {status.mode}")
        before = measure_exposure(project.vantages, server.addresses, addresses, runner=runner)
        _record(project, host, "before", before)
        try:
            _command(inside, "try tailnet")
            say("the host's firewall is on trial: SSH on tailscale0 only")
            provision.apply(project, host, runner=runner, cloud=cloud, window_open=False, say=say)
            say("the edge is closed, read back from the API")
            read_status(inside)
            after = measure_exposure(project.vantages, server.addresses, addresses, runner=runner)
            _record(project, host, "after", after)
            if doors := after.open_from_internet():
                raise LockdownError(f"port 22 is still reachable from outside: {', '.join(doors)}", where=host)
            if blocked := after.closed_from_tailnet():
                raise LockdownError(f"port 22 is not reachable over the tailnet: {', '.join(blocked)}", where=host)
            _command(inside, "confirm")
        except ClawdletsError as error:
            raise _roll_back(
                project, host, error, runner=runner, cloud=cloud, targets=_ways_in(base, addresses, server)
            ) from error
        say("confirmed: both doors are closed for good")
        return LockdownOutcome(host, before, after)


def _open_as_declared(
    project: Project, host: str, declared: Host, *, runner: Runner, server: Server, base: ssh.Target
) -> LockdownOutcome:
    """For a host that is declared open (bootstrap, public): only its own firewall can lag behind."""
    addresses = tailnet_addresses(runner, host, declared)
    before = measure_exposure(project.vantages, server.addresses, addresses, runner=runner)
    ways = _ways_in(base, addresses, server)
    _through_any(ways, f"try {declared.ssh_exposure.mode}")
    _through_any(ways, "confirm")
    after = measure_exposure(project.vantages, server.addresses, addresses, runner=runner)
    return LockdownOutcome(host, before, after)


def _wait_for_tailnet(
    project: Project, runner: Runner, host: str, declared: Host, say: Callable[[str], None]
) -> dict[int, str]:
    say("wait for the host on the tailnet")

    def give_up(_: RetryCallState) -> dict[int, str]:
        raise LockdownError(
            f"the host did not appear on the tailnet within {TAILNET_WITHIN_S:g} s; nothing was closed",
            where=host,
            fix="is its tailscale_auth_key valid? (journalctl -u tailscaled-autoconnect on the host); "
            "put the secret right, or declare targetHost, and run again",
        )

    return Retrying(
        stop=stop_after_delay(TAILNET_WITHIN_S),
        wait=wait_fixed(project.poll_interval_s),
        retry=retry_if_result(lambda found: not found),
        retry_error_callback=give_up,
    )(lambda: tailnet_addresses(runner, host, declared))


def _roll_back(
    project: Project, host: str, cause: ClawdletsError, *, runner: Runner, cloud: Cloud, targets: list[ssh.Target]
) -> LockdownError:
    """Open edge and host again, as far as they were closed; returns the error that says how both stand now."""
    told = []
    if isinstance(cause, PlanRefused):  # the gate comes before any change, and would refuse the way back as well
        told.append("the edge was not touched")
    else:
        try:
            provision.apply(project, host, runner=runner, cloud=cloud, window_open=True)
            told.append("the edge is open again to adminCidrs")
        except ClawdletsError as error:
            told.append(f"THE EDGE COULD NOT BE OPENED AGAIN ({error.what})")
    try:
        _through_any(targets, "revert")
        told.append("the host's firewall is as before")
    except ClawdletsError as error:
        told.append(f"the host could not be reached to revert ({error.what}); it reverts by itself within five minutes")
    return LockdownError(
        f"rolled back, because {cause}\n  now: {'; '.join(told)}",
        where=host,
        fix="mend the cause and run again",
    )


def _ways_in(base: ssh.Target, addresses: dict[int, str], server: Server) -> list[ssh.Target]:
    return [base.at(address) for address in (*addresses.values(), *server.addresses.values())]


def _through_any(targets: list[ssh.Target], words: str) -> None:
    """Run one exposure command by the first way in that works; the last UnreachableError when none does."""
    last: ClawdletsError = UnreachableError("the host has no address", where=EXPOSURE)
    for target in targets:
        try:
            _command(target, words)
            return
        except UnreachableError as error:
            last = error
    raise last


def _command(target: ssh.Target, words: str) -> None:
    with ssh.session(target) as shell:
        shell.check(f"{EXPOSURE} {words}")


def _record(project: Project, host: str, when: str, exposure: Exposure) -> None:
    document = {"measuredAt": datetime.now(UTC).isoformat(), "when": when, **exposure.as_json()}
    folder = ensure_dir(project.layout.reports(host))
    write_atomic(folder / f"exposure-{when}.json", json.dumps(document, indent=2) + "\n")
