"""``clawdlets probe``: who reaches a host's SSH port, by real connections from wherever the operator can look."""

from __future__ import annotations

import json
import sys

import click

from clawdlets_ops import workflow
from clawdlets_ops.commands.context import with_project
from clawdlets_ops.finding import State
from clawdlets_ops.project import Project
from clawdlets_ops.verify import probing

EXIT = {State.PASS: 0, State.FAIL: 1, State.UNKNOWN: 2}


@click.command()
@click.argument("host")
@click.option("--via", multiple=True, metavar="USER@HOST", help="Look from this machine too, by SSH; repeatable.")
@click.option("--others", is_flag=True, help="Look from each other host of the fleet too.")
@click.option(
    "--control",
    "controls",
    multiple=True,
    metavar="ADDRESS:PORT",
    help="What --via and --others can surely reach, one for each family; default: what the first vantage can.",
)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text")
@with_project
def probe(
    project: Project, host: str, via: tuple[str, ...], others: bool, controls: tuple[str, ...], form: str
) -> None:
    """Look at HOST's port 22 from outside and from the tailnet, over IPv4 and IPv6.

    Exit status: 0 as declared; 1 otherwise than declared; 2 something could not be seen: a closed port counts only where the
    same vantage has just reached its control on the same family.
    """
    tools = workflow.tools_for(project)
    look = probing.probe(
        project, host, runner=tools.runner, cloud=tools.cloud, via=via, others=others, controls=controls
    )
    click.echo(json.dumps(look.as_json(), indent=2) if form == "json" else str(look))
    sys.exit(EXIT[look.state])
