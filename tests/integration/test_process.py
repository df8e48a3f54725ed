"""The runner against real programs."""

import os
import stat
import time
from pathlib import Path

import pytest

from clawdlets_ops.errors import CommandError, CommandTimeout, ToolMissingError
from clawdlets_ops.process import Command, LocalRunner
from clawdlets_ops.sensitive import MASK, Secret

pytestmark = pytest.mark.integration

CANARY = Secret("canary-value-not-a-real-secret", "canary")


@pytest.fixture
def runner() -> LocalRunner:
    return LocalRunner(
        {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "SSH_AUTH_SOCK": "/x", "HCLOUD_TOKEN": "canary"}
    )


def shell(script: str, **more: object) -> Command:
    return Command(["sh", "-c", script], "try", **more)  # type: ignore[arg-type]


def test_a_secret_in_argv_is_refused_at_construction() -> None:
    with pytest.raises(TypeError):
        Command(["echo", CANARY], "say")  # type: ignore[list-item]


def test_only_the_inherited_few_reach_a_child(runner: LocalRunner) -> None:
    names = {line.split("=")[0] for line in runner.run(shell("env")).stdout.splitlines()}
    assert {"PATH", "HOME"} <= names
    assert names & {"SSH_AUTH_SOCK", "HCLOUD_TOKEN"} == set()


def test_an_echoed_secret_is_scrubbed_from_stderr_lines_and_errors(runner: LocalRunner) -> None:
    lines: list[str] = []
    result = runner.run(shell('cat >&2; echo "$T"; exit 3', stdin=CANARY, env={"T": CANARY}), on_line=lines.append)
    assert CANARY.reveal() not in result.stderr
    assert CANARY.reveal() in result.stdout  # the caller asked for it: sops prints secrets for a living
    assert lines
    assert all(CANARY.reveal() not in line for line in lines)
    with pytest.raises(CommandError) as caught:
        result.check()
    assert CANARY.reveal() not in str(caught.value)
    assert MASK in str(caught.value)


def test_a_missing_program_is_named_with_what_to_do(runner: LocalRunner) -> None:
    with pytest.raises(ToolMissingError, match="no-such-program-here"):
        runner.run(Command(["no-such-program-here"], "try"))


def test_large_input_and_output_do_not_block_each_other(runner: LocalRunner) -> None:
    data = "x" * 3_000_000
    assert runner.run(Command(["cat"], "copy", stdin=data)).stdout == data


def test_a_program_that_does_not_read_its_input_is_no_error(runner: LocalRunner) -> None:
    assert runner.run(Command(["true"], "ignore", stdin="y" * 1_000_000)).ok


@pytest.mark.parametrize("to_log", [False, True])
def test_a_timeout_kills_the_whole_group_and_shows_the_last_words(
    runner: LocalRunner, tmp_path: Path, *, to_log: bool
) -> None:
    marker = tmp_path / "child"
    command = shell(
        f"echo last words; (echo $BASHPID >/dev/null; exec sleep 60) & echo $! > {marker}; wait",
        timeout_s=0.7,
        log_file=tmp_path / "log" if to_log else None,
    )
    started = time.monotonic()
    with pytest.raises(CommandTimeout, match="last words"):
        runner.run(command)
    assert time.monotonic() - started < 8
    stat_file = Path(f"/proc/{int(marker.read_text())}/stat")
    deadline = time.monotonic() + 5
    while stat_file.exists() and ") Z " not in stat_file.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not stat_file.exists() or ") Z " in stat_file.read_text()


def test_a_program_whose_child_keeps_the_pipes_open_ends_with_itself(runner: LocalRunner, tmp_path: Path) -> None:
    started = time.monotonic()
    result = runner.run(shell(f"echo done; sleep 5 & echo $! > {tmp_path / 'pid'}", timeout_s=4))
    assert result.stdout == "done\n"
    assert time.monotonic() - started < 3
    os.kill(int((tmp_path / "pid").read_text()), 9)


def test_output_to_a_private_log_is_returned_and_followed(runner: LocalRunner, tmp_path: Path) -> None:
    log, lines = tmp_path / "apply.log", []
    result = runner.run(shell("echo one; echo two >&2", log_file=log), on_line=lines.append)
    assert (result.stdout, lines) == ("one\ntwo\n", ["one", "two"])
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_json_and_nonsense(runner: LocalRunner) -> None:
    assert runner.run(shell("echo '{\"a\": 1}'")).json() == {"a": 1}
    with pytest.raises(CommandError, match="printed no JSON"):
        runner.run(shell("echo nonsense")).json()
