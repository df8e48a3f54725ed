"""The story, stage by stage: payload → provision → install → lockdown → verify. Each stage plans, then applies.

The pyinfra operations, the command line and programs that import the library all go through here, so they cannot differ.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from clawdlets_ops import install, lockdown, provision, ssh
from clawdlets_ops.errors import InstallRefused, VerifyError
from clawdlets_ops.hetzner import Cloud, HetznerCloud, Server
from clawdlets_ops.journal import Journal
from clawdlets_ops.process import LocalRunner, Runner, require_program
from clawdlets_ops.project import Project
from clawdlets_ops.secrets import payload, store
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.verify import host as verify_host

STAGES = ("payload", "provision", "install", "lockdown", "verify")


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


def tools_for(project: Project, *, listen: Callable[[str, str, str], None] | None = None) -> Tools:
    """The real tools of a project. SettingsError when there is no usable token."""
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    return Tools(
        runner=LocalRunner(project.environ),
        cloud=HetznerCloud(project.token, project.hcloud_endpoint, poll_interval_s=project.poll_interval_s),
        journal=Journal(project.layout.runs / f"{started}-{os.getpid()}.jsonl", listen=listen),
    )


def plan(stage: str, project: Project, host: str, tools: Tools) -> StagePlan:
    """What ``stage`` would do to ``host`` now. Reads only: the disk, the API, at most one login."""
    match stage:
        case "payload":
            made = store.plan_host(project, host, _given(project, host), runner=tools.runner)
            steps = [
                f"{verb} {name}" for verb, names in (("make", made.created), ("change", made.updated)) for name in names
            ]
            if steps or not payload.payload_is_current(project, host):
                steps.append(f"build {project.layout.extra_files(host)}")
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
        case _:
            raise ValueError(f"there is no stage {stage!r}; there are {', '.join(STAGES)}")


def apply(stage: str, project: Project, host: str, tools: Tools) -> Outcome:
    """Do ``stage`` to ``host``. Raises a ClawdletsError; doing it again goes on from where it stopped."""
    started = time.monotonic()
    with tools.journal.stage(host, stage) as say:
        changed, text = _apply(stage, project, host, tools, say)
    return Outcome(stage, host, changed, text, round(time.monotonic() - started, 3))


def bootstrap(project: Project, host: str, tools: Tools | None = None) -> Iterator[Outcome]:
    """All stages in order on one host, those with nothing to do left untouched; yields each outcome as it comes."""
    tools = tools or tools_for(project)
    for stage in STAGES:
        planned = plan(stage, project, host, tools)
        if planned.empty and stage != "verify":
            yield Outcome(stage, host, changed=False, text=str(planned), duration_s=0.0)
        else:
            yield apply(stage, project, host, tools)


def _apply(stage: str, project: Project, host: str, tools: Tools, say: Callable[[str], None]) -> tuple[bool, str]:
    runner, cloud = tools.runner, tools.cloud
    match stage:
        case "payload":
            made = store.init_host(project, host, _given(project, host), runner=runner)
            store.check_host(project, host, runner=runner)
            laid = payload.materialise(project, host, runner=runner)
            return bool(made.created or made.updated or laid.changed), f"payload {laid.digest[:12]}"
        case "provision":
            before = _plan_provision(project, host, tools)
            server = provision.apply(project, host, runner=runner, cloud=cloud, say=say)
            return not before.empty, f"server {server.id} at {', '.join(server.addresses.values())}"
        case "install":
            if _plan_install(project, host, tools).empty:
                return False, "installed already"
            store.check_host(project, host, runner=runner)
            server = _server(cloud, host)
            if host in project.reinstall:
                server = install.wipe(project, host, runner=runner, cloud=cloud, server=server, say=say)
            install.apply(project, host, runner=runner, server=server, pin=store.host_ssh_pin(project, host), say=say)
            return True, "installed"
        case "lockdown":
            if _plan_lockdown(project, host, tools).empty:
                return False, "as declared"
            lockdown.apply(
                project,
                host,
                runner=runner,
                cloud=cloud,
                server=_server(cloud, host),
                pin=store.host_ssh_pin(project, host),
                say=say,
            )
            return True, project.fleet.host(host).ssh_exposure.mode
        case "verify":
            report = verify_host.verify(project, host, runner=runner, cloud=cloud)
            say(report.summary)
            if report.exit_code != 0:
                raise VerifyError(report.summary, where=host, fix=f"the report: {report.report_html}")
            return False, f"{report.summary}; report: {report.report_html}"
        case _:
            raise ValueError(f"there is no stage {stage!r}; there are {', '.join(STAGES)}")


def _given(project: Project, host: str) -> dict[str, Secret]:
    """The values that the operator's file holds for ``host``; none without such a file."""
    if project.secrets_file is None:
        return {}
    return store.read_values(project.secrets_file, host, declared=project.fleet.hosts)


def _plan_provision(project: Project, host: str, tools: Tools) -> provision.ProvisionPlan:
    """The plan; refused before a server is paid for that could then not be installed."""
    planned = provision.plan_for(project, host, cloud=tools.cloud)
    if not planned.empty:
        require_program(tools.runner, "tofu", "install OpenTofu 1.10 or newer (make setup builds it)")
    if provision.SERVER not in planned.adopt:
        install.require_means(project, host, runner=tools.runner)
    return planned


def _plan_install(project: Project, host: str, tools: Tools) -> install.InstallPlan:
    server = tools.cloud.server(host)
    if host in project.reinstall:
        return install.plan_reinstall(host, server, project.fleet.host(host))
    seen = _look(project, host, server, tools)
    firewall = (
        tools.cloud.firewall(provision.firewall_name(host)) if seen.state is install.TargetState.UNKNOWN else None
    )
    return install.plan(host, seen, edge_open=firewall is None or firewall.ssh_is_open)


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
    pin_file = project.layout.installer_pin(host)
    server_id, _, installer_pin = pin_file.read_text().strip().partition(" ") if pin_file.exists() else ("", "", "")
    return install.look(
        tools.runner,
        host,
        server=server,
        pin=store.host_ssh_pin(project, host) if project.layout.host_ssh_public_key(host).exists() else None,
        installer_pin=installer_pin if server_id == str(server.id) else None,
    )


def _server(cloud: Cloud, host: str) -> Server:
    if (server := cloud.server(host)) is None:
        raise InstallRefused("there is no such server", where=host, fix="run the provision stage first")
    return server
