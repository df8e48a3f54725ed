"""What the clone alone shows: git, the encrypted files, the public keys. Needs no key and no runtime dir."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from clawdlets_ops import age
from clawdlets_ops.doctor.ignored import git_evidence
from clawdlets_ops.doctor.looking import attempt, first_line
from clawdlets_ops.doctor.snapshot import Blind, Hooks, NotHere, Repo, Scan, Wrong
from clawdlets_ops.errors import ClawdletsError, CommandError
from clawdlets_ops.fleet import Fleet
from clawdlets_ops.guard import hooks, sopsfiles
from clawdlets_ops.guard.gitobjects import LINK, REGULAR, Entry, Repository
from clawdlets_ops.guard.needles import Needle
from clawdlets_ops.guard.run import Request, Scope
from clawdlets_ops.guard.run import run as run_guard
from clawdlets_ops.guard.scan import unknown
from clawdlets_ops.guard.sopsfiles import Declared, Fault
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import Project
from clawdlets_ops.scaffold.source import UNLOCATED
from clawdlets_ops.secrets.plan import sops_config
from clawdlets_ops.secrets.vault import OPERATOR_SUFFIX, declared_host, declared_pin, next_host, operators_of

UNREADABLE = "unreadable"
MAX_TREE_BYTES = 2 * 1024**3
"""As much of the work tree is scanned; what is beyond is unknown."""
MAX_TEXT_BYTES = 4 * 1024 * 1024
_LINK = Fault("secrets-not-encrypted", "is a symbolic link", "put the file itself there, encrypted")
_HOST_SUFFIX = ".age.pub"
_REFERRING = frozenset({".nix", ".lock", ".sh", ".bash", ".yml", ".yaml", ".just", ".mk"})
_REFERRING_NAMES = frozenset({"Makefile", "justfile", ".envrc"})


def has_operator_key(layout: Layout) -> bool:
    """Whether this machine has a private key that may open what is under ``secrets/``."""
    return any(layout.operator_key("any").parent.glob("*.agekey"))


def look_at_clone(
    root: Path,
    fleet: Fleet | Wrong,
    project: Project | Wrong,
    *,
    runner: LocalRunner,
    secrets_file: Path | None,
    sealed: tuple[list[Needle], list[str]] | Blind,
) -> Repo:
    """Everything of the scope ``repo``. ``sealed`` are the values of the encrypted files, and what could not be opened."""
    layout = Layout(root)
    repository = attempt(lambda: Repository(runner, root, {}))
    host_keys = {host: _host_key(layout, host) for host in _names(fleet, layout)}
    declared = _declared(layout, project, host_keys)
    values, closed = ([], sealed) if isinstance(sealed, Blind) else (sealed[0], tuple(sealed[1]))
    scan = partial(_scan, root, repository, runner, secrets_file, tuple(values))
    return Repo(
        ignored=attempt(lambda: git_evidence(root, runner=runner)),
        hooks=repository if isinstance(repository, Blind) else attempt(lambda: Hooks(*hooks.present(repository))),
        scans={
            "index": attempt(lambda: scan("tracked")),
            "work tree": attempt(lambda: scan("paths")),
            "history": attempt(lambda: scan("history")),
        },
        sops=attempt(lambda: _sops(layout, declared, repository)),
        sops_config=attempt(lambda: _sops_config(layout, project, host_keys)),
        host_keys=host_keys,
        pins={host: _pin(layout, host) for host in (fleet.hosts if isinstance(fleet, Fleet) else ())},
        operator_keys=_operator_keys(layout),
        not_opened=closed,
        decrypts=isinstance(project, Project) and os.path.lexists(layout.operator_key(project.operator)),
        texts=repository if isinstance(repository, Blind) else attempt(lambda: _texts(repository)),
        flake_lock=_flake_lock(root),
    )


def _names(fleet: Fleet | Wrong, layout: Layout) -> list[str]:
    """Every host that is declared or has a public key here."""
    keys = layout.host_age_public_key("any").parent
    found = {path.name.removesuffix(_HOST_SUFFIX) for path in keys.glob(f"*{_HOST_SUFFIX}")}
    return sorted(found | set(fleet.hosts if isinstance(fleet, Fleet) else ()))


def _host_key(layout: Layout, host: str) -> str | Wrong | NotHere:
    try:
        return declared_host(layout, host) or NotHere("there is no such file")
    except (ClawdletsError, OSError, ValueError) as error:
        return Wrong(_said(error))


def _pin(layout: Layout, host: str) -> str | Wrong | NotHere:
    try:
        return declared_pin(layout, host) or NotHere("there is no such file")
    except (ClawdletsError, OSError, ValueError) as error:
        return Wrong(_said(error))


def _operator_keys(layout: Layout) -> dict[str, str | Wrong]:
    found: dict[str, str | Wrong] = {}
    for path in sorted(layout.operator_recipients_dir.glob(f"*{OPERATOR_SUFFIX}")):
        name = path.name.removesuffix(OPERATOR_SUFFIX)
        try:
            found[name] = age.parse_recipient(path.read_text(encoding="utf-8"), where=str(path))
        except (ClawdletsError, OSError, ValueError) as error:
            found[name] = Wrong(_said(error))
    return found


def _said(error: Exception) -> str:
    return first_line(error) if isinstance(error, ClawdletsError) else f"cannot be read ({type(error).__name__})"


def _declared(layout: Layout, project: Project | Wrong, host_keys: Mapping[str, str | Wrong | NotHere]) -> Declared:
    """Who may read what, as the work tree has it; of a host whose key is being rotated the next key too."""
    hosts = {host: key for host, key in host_keys.items() if isinstance(key, str)}
    coming = {host: key for host in hosts if isinstance(key := attempt(partial(next_host, layout, host)), str)}
    operators = attempt(lambda: operators_of(project)) if isinstance(project, Project) else Blind("")
    if isinstance(operators, Blind):
        return Declared(
            frozenset(key for key in _operator_keys(layout).values() if isinstance(key, str)), hosts, coming
        )
    return Declared(frozenset(operators.values()), hosts, coming)


# --- the guard ---


def _scan(
    root: Path,
    repository: Repository | Blind,
    runner: LocalRunner,
    secrets_file: Path | None,
    values: tuple[Needle, ...],
    scope: Scope,
) -> Scan:
    if isinstance(repository, Blind):
        raise CommandError(repository.why)
    paths, left_out = _unignored(root, repository) if scope == "paths" else ((), 0)
    outcome = run_guard(
        Request(root, scope, paths, secrets_file=secrets_file, more_needles=values), runner=runner, environ={}
    )
    leaks = [leak for leak in outcome.leaks if not leak.allowed]
    if left_out:
        what = f"{left_out} files beyond the first {MAX_TREE_BYTES} bytes were not looked at"
        leaks.append(unknown("work tree", what, fix="remove or ignore what does not belong to the project"))
    return Scan(tuple(leaks), outcome.items, outcome.size_bytes, outcome.needles)


def _unignored(root: Path, repository: Repository) -> tuple[tuple[Path, ...], int]:
    """The files that git would let in, and how many there are beyond the bound."""
    found, size, left_out = [], 0, 0
    for name in repository.unignored(root):
        path = root / os.fsdecode(name)
        try:
            info = path.lstat()
        except OSError:
            continue  # removed, and still in the index, which is scanned by itself
        if stat.S_ISDIR(info.st_mode):
            continue  # a submodule
        size += info.st_size
        if size > MAX_TREE_BYTES:
            left_out += 1
        else:
            found.append(path)
    return tuple(found), left_out


# --- the encrypted files ---


def _sops(layout: Layout, declared: Declared, repository: Repository | Blind) -> dict[str, tuple[Fault, ...]]:
    """Every file below ``secrets/`` on disk and in the index, with what is wrong with it."""
    found: dict[str, tuple[Fault, ...]] = {}
    for below, content in _on_disk(layout.secrets_dir):
        found[below] = _judged(below, content, declared)
    if isinstance(repository, Repository):
        for below, content in _in_index(layout, repository):
            if faults := _judged(below, content, declared):
                found[f"index:{below}"] = faults
            else:
                found.setdefault(below, ())
    return found


def _judged(below: str, content: bytes | Fault, declared: Declared) -> tuple[Fault, ...]:
    return (content,) if isinstance(content, Fault) else tuple(sopsfiles.judge(below, content, declared))


def _on_disk(folder: Path) -> Iterator[tuple[str, bytes | Fault]]:
    if folder.is_symlink():
        yield ".", _LINK
        return
    closed: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=closed.append):
        folders.sort()
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in sorted([*names, *links]):
            path = Path(parent, name)
            below = path.relative_to(folder).as_posix()
            try:
                info = path.lstat()
                if stat.S_ISLNK(info.st_mode):
                    yield below, _LINK
                elif not stat.S_ISREG(info.st_mode) or info.st_size > sopsfiles.MAX_BYTES:
                    yield below, _not_seen("is no regular file, or too large to be judged")
                else:
                    yield below, path.read_bytes()
            except OSError as error:
                yield below, _not_seen(f"cannot be read ({error.strerror})")
    for fault in closed:
        if not isinstance(fault, FileNotFoundError):
            yield str(fault.filename), _not_seen(f"cannot be listed ({fault.strerror})")


def _in_index(layout: Layout, repository: Repository) -> Iterator[tuple[str, bytes | Fault]]:
    prefix = _prefix(layout.root, repository) + "secrets/"
    entries = [entry for entry in repository.tracked() if entry.path.startswith(prefix)]
    by_oid: dict[str, list[Entry]] = {}
    for entry in entries:
        by_oid.setdefault(entry.oid, []).append(entry)
    for found in repository.objects(by_oid):
        content: bytes | Fault = _not_seen("git does not have the object")
        if found.pieces is not None and found.size <= sopsfiles.MAX_BYTES:
            content = b"".join(found.pieces)
        for entry in by_oid[found.oid]:
            below = entry.path.removeprefix(prefix)
            yield below, _LINK if entry.kind == LINK else content


def _prefix(root: Path, repository: Repository) -> str:
    top = repository.top.resolve()
    below = root.relative_to(top).as_posix() if root.is_relative_to(top) else "."
    return "" if below == "." else f"{below}/"


def _not_seen(what: str) -> Fault:
    return Fault(UNREADABLE, what, "make it readable, then look again")


def _sops_config(
    layout: Layout, project: Project | Wrong, host_keys: Mapping[str, str | Wrong | NotHere]
) -> bool | NotHere:
    if isinstance(project, Wrong):
        raise CommandError(project.why)
    hosts = {host: key for host, key in host_keys.items() if isinstance(key, str) and host in project.fleet.hosts}
    if not layout.sops_config.exists() and not hosts:
        return NotHere("no host has a key yet, so nothing is encrypted")
    if missing := sorted(set(project.fleet.hosts) - set(hosts)):
        raise CommandError(f"{', '.join(missing)} without a public key (SOP-07)", where="secrets/.sops.yaml")
    if not layout.sops_config.is_file():
        return False
    return layout.sops_config.read_text(encoding="utf-8") == sops_config(hosts, operators_of(project).values())


# --- what refers to other things ---


def _texts(repository: Repository) -> dict[str, bytes | None]:
    """The tracked files that may hold a flake reference, as the index has them."""
    wanted: dict[str, list[str]] = {}
    for entry in repository.tracked():
        path = PurePosixPath(entry.path)
        if entry.kind == REGULAR and (path.suffix in _REFERRING or path.name in _REFERRING_NAMES):
            wanted.setdefault(entry.oid, []).append(entry.path)
    found: dict[str, bytes | None] = {}
    for each in repository.objects(wanted):
        if each.pieces is None:
            raise CommandError("git does not have the object", where=wanted[each.oid][0])
        content = b"".join(each.pieces) if each.size <= MAX_TEXT_BYTES else None
        found |= dict.fromkeys(wanted[each.oid], content)
    return found


def _flake_lock(root: Path) -> str | Wrong | NotHere:
    lock = root / "flake.lock"
    if not (root / "flake.nix").exists() and not lock.exists():
        return NotHere("the project has no flake.nix")
    try:
        return lock.read_text(encoding="utf-8")
    except FileNotFoundError:
        if _names_no_source(root / "flake.nix"):
            return NotHere("flake.nix does not say yet where clawdlets-ops is, so nothing can be built from it")
        return Wrong("flake.nix has no flake.lock")
    except (OSError, UnicodeDecodeError) as error:
        return Wrong(f"flake.lock cannot be read ({type(error).__name__})")


def _names_no_source(flake: Path) -> bool:
    """Whether the flake still has the input that no name server ever resolves, as ``clawdlets init`` wrote it."""
    try:
        return f'url = "{UNLOCATED}";' in flake.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
