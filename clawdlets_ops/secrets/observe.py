"""What lies in the repository, host by host, and what of it no host needs. Reads; writes nothing."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from clawdlets_ops.age import Identity
from clawdlets_ops.errors import SecretsError
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.keypairs import age_pair, ssh_pair
from clawdlets_ops.secrets.plan import Need, needs, value_fault
from clawdlets_ops.secrets.seen import load_seen
from clawdlets_ops.secrets.status import AGE_KEY, SSH_KEY, Expected, Observed, Row, rows
from clawdlets_ops.secrets.vault import (
    Plaintext,
    declared_host,
    find_operator_identity,
    host_readers,
    next_host,
    open_all,
    operators_of,
    read_all,
    single,
)
from clawdlets_ops.secrets.view import View
from clawdlets_ops.sops import Sops, find_sops

KEY_SUFFIXES = (".agekey.yaml", ".age.pub", ".ssh_host_ed25519_key.yaml", ".ssh_host_ed25519_key.pub")


def status(project: Project, hosts: Collection[str] = (), *, runner: Runner) -> list[Row]:
    """Every secret of ``hosts`` (all of the fleet, and those that left it, when none is named) and its state.

    sops runs only for files that have changed since init, set or reconcile last looked at them.
    """
    for host in hosts:
        project.fleet.host(host)
    operators = operators_of(project)
    views = {host: look(project, host, operators, runner=runner) for host in hosts or sorted(project.fleet.hosts)}
    expected = [item for host, (view, _) in views.items() for item in _expected(view)]
    observed: dict[str, Observed] = {}
    for view, broken in views.values():
        observed |= _observe(view, broken)
    names = {recipient: name for name, recipient in operators.items()}
    for host in project.fleet.hosts:
        if recipient := declared_host(project.layout, host):
            names[recipient] = f"host {host}"
        if coming := next_host(project.layout, host):
            names.setdefault(coming, f"host {host} (next key)")
    stale = [(host, _name(project.layout, path)) for host, path in unneeded(project, hosts) if path.suffix == ".yaml"]
    for _, path in unneeded(project, hosts):
        found, faults = read_all([path] if path.suffix == ".yaml" else [])
        observed |= {_name(project.layout, path): Observed(sealed.recipients) for path, sealed in found.items()}
        observed |= {_name(project.layout, path): Observed(frozenset(), unreadable=fault.what) for fault in faults}
    return rows(expected, stale, observed, names)


def look(
    project: Project, host: str, operators: dict[str, str], *, runner: Runner
) -> tuple[View, dict[Path, SecretsError]]:
    """The host's files, and what is wrong with those that are there and cannot be read at all."""
    layout = project.layout
    found, faults = read_all(
        [layout.host_age_key_file(host), layout.host_ssh_key_file(host), *need_files(project, host)]
    )
    view = View(
        project,
        host,
        Sops(runner, find_sops(runner)),
        load_seen(layout.state_file(f"secrets-{host}")),
        _identity_here(project),
        frozenset(operators.values()),
        found,
    )
    return view, {Path(fault.where): fault for fault in faults}


def need_files(project: Project, host: str) -> dict[Path, Need]:
    """The files that ``host`` must have, each with the secret in it."""
    return {project.layout.secret_file(host, need.name): need for need in needs(host, project.fleet.host(host))}


def unneeded(project: Project, hosts: Collection[str] = ()) -> list[tuple[str, Path]]:
    """Files that no host of the fleet needs, each with the host that it was for.

    Secrets of ``hosts`` that are no longer wired; and, when no host is named, all files of hosts that left the fleet.
    """
    layout = project.layout
    names = hosts or (*sorted(project.fleet.hosts), *hosts_that_left(project))
    found: list[tuple[str, Path]] = []
    for host in names:
        wanted = need_files(project, host) if host in project.fleet.hosts else {}
        found += [(host, path) for path in sorted(layout.host_secrets_dir(host).glob("*.yaml")) if path not in wanted]
    if not hosts:
        for folder in key_folders(layout):
            for suffix in KEY_SUFFIXES:
                of_suffix = [(path.name.removesuffix(suffix), path) for path in sorted(folder.glob(f"*{suffix}"))]
                found += [(host, path) for host, path in of_suffix if host not in project.fleet.hosts]
    return found


def hosts_that_left(project: Project) -> list[str]:
    """Hosts that have a folder of secrets and are not in the fleet."""
    folders = project.layout.host_secrets_dir("any").parent.glob("*")
    return sorted(
        path.name
        for path in folders
        if path.name not in project.fleet.hosts and path.is_dir() and not path.is_symlink()
    )


def key_folders(layout: Layout) -> list[Path]:
    """Where the hosts' keys are: present ones, and the next and the old ones of rotations."""
    ways = (layout.host_age_public_key, layout.host_next_age_public_key, layout.host_old_age_public_key)
    return [way("any").parent for way in ways]


def payloads_that_left(project: Project) -> list[Path]:
    """Install payloads, with private keys in clear, of hosts that are not in the fleet."""
    found = project.layout.extra_files("any").parent.glob("*")
    return sorted(path for path in found if path.name not in project.fleet.hosts and not path.name.startswith("."))


def _identity_here(project: Project) -> Identity | None:
    """The operator's identity; None also where only the public half is: a look needs no key."""
    if not project.layout.operator_key(project.operator).exists():
        return None
    return find_operator_identity(project)


def _expected(view: View) -> list[Expected]:
    layout, host = view.layout, view.host
    recipient = declared_host(layout, host)
    keys = [(AGE_KEY, layout.host_age_key_file(host)), (SSH_KEY, layout.host_ssh_key_file(host))]
    expected = [
        Expected(host, name, "host-key", "the host's identity", view.name(path), view.operators) for name, path in keys
    ]
    for path, need in need_files(view.project, host).items():
        readers = view.operators | host_readers(layout, host, recipient) if recipient else None
        expected.append(Expected(host, need.name, need.kind, need.why, view.name(path), readers))
    return expected


def _observe(view: View, faults: dict[Path, SecretsError]) -> dict[str, Observed]:
    """Every file that is there. Decrypted are those of which the record says nothing and that this operator can open."""
    unknown = [path for path in view.found if view.entry(path) is None]
    strangers = {Path(fault.where): fault for fault in view.not_ours(unknown)}
    opened: dict[Path, Plaintext] = {}
    more: list[SecretsError] = []
    if view.operator:
        ours = [view.found[path] for path in unknown if path not in strangers]
        opened, more = open_all(view.sops, ours, view.operator)
    needed = need_files(view.project, view.host)
    unreadable = {**faults, **strangers, **{Path(fault.where): fault for fault in more}}
    observed = {view.name(path): Observed(frozenset(), unreadable=fault.what) for path, fault in unreadable.items()}
    for path, sealed in view.found.items():
        closed = unreadable[path].what if path in unreadable else ""
        unusable = "" if closed else _unusable(view, path, needed.get(path), opened.get(path))
        observed[view.name(path)] = Observed(sealed.recipients, unreadable=closed, unusable=unusable)
    return observed


def _unusable(view: View, path: Path, need: Need | None, plaintext: Plaintext | None) -> str:
    """Why what is in the file cannot be used; empty when it can. A file with a record was usable when that was made."""
    try:
        if need:
            return value_fault(need, single(view.found[path], plaintext, need.name)) or "" if plaintext else ""
        pair = age_pair(view, ()) if path == view.layout.host_age_key_file(view.host) else ssh_pair(view)
        entry = view.entry(path)
        public = pair.public_in(view.found[path], plaintext) if plaintext else entry.public if entry else ""
        if pair.declared not in (None, public):
            return f"is not the private half of {pair.public_file.name}"
    except SecretsError as error:
        return error.what
    return ""


def _name(layout: Layout, path: Path) -> str:
    return path.relative_to(layout.root).as_posix()
