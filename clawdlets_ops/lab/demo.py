"""``make demo``: the product's main job on the lab, by the three commands that a person would type.

It runs in this checkout's own project (``fleet/clawdlets.json``), shows what each stage took, where port 22 could be reached
from before and after, and where the report is; then takes the lab down again (``KEEP=1`` leaves it up).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.journal import journals, read_journal
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Command, LocalRunner

STEP_TIMEOUT_S = 1800.0
STAGES = ("payload", "provision", "install", "lockdown", "verify")


def main() -> int:
    """Run the demo in the current directory; the exit status of the first step that failed."""
    layout = Layout(Path.cwd())
    console = Console(soft_wrap=True)
    programs = Path(sys.executable).parent
    runner = LocalRunner({**os.environ, "PATH": f"{programs}:{os.environ.get('PATH', '')}"})
    keep = os.environ.get("KEEP") == "1"
    steps = [
        ["clawdlets", "lab", "up"],
        ["pyinfra", "-y", "inventory/lab.py", "deploys/bootstrap.py"],
        ["clawdlets", "verify", "--host", "alpha"],
    ]
    status = 0
    try:
        for argv in steps:
            console.rule(f"$ {' '.join(argv)}", align="left")
            command = Command(argv, "demo", cwd=layout.root, timeout_s=STEP_TIMEOUT_S)
            status = runner.run(
                command, on_line=lambda line: console.print(line, markup=False, highlight=False)
            ).exit_code
            if status != 0:
                break
    except ClawdletsError as error:
        console.print(str(error), markup=False)
        status = 1
    else:
        if status == 0:
            _show_stages(layout, console)
            _show_exposure(layout, console, "alpha")
    finally:
        if keep:
            console.print("the lab stays up; clawdlets lab down ends it", markup=False)
        else:
            runner.run(
                Command(["clawdlets", "lab", "down"], "take the lab down", cwd=layout.root, timeout_s=STEP_TIMEOUT_S)
            )
    reports = sorted(layout.reports("alpha").glob("**/report.html"), key=lambda path: path.stat().st_mtime)
    if status == 0 and reports:
        console.print(f"demo: success; the host was verified and locked down; its report: {reports[-1]}", markup=False)
    else:
        console.print(f"demo: failed (status {status})", markup=False)
    return status


def _show_stages(layout: Layout, console: Console) -> None:
    """What each stage of the last bootstrap took, from its journal."""
    table = Table("stage", "result", "seconds", title="stages", title_justify="left")
    done = [
        event for path in journals(layout.runs) for event in read_journal(path) if event["event"] in ("done", "failed")
    ]
    for stage in STAGES:
        last = [event for event in done if event["stage"] == stage][-1:]
        for event in last:
            table.add_row(stage, event["event"], f"{event['durationS']:.1f}")
    console.print(table)


def _show_exposure(layout: Layout, console: Console, host: str) -> None:
    """Port 22 by vantage and address family, as lockdown measured it."""
    table = Table(
        "vantage", "side", "before lockdown", "after", title="port 22, by real connections", title_justify="left"
    )
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for when in ("before", "after"):
        path = layout.reports(host) / f"exposure-{when}.json"
        if path.exists():
            for cell in json.loads(path.read_text())["cells"]:
                cells.setdefault((cell["vantage"], f"{cell['side']}, IPv{cell['family']}"), {})[when] = cell["reach"]
    for (vantage, address), row in cells.items():
        table.add_row(vantage, address, row.get("before", "-"), row.get("after", "-"))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
