"""``clawdlets fleet``, ``clawdlets host`` and ``clawdlets schema``: the declaration itself, with no cloud and no host."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from clawdlets_ops import declare, fleetfile, peer
from clawdlets_ops.commands import ENVIRON
from clawdlets_ops.declare import Wish
from clawdlets_ops.errors import ClawdletsError, FleetError
from clawdlets_ops.files import locked, write_atomic
from clawdlets_ops.fleet import json_schema, load_fleet, parse_fleet
from clawdlets_ops.layout import Layout
from clawdlets_ops.project import read_public_key

PUBLIC_FILE = 0o644
LOCK_WAIT_S = 10.0

_file_argument = click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))


def host_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What may be said of a host on a command line; each becomes a keyword of the same name as in ``Wish``."""
    for option in (
        click.option("--secret", "secrets", multiple=True, metavar="NAME=OWNER", help="A secret and who reads it."),
        click.option("--tailnet", type=click.Choice(["tailscale", "none"]), default=None),
        click.option("--exposure", type=click.Choice(["tailnet", "bootstrap", "public"]), default=None),
        click.option("--disk-device", metavar="DEVICE", default=""),
        click.option("--system", type=click.Choice(["x86_64-linux", "aarch64-linux"]), default=None),
        click.option("--location", metavar="NAME", default="", help="Such as nbg1, fsn1, hel1."),
        click.option("--server-type", metavar="NAME", default="", help="Such as cx23; an Arm type (cax…) sets the system."),
        click.option("--ssh-pubkey-file", metavar="FILE", default="", help="The public key that logs in as admin."),
        click.option("--admin-cidr", "admin_cidrs", multiple=True, metavar="CIDR", help="Who reaches SSH before lockdown."),
    ):  # fmt: skip
        function = option(function)
    return function


@click.group()
def fleet() -> None:
    """The declared fleet: check it, show it, bring it up to date."""


@fleet.command("validate")
@_file_argument
@click.pass_context
def validate(context: click.Context, file: Path | None) -> None:
    """Whether FILE (default: this project's) is an acceptable fleet. Every fault is named with its key path."""
    path = _file(context, file)
    declared = load_fleet(path)
    click.echo(f"{path}: acceptable; {len(declared.hosts)} hosts: {', '.join(declared.hosts)}")
    schema_file = path.with_name("clawdlets.schema.json")
    if schema_file.exists() and schema_file.read_text(encoding="utf-8") != _schema_text():
        click.echo(f"{schema_file} is of another version of clawdlets-ops: clawdlets fleet schema --write", err=True)


@fleet.command("show")
@_file_argument
@click.option("--host", default=None, help="Only this host.")
@click.pass_context
def show(context: click.Context, file: Path | None, host: str | None) -> None:
    """The fleet as it is understood, with every default in its place (JSON)."""
    declared = load_fleet(_file(context, file))
    click.echo((declared.host(host) if host else declared).model_dump_json(by_alias=True, indent=2))


@fleet.command("migrate")
@_file_argument
@click.option("--dry", is_flag=True, help="Print the result instead of writing it.")
@click.pass_context
def migrate(context: click.Context, file: Path | None, dry: bool) -> None:
    """Bring the file to the newest schemaVersion. An unknown one is refused, and nothing is changed."""
    path = _file(context, file)
    with nullcontext() if file or dry else _alone(context):
        document = fleetfile.parse(fleetfile.read_text(path), where=str(path))
        if not isinstance(document, dict):
            raise FleetError("is no JSON object", where=str(path))
        migrated = fleetfile.migrate(document, where=str(path))
        way = " → ".join(map(str, migrated.versions))
        if len(migrated.versions) == 1:
            load_fleet(path)
            click.echo(f"{path}: schemaVersion {way} is the newest; nothing to do")
            return
        text = fleetfile.to_text(migrated.document)
        parse_fleet(text, where=str(path))
        if dry:
            click.echo(text, nl=False)
        else:
            _write(path, text)
    click.echo(f"{path}: schemaVersion {way}", err=dry)


@fleet.command("import")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--host", "hosts", multiple=True, metavar="NAME", help="Only these hosts; default: all.")
@click.option("--admin-cidr", "admin_cidrs", multiple=True, metavar="CIDR", help="In the place of what FILE says.")
@click.option("--ssh-pubkey-file", default="", metavar="FILE", help="In the place of what FILE says.")
@click.option(
    "--write", is_flag=True, help="Write this project's fleet file, where there is none, instead of printing."
)
@click.pass_context
def import_fleet(
    context: click.Context,
    file: Path,
    hosts: tuple[str, ...],
    admin_cidrs: tuple[str, ...],
    ssh_pubkey_file: str,
    write: bool,
) -> None:
    """A fleet from a configuration of the other clawdlets (TypeScript; v7 to v12, and infra v2).

    What was changed or left out is listed on standard error. What is refused is listed too, and then nothing is written:
    it never opens more than FILE says, and never takes a word for another.
    """
    read = peer.read(
        fleetfile.read_text(file),
        where=str(file),
        said=peer.Decisions(admin_cidrs, ssh_pubkey_file),
        only=hosts,
    )
    for note in read.notes:
        click.echo(str(note), err=True)
    if read.refused:
        raise FleetError(
            f"{len(read.refused)} of {len(read.notes)} notes are refusals, and nothing was imported",
            where=str(file),
            fix="decide them with the options of this command, or in the file, and run it again",
        )
    text = fleetfile.to_text(read.document)
    if not write:
        click.echo(text, nl=False)
        return
    layout = Layout(context.obj)
    target = layout.fleet_file
    with _alone(context):
        if target.exists():
            raise FleetError(
                "is there already", where=str(target), fix="move it away, or leave out --write and merge by hand"
            )
        if not target.parent.is_dir():
            raise FleetError(
                "there is no such folder", where=str(target.parent), fix="clawdlets init DIR makes a project"
            )
        write_atomic(target, text, mode=PUBLIC_FILE)
    click.echo(f"{target}: {len(read.document['hosts'])} hosts; next: clawdlets secrets init for each", err=True)


@fleet.command("schema")
@click.option("--write", is_flag=True, help="Write fleet/clawdlets.schema.json instead of printing.")
@click.pass_context
def schema(context: click.Context, write: bool) -> None:
    """The JSON Schema of fleet/clawdlets.json, for editors."""
    if write:
        write_atomic(context.obj / "fleet" / "clawdlets.schema.json", _schema_text(), mode=PUBLIC_FILE)
    else:
        click.echo(_schema_text(), nl=False)


@click.group()
def host() -> None:
    """The hosts of the fleet file."""


@host.command("list")
@click.option("--json", "as_json", is_flag=True)
@click.pass_context
def list_hosts(context: click.Context, as_json: bool) -> None:
    """The declared hosts; what they are in the cloud is told by the doctor and by verify."""
    rows = declare.overview(load_fleet(_file(context, None)))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@host.command("add")
@click.argument("name")
@click.option("--like", metavar="HOST", default="", help="Begin with what is declared of HOST.")
@host_options
@click.pass_context
def add(context: click.Context, /, name: str, like: str, **said: Any) -> None:
    """Declare a host NAME. Order, comments and line breaks of the file stay; a fleet that is not acceptable is not written."""
    path = _file(context, None)
    with _alone(context):
        text = fleetfile.read_text(path)
        changed = declare.add_host(text, name, _with_line(context, wish_of(said)), like=like, where=str(path))
        _write(path, changed)
    click.echo(f"declared {name} in {path}")
    click.echo(f"next: clawdlets secrets init --host {name}, and commit", err=True)


def wish_of(said: dict[str, Any]) -> Wish:
    """What ``host_options`` gave."""
    return Wish(**{key: value for key, value in said.items() if value})


def _with_line(context: click.Context, wish: Wish) -> Wish:
    """The line of the key file besides its name, where there is such a file already; SettingsError when it is no key."""
    named = wish.ssh_pubkey_file
    home = Path(context.meta[ENVIRON].get("HOME", "/"))
    path = home / named[2:] if named.startswith("~/") else context.obj / named
    return replace(wish, authorized_keys=(read_public_key(path),)) if named and path.is_file() else wish


def _file(context: click.Context, file: Path | None) -> Path:
    return file or Layout(context.obj).fleet_file


@contextmanager
def _alone(context: click.Context) -> Iterator[None]:
    """Nobody else edits the project's file meanwhile; BusyError, FleetError."""
    layout = Layout(context.obj.resolve())
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(layout.lock("fleet-file"), what=str(layout.fleet_file), wait_s=LOCK_WAIT_S))
        except OSError as error:
            if isinstance(error, ClawdletsError):
                raise
            raise FleetError(f"cannot be locked: {error.strerror}", where=str(layout.runtime)) from error
        yield


def _write(path: Path, text: str) -> None:
    """Whole or not at all, with the mode that it has; behind a link, where the link leads."""
    target = path.resolve()
    try:
        write_atomic(target, text, mode=stat.S_IMODE(target.stat().st_mode))
    except OSError as error:
        raise FleetError(f"cannot be written: {error.strerror}; it is as it was", where=str(target)) from error


def _schema_text() -> str:
    return json.dumps(json_schema(), indent=2) + "\n"
