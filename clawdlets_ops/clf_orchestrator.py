"""``clf-orchestrator``: reads its configuration, opens its store and its sockets, and serves until it is told to stop."""
