"""A stand-in for the program ``tailscale`` on the operator's machine, for the lab alone: it knows ``status --json``.

``<lab>/bin/tailscale`` runs it with the lab's folder baked in. The answer is the running lab's; see ``lab/tailnet.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from clawdlets_ops.errors import ClawdletsError, LabError
from clawdlets_ops.lab.client import LabClient
from clawdlets_ops.lab.registry import read_record


def main(argv: Sequence[str]) -> int:
    """0 and the status on standard output; 1 with the reason on standard error; 2 for what it does not know."""
    parser = argparse.ArgumentParser(prog="tailscale", description="the lab's stand-in for tailscale")
    parser.add_argument("--lab-dir", type=Path, required=True)
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="who is on the tailnet")
    status.add_argument("--json", action="store_true", required=True)
    arguments = parser.parse_args(argv)
    try:
        record = read_record(arguments.lab_dir)
        if record is None:
            raise LabError("there is no lab", where=str(arguments.lab_dir), fix="clawdlets lab up")
        answer = LabClient(record).get("/lab/tailnet")
    except ClawdletsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
