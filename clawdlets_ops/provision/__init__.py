"""Provision: plan (pure) against what the API shows, render, gate, apply through OpenTofu, read back, destroy.

``planning``, ``render`` and ``gate`` are pure; ``applying`` and ``destruction`` act.
"""

from clawdlets_ops.provision.applying import Within, apply, check_binding, plan_for
from clawdlets_ops.provision.destruction import DestroyPlan, destroy, plan_destroy, proof
from clawdlets_ops.provision.observed import Observed
from clawdlets_ops.provision.planning import ProvisionPlan, plan, window_is_open
from clawdlets_ops.provision.render import (
    FIREWALL,
    KEY,
    NEVER_MATCHES,
    SERVER,
    edge_rules,
    firewall_name,
)

__all__ = [
    "FIREWALL",
    "KEY",
    "NEVER_MATCHES",
    "SERVER",
    "DestroyPlan",
    "Observed",
    "ProvisionPlan",
    "Within",
    "apply",
    "check_binding",
    "destroy",
    "edge_rules",
    "firewall_name",
    "plan",
    "plan_destroy",
    "plan_for",
    "proof",
    "window_is_open",
]
