"""Only the server, its key and its firewall."""

from clawdlets_ops.deploys import provision

provision()
