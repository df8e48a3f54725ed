"""The command line of the guard, and how it reads what git writes."""

import json
import os
import shutil
import subprocess

import pytest

from clawdlets_ops.errors import CommandError, CommandTimeout, ToolMissingError
from clawdlets_ops.guard import report
from clawdlets_ops.process import Command
from tests.guard_corpus import Maker
from tests.integration.guard.desk import ENVIRON, ROOT, RUNNER, Git

pytestmark = pytest.mark.integration


def test_a_program_is_read_while_it_writes_and_its_failure_is_not_lost():
    with RUNNER.stream(Command(["cat"], why="echo", stdin=b"\xff\0canary" * 100_000)) as output:
        assert output.read() == b"\xff\0canary" * 100_000
    with RUNNER.stream(Command(["yes"], why="write without end")) as output:
        assert output.read(4) == b"y\ny\n"
    with (
        pytest.raises(CommandError, match="said so"),
        RUNNER.stream(Command(["sh", "-c", "echo said so >&2; exit 3"], why="fail")) as output,
    ):
        assert output.read() == b""
    with pytest.raises(CommandTimeout), RUNNER.stream(Command(["sleep", "60"], why="hang", timeout_s=0.2)) as output:
        assert output.read() == b""
    with pytest.raises(ToolMissingError), RUNNER.stream(Command(["no-such-program"], why="x")):
        pass


def test_the_command_line_says_what_it_is_about(git, program):
    git.write("a.txt", "x\n")
    git("add", ".")

    def guard(*words):
        return subprocess.run(
            [str(program), "guard", *words], cwd=git.folder, env=ENVIRON, capture_output=True, text=True
        )

    assert guard("scan").returncode == 0
    assert guard("scan", "--staged", "--history").returncode == 2
    git.write("b.txt", Maker().tailscale())
    assert guard("scan", "a.txt").returncode == 0
    assert guard("scan", "b.txt", "--format", "sarif").returncode == 1
    assert json.loads(guard("scan", ".", "--format", "json").stdout)["leaks"][0]["path"] == "b.txt"
    assert guard("--help").stdout.count("install") >= 1
    assert "installed" in guard("install").stdout
    assert "unchanged" in guard("install").stdout
    assert "removed" in guard("install", "--remove").stdout
    shutil.rmtree(git.folder / ".git")
    assert guard("scan").returncode == 2
    assert guard("scan", ".").returncode == 1


def test_this_repository_scans_clean(tmp_path):
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is no checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-c", "-o", "--exclude-standard", "--deduplicate"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    copy = Git(tmp_path / "copy")
    for name in filter(None, listed.stdout.split(b"\0")):
        source = ROOT / os.fsdecode(name)
        if source.is_file():
            copy.write(os.fsdecode(name), source.read_bytes())
    copy("add", "-f", ".")
    outcome = copy.scan("tracked")
    assert outcome.exit_code == 0, report.text(outcome)
    assert outcome.items > 100
