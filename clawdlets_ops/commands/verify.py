"""``clawdlets verify``: judge hosts by the shipped suite, or say what a check looks at."""

from __future__ import annotations

import re
import signal
import sys
import threading
from pathlib import Path

import click

from clawdlets_ops import workflow
from clawdlets_ops.commands.context import hosts_option, with_project
from clawdlets_ops.project import Project
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.verify import catalogue, fleet, fleet_report
from clawdlets_ops.verify import watch as watching
from clawdlets_ops.verify.run import PARALLEL

FILES = {"json": "report.json", "html": "report.html", "sarif": "report.sarif", "junit": "junit.xml"}


WEB_HOOK = "CLAWDLETS_WEBHOOK"
MIN_EVERY_S = 10


class Duration(click.ParamType[float]):
    """A number with s, m or h, as seconds."""

    name = "duration"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """``15m`` → 900.0."""
        found = re.fullmatch(r"(\d{1,6})([smh])", str(value))
        if found is None:
            self.fail(f"{value!r} is no duration; write 30s, 15m or 2h", param, ctx)
        return int(found[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[found[2]]


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
@click.option("--parallel", type=click.IntRange(1, 64), default=PARALLEL, show_default=True, help="Hosts at a time.")
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
        if made.signature is not None:
            click.echo(f"signature: {made.signature}")
    else:
        click.echo((made.folder / FILES[form]).read_text(encoding="utf-8"), nl=False)
    if made.signature is None:
        click.echo(f"not signed: {made.unsigned}", err=True)
    sys.exit(made.exit_code)


@click.command()
@hosts_option
@click.option("--only", multiple=True, metavar="ID", help="Only this check; repeatable.")
@click.option("--every", type=Duration(), default="15m", show_default=True, help="From the end of one to the next.")
@click.option("--times", type=click.IntRange(min=1), default=None, help="Then end; default: until it is interrupted.")
@click.option(
    "--textfile",
    type=click.Path(dir_okay=False, path_type=Path),
    help="For Prometheus' node exporter, written each time.",
)
@with_project
def watch(
    project: Project,
    hosts: tuple[str, ...],
    only: tuple[str, ...],
    every: float,
    times: int | None,
    textfile: Path | None,
) -> None:
    """Verify again and again, and say when something changed.

    CLAWDLETS_WEBHOOK, best in .clawdlets/env, is a URL that is told as well. The exit status is the last verification's.
    """
    if every < MIN_EVERY_S:
        raise click.BadParameter(f"at least {MIN_EVERY_S}s", param_hint="--every")
    tools = workflow.tools_for(project)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    hook = project.environ.get(WEB_HOOK)

    def verify_once() -> fleet.FleetReport:
        chosen = tuple(dict.fromkeys(hosts)) or tuple(project.fleet.hosts)
        return fleet.verify_fleet(project, chosen, runner=tools.runner, cloud=tools.cloud, only=only)

    sys.exit(
        watching.watch(
            verify_once,
            every_s=every,
            times=times,
            wait=ended.wait,
            say=click.echo,
            textfile=textfile,
            hook=Secret(hook, WEB_HOOK) if hook else None,
        )
    )
