"""The lockdown itself: both doors closed for good, or both as they were, whatever happens in between.

Prove the tailnet → arm the watchdog, with the edge's rules as they are → put the host's firewall on trial → close the edge
through OpenTofu and read it back → log in over the tailnet afresh → probe from outside on both families → confirm on the host
(which ends old sessions and keeps the mode for good: the point of no return) → dismiss the watchdog → sign the report. At no
time is a side closed that would not open by itself. A probe that could not look is *unknown*: the doors stay closed and the
outcome says so, because closed and unproven is safer than open.

An edge that is not as the order has it when this begins (an earlier lockdown died after closing it, or there is a window) counts
as touched from the first moment: it is put back like one that was closed here. A window does not outlive a lockdown, also one
that fails: its watchdog was sent away.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clawdlets_ops import provision, ssh
from clawdlets_ops.errors import BusyError, ClawdletsError, CloudError, LockdownError
from clawdlets_ops.files import ensure_dir, locked, write_atomic
from clawdlets_ops.fleet import Host
from clawdlets_ops.hetzner import WINDOW_LABEL, WINDOW_RULE, Cloud, Firewall, FirewallRule, Server
from clawdlets_ops.install import ADMIN
from clawdlets_ops.lockdown import edge, watchdog
from clawdlets_ops.lockdown import host as on_host
from clawdlets_ops.lockdown.plan import Timing
from clawdlets_ops.lockdown.proof import prove, wait_for_tailnet
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.verify.exposure import Exposure, measure_exposure
from clawdlets_ops.verify.signature import sign

LOCK_WAIT_S = 600.0
REPORT = "lockdown.json"
UNDO_WITHIN_S = 60.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class LockdownOutcome:
    """Port 22 as measured before and after, from every vantage; where the report is, and its signature if there is one."""

    host: str
    before: Exposure
    after: Exposure
    report: Path | None = None
    signature: Path | None = None


@dataclass
class _Told:
    """What happened, for the report: each step with its time."""

    say: Say
    steps: list[dict[str, str]] = field(default_factory=list)

    def __call__(self, text: str) -> None:
        self.steps.append({"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "text": text})
        self.say(text)


def apply(
    project: Project,
    host: str,
    *,
    runner: Runner,
    cloud: Cloud,
    server: Server,
    pin: str,
    say: Say = lambda _: None,
    timing: Timing | None = None,
    journal: Path | None = None,
) -> LockdownOutcome:
    """Close both doors, or leave both open and say why (LockdownError). ``journal`` is the run's folder, for the watchdog.

    BusyError when somebody else is at it, from this checkout or another. See the module's docstring for the order.
    """
    declared = project.fleet.host(host)
    base = on_host.base_target(project, host, pin)
    holder = f"the lockdown of {host} by {project.operator}"
    with locked(project.layout.lock(host), what=f"the lockdown of {host}", wait_s=LOCK_WAIT_S, holder=holder):
        if declared.ssh_exposure.mode != "tailnet":
            return _open_as_declared(project, host, declared, runner=runner, server=server, base=base)
        run = _Run(project, host, declared, runner, cloud, server, base, timing or Timing(), _Told(say), journal)
        return run.close()


@dataclass
class _Run:
    project: Project
    host: str
    declared: Host
    runner: Runner
    cloud: Cloud
    server: Server
    base: ssh.Target
    timing: Timing
    say: _Told
    journal: Path | None
    begun: list[str] = field(default_factory=list)
    """Which sides may have been changed by this run, in order: host, edge."""
    earlier: edge.Order | None = None
    """What was begun from here before this, may have changed the edge, and was not decided."""
    over_window: bool = False
    """Whether there was a breakglass window at the edge."""

    def close(self) -> LockdownOutcome:
        project, host, timing = self.project, self.host, self.timing
        addresses = wait_for_tailnet(project, self.runner, host, self.declared, within_s=timing.tailnet_s, say=self.say)
        peer = None if self.declared.target_host else on_host.tailnet_peer(self.runner, host, self.declared)
        inside = self.base.at(on_host.first(addresses))
        proof = prove(project, host, inside, peer=peer, runner=self.runner, timing=timing, say=self.say)
        before = self._measure(addresses, "before")
        firewall = self._firewall()
        earlier = edge.unfinished(project.layout, host)
        self.earlier = earlier if earlier and edge.may_be_closed(project.layout, earlier) else None
        self.over_window = _has_window(firewall)
        order = self._order(firewall, addresses, confirmed=proof.account.closed_for_good)
        try:
            guard = watchdog.arm(project.layout, order, token=project.token, environ=project.environ)
        except Exception as error:
            if self._is_unguarded_window():
                raise self._not_armed(error, order) from error
            raise
        self.say(f"the watchdog is armed: process {guard.background.pid}, {timing.watchdog_s:g} s")
        try:
            self.begun.append("host")
            on_host.tell(inside, f"try tailnet {timing.trial_s} {order.owner}")
            self.say("the host's firewall is on trial: SSH on tailscale0 only")
            guard.check()
            edge.mark_closing(project.layout, order)
            self.begun.append("edge")
            if self.over_window:
                # OpenTofu's plan for a lockdown is about rules only; and the label is to go after the window's rule.
                self.say("there is a breakglass window: it ends with this")
                rules = without_window(firewall.rules, self.declared)
                edge.put_back(self.cloud, replace(order, rules=rules), within_s=timing.edge_s)
            within = provision.Within(timing.edge_s, timing.edge_s)
            provision.apply(
                project, host, runner=self.runner, cloud=self.cloud, window_open=False, within=within, say=self.say
            )
            self.say("the edge is closed, read back from the API")
            self._still_on_trial(inside, order)
            self.say("a fresh login came through over the tailnet alone")
            after = self._measure(addresses, "after")
            if doors := after.open_from_internet():
                raise LockdownError(f"port 22 is still reachable from outside: {', '.join(doors)}", where=host)
            if blocked := after.closed_from_tailnet():
                raise LockdownError(f"port 22 is not reachable over the tailnet: {', '.join(blocked)}", where=host)
            self.say(f"probed from outside and inside{_unknown(after)}")
            guard.check()
            confirm(inside, order.owner)
        except ClawdletsError as error:
            raise self._undone(error, order, guard, addresses) from error
        self.say("confirmed on the host: old sessions are ended, its mode is kept")
        guard.dismiss(watchdog.CONFIRMED)
        self.say("confirmed: both doors are closed for good")
        report, signature = self._report(order, before, after, asdict(proof))
        return LockdownOutcome(host, before, after, report, signature)

    def _measure(self, addresses: dict[int, str], when: str) -> Exposure:
        measured = measure_exposure(self.project.vantages, self.server.addresses, addresses, runner=self.runner)
        _record(self.project, self.host, when, measured)
        return measured

    def _firewall(self) -> Firewall:
        firewall = self.cloud.firewall(provision.firewall_name(self.host))
        if firewall is None or firewall.id not in self.server.firewalls:
            raise CloudError(
                "its firewall is not there, or not attached; nothing was closed",
                where=f"hosts.{self.host}",
                fix="run the provision stage first",
            )
        return firewall

    def _order(self, firewall: Firewall, addresses: dict[int, str], *, confirmed: bool) -> edge.Order:
        """The rules to put back are those that are there; those of before where an earlier lockdown did not come to its
        end and its watchdog is gone too, unless the host had ``confirmed`` it: that was past the point of no return; and
        never a window's."""
        rules, labels, earlier = firewall.rules, dict(firewall.labels), self.earlier
        if (
            earlier
            and earlier.kind == "lockdown"
            and not confirmed
            and (earlier.firewall_id, earlier.server_id, earlier.endpoint)
            == (
                firewall.id,
                self.server.id,
                self.project.hcloud_endpoint,
            )
        ):
            self.say(
                f"an earlier {earlier.kind} of {earlier.taken_at} was left unfinished: its rules are the ones to go back to"
            )
            rules = earlier.rules
        labels.pop(WINDOW_LABEL, None)
        order = edge.Order(
            id=secrets.token_hex(8),
            kind="lockdown",
            host=self.host,
            operator=self.project.operator,
            endpoint=self.project.hcloud_endpoint,
            server_id=self.server.id,
            firewall_id=firewall.id,
            firewall=firewall.name,
            rules=without_window(rules, self.declared),
            labels=labels,
            taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
            deadline_s=self.timing.watchdog_s,
            restore_s=self.timing.restore_s,
            poll_s=self.project.poll_interval_s,
            owner=on_host.owner_of(self.project.layout),
            user=ADMIN,
            identity_file=str(self.base.identity_file),
            pin=self.base.pin,
            ways=tuple(addresses.values()),
            public=tuple(self.server.addresses.values()),
            journal=str(self.journal or ""),
        )
        return replace(order, closing=edge.differs(firewall, order))

    def _still_on_trial(self, inside: ssh.Target, order: edge.Order) -> None:
        """A fresh login that finds our own trial: a host that was rebooted meanwhile is open again."""
        account = on_host.read_account(inside)
        if (account.mode, account.armed, account.owner) != ("tailnet", True, order.owner):
            raise LockdownError(
                f"the host is not on our trial any more: it says {account.mode}, {'on trial' if account.armed else 'for good'}"
                " (it was rebooted, or the time was up)",
                where=self.host,
            )

    def _is_unguarded_window(self) -> bool:
        """Whether a window was opened from here, and nothing is on guard of it any more."""
        window = self.earlier is not None and self.earlier.kind == "window"
        return window and not watchdog.lives(self.project.layout, self.host)

    def _not_armed(self, cause: Exception, order: edge.Order) -> LockdownError:
        """Close such a window at the edge, where no other watchdog could be armed; returns the error that says so."""
        try:
            edge.put_back(self.cloud, order, within_s=min(UNDO_WITHIN_S, self.timing.restore_s))
        except ClawdletsError as error:
            return LockdownError(
                f"{cause}\n  now: THE WINDOW COULD NOT BE CLOSED AT THE EDGE ({error.what}), and nothing will close it",
                where=self.host,
                fix=f"clawdlets close {self.host}",
            )
        if self.earlier is not None:
            edge.decide(self.project.layout, self.earlier, watchdog.CLOSED)
        return LockdownError(
            f"{cause}\n  now: the breakglass window is closed at the edge, as its watchdog is gone; the host's own timer ends it"
            " there",
            where=self.host,
        )

    def _undone(
        self, cause: ClawdletsError, order: edge.Order, guard: watchdog.Guard, addresses: dict[int, str]
    ) -> ClawdletsError:
        """Open edge and host again, as far as they were closed; returns the error that says how both stand now."""
        told: list[str] = []
        ours = order.closing and self.earlier is not None
        if isinstance(cause, BusyError) and self.begun == ["host"] and not ours:
            guard.dismiss(watchdog.UNDONE)  # the host took nothing from us, and what there is is somebody else's
            return cause
        left_to_watchdog = False
        word = "open" if order.opens else "closed"
        if "edge" in self.begun or order.closing:
            try:
                changed = edge.put_back(self.cloud, order, within_s=min(UNDO_WITHIN_S, self.timing.restore_s))
                told.append(f"the edge is {word} again as it was" if changed else "the edge was not touched")
                if self.over_window:
                    told[-1] = f"the edge is {word}, and the breakglass window that was there is closed"
            except ClawdletsError as error:
                left_to_watchdog = True
                told.append(
                    f"THE EDGE COULD NOT BE {'OPENED' if order.opens else 'CLOSED'} AGAIN ({error.what}); the watchdog goes"
                    f" on trying for {self.timing.restore_s:g} s"
                )
        try:
            on_host.tell_by_any(on_host.ways_in(self.base, addresses, self.server), f"revert {order.owner}")
            told.append("the host's firewall is as before")
        except ClawdletsError as error:
            within = f"within {self.timing.trial_s} s" + (", or when its window was to end" if self.over_window else "")
            told.append(f"the host could not be reached to revert ({error.what}); it reverts by itself {within}")
        if not left_to_watchdog:
            try:
                guard.dismiss(watchdog.UNDONE)
            except LockdownError as error:
                told.append(error.what)
        return LockdownError(
            f"rolled back, because {cause}\n  now: {'; '.join(told)}",
            where=self.host,
            fix="mend the cause and run again",
        )

    def _report(
        self, order: edge.Order, before: Exposure, after: Exposure, proof: dict[str, Any]
    ) -> tuple[Path, Path | None]:
        firewall = self.cloud.firewall(order.firewall)
        document = {
            "host": self.host,
            "transaction": order.id,
            "operator": order.operator,
            "endedAt": datetime.now(UTC).isoformat(timespec="seconds"),
            "serverId": order.server_id,
            "rulesBefore": [str(rule) for rule in order.rules],
            "rulesAfter": [str(rule) for rule in firewall.rules] if firewall else None,
            "proof": proof,
            "exposureBefore": before.as_json()["cells"],
            "exposureAfter": after.as_json()["cells"],
            "unknown": list(after.unknown()),
            "steps": self.say.steps,
        }
        path = ensure_dir(self.project.layout.reports(self.host)) / REPORT
        write_atomic(path, json.dumps(document, indent=2) + "\n")
        signature, why = sign(path, self.base.identity_file, runner=self.runner)
        self.say(f"the report is {path.name}, {'signed' if signature else f'not signed: {why}'}")
        return path, signature


def confirm(inside: ssh.Target, owner: str) -> None:
    """Have the host keep its mode. Where the answer was lost, the host is asked what became of it: past the point of no return
    nothing is undone. ClawdletsError when it is not closed for good, or does not say."""
    try:
        on_host.tell(inside, f"confirm tailnet {owner}")
    except ClawdletsError as error:
        try:
            done = on_host.read_account(inside).closed_for_good
        except ClawdletsError:
            done = False
        if not done:
            raise error from None


def without_window(rules: tuple[FirewallRule, ...], declared: Host) -> tuple[FirewallRule, ...]:
    """The rules without a breakglass window's; where nothing is left, those of the closed edge."""
    kept = tuple(rule for rule in rules if not rule.description.startswith(WINDOW_RULE))
    return kept or provision.edge_rules(declared, window_open=False)


def _has_window(firewall: Firewall) -> bool:
    """Whether a label says that there is a window, or a rule is one's."""
    rules = any(rule.description.startswith(WINDOW_RULE) for rule in firewall.rules)
    return rules or WINDOW_LABEL in firewall.labels


def _open_as_declared(
    project: Project, host: str, declared: Host, *, runner: Runner, server: Server, base: ssh.Target
) -> LockdownOutcome:
    """For a host that is declared open (bootstrap, public): only its own firewall can lag behind."""
    mode, timing, owner = declared.ssh_exposure.mode, Timing(), on_host.owner_of(project.layout)
    addresses = on_host.tailnet_addresses(runner, host, declared)
    before = measure_exposure(project.vantages, server.addresses, addresses, runner=runner)
    way = on_host.tell_by_any(on_host.ways_in(base, addresses, server), f"try {mode} {timing.trial_s} {owner}")
    on_host.tell(way, f"confirm {mode} {owner}")
    after = measure_exposure(project.vantages, server.addresses, addresses, runner=runner)
    return LockdownOutcome(host, before, after)


def _unknown(after: Exposure) -> str:
    seen = after.unknown()
    return f"; UNKNOWN: {'; '.join(seen)}" if seen else ""


def _record(project: Project, host: str, when: str, exposure: Exposure) -> None:
    document = {"measuredAt": datetime.now(UTC).isoformat(), "when": when, **exposure.as_json()}
    folder = ensure_dir(project.layout.reports(host))
    write_atomic(folder / f"exposure-{when}.json", json.dumps(document, indent=2) + "\n")
