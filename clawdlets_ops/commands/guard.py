"""``clawdlets guard``: scan for what must not be committed, and have git do so by itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from clawdlets_ops.commands import ENVIRON
from clawdlets_ops.errors import ClawdletsError, SettingsError
from clawdlets_ops.guard import hooks, report
from clawdlets_ops.guard import run as running
from clawdlets_ops.guard.gitobjects import GIT_VARIABLES, Repository
from clawdlets_ops.process import LocalRunner

_FORMS = {"text": report.text, "json": report.as_json, "sarif": report.sarif}
UNKNOWN = 2


@click.group()
def guard() -> None:
    """Keep secrets out of git."""


@guard.command("scan")
@click.option("--staged", is_flag=True, help="What the next commit adds or changes.")
@click.option("--tracked", is_flag=True, help="Everything in the index (the default).")
@click.option("--history", is_flag=True, help="Every object that git stores, and its configuration.")
@click.option("--pushed", "remote", metavar="REMOTE", default=None, help="What pre-push says on standard input.")
@click.option(
    "--known-secrets",
    is_flag=True,
    help="Decrypt what is under secrets/ in memory, and look for those values too: one sops process a file.",
)
@click.option("--format", "form", type=click.Choice(list(_FORMS)), default="text")
@click.option("--engine", type=click.Choice(["builtin", "kingfisher"]), default="builtin", help="kingfisher: as well.")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.pass_context
def scan(
    context: click.Context,
    staged: bool,
    tracked: bool,
    history: bool,
    remote: str | None,
    known_secrets: bool,
    form: str,
    engine: str,
    paths: tuple[Path, ...],
) -> None:
    """Look for secrets. Exit status: 0 clean, 1 something was found, 2 something is unknown."""
    if sum((staged, tracked, history, remote is not None, bool(paths))) > 1:
        raise click.UsageError("choose one of --staged, --tracked, --history, --pushed and paths")
    environ: Mapping[str, str] = context.meta[ENVIRON]
    secrets_file = environ.get("CLAWDLETS_SECRETS_FILE")
    request = running.Request(
        context.obj,
        _scope(staged=staged, history=history, push=remote is not None, paths=bool(paths)),
        paths=paths,
        updates=tuple(sys.stdin.read().splitlines()) if remote is not None else (),
        remote=remote or "",
        secrets_file=context.obj / secrets_file if secrets_file else None,
        second_opinion=engine == "kingfisher",
        known_secrets=known_secrets,
    )
    try:
        outcome = running.run(request, runner=LocalRunner(environ), environ=_of_git(environ))
    except ClawdletsError as error:
        click.echo(f"clawdlets: {error}", err=True)
        sys.exit(UNKNOWN)  # nothing is known, which is not the same as clean
    click.echo(_FORMS[form](outcome))
    sys.exit(outcome.exit_code)


@guard.command("install")
@click.option("--remove", is_flag=True, help="Take the hooks away, and put back what was there.")
@click.pass_context
def install(context: click.Context, remove: bool) -> None:
    """Install the hooks: pre-commit scans what is staged, pre-push what is sent. Existing hooks run first."""
    environ: Mapping[str, str] = context.meta[ENVIRON]
    root: Path = context.obj.resolve()
    repository = Repository(LocalRunner(environ), root, _of_git(environ))
    if remove:
        changes = hooks.remove(repository)
    else:
        top = repository.top.resolve()
        if not root.is_relative_to(top):
            raise SettingsError("is not below the work tree", where=str(root), fix="name the project with --project")
        changes = hooks.install(repository, program_words(), root.relative_to(top).as_posix())
    for change in changes:
        click.echo(f"{change.done} {change.hook}")


def _scope(*, staged: bool, history: bool, push: bool, paths: bool) -> running.Scope:
    if paths:
        return "paths"
    if push:
        return "push"
    return "staged" if staged else "history" if history else "tracked"


def _of_git(environ: Mapping[str, str]) -> dict[str, str]:
    """What git told us, when it runs us as a hook; relative paths are from where we stand."""
    return {
        name: environ[name] if name == "GIT_ALTERNATE_OBJECT_DIRECTORIES" else os.path.abspath(environ[name])
        for name in GIT_VARIABLES
        if environ.get(name)
    }


def program_words() -> tuple[str, ...]:
    """The words that start this very program from anywhere."""
    beside = Path(sys.executable).with_name("clawdlets")
    return (str(beside),) if beside.is_file() else ("clawdlets",)
