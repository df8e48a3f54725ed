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
from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.project import Project


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
    """SSH as exposed as declared, at the edge and on the host."""
    yield from _stage("lockdown")


@operation()
def verify() -> Generator[FunctionCommand, None, None]:
    """The shipped suite against the host. It changes nothing, so it is never counted as a change; it fails the host."""
    project, tools, name = _of(current_host)
    if not current_state.is_executing:
        _log("verify: runs after the other stages")
        return
    try:
        outcome = workflow.apply("verify", project, name, tools)
    except ClawdletsError as error:
        yield _failure(error)
    else:
        _log(f"verify: {outcome.text}")


def _stage(stage: str) -> Generator[FunctionCommand, None, None]:
    project, tools, name = _of(current_host)
    try:
        planned = workflow.plan(stage, project, name, tools)
    except ClawdletsError as error:
        if not current_state.is_executing:
            _log(f"{stage}: {error}")
        yield _failure(error)
        return
    if planned.empty:
        current_host.noop(f"{stage}: nothing to do")
        return
    if not current_state.is_executing:
        for step in planned.steps:
            _log(f"{stage} would {step}")
    yield FunctionCommand(_apply, (stage,), {})


def _apply(state: Any, host: Any, stage: str) -> bool:
    """Apply a stage inline; False fails the host, after one clear message."""
    del state
    project, tools, name = _of(host)
    try:
        outcome = workflow.apply(stage, project, name, tools)
    except ClawdletsError as error:
        host.log(f"{stage}: {error}", log_func=logger.error)
        return False
    host.log(f"{stage}: {outcome.text} ({outcome.duration_s:.1f} s)")
    return True


def _of(host: Any) -> tuple[Project, workflow.Tools, str]:
    """Project, tools and fleet name of a pyinfra host; ``--data reinstall=alpha,beta`` names hosts that may be wiped."""
    named = frozenset(str(host.data.get("reinstall") or "").split(",")) - {""}
    return replace(host.data.clawdlets_project, reinstall=named), host.data.clawdlets_tools, host.data.clawdlets_host


def _failure(error: ClawdletsError) -> FunctionCommand:
    def fail(state: Any, host: Any) -> bool:
        del state
        host.log(str(error), log_func=logger.error)
        return False

    return FunctionCommand(fail, (), {})


def _log(text: str, log_func: Callable[[str], Any] = logger.info) -> None:
    current_host.log(text, log_func=log_func)
