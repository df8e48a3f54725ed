"""One operation per stage: asks for the plan, yields nothing when it is empty, else the call that applies it.

pyinfra runs an operation's generator twice: to see whether it would change something (that is all that ``--dry`` does),
and to do it. Both times the plan is made afresh.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

from pyinfra import logger
from pyinfra.api.command import FunctionCommand
from pyinfra.api.operation import operation
from pyinfra.context import host as current_host
from pyinfra.context import state as current_state

from clawdlets_ops import workflow
from clawdlets_ops.errors import ClawdletsError, LockdownError
from clawdlets_ops.project import Project
from clawdlets_ops.provision import destroy as run_destroy
from clawdlets_ops.provision import plan_destroy, proof
from clawdlets_ops.pyinfra_plugin import canaries, interrupt


@operation()
def payload() -> Generator[FunctionCommand, None, None]:
    """Secrets checked, and the install payload built from them."""
    yield from _stage("payload")


@operation()
def provision() -> Generator[FunctionCommand, None, None]:
    """The server, its key and its firewall as declared, through OpenTofu."""
    yield from _stage("provision")


@operation()
def install() -> Generator[FunctionCommand, None, None]:
    """NixOS on a fresh server, through nixos-anywhere; never over an installed one."""
    yield from _stage("install")


@operation()
def lockdown() -> Generator[FunctionCommand, None, None]:
    """SSH as exposed as declared, at the edge and on the host. Where ``--data canary=N`` is given, a host is only begun
    when none of the inventory's first N has failed: it is for a lockdown of one host at a time."""
    try:
        if failed := canaries.failed_before(current_state, current_host):
            raise LockdownError(f"was not begun: the canary {', '.join(failed)} is not locked down")
    except ClawdletsError as error:
        yield _failure(error)
        return
    yield from _stage("lockdown")


@operation()
def secrets() -> Generator[FunctionCommand, None, None]:
    """The encrypted secrets of a running host as the repository has them, activated; taken back if that fails."""
    yield from _stage("secrets")


@operation()
def destroy() -> Generator[FunctionCommand, None, None]:
    """Everything of a host in the cloud, and its identity; only of hosts named with ``--data destroy=alpha,beta``."""
    project, tools, name = _of(current_host)
    if name not in _named(current_host, "destroy"):
        current_host.noop(f"destroy: {name} is not named (--data destroy={name})")
        return
    try:
        planned = plan_destroy(project, name, cloud=tools.cloud)
    except ClawdletsError as error:
        yield _failure(error)
        return
    if planned.empty:
        current_host.noop("destroy: nothing is left")
        return
    if not current_state.is_executing:
        for step in planned.steps:
            _log(f"destroy would {step}")
    yield FunctionCommand(_destroy, (), {})


def _destroy(state: Any, host: Any) -> bool:
    """Destroy a named host inline; False fails it, after one clear message."""
    interrupt.end_hosts_on_signals(state)
    project, tools, name = _of(host)
    try:
        with tools.journal.stage(name, "destroy") as say:
            run_destroy(project, name, named=name, runner=tools.runner, cloud=tools.cloud, say=say)
    except ClawdletsError as error:
        host.log(f"destroy: {error}", log_func=logger.error)
        return False
    host.log(f"destroy: {proof(name)}")
    return True


@operation()
def verify() -> Generator[FunctionCommand, None, None]:
    """The shipped suite against the host. It changes nothing, so it is never counted as a change; it fails the host."""
    project, tools, name = _of(current_host)
    if not current_state.is_executing:
        _log("verify: runs after the other stages")
        return
    try:
        outcome = workflow.apply("verify", project, name, _looking(current_host, tools))
    except ClawdletsError as error:
        yield _failure(error)
    else:
        _log(f"verify: {outcome.text}")


def _stage(stage: str) -> Generator[FunctionCommand, None, None]:
    project, tools, name = _of(current_host)
    try:
        planned = workflow.plan(stage, project, name, _looking(current_host, tools))
    except ClawdletsError as error:
        if current_state.is_executing:
            canaries.note_failure(tools.journal.folder, name)
            tools.journal.say(name, stage, "failed", str(error), durationS=0.0)
        else:
            _log(f"{stage}: {error}")
        yield _failure(error)
        return
    if planned.empty:
        if current_state.is_executing:
            tools.journal.say(name, stage, "unchanged", str(planned))
        current_host.noop(f"{stage}: nothing to do")
        return
    if not current_state.is_executing:
        for step in planned.steps:
            _log(f"{stage} would {step}")
    yield FunctionCommand(_apply, (stage,), {})


def _apply(state: Any, host: Any, stage: str) -> bool:
    """Apply a stage inline; False fails the host, after one clear message."""
    interrupt.end_hosts_on_signals(state)
    project, tools, name = _of(host)
    try:
        outcome = workflow.apply(stage, project, name, tools)
    except ClawdletsError as error:
        canaries.note_failure(tools.journal.folder, name)
        host.log(f"{stage}: {error}", log_func=logger.error)
        return False
    finally:
        host.data.clawdlets_snapshot.forget(name)
    host.log(f"{stage}: {outcome.text} ({outcome.duration_s:.1f} s)")
    return True


def _of(host: Any) -> tuple[Project, workflow.Tools, str]:
    """Project, tools and fleet name of a pyinfra host. ``--data reinstall=alpha,beta`` names hosts that may be wiped,
    ``allow_replace=`` those whose server, addresses and volumes may be lost; ``refresh=yes`` asks for the full plan."""
    project = replace(
        host.data.clawdlets_project,
        reinstall=_named(host, "reinstall"),
        allow_replace=_named(host, "allow_replace"),
        refresh=str(host.data.get("refresh") or "").lower() in ("yes", "true", "1"),
    )
    return project, host.data.clawdlets_tools, host.data.clawdlets_host


def _looking(host: Any, tools: workflow.Tools) -> workflow.Tools:
    """The tools for what only looks: the API is asked once for all hosts, and anew for one that was changed."""
    return replace(tools, cloud=host.data.clawdlets_snapshot)


def _named(host: Any, key: str) -> frozenset[str]:
    return frozenset(str(host.data.get(key) or "").split(",")) - {""}


def _failure(error: ClawdletsError) -> FunctionCommand:
    def fail(state: Any, host: Any) -> bool:
        del state
        host.log(str(error), log_func=logger.error)
        return False

    return FunctionCommand(fail, (), {})


def _log(text: str, log_func: Callable[[str], Any] = logger.info) -> None:
    current_host.log(text, log_func=log_func)
