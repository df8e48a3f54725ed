"""``clawdlets plan``: what a stage would do now."""

from __future__ import annotations

from dataclasses import replace

import click

from clawdlets_ops import workflow
from clawdlets_ops.commands.context import with_project
from clawdlets_ops.project import Project


@click.command()
@click.argument("stage", type=click.Choice(workflow.STAGES))
@click.option("--host", required=True)
@click.option("--allow-replace", metavar="HOST", multiple=True, help="As if HOST were named to be replaced.")
@click.option("--refresh", is_flag=True, help="As if everything were to be compared with OpenTofu's state.")
@with_project
def plan(project: Project, stage: str, host: str, allow_replace: tuple[str, ...], refresh: bool) -> None:
    """Show what a stage would do to a host now; changes nothing."""
    project = replace(project, allow_replace=frozenset(allow_replace), refresh=refresh)
    click.echo(str(workflow.plan(stage, project, host, workflow.tools_for(project))))
