"""``clawdlets destroy``: everything of one host, after its name was typed."""

from __future__ import annotations

import click

from clawdlets_ops import provision, workflow
from clawdlets_ops.commands.context import with_project
from clawdlets_ops.project import Project


@click.command()
@click.argument("host")
@click.option("--confirm", metavar="HOST", help="The host's name once more, instead of being asked for it.")
@click.option("--dry", is_flag=True, help="Only show what would be deleted.")
@with_project
def destroy(project: Project, host: str, confirm: str | None, dry: bool) -> None:
    """Delete HOST's server, addresses, volumes and firewall, and forget its identity and state.

    HOST need not be in the fleet file any more: what is its own is found by its labels.
    """
    tools = workflow.tools_for(project)
    planned = provision.plan_destroy(project, host, cloud=tools.cloud)
    click.echo(str(planned), err=not dry)
    if dry:
        return
    named = confirm if confirm is not None or planned.empty else click.prompt(f"Type {host} to destroy it", err=True)
    with tools.journal.stage(host, "destroy") as say:
        deleted = provision.destroy(project, host, named=named or host, runner=tools.runner, cloud=tools.cloud, say=say)
    for one in deleted:
        click.echo(f"deleted {one}")
    click.echo(provision.proof(host))
