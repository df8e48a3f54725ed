"""One look at a project, scope by scope. Reads only; whatever cannot be read is said to be so, and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, runtime_checkable

import yaml

from clawdlets_ops.cattle.keys import STATIC
from clawdlets_ops.cattle.labels import CATTLE
from clawdlets_ops.doctor.bench import look_at_bench
from clawdlets_ops.doctor.clone import has_operator_key, look_at_clone
from clawdlets_ops.doctor.deployed import look_at_field
from clawdlets_ops.doctor.doors import Doors, look_at_doors
from clawdlets_ops.doctor.looking import BoundedRunner, attempt, first_line
from clawdlets_ops.doctor.snapshot import Blind, NotHere, Scope, Snapshot, Wrong
from clawdlets_ops.doctor.store import Budget
from clawdlets_ops.errors import ClawdletsError, CloudError, FleetError
from clawdlets_ops.fleet import Fleet, load_fleet
from clawdlets_ops.guard import needles
from clawdlets_ops.hetzner import Cloud, HetznerCloud, Server
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project, load_project
from clawdlets_ops.secrets.observe import status
from clawdlets_ops.secrets.status import Row


@runtime_checkable
class ListsServers(Protocol):
    """A client of the API that lists servers by their labels."""

    def servers_with(self, labels: Mapping[str, str]) -> tuple[Server, ...]: ...


def the_cloud(project: Project) -> Cloud:
    """The real API, with the project's token; SettingsError when there is none that could be one."""
    return HetznerCloud(project.token, project.hcloud_endpoint)


def observe(
    root: Path,
    scope: Scope,
    environ: Mapping[str, str],
    hosts: Collection[str] = (),
    *,
    closure: Path | None = None,
    budget: Budget | None = None,
    cloud_of: Callable[[Project], Cloud] = the_cloud,
    doors_of: Doors = look_at_doors,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Snapshot:
    """Look at the project ``root`` as far as ``scope`` goes. FleetError when one of ``hosts`` is not declared."""
    root = root.resolve()
    layout = Layout(root)
    fleet = _fleet(layout)
    if isinstance(fleet, Fleet):
        for host in hosts:
            fleet.host(host)
    chosen = tuple(hosts or (sorted(fleet.hosts) if isinstance(fleet, Fleet) else ()))
    project = fleet if isinstance(fleet, Wrong) else _project(root, environ)
    runner = BoundedRunner(project.environ if isinstance(project, Project) else environ)
    if scope is Scope.CATTLE:
        return Snapshot(
            root,
            chosen,
            fleet,
            project,
            servers=_servers(project, chosen, cloud_of),
            cattle=_cattle(project, cloud_of),
            static_key_age_days=_static_key_age(fleet, layout, now()),
        )
    rows = _rows(project, hosts, runner)
    secrets_file = project.secrets_file if isinstance(project, Project) else None
    sealed = attempt(lambda: needles.decrypted([layout], runner) if has_operator_key(layout) else ([], []))
    repo = look_at_clone(root, fleet, project, runner=runner, secrets_file=secrets_file, sealed=sealed)
    if scope is Scope.REPO:
        return Snapshot(root, chosen, fleet, project, rows, repo)
    values = [] if isinstance(sealed, Blind) else sealed[0]
    bench, known = look_at_bench(project, layout, chosen, values, runner=runner, cloud_of=cloud_of)
    if scope is Scope.BOOTSTRAP:
        return Snapshot(root, chosen, fleet, project, rows, repo, bench)
    field = look_at_field(layout, project, chosen, known, runner=runner, closure=closure, budget=budget)
    field = replace(field, doors=doors_of(project, chosen, runner=runner, cloud_of=cloud_of))
    return Snapshot(root, chosen, fleet, project, rows, repo, bench, field)


def _fleet(layout: Layout) -> Fleet | Wrong:
    try:
        return load_fleet(layout.fleet_file)
    except FleetError as error:
        lines = [line.strip() for line in error.what.splitlines()]
        return Wrong("; ".join(lines[1:5]) if len(lines) > 1 else lines[0])


def _project(root: Path, environ: Mapping[str, str]) -> Project | Wrong:
    try:
        return load_project(root, environ)
    except ClawdletsError as error:
        return Wrong(first_line(error))
    except (OSError, ValueError) as error:
        return Wrong(f"the settings cannot be read ({type(error).__name__})")


def _rows(project: Project | Wrong, hosts: Collection[str], runner: Runner) -> tuple[Row, ...] | Blind:
    return (
        Blind(project.why)
        if isinstance(project, Wrong)
        else attempt(lambda: tuple(status(project, hosts, runner=runner)))
    )


def _servers(
    project: Project | Wrong, hosts: Collection[str], cloud_of: Callable[[Project], Cloud]
) -> dict[str, Server | None] | Blind:
    """One GET a host."""
    if isinstance(project, Wrong):
        return Blind(project.why)

    def ask() -> dict[str, Server | None]:
        cloud = cloud_of(project)
        return {host: cloud.server(host) for host in hosts}

    return attempt(ask)


def _cattle(project: Project | Wrong, cloud_of: Callable[[Project], Cloud]) -> tuple[Server, ...] | Blind:
    """One GET for each 50 servers of the project."""
    if isinstance(project, Wrong):
        return Blind(project.why)
    enabled = project.fleet.cattle.enabled

    def ask() -> tuple[Server, ...]:
        asked = cloud_of(project)
        if not isinstance(asked, ListsServers):
            if not enabled:
                return ()
            raise CloudError("this client cannot list servers")
        if not enabled:
            return asked.servers_with({CATTLE: "true"})
        every = asked.servers_with({})
        return tuple(one for one in every if CATTLE in one.labels or one.name.startswith("cattle-"))

    return attempt(ask)


def _static_key_age(fleet: Fleet | Wrong, layout: Layout, now: datetime) -> int | NotHere:
    """By sops' own note in the encrypted file."""
    if isinstance(fleet, Wrong) or fleet.cattle.host is None:
        return NotHere("there is no static key")
    try:
        found = yaml.safe_load(layout.secret_file(fleet.cattle.host, STATIC).read_text(encoding="utf-8"))
        at = datetime.fromisoformat(str(found["sops"]["lastmodified"]).replace("Z", "+00:00"))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return NotHere("there is no static key")
    return (now - at).days
