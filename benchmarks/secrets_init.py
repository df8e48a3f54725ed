"""secrets init against a loop of plain sops calls, in one run: cold, again, and again without what was remembered.

A fleet of 50 hosts with 20 secrets each (and the two keys that every host has). What is counted holds everywhere: sops
processes, by a runner that counts them. Seconds are this machine's and mean nothing elsewhere; the ratios do. The loop is
what somebody would write who has only sops: one call for each secret, one after the other, through the same program
with the same options; for the second time one call that decrypts, to see whether the value is the same.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from clawdlets_ops import age
from clawdlets_ops.process import Command, LocalRunner, Result
from clawdlets_ops.project import Project, load_project
from clawdlets_ops.secrets.observe import status
from clawdlets_ops.secrets.store import Outcome, init_host
from clawdlets_ops.secrets.vault import SOPS_AT_ONCE
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops, recipients

HOSTS, SECRETS = (int(word) for word in sys.argv[1:3]) if len(sys.argv) > 2 else (50, 20)
HASHES, KEYS = 2, 2  # of every host: two password hashes; an age key and an SSH key
HASH = "$y$" + "j9T$WXdOt/uoN1ard5zl4jvd.1$Hn6R9R4jX20RELeclg1KGANsl7FGZ5deoiF/ZTfqFx8"
FLOOR_CALLS = 40
COLD_GOAL = 0.85


@dataclass
class Counting(LocalRunner):
    """Runs everything, and counts what it ran by its reason's first word."""

    counts: dict[str, int] = field(default_factory=dict)

    def __init__(self) -> None:
        super().__init__(os.environ)
        self.counts = {}
        self._lock = threading.Lock()

    def run(self, command: Command, *, on_line: Callable[[str], None] | None = None) -> Result:
        """Run it, and count it."""
        with self._lock:
            self.counts[command.why.split()[0]] = self.counts.get(command.why.split()[0], 0) + 1
        return super().run(command, on_line=on_line)

    def taken(self) -> int:
        """How many since the last time."""
        total = sum(self.counts.values())
        self.counts = {}
        return total


def a_fleet(root: Path, hosts: int, secrets: int) -> Project:
    """A project that declares ``hosts`` hosts with ``secrets`` secrets each, the password hashes among them."""
    names = [f"canary_{number:02d}" for number in range(secrets - HASHES)]
    host = {
        "provisioning": {"adminCidrs": ["192.0.2.0/24"], "sshPubkeyFile": "k.pub"},
        "sshExposure": {"mode": "public"},
        "tailnet": {"mode": "none"},
        "secrets": {name: {} for name in names},
    }
    (root / "fleet").mkdir(parents=True)
    fleet = {"schemaVersion": 1, "hosts": {f"host-{number:02d}": host for number in range(hosts)}}
    (root / "fleet" / "clawdlets.json").write_text(json.dumps(fleet))
    return load_project(root, {"USER": "canary", "PATH": os.environ["PATH"]})


def values_of(secrets: int) -> dict[str, Secret]:
    """A value for every secret of a host."""
    named = {f"canary_{number:02d}": Secret(f"canary-value-{number}") for number in range(secrets - HASHES)}
    return named | {"admin_password_hash": Secret(HASH), "breakglass_password_hash": Secret(HASH)}


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, and of processors: ours and those of the programs that ran."""

    wall_s: float
    cpu_s: float


def timed(work: Callable[[], object]) -> Cost:
    """What ``work`` costs."""

    def cpu_s() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)

    wall, cpu = time.perf_counter(), cpu_s()
    work()
    return Cost(time.perf_counter() - wall, cpu_s() - cpu)


def main() -> None:
    """Print counts, seconds and ratios."""
    runner = Counting()
    sops = Sops(runner, find_sops(runner))
    values, identity, host_key = values_of(SECRETS), age.generate(), age.generate()
    readers = {identity.recipient, host_key.recipient}
    files = HOSTS * SECRETS
    print(f"{HOSTS} hosts x {SECRETS} secrets (and {KEYS} keys each), {os.cpu_count()} cores, {SOPS_AT_ONCE} at a time")
    with tempfile.TemporaryDirectory(prefix="secrets-benchmark-") as scratch:
        project = a_fleet(Path(scratch) / "fleet", HOSTS, SECRETS)

        def every_host(given: dict[str, Secret]) -> list[Outcome]:
            return [init_host(project, host, given, runner=runner) for host in project.fleet.hosts]

        def row(name: str, cost: Cost) -> tuple[Cost, int]:
            calls = runner.taken()
            print(f"  {name:44} {cost.wall_s:8.2f} s {cost.cpu_s:8.2f} CPU s {calls:6} sops processes")
            return cost, calls

        text = sops.encrypt({"canary": Secret("canary")}, recipients=readers, filename="canary.yaml")
        files_for_floor = [text] * FLOOR_CALLS

        def at_best() -> None:
            with ThreadPoolExecutor(max_workers=SOPS_AT_ONCE) as pool:
                list(
                    pool.map(
                        lambda sealed: sops.encrypt({"a": Secret(sealed)}, recipients=readers, filename="a"),
                        files_for_floor,
                    )
                )

        floor = timed(at_best)
        runner.taken()

        # the loop: what sops alone costs
        kept: list[str] = []

        def loop_cold() -> None:
            for _ in range(HOSTS):
                for name, value in values.items():
                    kept.append(sops.encrypt({name: value}, recipients=readers, filename=name))

        def loop_again() -> None:
            for sealed in kept:
                sops.decrypt(sealed, identity=identity.secret)

        print("a loop of plain sops calls")
        loop, _ = row("cold (encrypt each)", timed(loop_cold))
        again, _ = row("again (decrypt each, compare)", timed(loop_again))

        print("secrets init")
        outcomes: list[Outcome] = []
        cold, cold_calls = row("cold", timed(lambda: outcomes.extend(every_host(values))))
        assert cold_calls == HOSTS * (SECRETS + KEYS), cold_calls
        assert all(outcome.created for outcome in outcomes)
        noop, noop_calls = row("again, values given", timed(lambda: outcomes.extend(every_host(values))))
        nothing, nothing_calls = row("again, no values given", timed(lambda: outcomes.extend(every_host({}))))
        _, status_calls = row("secrets status", timed(lambda: status(project, runner=runner)))
        for host in project.fleet.hosts:  # as git pull brings it
            path = project.layout.secret_file(host, "canary_00")
            new = {"canary_00": Secret(f"canary-from-another-of-{host}")}
            path.write_text(sops.encrypt(new, recipients=recipients(path.read_text()), filename=path.name))
        runner.taken()
        _, pulled_calls = row(
            "again, one secret of each host is another's", timed(lambda: outcomes.extend(every_host({})))
        )
        for host in project.fleet.hosts:
            project.layout.state_file(f"secrets-{host}").unlink()
        _, blind_calls = row("again, the record of last time lost", timed(lambda: outcomes.extend(every_host({}))))
        changed = any(outcome.changed for outcome in outcomes[HOSTS:])
        _, last_calls = row("and once more", timed(lambda: every_host({})))

    share = floor.wall_s / FLOOR_CALLS * cold_calls / cold.wall_s
    print(
        f"one sops call: {floor.wall_s / FLOOR_CALLS * 1000:.1f} ms when {SOPS_AT_ONCE} run at a time, {floor.cpu_s / FLOOR_CALLS * 1000:.1f} CPU ms"
    )
    print(
        f"cold: {loop.wall_s / files * cold_calls / cold.wall_s:.2f} x the loop for as many files; {share:.0%} of its time is what its "
        f"processes cost at best (goal {COLD_GOAL:.0%}: {'met' if share >= COLD_GOAL else 'MISSED'}), "
        f"{floor.cpu_s / FLOOR_CALLS * cold_calls / cold.cpu_s:.0%} of its CPU time"
    )
    print(
        f"no-op: {again.wall_s / noop.wall_s:.0f} x the loop, {again.wall_s / nothing.wall_s:.0f} x with no values given"
    )
    print(
        f"sops processes of no-ops: {noop_calls}, {nothing_calls}, {status_calls}, {last_calls} where the record says enough; "
        f"{pulled_calls / HOSTS:.0f} a host where one file is another's; {blind_calls / HOSTS:.0f} a host, once, where the record is lost "
        f"({SECRETS + KEYS} files each)"
    )
    assert (noop_calls, nothing_calls, status_calls, last_calls) == (0, 0, 0, 0)
    assert pulled_calls == HOSTS
    assert not changed, "a no-op changed something"


if __name__ == "__main__":
    main()
