"""The hooks: they stop a commit and a push, and leave what was there."""

import pytest

from clawdlets_ops.guard import hooks
from clawdlets_ops.guard.gitobjects import Repository
from clawdlets_ops.process import LocalRunner
from tests.guard_corpus import Maker
from tests.integration.guard.desk import ENVIRON, RUNNER

pytestmark = pytest.mark.integration


def repository(folder):
    return Repository(RUNNER, folder, {})


def test_hooks_stop_a_commit_and_a_push_from_any_directory(git, program, tmp_path):
    git.commit("deep/er/README.md")
    first = hooks.install(repository(git.folder), [str(program)], ".")
    assert [change.done for change in first] == ["installed", "installed"]
    again = hooks.install(repository(git.folder / "deep/er"), [str(program)], ".")
    assert [change.done for change in again] == ["unchanged", "unchanged"]
    deep = git.folder / "deep/er"
    git.write("deep/er/a.txt", Maker().tailscale())
    git("add", "-A")
    refused = git("commit", "-m", "x", ok=False, folder=deep)
    assert refused.returncode == 1
    assert "tailscale-key" in refused.stdout + refused.stderr
    git("commit", "-q", "-m", "x", "--no-verify")
    bare = tmp_path / "bare.git"
    git("init", "-q", "--bare", str(bare))
    git("remote", "add", "origin", str(bare))
    pushed = git("push", "-q", "origin", "main", ok=False, folder=deep)
    assert pushed.returncode == 1
    assert "tailscale-key" in pushed.stdout + pushed.stderr
    git("reset", "-q", "--hard", "HEAD~1")
    git("push", "-q", "origin", "main")
    # a commit of named files has an index of its own, and that is the one which counts
    git.write("clean.txt", "x\n")
    git.write("dirty.txt", Maker().tailscale())
    git("add", "-A")
    git("commit", "-q", "-m", "only the clean one", "clean.txt")
    assert git("commit", "-q", "-m", "the other", "dirty.txt", ok=False).returncode == 1
    # a linked worktree shares the hooks
    git("reset", "-q", "--hard")
    git("worktree", "add", "-q", str(tmp_path / "tree"), "-b", "side")
    (tmp_path / "tree" / "a.txt").write_text(Maker().tailscale())
    git("add", "a.txt", folder=tmp_path / "tree")
    assert git("commit", "-q", "-m", "x", ok=False, folder=tmp_path / "tree").returncode == 1
    assert [change.done for change in hooks.remove(repository(tmp_path / "tree"))] == ["removed", "removed"]
    assert not (git.folder / ".git/hooks/pre-commit").exists()


def test_a_hook_that_was_there_runs_first_and_comes_back(git, program):
    git("config", "core.hooksPath", "my hooks")
    mine = git.write(
        "my hooks/pre-commit", '#!/bin/sh\necho ran >> "$(git rev-parse --show-toplevel)/ran"\ntest ! -e stop\n'
    )
    mine.chmod(0o755)
    before = mine.read_bytes()
    hooks.install(repository(git.folder), [str(program)], ".")
    hooks.install(repository(git.folder), [str(program)], ".")
    assert mine.read_bytes() != before
    git("add", "-A")
    git("commit", "-q", "-m", "x")
    assert (git.folder / "ran").read_text() == "ran\n"
    git.write("stop", "")
    assert git("commit", "-q", "--allow-empty", "-m", "x", ok=False).returncode == 1
    (git.folder / "stop").unlink()
    done = [change.done for change in hooks.remove(repository(git.folder))]
    assert done == ["restored", "removed"]
    assert mine.read_bytes() == before
    assert mine.stat().st_mode & 0o777 == 0o755
    assert [change.done for change in hooks.remove(repository(git.folder))] == ["absent", "absent"]
    assert mine.read_bytes() == before


def test_hooks_refuse_when_clawdlets_is_gone_and_where_they_would_hold_for_others(git, program, tmp_path):
    git.write("a.txt", "x\n")
    git("add", ".")
    hooks.install(repository(git.folder), [str(tmp_path / "gone")], ".")
    refused = git("commit", "-q", "-m", "x", ok=False, PATH="/usr/bin:/bin")
    assert refused.returncode == 1
    assert "nothing was scanned" in refused.stderr
    elsewhere = tmp_path / "gitconfig"
    elsewhere.write_text(f"[core]\n\thooksPath = {tmp_path}/all\n")
    runner = LocalRunner({**ENVIRON, "HOME": str(tmp_path)})
    (tmp_path / ".gitconfig").write_text(elsewhere.read_text())
    with pytest.raises(Exception, match="for all repositories"):
        hooks.install(Repository(runner, git.folder, {}), [str(program)], ".")
    assert not (tmp_path / "all").exists()
