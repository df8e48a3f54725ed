"""``clawdlets lab``: a cloud on this machine, from the command line."""

from __future__ import annotations

import json
import os
import sys
from typing import NoReturn

import click

from clawdlets_ops.commands import ENVIRON
from clawdlets_ops.finding import State, exit_code
from clawdlets_ops.lab import control, doctor, faults, overview, setup
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import load_project

MARK = {State.PASS: "ok", State.FAIL: "FAIL", State.UNKNOWN: "unknown", State.NOT_APPLICABLE: "n/a"}


@click.group()
def lab() -> None:
    """A Hetzner cloud in a box: rehearse the whole fleet on this machine."""


@lab.command("setup")
@click.option(
    "--tailnet", is_flag=True, help="headscale and tailscaled too, for a real tailnet: six minutes of building."
)
@click.pass_context
def lab_setup(context: click.Context, tailnet: bool) -> None:
    """What the lab needs on this machine: packages, OpenTofu and the provider, the base image; again, it says nothing."""
    setup.prepare(_layout(context), context.meta[ENVIRON], tailnet=tailnet, say=click.echo)


@lab.command("up")
@click.option(
    "--tailnet",
    type=click.Choice(["auto", "real", "stand-in"]),
    default="auto",
    show_default=True,
    help="What the tailnet is: headscale and tailscaled (make tailnet builds them), or a stand-in; auto: the real one "
    "where it is built.",
)
@click.option(
    "--cut-established/--keep-established",
    default=None,
    help="Whether a change of firewall rules ends the flows that the new rules would not let begin; a new lab keeps them.",
)
@click.pass_context
def lab_up(context: click.Context, tailnet: str, cut_established: bool | None) -> None:
    """Start this checkout's lab; again, it is the same lab."""
    status = control.up(_layout(context), context.meta[ENVIRON], tailnet=tailnet, cut_established=cut_established)
    click.echo(overview.text(status))


@lab.command("status")
@click.option("--probe", is_flag=True, help="Measure who reaches port 22, by real connections; takes some seconds.")
@click.option("--json", "as_json", is_flag=True)
@click.pass_context
def lab_status(context: click.Context, probe: bool, as_json: bool) -> None:
    """Machines, addresses, exposure by vantage point, and the last API requests."""
    layout = _layout(context)
    seen = control.status(layout)
    up = seen.state == "up"
    requests = control.requests(layout, overview.REQUESTS_SHOWN) if up else []
    exposures = None
    if probe and up:
        project = load_project(layout.root, context.meta[ENVIRON])
        exposures = overview.measure(seen, project.vantages, LocalRunner(project.environ))
    if as_json:
        click.echo(json.dumps(overview.as_json(seen, requests, exposures), indent=2))
    else:
        click.echo(overview.text(seen, requests, exposures))


@lab.command("down")
@click.pass_context
def lab_down(context: click.Context) -> None:
    """End this checkout's lab and leave nothing of it running."""
    control.down(_layout(context), context.meta[ENVIRON])
    click.echo("the lab is down")


@lab.group("fault")
def lab_fault() -> None:
    """What goes wrong next in the lab; docs/howto/rehearse-bad-days.md has the words."""


@lab_fault.command("add")
@click.argument("words", nargs=-1, required=True)
@click.pass_context
def lab_fault_add(context: click.Context, words: tuple[str, ...]) -> None:
    """Put a fault into the lab, e.g. loss alpha percent=20."""
    click.echo(faults.inject(_layout(context), faults.parse_fault(words)))


@lab_fault.command("list")
@click.pass_context
def lab_fault_list(context: click.Context) -> None:
    """The faults in the lab, with how often each was met."""
    click.echo("\n".join(map(str, faults.faults(_layout(context)))) or "none")


@lab_fault.command("clear")
@click.argument("ident", metavar="[ID]", required=False)
@click.pass_context
def lab_fault_clear(context: click.Context, ident: str | None) -> None:
    """Take one fault away, or all."""
    click.echo(f"cleared: {faults.clear(_layout(context), ident)}")


@lab.command("reset")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def lab_reset(context: click.Context, yes: bool) -> None:
    """End the lab, forget its machines and their state, and start it anew; operator keys and secrets/ stay."""
    layout = _layout(context)
    if not yes:
        click.confirm(f"Delete every machine of the lab and all of {layout.runtime} but the operator keys?", abort=True)
    click.echo(overview.text(control.reset(layout, context.meta[ENVIRON])))


@lab.command("shell", context_settings={"ignore_unknown_options": True})
@click.argument("host")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def lab_shell(context: click.Context, host: str, command: tuple[str, ...]) -> None:
    """A root shell in a machine, or COMMAND there, past network and firewalls; its exit status is ours."""
    _become(control.guest_argv(_layout(context), host, command or ("bash", "--login")))


@lab.command("logs")
@click.argument("host", required=False)
@click.option("--journal", is_flag=True, help="The machine's own journal instead of its console.")
@click.option("--api", is_flag=True, help="Every API request, one JSON object a line.")
@click.option("--daemon", is_flag=True, help="The lab's own log.")
@click.option("--follow", "-f", is_flag=True, help="Go on until interrupted.")
@click.pass_context
def lab_logs(context: click.Context, host: str | None, journal: bool, api: bool, daemon: bool, follow: bool) -> None:
    """The console of HOST over all its boots, its journal, or the lab's own logs."""
    layout = _layout(context)
    if api + daemon + bool(host) != 1 or (journal and not host):
        raise click.UsageError("name a HOST (with --journal, if you like), or --api, or --daemon")
    if host and journal:
        _become(control.guest_argv(layout, host, ["journalctl", "--no-pager", *(["--follow"] if follow else [])]))
    path = (
        control.console_log(layout, host)
        if host
        else control.log_file(layout, "journal.jsonl" if api else "daemon.log")
    )
    _become(["tail", "--lines=+1", *(["--follow=name"] if follow else []), str(path)])


@lab.command("doctor")
@click.pass_context
def lab_doctor(context: click.Context) -> None:
    """What this machine lacks for the lab, and which tiers of tests it can run."""
    layout = _layout(context)
    findings = doctor.doctor(layout, context.meta[ENVIRON])
    for finding in [*findings, *doctor.tiers(layout, context.meta[ENVIRON])]:
        fix = f" → {finding.fix}" if finding.state is not State.PASS and finding.fix else ""
        click.echo(f"{MARK[finding.state]:8} {finding.claim}: {finding.observed}{fix}")
    sys.exit(exit_code(findings))


def _become(argv: list[str]) -> NoReturn:
    """Become that program, so that terminal, signals and exit status are its own."""
    sys.stdout.flush()
    os.umask(0o022)  # in a machine it is not our own private files that are made
    os.execvp(argv[0], argv)  # noqa: S606  (no shell is what we want)


def _layout(context: click.Context) -> Layout:
    return Layout(context.obj.resolve())
