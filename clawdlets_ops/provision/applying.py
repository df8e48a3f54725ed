"""Provision: the server, its key, its firewall and what else is declared, through OpenTofu; compared with what the API shows.

The public SSH window of a host that is declared ``tailnet`` is open from creation until lockdown; once it has been closed
a later provision keeps it closed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from clawdlets_ops.errors import CloudError, CommandError, PlanRefused, SettingsError
from clawdlets_ops.files import ensure_dir, locked, sweep_temporaries, write_atomic
from clawdlets_ops.fleet import Host
from clawdlets_ops.hetzner import Cloud, Server, fingerprint_md5, is_ours
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project, read_public_key
from clawdlets_ops.provision import render, state
from clawdlets_ops.provision.gate import EXPOSURE, PROVISION, UNPROTECT, Change, gate, tainted
from clawdlets_ops.provision.observed import Observed
from clawdlets_ops.provision.planning import ProvisionPlan, existing, plan
from clawdlets_ops.provision.preflight import preflight, require_writable
from clawdlets_ops.provision.readback import APPLIED_WITHIN_S, wait_until_as_planned
from clawdlets_ops.provision.render import GROUP, KEY, SERVER, address_name, firewall_name, volume_name
from clawdlets_ops.tofu import APPLY_TIMEOUT_S, Tofu

LOCK_WAIT_S = 600.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Within:
    """How long an apply may take, and the API to show its result, in seconds."""

    tofu_s: float = APPLY_TIMEOUT_S
    applied_s: float = APPLIED_WITHIN_S


PATIENT = Within()


def check_binding(project: Project) -> None:
    """SettingsError when this runtime dir holds the state of another cloud than the one we would talk to now."""
    marker = project.layout.bound_to
    if marker.exists() and marker.read_text().strip() != project.binding:
        raise SettingsError(
            f"this runtime dir belongs to {marker.read_text().strip()}, not to {project.binding}: "
            "their states, keys and secrets are not to be mixed",
            where=str(marker),
            fix="use another checkout for the other environment (or, after the lab, remove .clawdlets and secrets)",
        )


def glance(cloud: Cloud, host: str) -> Observed:
    """Server and firewall: what drifts by itself. Two reads of the API."""
    return Observed(cloud.server(host), cloud.firewall(firewall_name(host)), None, whole=False, host=host)


def observe(cloud: Cloud, host: str, declared: Host, public_key: str, seen: Observed | None = None) -> Observed:
    """Everything that the host is made of, ``seen`` not read again. Kinds that it neither declares nor has are not asked
    for."""
    seen = seen or glance(cloud, host)
    order, server = declared.hetzner, seen.server
    names = {volume_name(host, name) for name in order.volumes}
    volumes = cloud.volumes() if names or (server and server.volumes) else ()
    ip_names = {address_name(host, family) for family in render.FAMILIES} if order.reserved_ips else set()
    # Nearly every server has addresses, and only the list tells those that would stay without it.
    addresses = cloud.primary_ips() if ip_names or (server and server.primary_ips) else ()
    return replace(
        seen,
        ssh_key=cloud.ssh_key(fingerprint_md5(public_key)),
        volumes=tuple(volume for volume in volumes if volume.name in names or is_ours(volume.labels, host)),
        primary_ips=tuple(ip for ip in addresses if ip.name in ip_names or is_ours(ip.labels, host)),
        placement_group=cloud.placement_group(order.placement_group) if order.placement_group else None,
        whole=True,
    )


def plan_for(project: Project, host: str, *, cloud: Cloud, window_open: bool | None = None) -> ProvisionPlan:
    """The plan against what the API shows now. Where nothing was declared anew since the last apply, two reads answer it.

    An order that could not be met is refused (see ``preflight``). ``Project.refresh`` makes a plan that is never empty:
    OpenTofu then compares everything.
    """
    check_binding(project)
    declared = project.fleet.host(host)
    public_key = read_public_key(project.ssh_public_key_file(host))
    may_replace = host in project.allow_replace

    def compare(seen: Observed, server_type: str | None = None) -> ProvisionPlan:
        return plan(
            host,
            declared,
            seen,
            public_key=public_key,
            endpoint=project.hcloud_endpoint,
            window_open=window_open,
            server_type=server_type,
            may_replace=may_replace,
        )

    seen = glance(cloud, host)
    if not project.refresh and seen.server is not None and _unchanged(project, host, declared, public_key, seen.server):
        planned = compare(seen)
        if planned.empty:
            return planned
    seen = observe(cloud, host, declared, public_key, seen)
    planned = compare(seen)
    if seen.server is None or SERVER in planned.loses:
        planned = compare(seen, preflight(host, declared, cloud))
    if project.refresh:
        planned = replace(planned, steps=(*planned.steps, "compare everything with OpenTofu's state (--refresh)"))
    return planned


def apply(
    project: Project,
    host: str,
    *,
    runner: Runner,
    cloud: Cloud,
    window_open: bool | None = None,
    within: Within = PATIENT,
    say: Say = lambda _: None,
    on_plan: Callable[[ProvisionPlan], None] = lambda _: None,
) -> Server:
    """Bring the cloud to the plan and prove by reading it back; returns the server. ``on_plan`` is given the plan before
    anything is done, and may refuse it by raising.

    Under the host's lock, which a killed run's OpenTofu keeps until it has ended; what hosts share (the SSH key, a
    placement group) is made under the project's lock. The plan is therefore made anew inside.
    """
    declared = project.fleet.host(host)
    holder = f"the provisioning of {host} by {project.operator}"
    with locked(
        project.layout.lock(f"provision-{host}"), what=f"{host} in the cloud", wait_s=LOCK_WAIT_S, holder=holder
    ) as lock_fd:
        planned = plan_for(project, host, cloud=cloud, window_open=window_open)
        on_plan(planned)
        if planned.empty:
            return wait_until_as_planned(planned, declared, cloud, project.poll_interval_s, within_s=within.applied_s)
        if _makes_shared(planned):
            with locked(project.layout.lock("cloud"), what="the cloud", wait_s=LOCK_WAIT_S, holder=holder) as shared_fd:
                planned = plan_for(project, host, cloud=cloud, window_open=window_open)
                return _carry_out(project, host, planned, window_open, runner, cloud, (lock_fd, shared_fd), within, say)
        return _carry_out(project, host, planned, window_open, runner, cloud, (lock_fd,), within, say)


def _carry_out(
    project: Project,
    host: str,
    planned: ProvisionPlan,
    window_open: bool | None,
    runner: Runner,
    cloud: Cloud,
    lock_fds: tuple[int, ...],
    within: Within,
    say: Say,
) -> Server:
    declared = project.fleet.host(host)
    if SERVER not in planned.adopt or planned.loses:
        require_writable(cloud)
    write_atomic(ensure_dir(project.layout.bound_to.parent) / project.layout.bound_to.name, project.binding + "\n")
    tofu = open_tofu(project, host, planned, runner=runner, lock_fds=lock_fds, say=say)
    if planned.loses:
        unprotect(project, host, planned.observed, tofu, runner=runner, say=say)
    prepare(project, host, tofu, planned.config, planned.adopt)
    changes = gate(
        _plan(tofu, planned.adopt, replace=tuple(address for address in planned.loses if address == SERVER)),
        stage=PROVISION if window_open is None or not planned.adopt.get(SERVER) else EXPOSURE,
        host=host,
        exists=planned.adopt,
        may_replace=bool(planned.loses),
    )
    apply_saved(project, host, tofu, changes, runner=runner, say=say, timeout_s=within.tofu_s)
    if any(change.imported for change in changes):
        prepare(project, host, tofu, planned.config, {})
    server = wait_until_as_planned(planned, declared, cloud, project.poll_interval_s, within_s=within.applied_s)
    said = tofu.outputs()
    if str(said.get("server_id")) != str(server.id) or (said.get("ipv4") or None) != server.ipv4:
        raise CloudError(
            f"OpenTofu's state speaks of server {said.get('server_id')}, the API of {server.id}",
            where=f"hosts.{host}",
            fix="look at both (tofu state list in the working directory, the project's console); nothing was changed by this",
        )
    _remember(project, host, declared, server)
    return server


def open_tofu(
    project: Project,
    host: str,
    planned: ProvisionPlan,
    *,
    runner: Runner,
    lock_fds: tuple[int, ...],
    say: Say,
) -> Tofu:
    """The host's OpenTofu, its configuration written; an old state in clear is encrypted first."""
    tofu = state.open_tofu(project, host, runner=runner, lock_fds=lock_fds)
    prepare(project, host, tofu, planned.config, {})
    if state.migrate(project, host, runner=runner, lock_fds=lock_fds):
        say("encrypted the OpenTofu state, which an older version had left in clear")
    return tofu


def unprotect(
    project: Project,
    host: str,
    observed: Observed,
    tofu: Tofu,
    *,
    runner: Runner,
    say: Say,
    group_labels: dict[str, str] | None = None,
) -> None:
    """Take the delete protection off everything of the host, and take over what the state does not know; changes nothing
    else, but for the labels of a placement group that is handed over."""
    held = render.hold(observed, endpoint=project.hcloud_endpoint, group_labels=group_labels)
    adopt = existing(host, observed)
    prepare(project, host, tofu, held, adopt)
    changes = gate(_plan(tofu, adopt), stage=UNPROTECT, host=host, exists=adopt)
    apply_saved(project, host, tofu, changes, runner=runner, say=say)
    prepare(project, host, tofu, held, {})


def _plan(tofu: Tofu, exists: dict[str, int], *, replace: tuple[str, ...] = ()) -> dict[str, Any]:
    """OpenTofu's plan. A resource whose creation was answered with an error on the way (locked, for instance) is marked in
    the state to be replaced; where the API shows that it is there, the mark is taken back and the rest is made up for."""
    try:
        document = tofu.plan(replace=replace)
        marked = tainted(document) & set(exists)
    except CommandError as error:
        if "prevent_destroy" not in error.what:
            raise
        document, marked = {}, set(exists)
    if not marked - set(replace):
        return document
    for address in sorted(marked):
        tofu.untaint(address)
    try:
        return tofu.plan(replace=replace)
    except CommandError as error:
        if "prevent_destroy" not in error.what:
            raise
        raise PlanRefused(
            f"the plan would replace what must not be lost\n{error.what}", where=error.where, fix=error.fix
        ) from None


def prepare(project: Project, host: str, tofu: Tofu, config: dict[str, Any], adopt: dict[str, int]) -> None:
    """Write the configuration with its backend. What exists is named for import: where the state has it already, OpenTofu
    does nothing; where an earlier run was cut short or its state was lost, it is taken over and never made twice."""
    document = {**config, "terraform": {**config["terraform"]}}
    if block := render.backend(project.fleet, host):
        document["terraform"]["backend"] = block
    if adopt:
        document["import"] = [{"to": address, "id": str(ident)} for address, ident in sorted(adopt.items())]
    tofu.prepare(document)


def apply_saved(
    project: Project,
    host: str,
    tofu: Tofu,
    changes: tuple[Change, ...],
    *,
    runner: Runner,
    say: Say,
    timeout_s: float = APPLY_TIMEOUT_S,
) -> None:
    """Apply exactly the plan that passed the gate, after its state was kept; nothing when it changes nothing."""
    if not changes:
        tofu.discard_plan()
        return
    for change in changes:
        say(str(change))
    state.keep(project, host, tofu, runner=runner)
    tofu.apply(timeout_s=timeout_s)


def _makes_shared(planned: ProvisionPlan) -> bool:
    """Whether something would be made that other hosts use too."""
    made = {KEY: planned.observed.ssh_key, GROUP: planned.observed.placement_group}
    resources = planned.config["resource"]
    return any(found is None and address.partition(".")[0] in resources for address, found in made.items())


def _inputs(declared: Host, public_key: str) -> str:
    """What a host's configuration is made of, as one digest; the rules are compared with the API each time."""
    document = {"form": 1, "hetzner": declared.hetzner.model_dump(mode="json"), "key": public_key.split()[1]}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _tied(server: Server) -> dict[str, Any]:
    """What the server shows of the other resources."""
    return {
        "server": server.id,
        "volumes": sorted(server.volumes),
        "primaryIps": dict(sorted(server.primary_ips.items())),
        "placementGroup": server.placement_group,
    }


def _remember(project: Project, host: str, declared: Host, server: Server) -> None:
    public_key = read_public_key(project.ssh_public_key_file(host))
    path = project.layout.state_file(f"provision-{host}")
    document = {"inputs": _inputs(declared, public_key), **_tied(server)}
    sweep_temporaries(ensure_dir(path.parent), (f"{path.name}.",))  # ours alone, under the host's lock
    write_atomic(ensure_dir(path.parent) / path.name, json.dumps(document, indent=1) + "\n")


def _unchanged(project: Project, host: str, declared: Host, public_key: str, server: Server) -> bool:
    """Whether the last apply was for the same declaration, and the server shows the same parts as then."""
    path = project.layout.state_file(f"provision-{host}")
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return bool(before == {"inputs": _inputs(declared, public_key), **_tied(server)})
