"""Fleets for the tests of the egress policy: every mode of a host with every mode of a bot."""

from __future__ import annotations

import json
from typing import Any

from clawdlets_ops.fleet import Host, parse_fleet

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s canary@example"
BOTS: dict[str, Any] = {
    "free": {"egress": {"mode": "none"}},
    "maren": {},
    "plain": {"egress": {"mode": "smtp-only"}, "limits": {"cpuQuotaPercent": 50}},
    "tight": {
        "execStart": "/usr/bin/tight --serve",
        "environment": {"GREETING": 'a "50 %" \\ day'},
        "egress": {"mode": "proxy-allowlist", "allowedDomains": ["api.tight.example"]},
    },
}


def host_in(mode: str, bots: dict[str, Any] | None = None) -> Host:
    """A host in ``mode`` whose bots override it in every way there is."""
    declared = {
        "provisioning": {"adminCidrs": ["203.0.113.0/24"]},
        "sshAuthorizedKeys": [KEY],
        "egress": {"mode": mode, "allowedDomains": [".example.org", "api.example.net"]},
        "bots": BOTS if bots is None else bots,
    }
    return parse_fleet(json.dumps({"schemaVersion": 1, "hosts": {"alpha": declared}})).host("alpha")
