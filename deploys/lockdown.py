"""Only the exposure of SSH."""

from clawdlets_ops.deploys import lockdown

lockdown()
