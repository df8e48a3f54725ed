"""The story, stage by stage: payload → provision → install → lockdown → verify. Each stage plans, then applies.

The pyinfra operations, the command line and programs that import the library all go through here, so they cannot differ.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Protocol

from clawdlets_ops import install, lockdown, provision, ssh
from clawdlets_ops.errors import ClawdletsError, InstallRefused, LockdownError, SecretsError, VerifyError
from clawdlets_ops.files import no_room, read_private
from clawdlets_ops.hetzner import Cloud, HetznerCloud, Server
from clawdlets_ops.journal import Journal, new_run_id
from clawdlets_ops.process import LocalRunner, Runner, require_program
from clawdlets_ops.project import Project
from clawdlets_ops.runs.notes import NotingRunner
from clawdlets_ops.secrets import payload, store, sync
from clawdlets_ops.sensitive import Redactor, Secret
from clawdlets_ops.verify import host as verify_host

STAGES = ("payload", "provision", "install", "lockdown", "verify")
LATER = ("secrets",)
"""What is done to a running host, and is no part of its bootstrap."""
SEEN_BY_VERIFY = "as declared, by the verification's account"


class Snapshot(Cloud, Protocol):
    """Reads that may be some seconds old, unless something was changed for that host; see ``rollout.snapshot``."""

    def forget(self, host: str) -> None:
        """Something was changed for ``host``."""
        ...

    def look(self) -> None:
        """Read the servers now, unless that was done lately."""
        ...


@dataclass(frozen=True)
class Tools:
    """What the stages act through; each has a fake in ``clawdlets_ops.testing``."""

    runner: Runner
    cloud: Cloud
    journal: Journal


@dataclass(frozen=True)
class StagePlan:
    """What a stage would do to a host now; no steps means nothing."""

    stage: str
    host: str
    steps: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """True when the host is as this stage wants it."""
        return not self.steps

    def __str__(self) -> str:
        return "\n".join(self.steps) or "nothing to do"


@dataclass(frozen=True)
class Outcome:
    """How a stage ended on a host. A failed stage raises instead."""

    stage: str
    host: str
    changed: bool
    text: str
    duration_s: float


def tools_for(
    project: Project,
    *,
    listen: Callable[[str, str, str], None] | None = None,
    stop: threading.Event | None = None,
) -> Tools:
    """The real tools of a project. SettingsError when there is no usable token. Once ``stop`` is set, running programs
    are ended and no other is begun (KeyboardInterrupt)."""
    return Tools(
        runner=LocalRunner(project.environ, stop=stop),
        cloud=HetznerCloud(project.token, project.hcloud_endpoint, poll_interval_s=project.poll_interval_s),
        journal=Journal(project.layout.runs / new_run_id(), listen=listen, redactor=known_secrets(project)),
    )


def plan(stage: str, project: Project, host: str, tools: Tools) -> StagePlan:
    """What ``stage`` would do to ``host`` now. Reads only: the disk, the API, at most one login."""
    with _disk_errors_told(host):
        return _plan(stage, project, host, tools)


def _plan(stage: str, project: Project, host: str, tools: Tools) -> StagePlan:
    match stage:
        case "payload":
            made = store.plan_host(project, host, _given(project, host), runner=tools.runner)
            steps = [
                f"{verb} {name}" for verb, names in (("make", made.created), ("change", made.updated)) for name in names
            ]
            if steps or not payload.is_prepared(project, host):
                steps.append("work out the install payload")
            return StagePlan(stage, host, tuple(steps))
        case "provision":
            return StagePlan(stage, host, _plan_provision(project, host, tools).steps)
        case "install":
            planned = _plan_install(project, host, tools)
            return StagePlan(stage, host, () if planned.empty else (str(planned),))
        case "lockdown":
            return StagePlan(stage, host, _plan_lockdown(project, host, tools).steps)
        case "verify":
            return StagePlan(stage, host)
        case "secrets":
            wanted = sync.repository_set(project, host)
            with sync.connect(project, host, runner=tools.runner, cloud=tools.cloud) as link:
                return StagePlan(stage, host, sync.plan(wanted, link.status()).steps)
        case _:
            raise ValueError(f"there is no stage {stage!r}; there are {', '.join((*STAGES, *LATER))}")


def apply(stage: str, project: Project, host: str, tools: Tools) -> Outcome:
    """Do ``stage`` to ``host``. Raises a ClawdletsError; doing it again goes on from where it stopped."""
    started = time.monotonic()
    with _disk_errors_told(host), tools.journal.stage(host, stage) as say:
        changed, text = _apply(stage, project, host, _noting(tools, host), say)
    return Outcome(stage, host, changed, text, round(time.monotonic() - started, 3))


def bootstrap(
    project: Project,
    host: str,
    tools: Tools | None = None,
    *,
    snapshot: Snapshot | None = None,
    until: str = STAGES[-1],
    before_change: Callable[[], None] = lambda: None,
) -> Iterator[Outcome]:
    """The stages in order on one host, the last one ``until``, those with nothing to do left untouched; yields each outcome
    as it comes.

    Plans and the verification look at ``snapshot``, if there is one, instead of asking the API for this host alone.
    ``before_change`` is called before a stage that changes something beyond this machine, and may raise a ClawdletsError.
    """
    tools = tools or tools_for(project)
    looking = replace(tools, cloud=snapshot) if snapshot else tools
    stages = STAGES[: STAGES.index(until) + 1]
    quiet = "verify" in stages
    for stage in stages:
        if stage == "lockdown" and quiet and _edge_is_as_declared(project, host, looking.cloud):
            yield from _as_it_is(project, host, tools, looking, snapshot, before_change)
            return
        try:
            planned = plan(stage, project, host, looking)
        except ClawdletsError as error:
            tools.journal.say(host, stage, "failed", str(error), durationS=0.0)
            raise
        if stage == "verify":
            yield apply(stage, project, host, looking)
        elif planned.empty:
            yield _untouched(stage, host, tools, str(planned))
        else:
            quiet = False
            if stage != "payload":
                _may_begin(stage, host, tools, before_change)
            yield _touched(stage, project, host, tools, snapshot)


@contextmanager
def _disk_errors_told(host: str) -> Iterator[None]:
    """This machine's own disk is full: a sentence, as for anything else that an operator can mend."""
    try:
        yield
    except OSError as error:
        if (told := no_room(error, where=host)) is None:
            raise
        raise told from error


def _as_it_is(
    project: Project,
    host: str,
    tools: Tools,
    looking: Tools,
    snapshot: Snapshot | None,
    before_change: Callable[[], None],
) -> Iterator[Outcome]:
    """Lockdown and verify for a host that had nothing to be done so far, its edge as declared.

    The verification comes first: where it passes, it has seen all that the lockdown's own look would have, in the one login
    that the host then has. Else the lockdown looks for itself; where it has nothing to do, the verification stands as it is.
    """
    started = time.monotonic()
    journal = tools.journal
    journal.say(host, "verify", "started")
    refused: ClawdletsError | None = None
    try:
        _, text = _apply(
            "verify", project, host, _noting(looking, host), lambda line: journal.say(host, "verify", "step", line)
        )
    except ClawdletsError as error:
        refused, text = error, ""
    except BaseException:
        journal.say(host, "verify", "failed", "interrupted", durationS=round(time.monotonic() - started, 3))
        raise
    took_s = round(time.monotonic() - started, 3)
    if refused is None:
        journal.say(host, "verify", "done", durationS=took_s)
        yield _untouched("lockdown", host, tools, SEEN_BY_VERIFY)
        yield Outcome("verify", host, False, text, took_s)
        return
    try:
        planned = plan("lockdown", project, host, looking)
    except ClawdletsError as error:
        journal.say(host, "verify", "failed", str(refused), durationS=took_s)
        journal.say(host, "lockdown", "failed", str(error), durationS=0.0)
        raise
    if planned.empty:
        journal.say(host, "verify", "failed", str(refused), durationS=took_s)
        yield _untouched("lockdown", host, tools, str(planned))
        raise refused
    journal.say(host, "verify", "unchanged", f"{refused.what}: the lockdown comes first")
    _may_begin("lockdown", host, tools, before_change)
    yield _touched("lockdown", project, host, tools, snapshot)
    yield apply("verify", project, host, looking)


def _edge_is_as_declared(project: Project, host: str, cloud: Cloud) -> bool:
    """Whether the lockdown, if there were one, would only be about the host itself."""
    if project.fleet.host(host).ssh_exposure.mode != "tailnet":
        return True
    firewall = cloud.firewall(provision.firewall_name(host))
    return firewall is not None and not firewall.ssh_is_open


def _untouched(stage: str, host: str, tools: Tools, text: str) -> Outcome:
    tools.journal.say(host, stage, "unchanged", text)
    return Outcome(stage, host, changed=False, text=text, duration_s=0.0)


def _may_begin(stage: str, host: str, tools: Tools, before_change: Callable[[], None]) -> None:
    try:
        before_change()
    except ClawdletsError as error:
        tools.journal.say(host, stage, "failed", str(error), durationS=0.0)
        raise


def _touched(stage: str, project: Project, host: str, tools: Tools, snapshot: Snapshot | None) -> Outcome:
    try:
        return apply(stage, project, host, tools)
    finally:
        if snapshot:
            snapshot.forget(host)


def _noting(tools: Tools, host: str) -> Tools:
    """The same, each program that runs noted in the host's log."""
    return replace(tools, runner=NotingRunner(tools.runner, tools.journal, host))


def known_secrets(project: Project) -> Redactor:
    """Knows the token and every value in the operator's file, as far as that can be read."""
    known = [project.hcloud_token] if project.hcloud_token else []
    if project.secrets_file is not None:
        # A file that cannot be read is the payload stage's to complain of: what is in it is known to nobody here.
        with suppress(ClawdletsError, ValueError):
            known += [Secret(text) for text in _strings(json.loads(read_private(project.secrets_file)))]
    return Redactor(known)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _apply(stage: str, project: Project, host: str, tools: Tools, say: Callable[[str], None]) -> tuple[bool, str]:
    runner, cloud = tools.runner, tools.cloud
    match stage:
        case "payload":
            made = store.init_host(project, host, _given(project, host), runner=runner)
            store.check_host(project, host, runner=runner)
            laid = payload.prepare(project, host, runner=runner)
            return bool(made.created or made.updated or laid.changed), f"payload {laid.digest[:12]}"
        case "provision":
            plans: list[provision.ProvisionPlan] = []

            def before(planned: provision.ProvisionPlan) -> None:
                _require_means(project, host, tools, planned)
                plans.append(planned)

            server = provision.apply(project, host, runner=runner, cloud=cloud, say=say, on_plan=before)
            return not plans[0].empty, f"server {server.id} at {', '.join(server.addresses.values())}"
        case "install":
            if _plan_install(project, host, tools).empty:
                return False, "installed already"
            server = _server(cloud, host)
            if host in project.reinstall:
                server = install.wipe(project, host, runner=runner, cloud=cloud, server=server, say=say)
            with suppress(SecretsError):  # the installation's own gates say what is wrong with it
                payload.materialise(project, host, runner=runner)
            install.apply(project, host, runner=runner, server=server, pin=store.host_ssh_pin(project, host), say=say)
            return True, "installed"
        case "lockdown":
            closing = _plan_lockdown(project, host, tools)
            if closing.empty:
                return False, "as declared"
            if not closing.installed:
                raise LockdownError(
                    "does not answer as an installed host with the pinned host key; nothing was closed",
                    where=host,
                    fix=f"install it first; if it is: clawdlets plan install --host {host} says what was met",
                )
            lockdown.apply(
                project,
                host,
                runner=runner,
                cloud=cloud,
                server=_server(cloud, host),
                pin=store.host_ssh_pin(project, host),
                say=say,
                journal=tools.journal.folder,
            )
            return True, project.fleet.host(host).ssh_exposure.mode
        case "verify":
            report = verify_host.verify(project, host, runner=runner, cloud=cloud)
            say(report.summary)
            if report.exit_code != 0:
                raise VerifyError(report.summary, where=host, fix=f"the report: {report.report_html}")
            payload.discard(project, host)
            return False, f"{report.summary}; report: {report.report_html}"
        case "secrets":
            with sync.connect(project, host, runner=runner, cloud=cloud) as link:
                brought = sync.sync(project, link, runner=runner, say=say)
            return not brought.plan.empty, str(brought)
        case _:
            raise ValueError(f"there is no stage {stage!r}; there are {', '.join((*STAGES, *LATER))}")


def _given(project: Project, host: str) -> dict[str, Secret]:
    """The values that the operator's file holds for ``host``; none without such a file."""
    if project.secrets_file is None:
        return {}
    return store.read_values(project.secrets_file, host, declared=project.fleet.hosts)


def _plan_provision(project: Project, host: str, tools: Tools) -> provision.ProvisionPlan:
    planned = provision.plan_for(project, host, cloud=tools.cloud)
    _require_means(project, host, tools, planned)
    return planned


def _require_means(project: Project, host: str, tools: Tools, planned: provision.ProvisionPlan) -> None:
    """Refused before a server is paid for that could then not be installed: ToolMissingError, SettingsError."""
    if not planned.empty:
        require_program(tools.runner, "tofu", "install OpenTofu 1.10 or newer (make setup builds it)")
    if provision.SERVER not in planned.adopt or provision.SERVER in planned.loses:
        install.require_means(project, host, runner=tools.runner)


def _plan_install(project: Project, host: str, tools: Tools) -> install.InstallPlan:
    server = tools.cloud.server(host)
    if host in project.reinstall:
        return install.plan_reinstall(host, server, project.fleet.host(host))
    seen = _look(project, host, server, tools)
    firewall = (
        tools.cloud.firewall(provision.firewall_name(host)) if seen.state is install.TargetState.UNKNOWN else None
    )
    return install.plan(
        host,
        seen,
        edge_open=firewall is None or firewall.ssh_is_open,
        unfinished=server is not None and install.read_known(project.layout, host, server).unfinished,
    )


def _plan_lockdown(project: Project, host: str, tools: Tools) -> lockdown.LockdownPlan:
    declared = project.fleet.host(host)
    server = tools.cloud.server(host)
    firewall = tools.cloud.firewall(provision.firewall_name(host))
    seen = _look(project, host, server, tools)
    on_host = None
    if seen.state is install.TargetState.INSTALLED:
        target = ssh.Target(host, seen.address, install.ADMIN, project.ssh_identity_file(host), seen.key)
        on_host = lockdown.read_status(target)
    edge_open = firewall.ssh_is_open if firewall else True
    return lockdown.plan(host, declared, edge_open=edge_open, on_host=on_host)


def _look(project: Project, host: str, server: Server | None, tools: Tools) -> install.Seen:
    if server is None:
        return install.Seen(install.TargetState.ABSENT)
    return install.look(
        tools.runner,
        host,
        server=server,
        pin=store.host_ssh_pin(project, host) if project.layout.host_ssh_public_key(host).exists() else None,
        known=install.read_known(project.layout, host, server),
    )


def _server(cloud: Cloud, host: str) -> Server:
    if (server := cloud.server(host)) is None:
        raise InstallRefused("there is no such server", where=host, fix="run the provision stage first")
    return server
