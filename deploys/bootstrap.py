"""A declared host, from nothing to verified and locked down."""

from clawdlets_ops.deploys import bootstrap

bootstrap()
