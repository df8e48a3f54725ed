"""As a new user: install the wheel, `clawdlets init`, and type the five commands that the README says. Nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.installed import ROOT, build, commands_in, install

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def test_from_the_wheel_to_a_verified_host_by_the_words_of_the_readme(
    tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    user = install(build(tmp_path / "wheel"), tmp_path / "user")
    took: dict[str, float] = {}

    def typed(line: str, cwd: Path) -> str:
        began = time.monotonic()
        said = user.run("bash", "-euc", line, cwd=cwd, timeout_s=600)
        took[line] = time.monotonic() - began
        return said

    # The cache is this checkout's, so that the first command finds what it would take ten minutes to make.
    typed(f"clawdlets init fleet --lab --cache {ROOT / '.cache'}", tmp_path)
    project = tmp_path / "fleet"
    commands = commands_in((project / "README.md").read_text())
    assert len(commands) == 5
    said: dict[str, str] = {}
    try:
        for line in commands:
            said[line] = typed(line, project)
    finally:
        user.run("clawdlets", "lab", "down", cwd=project)
    setup, up, bootstrap, verify, down = commands
    assert [setup, up, verify, down] == [
        f"clawdlets {words}" for words in ("lab setup", "lab up", "verify", "lab down")
    ]
    assert said[setup] == ""
    assert "Grand total" in said[bootstrap]
    reports = sorted((project / ".clawdlets" / "reports" / "_fleet").glob("*/report.json"))
    assert reports
    verdicts = [finding["state"] for finding in json.loads(reports[-1].read_text())["findings"]]
    assert verdicts.count("pass") > 20
    assert set(verdicts) <= {"pass", "not-applicable"}
    assert user.run("git", "status", "--porcelain", cwd=project).split() == ["??", "secrets/"]
    assert "is still" not in said[down]
    for line, seconds in took.items():
        record_testsuite_property(line, round(seconds, 1))
