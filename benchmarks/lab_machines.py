"""Lab machines: create to sshd answering as a ratio to a bare systemd-nspawn boot, machines side by side, memory of each.

``python benchmarks/lab_machines.py [--base DIR] [--rounds 10] [--fleet 10 20]`` needs root and the lab's base image. Lab and
floor take turns in the same run, so that a slow moment of this machine hits both. Both are timed to the first byte that
sshd says on port 22; the floor is an overlay over the same base, started in a veth pair, with nothing of the lab's around.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from clawdlets_ops.lab.addressing import Addressing
from clawdlets_ops.lab.backend import MachineSpec, Rule
from clawdlets_ops.lab.disk import Disk
from clawdlets_ops.lab.machine import forget_nspawn
from clawdlets_ops.lab.machines import Machines
from clawdlets_ops.lab.network import NETNS_DIR, Network
from clawdlets_ops.lab.processes import Group
from clawdlets_ops.lab.registry import claim_number, release_number
from clawdlets_ops.process import Command, LocalRunner, spawn

BASE = Path(__file__).parents[1] / ".cache" / "lab" / "base"
RUNNER = LocalRunner(os.environ)
WITHIN_S = 60.0
SSH_ONLY = (Rule("in", "tcp", "22", ("198.18.0.0/24",), None),)


def until_banner(address: str) -> None:
    """Returns as soon as sshd has said its first byte; TimeoutError."""
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, 22), timeout=0.2) as connection:
                if connection.recv(1):
                    return
        except OSError:
            time.sleep(0.01)
    raise TimeoutError(address)


def timed_ms(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


class Bench:
    """One lab's network and machines, and the floor beside it."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.number = claim_number(folder, RUNNER)
        self.network = Network(Addressing(self.number), RUNNER)
        self.machines = Machines(
            folder / "machines",
            base=base,
            network=self.network,
            runner=RUNNER,
            path=os.environ["PATH"],
            on_down=lambda _: None,
        )
        self._key = self._make_key()

    def _make_key(self) -> str:
        path = self.folder / "key"
        RUNNER.run(Command(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], "make a key")).check()
        return path.with_suffix(".pub").read_text().strip()

    def spec(self, slot: int) -> MachineSpec:
        ipv4, ipv6 = self.network.net.allocate(slot)
        return MachineSpec(7001 + slot, f"bench{slot}", ipv4, ipv6, "debian-12", (self._key,), "")

    def create(self, slot: int) -> None:
        spec = self.spec(slot)
        self.machines.create(spec, SSH_ONLY)
        until_banner(spec.ipv4)

    def delete(self, slot: int) -> None:
        self.machines.delete(7001 + slot)

    def memory_mib(self, slot: int) -> float:
        """The sum of its processes' proportional set sizes: pages that many machines share count once in all."""
        group = Group(f"{self.network.net.prefix}/m{7001 + slot}")
        pids = [int(pid) for file in group.unified.rglob("cgroup.procs") for pid in file.read_text().split()]
        total_kib = 0
        for pid in pids:
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            total_kib += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
        return total_kib / 1024

    def floor_ms(self, round_: int) -> float:
        """A bare boot: overlay, namespace, veth, systemd-nspawn; to sshd's first byte."""
        name, address = f"clffloor{self.number}", "198.19.0.2"
        folder = self.folder / f"floor{round_}"
        folder.mkdir()
        disk = Disk(folder, self.base, RUNNER)
        group = Group(f"clffloor{self.number}")
        spec = MachineSpec(1, "floor", address, "2001:2::/64", "debian-12", (self._key,), "")

        def ip(*words: str) -> None:
            RUNNER.run(Command(["ip", *words], "the floor's network")).check()

        def boot() -> None:
            disk.make()
            disk.seed(spec)
            disk.mount()
            ip("netns", "add", name)
            ip("link", "add", "clffloor", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("address", "add", "198.19.0.1/30", "dev", "clffloor")
            ip("link", "set", "clffloor", "up")
            ip("-n", name, "address", "add", f"{address}/30", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            group.make()
            argv = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--console=read-only"]
            argv += ["--capability=all", "--system-call-filter=bpf", f"--network-namespace-path={NETNS_DIR / name}"]
            argv += ["--resolv-conf=off", "--timezone=off", "--link-journal=no", f"-D{disk.root}", "-M", name, "--boot"]
            env = {"PATH": os.environ["PATH"], "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
            self._process = spawn(group.enter_argv(argv), env=env, log_file=folder / "console.log")
            until_banner(address)

        try:
            return timed_ms(boot)
        finally:
            group.kill()
            self._process.wait()
            forget_nspawn(name, disk.root)
            disk.remove()
            group.remove()
            RUNNER.run(Command(["ip", "link", "delete", "clffloor"], "the floor's network"))
            RUNNER.run(Command(["ip", "netns", "delete", name], "the floor's network"))

    def close(self) -> None:
        for state in self.machines.states():
            self.machines.delete(state.server_id)
        self.machines.close()
        self.network.sweep()
        Group(self.network.net.prefix).remove()
        release_number(self.number, self.folder)


@contextmanager
def bench(base: Path) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="clawdlets-bench-") as folder:
        made = Bench(Path(folder), base)
        try:
            made.network.up()
            made.machines.resume()
            yield made
        finally:
            made.close()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lab_machines")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--fleet", type=int, nargs="*", default=[10, 20])
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the lab is taken down
    if os.geteuid() != 0 or not options.base.is_dir():
        sys.stderr.write("lab_machines needs root and the lab's base image: make base\n")
        return 2
    rows: list[tuple[str, str]] = []
    with bench(options.base) as lab:
        lab_ms, floor_ms, delete_ms = [], [], []
        for round_ in range(options.rounds):
            floor_ms.append(lab.floor_ms(round_))
            lab_ms.append(timed_ms(lambda: lab.create(0)))
            delete_ms.append(timed_ms(lambda: lab.delete(0)))
        ours, floor = statistics.median(lab_ms), statistics.median(floor_ms)
        rows += [
            (f"create to sshd's first byte, median of {options.rounds}", f"{ours:.0f} ms"),
            ("a bare nspawn boot to sshd's first byte (floor)", f"{floor:.0f} ms"),
            ("ratio to the floor", f"{ours / floor:.2f}"),
            ("delete, median", f"{statistics.median(delete_ms):.0f} ms"),
        ]
        for count in options.fleet:
            with ThreadPoolExecutor(4) as pool:
                started = time.perf_counter()
                list(pool.map(lab.create, range(count)))
                took_s = time.perf_counter() - started
                memory = [lab.memory_mib(slot) for slot in range(count)]
                list(pool.map(lab.delete, range(count)))
            rows += [
                (f"{count} side by side, four made at a time, all answering", f"{took_s:.1f} s"),
                (f"memory of one of {count}, median (Pss)", f"{statistics.median(memory):.1f} MiB"),
            ]
    width = max(len(name) for name, _ in rows)
    sys.stdout.write("".join(f"{name:<{width}}  {value:>8}\n" for name, value in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
