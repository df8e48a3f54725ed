"""Facts of a fleet host, for users' own deploys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pyinfra.api.facts import FactBase

from clawdlets_ops.lockdown import EXPOSURE, parse_status


class SshExposure(FactBase[dict[str, Any]]):
    """What the host's own firewall does: ``{"mode": "tailnet", "armed": False}``."""

    def command(self) -> str:
        """The host's own account of it."""
        return f"{EXPOSURE} status"

    def process(self, output: Iterable[str]) -> dict[str, Any]:
        """Parse the one line."""
        status = parse_status("\n".join(output))
        return {"mode": status.mode, "armed": status.armed}
