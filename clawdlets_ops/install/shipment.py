"""What this machine can know, before the target is met, of what is to be shipped to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from clawdlets_ops.errors import SecretsError
from clawdlets_ops.finding import Finding, State
from clawdlets_ops.install import gates
from clawdlets_ops.process import Command, Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets import payload, store

EVAL_TIMEOUT_S: Final = 120.0


def check_shipment(project: Project, host: str, runner: Runner, say: Callable[[str], None]) -> tuple[Finding, ...]:
    """The gates that need no target. InstallRefused."""
    secrets = ""
    try:
        store.check_host(project, host, runner=runner)
    except SecretsError as error:
        secrets = str(error)
    tree = project.layout.extra_files(host)
    built = "current" if payload.payload_is_current(project, host) else "stale" if tree.exists() else "absent"
    names, why = _configurations(project, runner)
    found = gates.shipment_gates(host, gates.Shipment(secrets, built, names, why))
    gates.refuse(host, found)
    for finding in found:
        if finding.state is State.UNKNOWN:
            say(f"{finding.check} unknown: {finding.observed}")
    return found


def _configurations(project: Project, runner: Runner) -> tuple[tuple[str, ...] | None, str]:
    """The names in the flake's ``nixosConfigurations``, or None and why not. Nothing of them is evaluated."""
    root = project.layout.root
    if runner.which("nix") is None:
        listed = runner.run(Command(["git", "-C", root, "ls-files", "flake.nix"], "look for the flake")).stdout.strip()
        there = "git tracks a flake.nix" if listed else "git tracks no flake.nix"
        return None, f"nix is not on this machine's PATH, so the flake cannot be asked ({there})"
    argv = ["nix", "--extra-experimental-features", "nix-command flakes", "eval", "--json", "--no-write-lock-file"]
    argv += [f"git+file://{root}#nixosConfigurations", "--apply", "builtins.attrNames"]
    answer = runner.run(Command(argv, "read the flake", timeout_s=EVAL_TIMEOUT_S))
    if not answer.ok:
        return (), f"nix cannot read the flake: {answer.tail()}"
    return tuple(str(name) for name in answer.json()), ""
