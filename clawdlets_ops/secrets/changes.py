"""What an operator does to the secrets of a running fleet. Each of these can be cut off anywhere and run again."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets.disk import Disk
from clawdlets_ops.secrets.reconcile import plan_operator, plan_reconcile, plan_revoke, plan_set
from clawdlets_ops.secrets.store import KEY_FOLDERS, Outcome, change, outcome_of
from clawdlets_ops.sensitive import Secret


def reconcile(
    project: Project,
    hosts: Collection[str] = (),
    *,
    runner: Runner,
    dry_run: bool = False,
    disk: Disk | None = None,
) -> Outcome:
    """Every file for exactly its declared readers, none that no host needs; a second run changes no byte."""
    plan = partial(plan_reconcile, project, hosts, runner=runner)
    return outcome_of(project.layout, plan()) if dry_run else change(project, plan, runner=runner, disk=disk)


def set_secret(
    project: Project, host: str, name: str, value: Secret, *, runner: Runner, disk: Disk | None = None
) -> Outcome:
    """One secret of one host; nothing is written when it has this value already."""
    return change(project, partial(plan_set, project, host, name, value, runner=runner), runner=runner, disk=disk)


def rotate_data_keys(
    project: Project, hosts: Collection[str] = (), *, runner: Runner, disk: Disk | None = None
) -> Outcome:
    """Every file encrypted anew with a new data key. Values stay; run again after an interruption, it begins anew."""
    return change(project, partial(plan_reconcile, project, hosts, runner=runner, anew=True), runner=runner, disk=disk)


def revoke(project: Project, name: str, *, runner: Runner, disk: Disk | None = None) -> Outcome:
    """Take an operator off; what is encrypted from now on, and everything current, is not for them."""
    return change(project, partial(plan_revoke, project, name, runner=runner), runner=runner, disk=disk)


def add_operator(project: Project, *, runner: Runner, disk: Disk | None = None) -> Outcome:
    """The running operator's key pair, on their own machine; others then run ``reconcile``."""
    return change(project, partial(plan_operator, project), runner=runner, disk=disk, folders=KEY_FOLDERS)
