"""The program ``nixos-anywhere`` by its documented command line, one phase at a time.

Each phase is a process of its own with a time limit; its home and temporary folders are private and removed whatever
happens (the program leaves a copy of the private key there when it is killed). It checks no host key, so an ``ssh``
that does stands first in its PATH. Phases and marks: nixos-anywhere 1.13, docs/reference.md.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clawdlets_ops.errors import CommandError, HostKeyError
from clawdlets_ops.process import Command, Runner

PHASE_TIMEOUT_S: Final = {"kexec": 600.0, "disko": 600.0, "install": 3600.0, "reboot": 300.0}
PHASES: Final = tuple(PHASE_TIMEOUT_S)
_MARK = re.compile(r"^### (.*) ###$")


@dataclass(frozen=True)
class InstallSpec:
    """What to install where. ``flake`` is a flake reference with its attribute; ``shim_dir`` holds the pinning ssh."""

    flake: str
    address: str
    identity_file: Path
    extra_files: Path
    shim_dir: Path


def install_command(spec: InstallSpec, phase: str) -> list[str]:
    """The command line of one phase."""
    if phase not in PHASE_TIMEOUT_S:
        raise ValueError(f"nixos-anywhere has no phase {phase!r}; it has {', '.join(PHASES)}")
    target = f"root@[{spec.address}]" if ":" in spec.address else f"root@{spec.address}"
    return [
        "nixos-anywhere",
        "--flake", spec.flake,
        "--target-host", target,
        "-i", str(spec.identity_file),
        "--extra-files", str(spec.extra_files),
        "--phases", phase,
    ]  # fmt: skip


def run_phase(
    runner: Runner,
    spec: InstallSpec,
    phase: str,
    *,
    search_path: str,
    log_file: Path,
    lock_fd: int,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Run one phase to its end. CommandError with its last words, CommandTimeout, HostKeyError."""
    scratch = Path(tempfile.mkdtemp(prefix="clawdlets-install-"))

    def on_line(line: str) -> None:
        if mark := _MARK.match(line):
            say(mark.group(1))
        elif "Host key verification failed" in line:
            # The program would try the same again for ever.
            raise HostKeyError(
                "nixos-anywhere met another host key than the one pinned when the server was first seen",
                where=spec.address,
                fix="find out who is answering at this address before going on",
            )

    try:
        for name in ("home", "tmp"):
            (scratch / name).mkdir(mode=0o700)
        result = runner.run(
            Command(
                install_command(spec, phase),
                f"install ({phase})",
                env={
                    "HOME": str(scratch / "home"),
                    "TMPDIR": str(scratch / "tmp"),
                    "PATH": f"{spec.shim_dir}:{search_path}",
                },
                timeout_s=PHASE_TIMEOUT_S[phase],
                log_file=log_file,
                keep_fds=(lock_fd,),
            ),
            on_line=on_line,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not result.ok:
        raise CommandError(
            f"the {phase} phase of nixos-anywhere ended with status {result.exit_code}\n{result.tail()}",
            where=spec.address,
            fix=f"its whole output is in {log_file}; run again: the installation goes on where the target stands",
            exit_code=result.exit_code,
        )
