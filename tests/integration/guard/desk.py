"""A git repository of a test."""

import os
import subprocess
from pathlib import Path

from clawdlets_ops.guard.run import Request, run
from clawdlets_ops.process import LocalRunner

ROOT = Path(__file__).parents[3]
LARGE_BYTES = 200_000_000
MAX_RSS_BYTES = 220_000_000
ENVIRON = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    **{
        f"GIT_{who}_{what}": f"canary{'@x.invalid' if what == 'EMAIL' else ''}"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    },
}
RUNNER = LocalRunner(ENVIRON)
PROGRAM = """#!{python}
from clawdlets_ops import cli
cli.main()
"""


class Git:
    """A repository of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self("init", "-q", "-b", "main")

    def __call__(self, *words, ok=True, folder=None, **environ):
        result = subprocess.run(
            ["git", *words], cwd=folder or self.folder, env={**ENVIRON, **environ}, capture_output=True, text=True
        )
        assert not ok or result.returncode == 0, result.stderr
        return result

    def write(self, path, content, *, link=False):
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            target.symlink_to(os.fsdecode(content))
        else:
            target.write_bytes(content.encode() if isinstance(content, str) else content)
        return target

    def commit(self, path="README.md", content="x\n", message="m"):
        self.write(path, content)
        self("add", "-f", path)
        self("commit", "-q", "-m", message)

    def scan(self, scope, *paths, **more):
        return run(Request(self.folder, scope, paths, **more), runner=RUNNER, environ={})


def rules(outcome):
    return [leak.rule for leak in outcome.leaks if not leak.allowed]
