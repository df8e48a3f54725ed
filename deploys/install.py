"""Only the installation of NixOS."""

from clawdlets_ops.deploys import install

install()
