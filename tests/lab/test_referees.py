"""Other people's tools look at the same host and say the same; where they do not, it is said here why.

nmap sees the ports that our probes see, from the same vantages; ssh-audit warns of what SSH-10 calls weak, and nothing
on a host that passes. Where a tool is not installed, its test is skipped.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

import pytest

from clawdlets_ops.verify.expectation import OFTEN_OPEN
from clawdlets_ops.verify.exposure import Sight, measure_hosts
from tests.lab.conftest import LabProject
from tests.lab.red import RESTART, SSHD, Bench

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

PORTS = (22, *OFTEN_OPEN)
# nmap's words for what our probe calls yes and no. "open|filtered" and "unfiltered" would be neither.
SAYS = {"open": "yes", "closed": "no", "filtered": "no"}
# What ssh-audit warns of on a host that passes, and why we do not: each with a reason, or it does not stand here.
EXPLAINED = {
    "sntrup761x25519-sha512@openssh.com": "called experimental by ssh-audit 2.5 (2021); OpenSSH's own default since 9.0",
    "kex-strict-s-v00@openssh.com": "unknown to ssh-audit 2.5: no algorithm, but the sign that Terrapin is mended",
}


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")


@pytest.fixture(scope="module")
def host(project: LabProject) -> Bench:
    project.bootstrap()
    made = Bench(project)
    made.sh(f"cp -p {SSHD} /run/kept-sshd")
    return made


def run(argv: Sequence[str]) -> str:
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False).stdout


def addresses(host: Bench) -> dict[str, dict[int, str]]:
    expected = host.expectation()
    return {side: {int(family): one for family, one in found.items()} for side, found in expected["addresses"].items()}


@needs("nmap")
def test_nmap_sees_the_ports_as_we_do(host: Bench) -> None:
    seen = addresses(host)
    sight = Sight(seen["public"], seen["tailnet"], 22, OFTEN_OPEN)
    cells = measure_hosts(host.project.vantages, {"alpha": sight}, runner=host.runner)["alpha"].cells
    ours = {(cell.vantage, cell.family, cell.port): cell.reach for cell in cells}
    theirs = {}
    for vantage in host.project.vantages:
        for family, address in seen["public" if vantage.side == "internet" else "tailnet"].items():
            ports = ",".join(str(port) for port in PORTS if (vantage.name, family, port) in ours)
            said = run(
                [
                    *vantage.via,
                    "nmap",
                    "-Pn",
                    "-n",
                    "-sT",
                    "--max-retries",
                    "2",
                    *(["-6"] if family == 6 else []),
                    "-p",
                    ports,
                    address,
                ]
            )
            for port, word in re.findall(r"^(\d+)/tcp\s+(\S+)", said, re.MULTILINE):
                theirs[vantage.name, family, int(port)] = SAYS.get(word, word)
    assert "yes" in ours.values()
    assert "no" in ours.values()
    assert theirs == ours


def weak_by_ssh_audit(host: Bench) -> set[str]:
    """The algorithms that ssh-audit warns of or fails, asked from a vantage on the tailnet."""
    member = next(one for one in host.project.vantages if one.side == "tailnet")
    said = run([*member.via, "ssh-audit", "-n", "-l", "warn", addresses(host)["tailnet"][4]])
    assert "key exchange algorithms" in said, said  # it came to an answer: it always warns of what is explained above
    return set(re.findall(r"^\((?:kex|key|enc|mac)\) (\S+)", said, re.MULTILINE))


@needs("ssh-audit")
def test_ssh_audit_finds_nothing_broken_where_ssh_10_passes(host: Bench) -> None:
    assert "SSH-10" not in host.judge(["SSH-10"])
    assert weak_by_ssh_audit(host) - EXPLAINED.keys() == set()


@needs("ssh-audit")
def test_ssh_audit_and_ssh_10_both_see_a_weak_mac(host: Bench) -> None:
    host.sh(f"sed -i 's/^MACs .*/&,hmac-sha1/I' {SSHD}; grep -qi hmac-sha1 {SSHD}; {RESTART}")
    try:
        found = host.judge(["SSH-10"])
        broken = weak_by_ssh_audit(host)
    finally:
        host.sh(f"cp -p /run/kept-sshd {SSHD} && {RESTART}")
    assert "hmac-sha1" in found["SSH-10"]
    assert "hmac-sha1" in broken
