"""A host's secrets in the repository: made once, kept as they are, changed only by a new value or a new reader.

Everything is read before anything is written, every encryption is done in memory before the first file is touched, and
private halves are written before public ones, so that a run that was killed anywhere is finished by the next one.
Encrypted files are 0600 although they are safe to commit: whoever else uses this machine has no need even of the
ciphertext, which can be kept until a key leaks.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from clawdlets_ops import hostkey
from clawdlets_ops.age import Identity
from clawdlets_ops.errors import SecretsError
from clawdlets_ops.files import (
    PRIVATE_DIR,
    PRIVATE_FILE,
    ensure_dir,
    locked,
    read_private,
    sweep_temporaries,
    write_atomic,
)
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.plan import needs, parse_values
from clawdlets_ops.secrets.reconcile import InitPlan, Target, reconcile, value_fault
from clawdlets_ops.secrets.seen import Entry
from clawdlets_ops.secrets.vault import (
    SOPS_AT_ONCE,
    SSH_SECRET,
    declared_host,
    declared_operators,
    host_ssh_pin,
    identity_in,
    open_all,
    operator_identity,
    raise_faults,
    read_all,
    single,
)
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops

__all__ = [
    "InitOutcome",
    "check_host",
    "host_ssh_pin",
    "init_host",
    "operator_identity",
    "parse_values",
    "plan_host",
    "read_values",
]

T = TypeVar("T")

PUBLIC_DIR = 0o755
WRITABLE_BY_OTHERS = 0o022
LOCK_WAIT_S = 30.0

Write = Callable[..., bool]
"""``files.write_atomic``, or what stands in for it in a test of interruption."""


@dataclass(frozen=True)
class InitOutcome:
    """Files by what happened to them, as paths relative to the project. ``stale`` ones are no longer needed."""

    created: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything was, or would be, written."""
        return bool(self.created or self.updated)


def read_values(path: Path, host: str, *, declared: Collection[str] = ()) -> dict[str, Secret]:
    """The values for ``host`` in a file of mode 0600 that is ours; see ``parse_values`` for its forms.

    SettingsError for a file that is not private, SecretsError for wrong content.
    """
    return parse_values(read_private(path), host, where=str(path), declared=declared)


def plan_host(project: Project, host: str, values: Mapping[str, Secret], *, runner: Runner) -> InitOutcome:
    """What ``init_host`` would do, without doing it; raises what it would raise."""
    plan = reconcile(project, host, values, runner=runner)
    return _outcome(project.layout, plan, [(target.path, target.status()) for target in plan.targets])


def init_host(
    project: Project, host: str, values: Mapping[str, Secret], *, runner: Runner, write: Write = write_atomic
) -> InitOutcome:
    """Bring the host's keys and secrets in the repository to what the fleet declares; a second run changes nothing.

    ``values`` are given by the operator (see ``plan.input_names``); a secret that exists keeps its value when none is
    given. SecretsError names every missing or unacceptable value; UnreadableError every file that exists and cannot be
    decrypted; in both cases nothing has been written. BusyError when another run does not end in time.
    """
    layout = project.layout
    with locked(layout.lock("secrets"), what="the project's secrets", wait_s=LOCK_WAIT_S):
        for folder in _folders(layout, host):
            if folder.is_dir():
                sweep_temporaries(folder)
        plan = reconcile(project, host, values, runner=runner)
        contents = _encrypted(plan.targets, Sops(runner, find_sops(runner)))
        for folder, mode in _folders(layout, host).items():
            ensure_dir(folder, mode)
        statuses: list[tuple[Path, str]] = []
        entries: dict[str, Entry] = {}
        for target, content in zip(plan.targets, contents, strict=True):
            statuses.append((target.path, target.status()))
            write(target.path, content, mode=target.mode)
            if target.entry is not None:
                entries[_name(layout, target.path)] = replace(target.entry, cipher=plan.seen.digest(content))
        write(plan.state_file, plan.seen.to_json(entries), mode=PRIVATE_FILE)
    return _outcome(layout, plan, statuses)


def check_host(project: Project, host: str, *, runner: Runner) -> None:
    """Raise unless the host, with its own key, can use every secret it needs; names all faults at once.

    sops-nix is all or nothing: one file that the host cannot open, and none appears after the first boot. Each file must
    have exactly the declared recipients, open with the host's identity and with the operator's, and hold one usable
    value under its own name. SecretsError; UnreadableError as soon as one file cannot be decrypted.
    """
    layout = project.layout
    operator = operator_identity(project)
    operators = declared_operators(layout)
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
        readers = operators | ({host_identity.recipient} if host_identity and path in need_files else set())
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


def _folders(layout: Layout, host: str) -> dict[Path, int]:
    """Every folder that init writes to, parents first, with its mode.

    Ours are 0700. Those of the repository are as the operator keeps them, but nobody else may write there.
    """
    operator_keys = layout.operator_key("any").parent
    private = [layout.runtime, operator_keys.parent, operator_keys, layout.runtime / "state"]
    keys = layout.operator_recipients_dir.parent
    public = [layout.secrets_dir, keys, layout.operator_recipients_dir, layout.host_age_key_file(host).parent]
    public += [layout.host_secrets_dir(host).parent, layout.host_secrets_dir(host)]
    modes = {path: stat.S_IMODE(path.stat().st_mode) & ~WRITABLE_BY_OTHERS for path in public if path.is_dir()}
    return dict.fromkeys(private, PRIVATE_DIR) | {path: modes.get(path, PUBLIC_DIR) for path in public}


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


def _outcome(layout: Layout, plan: InitPlan, statuses: list[tuple[Path, str]]) -> InitOutcome:
    def those(wanted: str) -> tuple[str, ...]:
        return tuple(_name(layout, path) for path, status in statuses if status == wanted)

    stale = tuple(_name(layout, path) for path in plan.stale)
    return InitOutcome(those("created"), those("updated"), those("unchanged"), stale)
