"""``clawdlets``: for operators. Parses arguments, wires the project, renders. Results on stdout, talk on stderr.

Exit status: 0 done; 1 refused or failed; 2 something is unknown (verify), or the command line is wrong.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import MappingProxyType

import click

from clawdlets_ops.commands import ENVIRON
from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.files import no_room

# Where each command is; most need half a second for what the others do not.
PLACES = MappingProxyType(
    {
        "bootstrap": "commands.bootstrap:bootstrap",
        "cattle": "commands.cattle:cattle",
        "close": "commands.lockdown:close",
        "destroy": "commands.destroy:destroy",
        "doctor": "commands.doctor:doctor",
        "egress": "commands.egress:egress",
        "fleet": "commands.fleet:fleet",
        "guard": "commands.guard:guard",
        "host": "commands.fleet:host",
        "init": "commands.init:init",
        "lab": "lab.commands:lab",
        "lockdown": "commands.lockdown:lockdown",
        "open": "commands.lockdown:open_host",
        "plan": "commands.plan:plan",
        "probe": "commands.probe:probe",
        "runs": "commands.runs:runs",
        "schema": "commands.fleet:schema",  # as it was called before there was a group
        "secrets": "commands.secrets:secrets",
        "verify": "commands.verify:verify",
        "watch": "commands.verify:watch",
    }
)


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


class Commands(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, for the help."""
        del ctx
        return sorted(PLACES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        del ctx
        module, _, attribute = PLACES.get(cmd_name, "").partition(":")
        return getattr(importlib.import_module(f"clawdlets_ops.{module}"), attribute) if module else None


@click.group(cls=Commands)
@click.option(
    "--project", "root", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="Default: here."
)
@click.pass_context
def clawdlets(context: click.Context, root: Path) -> None:
    """Deploy a declared fleet of bot hosts, and prove that they are closed."""
    context.obj = root
    context.meta[ENVIRON] = os.environ
