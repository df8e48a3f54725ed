"""``clawdlets lab setup``: what ``make setup`` does for the lab in a checkout, for a project of one's own.

The work is tools/prepare's, which a wheel carries. What it makes goes into one cache of the user's, shared by their projects:
each has a link to it at ``.cache``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from clawdlets_ops.errors import LabError
from clawdlets_ops.files import ensure_dir
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Command, LocalRunner
from clawdlets_ops.scaffold.shipped import shipped

STEPS: Final = ("apt", "tofu", "base")
STEP_TIMEOUT_S: Final = 3600.0
CACHE_NAME: Final = "clawdlets-ops"


def prepare(layout: Layout, environ: Mapping[str, str], *, tailnet: bool, say: Callable[[str], None]) -> None:
    """Each step once; what is there already is found. LabError with the end of its output when one failed."""
    layout = Layout(layout.root.resolve())
    if not layout.fleet_file.is_file():
        raise LabError(
            "is no project", where=str(layout.root), fix="clawdlets init DIR --lab, or name one with --project DIR"
        )
    script = shipped("tools/prepare")
    cache = _cache(layout, script, environ)
    runner = LocalRunner(environ)
    # The build of OpenTofu is told by these where modules come from, as it would be by hand.
    passed = {
        name: value for name, value in environ.items() if name.startswith("GO") or name.lower().endswith("_proxy")
    }
    for step in (*STEPS, *(["tailnet"] if tailnet else [])):
        command = Command(
            ["bash", script, step],
            f"prepare {step}",
            env={**passed, "CLAWDLETS_CACHE": str(cache), "CLAWDLETS_PYTHON": sys.executable},
            timeout_s=STEP_TIMEOUT_S,
        )
        result = runner.run(command, on_line=say)
        if not result.ok:
            raise LabError(
                f"could not be prepared:\n{result.tail()}", where=step, fix=f"its whole log is in {cache / 'log'}"
            )


def _cache(layout: Layout, script: Path, environ: Mapping[str, str]) -> Path:
    """Where things go: the project's ``.cache`` as it is; made here, in a checkout its own, else a link to the user's."""
    own = layout.cache
    if own.is_symlink() and not own.exists():
        raise LabError("leads nowhere", where=str(own), fix=f"rm {own}, then run this again")
    if own.exists():
        return own.resolve()
    if script.parents[1] == layout.root:
        return ensure_dir(own, 0o755)
    base = environ.get("XDG_CACHE_HOME") or f"{environ.get('HOME', '/root')}/.cache"
    shared = ensure_dir(Path(base) / CACHE_NAME, 0o755)
    own.symlink_to(shared)
    return shared
