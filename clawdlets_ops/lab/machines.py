"""Servers as systemd-nspawn machines: real systemd, real sshd, booted from an overlay disk in a namespace of their own.

The backend of the emulated cloud. A machine's folder holds ``disk/``, ``console.log`` and ``machine.json``. One thread
per running machine waits for its end: systemd-nspawn ends with status 133 when the guest reboots (measured, systemd 252,
``--keep-unit``), and is then started again with a fresh network namespace, so that neither the guest's firewall nor its
``tailscale0`` survives a reboot. Any other status is a machine that is off.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from clawdlets_ops.errors import ClawdletsError, LabError
from clawdlets_ops.files import ensure_dir, write_atomic
from clawdlets_ops.lab.backend import BackendError, MachineSpec, Rule
from clawdlets_ops.lab.disk import Disk
from clawdlets_ops.lab.network import NETNS_DIR, Network
from clawdlets_ops.lab.processes import Group, mounts_below, wait_until
from clawdlets_ops.process import Background, Runner, spawn

log = logging.getLogger(__name__)

BOOT_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 20.0

_REBOOTED = 133  # EXIT_FORCE_RESTART of systemd-nspawn
_SIGRTMIN = 34  # glibc's; systemd(1): +3 powers off, +5 reboots
_INIT_GROUP = "payload/init.scope"  # where systemd moves itself once it is up
_NSPAWN_LEFT = Path("/run/systemd/nspawn")

Rules = tuple[Rule, ...] | None


@dataclass
class _Machine:
    """What is known of one machine; guarded by its condition."""

    spec: MachineSpec
    rules: Rules
    powered: bool
    disk: Disk
    group: Group
    changed: threading.Condition = field(default_factory=threading.Condition)
    thread: threading.Thread | None = None
    process: Background | None = None
    boots: int = 0
    stopping: bool = False
    resetting: bool = False
    failure: Exception | None = None

    @property
    def running(self) -> bool:
        return self.thread is not None

    def save(self) -> None:
        """Write machine.json: what is needed to make the machine again after the lab's daemon has died."""
        rules = None if self.rules is None else [asdict(rule) for rule in self.rules]
        content = {"spec": asdict(self.spec), "rules": rules, "powered": self.powered}
        write_atomic(self.disk.folder / "machine.json", json.dumps(content, indent=1) + "\n")


@dataclass(frozen=True)
class MachineState:
    """A machine as it is now: the process id of its init, when it runs, and whether its disk holds an installed system."""

    server_id: int
    name: str
    running: bool
    installed: bool
    leader_pid: int | None


class Machines:
    """The MachineBackend of the lab. ``folder`` holds a folder per machine; ``base`` is the Debian they all start from.

    ``path`` is the search path for systemd-nspawn. ``on_down`` is told the id of a machine that stops or reboots.
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
    ) -> None:
        self._folder = ensure_dir(folder)
        self._base = base
        self._network = network
        self._runner = runner
        self._path = path
        self._on_down = on_down
        self._lock = threading.RLock()
        self._machines: dict[int, _Machine] = {}
        for saved in sorted(folder.glob("*/machine.json")):
            machine = self._machine_from(json.loads(saved.read_text()))
            self._machines[machine.spec.server_id] = machine

    # What the cloud asks for

    def create(self, spec: MachineSpec, rules: Rules) -> None:
        with _as_backend_error(), self._lock:
            if spec.server_id in self._machines:
                raise BackendError("action_failed", f"server {spec.server_id} exists")
            folder = ensure_dir(self._folder / str(spec.server_id))
            machine = _Machine(spec, rules, True, self._disk(folder), self._group(spec.server_id))
            self._machines[spec.server_id] = machine
            self._filter()
        with _as_backend_error():
            machine.disk.make()
            machine.disk.seed(spec)
            machine.save()
            self._start(machine)

    def power_on(self, server_id: int) -> None:
        with _as_backend_error():
            self._start(self._get(server_id))

    def power_off(self, server_id: int, *, graceful: bool) -> None:
        with _as_backend_error():
            self._stop(self._get(server_id), graceful=graceful)

    def reboot(self, server_id: int, *, hard: bool) -> None:
        machine = self._get(server_id)
        with _as_backend_error():
            with machine.changed:
                boots = machine.boots
                if not machine.running:
                    raise BackendError("server_not_started", "the machine is off")
            if not hard:
                for pid in machine.group.pids(_INIT_GROUP)[:1]:
                    os.kill(pid, _SIGRTMIN + 5)
            if hard or not self._booted_again(machine, boots, STOP_TIMEOUT_S):
                with machine.changed:
                    machine.resetting = True
                machine.group.kill()
                if not self._booted_again(machine, boots, BOOT_TIMEOUT_S):
                    raise BackendError("action_failed", "the machine did not come up again")
            self._raise_failure(machine)

    def rebuild(self, spec: MachineSpec, rules: Rules) -> None:
        machine = self._get(spec.server_id)
        with _as_backend_error():
            self._stop(machine, graceful=False)
            machine.spec = spec
            self.set_rules(spec.server_id, rules)
            machine.disk.make()
            machine.disk.seed(spec)
            self._start(machine)

    def delete(self, server_id: int) -> None:
        with self._lock:
            machine = self._machines.get(server_id)
        if machine is None:
            return
        with _as_backend_error():
            self._stop(machine, graceful=False)
            self._clean_up(machine)
            machine.disk.remove()
            with self._lock:
                del self._machines[server_id]
                self._filter()

    def set_rules(self, server_id: int, rules: Rules) -> None:
        machine = self._get(server_id)
        with _as_backend_error(), self._lock:
            before, machine.rules = machine.rules, rules
            try:
                self._filter()
            except BaseException:
                machine.rules = before
                raise
            machine.save()

    # What the daemon asks for

    def resume(self) -> None:
        """Put the firewall into force and boot what was on, after the lab's daemon has died; failures are logged."""
        with self._lock:
            machines = list(self._machines.values())
            self._filter()
        for machine in machines:
            if machine.powered:
                try:
                    self._start(machine)
                except (ClawdletsError, BackendError):
                    log.exception("server %s does not boot again", machine.spec.name)

    def states(self) -> list[MachineState]:
        """All machines, by id."""
        with self._lock:
            machines = sorted(self._machines.items())
        found = []
        for server_id, machine in machines:
            leader = machine.group.pids(_INIT_GROUP)[:1] if machine.running else []
            found.append(
                MachineState(
                    server_id,
                    machine.spec.name,
                    machine.running,
                    machine.disk.installed,
                    leader[0] if leader else None,
                )
            )
        return found

    # How it is done

    def _get(self, server_id: int) -> _Machine:
        with self._lock:
            if server_id not in self._machines:
                raise BackendError("not_found", f"there is no machine {server_id}")
            return self._machines[server_id]

    def _disk(self, folder: Path) -> Disk:
        return Disk(folder, self._base, self._runner)

    def _group(self, server_id: int) -> Group:
        return Group(f"{self._network.net.prefix}/m{server_id}")

    def _machine_from(self, saved: dict[str, Any]) -> _Machine:
        spec = MachineSpec(**{**saved["spec"], "authorized_keys": tuple(saved["spec"]["authorized_keys"])})
        rules = None
        if saved["rules"] is not None:
            rules = tuple(Rule(**{**rule, "networks": tuple(rule["networks"])}) for rule in saved["rules"])
        disk = self._disk(self._folder / str(spec.server_id))
        return _Machine(spec, rules, bool(saved["powered"]), disk, self._group(spec.server_id))

    def _filter(self) -> None:
        with self._lock:
            self._network.filter({server_id: machine.rules for server_id, machine in self._machines.items()})

    def _start(self, machine: _Machine) -> None:
        """Boot it and return when its init runs; nothing when it runs already. ClawdletsError, BackendError."""
        with machine.changed:
            if machine.running:
                return
            boots = machine.boots
            machine.powered, machine.stopping, machine.resetting, machine.failure = True, False, False, None
            machine.save()
            name = f"machine-{machine.spec.server_id}"
            machine.thread = threading.Thread(target=self._run, args=(machine,), name=name, daemon=True)
            machine.thread.start()
        if not self._booted_again(machine, boots, BOOT_TIMEOUT_S * 2):
            self._stop(machine, graceful=False)
            self._raise_failure(machine)
            raise BackendError("action_failed", "the machine did not boot in time")
        self._raise_failure(machine)

    def _stop(self, machine: _Machine, *, graceful: bool) -> None:
        """Power it off, the hard way when it does not go in time. LabError, BackendError."""
        with machine.changed:
            machine.stopping = True
        if graceful:
            told: Background | None = None

            def gone() -> bool:
                nonlocal told
                with machine.changed:
                    process = machine.process
                if process is None or process is told or process.poll() is not None:
                    return not machine.running
                if machine.group.pids(_INIT_GROUP):
                    os.kill(process.pid, signal.SIGTERM)  # systemd-nspawn tells the guest's init to power off
                    told = process
                return not machine.running

            wait_until(gone, timeout_s=STOP_TIMEOUT_S)

        def killed() -> bool:
            machine.group.kill()
            return not machine.running

        wait_until(killed, timeout_s=STOP_TIMEOUT_S)  # again and again: it may be in the middle of a boot
        with machine.changed:
            if machine.running:
                raise BackendError("action_failed", "the machine cannot be stopped")
            if machine.powered and machine.disk.folder.exists():
                machine.powered = False
                machine.save()

    def _run(self, machine: _Machine) -> None:
        """One machine's life, from boot to boot, until it is off."""
        try:
            while not machine.stopping:
                status = self._boot(machine).wait()
                self._clean_up(machine)
                with machine.changed:
                    again, machine.resetting = machine.resetting, False
                log.info("server %s ended with status %s", machine.spec.name, status)
                if status != _REBOOTED and not again:
                    break
            with machine.changed:
                machine.powered = False
                machine.save()
        except (ClawdletsError, BackendError, OSError) as error:
            log.exception("server %s", machine.spec.name)
            machine.failure = error
            self._clean_up(machine)
        finally:
            with machine.changed:
                machine.thread = machine.process = None
                machine.changed.notify_all()

    def _boot(self, machine: _Machine) -> Background:
        """Start it and wait for its init; ClawdletsError."""
        spec = machine.spec
        key = self._network.net.key_of(spec.ipv4)
        if key is None:
            raise BackendError("action_failed", f"{spec.ipv4} is not an address of this lab")
        machine.disk.mount()
        self._network.attach(spec.server_id, key)
        machine.group.make()
        process = spawn(
            machine.group.enter_argv(self._nspawn(machine)),
            env={"PATH": self._path, "LANG": "C.UTF-8", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            log_file=machine.disk.folder / "console.log",
        )
        with machine.changed:
            machine.process = process
        up = wait_until(
            lambda: process.poll() is not None or bool(machine.group.pids(_INIT_GROUP)), timeout_s=BOOT_TIMEOUT_S
        )
        with machine.changed:
            if not up or (process.poll() is not None and not machine.stopping):
                raise LabError(
                    "systemd-nspawn ended at once" if up else "no init within the time limit",
                    where=f"server {spec.name}",
                    fix=f"see {machine.disk.folder / 'console.log'}",
                )
            machine.boots += 1
            machine.changed.notify_all()
        return process

    def _nspawn(self, machine: _Machine) -> list[str]:
        # All capabilities and bpf make IPAddressDeny= effective inside; without them systemd takes it and does nothing.
        # systemd-nspawn mounts the guest's /sys before it enters the namespace: started inside, it shows the guest's links.
        name = self._network.net.machine_ns(machine.spec.server_id)
        return [
            "nsenter",
            f"--net={NETNS_DIR / name}",
            "systemd-nspawn",
            "--quiet",
            "--register=no",
            "--keep-unit",
            "--console=read-only",
            "--capability=all",
            "--system-call-filter=bpf",
            f"--network-namespace-path={NETNS_DIR / name}",
            "--resolv-conf=off",
            "--timezone=off",
            "--link-journal=no",
            f"--directory={machine.disk.root}",
            f"--machine={name}",
            "--boot",
        ]

    def _clean_up(self, machine: _Machine) -> None:
        """Remove what one boot made, and nothing of the disk."""
        server_id = machine.spec.server_id
        self._on_down(server_id)
        machine.group.kill()
        forget_nspawn(self._network.net.machine_ns(server_id), machine.disk.root)
        machine.disk.unmount()
        self._network.detach(server_id)
        machine.group.remove()

    def _booted_again(self, machine: _Machine, boots: int, timeout_s: float) -> bool:
        """Whether it has booted more often than ``boots`` times, as soon as that is certain."""
        with machine.changed:
            machine.changed.wait_for(lambda: machine.boots > boots or not machine.running, timeout=timeout_s)
            return machine.boots > boots

    def _raise_failure(self, machine: _Machine) -> None:
        if machine.failure is not None:
            raise BackendError("action_failed", str(machine.failure))


@contextmanager
def _as_backend_error() -> Iterator[None]:
    try:
        yield
    except (ClawdletsError, OSError) as error:
        raise BackendError("action_failed", str(error)) from error


def forget_nspawn(name: str, root: Path) -> None:
    """Remove what systemd-nspawn leaves in /run when it is killed, or when /run is no file system of its own."""
    if root.exists():
        info = root.stat()
        (_NSPAWN_LEFT / "locks" / f"inode-{info.st_dev}:{info.st_ino}").unlink(missing_ok=True)
    for folder in (_NSPAWN_LEFT / "propagate" / name, _NSPAWN_LEFT / "unix-export" / name):
        if folder.is_dir() and not mounts_below(folder):
            folder.rmdir()
