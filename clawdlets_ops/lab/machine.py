"""One server's life as a systemd-nspawn machine: boot, reboot, power off, the hard way where it must be.

One thread per running machine waits for its end: systemd-nspawn ends with status 133 when the guest reboots (measured,
systemd 252, ``--keep-unit``), and is then started again with a fresh network namespace, so that neither the guest's
firewall nor its ``tailscale0`` survives a reboot. Any other status is a machine that is off.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from clawdlets_ops.errors import ClawdletsError, LabError
from clawdlets_ops.files import write_atomic
from clawdlets_ops.lab.backend import BackendError, MachineSpec, Rule
from clawdlets_ops.lab.disk import Disk
from clawdlets_ops.lab.network import NETNS_DIR, Network
from clawdlets_ops.lab.processes import Group, mounts_below, wait_until
from clawdlets_ops.process import Background, spawn

log = logging.getLogger(__name__)

BOOT_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 20.0
RECORD_FILE: Final = "machine.json"

_PAUSE_TIMEOUT_S = 10.0
_REBOOTED = 133  # EXIT_FORCE_RESTART of systemd-nspawn
_SIGRTMIN = 34  # glibc's; systemd(1): +3 powers off, +5 reboots
_INIT_GROUP = "payload/init.scope"  # where systemd moves itself once it is up
_NSPAWN_LEFT = Path("/run/systemd/nspawn")

Rules = tuple[Rule, ...] | None


@dataclass(frozen=True)
class Site:
    """What every machine of a lab shares. ``path`` is the search path for systemd-nspawn."""

    network: Network
    path: str
    on_down: Callable[[int], None]
    on_off: Callable[[int], None]


@dataclass
class Desired:
    """What is asked of a machine, and survives the lab's daemon. ``rescue`` holds root's keys while a rescue is due."""

    spec: MachineSpec
    rules: Rules
    powered: bool = True
    rescue: tuple[str, ...] | None = None

    @classmethod
    def read(cls, file: Path) -> Desired:
        """As it was saved."""
        saved: dict[str, Any] = json.loads(file.read_text())
        spec = MachineSpec(**{**saved["spec"], "authorized_keys": tuple(saved["spec"]["authorized_keys"])})
        rules = None
        if saved["rules"] is not None:
            rules = tuple(Rule(**{**rule, "networks": tuple(rule["networks"])}) for rule in saved["rules"])
        keys = saved.get("rescue")
        return cls(spec, rules, bool(saved["powered"]), None if keys is None else tuple(keys))

    def write(self, file: Path) -> None:
        """Save it (0600): it holds the user data."""
        write_atomic(file, json.dumps(asdict(self), indent=1) + "\n")


class Machine:
    """One machine. Start, stop and reboot come from one thread at a time; everything else may come from any."""

    def __init__(self, desired: Desired, disk: Disk, site: Site) -> None:
        self.desired = desired
        self.disk = disk
        self.in_rescue = False
        self._site = site
        self._group = Group(f"{site.network.net.prefix}/m{self.server_id}")
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._process: Background | None = None
        self._boots = 0
        self._stopping = False
        self._resetting = False
        self._failure: Exception | None = None

    @property
    def server_id(self) -> int:
        return self.desired.spec.server_id

    @property
    def name(self) -> str:
        return self.desired.spec.name

    @property
    def running(self) -> bool:
        return self._thread is not None

    @property
    def leader_pid(self) -> int | None:
        """Its init's process id, while it runs."""
        found = self._group.pids(_INIT_GROUP) if self.running else []
        return found[0] if found else None

    @property
    def console(self) -> Path:
        """What it wrote on its console, over all boots; there from the first boot on."""
        return self.disk.folder / "console.log"

    def save(self) -> None:
        """Write machine.json: what is needed to make the machine again after the lab's daemon has died."""
        with self._changed:
            self.desired.write(self.disk.folder / RECORD_FILE)

    def readdress(self, spec: MachineSpec) -> None:
        """It has the public addresses of ``spec`` from the next boot on; BackendError when it is on."""
        with self._changed:
            if self.running:
                raise BackendError("server_not_stopped", "the machine is on")
            self.desired.spec = replace(self.desired.spec, ipv4=spec.ipv4, ipv6_network=spec.ipv6_network)
            self.save()

    def order_rescue(self, keys: tuple[str, ...] | None) -> None:
        """The next boot is into the rescue system with these keys; None takes the order back."""
        with self._changed:
            self.desired.rescue = keys
            self.save()

    def start(self) -> None:
        """Boot it and return when its init runs; nothing when it runs already. ClawdletsError, BackendError."""
        with self._changed:
            if self.running:
                return
            boots = self._boots
            self.desired.powered, self._stopping, self._resetting, self._failure = True, False, False, None
            self.save()
            self._thread = threading.Thread(target=self._run, name=f"machine-{self.server_id}", daemon=True)
            self._thread.start()
        if not self._booted_again(boots, BOOT_TIMEOUT_S * 2):
            self.stop(graceful=False)
            self._raise_failure()
            raise BackendError("action_failed", "the machine did not boot in time")
        self._raise_failure()

    def stop(self, *, graceful: bool) -> None:
        """Power it off, the hard way when it does not go in time. LabError, BackendError."""
        with self._changed:
            self._stopping = True
        if graceful:
            told: Background | None = None

            def gone() -> bool:
                nonlocal told
                with self._changed:
                    process = self._process
                if process is None or process is told or process.poll() is not None:
                    return not self.running
                if self._group.pids(_INIT_GROUP):
                    os.kill(process.pid, signal.SIGTERM)  # systemd-nspawn tells the guest's init to power off
                    told = process
                return not self.running

            wait_until(gone, timeout_s=STOP_TIMEOUT_S)

        def killed() -> bool:
            self._group.kill()
            return not self.running

        wait_until(killed, timeout_s=STOP_TIMEOUT_S)  # again and again: it may be in the middle of a boot
        with self._changed:
            if self.running:
                raise BackendError("action_failed", "the machine cannot be stopped")
            if self.desired.powered and self.disk.folder.exists():
                self.desired.powered = False
                self.save()

    def reboot(self, *, hard: bool) -> None:
        """Boot it anew, the hard way when it does not go in time. ClawdletsError, BackendError."""
        with self._changed:
            boots = self._boots
            if not self.running:
                raise BackendError("server_not_started", "the machine is off")
        if not hard:
            for pid in self._group.pids(_INIT_GROUP)[:1]:
                os.kill(pid, _SIGRTMIN + 5)
        if hard or not self._booted_again(boots, STOP_TIMEOUT_S):
            with self._changed:
                self._resetting = True
            self._group.kill()
            if not self._booted_again(boots, BOOT_TIMEOUT_S):
                raise BackendError("action_failed", "the machine did not come up again")
        self._raise_failure()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While it lasts, nothing of the machine runs, and its disk does not change; LabError when it does not stop."""
        folder = self._group.unified
        if not self.running or not self._group.populated():
            yield
            return
        try:
            (folder / "cgroup.freeze").write_text("1")
            if not wait_until(lambda: "frozen 1" in (folder / "cgroup.events").read_text(), timeout_s=_PAUSE_TIMEOUT_S):
                raise LabError("cannot be paused", where=f"server {self.name}", fix="power it off first")
            yield
        finally:
            if folder.exists():  # it may have been killed meanwhile
                (folder / "cgroup.freeze").write_text("0")

    def clean_up(self) -> None:
        """Remove what one boot made, and nothing of the disk."""
        network = self._site.network
        self._site.on_down(self.server_id)
        self._group.kill()
        forget_nspawn(network.net.machine_ns(self.server_id), self.disk.root)
        self.disk.unmount()
        network.detach(self.server_id)
        self._group.remove()

    def _run(self) -> None:
        """Its life, from boot to boot, until it is off."""
        try:
            while not self._stopping:
                status = self._boot().wait()
                self.clean_up()
                with self._changed:
                    again, self._resetting = self._resetting, False
                log.info("server %s ended with status %s", self.name, status)
                if status != _REBOOTED and not again:
                    break
            with self._changed:
                self.desired.powered = False
                self.save()
            self._site.on_off(self.server_id)
        except (ClawdletsError, BackendError, OSError) as error:
            log.exception("server %s", self.name)
            self._failure = error
            self.clean_up()
        finally:
            with self._changed:
                self._thread = self._process = None
                self._changed.notify_all()

    def _boot(self) -> Background:
        """Start it and wait for its init; ClawdletsError."""
        spec, network = self.desired.spec, self._site.network
        for address in filter(None, (spec.ipv4, spec.ipv6_network.removesuffix("/64"))):
            if network.net.key_of(address) is None:
                raise BackendError("action_failed", f"{address} is not an address of this lab")
        self._mount()
        network.attach(spec.server_id, spec.ipv4, spec.ipv6_network)
        self._group.make()
        process = spawn(
            self._group.enter_argv(self._nspawn()),
            env={"PATH": self._site.path, "LANG": "C.UTF-8", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            log_file=self.console,
        )
        with self._changed:
            self._process = process
        up = wait_until(
            lambda: process.poll() is not None or bool(self._group.pids(_INIT_GROUP)), timeout_s=BOOT_TIMEOUT_S
        )
        with self._changed:
            if not up or (process.poll() is not None and not self._stopping):
                raise LabError(
                    "systemd-nspawn ended at once" if up else "no init within the time limit",
                    where=f"server {spec.name}",
                    fix=f"see {self.console}",
                )
            self._boots += 1
            self._changed.notify_all()
        return process

    def _mount(self) -> None:
        """The disk, or once the rescue system that was ordered."""
        with self._changed:
            keys, self.desired.rescue = self.desired.rescue, None
            self.in_rescue = keys is not None
            if keys is not None:
                self.save()  # before the boot: whatever comes of it, the next one is from the disk
        if keys is None:
            self.disk.mount()
        else:
            self.disk.mount_rescue(self.desired.spec, keys)

    def _nspawn(self) -> list[str]:
        # All capabilities and bpf make IPAddressDeny= effective inside; without them systemd takes it and does nothing.
        # systemd-nspawn mounts the guest's /sys before it enters the namespace: started inside, it shows the guest's links.
        name = self._site.network.net.machine_ns(self.server_id)
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
            f"--directory={self.disk.root}",
            f"--machine={name}",
            "--boot",
        ]

    def _booted_again(self, boots: int, timeout_s: float) -> bool:
        """Whether it has booted more often than ``boots`` times, as soon as that is certain."""
        with self._changed:
            self._changed.wait_for(lambda: self._boots > boots or not self.running, timeout=timeout_s)
            return self._boots > boots

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise BackendError("action_failed", str(self._failure))


def forget_nspawn(name: str, root: Path) -> None:
    """Remove what systemd-nspawn leaves in /run when it is killed, or when /run is no file system of its own."""
    if root.exists():
        info = root.stat()
        (_NSPAWN_LEFT / "locks" / f"inode-{info.st_dev}:{info.st_ino}").unlink(missing_ok=True)
    for folder in (_NSPAWN_LEFT / "propagate" / name, _NSPAWN_LEFT / "unix-export" / name):
        if folder.is_dir() and not mounts_below(folder):
            folder.rmdir()
