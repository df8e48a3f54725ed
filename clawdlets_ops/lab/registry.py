"""Which number a checkout's lab has, and what is on record of a lab.

Numbers are claimed for the whole machine: a symbolic link ``/run/clawdlets-lab/N`` to the checkout's root, which is made
with its content in one step. The record is ``lab.json`` in the lab's folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

from clawdlets_ops.errors import ClawdletsError, LabError
from clawdlets_ops.files import locked, write_atomic
from clawdlets_ops.lab.addressing import JOIN_PORT, MAX_NUMBER, Addressing
from clawdlets_ops.lab.headscale import REAL, STAND_IN, login_server
from clawdlets_ops.lab.network import Network
from clawdlets_ops.lab.processes import ProcessId
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Command, Runner

CLAIMS_DIR: Final = Path("/run/clawdlets-lab")
RECORD_FILE: Final = "lab.json"


@dataclass(frozen=True)
class LabRecord:
    """A lab on record. ``endpoint`` is empty until its daemon has answered once; ``path`` is its search path; ``tailnet``
    is "real" or "stand-in", for as long as it lives."""

    number: int
    root: Path
    path: str
    endpoint: str = ""
    daemon: ProcessId | None = None
    tailnet: str = STAND_IN

    @property
    def net(self) -> Addressing:
        return Addressing(self.number)

    @property
    def lab_dir(self) -> Path:
        return Layout(self.root).lab

    @property
    def tailnet_control(self) -> str:
        """Where a machine joins the tailnet, as a URL."""
        return login_server(self.net) if self.tailnet == REAL else f"http://{self.net.outside(4)[0]}:{JOIN_PORT}"

    def write(self) -> None:
        """Write lab.json (0600)."""
        net = self.net
        content: dict[str, Any] = {
            "number": self.number,
            "root": str(self.root),
            "path": self.path,
            "endpoint": self.endpoint,
            "pid": self.daemon.pid if self.daemon else None,
            "daemon": asdict(self.daemon) if self.daemon else None,
            "tailnet": self.tailnet,
            "tailnetControl": self.tailnet_control,
            "namespaces": [net.internet_ns, net.stranger_ns, net.tailnet_ns, net.member_ns],
            "operatorLegs": list(net.operator_legs),
        }
        write_atomic(self.lab_dir / RECORD_FILE, json.dumps(content, indent=1) + "\n")


def read_record(lab_dir: Path) -> LabRecord | None:
    """The record of the lab in this folder, None when there is none; LabError when it is no record."""
    file = lab_dir / RECORD_FILE
    try:
        raw = json.loads(file.read_text())
        daemon = ProcessId(**raw["daemon"]) if raw["daemon"] else None
        return LabRecord(
            raw["number"], Path(raw["root"]), raw["path"], raw["endpoint"], daemon, raw.get("tailnet", STAND_IN)
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"is not the record of a lab: {error!r}", where=str(file)) from error


def claim_number(root: Path, runner: Runner, *, wanted: int | None = None, folder: Path = CLAIMS_DIR) -> int:
    """A number for the lab of this checkout: the one that it has, else the first free one; LabError.

    With ``wanted`` it is that one or none: a lab whose machines exist keeps its addresses.
    """
    with _claims(folder):
        number = _choose(root, runner, wanted, folder)
        claim = folder / str(number)
        if not (claim.is_symlink() and os.readlink(claim) == str(root)):
            claim.unlink(missing_ok=True)
            claim.symlink_to(root)
        return number


def claimable(root: Path, runner: Runner, *, folder: Path = CLAIMS_DIR) -> int:
    """The number that ``claim_number`` would give now, without claiming it; LabError."""
    with _claims(folder):
        return _choose(root, runner, None, folder)


def _choose(root: Path, runner: Runner, wanted: int | None, folder: Path) -> int:
    first = zlib.crc32(str(root).encode()) % MAX_NUMBER
    numbers = [wanted] if wanted else [1 + (first + step) % MAX_NUMBER for step in range(MAX_NUMBER)]
    claimed = {int(path.name): os.readlink(path) for path in folder.iterdir() if path.is_symlink()}
    mine = next((number for number, owner in claimed.items() if owner == str(root)), None)
    if mine is not None and wanted in (None, mine):
        return mine
    routes = _routes(runner)
    reasons: dict[int, str] = {}
    for number in numbers:
        if number in claimed and _has_lab(Path(claimed[number]), number):
            reasons[number] = f"is the lab of {claimed[number]}"
        elif found := Network(Addressing(number), runner).leftovers():
            reasons[number] = f"would share the name {found[0]} with something that exists"
        elif route := _taken_route(Addressing(number), routes):
            reasons[number] = f"would share addresses with the route {route}"
        else:
            return number
    number, reason = next(iter(reasons.items()))
    raise LabError(
        f"lab number {number} {reason}" + ("" if wanted else "; no other number is free either"),
        where=str(folder),
        fix="clawdlets lab down, here or there" if wanted else "take a lab down, or the route away",
    )


def release_number(number: int, root: Path, *, folder: Path = CLAIMS_DIR) -> None:
    """Give the number back, if this checkout has it; the folder goes with the last one."""
    if not folder.exists():
        return
    with _claims(folder):
        claim = folder / str(number)
        if claim.is_symlink() and os.readlink(claim) == str(root):
            claim.unlink()


@contextmanager
def _claims(folder: Path) -> Iterator[None]:
    """Hold the folder alone. It is its own lock, so that nothing needs to stay when the last claim goes."""
    while True:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                current = os.stat(folder).st_ino == os.fstat(fd).st_ino
            except FileNotFoundError:
                current = False
            if not current:  # the one before us removed it; take the new one
                continue
            try:
                yield
            finally:
                if not any(folder.iterdir()):
                    folder.rmdir()
            return
        finally:
            os.close(fd)


def _has_lab(root: Path, number: int) -> bool:
    """Whether that checkout's lab has this number, or may be about to have it."""
    layout = Layout(root)
    lock = layout.lock("lab")
    try:
        if lock.exists():
            with locked(lock, what="that lab"):
                pass
        record = read_record(layout.lab)
    except (ClawdletsError, OSError):
        return True  # somebody is at it, or it cannot be told: leave it alone
    return record is not None and record.number == number


def _routes(runner: Runner) -> list[str]:
    """Destinations of all routes of the root namespace but the default ones."""
    found = []
    for family in ("-4", "-6"):
        command = Command(["ip", family, "route", "show", "table", "all"], "see which addresses are taken")
        for line in runner.run(command).check().stdout.splitlines():
            words = [word for word in line.split() if not re.fullmatch(r"[a-z-]+", word)]
            if words and re.fullmatch(r"[0-9a-f.:]+(/\d+)?", words[0]) and not line.startswith("default"):
                found.append(words[0])
    return found


def _taken_route(net: Addressing, routes: list[str]) -> str | None:
    ours = net.networks
    for route in routes:
        network = ip_network(route, strict=False)
        # A route for half the world, as some VPNs have it, is less specific than ours and gives way.
        if network.prefixlen > 2 and any(network.version == our.version and network.overlaps(our) for our in ours):
            return route
    return None
