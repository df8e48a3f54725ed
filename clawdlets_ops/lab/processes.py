"""Which processes belong to the lab: by control group, and by id together with the time of their start.

Each machine runs in a control group of its own, ``/clfN/mID``. Without it all machines would share one: with
``--keep-unit`` systemd-nspawn puts a container's processes below the group that it was itself started in. The group
also names every process of a machine after the lab's daemon has died, and ends them in one write (cgroup.kill, Linux
5.14), with no process id that could be somebody else's by then. Killing systemd-nspawn itself leaves its container
running (measured, systemd 252).
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clawdlets_ops.errors import LabError

log = logging.getLogger(__name__)

POLL_S = 0.02


@dataclass(frozen=True)
class ProcessId:
    """A process by its id and its start (in clock ticks since boot), which together are never used twice."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The running process with this id; None when there is none, or only its zombie."""
        try:
            # The name in brackets may hold anything; the fields after it are counted (proc(5), /proc/pid/stat).
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    def alive(self) -> bool:
        """Whether exactly this process still runs."""
        return ProcessId.of(self.pid) == self

    def signal(self, number: signal.Signals) -> None:
        """Send a signal if it still runs."""
        if self.alive():
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return


def wait_until(condition: Callable[[], bool], *, timeout_s: float, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Whether ``condition`` came true within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        sleep(POLL_S)
    return True


def mount_points(kind: str, option: str = "") -> list[Path]:
    """Where file systems of this kind (with this super option) are mounted; source: proc(5), mountinfo."""
    return [Path(point) for point, found, options in _mounts() if found == kind and option in ("", *options)]


def mounts_below(folder: Path) -> list[Path]:
    """Mount points at or below ``folder``, the deepest first."""
    points = [Path(point) for point, _, _ in _mounts()]
    return sorted((p for p in points if p.is_relative_to(folder)), key=lambda p: len(p.parts), reverse=True)


def _mounts() -> list[tuple[str, str, list[str]]]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        point = before.split()[4].encode().decode("unicode_escape")  # space, tab, newline and backslash are octal
        found.append((point, kind, options.split(",")))
    return found


class Group:
    """The control group of one machine, or of a whole lab, in each hierarchy that systemd cares for."""

    def __init__(self, name: str) -> None:
        unified = mount_points("cgroup2")
        if not unified:
            raise LabError("no cgroup2 is mounted", where="control groups", fix="mount it at /sys/fs/cgroup/unified")
        self.unified = unified[0] / name
        self.folders = [self.unified, *(point / name for point in mount_points("cgroup", "name=systemd")[:1])]

    def make(self) -> None:
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)

    def enter_argv(self, argv: list[str]) -> list[str]:
        """``argv`` run inside the group: the shell enters and then becomes the program, with no moment outside."""
        words = " ".join(f'"${n}"' for n in range(1, len(self.folders) + 1))
        script = (
            f'for g in {words}; do echo 0 > "$g/cgroup.procs" || exit 125; done; shift {len(self.folders)}; exec "$@"'
        )
        return ["sh", "-c", script, "sh", *map(str, self.folders), *argv]

    def pids(self, below: str = "") -> list[int]:
        """Processes of one of its groups, not of those further below."""
        try:
            return [int(pid) for pid in (self.unified / below / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def populated(self) -> bool:
        """Whether any process is in it, at any depth."""
        try:
            return "populated 1" in (self.unified / "cgroup.events").read_text()
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno == errno.ENODEV:  # removed between open and read
                return False
            raise

    def signal(self, number: signal.Signals, below: str = "") -> None:
        """Send a signal to the processes of one of its groups."""
        for pid in self.pids(below):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self, *, timeout_s: float = 10.0) -> None:
        """End every process in it; LabError when one is left after ``timeout_s``."""
        try:
            if self.populated():
                (self.unified / "cgroup.kill").write_text("1")
        except OSError as error:  # it was removed just now, or this kernel has no cgroup.kill: the wait tells
            log.debug("%s: %s", self.unified, error)
        if not wait_until(lambda: not self.populated(), timeout_s=timeout_s):
            raise LabError("processes do not end", where=str(self.unified), fix=f"see {self.unified}/cgroup.procs")

    def remove(self) -> None:
        """Remove the emptied groups, the deepest first; LabError when one stays busy."""
        if not wait_until(self._removed, timeout_s=5.0):
            raise LabError("cannot be removed", where=str(self.unified))

    def _removed(self) -> bool:
        try:
            for folder in self.folders:
                for path, _, _ in list(os.walk(folder, topdown=False)):
                    Path(path).rmdir()
        except OSError as error:  # busy for a moment after its last process has gone
            log.debug("%s: %s", self.unified, error)
            return False
        return True
