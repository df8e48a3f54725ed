"""Machines that fail at what they are asked to do, disks that are full, and a stranger who tries every port."""

from __future__ import annotations

import errno
import logging
import select
import socket
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from clawdlets_ops.errors import LabError
from clawdlets_ops.lab.backend import MachineSpec, Rule
from clawdlets_ops.lab.distance import KINDS as LINK_KINDS
from clawdlets_ops.lab.distance import FaultyNetwork
from clawdlets_ops.lab.faults import Fault, FaultBook
from clawdlets_ops.lab.machines import Machines, MachineState
from clawdlets_ops.lab.network import in_namespace
from clawdlets_ops.process import Command

log = logging.getLogger(__name__)

PORTS: Final = range(1, 65_536)

_BURST = 400  # sockets at once; a process may often have no more than 1024 files
_WAIT_MS = 60
_FULL_DIR = "/run/clawdlets-lab-disk-full"
_FULL = ("/mnt", "/var", "/home", "/root", "/opt", "/srv")
_FILL = f"""
set -e
full={_FULL_DIR}
mountpoint -q $full && exit 0
mkdir -p $full
mount -t tmpfs -o size=64k,mode=0700 clawdlets-lab $full
for folder in {" ".join(_FULL)}; do
  test -d $folder && ! test -L $folder || continue
  mkdir -p $full/upper$folder $full/work$folder
  chmod --reference=$folder $full/upper$folder
  mount -t overlay -o lowerdir=$folder,upperdir=$full/upper$folder,workdir=$full/work$folder clawdlets-lab $folder
done
cat /dev/zero >$full/full 2>/dev/null || true
"""
_EMPTY = f"""
full={_FULL_DIR}
mountpoint -q $full || exit 0
for folder in {" ".join(_FULL)}; do test -d $full/upper$folder && umount -l $folder; done
umount -l $full && rmdir $full
"""


@dataclass(frozen=True)
class Scan:
    """What a scan found at one address."""

    address: str
    open: tuple[int, ...]
    refused: int
    silent: int

    def __str__(self) -> str:
        ports = ", ".join(map(str, self.open)) or "none"
        return f"{self.address}: open {ports}; {self.refused} refused, {self.silent} silent"


class FaultyMachines(Machines):
    """The lab's machines with a book of faults; an action that is to fail is not begun."""

    def __init__(self, *arguments: Any, network: FaultyNetwork, book: FaultBook, **more: Any) -> None:
        super().__init__(*arguments, network=network, **more)
        self._links = network
        self._book = book
        for state in self.states():
            network.named(state.server_id, state.name)

    def create(self, spec: MachineSpec, rules: tuple[Rule, ...] | None) -> None:
        self._links.named(spec.server_id, spec.name)
        self._book.act("create_server")
        super().create(spec, rules)
        for _, fault in self._book.of_kind("disk-full"):
            self.fill(fault)

    def power_on(self, server_id: int) -> None:
        self._book.act("start_server")
        super().power_on(server_id)

    def power_off(self, server_id: int, *, graceful: bool) -> None:
        self._book.act("shutdown_server" if graceful else "stop_server")
        super().power_off(server_id, graceful=graceful)

    def reboot(self, server_id: int, *, hard: bool) -> None:
        self._book.act("reset_server" if hard else "reboot_server")
        super().reboot(server_id, hard=hard)

    def rebuild(self, spec: MachineSpec, rules: tuple[Rule, ...] | None) -> None:
        self._book.act("rebuild_server")
        super().rebuild(spec, rules)

    def delete(self, server_id: int) -> None:
        self._book.act("delete_server")
        super().delete(server_id)

    def set_rules(self, server_id: int, rules: tuple[Rule, ...] | None) -> None:
        self._book.act("set_firewall_rules")
        for name in [state.name for state in self.states() if state.server_id == server_id]:
            self._book.hold("firewall-pending", name)
        super().set_rules(server_id, rules)

    def fill(self, fault: Fault) -> None:
        """Leave no space on the disks of the machines concerned that run: every write but of empty files fails there.

        An overlay on a file system that is full; what stood there can be read and deleted, and is unchanged afterwards.
        """
        self._in_guests(fault, _FILL, "fill a machine's disk")

    def empty(self, fault: Fault) -> None:
        self._in_guests(fault, _EMPTY, "empty a machine's disk")

    def concerned(self, fault: Fault) -> list[MachineState]:
        return [state for state in self.states() if fault.concerns(state.name)]

    def _in_guests(self, fault: Fault, script: str, why: str) -> None:
        for state in self.concerned(fault):
            if state.leader_pid is not None:
                argv = ["nsenter", "-t", str(state.leader_pid), "-a", "sh", "-c", script]
                self._runner.run(Command(argv, why, timeout_s=20)).check()


class Mishaps:
    """Makes the faults of a book happen that are not the API's."""

    def __init__(self, network: FaultyNetwork) -> None:
        self._network = network
        self.book = FaultBook(on_add=self._add, on_clear=self._clear)
        self.machines: FaultyMachines | None = None  # which need the book first

    def _add(self, ident: str, fault: Fault) -> None:
        machines = self.machines
        if fault.kind in LINK_KINDS:
            self._network.add_fault(ident, fault)
        elif machines is not None and fault.kind == "disk-full":
            machines.fill(fault)
        elif machines is not None and fault.kind == "scan":
            targets = [
                address for state in machines.concerned(fault) for address in self._network.public(state.server_id)
            ]
            if not targets:
                raise LabError("no such server is running", where=fault.subject, fix="clawdlets lab status")
            threading.Thread(target=self._scan, args=(ident, targets), name="scan", daemon=True).start()

    def _clear(self, ident: str, fault: Fault) -> None:
        if fault.kind in LINK_KINDS:
            self._network.clear_fault(ident)
        elif fault.kind == "disk-full" and self.machines is not None:
            self.machines.empty(fault)

    def _scan(self, ident: str, addresses: list[str]) -> None:
        self.book.note(ident, "scanning")
        said = []
        try:
            for address in addresses:
                found = in_namespace(self._network.net.stranger_ns, partial(scan, address))
                said.append(str(found))
        except (LabError, OSError) as error:
            log.exception("the scan of %s", ", ".join(addresses))
            said.append(f"ended: {error}")
        self.book.note(ident, "done: " + "; ".join(said))


def scan(address: str, ports: Iterable[int] = PORTS, *, wait_ms: int = _WAIT_MS) -> Scan:
    """Try each port once, ``_BURST`` at a time, from the calling thread's network namespace."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    opened: list[int] = []
    refused = silent = 0
    todo = list(ports)
    while todo:
        batch, todo = todo[:_BURST], todo[_BURST:]
        sockets = {port: socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for port in batch}
        try:
            for port, attempt in sockets.items():
                # An open connection is reset when it is closed: nothing stays behind at either end.
                attempt.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                attempt.connect_ex((address, port))
            for port, result in _outcomes(sockets, wait_ms).items():
                opened += [port] if result == 0 else []
                refused += result == errno.ECONNREFUSED
                silent += result not in (0, errno.ECONNREFUSED)
        finally:
            for attempt in sockets.values():
                attempt.close()
    return Scan(address, tuple(sorted(opened)), refused, silent)


def _outcomes(sockets: dict[int, socket.socket], wait_ms: int) -> dict[int, int]:
    """Port to the error of its connect: 0 connected, ETIMEDOUT nothing heard within ``wait_ms`` of silence."""
    watch = select.poll()
    ports = {attempt.fileno(): port for port, attempt in sockets.items()}
    for number in ports:
        watch.register(number, select.POLLOUT)
    found = dict.fromkeys(sockets, errno.ETIMEDOUT)
    while ports and (ready := watch.poll(wait_ms)):
        for number, _ in ready:
            watch.unregister(number)
            port = ports.pop(number)
            found[port] = sockets[port].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return found
