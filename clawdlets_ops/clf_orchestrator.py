"""``clf-orchestrator``: reads its configuration, opens its store and its sockets, and serves until it is told to stop.

Exit status: 0 told to stop; 1 it could not begin or go on, with the reason in the log; 2 the command line is wrong.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import click

from clawdlets_ops.cattle.wiring import make_work
from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.layout import ORCHESTRATOR_CONFIG
from clawdlets_ops.orchestrator import daemon, evidence

IN_MEMORY = "/run"


@click.command()
@click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(ORCHESTRATOR_CONFIG.path),
    show_default=True,
)
@click.option("--check", is_flag=True, help="Only read the configuration and open the store.")
@click.option("--facts", is_flag=True, help="As root: what a verification wants to know, as one JSON document.")
def clf_orchestrator(path: Path, check: bool, facts: bool) -> None:
    """Serve bots on the unix socket and machines on the tailnet."""
    try:
        config = daemon.read_config(path)
        if check:
            daemon.open_store(config, daemon.secret_files(config, os.environ)).close()
            click.echo("ok")
            return
        if facts:
            # Of root's in memory: a busy disk is no reason for a verification to wait.
            memory = IN_MEMORY if os.geteuid() == 0 and Path(IN_MEMORY).is_dir() else None
            with tempfile.TemporaryDirectory(prefix="clf-facts-", dir=memory) as folder:
                click.echo(json.dumps(evidence.gather(config, Path(folder))))
            return
    except ClawdletsError as error:
        click.echo(f"clf-orchestrator: {error}", err=True)
        sys.exit(1)
    sys.exit(daemon.run(config, os.environ, make_work))


def main() -> None:
    """Console script."""
    os.umask(0o077)  # whatever is made without a mode of its own is private
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    clf_orchestrator()
