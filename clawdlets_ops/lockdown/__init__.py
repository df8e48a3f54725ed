"""Lockdown: close public SSH at the edge and on the host, only after the way in over the tailnet has been used; and windows.

``plan`` is pure; ``host`` asks and tells the host, ``edge`` the cloud's firewall; ``watchdog`` is the process that puts the
edge back when nobody says that all went well; ``proof`` and ``transaction`` do the lockdown, ``window`` opens a door for a
while. docs/explanation/lockdown.md says how it holds together.
"""

from clawdlets_ops.lockdown.host import (
    EXPOSURE,
    read_account,
    read_status,
    tailnet_addresses,
    tailnet_peer,
)
from clawdlets_ops.lockdown.plan import (
    HostAccount,
    HostExposure,
    LockdownPlan,
    Timing,
    parse_account,
    parse_status,
    plan,
    refuse_short_lived,
)
from clawdlets_ops.lockdown.transaction import LockdownOutcome, apply
from clawdlets_ops.lockdown.window import Window, close_window, open_until, open_window, parse_duration, parse_networks

__all__ = [
    "EXPOSURE",
    "HostAccount",
    "HostExposure",
    "LockdownOutcome",
    "LockdownPlan",
    "Timing",
    "Window",
    "apply",
    "close_window",
    "open_until",
    "open_window",
    "parse_account",
    "parse_duration",
    "parse_networks",
    "parse_status",
    "plan",
    "read_account",
    "read_status",
    "refuse_short_lived",
    "tailnet_addresses",
    "tailnet_peer",
]
