"""Inventories from the fleet file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyinfra.api.exceptions import InventoryError

from clawdlets_ops.errors import ClawdletsError, SettingsError
from clawdlets_ops.hetzner import HetznerCloud
from clawdlets_ops.project import Project, load_project
from clawdlets_ops.rollout.snapshot import Snapshot
from clawdlets_ops.workflow import tools_for


def fleet_hosts(root: Path, environ: Mapping[str, str], *, environment: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every host of the fleet as ``@clawdlets/<host>``, with project, tools and one look at the API for all as host data.

    ``environment`` is the name of the one that the caller means; empty for a Hetzner account. InventoryError (pyinfra
    shows it without a traceback) when the project's settings are of another, the fleet is wrong, or there is no usable
    token.
    """
    try:
        project = load_project(root, environ)
        _check_environment(project, environment)
        tools = tools_for(project)
        reader = HetznerCloud(project.token, project.hcloud_endpoint, poll_interval_s=project.poll_interval_s)
        data = {"clawdlets_project": project, "clawdlets_tools": tools, "clawdlets_snapshot": Snapshot(reader)}
    except ClawdletsError as error:
        raise InventoryError(str(error)) from error
    return [(f"@clawdlets/{name}", {**data, "clawdlets_host": name}) for name in project.fleet.hosts]


def _check_environment(project: Project, wanted: str) -> None:
    if project.environment == wanted:
        return
    where = str(project.layout.env_file)
    if not project.environment:
        raise SettingsError(f"the {wanted} is not up in this checkout", where=where, fix=f"clawdlets {wanted} up")
    raise SettingsError(
        f"this checkout's environment is the {project.environment}, not {f'the {wanted}' if wanted else 'a Hetzner account'}",
        where=where,
        fix=f"use inventory/{project.environment}.py, or another checkout",
    )
