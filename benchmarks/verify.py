"""What a verification costs: the shipped suite against the same questions asked one by one through testinfra's ``ssh://``.

``python benchmarks/verify.py [--rtt 0 50] [--hosts 1]`` needs what the lab needs. Both judge the same lab hosts in the same
run, over the tailnet's link with the same latency put into it. Compared are the checks whose vantage is the host: what comes
from the API, the repository, refused logins and probes from outside the peer does not ask, so the suite's time with all of
that is printed beside it, and is not what the ratios are of. SSH logins and commands run by sudo (the suite's one exec) are
counted in the hosts' own journals. The suite's time is that of its whole process, the median of ROUNDS; the peer, which takes
minutes, is asked once: its connection sharing switched off, as testinfra has it by default, and on (ControlMaster in an
ssh_config).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import testinfra

from clawdlets_ops.lab.faults import clear, inject, parse_fault
from clawdlets_ops.lab.scenario import Scenario
from clawdlets_ops.verify.catalogue import catalogue
from clawdlets_ops.verify.ssh_config import known_hosts, ssh_config

ROOT = Path(__file__).parents[1]
ROUNDS = 3
PROGRAM = "sudo -n /run/current-system/sw/bin/clawdlets-exposure status"


def newest_report(lab: Scenario, host: str) -> dict[str, Any]:
    folder = max(lab.layout.reports(host).glob("*T*Z"))
    found: dict[str, Any] = json.loads((folder / "expectation.json").read_text())
    return found


def logins(lab: Scenario, host: str) -> int:
    said = lab.guest(host, "journalctl", "--no-pager", "-u", "ssh", "-o", "cat").check().stdout
    return said.count("Accepted publickey")


def execs(lab: Scenario, host: str) -> int:
    said = lab.guest(host, "journalctl", "--no-pager", "_COMM=sudo", "-o", "cat").check().stdout
    return said.count("COMMAND=")


def of_the_host() -> list[str]:
    return [check.id for check in catalogue() if check.vantage == "host"]


def judging_ms(lab: Scenario) -> float:
    """Milliseconds for each check of the last run, from its own findings."""
    folder = max(lab.layout.fleet_reports.glob("*T*Z"))
    found = json.loads((folder / "findings.json").read_text())["findings"]
    return 1000 * sum(one["durationS"] for one in found) / len(found)


def one_by_one(expected: dict[str, Any], folder: Path, *, shared: bool) -> int:
    """Ask what the suite asks, as a test with testinfra would: a command or a file's property each time. How many asked."""
    folder.mkdir(parents=True)
    (folder / "known_hosts").write_text(known_hosts(expected))
    text = ssh_config(expected, folder)
    if not shared:
        text = "\n".join(line for line in text.splitlines() if not line.strip().startswith("Control")) + "\n"
    (folder / "config").write_text(text)
    extra = {} if shared else {"controlpersist": 0}
    host = testinfra.get_host(f"ssh://{expected['host']}", ssh_config=str(folder / "config"), **extra)
    asked = 0
    for wanted in [*expected["hostKeys"], expected["secretsDir"], *(one["file"] for one in expected["secrets"])]:
        # Most of these are root's alone: admin sees that they are there and no more, which costs the same.
        for word in ("%a", "%U", "%G", "%F"):
            host.run("stat -c %s %s", word, wanted["path"])
            asked += 1
    for user in expected["sshdUsers"]:
        for source in expected["sshdSources"]:
            host.run("test -n %s", f"{user} from {source}")
            asked += 1
    for _ in of_the_host():
        host.run(PROGRAM)
        asked += 1
    return asked


def timed_s(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def judged(lab: Scenario, *words: str) -> None:
    """Verify, as an operator does. Where many machines share a few cores, something may be unknown: that is told."""
    done = lab.run("clawdlets", "verify", "--format", "json", *words)
    findings = json.loads(done.stdout)["findings"]
    odd = [one for one in findings if one["state"] in ("fail", "unknown")]
    for one in odd:
        print(f"{one['host']} {one['check']} {one['state']}: {one['observed'][:160]}", file=sys.stderr)
    assert not any(one["state"] == "fail" for one in odd)


def ask(lab: Scenario, names: Sequence[str], folder: Path, *, shared: bool) -> float:
    """All hosts at the same time, one thread a host; how many seconds it took."""

    def work() -> None:
        with ThreadPoolExecutor(max_workers=len(names)) as pool:
            list(pool.map(lambda host: one_by_one(newest_report(lab, host), folder / host, shared=shared), names))

    return timed_s(work)


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rtt", type=int, nargs="*", default=[0, 50], metavar="MS", help="round trips added to the link"
    )
    parser.add_argument("--hosts", type=int, default=1, help="how many, judged at the same time")
    options = parser.parse_args(words)
    fleet = json.loads((ROOT / "fleet" / "clawdlets.json").read_text())
    name, declared = next(iter(fleet["hosts"].items()))
    names = [name, *(f"{name}-{number}" for number in range(2, options.hosts + 1))]
    fleet["hosts"] = dict.fromkeys(names, declared)
    # Declared before the lab is up: with it come the values of the hosts' secrets.
    made = Scenario(fleet, cache=ROOT / ".cache", environ=os.environ)
    with made as lab, tempfile.TemporaryDirectory(prefix="clb-") as scratch:
        lab.run("clawdlets", "bootstrap", "--parallel", "4", timeout_s=3600.0).check()
        print(
            f"{'RTT ms':>7} {'hosts':>5}  {'whole s':>8}  {'host s':>7} {'ms/check':>8} {'logins':>6} {'execs':>5}"
            f"   {'shared s':>9} {'x':>5}   {'plain s':>8} {'logins':>6} {'x':>6}"
        )
        only = [word for ident in of_the_host() for word in ("--only", ident)]
        for rtt in options.rtt:
            if rtt:
                for host in names:
                    inject(lab.layout, parse_fault(["latency", host, f"milliseconds={rtt}", "from=operator-tailnet"]))
            counted = lambda count: sum(count(lab, host) for host in names) / len(names)  # noqa: E731
            whole_s = timed_s(lambda: judged(lab, "--parallel", str(len(names))))
            before, began = counted(logins), counted(execs)
            suite_s = statistics.median(
                timed_s(lambda: judged(lab, "--parallel", str(len(names)), *only)) for _ in range(ROUNDS)
            )
            between, ended = counted(logins), counted(execs)
            each_ms = judging_ms(lab)
            shared_s = ask(lab, names, Path(scratch) / f"{rtt}-shared", shared=True)
            middle = counted(logins)
            plain_s = ask(lab, names, Path(scratch) / f"{rtt}-plain", shared=False)
            after = counted(logins)
            print(
                f"{rtt:7} {len(names):5}  {whole_s:8.2f}  {suite_s:7.2f} {each_ms:8.1f} {(between - before) / ROUNDS:6.1f} {(ended - began) / ROUNDS:5.1f}"
                f"   {shared_s:9.2f} {shared_s / suite_s:5.1f}"
                f"   {plain_s:8.2f} {after - middle:6.1f} {plain_s / suite_s:6.1f}",
                flush=True,
            )
            clear(lab.layout)
    print(
        f"{len(catalogue())} checks, {len(of_the_host())} of them of the host alone; whole: with probes, refused logins and doctor"
    )


if __name__ == "__main__":
    sys.exit(main())
