"""The red tests on a real machine: each seeded fault turns exactly the checks red that are about it, and mending it turns
them green again. Some hosts lie: what they say of themselves is fine, and what they do is not."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import hcloud
import pytest
from hcloud.firewalls import FirewallRule

from clawdlets_ops import workflow
from clawdlets_ops.lab import control
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import load_project
from clawdlets_ops.verify import catalogue, fleet
from tests.lab.conftest import LabProject, stay_logged_in

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

SSHD = "/etc/ssh/sshd_config"
RESTART = "systemctl reset-failed ssh; systemctl restart ssh"
UNDO_SSHD = f"cp -p /run/kept-sshd {SSHD} && {RESTART}"
UNDO_NFT = "clawdlets-exposure restore"
UNDO_EGRESS = "systemctl reload clawdlets-egress"
ENCRYPTED = "/var/lib/clawdlets/secrets/hosts"


@dataclass(frozen=True)
class Seed:
    """``checks`` are the ids that turn red; ``do`` and ``undo`` are shell, run as root on the host."""

    what: str
    checks: str
    do: str
    undo: str


SEEDS = [
    Seed("a Match block for one address", "SSH-01", f"printf 'Match User root Address 127.0.0.1\\n  PasswordAuthentication yes\\n' >>{SSHD}; {RESTART}", UNDO_SSHD),
    Seed("a configuration that nobody has read", "SSH-02", f"touch -d '+1 minute' {SSHD}", UNDO_SSHD),
    Seed("a daemon that does what its file denies", "SSH-02 SSH-03 SSH-04", f"sed -i 's/^AuthenticationMethods.*//; s/^PasswordAuthentication no/PasswordAuthentication yes/; s/^AllowUsers.*//' {SSHD}; {RESTART}; cp /run/kept-sshd {SSHD}; touch -d '+1 minute' {SSHD}", UNDO_SSHD),
    Seed("root may log in", "SSH-05", f"sed -i 's/^PermitRootLogin no/PermitRootLogin prohibit-password/' {SSHD}; {RESTART}", UNDO_SSHD),
    Seed("a key for root", "SSH-06", "ssh-keygen -q -t ed25519 -N '' -f /run/eve; cp /run/eve.pub /etc/ssh/authorized_keys.d/root", "rm -f /etc/ssh/authorized_keys.d/root /run/eve /run/eve.pub"),
    Seed("a second shell server", "SSH-07", "cp $(readlink -f /usr/bin/python3) /run/dropbear; systemd-run -q --unit=door /run/dropbear -c 'import socket as s, time as t; x = s.create_server((\"\", 2222)); t.sleep(900)'; until ss -Hltn | grep -q :2222; do :; done", "systemctl stop door; rm -f /run/dropbear"),
    Seed("a bot with a password", "SSH-08", "usermod -p '$y$j9T$canary' bot-maren", "usermod -p '!' bot-maren"),
    Seed("a second host key", "SSH-09", f"ssh-keygen -q -t rsa -N '' -f /etc/ssh/ssh_host_rsa_key; echo HostKey /etc/ssh/ssh_host_rsa_key >>{SSHD}; {RESTART}", f"rm -f /etc/ssh/ssh_host_rsa_key*; {UNDO_SSHD}"),
    Seed("a weak MAC", "SSH-10", f"sed -i 's/^macs .*/&,hmac-sha1/I' {SSHD}; {RESTART}", UNDO_SSHD),
    Seed("the host's firewall open to one", "EXP-03", "nft add rule inet clawdlets input ip saddr 203.0.113.9 tcp dport 22 accept", UNDO_NFT),
    Seed("IPv6 forgotten", "EXP-03", "nft add rule inet clawdlets input meta nfproto ipv6 tcp dport 22 accept", UNDO_NFT),
    Seed("a port sent on to another", "EXP-06", "nft 'add table ip docker; add chain ip docker pre { type nat hook prerouting priority -100; }; add rule ip docker pre tcp dport 8080 dnat to 172.17.0.2:80'", "nft delete table ip docker"),
    Seed("a port open to the tailnet", "TS-02", "nft add rule inet clawdlets input iifname tailscale0 tcp dport 8080 accept", UNDO_NFT),
    Seed("mail on IPv6", "EGR-01 EGR-03", "nft insert rule inet clawdlets-egress output ip6 daddr 2001:db8::/32 accept", UNDO_EGRESS),
    Seed("HTTPS held back as well", "EGR-04", "nft insert rule inet clawdlets-egress output oifname != lo tcp dport 443 drop", UNDO_EGRESS),
    Seed("mail from containers", "EGR-02", "nft flush chain inet clawdlets-egress forward", UNDO_EGRESS),
    Seed("the metadata service for a bot", "UD-04", "nft insert rule inet clawdlets-egress output ip daddr 169.254.169.254 tcp dport 80 meta skuid bot-maren accept", UNDO_EGRESS),
    Seed("a firewall on trial", "EXP-10", "clawdlets-exposure try tailnet 300 0123456789abcdef", "clawdlets-exposure confirm tailnet 0123456789abcdef"),
    Seed("an age key for a group", "FS-01", "chmod 0440 /var/lib/sops-nix/key.txt", "chmod 0400 /var/lib/sops-nix/key.txt"),
    Seed("another host's secrets", "FS-02", f"cp -a {ENCRYPTED}/alpha {ENCRYPTED}/beta", f"rm -r {ENCRYPTED}/beta"),
    Seed("an old generation", "FS-03", "mkdir /run/secrets.d/77", "rmdir /run/secrets.d/77"),
    Seed("a secret that belongs to another bot", "FS-03 FS-04", "useradd -r bot-eve; chown bot-eve $(readlink -f /run/secrets)/discord_token", "chown bot-maren $(readlink -f /run/secrets)/discord_token; userdel bot-eve"),
    Seed("a secret from the store", "STO-04", "cp -p /var/lib/clawdlets/secrets-wiring.json /run/kept-wiring; sed -i '0,/\"sopsFile\"/s|\\(\"sopsFile\"[^\"]*\"\\)[^\"]*|\\1/nix/store/x.yaml|' /var/lib/clawdlets/secrets-wiring.json", "cp -p /run/kept-wiring /var/lib/clawdlets/secrets-wiring.json"),
]  # fmt: skip


class Host:
    """The project's one host, bootstrapped, with ways to break it and to judge it."""

    def __init__(self, lab: LabProject) -> None:
        self.lab = lab
        self.project = load_project(lab.root, lab.env())
        self.tools = workflow.tools_for(self.project)
        self.runner = LocalRunner(self.project.environ)

    def sh(self, script: str) -> str:
        """Run as root on the host, past its network."""
        leader = control.status(Layout(self.project.layout.root)).servers[0].leader_pid
        argv = [
            "nsenter",
            "-t",
            str(leader),
            "-a",
            "env",
            "PATH=/run/current-system/sw/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ]
        done = subprocess.run([*argv, "sh", "-euc", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{script}: {done.stderr}"
        return done.stdout

    def judge(self) -> dict[str, str]:
        """check → what was seen, of everything that did not pass."""
        made = fleet.verify_fleet(self.project, ("alpha",), runner=self.runner, cloud=self.tools.cloud)
        return {
            one["check"]: f"{one['state']}: {one['observed']}"
            for one in made.document["findings"]
            if one["state"] in ("fail", "unknown")
        }

    @contextmanager
    def edge(self, *more: FirewallRule, without_udp: bool = False) -> Iterator[None]:
        """Other rules at the edge, set behind everybody's back, and the old ones afterwards."""
        client = hcloud.Client(
            token=self.project.token.reveal(), api_endpoint=self.project.hcloud_endpoint, timeout=10, poll_interval=0.05
        )
        bound = client.firewalls.get_by_name("alpha-edge")
        assert bound is not None
        kept = list(bound.rules or [])
        self._set(bound, [rule for rule in kept if not (without_udp and rule.protocol == "udp")] + list(more))
        try:
            yield
        finally:
            self._set(bound, kept)

    def _set(self, bound: hcloud.firewalls.BoundFirewall, rules: list[FirewallRule]) -> None:
        for action in bound.set_rules(rules):
            action.wait_until_finished()


@pytest.fixture(scope="module")
def host(project: LabProject) -> Host:
    project.bootstrap()
    made = Host(project)
    made.sh(f"cp -p {SSHD} /run/kept-sshd")
    return made


@pytest.mark.parametrize("seed", [pytest.param(seed, id=seed.what.replace(" ", "-")) for seed in SEEDS])
def test_a_seeded_fault_turns_exactly_its_checks_red(host: Host, seed: Seed) -> None:
    host.sh(seed.do)
    try:
        found = host.judge()
    finally:
        host.sh(seed.undo)
    assert {check for check, text in found.items() if text.startswith("fail")} == set(seed.checks.split()), found
    assert not [text for text in found.values() if text.startswith("unknown")], found


def test_faults_at_the_edge(host: Host) -> None:
    everywhere = FirewallRule(direction="in", protocol="tcp", port="20-30", source_ips=["0.0.0.0/0", "::/0"])
    with host.edge(everywhere):
        assert host.judge().keys() == {"EXP-01"}  # the host's own firewall still holds
    with host.edge(without_udp=True):
        assert host.judge().keys() == {"UDP-01"}


def test_open_on_both_sides_is_seen_from_outside_and_a_session_that_stays_is_seen_afterwards(host: Host) -> None:
    everywhere = FirewallRule(direction="in", protocol="tcp", port="22", source_ips=["0.0.0.0/0", "::/0"])
    server = host.tools.cloud.server("alpha")
    assert server is not None
    with host.edge(everywhere):
        host.sh("nft add rule inet clawdlets input tcp dport 22 accept")
        try:
            assert {"EXP-01", "EXP-03", "EXP-04", "EXP-05"} <= host.judge().keys()
            stale = stay_logged_in(host.project, "alpha", server.addresses[4])
        finally:
            host.sh(UNDO_NFT)
    try:
        assert host.judge().keys() == {"EXP-07"}
    finally:
        stale.kill()
        stale.communicate()
    deadline = time.monotonic() + 30
    while "198.1" in host.sh("ss -Htn state established '( sport = :22 )'") and time.monotonic() < deadline:
        time.sleep(0.2)


def test_a_repository_that_forgets_the_runtime_dir(host: Host) -> None:
    ignore = host.lab.root / ".gitignore"
    kept = ignore.read_text()
    try:
        ignore.write_text("")
        assert host.judge().keys() == {"GIT-01"}
    finally:
        ignore.write_text(kept)


def test_all_is_mended_and_every_check_was_made(host: Host) -> None:
    made = fleet.verify_fleet(host.project, ("alpha",), runner=host.runner, cloud=host.tools.cloud)
    states = {one["check"]: one["state"] for one in made.document["findings"]}
    assert states.keys() == {check.id for check in catalogue.catalogue()}
    assert set(states.values()) <= {"pass", "not-applicable"}, made.document["summary"]
    assert made.signature is not None, made.unsigned
    assert json.loads((made.folder / "report.json").read_text())["exitCode"] == 0
