"""``clawdlets verify``: judge hosts by the shipped suite, or say what a check looks at."""

from __future__ import annotations

import sys

import click

from clawdlets_ops import workflow
from clawdlets_ops.commands.secrets import hosts_option, with_project
from clawdlets_ops.project import Project
from clawdlets_ops.verify import catalogue, fleet, fleet_report

FILES = {"json": "report.json", "html": "report.html", "sarif": "report.sarif", "junit": "junit.xml"}


def _explain(context: click.Context, _parameter: click.Parameter, ident: str | None) -> None:
    if ident is not None:
        click.echo(str(catalogue.find(ident)))
        context.exit()


@click.command()
@hosts_option
@click.option("--only", multiple=True, metavar="ID", help="Only this check; repeatable.")
@click.option(
    "--format", "form", type=click.Choice(["text", *FILES]), default="text", help="What is printed; all are written."
)
@click.option(
    "--parallel", type=click.IntRange(1, 64), default=fleet.PARALLEL, show_default=True, help="Hosts at a time."
)
@click.option(
    "--explain", metavar="ID", expose_value=False, is_eager=True, callback=_explain, help="What a check looks at."
)
@with_project
def verify(project: Project, hosts: tuple[str, ...], only: tuple[str, ...], form: str, parallel: int) -> None:
    """Check hosts against the security model, from inside and outside.

    Exit status: 0 all passed; 1 something failed; 2 nothing failed, but something is unknown.
    """
    tools = workflow.tools_for(project)
    made = fleet.verify_fleet(
        project,
        tuple(dict.fromkeys(hosts)) or tuple(project.fleet.hosts),
        runner=tools.runner,
        cloud=tools.cloud,
        only=only,
        parallel=parallel,
    )
    if form == "text":
        click.echo(fleet_report.text(made.document, str(made.page)))
    else:
        click.echo((made.folder / FILES[form]).read_text(encoding="utf-8"), nl=False)
    click.echo(f"signature: {made.signature}" if made.signature else f"not signed: {made.unsigned}", err=True)
    sys.exit(made.exit_code)
