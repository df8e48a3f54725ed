"""The git hooks that run the scan: pre-commit over what is staged, pre-push over what is sent.

They lie where git looks for hooks (``core.hooksPath`` or the folder that all worktrees share). A hook that was there is
kept beside ours and runs first; removal puts it back. Source: githooks(5), git-config(1) ``core.hooksPath``.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clawdlets_ops.errors import ClawdletsError, SettingsError
from clawdlets_ops.files import ensure_dir, write_atomic
from clawdlets_ops.guard.gitobjects import Repository

MARK = "# written by: clawdlets guard install"
KEPT = ".before-clawdlets"
HOOKS = ("pre-commit", "pre-push")
_HOOK_MODE = 0o755
_SCAN = {
    "pre-commit": 'exec "$@" guard scan --staged',
    "pre-push": 'printf "%s\\n" "$updates" | "$@" guard scan --pushed "$remote"',
}


@dataclass(frozen=True)
class Change:
    """What was done to one hook: ``installed``, ``updated``, ``unchanged``, ``removed``, ``restored`` or ``absent``."""

    hook: Path
    done: str


def script(hook: str, program: Sequence[str], project: str) -> str:
    """The text of ``hook``. ``program`` are the words that start clawdlets; ``project`` is relative to the work tree."""
    words = shlex.join([*program, "--project", project])
    reads = (
        "updates=$(cat)\n# an address may hold a password, which must not get onto a command line\ncase $1 in *:*) remote= ;; *) remote=$1 ;; esac\n"
        if hook == "pre-push"
        else ""
    )
    chained = 'printf "%s\\n" "$updates" | "$kept" "$@" || exit $?' if hook == "pre-push" else '"$kept" "$@" || exit $?'
    return f"""#!/bin/sh
{MARK}
# Remove with: clawdlets guard install --remove
{reads}kept="$0{KEPT}"
if [ -x "$kept" ]; then
  {chained}
fi
set -- {words}
if ! command -v "$1" >/dev/null 2>&1; then
  set -- clawdlets --project {shlex.quote(project)}
fi
if ! command -v "$1" >/dev/null 2>&1; then
  echo "{hook}: clawdlets is not on PATH, so nothing was scanned and nothing is let through" >&2
  exit 1
fi
{_SCAN[hook]}
"""


def install(repository: Repository, program: Sequence[str], project: str) -> list[Change]:
    """Put the hooks in place; again, it changes nothing. SettingsError when they would hold for other repositories too."""
    folder = _folder(repository)
    ensure_dir(folder, 0o755)
    changes: list[Change] = []
    for name in HOOKS:
        hook, kept, wanted = folder / name, folder / f"{name}{KEPT}", script(name, program, project)
        was = _ours(hook)
        if was is None and os.path.lexists(hook):
            if os.path.lexists(kept):
                raise SettingsError(
                    "there is another hook, and one that was kept before",
                    where=str(hook),
                    fix=f"remove the one of {hook.name} and {kept.name} that is not wanted",
                )
            os.rename(hook, kept)
        wrote = was != wanted or hook.stat().st_mode & 0o777 != _HOOK_MODE
        if wrote:
            write_atomic(hook, wanted, mode=_HOOK_MODE)
        changes.append(Change(hook, "unchanged" if not wrote else "updated" if was is not None else "installed"))
    return changes


def remove(repository: Repository) -> list[Change]:
    """Take our hooks away and put back what was there; a hook that is not ours stays."""
    folder = _folder(repository)
    changes: list[Change] = []
    for name in HOOKS:
        hook, kept = folder / name, folder / f"{name}{KEPT}"
        if _ours(hook) is None:
            changes.append(Change(hook, "absent"))
        elif os.path.lexists(kept):
            os.replace(kept, hook)
            changes.append(Change(hook, "restored"))
        else:
            hook.unlink()
            changes.append(Change(hook, "removed"))
    return changes


def present(repository: Repository) -> tuple[Path, frozenset[str]]:
    """Where git looks for hooks, and which of ours are there and can be run. SettingsError as for ``install``."""
    folder = _folder(repository)
    ours = (name for name in HOOKS if _ours(folder / name) is not None and os.access(folder / name, os.X_OK))
    return folder, frozenset(ours)


def _folder(repository: Repository) -> Path:
    configured = repository.config("core.hooksPath")
    if configured and configured[0] not in ("local", "worktree", "command"):
        raise SettingsError(
            f"core.hooksPath is set for all repositories ({configured[0]}: {configured[1]})",
            where="git config",
            fix="set one for this repository (git config core.hooksPath .githooks), then install again",
        )
    folder = repository.hooks_dir()
    if configured and not Path(configured[1]).expanduser().is_absolute():
        folder = repository.top / configured[1]  # git takes it relative to where hooks run
    if folder.exists() and not folder.is_dir():
        raise ClawdletsError(
            "is where git looks for hooks, and is no folder", where=str(folder), fix="unset core.hooksPath"
        )
    return folder


def _ours(hook: Path) -> str | None:
    """The text of the hook when we wrote it."""
    if hook.is_symlink() or not hook.is_file():
        return None
    text = hook.read_bytes().decode("utf-8", "replace")
    return text if MARK in text.splitlines()[:2] else None
