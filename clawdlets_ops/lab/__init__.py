"""The lab: the whole workflow on one Linux machine, without an account.

An emulator of the Hetzner Cloud API on loopback whose servers are systemd machines and whose firewalls are nftables.
Production code never imports this package; tests and `clawdlets lab` do. ``Scenario`` is for tests of your own; it is looked
up when first asked for, as the lab's own small programs must start fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clawdlets_ops.lab.scenario import Scenario

__all__ = ["Scenario"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.scenario"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
