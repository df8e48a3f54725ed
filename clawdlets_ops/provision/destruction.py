"""Destroy: everything of one named host, and the proof that nothing of it is left.

What the host is made of is read by its labels, so that a host that has left the fleet file, or whose state was lost, can
be destroyed too. Two steps through OpenTofu, each with its own gated plan: take the delete protection off, then delete.
A placement group that other servers are in is handed over to one of them, never deleted. Interrupted anywhere, a re-run
finishes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from clawdlets_ops.errors import CloudError, PlanRefused
from clawdlets_ops.files import ensure_dir, locked, write_atomic
from clawdlets_ops.hetzner import (
    HOST_LABEL,
    KINDS,
    MANAGED_BY,
    MANAGER,
    Cloud,
    Labelled,
    PlacementGroup,
    SshKey,
    is_ours,
)
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.provision import applying, render, state
from clawdlets_ops.provision.gate import DESTROY, gate
from clawdlets_ops.provision.observed import Observed
from clawdlets_ops.provision.planning import existing
from clawdlets_ops.provision.render import GROUP, firewall_name
from clawdlets_ops.secrets import store
from clawdlets_ops.secrets.view import Plan as FilesPlan
from clawdlets_ops.tofu import STATE_FILE

GONE_WITHIN_S = 60.0

# An import needs one; what is written here is not compared with anything.
_SOME_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"


@dataclass(frozen=True)
class DestroyPlan:
    """What is to go: ``found`` in the cloud, by its labels, and ``local`` files that only serve this host.

    ``hand_over`` are the labels that a placement group gets which other servers are in; None when it goes too.
    """

    host: str
    found: tuple[Labelled, ...]
    local: tuple[Path, ...]
    observed: Observed
    hand_over: dict[str, str] | None = None

    @property
    def empty(self) -> bool:
        """True when nothing is left of the host."""
        return not (self.found or self.local)

    @property
    def steps(self) -> tuple[str, ...]:
        """For people."""
        deletions = [f"delete the {one}" for one in self.doomed]
        kept = [f"hand over the {one}" for one in self.found if one not in self.doomed]
        return (*deletions, *kept, *map(_forget_step, self.local))

    @property
    def doomed(self) -> tuple[Labelled, ...]:
        """What is deleted in the cloud."""
        return tuple(one for one in self.found if self.hand_over is None or one.kind != "placement_groups")

    def __str__(self) -> str:
        return "\n".join(self.steps) or "nothing to do"


def labels(host: str) -> dict[str, str]:
    """What everything of a host is found by."""
    return {MANAGED_BY: MANAGER, HOST_LABEL: host}


def plan_destroy(project: Project, host: str, *, cloud: Cloud) -> DestroyPlan:
    """What there is of ``host``; CloudError when a server or firewall of its name is not ours."""
    applying.check_binding(project)
    found = cloud.labelled(labels(host))
    server, firewall = cloud.server(host), cloud.firewall(firewall_name(host))
    for what, one in (("server", server), ("firewall", firewall)):
        if one is not None and not is_ours(one.labels, host):
            raise CloudError(
                f"there is a {what} called {one.name!r} (id {one.id}) that this project did not make",
                where=host,
                fix="it is not touched; rename it, or remove it in the project's console, and run again",
            )
    kinds = {one.kind for one in found}
    keys = [one for one in found if one.kind == "ssh_keys"]
    if len(keys) > 1 or sum(one.kind == "servers" for one in found) > 1:
        raise CloudError(
            f"more is labelled for this host than it can have: {', '.join(map(str, found))}",
            where=host,
            fix="take the label clawdlets-host off what does not belong to it",
        )
    group = next((cloud.placement_group(one.name) for one in found if one.kind == "placement_groups"), None)
    observed = Observed(
        server=server,
        firewall=firewall,
        ssh_key=SshKey(keys[0].id, keys[0].name, labels(host), "", _SOME_KEY) if keys else None,
        volumes=tuple(one for one in cloud.volumes() if is_ours(one.labels, host)) if "volumes" in kinds else (),
        primary_ips=tuple(one for one in cloud.primary_ips() if is_ours(one.labels, host))
        if "primary_ips" in kinds
        else (),
        placement_group=group,
        host=host,
    )
    heirs = _heirs(group, observed, cloud) if group else None
    return DestroyPlan(host, found, _local(project, host), observed, heirs)


def destroy(
    project: Project,
    host: str,
    *,
    named: str,
    runner: Runner,
    cloud: Cloud,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Labelled, ...]:
    """Destroy ``host`` and return what was deleted; PlanRefused unless ``named`` is its name.

    CloudError when something with its labels is still there afterwards.
    """
    if named != host:
        raise PlanRefused(
            f"{host} was not named to be destroyed", where=host, fix=f"clawdlets destroy {host}, and type its name"
        )
    holder = f"the destruction of {host} by {project.operator}"
    wait_s = applying.LOCK_WAIT_S
    with (
        locked(project.layout.lock(f"provision-{host}"), what=host, wait_s=wait_s, holder=holder) as host_fd,
        locked(project.layout.lock("cloud"), what="the cloud", wait_s=wait_s, holder=holder) as cloud_fd,
    ):
        planned = plan_destroy(project, host, cloud=cloud)
        if planned.found:
            _through_tofu(project, planned, runner=runner, lock_fds=(host_fd, cloud_fd), say=say)
        _prove(project, host, cloud)
        for step in map(_forget_step, planned.local):
            say(step)
        _forget(project, host, runner=runner)
        return planned.doomed


def _through_tofu(
    project: Project,
    planned: DestroyPlan,
    *,
    runner: Runner,
    lock_fds: tuple[int, ...],
    say: Callable[[str], None],
) -> None:
    host, observed = planned.host, planned.observed
    write_atomic(ensure_dir(project.layout.bound_to.parent) / project.layout.bound_to.name, project.binding + "\n")
    tofu = state.open_tofu(project, host, runner=runner, lock_fds=lock_fds)
    held = render.hold(observed, endpoint=project.hcloud_endpoint, group_labels=planned.hand_over)
    applying.prepare(project, host, tofu, held, {})
    state.migrate(project, host, runner=runner, lock_fds=lock_fds)
    applying.unprotect(project, host, observed, tofu, runner=runner, say=say, group_labels=planned.hand_over)
    if planned.hand_over is not None:
        tofu.forget(GROUP)
        observed = replace(observed, placement_group=None)
        applying.prepare(project, host, tofu, render.hold(observed, endpoint=project.hcloud_endpoint), {})
    changes = gate(tofu.plan(destroy=True), stage=DESTROY, host=host)
    strangers = {change.address for change in changes} - set(existing(host, observed))
    if strangers:
        tofu.discard_plan()
        raise PlanRefused(
            f"the plan would delete {', '.join(sorted(strangers))}, which has not the host's labels",
            where=f"tofu plan of {host}",
            fix="look at it in the project's console: label it, or take it out of the state (tofu state rm)",
        )
    applying.apply_saved(project, host, tofu, changes, runner=runner, say=say)


def _heirs(group: PlacementGroup, observed: Observed, cloud: Cloud) -> dict[str, str] | None:
    """The labels for a group that other servers are in: those of another host of ours, else none of ours."""
    others = group.servers - {observed.server.id if observed.server else -1}
    if not others:
        return None
    ours = sorted(
        one.name for one in cloud.labelled({MANAGED_BY: MANAGER}) if one.kind == "servers" and one.id in others
    )
    kept = {name: value for name, value in group.labels.items() if name not in (MANAGED_BY, HOST_LABEL)}
    return {**kept, **labels(ours[0])} if ours else kept


def _prove(project: Project, host: str, cloud: Cloud) -> None:
    left = Retrying(
        stop=stop_after_delay(GONE_WITHIN_S),
        wait=wait_fixed(project.poll_interval_s),
        retry=retry_if_result(bool),
        retry_error_callback=lambda tried: tried.outcome.result() if tried.outcome else (),
    )(lambda: cloud.labelled(labels(host)))
    if left:
        raise CloudError(
            f"still there: {', '.join(map(str, left))}",
            where=host,
            fix="run again; if it stays, look at the project's console",
        )


def proof(host: str) -> str:
    """The sentence that a destruction ends with."""
    selector = ",".join(f"{name}={value}" for name, value in labels(host).items())
    return f"nothing labelled {selector} is left ({', '.join(KINDS)})"


def _local(project: Project, host: str) -> tuple[Path, ...]:
    """What serves this host alone on the operator's side: its SSH host identity, pins, payload, working directory. Its
    age key and its secrets stay: their values are not the machine's, and secrets reconcile removes them with the host."""
    layout = project.layout
    candidates = (
        layout.host_ssh_key_file(host),
        layout.host_ssh_public_key(host),
        layout.installer_pin(host),
        layout.extra_files(host),
        layout.install_dir(host),
        layout.state_file(f"provision-{host}"),
        layout.tofu_dir(host) / STATE_FILE,
    )
    return tuple(path for path in candidates if path.exists() or path.is_symlink())


def _forget_step(path: Path) -> str:
    return f"forget {path.name}"


def _forget(project: Project, host: str, *, runner: Runner) -> None:
    layout = project.layout
    identity = tuple(
        path for path in (layout.host_ssh_key_file(host), layout.host_ssh_public_key(host)) if path.exists()
    )
    if identity:
        store.change(project, lambda: FilesPlan(removals=identity), runner=runner)
    for folder in (layout.extra_files(host), layout.install_dir(host)):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
    for path in (layout.installer_pin(host), layout.state_file(f"provision-{host}")):
        path.unlink(missing_ok=True)
    state.forget(project, host)
