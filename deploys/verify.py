"""Only the verification."""

from clawdlets_ops.deploys import verify

verify()
