"""Servers as systemd-nspawn machines: real systemd, real sshd, booted from an overlay disk in a namespace of their own.

The backend of the emulated cloud, with rescue, snapshots and any public addresses. A machine's folder holds ``disk/``, ``console.log`` and
``machine.json``; the folder ``images`` beside the machines' holds a snapshot's disk per id. ``machine.py`` is one
machine's life.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.files import PRIVATE_FILE, ensure_dir
from clawdlets_ops.lab.backend import BackendError, MachineSpec
from clawdlets_ops.lab.disk import Disk, copy_tree, remove_tree
from clawdlets_ops.lab.machine import RECORD_FILE, Desired, Machine, Rules, Site, forget_nspawn
from clawdlets_ops.lab.metadata import MetadataService
from clawdlets_ops.lab.network import Network
from clawdlets_ops.process import Runner

__all__ = ["MachineState", "Machines", "forget_nspawn"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MachineState:
    """A machine as it is now: the process id of its init, when it runs, and whether its disk holds an installed system.

    ``in_rescue``: what runs, or ran last, is the rescue system.
    """

    server_id: int
    name: str
    running: bool
    installed: bool
    leader_pid: int | None
    in_rescue: bool = False


class Machines:
    """The backend of the lab: MachineBackend, RescueBackend, SnapshotBackend and AddressingBackend.

    ``folder`` holds a folder per machine; ``base`` is the Debian they all start from. ``path`` is the search path for
    systemd-nspawn. ``on_down`` is told the id of a machine that stops or reboots,
    ``on_off`` that of one that stays off.
    """

    def __init__(
        self,
        folder: Path,
        *,
        base: Path,
        network: Network,
        runner: Runner,
        path: str,
        on_down: Callable[[int], None],
        on_off: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._folder = ensure_dir(folder)
        self._images = folder.with_name("images")
        self._base = base
        self._network = network
        self._runner = runner
        self._site = Site(network, path, on_down, on_off)
        self._cuts = folder.with_name("cut_established")
        network.cut_established = self._cuts.exists()
        self._lock = threading.RLock()
        self._metadata: MetadataService | None = None
        self._machines: dict[int, Machine] = {}
        for saved in sorted(folder.glob(f"*/{RECORD_FILE}")):
            desired = Desired.read(saved)
            self._machines[desired.spec.server_id] = self._machine(desired)

    # What the cloud asks for

    def create(self, spec: MachineSpec, rules: Rules) -> None:
        with _as_backend_error(), self._lock:
            if spec.server_id in self._machines:
                raise BackendError("action_failed", f"server {spec.server_id} exists")
            ensure_dir(self._folder / str(spec.server_id))
            machine = self._machine(Desired(spec, rules))
            self._machines[spec.server_id] = machine
            self._filter()
        with _as_backend_error():
            self._make_disk(machine)
            machine.save()
            machine.start()

    def power_on(self, server_id: int) -> None:
        with _as_backend_error():
            self._get(server_id).start()

    def power_off(self, server_id: int, *, graceful: bool) -> None:
        with _as_backend_error():
            self._get(server_id).stop(graceful=graceful)

    def reboot(self, server_id: int, *, hard: bool) -> None:
        machine = self._get(server_id)
        with _as_backend_error():
            machine.reboot(hard=hard)

    def rebuild(self, spec: MachineSpec, rules: Rules) -> None:
        machine = self._get(spec.server_id)
        with _as_backend_error():
            self._image_of(spec)
            machine.stop(graceful=False)
            machine.desired.spec, machine.desired.rescue = spec, None
            self.set_rules(spec.server_id, rules)
            self._make_disk(machine)
            machine.start()

    def delete(self, server_id: int) -> None:
        with self._lock:
            machine = self._machines.get(server_id)
        if machine is None:
            return
        with _as_backend_error():
            machine.stop(graceful=False)
            machine.clean_up()
            machine.disk.remove()
            with self._lock:
                del self._machines[server_id]
                self._filter()
            self._network.forget(server_id)

    def set_rules(self, server_id: int, rules: Rules) -> None:
        machine = self._get(server_id)
        with _as_backend_error(), self._lock:
            before, machine.desired.rules = machine.desired.rules, rules
            try:
                self._filter()
            except BaseException:
                machine.desired.rules = before
                raise
            machine.save()

    def set_addresses(self, spec: MachineSpec) -> None:
        with _as_backend_error():
            self._get(spec.server_id).readdress(spec)

    def enable_rescue(self, server_id: int, authorized_keys: tuple[str, ...]) -> None:
        with _as_backend_error():
            self._get(server_id).order_rescue(authorized_keys)

    def disable_rescue(self, server_id: int) -> None:
        with _as_backend_error():
            self._get(server_id).order_rescue(None)

    def create_image(self, server_id: int, image_id: int) -> None:
        machine = self._get(server_id)
        with _as_backend_error(), machine.paused():
            copy_tree(machine.disk.upper, ensure_dir(self._images) / str(image_id), self._runner)

    def delete_image(self, image_id: int) -> None:
        with _as_backend_error():
            remove_tree(self._images / str(image_id))

    # What the daemon asks for

    def resume(self) -> None:
        """Put the firewall into force, serve the metadata and boot what was on, after the lab's daemon has died.

        Failures of single machines are logged. OSError, LabError when the metadata cannot be served.
        """
        with self._lock:
            machines = list(self._machines.values())
            self._filter()
            if self._metadata is None:
                self._metadata = MetadataService(self._network, self.spec_at)
        for machine in machines:
            if machine.desired.powered:
                try:
                    machine.start()
                except (ClawdletsError, BackendError):
                    log.exception("server %s does not boot again", machine.name)

    def close(self) -> None:
        """Stop serving the metadata; machines run on."""
        with self._lock:
            service, self._metadata = self._metadata, None
        if service is not None:
            service.close()

    def states(self) -> list[MachineState]:
        """All machines, by id."""
        with self._lock:
            machines = sorted(self._machines.items())
        return [
            MachineState(
                server_id,
                machine.name,
                machine.running,
                machine.disk.installed,
                machine.leader_pid,
                machine.in_rescue,
            )
            for server_id, machine in machines
        ]

    def console(self, server_id: int) -> Path:
        """The file with all that the machine wrote on its console; BackendError when there is no such machine."""
        return self._get(server_id).console

    def spec_at(self, address: str) -> MachineSpec | None:
        """What the running server with this public address was made of."""
        server_id = self._network.server_at(address)
        with self._lock:
            machine = None if server_id is None else self._machines.get(server_id)
            return None if machine is None else machine.desired.spec

    def cut_established(self, cut: bool) -> None:
        """Whether a change of rules ends the flows that only the old rules let begin; no, until this is called.

        It survives the lab's daemon.
        """
        with _as_backend_error(), self._lock:
            self._network.cut_established = cut
            self._filter()
            if cut:
                self._cuts.touch(PRIVATE_FILE)
            else:
                self._cuts.unlink(missing_ok=True)

    @property
    def cuts_established(self) -> bool:
        """What ``cut_established`` was last told."""
        return self._network.cut_established

    # How it is done

    def _get(self, server_id: int) -> Machine:
        with self._lock:
            if server_id not in self._machines:
                raise BackendError("not_found", f"there is no machine {server_id}")
            return self._machines[server_id]

    def _machine(self, desired: Desired) -> Machine:
        disk = Disk(self._folder / str(desired.spec.server_id), self._base, self._runner)
        return Machine(desired, disk, self._site)

    def _make_disk(self, machine: Machine) -> None:
        spec = machine.desired.spec
        machine.disk.make(self._image_of(spec))
        machine.disk.seed(spec)

    def _image_of(self, spec: MachineSpec) -> Path | None:
        """The snapshot that the server is to be made from; None for the base. BackendError when it is gone."""
        if not spec.image.isdecimal():
            return None
        found = self._images / spec.image
        if not found.is_dir():
            raise BackendError("image_not_found", f"there is no image {spec.image}")
        return found

    def _filter(self) -> None:
        with self._lock:
            self._network.filter({server_id: machine.desired.rules for server_id, machine in self._machines.items()})


@contextmanager
def _as_backend_error() -> Iterator[None]:
    try:
        yield
    except (ClawdletsError, OSError) as error:
        raise BackendError("action_failed", str(error)) from error
