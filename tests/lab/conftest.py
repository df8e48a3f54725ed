"""A project of its own with a lab of its own, driven by the commands that a person types."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
COMMAND_TIMEOUT_S = 600


@dataclass(frozen=True)
class LabProject:
    """A git checkout with a fleet file, as a user has it; ``.cache`` is this repository's."""

    root: Path

    @property
    def runtime(self) -> Path:
        return self.root / ".clawdlets"

    def env(self) -> dict[str, str]:
        keep = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in os.environ}
        return {**keep, "PATH": f"{PROGRAMS}:{keep['PATH']}", "USER": "olive", "NO_COLOR": "1", "COLUMNS": "200"}

    def popen(self, *argv: str, **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            argv, cwd=self.root, env=self.env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
        )  # fmt: skip

    def run(self, *argv: str, ok: bool | None = True) -> subprocess.CompletedProcess[str]:
        """Run to the end; asserts the exit status unless ``ok`` is None."""
        process = self.popen(*argv)
        try:
            out, _ = process.communicate(timeout=COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        if ok is not None:
            assert (process.returncode == 0) is ok, f"{' '.join(argv)} ended with {process.returncode}:\n{out}"
        return subprocess.CompletedProcess(argv, process.returncode, out)

    def bootstrap(self, *more: str, limit: str = "", ok: bool | None = True) -> str:
        chosen = ["--limit", f"@clawdlets/{limit}"] if limit else []
        return self.run("pyinfra", "-y", "inventory/lab.py", "deploys/bootstrap.py", *chosen, *more, ok=ok).stdout

    def journal(self) -> list[dict[str, Any]]:
        """The emulator's request journal."""
        return [json.loads(line) for line in (self.runtime / "lab" / "journal.jsonl").read_text().splitlines()]

    def settings(self) -> dict[str, str]:
        lines = (self.runtime / "env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))

    def fleet(self, change: Any) -> None:
        path = self.root / "fleet" / "clawdlets.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document, indent=2))


def make_project(root: Path) -> LabProject:
    for name in ("fleet", "deploys", "inventory"):
        shutil.copytree(ROOT / name, root / name)
    (root / ".gitignore").write_text("/.clawdlets/\n/.cache\n")
    (root / ".cache").symlink_to(ROOT / ".cache")
    project = LabProject(root)
    for words in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@example", "commit", "-qm", "start"],
    ):
        subprocess.run(["git", "-C", str(root), *words], check=True, env=project.env())
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabProject]:
    """A project whose lab is up; down again afterwards, whatever happened."""
    made = make_project(tmp_path_factory.mktemp("project"))
    try:
        made.run("clawdlets", "lab", "up")
        yield made
    finally:
        made.run("clawdlets", "lab", "down")
