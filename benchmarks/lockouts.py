"""Lockdowns of lab hosts, each with a fault at a random step: is anybody ever locked out?

    python benchmarks/lockouts.py --rounds 200 --hosts 3 --seed 1

Hosts are installed once; a round locks one down in a process of its own, a fault happens at a random step of it (up to a
second after that step was reached), and once process, watchdog and the host's trial have come to their end, it is judged by
real logins and probes: *locked* (edge closed, host closed for good, a login over the tailnet works, none from the internet
side), *open* (edge and host as before, a login from the internet side works), *half* (something else, with a way in), or
*lockout* (no way in). Then faults are cleared and both doors put back for the next round. Faults that would be over by
themselves are; the others stay until the judgement. A tailnet that goes away after the host was confirmed is judged once it
is back, and counted in a column of its own: no transaction can undo what has been confirmed.

Needs what ``clawdlets lab up`` needs. ``--json FILE`` keeps every round. Exit status 1 for a lockout, a half, or rounds
that are missing.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from clawdlets_ops import lockdown, provision, ssh, workflow
from clawdlets_ops.errors import ClawdletsError, LabError
from clawdlets_ops.hetzner import FirewallRule
from clawdlets_ops.install import ADMIN
from clawdlets_ops.lab import control, faults
from clawdlets_ops.lab.headscale import REAL, Programs, RealTailnet
from clawdlets_ops.lab.registry import read_record
from clawdlets_ops.lab.scenario import Scenario
from clawdlets_ops.lockdown import Timing, edge, watchdog
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import Project, load_project
from clawdlets_ops.secrets import store

ROOT = Path(__file__).parents[1]
# A step is begun with the first message that starts like this; the last two are the commit and what follows it.
STEPS = {
    "proof": "wait for the host on the tailnet",
    "two logins": "logged in twice",
    "after the restart": "a fresh login came through ",
    "watchdog armed": "the watchdog is armed",
    "host on trial": "the host's firewall is on trial",
    "edge closes": "update hcloud_firewall.edge",
    "edge closed": "the edge is closed",
    "probed": "probed from outside",
    "confirmed": "confirmed on the host",
}
COMMITTED = ("confirmed",)
FAULTS = (
    "tailnet down",
    "tailscaled restarted",
    "node key expired",
    "API errors",
    "firewall pending for ever",
    "watchdog killed",
    "operator killed -9",
    "host rebooted",
)
NONE, BOTH = "none", "operator and watchdog killed"
TIMING = Timing(trial_s=60, watchdog_s=50.0, edge_s=20.0, tailnet_s=25.0, restore_s=40.0)
SETTLED_WITHIN_S = 200.0
LOGIN_S = 8.0
LOOKED_AT_FOR_S = 60.0  # a login on a busy machine may not come through at once; a closed door stays closed


@dataclass
class Round:
    """One lockdown. ``revert_s`` is from the fault to the first moment at which a login from the internet side worked
    again, for one that ended open; ``said`` is how the command ended."""

    number: int
    host: str
    fault: str
    step: str
    delay_s: float
    happened: bool = False
    ended: str = ""
    said: str = ""
    revert_s: float | None = None
    after_commit: bool = False
    seconds: float = 0.0
    watchdog: str = ""
    notes: list[str] = field(default_factory=list)


class Bench:
    """The lab with its installed hosts, and how to look at them and break them."""

    def __init__(self, lab: Scenario, hosts: list[str], timing: Timing) -> None:
        self.lab, self.timing = lab, timing
        self.project: Project = load_project(lab.root, lab.environ)
        self.tools = workflow.tools_for(self.project)
        self.runner = LocalRunner(self.project.environ)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._install, hosts))
        self.servers = {host: self.tools.cloud.server(host) for host in hosts}
        self.pins = {host: store.host_ssh_pin(self.project, host) for host in hosts}
        self.rules: dict[str, tuple[FirewallRule, ...]] = {}
        self.tailnets = {}
        for host in hosts:
            firewall = self.tools.cloud.firewall(provision.firewall_name(host))
            assert firewall is not None
            self.rules[host] = firewall.rules
            self.tailnets[host] = self._tailnet(host)
        self.expired = False
        self.leaders: dict[str, int | None] = {}
        record = read_record(lab.layout.lab)
        assert record is not None
        self.headscale = None
        if record.tailnet == REAL:
            programs = Programs.find(lab.layout.cache / "tools")
            assert programs is not None
            self.headscale = RealTailnet(
                record.net, programs, record.lab_dir / "tailnet", self.runner, path=record.path
            )

    def _install(self, host: str) -> None:
        for stage in ("payload", "provision", "install"):
            workflow.apply(stage, self.project, host, self.tools)

    def _tailnet(self, host: str) -> dict[int, str]:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            if found := lockdown.tailnet_addresses(self.runner, host, self.project.fleet.host(host)):
                return found
            time.sleep(1)
        raise SystemExit(f"{host} is not on the tailnet")

    def connect_anew(self) -> None:
        """After a fork: a connection to the API must not be shared by two processes."""
        self.tools = workflow.tools_for(self.project)

    def lock_down(self, host: str, say: Callable[[str], None]) -> None:
        lockdown.apply(
            self.project, host, runner=self.runner, cloud=self.tools.cloud, server=self.servers[host],
            pin=self.pins[host], say=say, timing=self.timing, journal=self.tools.journal.folder,
        )  # fmt: skip

    def guest(self, host: str, script: str, *, timeout_s: float = 240.0) -> str:
        """Run it in the guest. The way in is kept until the guest has another init: to ask for it costs API requests."""
        if (leader := self.leaders.get(host)) is None or not Path(f"/proc/{leader}").exists():
            leader = self.leaders[host] = self._leader(host)
        argv = ["nsenter", "-t", str(leader), "-a", "env", f"PATH={control.GUEST_PATH}", "sh", "-c", script]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
        if done.returncode and not Path(f"/proc/{leader}").exists():
            self.leaders.pop(host)
        return done.stdout.strip()

    def _leader(self, host: str) -> int:
        """The guest's init; asked for until the lab says it, as the rounds use up the budget of requests that it has, too."""
        deadline = time.monotonic() + 300
        while True:
            try:
                return control.find_server(self.lab.layout, host).leader_pid
            except LabError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(2)

    def login(self, host: str, address: str) -> bool:
        """A fresh login with the pinned key that runs a command."""
        target = ssh.Target(host, address, ADMIN, self.project.ssh_identity_file(host), self.pins[host])
        try:
            with ssh.session(target, timeout_s=LOGIN_S) as shell:
                return shell.run("true", timeout_s=10).ok
        except ClawdletsError:
            return False

    def by_internet(self, host: str) -> bool:
        return self.login(host, self.servers[host].addresses[4])

    def _answers(self, host: str) -> bool:
        """Whether the port opens at all: cheaper than a login."""
        with suppress(OSError), socket.create_connection((self.servers[host].addresses[4], 22), timeout=1.0):
            return True
        return False

    def by_tailnet(self, host: str) -> bool:
        return self.login(host, self.tailnets[host][4])

    def account(self, host: str) -> dict[str, str]:
        said = self.guest(host, "clawdlets-exposure account")
        return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)

    def edge_open(self, host: str) -> bool | None:
        for _ in range(40):
            with suppress(ClawdletsError):
                firewall = self.tools.cloud.firewall(provision.firewall_name(host))
                return None if firewall is None else firewall.ssh_is_open
            time.sleep(0.5)
        return None

    # Faults

    def inject(self, fault: str, host: str, chance: random.Random) -> None:
        match fault:
            case "tailnet down":
                self.guest(
                    host,
                    "nft 'add table inet cut; add chain inet cut c { type filter hook input priority -10; };"
                    " add rule inet cut c iifname tailscale0 drop'",
                )
            case "tailscaled restarted":
                units = "tailscaled.service tailscaled-autoconnect.service"
                self.guest(
                    host, f"for u in {units}; do ! systemctl -q is-enabled $u 2>/dev/null || systemctl restart $u; done"
                )
            case "node key expired":
                if self.headscale is None:  # what an expired key amounts to
                    self.guest(host, "ip link set tailscale0 down")
                else:
                    self.headscale.expire(host)
            case "API errors":
                words = [chance.choice(("answer 500", "answer 503", "cut")), "*", "*", f"times={chance.randint(1, 25)}"]
                faults.inject(self.lab.layout, faults.parse_fault(" ".join(words).split()))
            case "firewall pending for ever":
                faults.inject(self.lab.layout, faults.parse_fault(["firewall-pending", host]))
            case "watchdog killed" | "operator and watchdog killed":
                order = edge.unfinished(self.lab.layout, host)
                pid = watchdog.state_of(self.lab.layout, order).get("pid") if order else None
                if pid and watchdog.lives(self.lab.layout, host):
                    os.kill(int(pid), signal.SIGKILL)
                if fault == BOTH:
                    os.kill(os.getpid(), signal.SIGKILL)
            case "operator killed -9":
                os.kill(os.getpid(), signal.SIGKILL)
            case "host rebooted":
                self.guest(host, "systemctl reboot")

    def mend(self, host: str) -> None:
        """The faults of this host, away; what is told apart from putting the doors back."""
        for fault in faults.faults(self.lab.layout):
            if fault.words[0] != "firewall-pending" or fault.words[1] == host:
                with suppress(ClawdletsError):
                    faults.clear(self.lab.layout, fault.id)
        self.guest(host, "nft delete table inet cut 2>/dev/null; ip link set tailscale0 up 2>/dev/null; true")
        if self.headscale is not None and self.expired:
            self.headscale.expire(host, datetime.now(UTC) + timedelta(days=400))
            self.expired = False
        if not self._wait(lambda: self.by_tailnet(host), 4):
            self.guest(host, "systemctl restart tailscaled.service tailscaled-autoconnect.service")
            self._wait(lambda: self.by_tailnet(host), 90)

    def reset(self, host: str) -> None:
        """Both doors as after the installation, and the tailnet up."""
        self.mend(host)
        self.guest(
            host,
            "systemctl stop clawdlets-exposure-revert.timer 2>/dev/null; rm -f /run/clawdlets/exposure-trial;"
            " echo bootstrap >/var/lib/clawdlets/exposure; clawdlets-exposure restore",
        )
        self._wait(lambda: self._rules_are_back(host), 60)  # another host's round may have the API fail
        shutil.rmtree(self.lab.layout.lockdown_dir(host), ignore_errors=True)
        if not self._wait(lambda: self.by_internet(host) and self.by_tailnet(host), 60):
            raise SystemExit(f"{host} could not be reset: {self.account(host)}")

    def _rules_are_back(self, host: str) -> bool:
        with suppress(ClawdletsError):
            firewall = self.tools.cloud.firewall(provision.firewall_name(host))
            if firewall is not None and firewall.rules == self.rules[host]:
                return True
            if firewall is not None:
                self.tools.cloud.set_rules(firewall, self.rules[host])
        return False

    @staticmethod
    def _wait(reached: Callable[[], bool], within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if reached():
                return True
            time.sleep(0.3)
        return False

    # A round

    def go(self, one: Round, seed: int) -> Round:
        began = time.monotonic()
        pipe, out = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(pipe)
            self._child(one, out, random.Random(seed))  # noqa: S311
        os.close(out)
        told = self._follow(one, pipe, child)
        fault_at = told.get("faultAt")
        opened_at = self._settle(one.host)
        self.expired = one.fault == "node key expired"
        self._judge(one)
        if one.ended == "open" and fault_at is not None and opened_at is not None:
            one.revert_s = round(max(0.0, opened_at - float(fault_at)), 1)
        with suppress(OSError, ValueError):
            order = edge.read_order(self.lab.layout, one.host)
            state = watchdog.state_of(self.lab.layout, order) if order else {}
            one.watchdog = f"{state.get('saw', '')}; {state.get('did', '')}".strip("; ")
        self.reset(one.host)
        one.seconds = round(time.monotonic() - began, 1)
        return one

    def _child(self, one: Round, out: int, chance: random.Random) -> None:
        """Never returns: a process of its own, so that it can be killed."""

        def tell(**what: object) -> None:
            os.write(out, (json.dumps(what) + "\n").encode())

        def strike() -> None:
            time.sleep(one.delay_s)
            tell(faultAt=time.monotonic())
            self.inject(one.fault, one.host, chance)

        pending = [one.fault != NONE]

        def say(text: str) -> None:
            if text.startswith(STEPS["confirmed"]):
                tell(committed=True)
            if pending[0] and text.startswith(STEPS[one.step]):
                pending[0] = False
                threading.Thread(target=strike, daemon=True).start()

        status = 1
        try:
            os.setpgid(0, 0)
            self.connect_anew()
            self.lock_down(one.host, say)
            tell(said="locked down")
            status = 0
        except ClawdletsError as error:
            tell(said=str(error)[:600])
        except BaseException:
            tell(said=traceback.format_exc()[-1500:])
        finally:
            os._exit(status)

    def _follow(self, one: Round, pipe: int, child: int) -> dict[str, object]:
        told: dict[str, object] = {}
        with os.fdopen(pipe) as lines:
            for line in lines:
                told |= json.loads(line)
        os.waitpid(child, 0)
        one.happened = "faultAt" in told
        one.said = str(told.get("said", "killed"))
        one.after_commit = bool(told.get("committed"))
        return told

    def _settle(self, host: str) -> float | None:
        """Wait until nobody and nothing is going to change a door any more; when a login from the internet first worked."""
        opened_at, ask_again_at = None, 0.0
        deadline = time.monotonic() + SETTLED_WITHIN_S
        while time.monotonic() < deadline:
            if opened_at is None and self._answers(host) and self.by_internet(host):
                opened_at = time.monotonic()
            if not watchdog.lives(self.lab.layout, host):
                seen = self.account(host)
                if seen.get("armed") == "no" and (opened_at is not None or seen.get("mode") == "tailnet"):
                    break
                if seen.get("armed") == "no" and time.monotonic() > ask_again_at:
                    if self.edge_open(host) is False:
                        break
                    ask_again_at = time.monotonic() + 3  # the budget of requests is for what is tested
            time.sleep(0.7)
        if opened_at is None and self.by_internet(host):
            opened_at = time.monotonic()
        return opened_at

    def _judge(self, one: Round) -> None:
        self._wait(lambda: self._look(one) in ("locked", "open"), LOOKED_AT_FOR_S)
        one.ended = self._look(one)
        if one.ended == "lockout" and one.after_commit and one.fault in ("tailnet down", "node key expired"):
            one.notes.append("the tailnet went away after the host was confirmed")
            self.mend(one.host)
            one.ended = f"{self._look(one)}, tailnet lost later"

    def _look(self, one: Round) -> str:
        seen = self.account(one.host)
        internet, tailnet, edge_open = self.by_internet(one.host), self.by_tailnet(one.host), self.edge_open(one.host)
        closed = (seen.get("mode"), seen.get("kept"), seen.get("armed")) == ("tailnet", "tailnet", "no")
        opened = (seen.get("mode"), seen.get("kept"), seen.get("armed")) == ("bootstrap", "bootstrap", "no")
        one.notes = [note for note in one.notes if not note.startswith("edge ")]
        one.notes.append(f"edge open {edge_open}, host {seen.get('mode')}, internet {internet}, tailnet {tailnet}")
        if closed and edge_open is False and tailnet and not internet:
            return "locked"
        if opened and edge_open and internet:
            return "open"
        return "half" if internet or tailnet else "lockout"


def plan(rounds: int, hosts: list[str], kinds: list[str], chance: random.Random) -> list[Round]:
    """Each fault equally often, at random steps; the order is random. A watchdog can only be killed once it is there."""
    steps = list(STEPS)
    made = []
    for number in range(rounds):
        fault = kinds[number % len(kinds)]
        possible = steps[steps.index("watchdog armed") :] if fault in ("watchdog killed", BOTH) else steps
        made.append(
            Round(number, hosts[number % len(hosts)], fault, chance.choice(possible), round(chance.uniform(0, 1), 2))
        )
    chance.shuffle(made)
    for number, one in enumerate(made):
        one.number, one.host = number, hosts[number % len(hosts)]
    return made


def table(rounds: list[Round]) -> str:
    """Fault by how it ended, and the time to revert."""
    endings = ["locked", "open", "locked, tailnet lost later", "half", "lockout"]
    endings += sorted({one.ended for one in rounds} - set(endings))
    lines = [f"| fault | rounds | {' | '.join(endings)} | revert, median | max |"]
    lines.append("| --- |" + " ---: |" * (len(endings) + 3))
    kinds = [kind for kind in (NONE, *FAULTS, BOTH) if any(one.fault == kind for one in rounds)]
    for kind in [*kinds, "all"]:
        found = [one for one in rounds if kind in (one.fault, "all")]
        times = [one.revert_s for one in found if one.revert_s is not None]
        shown = [f"{statistics.median(times):.1f} s", f"{max(times):.1f} s"] if times else ["-", "-"]
        counts = [str(sum(one.ended == ending for one in found)) for ending in endings]
        lines.append(f"| {kind} | {len(found)} | {' | '.join(counts)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tailnet", choices=["auto", "real", "stand-in"], default="auto")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="faults, with commas between; also: none, " + BOTH)
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no round after this time; 0: no limit")
    parser.add_argument("--json", type=Path, help="where every round is kept, a line each")
    arguments = parser.parse_args()
    hosts = [f"host{number}" for number in range(1, arguments.hosts + 1)]
    document = json.loads((ROOT / "fleet" / "clawdlets.json").read_text())
    document["hosts"] = {name: copy.deepcopy(document["hosts"]["alpha"]) for name in hosts}
    document.pop("cattle", None)  # it names a host of the example fleet
    folder = Path(tempfile.mkdtemp(prefix="clawdlets-lockouts-")).resolve()
    done: list[Round] = []
    began = time.monotonic()
    try:
        with Scenario(
            document, folder=folder / "project", cache=ROOT / ".cache", environ=os.environ, tailnet=arguments.tailnet
        ) as lab:
            bench = Bench(lab, hosts, TIMING)
            planned = plan(arguments.rounds, hosts, arguments.kinds.split(","), random.Random(arguments.seed))  # noqa: S311
            done = run(bench, hosts, planned, arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(done))
    print(
        f"{len(done)} rounds in {time.monotonic() - began:.0f} s; the fault happened in {sum(one.happened for one in done)}"
    )
    for one in done:
        if one.ended in ("half", "lockout"):
            print(json.dumps(asdict(one)))
    if missing := 0 if arguments.minutes else arguments.rounds - len(done):
        print(f"{missing} rounds are missing")
    return 1 if missing or any(one.ended in ("half", "lockout") for one in done) else 0


def run(bench: Bench, hosts: list[str], planned: list[Round], arguments: argparse.Namespace) -> list[Round]:
    """A process a host, each with its share of the rounds: a process of one thread is what may be forked."""
    results = bench.lab.root.parent / "rounds.jsonl"
    if arguments.json:
        results = arguments.json
    results.touch()
    before = len(results.read_text().splitlines())
    deadline = time.monotonic() + arguments.minutes * 60 if arguments.minutes else float("inf")
    children = []
    for host in hosts:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                bench.connect_anew()
                for one in [one for one in planned if one.host == host]:
                    if time.monotonic() > deadline:
                        break
                    ended = bench.go(replace(one), arguments.seed * 100_003 + one.number)
                    with results.open("a") as lines:
                        lines.write(json.dumps(asdict(ended)) + "\n")
                    print(
                        f"{ended.number:4} {host} {ended.fault}, at {ended.step}: {ended.ended} ({ended.seconds} s)",
                        file=sys.stderr,
                        flush=True,
                    )
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [Round(**json.loads(line)) for line in results.read_text().splitlines()[before:]]


if __name__ == "__main__":
    sys.exit(main())
