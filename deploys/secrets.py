"""Only the secrets of running hosts."""

from clawdlets_ops.deploys import secrets

secrets()
