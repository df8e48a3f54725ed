"""``clawdlets init``: a project for a user, from nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from clawdlets_ops import scaffold
from clawdlets_ops.commands import ENVIRON
from clawdlets_ops.commands.fleet import host_options, wish_of
from clawdlets_ops.commands.guard import program_words
from clawdlets_ops.declare import Wish
from clawdlets_ops.errors import SettingsError
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import read_public_key
from clawdlets_ops.scaffold.place import create, place_of
from clawdlets_ops.scaffold.source import installed_from, source

USUAL_KEYS = (".ssh/id_ed25519.pub", ".ssh/id_ed25519_sk.pub", ".ssh/id_ecdsa.pub")


@click.command("init")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--host", default="alpha", show_default=True, metavar="NAME", help="What the first host is called.")
@host_options
@click.option(
    "--lab", "rehearsal", is_flag=True, help="Ready for the lab: its networks and its key, where none are said."
)
@click.option(
    "--source",
    "reference",
    metavar="REF",
    default=None,
    help="Where clawdlets-ops is: github:OWNER/REPO[/REF] or git+https://…; default: where this installation is from.",
)
@click.option(
    "--cache", type=click.Path(path_type=Path, exists=True, file_okay=False), help="An existing .cache to link to."
)
@click.option("--git/--no-git", default=None, help="A git repository of its own, with the guard's hooks; default: yes.")
@click.option(
    "--commit/--no-commit", default=True, show_default=True, help="The first commit, where git knows who you are."
)
@click.option("--dry", is_flag=True, help="Only show which files would be written.")
@click.pass_context
def init(
    context: click.Context,
    /,
    directory: Path,
    host: str,
    rehearsal: bool,
    reference: str | None,
    cache: Path | None,
    git: bool | None,
    commit: bool,
    dry: bool,
    **said: Any,
) -> None:
    """Make a project in DIR, which must be new or empty: fleet file, flake, inventory, deploys, CI, hooks, README.

    It is made whole or not at all. The README says which five commands come next.
    """
    environ: Mapping[str, str] = context.meta[ENVIRON]
    home = Path(environ.get("HOME", "/"))
    place = place_of(directory)
    wish = _with_key(wish_of(said), home, needed=not rehearsal)
    if not (wish.admin_cidrs or rehearsal):
        raise SettingsError(
            "nobody could reach the host to install it",
            where="--admin-cidr",
            fix="name the networks you come from, such as 203.0.113.7/32 and 2001:db8:7::/48; or --lab to rehearse here first",
        )
    planned = scaffold.plan(place.name, host, wish, origin=source(reference or _origin()), rehearsal=rehearsal)
    if dry:
        click.echo(str(planned))
        return
    replaced = place == Path.cwd()  # asked now: afterwards there is no such folder to be in
    outcome = create(
        planned, place, runner=LocalRunner(environ), git=git, commit=commit, program=program_words(), cache=cache
    )
    click.echo(f"{outcome.root}: {len(planned.files)} files{', committed' if outcome.committed else ''}")
    for sentence in outcome.left:
        click.echo(f"left to do: {sentence}", err=True)
    if replaced:
        click.echo(f"the folder that you are in was replaced: cd {outcome.root}", err=True)
    click.echo(f"next: cd {directory}, and the five commands in README.md", err=True)


def _with_key(wish: Wish, home: Path, *, needed: bool) -> Wish:
    """The public key file as the fleet file names it (below the home folder as ~/…), and its line; SettingsError."""
    named = wish.ssh_pubkey_file
    if not named:
        usual = [name for name in USUAL_KEYS if (home / name).is_file()]
        if usual and needed:
            named = f"~/{usual[0]}"
        elif needed:
            raise SettingsError(
                f"there is none of {', '.join(f'~/{name}' for name in USUAL_KEYS)}",
                where="--ssh-pubkey-file",
                fix="name your public key, or make one: ssh-keygen -t ed25519",
            )
        else:
            return wish
    path = home / named[2:] if named.startswith("~/") else Path(named).absolute()
    name = f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
    return replace(wish, ssh_pubkey_file=name, authorized_keys=(read_public_key(path),))


def _origin() -> str:
    try:
        return installed_from(metadata.distribution("clawdlets-ops").read_text("direct_url.json"))
    except metadata.PackageNotFoundError:
        return installed_from(None)
