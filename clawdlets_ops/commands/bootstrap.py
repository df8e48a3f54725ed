"""``clawdlets bootstrap``: many hosts from nothing to verified, side by side."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace

import click
from rich.console import Console

from clawdlets_ops import workflow
from clawdlets_ops.commands.context import with_project
from clawdlets_ops.hetzner import HetznerCloud
from clawdlets_ops.project import Project
from clawdlets_ops.rollout import pool
from clawdlets_ops.rollout.progress import Progress, result_table
from clawdlets_ops.rollout.snapshot import Snapshot
from clawdlets_ops.runs import page

PARALLEL = 10
INTERRUPTED = 130


@click.command()
@click.argument("hosts", metavar="[HOST]...", nargs=-1)
@click.option("--parallel", type=click.IntRange(1, 64), default=PARALLEL, show_default=True, help="Hosts at a time.")
@click.option(
    "--reinstall", multiple=True, metavar="HOST", help="This host may be wiped and installed anew; repeatable."
)
@click.option(
    "--allow-replace", multiple=True, metavar="HOST", help="Server, addresses and volumes may be lost; repeatable."
)
@click.option(
    "--refresh", is_flag=True, help="Ask OpenTofu for its full plan, also where nothing seems to have changed."
)
@click.option(
    "--until",
    type=click.Choice(workflow.STAGES),
    default=workflow.STAGES[-1],
    show_default=True,
    help="The last stage to go through.",
)
@with_project
def bootstrap(
    project: Project,
    hosts: tuple[str, ...],
    parallel: int,
    reinstall: tuple[str, ...],
    allow_replace: tuple[str, ...],
    refresh: bool,
    until: str,
) -> None:
    """Hosts (default: the whole fleet) from nothing to verified and locked down; again, nothing is changed.

    A host waits for no other, and a host that fails stops no other. Exit status: 0 every host is as declared, as far as it
    was to go; 1 a host failed; 130 interrupted.
    """
    chosen = tuple(dict.fromkeys(hosts)) or tuple(project.fleet.hosts)
    for host in (*chosen, *reinstall, *allow_replace):
        project.fleet.host(host)
    project = replace(project, reinstall=frozenset(reinstall), allow_replace=frozenset(allow_replace), refresh=refresh)
    console = Console(highlight=False)
    progress = Progress(chosen, console)
    stop = threading.Event()
    tools = workflow.tools_for(project, listen=progress.listen, stop=stop)
    cloud = HetznerCloud(project.token, project.hcloud_endpoint, poll_interval_s=project.poll_interval_s)
    tools = replace(tools, cloud=cloud)
    with pool.stopped_by_signals(stop), progress.shown:
        ends = pool.bootstrap(
            project,
            chosen,
            tools=tools,
            snapshot=Snapshot(cloud),
            stop=stop,
            parallel=parallel,
            on_end=progress.end,
            until=until,
        )
    console.print(result_table(ends), soft_wrap=True)
    page.refresh(tools.journal.folder)
    if (report := tools.journal.folder / page.PAGE).is_file():
        console.print(f"report: {report}", soft_wrap=True, markup=False)
    if left := [end.host for end in ends if not end.ok]:
        # What may be lost is named for one run: it is for the operator to say again.
        further = "" if until == workflow.STAGES[-1] else f" --until {until}"
        console.print(f"go on: clawdlets bootstrap {' '.join(left)}{further}", soft_wrap=True, markup=False)
    if stop.is_set():
        console.print("interrupted: what was begun goes on from there when it is run again", soft_wrap=True)
        sys.exit(INTERRUPTED)
    sys.exit(1 if left else 0)
