"""Only the install payload."""

from clawdlets_ops.deploys import payload

payload()
