"""The molecule scenario, run by the real molecule from create to destroy.

Molecule and Ansible are no part of the toolkit: they live in ``.cache/molecule-venv``, made here on first use from
``requirements/molecule.txt`` (about 90 MB, half a minute).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clawdlets_ops.lab import control
from clawdlets_ops.layout import Layout
from tests.lab.conftest import ROOT, make_project

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1500)]

VENV = ROOT / ".cache" / "molecule-venv"
STAMP = ROOT / ".cache" / "stamp" / "molecule"
REQUIREMENTS = ROOT / "requirements" / "molecule.txt"
INSTALL_TIMEOUT_S = 600
TEST_TIMEOUT_S = 900


@pytest.fixture(scope="module")
def molecule_bin() -> Path:
    """The folder of molecule's programs; skips where it cannot be installed."""
    wanted = hashlib.sha256(f"{VENV} {sys.version}".encode() + REQUIREMENTS.read_bytes()).hexdigest()
    if not (STAMP.exists() and STAMP.read_text() == wanted):
        STAMP.unlink(missing_ok=True)
        shutil.rmtree(VENV, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True, capture_output=True, timeout=120)
        pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check"]
        words = ["--require-hashes", "--only-binary", ":all:", "-r", str(REQUIREMENTS)]
        made = subprocess.run([*pip, *words], check=False, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
        assert "DO NOT MATCH THE HASHES" not in made.stderr, made.stderr
        if made.returncode != 0:
            pytest.skip(f"molecule cannot be installed here: {made.stderr.strip().splitlines()[-1]}")
        STAMP.parent.mkdir(parents=True, exist_ok=True)
        STAMP.write_text(wanted)
    return VENV / "bin"


def recaps(said: str) -> list[tuple[str, int]]:
    """(step, number of changed tasks) of every playbook that ran, in order."""
    found, step = [], ""
    for line in said.splitlines():
        if started := re.search(r"\[default > (\w+)\] Executing", line):
            step = started[1]
        if recap := re.search(r"^localhost .*changed=(\d+) .*failed=0 ", line):
            found.append((step, int(recap[1])))
    return found


def test_molecule_test_ends_with_a_passed_idempotence_step(molecule_bin: Path, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    shutil.copytree(ROOT / "molecule", project.root / "molecule")
    (tmp_path / "home").mkdir()
    env = project.env()
    env = {**env, "PATH": f"{env['PATH']}:{molecule_bin}", "HOME": str(tmp_path / "home"), "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            ["molecule", "test"], cwd=project.root, env=env, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=TEST_TIMEOUT_S,
        )  # fmt: skip
        said = done.stdout
        assert done.returncode == 0, said
        # converge says that it changed something, so the idempotence step's 0 means something
        assert recaps(said) == [
            ("destroy", 0),
            ("create", 1),
            ("converge", 1),
            ("idempotence", 0),
            ("verify", 0),
            ("destroy", 1),
        ], said
        assert "default > idempotence: Executed: Successful" in said
        assert control.status(Layout(project.root)).state == "down"
    finally:
        project.run("clawdlets", "lab", "down")


def test_an_idempotence_step_that_changes_something_fails(molecule_bin: Path, tmp_path: Path) -> None:
    """The negative control, without a lab: programs of our own stand for pyinfra, the second run changes again."""
    shutil.copytree(ROOT / "molecule", tmp_path / "project" / "molecule")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "clawdlets").write_text('#!/bin/sh\necho \'{"state": "down"}\'\n')
    (programs / "pyinfra").write_text("#!/bin/sh\necho '    Grand total     1   1   -   -'\n")
    for path in programs.iterdir():
        path.chmod(0o755)
    (tmp_path / "home").mkdir()
    path = f"{programs}:{molecule_bin}:{os.environ['PATH']}"
    env = {"PATH": path, "HOME": str(tmp_path / "home"), "LC_ALL": "C.UTF-8", "NO_COLOR": "1"}
    done = subprocess.run(
        ["molecule", "test"], cwd=tmp_path / "project", env=env, check=False, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TEST_TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode != 0, done.stdout
    assert "Idempotence test failed" in done.stdout, done.stdout
