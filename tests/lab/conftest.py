"""A project of its own with a lab of its own (a Scenario), driven by the commands that a person types."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops import ssh
from clawdlets_ops.install import ADMIN
from clawdlets_ops.lab import control
from clawdlets_ops.lab.scenario import Scenario, environment, lay_out
from clawdlets_ops.layout import Layout
from clawdlets_ops.project import Project
from clawdlets_ops.secrets import store

ROOT = Path(__file__).parents[2]
COMMAND_TIMEOUT_S = 600
# What the labs of these tests have for a tailnet: as for clawdlets lab up. Tests that are about one of the two name it.
TAILNET = os.environ.get("LAB_TAILNET", "auto")


@dataclass(frozen=True)
class LabProject:
    """A git checkout with a fleet file, as a user has it; ``.cache`` is this repository's."""

    root: Path

    @property
    def runtime(self) -> Path:
        return self.root / ".clawdlets"

    def env(self) -> dict[str, str]:
        return environment(os.environ)

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
        return control.requests(Layout(self.root))

    def settings(self) -> dict[str, str]:
        lines = (self.runtime / "env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))

    def fleet(self, change: Any) -> None:
        path = self.root / "fleet" / "clawdlets.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document, indent=2))


def make_project(root: Path) -> LabProject:
    """A copy of this repository's fleet, deploys and inventory, with no lab yet."""
    lay_out(root, ROOT, cache=ROOT / ".cache", environ=environment(os.environ))
    return LabProject(root)


def stay_logged_in(project: Project, host: str, address: str) -> subprocess.Popen[str]:
    """Somebody who is logged in as admin at ``address``, has seen the pinned host key, and stays. Returns when they are in."""
    known = project.layout.root.parent / "known_hosts"
    known.write_text(ssh.known_hosts_lines({address: store.host_ssh_pin(project, host)}))
    options = ("StrictHostKeyChecking=yes", f"UserKnownHostsFile={known}", "BatchMode=yes", "LogLevel=ERROR")
    session = subprocess.Popen(
        [
            *("ssh", "-F", "/dev/null", *(word for option in options for word in ("-o", option))),
            *("-i", str(project.ssh_identity_file(host)), f"{ADMIN}@{address}", "echo in; sleep 600"),
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert session.stdout is not None
    assert session.stdout.readline() == "in\n"
    return session


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabProject]:
    """A project whose lab is up; down again afterwards, whatever happened."""
    with Scenario(ROOT, folder=tmp_path_factory.mktemp("project"), environ=os.environ, tailnet=TAILNET) as lab:
        yield LabProject(lab.root)
