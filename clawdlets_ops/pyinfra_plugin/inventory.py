"""Inventories from the fleet file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyinfra.api.exceptions import InventoryError

from clawdlets_ops.errors import ClawdletsError, SettingsError
from clawdlets_ops.project import Project, load_project
from clawdlets_ops.workflow import tools_for


def fleet_hosts(root: Path, environ: Mapping[str, str], *, lab: bool) -> list[tuple[str, dict[str, Any]]]:
    """Every host of the fleet as ``@clawdlets/<host>``, with project and tools as host data.

    ``lab`` says which kind of environment the caller means. InventoryError (pyinfra shows it without a traceback) when the
    project's environment is the other, the fleet is wrong, or there is no usable token.
    """
    try:
        project = load_project(root, environ)
        _check_environment(project, lab=lab)
        data = {"clawdlets_project": project, "clawdlets_tools": tools_for(project)}
    except ClawdletsError as error:
        raise InventoryError(str(error)) from error
    return [(f"@clawdlets/{name}", {**data, "clawdlets_host": name}) for name in project.fleet.hosts]


def _check_environment(project: Project, *, lab: bool) -> None:
    in_lab = project.environ.get("CLAWDLETS_ENVIRONMENT") == "lab"
    if lab and not in_lab:
        raise SettingsError(
            "the lab is not up in this checkout", where=str(project.layout.env_file), fix="clawdlets lab up"
        )
    if in_lab and not lab:
        raise SettingsError(
            "this checkout's environment is the lab, not a Hetzner account",
            where=str(project.layout.env_file),
            fix="use inventory/lab.py, or another checkout for production",
        )
