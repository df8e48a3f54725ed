"""What this machine has of hosts that run: their payloads, receipts and reports; and the store paths of their systems."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from clawdlets_ops.doctor.bench import walk
from clawdlets_ops.doctor.looking import attempt
from clawdlets_ops.doctor.snapshot import Blind, Deployed, Field, NotHere, Wrong
from clawdlets_ops.doctor.store import Budget, StoreSearch, parse_store, read_listing, search
from clawdlets_ops.errors import CommandError
from clawdlets_ops.guard.needles import Needle
from clawdlets_ops.layout import (
    HOST_AGE_KEY,
    INSTALL_MARKER,
    SECRETS_WIRING,
    SSH_HOST_KEY,
    SSH_HOST_PUBLIC_KEY,
    Layout,
    OnServer,
    secret_file_on_server,
    secrets_dir_on_server,
)
from clawdlets_ops.process import Command, LocalRunner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets import payload
from clawdlets_ops.secrets.plan import needs
from clawdlets_ops.secrets.vault import declared_pin, read_sealed
from clawdlets_ops.ssh import fingerprint

STORE = Path("/nix/store")
NIX_TIMEOUT_S = 60.0


def look_at_field(
    layout: Layout,
    project: Project | Wrong,
    hosts: Collection[str],
    known: Sequence[Needle],
    *,
    runner: LocalRunner,
    closure: Path | None = None,
    budget: Budget | None = None,
) -> Field:
    """Everything of the scope ``deploy`` beyond the bench. ``closure`` is a listing of store paths, or a folder."""
    return Field(
        hosts={host: _deployed(project, host) for host in hosts},
        temporaries=attempt(lambda: _temporaries(layout)),
        closure=_closure(closure, known, budget),
        store=attempt(lambda: _store(runner, known, budget)),
    )


def _deployed(project: Project | Wrong, host: str) -> Deployed | Blind:
    if isinstance(project, Wrong):
        return Blind(project.why)
    return attempt(
        lambda: Deployed(
            repo_digest=attempt(lambda: _repo_digest(project, host)),
            payload_digest=_payload_digest(project.layout, host),
            installed_digest=_installed_digest(project.layout, host),
            receipt_key=_receipt_key(project.layout, host),
            pin_fingerprint=_pin_fingerprint(project.layout, host),
            odd=_odd(project, host),
            verified=_verified(project.layout, host),
        )
    )


# --- payload ---


def _repo_digest(project: Project, host: str) -> str:
    """The digest of the host's encrypted files and their wiring, as the repository has them; CommandError."""
    needed = needs(host, project.fleet.host(host))
    files = {need.name: read_sealed(project.layout.secret_file(host, need.name)) for need in needed}
    if missing := [name for name, sealed in files.items() if sealed is None]:
        raise CommandError(f"lacks {', '.join(missing)}", where=host)
    return payload.set_digest(
        payload.wiring(host, needed), {name: sealed.text for name, sealed in files.items() if sealed}
    )


def _payload_digest(layout: Layout, host: str) -> str | NotHere | Wrong:
    """The same of the tree as it lies here."""
    tree = layout.extra_files(host)
    if not os.path.lexists(tree):
        return NotHere("there is no payload here")
    folder = tree / secrets_dir_on_server(host).path.relative_to("/")
    try:
        files = {path.stem: path.read_bytes().decode() for path in sorted(folder.glob("*.yaml"))}
        return payload.set_digest((tree / _relative(SECRETS_WIRING)).read_text(encoding="utf-8"), files)
    except (OSError, UnicodeDecodeError) as error:
        return Wrong(f"the payload cannot be read ({type(error).__name__})")


def _installed_digest(layout: Layout, host: str) -> str | NotHere:
    """The same of the set that the host was installed with, when it is still remembered."""
    record = payload.recorded(layout, host)
    return record.secret_set if record and record.verified else NotHere("no verified installation is remembered")


def _odd(project: Project, host: str) -> tuple[str, ...]:
    """What is in the tree and does not belong there, is missing, or is more open than it may be on the host."""
    tree = project.layout.extra_files(host)
    if tree.is_symlink():
        return ("the tree is a symbolic link",)
    if not tree.is_dir():
        return ()
    own = [HOST_AGE_KEY, SSH_HOST_KEY, SSH_HOST_PUBLIC_KEY, INSTALL_MARKER, SECRETS_WIRING]
    own += [secret_file_on_server(host, need.name) for need in needs(host, project.fleet.host(host))]
    wanted = {_relative(where): where for where in own}
    folders = {parent.as_posix() for name in wanted for parent in Path(name).parents}
    faults, seen = [], set()
    for found in walk(project.layout, tree):
        name = (project.layout.root / found.path).relative_to(tree).as_posix()
        seen.add(name)
        if found.kind == "directory":
            if name not in folders:
                faults.append(f"{name}/ does not belong to it")
        elif name not in wanted or found.kind != "file":
            faults.append(f"{name} does not belong to it")
        elif found.mode != wanted[name].mode:
            faults.append(f"{name} has mode {found.mode:04o} instead of {wanted[name].mode:04o}")
    return (*faults, *(f"{name} is missing" for name in sorted(wanted.keys() - seen)))


def _relative(where: OnServer) -> str:
    return where.path.relative_to("/").as_posix()


def _temporaries(layout: Layout) -> tuple[str, ...]:
    """What interrupted writes left (``files.py`` names them ``.<name>.<hex>.tmp`` and ``.old``), but for
    reports, runs and orders of lockdowns, which hold no secret: what was killed there leaves half a file, and nothing more."""
    found = []
    folders = (layout.reports("any").parent, layout.runs, layout.lockdown_dir("any").parent)
    public = tuple(f"{folder.relative_to(layout.root).as_posix()}/" for folder in folders)
    for folder in (layout.runtime, layout.secrets_dir):
        if folder.is_dir() and not folder.is_symlink():
            paths = [seen.path for seen in walk(layout, folder)]
            found += [path for path in paths if _is_temporary(path.rpartition("/")[2]) and not path.startswith(public)]
    return tuple(found)


def _is_temporary(name: str) -> bool:
    parts = name.rsplit(".", 2)
    return name.startswith(".") and len(parts) == 3 and parts[2] in ("tmp", "old") and len(parts[1]) == 12


# --- receipts and reports ---


def _receipt_key(layout: Layout, host: str) -> str | NotHere | Wrong:
    path = layout.install_receipt(host)
    name = path.relative_to(layout.root)
    if not path.exists():
        return NotHere("it was not installed from here")
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))["hostKey"]
    except (OSError, ValueError, KeyError, TypeError):
        return Wrong(f"{name} does not say hostKey")
    return value if isinstance(value, str) else Wrong(f"{name} is not as we write it")


def _pin_fingerprint(layout: Layout, host: str) -> str | NotHere:
    pin = declared_pin(layout, host)
    return fingerprint(pin) if pin else NotHere("it has no pinned key")


def _verified(layout: Layout, host: str) -> bool:
    """Whether the payload's record says so, or a report that passed is younger than the receipt."""
    record = payload.recorded(layout, host)
    if record and record.verified:
        return True
    folder, receipt = layout.reports(host), layout.install_receipt(host)
    if not receipt.is_file():
        return False
    installed = receipt.lstat().st_mtime
    for report in folder.glob("*/report.json"):
        info = report.lstat()
        if stat.S_ISREG(info.st_mode) and info.st_mtime >= installed and _passed(report):
            return True
    return False


def _passed(report: Path) -> bool:
    try:
        return bool(json.loads(report.read_text(encoding="utf-8"))["exitCode"] == 0)
    except (OSError, ValueError, KeyError, TypeError):
        return False


# --- store paths ---


def _closure(source: Path | None, known: Sequence[Needle], budget: Budget | None) -> StoreSearch | Blind | NotHere:
    if source is None:
        return NotHere("no listing was given (--closure FILE, as nix path-info --recursive prints it)")
    if not known:
        return Blind("no secret is known here, so nothing can be looked for")
    return attempt(lambda: search(read_listing(source), known, budget=budget))


def _store(runner: LocalRunner, known: Sequence[Needle], budget: Budget | None) -> StoreSearch | Blind | NotHere:
    if runner.which("nix") is None or not STORE.is_dir():
        return NotHere("this machine has no Nix store")
    if not known:
        return Blind("no secret is known here, so nothing can be looked for")
    words = ["--extra-experimental-features", "nix-command", "path-info", "--all", "--json"]
    said = runner.run(Command(["nix", *words], "list the Nix store", timeout_s=NIX_TIMEOUT_S)).check()
    return search(parse_store(said.stdout), known, budget=budget)
