"""Random kills over bootstraps of several lab hosts, each followed by a re-run; what is left over is counted.

    python benchmarks/kills.py --kills 300 --hosts 3 --seed 1

A round begins with an empty lab project. A bootstrap of all hosts (``pyinfra … deploys/bootstrap.py`` or ``clawdlets
bootstrap``, by chance) is killed with SIGKILL at a random instant and run again, until it ends by itself or the round has
had its share of kills; then a last run must end well, and a further one must change nothing. Half of the kills are for the
one process, as the kernel short of memory does it: the programs that it drives go on. Half are for all that it has
started, as when the machine's power fails. Needs what ``clawdlets lab up`` needs. The table so far is printed after each
round on standard error; SIGTERM or SIGINT ends the kills, lets the round converge and prints the table. ``--json`` prints
one object instead of the table. Exit status 1 when one count that must be 0 is not.

Counted, over all rounds: *duplicates* (servers that the API made beyond one for each host), *orphans* (servers,
firewalls, keys, addresses in the emulator beyond what the fleet declares), *reinstalls* (servers rebuilt, or
formatted again after the reboot into their own system), *plaintext keys* (private keys in the runtime
dir outside of where they belong), *not converged* (rounds whose last run did not end verified, or whose further run
changed something); and *failed runs* (that ended with an error by themselves, before the round's last one).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import hcloud

from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.journal import journals, read_journal
from clawdlets_ops.lab import control
from clawdlets_ops.lab.scenario import environment, lay_out, read_results
from clawdlets_ops.layout import Layout
from clawdlets_ops.workflow import STAGES

ROOT = Path(__file__).parents[1]
RUN_TIMEOUT_S = 1500.0
KILLS_A_ROUND = 12
LOOK_S = 0.2
FIRST_WITHIN_S = 6.0
"""A round's first kill comes sooner, so that the first stage, which is over in a second, is met as well."""
RUNS = {
    "pyinfra": ("pyinfra", "-y", "inventory/lab.py", "deploys/bootstrap.py"),
    "clawdlets": ("clawdlets", "bootstrap"),
}
ZERO = ("duplicates", "orphans", "reinstalls", "plaintext_keys", "not_converged")


@dataclass
class Tally:
    """What was counted; the names of ``ZERO`` must stay 0."""

    rounds: int = 0
    kills: int = 0
    runs: int = 0
    duplicates: int = 0
    orphans: int = 0
    reinstalls: int = 0
    plaintext_keys: int = 0
    not_converged: int = 0
    failed_runs: int = 0
    killed_in: Counter[str] = field(default_factory=Counter)
    killed: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


class Round:
    """One project and its lab, from nothing to converged."""

    def __init__(
        self,
        folder: Path,
        hosts: list[str],
        chance: random.Random,
        tally: Tally,
        within_s: float,
        stop: threading.Event,
        *,
        aimed: bool = False,
    ) -> None:
        self.within_s, self.stop, self.aimed = within_s, stop, aimed
        self.layout, self.hosts, self.chance, self.tally = Layout(folder), hosts, chance, tally
        # A temporary folder of our own: what a killed program leaves in it is looked at, and is nobody else's.
        self.temporary = folder.parent / "tmp"
        self.temporary.mkdir()
        self.shell = {**environment(os.environ), "TMPDIR": str(self.temporary)}
        document = json.loads((ROOT / "fleet" / "clawdlets.json").read_text())
        alpha = document["hosts"]["alpha"]
        document["hosts"] = {name: copy.deepcopy(alpha) for name in hosts}
        document.pop("cattle", None)  # it names the host that was the only one
        lay_out(folder, document, cache=ROOT / ".cache", environ=self.shell)

    def go(self, kills: int) -> None:
        try:
            control.up(self.layout, self.shell)
            for number in range(kills):
                aim = STAGES[number * len(STAGES) // kills] if self.aimed else ""
                within_s = min(self.within_s, FIRST_WITHIN_S) if number == 0 else self.within_s
                if self.stop.is_set() or self._run_and_kill(within_s, aim):
                    break
            last = self._run()
            again = self._run()
            self._count(last, again)
        finally:
            control.down(self.layout, self.shell)

    def _start(self, by: str = "pyinfra") -> subprocess.Popen[str]:
        self.tally.runs += 1
        # To a file: what a killed run has started may go on, and keep a pipe open.
        with (self.temporary.parent / "output").open("w") as output:
            return subprocess.Popen(
                RUNS[by], cwd=self.layout.root, env=self.shell, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )  # fmt: skip

    def _run_and_kill(self, within_s: float, aim: str = "") -> bool:
        """Whether it ended by itself before the kill came. The time for that begins once a host is in the stage ``aim``, or
        in a later one."""
        by, what = self.chance.choice(sorted(RUNS)), self.chance.choice(("the process", "all it started"))
        began_s = time.time()
        process = self._start(by)
        # A run takes up where the one before it was killed: short spans reach the late stages too.
        after_s = self.chance.uniform(0.0 if aim else 1.0, within_s)
        try:
            while aim and self._stages(began_s) not in STAGES[STAGES.index(aim) :] and process.poll() is None:
                time.sleep(LOOK_S)
            process.wait(timeout=after_s)
        except subprocess.TimeoutExpired:
            started = descendants(process.pid) if what == "all it started" else []
            process.send_signal(signal.SIGKILL)
            for pid in started:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            self.tally.kills += 1
            self.tally.killed[f"{by}: {what}"] += 1
            self.tally.killed_in[self._stages(began_s)] += 1
            return False
        if process.returncode != 0:
            self.tally.failed_runs += 1
            self.tally.notes.append(f"a run before the last failed by itself:\n{self._said()[-3000:]}")
        return process.returncode == 0

    def _run(self) -> subprocess.CompletedProcess[str]:
        process = self._start()
        process.wait(timeout=RUN_TIMEOUT_S)
        return subprocess.CompletedProcess(process.args, process.returncode, self._said())

    def _said(self) -> str:
        return (self.temporary.parent / "output").read_text(errors="replace")

    def _stages(self, since_s: float) -> str:
        """Where the hosts of the run that began then were: the latest stage of any."""
        found = [path for path in journals(self.layout.runs) if path.stat().st_mtime >= since_s]
        last: dict[str, str] = {}
        for event in read_journal(found[-1]) if found else []:
            if event.get("host") and event.get("event") == "started":
                last[event["host"]] = event["stage"]
        return max(last.values(), key=STAGES.index, default="start-up")

    def _count(self, last: subprocess.CompletedProcess[str], again: subprocess.CompletedProcess[str]) -> None:
        settings = dict(
            line.split("=", 1)
            for line in self.layout.env_file.read_text().splitlines()
            if "=" in line and line[0] != "#"
        )
        client = hcloud.Client(settings["HCLOUD_TOKEN"], api_endpoint=settings["HCLOUD_ENDPOINT"])
        made = [
            entry["body"]["name"]
            for entry in control.requests(self.layout)
            if entry["method"] == "POST" and entry["path"] == "/v1/servers" and entry["status"] == 201
        ]
        self.tally.duplicates += len(made) - len(set(made))
        servers = client.servers.get_all()
        hosts = len(self.hosts)
        beyond = {
            "servers": len(servers) - hosts,
            "firewalls": len(client.firewalls.get_all()) - hosts,
            "SSH keys": len(client.ssh_keys.get_all()) - 1,
            "unassigned addresses": sum(ip.assignee_id is None for ip in client.primary_ips.get_all()),
            "unattached volumes": sum(volume.server is None for volume in client.volumes.get_all()),
        }
        self.tally.orphans += sum(abs(count) for count in beyond.values())
        rebuilt = [entry for entry in control.requests(self.layout) if entry["path"].endswith("/actions/rebuild")]
        formatted = self._formatted_after_installed()
        self.tally.reinstalls += len(rebuilt) + len(formatted)
        left = self._plaintext_keys()
        self.tally.plaintext_keys += len(left)
        converged = last.returncode == 0 and again.returncode == 0
        converged = converged and not again.stdout.count("Traceback") and self._unchanged(again.stdout)
        self.tally.not_converged += not converged
        if not converged:
            self.tally.notes += [last.stdout[-3000:], again.stdout[-3000:]]
        self.tally.notes += [f"{name}: {count}" for name, count in beyond.items() if count]
        self.tally.notes += [f"formatted after it was installed: {name}" for name in formatted]
        self.tally.notes += [f"private key: {path}" for path in left]

    def _formatted_after_installed(self) -> list[str]:
        """Hosts for which a disko phase was begun after one had ended in the reboot into its own system."""
        found = []
        for host in self.hosts:
            installed = False
            for path in journals(self.layout.runs):
                for event in read_journal(path):
                    if event.get("host") != host or event.get("stage") != "install":
                        continue
                    if installed and event.get("text") == "phase disko":
                        found.append(host)
                    installed = installed or str(event.get("text")).startswith("wait for the installed host")
        return found

    def _plaintext_keys(self) -> list[Path]:
        """Private keys in clear: the operator's belong where they are, and a payload's tree until it is verified."""
        lab, keys = self.layout.lab, self.layout.operator_key("x").parent
        found = []
        for parent, folders, names in chain(os.walk(self.layout.root), os.walk(self.temporary)):
            folders[:] = [
                name for name in folders if Path(parent, name) not in (lab, keys) and name not in (".cache", ".git")
            ]
            for name in names:
                path = Path(parent, name)
                data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
                if b"PRIVATE KEY-----" in data or b"AGE-SECRET-KEY-1" in data:
                    found.append(path)
        return found

    @staticmethod
    def _unchanged(said: str) -> bool:
        try:
            return read_results(said).changed == 0
        except ClawdletsError:
            return False


def descendants(pid: int) -> list[int]:
    """The processes that ``pid`` has started, and those that they have, as they are now."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found = list(children.get(pid, ()))
    for child in found:
        found += children.get(child, ())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--within", type=float, default=45.0, help="a run is killed after 1 s to this many")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no kill after this time; 0: no limit")
    parser.add_argument(
        "--aimed", action="store_true", help="a round's kills go through the stages; --within is counted in each"
    )
    parser.add_argument("--a-round", type=int, default=KILLS_A_ROUND, help="kills before a round's last runs")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    chance, tally = random.Random(arguments.seed), Tally()  # noqa: S311 - not for secrets
    hosts = [f"host{number}" for number in range(1, arguments.hosts + 1)]
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    began = time.monotonic()
    while tally.kills < arguments.kills and not stop.is_set():
        if arguments.minutes and time.monotonic() - began > arguments.minutes * 60:
            break
        folder = Path(tempfile.mkdtemp(prefix="clawdlets-kills-")).resolve()
        try:
            Round(folder / "project", hosts, chance, tally, arguments.within, stop, aimed=arguments.aimed).go(
                min(arguments.a_round, arguments.kills - tally.kills)
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        tally.rounds += 1
        tally.seconds = round(time.monotonic() - began, 1)
        print(table(tally), file=sys.stderr, end="\n\n", flush=True)
    print(json.dumps(vars(tally), indent=2) if arguments.json else table(tally))
    return 1 if any(getattr(tally, name) for name in ZERO) else 0


def table(tally: Tally) -> str:
    rows = [
        (name.replace("_", " "), getattr(tally, name))
        for name in ("rounds", "kills", "runs", *ZERO, "failed_runs", "seconds")
    ]
    rows += [(f"killed in {stage}", count) for stage, count in sorted(tally.killed_in.items())]
    rows += [(f"killed {what}", count) for what, count in sorted(tally.killed.items())]
    return "\n".join([*(f"{name:34}{value}" for name, value in rows), *tally.notes])


if __name__ == "__main__":
    sys.exit(main())
