"""The lab's ``nix``: answers for this project's flake, which is not there, and leaves everything else to the machine's own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from clawdlets_ops.lab import workplace

pytestmark = pytest.mark.integration

ASKED = ["eval", "--json", "git+file:///p#nixosConfigurations", "--apply", "builtins.attrNames"]


def script(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho {says} "$*"\n')
    path.chmod(0o755)
    return path


def said(program: Path, *words: str) -> str:
    return subprocess.run([program, *words], capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def test_the_projects_flake_is_answered_for_and_the_rest_goes_to_the_machines_own(tmp_path: Path) -> None:
    lab = tmp_path / ".clawdlets" / "lab"
    script(lab / "real" / "nix", "lab")
    own = script(tmp_path / "own" / "nix", "own")
    (lab / "bin").mkdir()
    workplace.write_nix(lab, str(own))
    program = lab / "bin" / "nix"
    assert said(program, *ASKED) == f"lab {' '.join(ASKED)}"
    for words in (["--version"], ["path-info", "--all"], ["eval", "git+file:///p#checks"]):
        assert said(program, *words) == f"own {' '.join(words)}"


def test_where_the_machine_has_none_the_lab_has_none(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    workplace.write_nix(tmp_path, "/usr/bin/true")
    assert (tmp_path / "bin" / "nix").exists()
    workplace.write_nix(tmp_path, None)
    assert not (tmp_path / "bin" / "nix").exists()
