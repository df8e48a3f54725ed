"""``clawdlets doctor``: is this project fit to be committed, bootstrapped from, deployed from? Changes nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from clawdlets_ops.commands import ENVIRON
from clawdlets_ops.doctor import run
from clawdlets_ops.doctor.observe import observe
from clawdlets_ops.doctor.snapshot import Scope


@click.command("doctor")
@click.option(
    "--scope",
    type=click.Choice([str(scope) for scope in Scope]),
    default=str(Scope.DEPLOY),
    show_default=True,
    help="repo needs nothing but the clone; bootstrap and deploy include what comes before.",
)
@click.option("--host", "hosts", multiple=True, help="Default: every host of the fleet.")
@click.option("--strict", is_flag=True, help="Warnings and what is unknown count as failed.")
@click.option("--json", "as_json", is_flag=True)
@click.option(
    "--closure",
    type=click.Path(path_type=Path, exists=True),
    default=None,
    help="Store paths to search for known secrets: a listing, one path a line, or a folder.",
)
@click.pass_context
def doctor(
    context: click.Context, scope: str, hosts: tuple[str, ...], strict: bool, as_json: bool, closure: Path | None
) -> None:
    """Check the repository, this machine, and what was deployed from it.

    Exit status 0: nothing failed. 1: something failed. 2: nothing failed, and something is unknown. A warning (a failed
    check of medium or low severity) counts only with --strict, which also makes unknown a failure.
    """
    snapshot = observe(context.obj, Scope(scope), context.meta[ENVIRON], hosts, closure=closure)
    diagnosis = run.judge(snapshot, Scope(scope))
    click.echo(run.as_json(diagnosis, strict=strict) if as_json else run.text(diagnosis))
    sys.exit(diagnosis.exit_code(strict=strict))
