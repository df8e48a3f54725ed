"""Which rule of git's ignores the runtime dir, and whether every clone has that rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clawdlets_ops.errors import CommandTimeout, ToolMissingError
from clawdlets_ops.layout import RUNTIME_DIR
from clawdlets_ops.process import Command, Runner

GIT_TIMEOUT_S = 30.0
# One path of each kind that the runtime dir holds.
RUNTIME_SAMPLES = ("x", "keys/operators/x.agekey", "extra-files/h/x", "infra/opentofu/h/x")


def git_evidence(root: Path, *, runner: Runner) -> dict[str, Any]:
    """Which rule ignores the runtime dir: ``{checkout, problem, paths: [{path, source, pattern, tracked}]}``.

    ``problem`` is why git could not say, else None; ``source`` is empty for a path that no rule matches.
    """
    paths = [f"{RUNTIME_DIR}/{sample}" for sample in RUNTIME_SAMPLES]
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        return {"checkout": False, "problem": None, "paths": []}
    try:
        asked = runner.run(
            _git(
                root,
                "ask which rule ignores the runtime dir",
                "check-ignore",
                "-v",
                "-z",
                "--no-index",
                "--non-matching",
                "--stdin",
                stdin="".join(f"{path}\0" for path in paths),
            )
        )
        # Status 1: none is ignored.
        if asked.exit_code not in (0, 1):
            return {"checkout": True, "problem": f"git could not say: {asked.tail()}", "paths": []}
        fields = asked.stdout.split("\0")
        entries = [
            {"source": fields[at], "pattern": fields[at + 2], "path": fields[at + 3]}
            for at in range(0, len(fields) - 3, 4)
        ]
        # The source is named from the top of the checkout, which may be above the project.
        tracked = {
            source: runner.run(
                _git(
                    root,
                    "ask whether the rule is tracked",
                    "ls-files",
                    "--error-unmatch",
                    "--",
                    f":(top,literal){source}",
                )
            ).ok
            for source in {entry["source"] for entry in entries if entry["source"]}
        }
    except (ToolMissingError, CommandTimeout) as error:
        return {"checkout": True, "problem": error.what, "paths": []}
    return {
        "checkout": True,
        "problem": None,
        "paths": [{**entry, "tracked": tracked.get(entry["source"], False)} for entry in entries],
    }


def _git(root: Path, why: str, *words: str, stdin: str | None = None) -> Command:
    return Command(["git", "-C", root, *words], why, timeout_s=GIT_TIMEOUT_S, stdin=stdin)
