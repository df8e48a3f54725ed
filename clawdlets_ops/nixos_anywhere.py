"""The program ``nixos-anywhere`` by its documented command line, one phase at a time.

Each phase is a process group of its own with a time limit, nothing on standard input, and a private home and temporary
folder that are removed whatever happens: the program leaves a copy of the private key there when it is killed. It checks
no host key, so an ``ssh`` that does stands first in its PATH (``ssh.shim``); its ssh-copy-id and ``nix copy`` find that
one too. It tries some things again for ever; ``Watch`` knows what is hopeless. Phases, marks and exit statuses:
nixos-anywhere 1.13, docs/reference.md.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clawdlets_ops.errors import ClawdletsError, CommandError, HostKeyError, UnreachableError
from clawdlets_ops.files import ensure_dir
from clawdlets_ops.process import Command, Result, Runner

PHASE_TIMEOUT_S: Final = {"kexec": 600.0, "disko": 600.0, "install": 3600.0, "reboot": 300.0}
PHASES: Final = tuple(PHASE_TIMEOUT_S)
PREFLIGHT: Final = "preflight"
"""No phase of the program's: ``--phases ''`` uploads the key and gathers facts, and does nothing else."""
PREFLIGHT_TIMEOUT_S: Final = 60.0
UPLOADING: Final = "Uploading install SSH keys"
DONE_DIR: Final = "/run/clawdlets-install"
"""On the target, in memory: an empty file for each phase that came to its end. It goes when the installer goes."""

_MARK = re.compile(r"^### (.*) ###$")
_SSH_CONNECTION_LOST = 255
_NOISE = re.compile(r"Identity file .* not accessible|^Warning: Permanently added ")
_LINE_CHARS = 400
_LAST_LINES = 15

# The end of a phase is marked on the target, and the scratch folder removed, by the shell that runs the program: that is
# done too when we have been killed and the phase has gone on without us.
_SCRIPT: Final = """\
scratch=$1 target=$2 mark=$3
shift 3
"$@"
status=$?
rm -rf -- "$scratch"
if [ "$status" -eq 0 ] && [ -n "$mark" ]; then
  ssh "$target" "$mark"
  status=$?
fi
exit "$status"
"""


@dataclass(frozen=True)
class InstallSpec:
    """What to install where. ``flake`` is a flake reference with its attribute; ``shim_dir`` holds the pinning ssh.
    ``kexec`` is another installer than the program's own: a tarball's path or URL."""

    flake: str
    address: str
    identity_file: Path
    extra_files: Path
    shim_dir: Path
    kexec: str = ""


@dataclass(frozen=True)
class _Hopeless:
    """What the program would try again for ever. ``uploading_only``: elsewhere it is part of waiting for a reboot."""

    words: tuple[str, ...]
    times: int
    what: str
    fix: str
    uploading_only: bool = False


_HOPELESS: Final = (
    _Hopeless(
        ("Permission denied (",),
        3,
        "refuses our key for root",
        "is the key in provisioning.sshPubkeyFile the one that the server was made with?",
    ),
    _Hopeless(
        ("Too many authentication failures",),
        1,
        "ended the login before our key was tried",
        "raise MaxAuthTries of the target's sshd, or rebuild the server from its image",
    ),
    _Hopeless(
        (
            "Connection refused",
            "Connection timed out",
            "No route to host",
            "Network is unreachable",
            "Connection reset",
        ),
        3,
        "does not let us connect to port 22",
        "is the edge open for this machine's address (provisioning.adminCidrs), and does sshd run?",
        uploading_only=True,
    ),
    _Hopeless(
        ("Read-only file system", "authorized_keys: ", "No space left on device"),
        2,
        "does not take our key into root's authorized_keys",
        "make ~root/.ssh/authorized_keys writable, or rebuild the server from its image",
        uploading_only=True,
    ),
    _Hopeless(
        ("Too many arguments", "ssh-copy-id: ERROR"),
        4,
        "cannot be given our key: this machine's ssh-copy-id does not work",
        "install another version of OpenSSH's ssh-copy-id",
        uploading_only=True,
    ),
)


_KEY_CHANGED = ("Host key verification failed", "HOST IDENTIFICATION HAS CHANGED")
_WORTH_A_LOOK = re.compile(
    "^### |" + "|".join(re.escape(words) for words in (*_KEY_CHANGED, *(w for case in _HOPELESS for w in case.words)))
)


class Watch:
    """Reads the program's output line by line: tells its marks on, and raises when what it tries cannot succeed."""

    def __init__(self, address: str, say: Callable[[str], None]) -> None:
        self._address, self._say = address, say
        self._mark = ""
        self._met: Counter[_Hopeless] = Counter()

    def __call__(self, line: str) -> None:
        """Take one line. HostKeyError at once for a wrong key; UnreachableError for the hopeless."""
        if _WORTH_A_LOOK.search(line) is None:
            return
        line = printable(line)
        if mark := _MARK.match(line):
            self._mark = mark.group(1)
            self._met.clear()
            self._say(self._mark)
        elif any(words in line for words in _KEY_CHANGED):
            raise HostKeyError(
                "nixos-anywhere met another host key than the one pinned when the server was first seen",
                where=self._address,
                fix="find out who is answering at this address before going on",
            )
        for case in _HOPELESS:
            if any(words in line for words in case.words) and (self._mark == UPLOADING or not case.uploading_only):
                self._met[case] += 1
                if self._met[case] >= case.times:
                    raise UnreachableError(f"{case.what} ({line.strip()})", where=self._address, fix=case.fix)


def printable(line: str) -> str:
    """``line`` without what a terminal would obey, and no longer than a person reads."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line.replace("\t", " "))
    return shown if len(shown) <= _LINE_CHARS else f"{shown[:_LINE_CHARS]}… ({len(shown)} characters)"


def install_command(spec: InstallSpec, phase: str) -> list[str]:
    """The command line of one phase. The preflight builds and evaluates nothing."""
    if phase not in (*PHASE_TIMEOUT_S, PREFLIGHT):
        raise ValueError(f"nixos-anywhere has no phase {phase!r}; it has {', '.join(PHASES)}")
    looks_only = phase == PREFLIGHT
    target = f"root@[{spec.address}]" if ":" in spec.address else f"root@{spec.address}"
    return [
        "nixos-anywhere",
        "--flake", spec.flake,
        "--target-host", target,
        "-i", str(spec.identity_file),
        "--extra-files", str(spec.extra_files),
        *(["--kexec", spec.kexec] if spec.kexec and phase == "kexec" else []),
        *(["--build-on", "local", "--no-use-machine-substituters"] if looks_only else []),
        "--phases", "" if looks_only else phase,
    ]  # fmt: skip


def run_phase(
    runner: Runner,
    spec: InstallSpec,
    phase: str,
    *,
    scratch: Path,
    search_path: str,
    log_file: Path,
    lock_fd: int,
    say: Callable[[str], None] = lambda _: None,
    timeout_s: float | None = None,
) -> float:
    """Run one phase to its end and mark that on the target; returns the seconds it took.

    ``scratch`` is made for it and removed. CommandError with the program's last words, CommandTimeout, HostKeyError,
    UnreachableError.
    """
    limit_s = timeout_s or PHASE_TIMEOUT_S.get(phase, PREFLIGHT_TIMEOUT_S)
    # A reboot leaves nothing to be marked; the installer that kexec starts is not the system that began it.
    mark = f"mkdir -p {DONE_DIR} && touch {DONE_DIR}/{phase}" if phase in ("disko", "install") else ""
    words = [str(scratch), f"root@{spec.address}", mark, *install_command(spec, phase)]
    sweep(scratch)
    try:
        for name in ("home", "tmp"):
            ensure_dir(scratch / name)
        result = runner.run(
            Command(
                ["sh", "-c", _SCRIPT, "nixos-anywhere", *words],
                f"install ({phase})",
                env={
                    "HOME": str(scratch / "home"),
                    "TMPDIR": str(scratch / "tmp"),
                    "PATH": f"{spec.shim_dir}:{search_path}",
                },
                timeout_s=limit_s,
                log_file=log_file,
                keep_fds=(lock_fd,),
            ),
            on_line=Watch(spec.address, say),
        )
    except ClawdletsError as error:
        raise _with_log(error, spec.address, phase, log_file) from error
    finally:
        sweep(scratch)
    if not result.ok:
        why = "the connection to the target broke" if result.exit_code == _SSH_CONNECTION_LOST else "see below"
        raise CommandError(
            f"the {phase} phase of nixos-anywhere ended with status {result.exit_code} ({why})\n{_last_words(result)}",
            where=spec.address,
            fix=_go_on(log_file),
            exit_code=result.exit_code,
        )
    return result.duration_s


def sweep(scratch: Path) -> bool:
    """Remove what a phase left of its private folders; whether there was anything."""
    if not scratch.exists():
        return False
    shutil.rmtree(scratch, ignore_errors=True)
    return True


def _with_log(error: ClawdletsError, address: str, phase: str, log_file: Path) -> ClawdletsError:
    """The same kind of error, which also says in which phase it was and how to go on."""
    fix = f"{error.fix}; {_go_on(log_file)}" if error.fix else _go_on(log_file)
    what = "\n".join(printable(line) for line in error.what.splitlines() if not _NOISE.search(line))
    what = what.replace(f"install ({phase}): sh did not", f"nixos-anywhere's {phase} phase did not", 1)
    return type(error)(what if phase in what else f"in the {phase} phase, {what}", where=address, fix=fix)


def _go_on(log_file: Path) -> str:
    return f"its whole output is in {log_file}; run again: the installation goes on where the target stands"


def _last_words(result: Result) -> str:
    lines = [printable(line) for line in result.tail().splitlines() if not _NOISE.search(line)]
    return "\n".join(lines[-_LAST_LINES:])
