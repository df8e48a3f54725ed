"""Private files on a real disk."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clawdlets_ops.errors import BusyError, SettingsError
from clawdlets_ops.files import ensure_dir, locked, read_private, swap_dir, sweep_temporaries, write_atomic
from clawdlets_ops.process import Command, LocalRunner

pytestmark = pytest.mark.integration


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest):
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    folder = ensure_dir(tmp_path / "a" / "b")
    assert (mode(tmp_path / "a"), mode(folder)) == (0o700, 0o700)
    write_atomic(folder / "private", "x")
    write_atomic(folder / "public", "x", mode=0o644)
    assert (mode(folder / "private"), mode(folder / "public")) == (0o600, 0o644)


def test_the_same_content_is_left_alone_and_a_wrong_mode_is_put_right(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert write_atomic(path, "x")
    inode = path.stat().st_ino
    assert not write_atomic(path, "x")
    path.chmod(0o644)
    assert write_atomic(path, "x")
    assert (path.stat().st_ino, mode(path)) == (inode, 0o600)


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("untouched")
    (tmp_path / "link").symlink_to(target)
    write_atomic(tmp_path / "link", "new")
    assert target.read_text() == "untouched"
    assert not (tmp_path / "link").is_symlink()


def test_a_failed_write_leaves_the_old_content_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".f.0123456789ab.tmp").write_text("half")
    (tmp_path / ".d.0123456789ab.old").mkdir()
    (tmp_path / ".gitignore").write_text("kept")
    sweep_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".gitignore"]


def test_only_what_was_named_is_swept_where_others_write_too(tmp_path: Path) -> None:
    for name in (".mine-f.0123456789ab.tmp", ".yours-f.0123456789ab.tmp"):
        (tmp_path / name).touch()
    sweep_temporaries(tmp_path, ("mine-",))
    assert [path.name for path in tmp_path.iterdir()] == [".yours-f.0123456789ab.tmp"]


def test_a_private_file_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomic(path, "x")
    assert read_private(path) == "x"
    path.chmod(0o640)
    with pytest.raises(SettingsError, match="chmod 600"):
        read_private(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(SettingsError):
        read_private(tmp_path / "link")


def test_swapping_a_folder_leaves_one(tmp_path: Path) -> None:
    for name, text in (("old", "1"), ("new", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(text)
    swap_dir(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "f").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_second_holder_is_told_who_is_at_work(tmp_path: Path) -> None:
    busy = pytest.raises(BusyError, match="alpha is still being worked on")
    with locked(tmp_path / "l", what="alpha"), busy, locked(tmp_path / "l", what="alpha"):
        pass
    with locked(tmp_path / "l", what="alpha"):
        pass


def test_a_lock_given_to_a_child_outlives_a_killed_parent(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from clawdlets_ops.files import locked
from clawdlets_ops.process import Command, LocalRunner
folder = Path(sys.argv[1])
with locked(folder / "l", what="x") as fd:
    LocalRunner(os.environ).run(Command(
        ["sh", "-c", f"echo $$ > {folder}/pid; while [ ! -e {folder}/go ]; do sleep 0.05; done; echo end"],
        "work", keep_fds=[fd], log_file=folder / "log"))
"""
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    deadline = time.monotonic() + 15
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    with pytest.raises(BusyError), locked(tmp_path / "l", what="x"):
        pass
    (tmp_path / "go").touch()
    with locked(tmp_path / "l", what="x", wait_s=10):
        assert (tmp_path / "log").read_text() == "end\n"


def test_a_child_that_was_not_given_the_lock_does_not_hold_it(tmp_path: Path) -> None:
    runner = LocalRunner(os.environ)
    with locked(tmp_path / "l", what="x"):
        runner.run(Command(["sh", "-c", f"sleep 5 >/dev/null 2>&1 & echo $! > {tmp_path}/pid"], "leave a child"))
    with locked(tmp_path / "l", what="x"):
        pass
    os.kill(int((tmp_path / "pid").read_text()), 9)
