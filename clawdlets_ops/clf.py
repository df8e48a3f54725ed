"""``clf``: for bots. Asks clf-orchestrator over its unix socket; needs no secret, and holds none."""
