"""Puts a planned project in place: built whole beside its place, git repository included, then renamed there.

Killed at any moment, the place holds nothing or the complete project. What was being built lies beside it under a name that
only this module makes (``.NAME.<hex>.clawdlets-init``), holds a lock while it is being built, and is removed by the next
run for the same place.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clawdlets_ops.errors import ClawdletsError, SettingsError
from clawdlets_ops.files import write_atomic
from clawdlets_ops.guard import hooks
from clawdlets_ops.guard.gitobjects import Repository
from clawdlets_ops.process import Command, LocalRunner, require_program
from clawdlets_ops.scaffold import Plan

SUFFIX = ".clawdlets-init"
FOLDER_MODE = 0o755
FILE_MODE = 0o644
FIRST_COMMIT = "Start the fleet"


@dataclass(frozen=True)
class Outcome:
    """Where the project is now, whether its files were committed, and what was left to be done, in sentences."""

    root: Path
    committed: bool
    left: tuple[str, ...] = ()


def place_of(target: Path) -> Path:
    """``target`` as an absolute path, its parent's links followed; SettingsError when no project can be put there."""
    parent = target.absolute().parent.resolve()
    place = parent / target.name if target.name not in ("", "..") else target.resolve()
    if place.is_symlink():
        raise SettingsError("is a symbolic link", where=str(target), fix="name the folder itself")
    if not place.parent.is_dir():
        raise SettingsError("there is no such folder to put it into", where=str(place.parent), fix="make it first")
    if place.exists():
        if not place.is_dir():
            raise SettingsError("is there, and is no folder", where=str(target), fix="name another place")
        with _told(place):
            if any(place.iterdir()):
                raise _not_empty(place)
        if os.path.ismount(place):
            raise SettingsError("is where a file system is mounted", where=str(target), fix="name a folder in it")
    return place


def create(
    planned: Plan,
    place: Path,
    *,
    runner: LocalRunner,
    git: bool | None = None,
    commit: bool = True,
    program: Sequence[str] = ("clawdlets",),
    cache: Path | None = None,
) -> Outcome:
    """Make the project at ``place`` (as ``place_of`` gives it). SettingsError, ToolMissingError, CommandError; then nothing is there.

    ``git``: make a repository of it, with the hooks of ``clawdlets guard install``; None for yes, except within another
    repository's work tree, where it has to be said. ``commit``: make the first commit, where git knows who commits.
    ``program``: the words that the hooks start clawdlets with. ``cache``: what ``.cache`` links to.
    """
    with_git = _decide(git, place, runner)
    _sweep(place)
    stage = place.with_name(f".{place.name}.{secrets.token_hex(6)}{SUFFIX}")
    with _told(place):
        stage.mkdir(mode=0o700)
    try:
        with _told(place), _Held(stage):
            for name, text in planned.files.items():
                path = stage / name
                _folders(stage, path.parent)
                write_atomic(path, text, mode=FILE_MODE)
            if cache is not None:
                (stage / ".cache").symlink_to(cache.resolve())
            committed, left = _repository(stage, runner, program, commit=commit) if with_git else (False, ())
            stage.chmod(FOLDER_MODE)
            try:
                stage.rename(place)  # rename(2): replaces an empty folder, and no other
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise _not_empty(place) from None
                raise
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    return Outcome(place, committed, left)


def _decide(git: bool | None, place: Path, runner: LocalRunner) -> bool:
    if git is False:
        return False
    require_program(runner, "git", "install git, or give --no-git")
    if git is None:
        around = runner.run(
            Command(["git", "-C", place.parent, "rev-parse", "--show-toplevel"], "look for a repository")
        )
        if around.ok:
            raise SettingsError(
                f"lies in the work tree of {around.stdout.strip()}",
                where=str(place),
                fix="give --no-git to make it a part of that repository, or --git for one of its own",
            )
    return True


def _repository(
    stage: Path, runner: LocalRunner, program: Sequence[str], *, commit: bool
) -> tuple[bool, tuple[str, ...]]:
    """Whether it was committed, and what was left to be done."""

    def git(*words: str, why: str) -> bool:
        return runner.run(Command(["git", "-C", stage, *words], why)).ok

    runner.run(Command(["git", "init", "--quiet", "--initial-branch=main", stage], "make the repository")).check()
    left = []
    try:
        hooks.install(Repository(runner, stage, {}), program, ".")
    except ClawdletsError as error:
        left.append(
            f"the git hooks are not installed ({error.what}): {error.fix or 'see to that'}, then clawdlets guard install"
        )
    runner.run(Command(["git", "-C", stage, "add", "--all"], "add the project's files")).check()
    if not commit:
        return False, (*left, f"commit: git commit --message '{FIRST_COMMIT}'")
    if not (git("config", "user.name", why="ask who commits") and git("config", "user.email", why="ask who commits")):
        return False, (
            *left,
            f"git knows no user.name and user.email here: set them, then git commit --message '{FIRST_COMMIT}'",
        )
    done = runner.run(
        Command(["git", "-C", stage, "commit", "--quiet", "--message", FIRST_COMMIT], "make the first commit")
    )
    if not done.ok:
        return False, (*left, f"the first commit was refused: {done.tail()}")
    return True, tuple(left)


class _Held:
    """A lock on a folder for as long as this process works in it: what is not held was left by one that was killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


class _told:
    """An OSError on the way becomes a SettingsError that names the place: no room, no permission, read-only."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, ClawdletsError):
            raise SettingsError(
                f"cannot be made: {error.strerror}",
                where=str(self._place),
                fix="nothing was left there; name another place",
            ) from error


def _sweep(place: Path) -> None:
    """Remove what a killed run left beside ``place``; what another run still holds stays."""
    for left in place.parent.glob(f".{glob.escape(place.name)}.*{SUFFIX}"):
        if left.is_symlink() or not left.is_dir():
            continue
        with suppress(OSError), _Held(left):
            shutil.rmtree(left)


def _folders(top: Path, folder: Path) -> None:
    for part in [*reversed(folder.relative_to(top).parents), folder.relative_to(top)]:
        path = top / part
        if path != top and not path.exists():
            path.mkdir()
            path.chmod(FOLDER_MODE)


def _not_empty(place: Path) -> SettingsError:
    return SettingsError("is not empty, and nothing in it was touched", where=str(place), fix="name a new folder")
