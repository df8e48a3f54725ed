"""``clawdlets secrets``: the encrypted files in the repository, from the first key to a revoked operator."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from clawdlets_ops import workflow
from clawdlets_ops.commands import ENVIRON
from clawdlets_ops.commands.context import hosts_option, with_project
from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import Project, load_project
from clawdlets_ops.secrets import changes, edit, hostkeys, observe, payload, store, sync
from clawdlets_ops.secrets.plan import MAX_VALUE_BYTES, read_value
from clawdlets_ops.secrets.status import Row, State, exit_code
from clawdlets_ops.secrets.vault import operator_identity
from clawdlets_ops.sensitive import Secret


@click.group()
def secrets() -> None:
    """Secrets: sops files in the repository, their readers, and the install payload."""


@secrets.command("init")
@click.option("--host", required=True)
@click.option("--from-json", "source", default=None, help="A 0600 file with the values, or - for standard input.")
@with_project
def secrets_init(project: Project, host: str, source: str | None) -> None:
    """Make a host's identity and encrypt its secrets; again, it changes nothing."""
    if source == "-":
        values = store.parse_values(sys.stdin.read(), host, where="standard input")
    elif source:
        values = store.read_values(Path(source), host)
    elif project.secrets_file:
        values = store.read_values(project.secrets_file, host)
    else:
        values = {}
    runner = LocalRunner(project.environ)
    made = store.init_host(project, host, values, runner=runner)
    record = payload.recorded(project.layout, host)
    lives = record is not None and record.verified  # its private keys are not laid out again until it is installed anew
    laid = (payload.prepare if lives else payload.materialise)(project, host, runner=runner)
    for verb, names in (("created", made.created), ("updated", made.updated), ("unchanged", made.unchanged)):
        for name in names:
            click.echo(f"{verb} {name}")
    if lives:
        click.echo(
            f"{'changed' if laid.changed else 'unchanged'} payload {laid.digest[:12]} (built when it is installed)"
        )
        if made.changed:
            click.echo(f"the host does not have it yet: clawdlets secrets sync {host}", err=True)
    else:
        click.echo(f"{'built' if laid.changed else 'unchanged'} {project.layout.extra_files(host)}")


@secrets.command("status")
@hosts_option
@click.option("--json", "as_json", is_flag=True)
@with_project
def secrets_status(project: Project, hosts: tuple[str, ...], as_json: bool) -> None:
    """Which secrets each host needs, who reads them, and what is wrong; writes nothing.

    Exit status 0: all present, for exactly their readers. 1: something is to be done. 2: all that is wrong is that
    something cannot be read here.
    """
    table = observe.status(project, hosts, runner=LocalRunner(project.environ))
    if as_json:
        click.echo(json.dumps([row.as_json() for row in table], indent=2))
    else:
        _print_table(table)
    sys.exit(exit_code(table))


@secrets.command("reconcile")
@hosts_option
@click.option("--dry-run", is_flag=True, help="Show what would change.")
@with_project
def secrets_reconcile(project: Project, hosts: tuple[str, ...], dry_run: bool) -> None:
    """Encrypt every file for exactly the declared readers, and remove what no host needs."""
    made = changes.reconcile(project, hosts, runner=LocalRunner(project.environ), dry_run=dry_run)
    _print_outcome(made, dry_run=dry_run)


@secrets.command("set")
@click.argument("name")
@click.option("--host", required=True)
@with_project
def secrets_set(project: Project, name: str, host: str) -> None:
    """Give a secret its value, from standard input, or asked for without showing it.

    A newline at the end of a value of one line is not part of it.
    """
    if sys.stdin.isatty():
        value = Secret(click.prompt(name, hide_input=True, confirmation_prompt=True), name)
    else:
        value = read_value(sys.stdin.buffer.read(MAX_VALUE_BYTES + 2), name)
    _print_outcome(changes.set_secret(project, host, name, value, runner=LocalRunner(project.environ)))


@secrets.command("edit")
@click.argument("name")
@click.option("--host", required=True)
@click.pass_context
def secrets_edit(context: click.Context, name: str, host: str) -> None:
    """Change a secret in your editor ($VISUAL, $EDITOR). Left as it is, no byte is written.

    While you edit, the value is in clear in a private folder in memory (tmpfs), and nowhere when you are done.
    """
    environ = context.meta[ENVIRON]
    project = load_project(context.obj, environ)

    def again(fault: str) -> bool:
        if not sys.stdin.isatty():
            return False
        click.echo(fault, err=True)
        return click.confirm("Edit it again? Otherwise what you typed is discarded.", err=True)

    made = edit.edit_secret(
        project,
        host,
        name,
        runner=LocalRunner(project.environ),
        environ=environ,
        again=again,
        say=lambda line: click.echo(line, err=True),
    )
    if not made.changed:
        click.echo(f"no change {', '.join(made.unchanged)}")
    else:
        _print_outcome(made)


@secrets.command("rotate")
@click.option("--data-keys", is_flag=True, help="Encrypt every file anew; the values stay.")
@hosts_option
@click.option("--host-key", default=None, metavar="HOST", help="A new age key for a running host.")
@click.option("--operator", default=None, metavar="NAME")
@click.option("--revoke", is_flag=True, help="With --operator: they read nothing any more.")
@with_project
def secrets_rotate(
    project: Project, data_keys: bool, hosts: tuple[str, ...], host_key: str | None, operator: str | None, revoke: bool
) -> None:
    """Change keys. Cut off anywhere, it is finished by running it again."""
    runner = LocalRunner(project.environ)
    if host_key and not (data_keys or hosts or operator or revoke):
        _rotate_host_key(project, host_key)
    elif data_keys and not operator and not revoke:
        _print_outcome(changes.rotate_data_keys(project, hosts, runner=runner))
    elif operator and revoke and not data_keys and not hosts:
        made = changes.revoke(project, operator, runner=runner)
        _print_outcome(made)
        if made.changed:
            click.echo(
                f"What {operator} could read they may have kept, from this repository's history too: replace every "
                "value at its source (then secrets set), and the keys of the hosts themselves.",
                err=True,
            )
    else:
        raise click.UsageError(
            "give --data-keys (with --host, if you like), --host-key HOST, or --operator NAME --revoke"
        )


@secrets.command("sync")
@click.argument("hosts", metavar="[HOST]...", nargs=-1)
@with_project
def secrets_sync(project: Project, hosts: tuple[str, ...]) -> None:
    """Bring running hosts to the secrets that the repository has for them; all of the fleet when none is named.

    A host that cannot be brought there does not keep the others from it; the exit status is then 1.
    """
    for host in hosts:
        project.fleet.host(host)
    tools = workflow.tools_for(project)
    failed = False
    for host in hosts or tuple(project.fleet.hosts):
        try:
            login = sync.connect(project, host, runner=tools.runner, cloud=tools.cloud)
            with tools.journal.stage(host, "secrets") as say, login as link:
                made = sync.sync(project, link, runner=tools.runner, say=say)
        except ClawdletsError as error:
            failed = True
            click.echo(f"{host}: {error}", err=True)
            continue
        for step in made.plan.steps:
            click.echo(f"{host}: {step}")
        for unit in made.restarted:
            click.echo(f"{host}: restarted {unit}")
        click.echo(f"{host}: {'changed' if not made.plan.empty else 'unchanged'} {made}")
    if failed:
        sys.exit(1)


def _rotate_host_key(project: Project, host: str) -> None:
    project.fleet.host(host)
    tools = workflow.tools_for(project)
    login = sync.connect(project, host, runner=tools.runner, cloud=tools.cloud)
    with tools.journal.stage(host, "secrets") as say, login as link:
        made = hostkeys.rotate(project, link, runner=tools.runner, say=say)
    for verb, names in (("created", made.created), ("updated", made.updated), ("removed", made.removed)):
        for name in names:
            click.echo(f"{verb} {name}")
    for unit in made.restarted:
        click.echo(f"restarted {unit}")
    click.echo(f"{host} has the key {made.recipient}; commit secrets/")
    if made.resumed:
        click.echo("That finished a rotation that had been begun before; run it again for another new key.", err=True)


@secrets.group("operator")
def secrets_operator() -> None:
    """Who reads every secret besides the hosts."""


@secrets_operator.command("add")
@with_project
def secrets_operator_add(project: Project) -> None:
    """Make your key pair here, and the public half for the others; the private half never leaves this machine."""
    made = changes.add_operator(project, runner=LocalRunner(project.environ))
    _print_outcome(made)
    recipient = operator_identity(project).recipient
    if not project.fleet.operators:
        shown = "commit the public half; then an operator who reads the secrets runs: clawdlets secrets reconcile"
    elif project.operator in project.fleet.operators:
        shown = "the fleet file names you; an operator who reads the secrets runs: clawdlets secrets reconcile"
    else:
        shown = (
            f'add to operators in {project.layout.fleet_file}: "{project.operator}": {{"ageRecipient": "{recipient}"}}\n'
            "then an operator who reads the secrets runs: clawdlets secrets reconcile"
        )
    click.echo(shown)


def _print_outcome(made: store.Outcome, *, dry_run: bool = False) -> None:
    verbs = (("created", made.created), ("updated", made.updated), ("removed", made.removed), ("missing", made.missing))
    for verb, names in verbs:
        for name in names:
            click.echo(f"{'would be ' if dry_run and verb != 'missing' else ''}{verb} {name}")
    if not made.changed:
        click.echo(f"unchanged {len(made.unchanged)} files")


def _print_table(table: list[Row]) -> None:
    cells = [("host", "secret", "state", "readers", "why")]
    cells += [(row.host, row.name, ", ".join(row.states), ", ".join(row.readers) or "-", row.why) for row in table]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    for line, row in zip(cells, (None, *table), strict=True):
        click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=False)) + f"  {line[4]}")
        if row and row.state is not State.PRESENT:
            click.echo(f"    {row.observed + ' ' if row.observed else ''}→ {row.fix}")
