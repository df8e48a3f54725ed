"""What has to be written so that a host has its keys and every secret it needs.

Reads the repository and decides; writes nothing. Every fault is found here, before the first write.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from clawdlets_ops import age
from clawdlets_ops.errors import SecretsError
from clawdlets_ops.files import PRIVATE_FILE
from clawdlets_ops.mkpasswd import Mkpasswd, check_password, is_crypt_hash
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.keypairs import age_pair, known, made_or_kept, ssh_pair
from clawdlets_ops.secrets.plan import Need, is_placeholder, needs, sops_config, value_fault, value_faults
from clawdlets_ops.secrets.seen import Entry, Seen, load_seen
from clawdlets_ops.secrets.vault import (
    declared_host,
    find_operator_identity,
    host_readers,
    operators_of,
    raise_faults,
    read_all,
    refuse_undeclared,
    single,
)
from clawdlets_ops.secrets.view import PUBLIC_FILE, Plan, Record, Target, View
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops


def plan_init(project: Project, host: str, values: Mapping[str, Secret], *, runner: Runner) -> Plan:
    """Compare what is there with what is declared and given; SecretsError, UnreadableError, ToolMissingError.

    sops runs only for files of which the record of last time says nothing, two processes at a time.
    """
    layout = project.layout
    needed = needs(host, project.fleet.host(host))
    check_values(needed, values, host)
    state_file = layout.state_file(f"secrets-{host}")
    existing = find_operator_identity(project)
    refuse_undeclared(project, existing)
    operator = existing or age.generate()
    operators = {**operators_of(project), project.operator: operator.recipient}
    need_files = {layout.secret_file(host, need.name): need for need in needed}
    key_files = [layout.host_age_key_file(host), layout.host_ssh_key_file(host)]
    found, faults = read_all([*key_files, *need_files])
    view = View(
        project,
        host,
        Sops(runner, find_sops(runner)),
        load_seen(state_file),
        operator,
        frozenset(operators.values()),
        found,
    )
    raise_faults([*faults, *view.not_ours(found)])
    view.open([path for path in key_files if not view.settled(path, view.operators)])
    host_recipient, age_targets = made_or_kept(view, age_pair(view, need_files))
    _, ssh_targets = made_or_kept(view, ssh_pair(view))
    readers = view.operators | host_readers(layout, host, host_recipient)
    view.open([path for path, need in need_files.items() if not _decided(view, path, need, values, readers)])
    secret_targets = secrets_of(view, need_files, values, readers, Mkpasswd(runner))

    others = {name: declared_host(layout, name) for name in project.fleet.hosts if name != host}
    hosts = {name: recipient for name, recipient in others.items() if recipient} | {host: host_recipient}
    targets = [
        *operator_targets(project, operators),
        *age_targets,
        *ssh_targets,
        Target(layout.sops_config, PUBLIC_FILE, sops_config(hosts, view.operators)),
        *secret_targets,
    ]
    if existing is None:
        targets.insert(0, Target(layout.operator_key(project.operator), PRIVATE_FILE, age.to_key_file(operator)))
    stale = sorted(set(layout.host_secrets_dir(host).glob("*.yaml")) - set(need_files))
    return Plan(tuple(targets), stale=tuple(stale), records={host: Record(state_file, view.seen)})


def operator_targets(project: Project, operators: Mapping[str, str]) -> list[Target]:
    """The public halves to write: all of a declared fleet's operators, else only that of the running one."""
    folder = project.layout.operator_recipients_dir
    names = operators if project.fleet.operators else [name for name in operators if name == project.operator]
    return [Target(folder / f"{name}.age.pub", PUBLIC_FILE, f"{operators[name]}\n") for name in names]


def check_values(needed: tuple[Need, ...], values: Mapping[str, Secret], host: str) -> None:
    """SecretsError that names every fault of every value, before anything is made of them."""
    faults = value_faults(needed, values)
    for need in needed:
        given = values.get(need.name)
        if need.password_name and given and not is_placeholder(given.reveal()) and not is_crypt_hash(given.reveal()):
            faults.append(f"{need.name}: is no password hash ($y$, $gy$, $7$, $6$ or $2b$); is it the password itself?")
        password = values.get(need.password_name) if need.password_name else None
        if password:
            try:
                check_password(password)
            except SecretsError as error:
                faults.append(f"{need.password_name}: {error.what}")
    if faults:
        raise SecretsError(
            "\n".join([f"the values for {host} are not acceptable; nothing was written:", *(f"  {x}" for x in faults)]),
            fix="correct the values and run again",
        )


def _decided(view: View, path: Path, need: Need, values: Mapping[str, Secret], readers: frozenset[str]) -> bool:
    """Whether the record answers all there is to ask of ``path``; it cannot compare a password it never saw."""
    entry = view.entry(path)
    unknown_password = entry is not None and need.password_name in values and not entry.password
    return view.settled(path, readers) and not unknown_password


def secrets_of(
    view: View,
    need_files: Mapping[Path, Need],
    values: Mapping[str, Secret],
    readers: frozenset[str],
    mkpasswd: Mkpasswd,
) -> list[Target]:
    """The files of ``need_files`` with the values given, or those they have; SecretsError names all that are missing."""
    targets: list[Target] = []
    missing: list[Need] = []
    faults: list[SecretsError] = []
    for path, need in need_files.items():
        given = values.get(need.name)
        password = values.get(need.password_name) if need.password_name else None
        if path in view.found:
            try:
                entry = _current(view, path, need, password, mkpasswd)
            except SecretsError as error:
                faults.append(error)
                continue
            if entry is not None and _keeps(view.seen, entry, given, password):
                targets.append(view.kept(view.found[path], readers, entry))
                continue
        value = mkpasswd.hash(password) if password else given
        if value is None:
            missing.append(need)
            continue
        entry = Entry("", view.seen.digest(value), password=view.seen.digest(password) if password else "")
        targets.append(Target(path, PRIVATE_FILE, None, {need.name: value}, readers, entry, view.host))
    raise_faults(faults)
    if missing:
        raise _missing(missing, view.host)
    return targets


def _current(view: View, path: Path, need: Need, password: Secret | None, mkpasswd: Mkpasswd) -> Entry | None:
    """What is in the file now; None when it is nothing that could be used (a placeholder, no hash)."""
    if path not in view.opened:
        return known(view, path)
    value = single(view.found[path], view.opened[path], need.name)
    if value_fault(need, value):
        return None
    before = view.entry(path)
    made_of = before.password if before else ""
    if password and not made_of and mkpasswd.matches(password, value):
        made_of = view.seen.digest(password)
    return Entry("", view.seen.digest(value), password=made_of)


def _keeps(seen: Seen, entry: Entry, given: Secret | None, password: Secret | None) -> bool:
    if given is not None:
        return seen.digest(given) == entry.plain
    return password is None or seen.digest(password) == entry.password


def _missing(missing: list[Need], host: str) -> SecretsError:
    lines = [
        f"  {need.name} ({need.why})"
        + (f"; or {need.password_name}, which is then hashed" if need.password_name else "")
        for need in missing
    ]
    return SecretsError(
        "\n".join([f"values are missing for {host}; nothing was written:", *lines]),
        fix='give them as JSON, {"name": "value", …}, in a file of mode 0600 or on standard input',
    )
