"""A fleet bootstrapped by one command, and run again: against one host, plain pyinfra and Ansible, on the same lab hosts.

``python -P benchmarks/fleet.py [--hosts 20] [--rounds 3]`` needs what the lab needs. One lab: one host is bootstrapped by
``clawdlets bootstrap``, then ``--hosts`` more by one command; then everything runs again with nothing to do. The peers do
ten things that are done already on the same hosts, over the same addresses, with the same key and pinned host keys: pyinfra
(its own SSH connector) asks ten facts in ten ``files.directory`` operations, Ansible (``ansible.builtin.file``, pipelining,
one fork a host) does ten tasks. They prove nothing about the hosts; ``clawdlets bootstrap`` ends with its verification.

Counted: API requests in the emulator's journal; logins in the hosts' own journals of sshd; processes by looking, ten times
a second. Peak memory is the sum of the resident sets of a command and all that it started, pages that they share counted
each time. Seconds are this machine's; ratios are printed beside them.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clawdlets_ops.lab.scenario import Scenario, environment
from clawdlets_ops.verify.ssh_config import known_hosts, ssh_config

ROOT = Path(__file__).parents[1]
ANSIBLE = ROOT / ".cache" / "molecule-venv"
COMMAND_TIMEOUT_S = 3600
SAMPLE_S = 0.1
NOOPS = ("/etc", "/etc/ssh", "/etc/systemd", "/home", "/opt", "/run", "/srv", "/usr", "/var", "/var/lib")

PYINFRA_DEPLOY = f"""\
from pyinfra.operations import files

for path in {NOOPS!r}:
    files.directory(name=path, path=path)
"""


@dataclass(frozen=True)
class Cost:
    """What a command took: ``requests`` to the API by whom, ``logins`` over all hosts."""

    seconds: float
    peak_mb: float
    most_processes: int
    requests: int
    provider_requests: int
    mutations: int
    logins: int
    text: str


class Bench:
    """A lab, and commands whose cost is counted."""

    def __init__(self, lab: Scenario) -> None:
        self.lab = lab
        self.shell = environment(os.environ)

    def run(self, argv: Sequence[str], hosts: Sequence[str], env: dict[str, str] | None = None) -> Cost:
        """Run to the end; RuntimeError with its output when it fails."""
        asked, logins = len(self._requests()), self.logins(hosts)
        with tempfile.TemporaryFile("w+") as output:
            started = time.perf_counter()
            process = subprocess.Popen(
                argv, cwd=self.lab.root, env={**self.shell, **(env or {})}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
            watch = Watch(process.pid)
            status = process.wait(timeout=COMMAND_TIMEOUT_S)
            seconds = time.perf_counter() - started
            watch.end()
            output.seek(0)
            text = output.read()
        if status:
            raise RuntimeError(f"{' '.join(argv)} ended with {status}:\n{text[-6000:]}")
        new = self._requests()[asked:]
        by_provider = sum("terraform" in entry["userAgent"] for entry in new)
        return Cost(
            seconds, watch.peak_mb, watch.most, len(new), by_provider, sum(entry["mutates"] for entry in new),
            self.logins(hosts) - logins, text,
        )  # fmt: skip

    def _requests(self) -> list[dict[str, Any]]:
        return [entry for entry in self.lab.journal() if not entry["path"].startswith(("/lab/", "/v1/lab/"))
                and not entry["userAgent"].startswith("clawdlets-lab")]  # fmt: skip

    def logins(self, hosts: Sequence[str]) -> int:
        """Accepted logins in the journals of all ``hosts`` that run."""

        def of(host: str) -> int:
            said = self.lab.guest(host, "journalctl", "--no-pager", "-u", "ssh", "-o", "cat")
            return said.check().stdout.count("Accepted publickey")

        there = [entry["body"]["name"] for entry in self._requests()
                 if (entry["method"], entry["path"], entry["status"]) == ("POST", "/v1/servers", 201)]  # fmt: skip
        with ThreadPoolExecutor(4) as pool:
            return sum(pool.map(of, [host for host in hosts if host in there]))


class Watch(threading.Thread):
    """Looks at a process and all below it until ``end``."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._over = pid, threading.Event()
        self.peak_mb, self.most = 0.0, 0
        self.start()

    def run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            pages, count = self._look()
            self.peak_mb = max(self.peak_mb, pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
            self.most = max(self.most, count)

    def end(self) -> None:
        self._over.set()
        self.join()

    def _look(self) -> tuple[int, int]:
        parents: dict[int, list[int]] = {}
        pages: dict[int, int] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(folder.name))
                pages[int(folder.name)] = int(fields[21])
        found = [self._pid]
        for pid in found:
            found += parents.get(pid, [])
        return sum(pages.get(pid, 0) for pid in found), len(found)


def ansible_bin() -> Path:
    """The folder of Ansible's programs, installed there from the pinned requirements when it is not yet."""
    requirements = ROOT / "requirements" / "molecule.txt"
    wanted = hashlib.sha256(f"{ANSIBLE} {sys.version}".encode() + requirements.read_bytes()).hexdigest()
    stamp = ROOT / ".cache" / "stamp" / "molecule"
    if not (stamp.exists() and stamp.read_text() == wanted):
        stamp.unlink(missing_ok=True)
        shutil.rmtree(ANSIBLE, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", ANSIBLE], check=True, capture_output=True)
        pip: list[str | Path] = [
            ANSIBLE / "bin" / "python",
            "-m",
            "pip",
            "install",
            "-q",
            "--no-input",
            "--disable-pip-version-check",
        ]
        subprocess.run([*pip, "--require-hashes", "--only-binary", ":all:", "-r", requirements], check=True)
        stamp.write_text(wanted)
    return ANSIBLE / "bin"


class Peers:
    """pyinfra and Ansible set up to do ten things that are done already on ``hosts``, as the verification logged in."""

    def __init__(self, lab: Scenario, hosts: Sequence[str], folder: Path) -> None:
        self.folder = folder
        targets = {}
        for host in hosts:
            newest = max(lab.layout.reports(host).glob("*T*Z"))
            targets[host] = json.loads((newest / "expectation.json").read_text())
        (folder / "known_hosts").write_text("".join(known_hosts(one) for one in targets.values()))
        config = "".join(ssh_config(one, folder) for one in targets.values())
        # Each its own sharing: Ansible's is its own, pyinfra has none.
        kept = [line for line in config.splitlines() if not line.strip().startswith("Control")]
        (folder / "config").write_text("\n".join(kept) + "\n")
        (folder / "deploy.py").write_text(PYINFRA_DEPLOY)
        by_address = "".join(f"{one['ssh']['address']} {one['ssh']['pin']}\n" for one in targets.values())
        (folder / "by_address").write_text(by_address)
        listed = [
            (
                one["ssh"]["address"],
                {
                    "ssh_user": one["ssh"]["user"], "ssh_key": one["ssh"]["identityFile"], "ssh_allow_agent": False,
                    "ssh_known_hosts_file": str(folder / "by_address"), "ssh_strict_host_key_checking": "yes",
                    "ssh_config_file": "/dev/null",
                },
            )
            for one in targets.values()
        ]  # fmt: skip
        (folder / "inventory.py").write_text(f"hosts = {listed!r}\n")
        (folder / "hosts.ini").write_text(
            "".join(f"{host} ansible_python_interpreter=/usr/bin/python3\n" for host in hosts)
        )
        tasks = [{"name": path, "ansible.builtin.file": {"path": path, "state": "directory"}} for path in NOOPS]
        (folder / "play.json").write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
        self.ansible_env = {
            "HOME": str(folder), "ANSIBLE_HOME": str(folder / "ansible"), "ANSIBLE_PIPELINING": "True",
            "ANSIBLE_FORKS": str(len(hosts)), "ANSIBLE_NOCOLOR": "1", "LC_ALL": "C.UTF-8",
            # The shared connection goes soon after the last task, so that each run logs in anew.
            "ANSIBLE_SSH_ARGS": f"-F {folder / 'config'} -o ControlMaster=auto -o ControlPersist=2s",
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(folder / "cp"), "PATH": f"{ansible_bin()}:{os.environ['PATH']}",
        }  # fmt: skip

    def pyinfra(self) -> list[str]:
        return ["pyinfra", "-y", str(self.folder / "inventory.py"), str(self.folder / "deploy.py")]

    def ansible(self) -> list[str]:
        return ["ansible-playbook", "-i", str(self.folder / "hosts.ini"), str(self.folder / "play.json")]


def row(what: str, cost: Cost, hosts: int, against_s: float | None = None) -> str:
    ratio = f"{cost.seconds / against_s:6.2f}" if against_s else "     -"
    return (
        f"{what:44} {cost.seconds:8.1f} {ratio} {cost.peak_mb:8.0f} {cost.most_processes:5} {cost.requests:6}"
        f" {cost.requests / hosts:7.1f} {cost.mutations:7} {cost.logins / hosts:11.1f}"
    )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="no-op runs of each, in turns; the best counts")
    parser.add_argument("--parallel", type=int, default=0, help="hosts at a time; default: as the command has it")
    parser.add_argument("--tailnet", default="stand-in", choices=("stand-in", "real", "auto"))
    options = parser.parse_args(words)
    document = json.loads((ROOT / "fleet" / "clawdlets.json").read_text())
    alpha = document["hosts"]["alpha"]
    one, many = "host00", [f"host{number:02}" for number in range(1, options.hosts + 1)]
    document["hosts"] = {name: copy.deepcopy(alpha) for name in (one, *many)}
    document.pop("cattle", None)  # it names the host that was the only one
    parallel = ["--parallel", str(options.parallel)] if options.parallel else []
    head = f"{'':44} {'seconds':>8} {'x':>6} {'peak MB':>8} {'procs':>5} {'API':>6} {'a host':>7} {'changes':>7} {'logins/host':>11}"
    with (
        Scenario(document, cache=ROOT / ".cache", environ=os.environ, tailnet=options.tailnet) as lab,
        tempfile.TemporaryDirectory(prefix="clb-") as scratch,
    ):
        bench = Bench(lab)
        print(head, flush=True)
        first = bench.run(["clawdlets", "bootstrap", one], [one])
        print(row("bootstrap of 1 host", first, 1), flush=True)
        fleet = bench.run(["clawdlets", "bootstrap", *many, *parallel], many)
        print(row(f"bootstrap of {len(many)} hosts (x: against 1)", fleet, len(many), first.seconds), flush=True)
        peers = Peers(lab, many, Path(scratch))
        again: dict[str, list[Cost]] = {"one": [], "clawdlets": [], "deploy": [], "pyinfra": [], "ansible": []}
        for _ in range(options.rounds):
            again["one"].append(bench.run(["clawdlets", "bootstrap", one], [one]))
            again["clawdlets"].append(bench.run(["clawdlets", "bootstrap", *many, *parallel], many))
            limit = [word for host in many for word in ("--limit", f"@clawdlets/{host}")]
            again["deploy"].append(
                bench.run(["pyinfra", "-y", "inventory/lab.py", "deploys/bootstrap.py", *limit], many)
            )
            again["pyinfra"].append(bench.run(peers.pyinfra(), many))
            again["ansible"].append(bench.run(peers.ansible(), many, peers.ansible_env))
        best = {name: min(costs, key=lambda cost: cost.seconds) for name, costs in again.items()}
        changed = [cost for name in ("one", "clawdlets") for cost in again[name] if " changed " in cost.text]
    base = best["clawdlets"].seconds
    print(row("again, 1 host", best["one"], 1, base))
    print(row(f"again, {len(many)} hosts: clawdlets bootstrap", best["clawdlets"], len(many), base))
    print(row("again, through pyinfra deploys/bootstrap.py", best["deploy"], len(many), base))
    print(row("plain pyinfra, 10 no-op operations", best["pyinfra"], len(many), base))
    print(row("Ansible, 10 no-op tasks", best["ansible"], len(many), base))
    print(f"x of the runs again: against clawdlets bootstrap of {len(many)} hosts; best of {options.rounds}, in turns")
    print(
        f"hosts changed by the runs again: {len(changed)}; requests by OpenTofu's provider in the first: {fleet.provider_requests}"
    )
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
