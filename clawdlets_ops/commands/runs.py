"""``clawdlets runs``: what was done to the fleet, when, and how it ended."""

from __future__ import annotations

import json

import click

from clawdlets_ops.layout import Layout
from clawdlets_ops.runs import page, record


@click.group()
def runs() -> None:
    """What was done to the fleet, when, and how it ended; the newest 50 runs are kept."""


@runs.command("list")
@click.option("--json", "as_json", is_flag=True)
@click.pass_context
def runs_list(context: click.Context, as_json: bool) -> None:
    """Every run that is kept, the newest first."""
    found = record.list_runs(Layout(context.obj.resolve()).runs)
    if as_json:
        rows = [
            {"id": run.id, "state": run.state, "startedAt": run.started.isoformat(), "hosts": list(run.hosts)}
            for run in found
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    if not found:
        click.echo("no runs yet")
    for run in found:
        hosts = ", ".join(run.hosts[:4]) + (f" and {len(run.hosts) - 4} more" if len(run.hosts) > 4 else "")
        took = page.seconds((run.last - run.started).total_seconds())
        click.echo(f"{run.id}  {page.WORDS[run.state]:13}  {took:>12}  {hosts}")


@runs.command("show")
@click.argument("ident", metavar="[ID]", required=False)
@click.option("--json", "as_json", is_flag=True)
@click.pass_context
def runs_show(context: click.Context, ident: str | None, as_json: bool) -> None:
    """One run, the newest without an ID (its beginning is enough); writes its page anew."""
    run = record.find_run(Layout(context.obj.resolve()).runs, ident)
    written = page.write_page(run)
    if as_json:
        click.echo(json.dumps(run.as_json(), indent=2))
        return
    click.echo(f"run {run.id}: {page.WORDS[run.state]}; {len(run.hosts)} hosts: {page.counts(run)}")
    for host in run.hosts:
        for span in run.of(host):
            took = "" if span.state == "unchanged" else page.seconds(span.seconds)
            click.echo(f"  {host:20}  {span.stage:10}  {page.WORDS[span.state]:13}  {took:>10}")
            if span.state == "failed":
                click.echo("\n".join(f"      {line}" for line in span.text.splitlines()))
    if written:
        click.echo(f"page: {written}\nlogs: {run.path}")
