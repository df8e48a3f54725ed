"""clawdlets-ops: deploy fleets of bots on Hetzner Cloud and NixOS, and prove that the hosts are closed.

The layers; imports point left only, and ``tests/test_architecture.py`` holds that::

    base      errors sensitive command process files journal finding lines hostfiles
    model     declared herd bots fleetfile fleet layout project cloud egress
    tools     sops age mkpasswd hostkey tofu hetzner nixos_anywhere ssh tailnet     (siblings never import each other)
    features  secrets/ guard/ provision install/ lockdown verify/ runs/ declare denials orchestrator/
    workflow  workflow rollout/                                                     (the order of the stages; many hosts)
    surfaces  cli clf clf_orchestrator commands/ deploys pyinfra_plugin/ testing lab/

The public names below are looked up when they are first asked for: importing one module does not load the clients of all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clawdlets_ops.errors import ClawdletsError
    from clawdlets_ops.finding import Finding, State
    from clawdlets_ops.fleet import Fleet, Host, load_fleet, parse_fleet
    from clawdlets_ops.project import Project, load_project
    from clawdlets_ops.sensitive import Secret
    from clawdlets_ops.workflow import STAGES, Outcome, StagePlan, Tools, apply, bootstrap, plan, tools_for

_HOME = {
    "errors": ("ClawdletsError",),
    "finding": ("Finding", "State"),
    "fleet": ("Fleet", "Host", "load_fleet", "parse_fleet"),
    "project": ("Project", "load_project"),
    "sensitive": ("Secret",),
    "workflow": ("STAGES", "Outcome", "StagePlan", "Tools", "apply", "bootstrap", "plan", "tools_for"),
}

__all__ = [
    "STAGES",
    "ClawdletsError",
    "Finding",
    "Fleet",
    "Host",
    "Outcome",
    "Project",
    "Secret",
    "StagePlan",
    "State",
    "Tools",
    "apply",
    "bootstrap",
    "load_fleet",
    "load_project",
    "parse_fleet",
    "plan",
    "tools_for",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
