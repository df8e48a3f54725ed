"""One scan from beginning to end: where it looks, what it judges by, and what it could not know."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clawdlets_ops.errors import CommandError
from clawdlets_ops.guard import allow, kingfisher, needles, sopsfiles
from clawdlets_ops.guard import scan as scanning
from clawdlets_ops.guard.engine import Engine
from clawdlets_ops.guard.gitobjects import Entry, Repository
from clawdlets_ops.guard.scan import Ground, Item, Leak, Outcome
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import LocalRunner

Scope = Literal["staged", "tracked", "history", "push", "paths"]


@dataclass(frozen=True)
class Request:
    """What to scan. ``root`` is the project; ``paths`` for the scope of that name; ``updates`` and ``remote`` for push.

    ``known_secrets`` decrypts what is under ``secrets/``, one sops process a file, to look for those values too;
    ``more_needles`` are looked for as well: for a caller that has decrypted already.
    """

    root: Path
    scope: Scope
    paths: tuple[Path, ...] = ()
    updates: tuple[str, ...] = ()
    remote: str = ""
    secrets_file: Path | None = None
    second_opinion: bool = False
    known_secrets: bool = False
    more_needles: tuple[needles.Needle, ...] = ()


def run(request: Request, *, runner: LocalRunner, environ: Mapping[str, str]) -> Outcome:
    """Scan; CommandError when ``root`` is in no repository and the scope needs one."""
    root = request.root.resolve()
    try:
        repository = Repository(runner, root, environ)
    except CommandError:
        if request.scope != "paths":
            raise
        return _outside(request, root, runner)
    base = repository.top.resolve()
    inside = root.relative_to(base).as_posix() if root.is_relative_to(base) else "."
    prefix = "secrets/" if inside == "." else f"{inside}/secrets/"
    layouts = [Layout(root)]
    if repository.common_dir.name == ".git":  # in a linked worktree, the runtime directory is in the main one
        layouts.append(Layout(repository.common_dir.parent / inside))
    known, blind = _known(request, layouts, runner)
    tracked = repository.tracked()
    entries, faults = _allowed(repository, tracked, base)
    declared = None if request.scope in ("history", "push") else scanning.declared_in(repository, prefix, tracked)
    ground = Ground(Engine(known), prefix, declared, entries)
    notes: list[str] = []
    items = _items(request, repository, tracked, prefix, base, notes)
    outcome = _scan(request, items, ground, runner, report_unused=request.scope == "tracked")
    outcome.notes += notes
    outcome.leaks += [
        Leak("allow-list", allow.FILE, 0, fault, "an entry needs path, rule, fingerprint, reason") for fault in faults
    ]
    if request.scope == "staged":
        _let_join(outcome, repository)
    outcome.leaks += _blind_spots(request, repository, declared, tracked, prefix)
    return _with_blind(outcome, blind)


def _known(request: Request, layouts: Sequence[Layout], runner: LocalRunner) -> tuple[list[needles.Needle], list[str]]:
    """The secrets to look for by their value, and what of them could not be read."""
    known, blind = needles.known(dict.fromkeys(layouts), request.secrets_file)
    known += request.more_needles
    if request.known_secrets:
        more, faults = needles.decrypted([Layout(request.root.resolve())], runner)
        have = {needle.value.reveal() for needle in known}
        known += [needle for needle in more if needle.value.reveal() not in have]
        blind += faults
    return known, blind


def _outside(request: Request, root: Path, runner: LocalRunner) -> Outcome:
    """Paths that are in no repository: no index to know from who may read what."""
    known, blind = _known(request, [Layout(root)], runner)
    secrets = root / "secrets"
    files = {
        path.relative_to(secrets).as_posix(): path.read_bytes() for path in sorted(secrets.glob("keys/*/*.age.pub"))
    }
    ground = Ground(Engine(known), "secrets/", sopsfiles.Declared.from_files(files))
    items = scanning.file_items(request.paths, root, lambda _: None)
    return _with_blind(_scan(request, items, ground, runner, report_unused=False), blind)


def _scan(
    request: Request, items: Iterable[Item], ground: Ground, runner: LocalRunner, *, report_unused: bool
) -> Outcome:
    if not request.second_opinion:
        return scanning.scan(items, ground, request.scope, report_unused=report_unused)
    with kingfisher.aside(runner) as other:
        outcome = scanning.scan(other.copying(items), ground, request.scope, report_unused=False)
        own = {(leak.path, leak.line) for leak in outcome.leaks}
        outcome.leaks += [leak for leak in other.leaks(ground.allowed) if (leak.path, leak.line) not in own]
        outcome.notes.append(f"second opinion: {other.said}")
    return outcome


def _items(
    request: Request, repository: Repository, tracked: Sequence[Entry], prefix: str, base: Path, notes: list[str]
) -> Iterator[Item]:
    if request.scope == "staged":
        staged = repository.staged()
        changed = [entry.path for entry in staged] + repository.staged_away()
        if any(path.startswith(f"{prefix}keys/") and path.endswith(".age.pub") for path in changed):
            # who may read has changed: every file must be looked at, not only those that change with it
            have = {entry.path for entry in staged}
            staged += [entry for entry in tracked if entry.path.startswith(prefix) and entry.path not in have]
        return scanning.index_items(repository, staged, "staged", notes)
    if request.scope == "tracked":
        return scanning.index_items(repository, tracked, "index", notes)
    if request.scope == "push":
        return scanning.push_items(repository, repository.pushed(request.updates, request.remote))
    if request.scope == "history":
        return scanning.history_items(repository)

    def listing(folder: Path) -> Iterable[bytes] | None:
        if not Path(os.path.abspath(folder)).is_relative_to(base):
            return None
        with suppress(CommandError):
            notes.append(f"{folder}: ignored files are not scanned; name them to have them scanned")
            return repository.unignored(folder.resolve())
        return None

    return scanning.file_items(request.paths, base, listing)


def _allowed(repository: Repository, tracked: Sequence[Entry], base: Path) -> tuple[tuple[allow.Entry, ...], list[str]]:
    """The allow-list of the index: a leave that is not committed with what it is about would hold here only."""
    for entry in tracked:
        if entry.path == allow.FILE:
            return allow.parse(repository.blob(entry.oid))
    if (base / allow.FILE).exists():
        return (), ["is not tracked, so its entries do not count; git add it"]
    return (), []


def _blind_spots(
    request: Request, repository: Repository, declared: sopsfiles.Declared | None, tracked: Sequence[Entry], prefix: str
) -> list[Leak]:
    found = []
    if request.scope == "history" and repository.is_shallow:
        found.append(
            scanning.unknown(
                "history", "this is a shallow clone: older commits are not here", fix="git fetch --unshallow"
            )
        )
    if request.scope == "history" and repository.is_partial:
        found.append(
            scanning.unknown("history", "this is a partial clone: contents are missing", fix="clone without --filter")
        )
    encrypted = any(entry.path.startswith(f"{prefix}hosts/") for entry in tracked)
    if declared is not None and not declared.operators and encrypted:
        found.append(
            scanning.unknown(
                f"{prefix}keys/operators",
                "no operator's public key is in the index, so nobody is known to whom secrets may be encrypted",
                fix=f"git add {prefix}keys/operators/*.age.pub",
            )
        )
    return found


def _let_join(outcome: Outcome, repository: Repository) -> None:
    """A commit that declares a new reader says nothing of the files that it does not touch: another operator reconciles
    them once that commit is there. The next scan of the whole index insists on it."""
    late = {leak.path for leak in outcome.leaks if leak.rule == sopsfiles.MISSING}
    if late and (late := late - {entry.path for entry in repository.staged()}):
        outcome.leaks = [leak for leak in outcome.leaks if leak.rule != sopsfiles.MISSING or leak.path not in late]
        outcome.notes.append(
            f"{len(late)} files under secrets/ cannot be read by everybody declared: "
            "an operator who reads them runs secrets reconcile"
        )


def _with_blind(outcome: Outcome, blind: Iterable[str]) -> Outcome:
    outcome.leaks += [scanning.unknown(fault, "a file with known secrets could not be read") for fault in blind]
    return outcome
