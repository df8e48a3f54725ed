"""What the doctor says of the operator's repository and machine, for the suite: one judgement, asked once for all hosts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from clawdlets_ops.doctor import run as doctor
from clawdlets_ops.doctor.ignored import git_evidence
from clawdlets_ops.doctor.judging import beside
from clawdlets_ops.doctor.looking import attempt
from clawdlets_ops.doctor.observe import observe
from clawdlets_ops.doctor.of_clone import ignored
from clawdlets_ops.doctor.snapshot import Blind, Scope
from clawdlets_ops.hetzner import Cloud
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.verify.catalogue import Check

REPOSITORY = "repository"
IGNORED = "GIT-01"


def is_asked(checks: Collection[Check], only: Sequence[str]) -> bool:
    """Whether one of the checks that are to be made (all, when ``only`` is empty) is about the repository. Pure."""
    return any(check.vantage == REPOSITORY and (not only or check.id in only) for check in checks)


def without(checks: Collection[Check]) -> tuple[str, ...]:
    """The ids of all ``checks`` but those about the repository; GIT-01 stays, which asks git alone. Pure."""
    return tuple(check.id for check in checks if check.vantage != REPOSITORY or check.id == IGNORED)


def diagnose_ignored(project: Project, *, runner: Runner) -> dict[str, Any]:
    """The same as ``diagnose`` for GIT-01 alone, where others may be writing to the runtime dir meanwhile."""
    seen = attempt(lambda: git_evidence(project.layout.root, runner=runner))
    if not isinstance(seen, Blind) and not seen["problem"] and not seen["checkout"]:
        said = beside("the project is not a git checkout")
    else:
        said = ignored(seen)
    found = {"check": IGNORED, "state": str(said.state), "host": "", "observed": said.observed, "fix": ""}
    return {"problem": None, "findings": [found]}


def diagnose(project: Project, hosts: Collection[str], *, cloud: Cloud) -> dict[str, Any]:
    """``{"problem": None, "findings": [{check, state, host, observed, fix}]}``: what the doctor finds, its warnings too."""
    snapshot = observe(project.layout.root, Scope.DEPLOY, project.environ, hosts, cloud_of=lambda _: cloud)
    found = [each.finding for each in doctor.judge(snapshot, Scope.DEPLOY).judged]
    return {
        "problem": None,
        "findings": [
            {"check": one.check, "state": str(one.state), "host": one.host, "observed": one.observed, "fix": one.fix}
            for one in found
        ],
    }
