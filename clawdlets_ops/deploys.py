"""The story as pyinfra deploys; the scripts in ``deploys/`` call these and nothing else."""

from __future__ import annotations

from pyinfra.api.deploy import deploy

from clawdlets_ops.pyinfra_plugin import operations


@deploy("Payload")
def payload() -> None:
    """Build the install payload."""
    operations.payload(name="Build the install payload")


@deploy("Provision")
def provision() -> None:
    """Make the server."""
    operations.provision(name="Provision with OpenTofu")


@deploy("Install")
def install() -> None:
    """Install NixOS."""
    operations.install(name="Install with nixos-anywhere")


@deploy("Lockdown")
def lockdown(*, together: bool = False) -> None:
    """Close public SSH, one host at a time; ``--data canary=N``: the rest only when the first N are locked down. With
    ``together`` as many at a time as pyinfra has of them."""
    operations.lockdown(name="Lock SSH down to the tailnet", _serial=not together)


@deploy("Secrets")
def secrets() -> None:
    """Bring a running host to the repository's secrets."""
    operations.secrets(name="Bring the host to the repository's secrets")


@deploy("Destroy")
def destroy() -> None:
    """Delete the hosts that are named, and only these."""
    operations.destroy(name="Destroy the named hosts")


@deploy("Verify")
def verify() -> None:
    """Prove it."""
    operations.verify(name="Verify from outside and inside")


def bootstrap() -> None:
    """All of it, in order."""
    payload()
    provision()
    install()
    lockdown(together=True)  # each waits for its own host's installation, and for no other host
    verify()
