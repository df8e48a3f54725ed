"""``clawdlets init`` where it is hindered: places that cannot be, other repositories, no room, kill -9."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from clawdlets_ops import scaffold
from clawdlets_ops.cli import clawdlets
from clawdlets_ops.errors import ClawdletsError, FleetError, SettingsError
from clawdlets_ops.fleet import parse_fleet
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.scaffold import place
from clawdlets_ops.scaffold.source import UNLOCATED, source

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


class Desk:
    """An empty folder, a home with an identity for git, and the command as it is typed there."""

    def __init__(self, root: Path) -> None:
        self.root = root / "work"
        self.home = root / "home"
        self.root.mkdir()
        self.home.mkdir()
        (self.home / ".gitconfig").write_text("[user]\n\tname = olive\n\temail = olive@example.invalid\n")
        self.environ = {"PATH": os.environ["PATH"], "HOME": str(self.home), "USER": "olive"}

    def init(self, *words: str) -> Result:
        from_here = Path.cwd()
        os.chdir(self.root)
        try:
            return CliRunner(env=self.environ).invoke(clawdlets, ["init", *words])
        finally:
            os.chdir(from_here)

    def made(self, *words: str) -> Result:
        done = self.init(*words)
        assert done.exit_code == 0, (done.output, done.exception)
        return done

    def refused(self, *words: str) -> str:
        before = snapshot(self.root)
        done = self.init(*words)
        assert isinstance(done.exception, ClawdletsError), (done.output, done.exception)
        assert snapshot(self.root) == before
        return str(done.exception)


def snapshot(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    desk = Desk(tmp_path)
    monkeypatch.setenv("HOME", str(desk.home))
    return desk


def planned() -> scaffold.Plan:
    return scaffold.plan("p", "alpha", scaffold.declare.Wish(), origin=source(UNLOCATED), rehearsal=True)


class TestPlaces:
    def test_a_new_one_and_an_empty_one_and_no_other(self, desk: Desk) -> None:
        desk.made("new", "--lab", "--no-git")
        (desk.root / "empty").mkdir()
        desk.made("empty", "--lab", "--no-git")
        assert snapshot(desk.root / "new") == snapshot(desk.root / "empty")
        assert (desk.root / "empty").stat().st_mode & 0o777 == 0o755
        assert {path.stat().st_mode & 0o777 for path in (desk.root / "new").rglob("*") if path.is_file()} == {0o644}
        assert "is not empty, and nothing in it was touched" in desk.refused("new", "--lab")
        (desk.root / "hidden").mkdir()
        (desk.root / "hidden" / ".keep").touch()
        assert "is not empty" in desk.refused("hidden", "--lab")

    def test_the_folder_that_one_is_in(self, desk: Desk) -> None:
        assert desk.made(".", "--lab", "--no-git", "--dry").output.count("bytes") == len(planned().files)
        assert snapshot(desk.root) == []
        assert f"the folder that you are in was replaced: cd {desk.root}" in desk.made(".", "--lab", "--no-git").output
        assert (desk.root / "README.md").read_text().startswith("# work\n")

    def test_a_link_a_file_and_a_folder_that_is_not_there(self, desk: Desk) -> None:
        (desk.root / "real").mkdir()
        (desk.root / "link").symlink_to("real")
        (desk.root / "dangling").symlink_to("nowhere")
        (desk.root / "file").touch()
        assert "is a symbolic link" in desk.refused("link", "--lab")
        assert "is a symbolic link" in desk.refused("dangling", "--lab")
        assert "is no folder" in desk.refused("file", "--lab")
        assert "there is no such folder to put it into" in desk.refused("a/b/c", "--lab")
        assert "there is no such folder" in desk.refused("file/x", "--lab")
        assert "not empty" in desk.refused("/", "--lab")
        desk.made("real/../through", "--lab", "--no-git")
        assert (desk.root / "through" / "README.md").is_file()

    def test_a_name_that_is_too_long_and_one_of_spaces(self, desk: Desk) -> None:
        assert "cannot be made: File name too long" in desk.refused("x" * 250, "--lab", "--no-git")
        desk.made("two words", "--lab", "--no-commit")
        assert (desk.root / "two words" / ".git" / "hooks" / "pre-commit").is_file()


class TestGit:
    def test_a_repository_of_its_own_with_hooks_and_a_commit(self, desk: Desk) -> None:
        assert ", committed" in desk.made("p", "--lab").output
        said = subprocess.run(["git", "-C", desk.root / "p", "status", "--porcelain", "--branch"], capture_output=True, text=True, check=True)  # fmt: skip
        assert said.stdout == "## main\n"
        assert os.access(desk.root / "p" / ".git" / "hooks" / "pre-push", os.X_OK)

    def test_without_an_identity_everything_is_staged_and_said(self, desk: Desk) -> None:
        (desk.home / ".gitconfig").unlink()
        assert "git knows no user.name" in desk.made("p", "--lab").output
        assert "first commit" not in desk.made("q", "--lab", "--no-git").output
        assert not (desk.root / "q" / ".git").exists()

    def test_within_another_repository_it_has_to_be_said(self, desk: Desk) -> None:
        subprocess.run(["git", "init", "-q", desk.root], check=True)
        assert "--no-git to make it a part" in desk.refused("p", "--lab")
        desk.made("part", "--lab", "--no-git")
        desk.made("own", "--lab", "--git", "--no-commit")
        assert (desk.root / "own" / ".git").is_dir()

    def test_hooks_that_all_repositories_share_are_left_alone_and_said(self, desk: Desk) -> None:
        config = desk.home / ".gitconfig"
        config.write_text(config.read_text() + "[core]\n\thooksPath = ~/hooks\n")
        assert "core.hooksPath is set for all repositories" in desk.made("p", "--lab", "--no-commit").output
        assert not (desk.home / "hooks").exists()

    def test_git_that_is_missing_is_told_before_anything_is_made(self, desk: Desk, tmp_path: Path) -> None:
        desk.environ["PATH"] = str(tmp_path)
        assert "git" in desk.refused("p", "--lab")
        desk.made("p", "--lab", "--no-git")


class TestWhatIsSaid:
    def test_nothing_that_opens_is_guessed(self, desk: Desk) -> None:
        assert "--ssh-pubkey-file: there is none of ~/.ssh/id_ed25519.pub" in desk.refused("p")
        key = desk.home / ".ssh" / "id_ed25519.pub"
        key.parent.mkdir()
        key.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s olive\n")
        assert "--admin-cidr: nobody could reach" in desk.refused("p")
        assert "internet at large" in desk.refused("p", "--admin-cidr", "0.0.0.0/1", "--admin-cidr", "128.0.0.0/1")
        desk.made("p", "--admin-cidr", "203.0.113.7/32", "--no-git", "--host", "bravo", "--server-type", "cax11")
        text = (desk.root / "p" / "fleet" / "clawdlets.json").read_text()
        assert '"sshPubkeyFile": "~/.ssh/id_ed25519.pub"' in text
        assert '"system": "aarch64-linux"' in text
        host = parse_fleet(text).host("bravo")
        assert host.ssh_authorized_keys == (key.read_text().strip(),)  # what a flake can see of it

    def test_a_private_key_in_the_place_of_a_public_one(self, desk: Desk) -> None:
        (desk.root / "id").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\ncanary\n")
        said = desk.refused("p", "--ssh-pubkey-file", "id", "--admin-cidr", "203.0.113.7/32")
        assert "this is a private key" in said
        assert "canary" not in said
        assert "cannot be read" in desk.refused("p", "--ssh-pubkey-file", "nowhere.pub", "--lab")


def attempt(root: Path, where: Path) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    argv = [sys.executable, "-c", "from clawdlets_ops.cli import main; main()", "init", str(where), "--lab"]
    env = {"PATH": os.environ["PATH"], "HOME": str(root), "PYTHONPATH": str(Path(scaffold.__file__).parents[2])}
    return subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a part of a project."""
    if os.geteuid() != 0:
        pytest.skip("a small file system needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_no_room_leaves_nothing(small: Path, desk: Desk) -> None:
    done = desk.init(str(small / "p"), "--lab", "--no-git")
    assert isinstance(done.exception, SettingsError)
    assert "cannot be made: No space left on device" in str(done.exception)
    assert list(small.iterdir()) == []
    assert "is where a file system is mounted" in desk.refused(str(small), "--lab")


def test_an_edit_without_room_leaves_the_file_as_it_was(small: Path) -> None:
    example = (Path(scaffold.__file__).parents[2] / "fleet" / "clawdlets.json").read_bytes()
    (small / "fleet").mkdir()
    file = small / "fleet" / "clawdlets.json"
    file.write_bytes(example)
    runner, words = CliRunner(), ["--project", str(small), "host", "add", "bravo", "--like", "alpha"]
    with (small / "fill").open("wb", buffering=0) as fill, contextlib.suppress(OSError):
        while True:
            fill.write(b"x" * 1024)
    done = runner.invoke(clawdlets, words)
    assert isinstance(done.exception, FleetError), done.exception
    assert "No space left on device" in str(done.exception)
    assert file.read_bytes() == example
    (small / "fill").unlink()
    assert runner.invoke(clawdlets, words).exit_code == 0
    assert "bravo" in file.read_text()


def test_no_permission_is_told(tmp_path: Path, desk: Desk) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() != 0:
        assert "cannot be made: Permission denied" in desk.refused(str(locked / "p"), "--lab", "--no-git")
    # Root is refused nothing by modes; by a file system that cannot be written, everybody is.
    assert "cannot be made" in desk.refused("/proc/self/p", "--lab", "--no-git")


def test_killed_at_any_moment_there_is_nothing_or_all_of_it(tmp_path: Path) -> None:
    """Killed once for each step that shows on the disk, from before the first file to after the last."""
    (tmp_path / ".gitconfig").write_text("[user]\n\tname = olive\n\temail = olive@example.invalid\n")
    whole = set(planned().files)
    outcomes = set()
    for step in (2, len(whole), len(whole) + 8, 0):
        where = tmp_path / "fleet"
        process = attempt(tmp_path, where)
        while process.poll() is None:
            built = sum(len(files) for top in tmp_path.glob(f".fleet.*{place.SUFFIX}") for _, _, files in os.walk(top))
            if step and built >= step:
                break
            time.sleep(0.001)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not where.exists():
            outcomes.add("nothing")
            continue
        assert {str(path.relative_to(where)) for path in where.rglob("*") if path.is_file() and ".git/" not in str(path)} == whole  # fmt: skip
        outcomes.add("all")
        where.rename(tmp_path / f"done-{time.monotonic_ns()}")
    assert outcomes == {"nothing", "all"}
    assert list(tmp_path.glob(".fleet.*")) == []  # the last run removed what the killed ones left


def test_what_another_run_is_building_is_not_swept(tmp_path: Path) -> None:
    theirs = tmp_path / f".p.0123{place.SUFFIX}"
    theirs.mkdir()
    left = tmp_path / f".p.4567{place.SUFFIX}"
    left.mkdir()
    other = tmp_path / f".q.4567{place.SUFFIX}"
    other.mkdir()
    with place._Held(theirs):
        place.create(planned(), tmp_path / "p", runner=LocalRunner(os.environ), git=False)
        assert (theirs.exists(), left.exists(), other.exists()) == (True, False, True)


def test_a_place_that_fills_up_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = tmp_path / "p"

    def somebody_else(*arguments: object, **more: object) -> None:
        where.mkdir()
        (where / "theirs").touch()

    monkeypatch.setattr(place, "_folders", lambda top, folder: (folder.mkdir(parents=True, exist_ok=True), where.exists() or somebody_else()))  # fmt: skip
    with pytest.raises(SettingsError, match="is not empty"):
        place.create(planned(), where, runner=LocalRunner(os.environ), git=False)
    assert snapshot(tmp_path) == ["p", "p/theirs"]
