"""secrets edit with real programs as editors: in memory, gone whatever happens, never over somebody else's change."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from clawdlets_ops import age
from clawdlets_ops.errors import BusyError, SecretsError
from clawdlets_ops.secrets import changes, edit
from clawdlets_ops.sensitive import Secret
from tests.integration.secrets_changes.desk import GIVEN, a_project, put, readers_of, snapshot, value_in

pytestmark = pytest.mark.integration

NAME = "discord_token"
DEADLINE_S = 30.0
PROGRAM = """
import os, sys
from pathlib import Path
from clawdlets_ops import cli
sys.argv = ["clawdlets", "--project", sys.argv[1], "secrets", "edit", sys.argv[2], "--host", "alpha"]
cli.main()
"""
LOOK = 'stat -c "%a %U" "$1" "$(dirname "$1")"; df --output=fstype "$1" | tail -1; env; cat "$1"'
"""What an editor can see."""


@pytest.fixture
def memory(tmp_path):
    """A folder of this test's on a tmpfs, as $XDG_RUNTIME_DIR."""
    folder = Path("/dev/shm") / f"clawdlets-test-{os.getpid()}-{tmp_path.name}"
    folder.mkdir(mode=0o700)
    yield folder
    left = list(folder.iterdir())
    for path in left:
        path.rmdir()
    folder.rmdir()
    assert left == []


@pytest.fixture
def desk(project, runner, memory, tmp_path):
    return Desk(project, runner, memory, tmp_path)


class Desk:
    """An operator with an editor, which is a shell script: the file is its ``$1``."""

    def __init__(self, project, runner, memory, scratch):
        self.project, self.runner, self.memory, self.scratch = project, runner, memory, scratch
        self.said, self.asked = [], []

    def environ(self, script):
        editor = self.scratch / "editor"
        editor.write_text(f"#!/bin/sh\n{script}\n")
        editor.chmod(0o755)
        return {
            "PATH": os.environ["PATH"],
            "USER": self.project.operator,
            "EDITOR": f"{editor} ",
            "XDG_RUNTIME_DIR": str(self.memory),
            "HCLOUD_TOKEN": "canary-of-the-shell",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }

    def edit(self, script, name=NAME, *, project=None, again=()):
        answers = iter(again)

        def ask(fault):
            self.asked.append(fault)
            return next(answers, False)

        return edit.edit_secret(
            project or self.project,
            "alpha",
            name,
            runner=self.runner,
            environ=self.environ(script),
            again=ask,
            say=self.said.append,
        )

    def value(self):
        return value_in(self.project, self.runner, NAME)

    @contextmanager
    def running(self, script, *, before=""):
        """The real command with the editor at work; ``started`` is there once it is."""
        started = self.scratch / "started"
        started.unlink(missing_ok=True)
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.project.layout.root), NAME],
            env=self.environ(f"{before}\necho $$ > {started}.new; mv {started}.new {started}\n{script}"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            wait_for(started.exists, child)
            yield child, int(started.read_text())
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
            for pipe in (child.stdout, child.stderr):  # an editor that lives on holds the other ends
                pipe.close()


def wait_for(condition, child=None):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        assert child is None or child.poll() is None, child.communicate()
        time.sleep(0.01)


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_new_value_is_encrypted_for_the_same_readers_and_nothing_else_changes(desk):
    before, readers = snapshot(desk.project.layout.root), readers_of(desk.project, NAME)
    made = desk.edit('printf "canary-edited\\n" > "$1"')
    assert made.updated == (f"secrets/hosts/alpha/{NAME}.yaml",)
    assert desk.value() == "canary-edited"
    assert readers_of(desk.project, NAME) == readers
    after = snapshot(desk.project.layout.root)
    assert {path for path in after if after[path] != before.get(path)} == {
        f"secrets/hosts/alpha/{NAME}.yaml",
        ".clawdlets/state/secrets-alpha.json",
    }
    assert not any("canary" in line for line in desk.runner.lines)


@pytest.mark.parametrize("script", ["true", 'cp "$1" "$1~"; mv "$1~" "$1"', 'touch "$1"; echo backup > "$1.bak"'])
def test_unchanged_is_no_change_and_costs_one_process(desk, script):
    before = snapshot(desk.project.layout.root)
    assert not desk.edit(script).changed
    assert desk.runner.taken() == 1
    assert snapshot(desk.project.layout.root) == before


@pytest.mark.parametrize(
    "value", ["canary\n", "two\nlines", "two\nlines\n", " canary ", "-", "ünï\u2028codé", "y" * 200_000]
)
def test_every_value_survives_an_edit_that_changes_nothing_also_a_newline_that_the_editor_adds(desk, value):
    changes.set_secret(desk.project, "alpha", NAME, Secret(value), runner=desk.runner)
    before = snapshot(desk.project.layout.root)
    assert not desk.edit("true").changed
    assert not desk.edit('test -z "$(tail -c1 "$1")" || echo >> "$1"').changed
    assert snapshot(desk.project.layout.root) == before


def test_the_editor_sees_a_private_file_in_memory_and_no_token(desk):
    seen = desk.scratch / "seen"
    desk.edit(f"({LOOK}) > {seen}")
    text = seen.read_text()
    owner = Path("/proc/self").owner()
    assert text.startswith(f"600 {owner}\n700 {owner}\ntmpfs\n")
    assert GIVEN[NAME] in text
    assert "canary-of-the-shell" not in text
    assert "AGE-SECRET" not in text


def test_a_secret_that_is_missing_begins_empty(desk):
    desk.project.layout.secret_file("alpha", NAME).unlink()
    made = desk.edit('test ! -s "$1" && echo canary-first > "$1"')
    assert made.created == (f"secrets/hosts/alpha/{NAME}.yaml",)
    assert desk.value() == "canary-first"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("exit 3", "ended with status 3"),
        ('echo canary-typed > "$1"; kill -SEGV $$', "ended with status -11"),
        ('rm "$1"', "cannot be read"),
        ('rm "$1"; ln -s /etc/hostname "$1"', "cannot be read"),
        ('rm "$1"; mkfifo "$1"', "left no file"),
        (': > "$1"', "empty or still a placeholder"),
        ('echo CHANGEME > "$1"', "empty or still a placeholder"),
        ('printf "canary-typed\\0" > "$1"', "holds a NUL"),
        ('printf "canary-typed\\377" > "$1"', "not UTF-8"),
        ('head -c 2000000 /dev/zero | tr "\\0" y > "$1"', "larger than"),
    ],
)
def test_what_cannot_be_used_changes_nothing_and_is_nowhere_afterwards(desk, script, says):
    before = snapshot(desk.project.layout.root)
    with pytest.raises(SecretsError, match=says) as caught:
        desk.edit(script)
    assert "nothing was changed" in str(caught.value)
    assert "canary-typed" not in str(caught.value)
    assert snapshot(desk.project.layout.root) == before


def test_a_hash_is_checked_and_a_password_cannot_be_shown(desk):
    with pytest.raises(SecretsError, match="is no password hash"):
        desk.edit('echo canary-no-hash > "$1"', "admin_password_hash")
    with pytest.raises(SecretsError, match="only its hash"):
        desk.edit("true", "admin_password")


def test_an_unusable_value_can_be_edited_again_and_is_still_there(desk):
    script = 'if grep -q typed "$1"; then sed -i s/CHANGEME-// "$1"; else printf "CHANGEME-typed\\n" > "$1"; fi'
    assert desk.edit(script, again=[True]).changed
    assert len(desk.asked) == 1
    assert desk.value() == "typed"


@pytest.mark.parametrize("name", ["../x", "discord_tokn", "", "a/b"])
def test_a_name_that_the_host_has_not_is_refused_before_the_editor_opens(desk, name):
    with pytest.raises(SecretsError, match="has no such secret"):
        desk.edit(f"touch {desk.scratch}/opened", name)
    assert not (desk.scratch / "opened").exists()


def test_without_an_editor_that_is_said(desk):
    for environ in ({}, {"EDITOR": " "}, {"VISUAL": "'"}):
        with pytest.raises(Exception, match=r"EDITOR|VISUAL"):
            edit.editor_argv(environ)
    assert edit.editor_argv({"EDITOR": "vi", "VISUAL": "code --wait"}) == ["code", "--wait"]


def test_who_is_not_declared_can_neither_set_nor_edit(desk, tmp_path):
    other = a_project(desk.project.layout.root, operators={"lena": age.generate().recipient})
    before = snapshot(desk.project.layout.root)
    with pytest.raises(SecretsError, match="the operator 'maren' is not declared"):
        changes.set_secret(other, "alpha", NAME, Secret("canary-new"), runner=desk.runner)
    with pytest.raises(SecretsError, match="the operator 'maren' is not declared"):
        desk.edit(f"touch {desk.scratch}/opened", project=other)
    assert snapshot(desk.project.layout.root) == before
    assert not (desk.scratch / "opened").exists()


def test_a_change_by_somebody_else_meanwhile_is_kept(desk):
    """Such as a git pull in another terminal."""
    readers = readers_of(desk.project, NAME)
    put(desk.project, desk.runner, NAME, "canary-theirs", to=readers)
    path = desk.project.layout.secret_file("alpha", NAME)
    theirs = path.read_bytes()
    put(desk.project, desk.runner, NAME, "canary-before", to=readers)
    (desk.scratch / "theirs").write_bytes(theirs)
    with pytest.raises(SecretsError, match="changed by somebody else"):
        desk.edit(f'echo canary-ours > "$1"; cp {desk.scratch}/theirs {path}')
    assert path.read_bytes() == theirs
    with pytest.raises(SecretsError, match="changed by somebody else"):
        desk.edit(f'echo canary-ours > "$1"; rm {path}')
    assert not path.exists()


def test_the_second_of_two_edits_at_once_is_told_who_is_at_it(desk):
    go = desk.scratch / "go"
    with desk.running(f'while [ ! -e {go} ]; do sleep 0.05; done; echo canary-first > "$1"') as (child, _):
        with pytest.raises(BusyError, match="maren"):
            desk.edit(f"touch {desk.scratch}/opened")
        assert not (desk.scratch / "opened").exists()
        assert edit.sweep([desk.memory]) == []  # it is held
        go.touch()
        printed, said = child.communicate(timeout=DEADLINE_S)
    assert (child.returncode, said) == (0, "")
    assert "updated" in printed
    assert desk.value() == "canary-first"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_told_to_end_it_ends_the_editor_and_leaves_nothing(desk, number):
    with desk.running("exec sleep 600") as (child, editor):
        child.send_signal(number)
        child.communicate(timeout=DEADLINE_S)
        assert child.returncode == 128 + number
        wait_for(lambda: not lives(editor))
    assert list(desk.memory.iterdir()) == []
    assert desk.value() == GIVEN[NAME]


def test_an_interrupt_is_for_the_editor_and_not_for_us(desk):
    trap = "trap 'echo canary-saved > \"$1\"; exit 0' INT"
    with desk.running("while :; do sleep 0.05; done", before=trap) as (child, _):
        os.killpg(child.pid, signal.SIGINT)  # as the terminal does it
        child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 0
    assert desk.value() == "canary-saved"


def test_what_a_killed_edit_left_is_removed_by_the_next_one_and_not_before_the_editor_ended(desk):
    with desk.running("exec sleep 600") as (child, editor):
        child.kill()
        child.wait()
        (left,) = desk.memory.iterdir()
        assert (left / NAME).read_text() == f"{GIVEN[NAME]}\n"
        assert not desk.edit("true").changed
        assert desk.said == []  # somebody is still writing there
        assert left.exists()
        os.kill(editor, signal.SIGKILL)
        wait_for(lambda: not lives(editor))
    assert not desk.edit("true").changed
    assert desk.said == [f"removed {left}, left by an edit that was killed"]
    assert list(desk.memory.iterdir()) == []


def test_without_memory_it_says_so_and_leaves_nothing_on_disk_either(desk, monkeypatch):
    monkeypatch.setattr(edit, "folders_in_memory", lambda _: [])
    seen = desk.scratch / "seen"
    before = snapshot(desk.project.layout.root)
    assert not desk.edit(f'dirname "$1" > {seen}').changed
    assert seen.read_text().startswith(str(desk.project.layout.runtime))
    assert desk.said == [f"no tmpfs is there: while you edit, the value lies on disk, in {desk.project.layout.runtime}"]
    assert snapshot(desk.project.layout.root) == before
    assert list(desk.project.layout.runtime.glob(f"{edit.PREFIX}*")) == []


def test_a_full_memory_is_an_error_that_changes_nothing(desk, small_disk, monkeypatch):
    small = small_disk(16_384)
    monkeypatch.setattr(edit, "folders_in_memory", lambda _: [small])
    changes.set_secret(desk.project, "alpha", NAME, Secret("canary" * 10_000), runner=desk.runner)
    before = snapshot(desk.project.layout.root)
    with pytest.raises(SecretsError, match="No space left"):
        desk.edit("true")
    assert list(small.iterdir()) == []
    assert snapshot(desk.project.layout.root) == before


def test_what_a_file_system_is_is_read_from_the_mounts(tmp_path):
    table = (
        "/dev/sda / ext4 rw 0 0\ntmpfs /run tmpfs rw 0 0\nramfs /run/my\\040own ramfs rw 0 0\nx /run/disk xfs rw 0 0\n"
    )
    kinds = {"/": "ext4", "/home/x": "ext4", "/run": "tmpfs", "/run/user/0": "tmpfs", "/run/my own/x": "ramfs"}
    assert {folder: edit.file_system(Path(folder), table) for folder in kinds} == kinds
    assert edit.file_system(Path("/run/disk/x"), table) == "xfs"
    assert edit.file_system(Path("/runner"), table) == "ext4"
    assert edit.folders_in_memory({"XDG_RUNTIME_DIR": str(tmp_path)}, tmp_path / "none") == []
    assert edit.folders_in_memory({"XDG_RUNTIME_DIR": "not/absolute"})  # there is /dev/shm on every machine we test on


def test_the_command_line_says_no_change_or_what_was_updated(desk):
    def command(script):
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, str(desk.project.layout.root), NAME],
            env=desk.environ(script),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    done = command("true")
    assert (done.returncode, done.stdout) == (0, f"no change secrets/hosts/alpha/{NAME}.yaml\n")
    done = command('echo canary-new > "$1"')
    assert (done.returncode, done.stdout) == (0, f"updated secrets/hosts/alpha/{NAME}.yaml\n")
    done = command('echo "<FILL_ME>" > "$1"')
    assert done.returncode == 1
    assert "what was typed is discarded" in done.stderr
    assert desk.value() == "canary-new"
