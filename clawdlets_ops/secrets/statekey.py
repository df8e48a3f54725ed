"""The key that OpenTofu's state is encrypted with: one for the project, sops-encrypted to the operators, made on first use."""

from __future__ import annotations

import secrets as randomness
from collections.abc import Collection
from pathlib import Path

from clawdlets_ops.errors import SecretsError, UnreadableError
from clawdlets_ops.files import PRIVATE_FILE
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets import store
from clawdlets_ops.secrets.vault import (
    Sealed,
    open_all,
    operator_identity,
    operators_of,
    raise_faults,
    read_sealed,
    single,
)
from clawdlets_ops.secrets.view import Plan, Target
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops

STATE_KEY = "opentofu_state"
KEY_BYTES = 32


def state_key_file(layout: Layout) -> Path:
    """The encrypted file of the key, below ``secrets/keys``: for the operators, never for a host."""
    return layout.host_age_key_file("any").parent.parent / f"{STATE_KEY}.yaml"


def state_key(project: Project, *, runner: Runner, may_make: bool) -> Secret:
    """The key: 256 random bits in hexadecimal. ``may_make`` when nothing encrypted with an older one can exist.

    SecretsError when there is none and none may be made, UnreadableError when it cannot be opened: it is never replaced.
    """
    path = state_key_file(project.layout)
    sealed = read_sealed(path)
    if sealed is None:
        if not may_make:
            raise UnreadableError(
                "is not there, and OpenTofu's state is encrypted with it",
                where=str(path),
                fix="restore it from git; if it is lost, move the state aside: what exists in the cloud is adopted",
            )
        operator_identity(project)  # whoever makes the key must be able to read it
        store.change(project, lambda: _plan_key(project), runner=runner)
        sealed = read_sealed(path)
    if sealed is None:
        raise SecretsError("was not written", where=str(path))
    return _open(project, sealed, runner)


def reconcile_targets(
    project: Project, operators: Collection[str], *, runner: Runner, anew: bool = False
) -> tuple[Target, ...]:
    """The key's file for exactly these ``operators`` (recipients); nothing when there is none."""
    sealed = read_sealed(state_key_file(project.layout))
    if sealed is None:
        return ()
    readers = frozenset(operators)
    if sealed.recipients == readers and not anew:
        return (Target(sealed.path, PRIVATE_FILE, sealed.text),)
    return (Target(sealed.path, PRIVATE_FILE, None, {STATE_KEY: _open(project, sealed, runner)}, readers),)


def _plan_key(project: Project) -> Plan:
    """The file with a new key; nothing when another run has made it meanwhile."""
    path = state_key_file(project.layout)
    if path.exists():
        return Plan()
    value = Secret(randomness.token_hex(KEY_BYTES), STATE_KEY)
    recipients = frozenset(operators_of(project).values())
    return Plan((Target(path, PRIVATE_FILE, None, {STATE_KEY: value}, recipients),))


def _open(project: Project, sealed: Sealed, runner: Runner) -> Secret:
    opened, faults = open_all(Sops(runner, find_sops(runner)), [sealed], operator_identity(project))
    raise_faults(faults)
    return single(sealed, opened[sealed.path], STATE_KEY)
