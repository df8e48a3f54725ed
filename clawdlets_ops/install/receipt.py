"""The receipt of an installation: what was installed, when, from where, with which tools. One copy lies on the host, one in
the runtime dir. It names no secret and no path of the operator's machine but the installer's own.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.files import write_atomic
from clawdlets_ops.process import Command, Runner

TOOL_TIMEOUT_S = 20.0


@dataclass
class Progress:
    """What an installation has done so far, kept in ``file`` so that the receipt of a run that was killed and begun
    again is whole. It is written, never acted upon.

    ``phases``: name, start and duration of each that ended well under our eyes. ``seen``: in which step the fresh server's
    pinned key was met again.
    """

    file: Path
    phases: list[dict[str, Any]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    first_contact: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Progress:
        """As it was kept; empty when it was not, or is damaged."""
        try:
            saved = json.loads(file.read_text())
            return cls(file, list(saved["phases"]), list(saved["seen"]), dict(saved["firstContact"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return cls(file)

    def met(self, step: str) -> None:
        """The pinned key was shown in ``step``."""
        if step not in self.seen:
            self.seen.append(step)
        self._keep()

    def ended(self, phase: str, started: datetime, duration_s: float) -> None:
        """``phase`` ended well."""
        self.phases.append({"phase": phase, "startedAt": started.isoformat(), "durationS": round(duration_s, 3)})
        self._keep()

    def contact(self, fingerprint: str, addresses: Mapping[int, str], at: datetime) -> None:
        """The fresh server was met for the first time."""
        self.first_contact = {
            "fingerprint": fingerprint,
            "at": at.isoformat(),
            "addresses": sorted(addresses.values()),
            "trust": "at first sight",
        }
        self._keep()

    def _keep(self) -> None:
        document = {"phases": self.phases, "seen": self.seen, "firstContact": self.first_contact}
        write_atomic(self.file, json.dumps(document) + "\n")


def compose(
    host: str,
    *,
    server_id: int,
    operator: str,
    digest: str,
    tools: Mapping[str, str],
    flake: Mapping[str, Any],
    progress: Progress,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> dict[str, Any]:
    """The receipt as it is written to the host, before its first boot; pure but for the time."""
    return {
        "schemaVersion": 1,
        "host": host,
        "serverId": server_id,
        "operator": operator,
        "payloadDigest": digest,
        "flake": dict(flake),
        "tools": dict(tools),
        "firstContact": {**progress.first_contact, "sameKeySeenAgainIn": list(progress.seen)},
        "phases": list(progress.phases),
        "writtenAt": now().isoformat(),
    }


def to_text(document: Mapping[str, Any]) -> str:
    """The bytes that lie on the host."""
    return json.dumps(document, indent=2) + "\n"


def tool_versions(runner: Runner) -> dict[str, str]:
    """Which programs this machine installs with; one that cannot be asked is left out."""
    versions = {"clawdlets-ops": metadata.version("clawdlets-ops"), "python": platform.python_version()}
    for name, argv in (("nix", ["nix", "--version"]), ("ssh", ["ssh", "-V"])):
        if (said := _ask(runner, argv)) is not None:
            versions[name] = said
    program = runner.which("nixos-anywhere")
    if program is not None and program.is_file():  # it has no --version: its path (a store path has one) and its digest
        versions["nixos-anywhere"] = (
            f"{program.resolve()} sha256:{hashlib.sha256(program.read_bytes()).hexdigest()[:16]}"
        )
    return versions


def flake_revision(runner: Runner, root: Path, host: str) -> dict[str, Any]:
    """The commit that was installed, and whether tracked files differed from it; None where git cannot tell."""
    revision = _ask(runner, ["git", "-C", str(root), "rev-parse", "--verify", "HEAD"])
    changed = _ask(runner, ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return {"attribute": host, "revision": revision, "dirty": None if changed is None else bool(changed)}


def _ask(runner: Runner, argv: list[str]) -> str | None:
    try:
        answer = runner.run(Command(argv, "write the receipt", timeout_s=TOOL_TIMEOUT_S))
    except ClawdletsError:
        return None
    return (answer.stdout or answer.stderr).strip() if answer.ok else None
