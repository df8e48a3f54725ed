"""What has to be written so that every file is for exactly the declared readers, and none is there that nobody needs.

A file whose readers change is encrypted anew, whole: a new data key, not ``sops updatekeys``, which keeps the data key
and only wraps it for others. Whoever was taken off the list has seen the old data key, and with it could open every later
version of the file; the new one they have never seen. The cost is the same, one sops process to open and one to close.
Adding a reader does the same, so that there is one way and not two.

Reads the repository and decides; writes nothing. Every fault is found here, before the first write.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from clawdlets_ops import age
from clawdlets_ops.errors import SecretsError
from clawdlets_ops.files import PRIVATE_FILE
from clawdlets_ops.mkpasswd import Mkpasswd
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets import statekey
from clawdlets_ops.secrets.init import check_values, operator_targets, secrets_of
from clawdlets_ops.secrets.keypairs import KeyPair, age_pair, kept_if_any, ssh_pair
from clawdlets_ops.secrets.observe import hosts_that_left, look, need_files, payloads_that_left, unneeded
from clawdlets_ops.secrets.plan import Need, input_names, needs, sops_config, value_fault
from clawdlets_ops.secrets.seen import Entry
from clawdlets_ops.secrets.vault import (
    OPERATOR_SUFFIX,
    declared_host,
    find_operator_identity,
    host_readers,
    open_all,
    operator_identity,
    operators_of,
    raise_faults,
    read_all,
    read_sealed,
    refuse_undeclared,
    single,
)
from clawdlets_ops.secrets.view import PUBLIC_FILE, Plan, Record, Target, View
from clawdlets_ops.sensitive import Secret


def plan_reconcile(
    project: Project,
    hosts: Collection[str] = (),
    *,
    runner: Runner,
    anew: bool = False,
    without: str | None = None,
) -> Plan:
    """Bring the readers of every file to the declared ones; for ``hosts`` only, when some are named.

    ``anew`` encrypts every file again even so; ``without`` leaves out an operator whose key is about to be removed.
    UnreadableError names every file that has to change and cannot be opened by the running operator.
    """
    layout = project.layout
    for host in hosts:
        project.fleet.host(host)
    operators = {name: recipient for name, recipient in operators_of(project).items() if name != without}
    if not operators:
        raise SecretsError(
            "no operator would be left who can read anything",
            where=str(layout.operator_recipients_dir),
            fix="add another operator first (clawdlets secrets operator add), or make the first with secrets init",
        )
    recipients: dict[str, str] = {}
    targets: list[Target] = []
    missing: list[tuple[str, str]] = []
    records: dict[str, Record] = {}
    faults: list[SecretsError] = []
    for host in project.fleet.hosts:
        if hosts and host not in hosts:
            if recipient := declared_host(layout, host):
                recipients[host] = recipient
            continue
        try:
            view, recipient, of_host = _host(project, host, operators, runner=runner, anew=anew)
        except SecretsError as error:
            faults.append(error)
            continue
        if recipient:
            recipients[host] = recipient
        if of_host:
            records[host] = Record(layout.state_file(f"secrets-{host}"), view.seen)
        targets += of_host
        missing += [(host, need.name) for path, need in need_files(project, host).items() if path not in view.found]
    if not hosts:
        try:
            targets += statekey.reconcile_targets(project, operators.values(), runner=runner, anew=anew)
        except SecretsError as error:
            faults.append(error)
    removals = [path for _, path in unneeded(project, hosts)]
    raise_faults([*faults, *_not_encrypted(removals)])
    if recipients or layout.sops_config.exists():
        targets.append(Target(layout.sops_config, PUBLIC_FILE, sops_config(recipients, operators.values())))
    if project.fleet.operators:
        public = operator_targets(project, operators)
        targets = [*public, *targets]
        removals += sorted(
            set(layout.operator_recipients_dir.glob(f"*{OPERATOR_SUFFIX}")) - {target.path for target in public}
        )
    emptied = [] if hosts else [layout.host_secrets_dir(host) for host in hosts_that_left(project)]
    trees = [] if hosts else payloads_that_left(project)
    return Plan(
        tuple(targets),
        removals=tuple(removals),
        emptied=tuple(emptied),
        trees=tuple(trees),
        missing=tuple(missing),
        records=records,
    )


def plan_revoke(project: Project, name: str, *, runner: Runner) -> Plan:
    """Take ``name`` off the operators: first their public key, so that nothing new is for them, then every file.

    SecretsError when the fleet file declares them: the line there is for a person to remove. A name that is no operator
    changes nothing, unless a revocation was cut off: then it is finished.
    """
    if name in project.fleet.operators:
        raise SecretsError(
            f"{name!r} is declared in the fleet file, and would be back with the next reconcile",
            where=f"{project.layout.fleet_file}: operators.{name}",
            fix=f'remove the line "{name}": {{"ageRecipient": "{project.fleet.operators[name].age_recipient}"}}, '
            "then run clawdlets secrets reconcile",
        )
    public = project.layout.operator_recipients_dir / f"{name}{OPERATOR_SUFFIX}"
    declared = operators_of(project)
    if name in declared:
        return replace(plan_reconcile(project, runner=runner, without=name), first=(public,))
    plan = plan_reconcile(project, runner=runner)
    near = difflib.get_close_matches(name, declared, n=1)
    if near and not plan.removals and not plan.trees and all(target.status() == "unchanged" for target in plan.targets):
        raise SecretsError(
            f"there is no operator {name!r}; did you mean {near[0]!r}?",
            where="operators",
            fix=f"declared are: {', '.join(declared)}",
        )
    return plan


def plan_set(project: Project, host: str, name: str, value: Secret, *, runner: Runner) -> Plan:
    """One secret of ``host`` with the new ``value``, for its readers; SecretsError when the value or the name is not
    acceptable or the host has no key yet, UnreadableError when the file is there and cannot be opened."""
    refuse_undeclared(project, find_operator_identity(project))
    needed = needs(host, project.fleet.host(host))
    check_values(needed, {name: value}, host)
    need = input_names(needed)[name]
    path = project.layout.secret_file(host, need.name)
    view, broken = look(project, host, operators_of(project), runner=runner)
    age_file = project.layout.host_age_key_file(host)
    raise_faults([*(fault for where, fault in broken.items() if where in (path, age_file)), *view.not_ours([path])])
    recipient, key_targets = _pair(view, age_pair(view, need_files(project, host)))
    if recipient is None:
        raise SecretsError(f"the host {host!r} has no key yet", where=str(age_file), fix="run secrets init first")
    readers = view.operators | host_readers(project.layout, host, recipient)
    entry = view.entry(path)
    if path in view.found and (entry is None or view.found[path].recipients != readers or name != need.name):
        view.open([path])
    targets = secrets_of(view, {path: need}, {name: value}, readers, Mkpasswd(runner))
    record = Record(project.layout.state_file(f"secrets-{host}"), view.seen, view.seen.entries)
    return Plan((*key_targets, *targets), records={host: record})


def plan_operator(project: Project) -> Plan:
    """The running operator's key pair: made when there is none, its public half put where the others see it.

    In a fleet that declares its operators the public half is not written: the fleet file has to name it.
    """
    layout = project.layout
    identity = find_operator_identity(project)
    targets = []
    if identity is None:
        identity = age.generate()
        targets.append(Target(layout.operator_key(project.operator), PRIVATE_FILE, age.to_key_file(identity)))
    if not project.fleet.operators:
        public = layout.operator_recipients_dir / f"{project.operator}{OPERATOR_SUFFIX}"
        targets.append(Target(public, PUBLIC_FILE, f"{identity.recipient}\n"))
    return Plan(tuple(targets))


def _host(
    project: Project, host: str, operators: dict[str, str], *, runner: Runner, anew: bool
) -> tuple[View, str | None, list[Target]]:
    """The host's files for its declared readers, and its recipient if it has a key."""
    view, broken = look(project, host, operators, runner=runner)
    raise_faults(broken.values())
    wanted = need_files(project, host)
    recipient, targets = _pair(view, age_pair(view, wanted), anew=anew)
    ssh_targets: list[Target] = []
    ssh_file = view.found.get(project.layout.host_ssh_key_file(host))
    if ssh_file is None or anew or ssh_file.recipients != view.operators:  # its public half decides no readers
        _, ssh_targets = _pair(view, ssh_pair(view), anew=anew)
    else:
        ssh_targets = [view.kept(ssh_file, view.operators, view.entry(ssh_file.path))]
    if recipient is None:
        return view, None, ssh_targets
    targets += _next_key(view, anew=anew)
    readers = view.operators | host_readers(project.layout, host, recipient)
    changing = [path for path in wanted if path in view.found and (anew or view.found[path].recipients != readers)]
    raise_faults(view.not_ours(changing))
    view.open(changing)
    secrets = [
        view.kept(view.found[path], readers, _entry(view, path, need), anew=anew)
        for path, need in wanted.items()
        if path in view.found
    ]
    return view, recipient, [*targets, *ssh_targets, *secrets]


def _pair(view: View, pair: KeyPair, *, anew: bool = False) -> tuple[str | None, list[Target]]:
    """A key pair that exists, opened when its readers change or its public half was never compared with it.

    The age key's public half decides who reads the host's secrets: it is believed only when it belongs to the private one.
    """
    sealed = view.found.get(pair.file)
    if sealed and (anew or not view.settled(pair.file, view.operators)):
        raise_faults(view.not_ours([pair.file]))
        view.open([pair.file])
    return kept_if_any(view, pair, anew=anew)


def _next_key(view: View, *, anew: bool) -> list[Target]:
    """The key that a rotation is bringing to the host, for the operators as its present one is."""
    sealed = read_sealed(view.layout.host_next_age_key_file(view.host))
    if sealed is None:
        return []
    if sealed.recipients == view.operators and not anew:
        return [Target(sealed.path, PRIVATE_FILE, sealed.text)]
    opened, faults = open_all(view.sops, [sealed], view.operator or operator_identity(view.project))
    raise_faults(faults)
    return [Target(sealed.path, PRIVATE_FILE, None, opened[sealed.path], view.operators)]


def _entry(view: View, path: Path, need: Need) -> Entry | None:
    """What to remember of a secret that keeps its value: nothing of one that cannot be used, or was not opened."""
    before = view.entry(path)
    if path not in view.opened:
        return before
    try:
        value = single(view.found[path], view.opened[path], need.name)
    except SecretsError:
        return None  # it holds something else; it is kept as it is, for its readers, and secrets status says so
    if value_fault(need, value):
        return None
    return Entry("", view.seen.digest(value), password=before.password if before else "")


def _not_encrypted(paths: Collection[Path]) -> list[SecretsError]:
    """What no host needs and is no sops file either is for a person to look at."""
    _, faults = read_all([path for path in paths if path.suffix == ".yaml"])
    return [
        SecretsError(
            f"no host needs it, but it is no file of ours: {fault.what}", where=fault.where, fix="remove it by hand"
        )
        for fault in faults
    ]
