"""The operator's repository keeps the runtime dir out of git."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .reading import NotApplicable, Unknown, settle

Observe = Callable[[str], None]


@pytest.mark.check(
    id="GIT-01",
    severity="critical",
    claim="Keep .clawdlets/ gitignored (required).",
    fix="add /.clawdlets/ to the project's .gitignore, and commit it",
    vantage="repository",
)
def test_runtime_dir_is_ignored(expected: dict[str, Any], observe: Observe) -> None:
    """Ignored by a rule that every clone has: a tracked .gitignore, not somebody's own configuration."""
    git = expected.get("git")
    if git is None:
        raise Unknown("nobody asked git")
    if git.get("problem"):
        raise Unknown(git["problem"])
    if not git["checkout"]:
        raise NotApplicable("the project is not a git checkout")
    faults = []
    for entry in git["paths"]:
        if not entry["source"] or entry["pattern"].startswith("!"):
            faults.append(f"{entry['path']} is not ignored")
        elif entry["source"].rpartition("/")[2] != ".gitignore":
            faults.append(f"{entry['path']} is ignored by {entry['source']} only, which other clones do not have")
        elif not entry["tracked"]:
            faults.append(f"{entry['path']} is ignored by {entry['source']}, which is not tracked")
    sources = sorted({entry["source"] for entry in git["paths"]})
    observe(settle(faults, f"ignored by the tracked {', '.join(sources)}"))
