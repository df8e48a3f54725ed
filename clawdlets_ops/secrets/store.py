"""A host's secrets in the repository: made once, kept as they are, changed only by a new value or a new reader.

Everything is read before anything is written, every encryption is done in memory before the first file is touched, and
private halves are written before public ones, so that a run that was killed anywhere is finished by the next one.
Encrypted files are 0600 although they are safe to commit: whoever else uses this machine has no need even of the
ciphertext, which can be kept until a key leaks.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from clawdlets_ops import hostkey
from clawdlets_ops.age import Identity
from clawdlets_ops.errors import SecretsError
from clawdlets_ops.files import PRIVATE_DIR, PRIVATE_FILE, locked, read_private
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.disk import Disk
from clawdlets_ops.secrets.init import plan_init
from clawdlets_ops.secrets.observe import key_folders
from clawdlets_ops.secrets.plan import needs, parse_values, value_fault
from clawdlets_ops.secrets.seen import Entry
from clawdlets_ops.secrets.vault import (
    SOPS_AT_ONCE,
    SSH_SECRET,
    declared_host,
    host_readers,
    host_ssh_pin,
    identity_in,
    open_all,
    operator_identity,
    operators_of,
    raise_faults,
    read_all,
    single,
)
from clawdlets_ops.secrets.view import Plan, Target
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops

__all__ = [
    "Outcome",
    "change",
    "check_host",
    "host_ssh_pin",
    "init_host",
    "operator_identity",
    "outcome_of",
    "parse_values",
    "plan_host",
    "read_values",
]

T = TypeVar("T")

PUBLIC_DIR = 0o755
WRITABLE_BY_OTHERS = 0o022
OURS_IN_STATE = ("secrets-", "payload-")
"""What is written under the lock there. Other hosts of the same run write what they know of the cloud meanwhile."""
LOCK_WAIT_S = 900.0
"""As long as hundreds of hosts of one run take, one after the other, on a slow machine."""

KEY_FOLDERS = (".clawdlets/keys/operators", "secrets/keys/operators")


@dataclass(frozen=True)
class Outcome:
    """Files by what happened to them, as paths relative to the project. ``stale`` ones are no longer needed.

    ``missing`` are secrets that a host needs and nobody has given yet, as ``host/name``.
    """

    created: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything was, or would be, written."""
        return bool(self.created or self.updated or self.removed)


def read_values(path: Path, host: str, *, declared: Collection[str] = ()) -> dict[str, Secret]:
    """The values for ``host`` in a file of mode 0600 that is ours; see ``parse_values`` for its forms.

    SettingsError for a file that is not private, SecretsError for wrong content.
    """
    return parse_values(read_private(path), host, where=str(path), declared=declared)


def plan_host(project: Project, host: str, values: Mapping[str, Secret], *, runner: Runner) -> Outcome:
    """What ``init_host`` would do, without doing it; raises what it would raise."""
    return outcome_of(project.layout, plan_init(project, host, values, runner=runner))


def init_host(
    project: Project, host: str, values: Mapping[str, Secret], *, runner: Runner, disk: Disk | None = None
) -> Outcome:
    """Bring the host's keys and secrets in the repository to what the fleet declares; a second run changes nothing.

    ``values`` are given by the operator (see ``plan.input_names``); a secret that exists keeps its value when none is
    given. SecretsError names every missing or unacceptable value; UnreadableError every file that exists and cannot be
    decrypted; in both cases nothing has been written. BusyError when another run does not end in time.
    """
    folders = (*KEY_FOLDERS, f"secrets/hosts/{host}")
    plan = partial(plan_init, project, host, values, runner=runner)
    return change(project, plan, runner=runner, disk=disk, folders=folders)


def change(
    project: Project,
    make_plan: Callable[[], Plan],
    *,
    runner: Runner,
    disk: Disk | None = None,
    folders: Iterable[str] = (),
) -> Outcome:
    """Hold the project's lock, plan, and do what the plan says. Nobody else changes anything in between.

    ``folders``, relative to the project, exist afterwards even if nothing is in them. A run that was cut off left only
    whole files and temporary ones, which go before the plan is made.
    """
    layout, disk = project.layout, disk or Disk()
    try:
        with locked(layout.lock("secrets"), what="the project's secrets", wait_s=LOCK_WAIT_S):
            for folder, prefixes in _swept(layout):
                disk.sweep(folder, prefixes)
            plan = make_plan()
            contents = _encrypted(plan.targets, Sops(runner, find_sops(runner)))
            outcome = outcome_of(layout, plan)
            _carry_out(layout, plan, contents, disk, [layout.root / name for name in folders])
    except OSError as error:
        raise SecretsError(
            f"cannot be written: {error.strerror}; every file is whole, but not all are done",
            where=str(error.filename or layout.root),
            fix="put that right and run the same command again",
        ) from error
    return outcome


def _carry_out(layout: Layout, plan: Plan, contents: list[str], disk: Disk, folders: list[Path]) -> None:
    written = [path.parent for path in (*(x.path for x in plan.targets), *(x.path for x in plan.records.values()))]
    for folder, mode in _folders(layout, [*folders, *written]).items():
        disk.ensure_folder(folder, mode)
    entries: dict[str, dict[str, Entry]] = {host: dict(record.kept) for host, record in plan.records.items()}
    for path in plan.first:
        disk.remove(path)
    for target, content in zip(plan.targets, contents, strict=True):
        disk.write(target.path, content, mode=target.mode)
        if target.entry is not None:
            seen = plan.records[target.host].seen
            entries[target.host][_name(layout, target.path)] = replace(target.entry, cipher=seen.digest(content))
    for path in plan.removals:
        disk.remove(path)
    for path in plan.emptied:
        disk.remove_folder(path)
    for path in plan.trees:
        disk.remove_tree(path)
    for host, record in plan.records.items():
        disk.write(record.path, record.seen.to_json(entries[host]), mode=PRIVATE_FILE)


def check_host(project: Project, host: str, *, runner: Runner) -> None:
    """Raise unless the host, with its own key, can use every secret it needs; names all faults at once.

    sops-nix is all or nothing: one file that the host cannot open, and none appears after the first boot. Each file must
    have exactly the declared recipients, open with the host's identity and with the operator's, and hold one usable
    value under its own name. SecretsError; UnreadableError as soon as one file cannot be decrypted.
    """
    layout = project.layout
    operator = operator_identity(project)
    operators = frozenset(operators_of(project).values())
    sops = Sops(runner, find_sops(runner))
    need_files = {layout.secret_file(host, need.name): need for need in needs(host, project.fleet.host(host))}
    age_file, ssh_file = layout.host_age_key_file(host), layout.host_ssh_key_file(host)
    found, faults = read_all([age_file, ssh_file, *need_files])
    known_bad = {fault.where for fault in faults}
    faults += [
        SecretsError("is not there", where=str(path), fix="run secrets init")
        for path in (age_file, ssh_file, *need_files)
        if path not in found and str(path) not in known_bad
    ]
    opened, more = open_all(sops, found.values(), operator)
    faults += more
    host_identity: Identity | None = None
    if age_file in opened:
        host_identity = _collect(faults, lambda: identity_in(found[age_file], opened[age_file]))
        if host_identity and declared_host(layout, host) != host_identity.recipient:
            faults.append(SecretsError("is not the key that the repository declares", where=str(age_file)))
    if ssh_file in opened:
        public = _collect(faults, lambda: hostkey.public_of(single(found[ssh_file], opened[ssh_file], SSH_SECRET)))
        if public and public != _collect(faults, lambda: host_ssh_pin(project, host)):
            faults.append(SecretsError("is not the key that the repository pins", where=str(ssh_file)))
    for path, sealed in found.items():
        readers = operators
        if host_identity and path in need_files:
            readers = operators | host_readers(layout, host, host_identity.recipient)
        if sealed.recipients != readers and (host_identity or path not in need_files):
            odd = ", ".join(sorted(sealed.recipients ^ readers))
            fault = f"is not encrypted to exactly the declared recipients; too many or missing: {odd}"
            faults.append(SecretsError(fault, where=str(path), fix="run secrets init"))
    for path, need in need_files.items():
        if path in opened:
            value = _collect(faults, partial(single, found[path], opened[path], need.name))
            if value and (wrong := value_fault(need, value)):
                faults.append(SecretsError(wrong, where=str(path), fix="give the value and run secrets init"))
    if host_identity:
        by_host, more = open_all(sops, [found[path] for path in need_files if path in found], host_identity)
        faults += more
        faults += [
            SecretsError("the host reads another value than the operator", where=str(path))
            for path in by_host
            if path in opened and by_host[path] != opened[path]
        ]
    raise_faults(faults)


def _collect(faults: list[SecretsError], attempt: Callable[[], T]) -> T | None:
    try:
        return attempt()
    except SecretsError as error:
        faults.append(error)
        return None


def _swept(layout: Layout) -> list[tuple[Path, Sequence[str]]]:
    """Every folder in which an interrupted run may have left something, and how the names begin of what is ours alone there."""
    hosts = layout.host_secrets_dir("any").parent
    whole = [layout.secrets_dir, layout.operator_recipients_dir, *key_folders(layout)]
    whole += [layout.operator_key("any").parent, layout.extra_files("any").parent, *sorted(hosts.glob("*"))]
    swept = [*((folder, ("",)) for folder in whole), (layout.state_file("any").parent, OURS_IN_STATE)]
    return [(folder, prefixes) for folder, prefixes in swept if folder.is_dir() and not folder.is_symlink()]


def _folders(layout: Layout, wanted: Iterable[Path]) -> dict[Path, int]:
    """``wanted`` and what is above them in the project, parents first, each with its mode.

    Ours are 0700. Those of the repository are as the operator keeps them, but nobody else may write there.
    """
    above = {part for path in set(wanted) for part in (path, *path.parents) if layout.root in part.parents}
    modes: dict[Path, int] = {}
    for path in sorted(above):
        if path.is_symlink():
            raise SecretsError("is a link; what is written there would go elsewhere", where=str(path), fix="remove it")
        if path == layout.runtime or layout.runtime in path.parents:
            modes[path] = PRIVATE_DIR
        else:
            modes[path] = stat.S_IMODE(path.stat().st_mode) & ~WRITABLE_BY_OTHERS if path.is_dir() else PUBLIC_DIR
    return modes


def _encrypted(targets: tuple[Target, ...], sops: Sops) -> list[str]:
    """The text of every target, in order; what has to be encrypted is, two at a time."""

    def text(target: Target) -> str:
        if target.content is None:
            return sops.encrypt(target.plaintext, recipients=target.recipients, filename=target.path.name)
        return target.content.reveal() if isinstance(target.content, Secret) else target.content

    with ThreadPoolExecutor(max_workers=SOPS_AT_ONCE) as pool:
        return list(pool.map(text, targets))


def _name(layout: Layout, path: Path) -> str:
    return path.relative_to(layout.root).as_posix()


def outcome_of(layout: Layout, plan: Plan) -> Outcome:
    """What carrying out ``plan`` would be now."""
    by_status: dict[str, list[str]] = {"created": [], "updated": [], "unchanged": []}
    for target in plan.targets:
        by_status[target.status()].append(_name(layout, target.path))
    return Outcome(
        created=tuple(by_status["created"]),
        updated=tuple(by_status["updated"]),
        unchanged=tuple(by_status["unchanged"]),
        removed=tuple(_name(layout, path) for path in (*plan.first, *plan.removals, *plan.trees)),
        stale=tuple(_name(layout, path) for path in plan.stale),
        missing=tuple(f"{host}/{name}" for host, name in plan.missing),
    )
