"""``clawdlets``: for operators. Parses arguments, wires the project, renders. Results on stdout, talk on stderr.

Exit status: 0 done; 1 refused or failed; 2 something is unknown (verify), or the command line is wrong.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import click

from clawdlets_ops import workflow
from clawdlets_ops.commands import bootstrap as bootstrap_commands
from clawdlets_ops.commands import cattle as cattle_commands
from clawdlets_ops.commands import destroy as destroy_commands
from clawdlets_ops.commands import doctor as doctor_commands
from clawdlets_ops.commands import egress as egress_commands
from clawdlets_ops.commands import fleet as fleet_commands
from clawdlets_ops.commands import guard as guard_commands
from clawdlets_ops.commands import init as init_commands
from clawdlets_ops.commands import lockdown as lockdown_commands
from clawdlets_ops.commands import runs as runs_commands
from clawdlets_ops.commands import secrets as secrets_commands
from clawdlets_ops.commands import verify as verify_commands
from clawdlets_ops.commands.probe import probe
from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.files import no_room
from clawdlets_ops.finding import State, exit_code
from clawdlets_ops.lab import control, doctor, faults, overview, setup
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import Project, load_project

MARK = {State.PASS: "ok", State.FAIL: "FAIL", State.UNKNOWN: "unknown", State.NOT_APPLICABLE: "n/a"}


def main() -> None:
    """Console script."""
    os.umask(0o077)  # whatever is made without a mode of its own is private
    try:
        clawdlets.main(standalone_mode=False)
    except ClawdletsError as error:
        click.echo(f"clawdlets: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        if (told := no_room(error)) is None:
            raise
        click.echo(f"clawdlets: {told}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)


@click.group()
@click.option(
    "--project", "root", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="Default: here."
)
@click.pass_context
def clawdlets(context: click.Context, root: Path) -> None:
    """Deploy a declared fleet of bot hosts, and prove that they are closed."""
    context.obj = root
    context.meta[secrets_commands.ENVIRON] = os.environ


clawdlets.add_command(destroy_commands.destroy)
clawdlets.add_command(secrets_commands.secrets)
clawdlets.add_command(guard_commands.guard)
clawdlets.add_command(verify_commands.verify)
clawdlets.add_command(probe)
clawdlets.add_command(verify_commands.watch)
clawdlets.add_command(bootstrap_commands.bootstrap)
clawdlets.add_command(lockdown_commands.lockdown)
clawdlets.add_command(lockdown_commands.open_host)
clawdlets.add_command(lockdown_commands.close)
clawdlets.add_command(runs_commands.runs)
clawdlets.add_command(cattle_commands.cattle)
clawdlets.add_command(doctor_commands.doctor)
clawdlets.add_command(init_commands.init)
clawdlets.add_command(egress_commands.egress)
clawdlets.add_command(fleet_commands.fleet)
clawdlets.add_command(fleet_commands.host)
clawdlets.add_command(fleet_commands.schema)  # as it was called before there was a group


@clawdlets.command()
@click.argument("stage", type=click.Choice(workflow.STAGES))
@click.option("--host", required=True)
@click.option("--allow-replace", metavar="HOST", multiple=True, help="As if HOST were named to be replaced.")
@click.option("--refresh", is_flag=True, help="As if everything were to be compared with OpenTofu's state.")
@secrets_commands.with_project
def plan(project: Project, stage: str, host: str, allow_replace: tuple[str, ...], refresh: bool) -> None:
    """Show what a stage would do to a host now; changes nothing."""
    project = replace(project, allow_replace=frozenset(allow_replace), refresh=refresh)
    click.echo(str(workflow.plan(stage, project, host, workflow.tools_for(project))))


@clawdlets.group()
def lab() -> None:
    """A Hetzner cloud in a box: rehearse the whole fleet on this machine."""


@lab.command("setup")
@click.option(
    "--tailnet", is_flag=True, help="headscale and tailscaled too, for a real tailnet: six minutes of building."
)
@click.pass_context
def lab_setup(context: click.Context, tailnet: bool) -> None:
    """What the lab needs on this machine: packages, OpenTofu and the provider, the base image; again, it says nothing."""
    setup.prepare(_layout(context), os.environ, tailnet=tailnet, say=click.echo)


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
    status = control.up(_layout(context), os.environ, tailnet=tailnet, cut_established=cut_established)
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
        project = load_project(layout.root, os.environ)
        exposures = overview.measure(seen, project.vantages, LocalRunner(project.environ))
    if as_json:
        click.echo(json.dumps(overview.as_json(seen, requests, exposures), indent=2))
    else:
        click.echo(overview.text(seen, requests, exposures))


@lab.command("down")
@click.pass_context
def lab_down(context: click.Context) -> None:
    """End this checkout's lab and leave nothing of it running."""
    control.down(_layout(context), os.environ)
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
    click.echo(overview.text(control.reset(layout, os.environ)))


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
    findings = doctor.doctor(layout, os.environ)
    for finding in [*findings, *doctor.tiers(layout, os.environ)]:
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
