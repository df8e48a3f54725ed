"""The red tests on a real machine: each seeded fault turns exactly the checks red that are about it, and mending it turns
them green again. Some hosts lie: what they say of themselves is fine, and what they do is not."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
from hcloud.firewalls import FirewallRule
from hcloud.networks import NetworkSubnet

from clawdlets_ops.hetzner import Cloud, Server
from clawdlets_ops.verify import catalogue
from tests.guard_corpus import Maker
from tests.lab.conftest import LabProject, stay_logged_in
from tests.lab.red import RESTART, SSHD, Bench, Seed, other_rules

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

UNDO_SSHD = f"cp -p /run/kept-sshd {SSHD} && {RESTART}"
UNDO_NFT = "clawdlets-exposure restore"
UNDO_EGRESS = "systemctl reload clawdlets-egress"
ENCRYPTED = "/var/lib/clawdlets/secrets/hosts"
TOKEN = "$(readlink -f /run/secrets)/discord_token"
WORLD = ["0.0.0.0/0", "::/0"]
SSH_FOR_ALL = FirewallRule(direction="in", protocol="tcp", port="22", source_ips=WORLD)


def in_repository(
    name: str, content: str, *, mode: int = 0o644, add: bool = False
) -> Callable[[Bench], AbstractContextManager[None]]:
    """Another content of a file of the operator's, or a new file, and what was there afterwards."""

    @contextmanager
    def around(bench: Bench) -> Iterator[None]:
        path = bench.lab.root / name
        kept = path.read_bytes() if path.exists() else None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(mode)
        git = ["git", "-C", str(bench.lab.root)]
        try:
            if add:
                subprocess.run([*git, "add", "-f", name], check=True)
            yield
        finally:
            if add:
                subprocess.run([*git, "reset", "-q", "--", name], check=True)
            path.unlink()
            if kept is not None:
                path.write_bytes(kept)

    return around


def together(
    *parts: Callable[[Bench], AbstractContextManager[None]],
) -> Callable[[Bench], AbstractContextManager[None]]:
    """All of them at once."""

    @contextmanager
    def around(bench: Bench) -> Iterator[None]:
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(part(bench))
            yield

    return around


WEEKLY = in_repository(
    ".github/dependabot.yml",
    """version: 2
updates:
  - package-ecosystem: github-actions
    directory: /
    schedule: {interval: weekly}
""",
    add=True,
)
"""With workflows, Dependabot has to look after them: that is SUP-02."""


@contextmanager
def stale_session(bench: Bench) -> Iterator[None]:
    """Somebody came in while the host was open, and stays when it is closed again."""
    server = bench.tools.cloud.server(bench.name)
    assert server is not None
    with other_rules(SSH_FOR_ALL)(bench):
        bench.sh("nft add rule inet clawdlets input tcp dport 22 accept")
        try:
            stale = stay_logged_in(bench.project, bench.name, server.addresses[4])
        finally:
            bench.sh(UNDO_NFT)
    try:
        yield
    finally:
        stale.kill()
        stale.communicate()
        deadline = time.monotonic() + 30
        while "198.1" in bench.sh("ss -Htn state established '( sport = :22 )'") and time.monotonic() < deadline:
            time.sleep(0.2)


@contextmanager
def open_on_both_sides(bench: Bench) -> Iterator[None]:
    """With somebody in already: the probes' own connections may be seen as sessions too, and this makes it sure."""
    with stale_session(bench), other_rules(SSH_FOR_ALL)(bench):
        bench.sh("nft add rule inet clawdlets input tcp dport 22 accept")
        try:
            yield
        finally:
            bench.sh(UNDO_NFT)


@contextmanager
def open_to_ipv6(bench: Bench) -> Iterator[None]:
    edge = other_rules(FirewallRule(direction="in", protocol="tcp", port="22", source_ips=["::/0"]))
    with stale_session(bench), edge(bench):
        bench.sh("nft add rule inet clawdlets input meta nfproto ipv6 tcp dport 22 accept")
        try:
            yield
        finally:
            bench.sh(UNDO_NFT)


@contextmanager
def hidden_door(bench: Bench) -> Iterator[None]:
    """A server on a port that is open everywhere, on a host that says neither that it listens nor that it lets anybody in."""
    with other_rules(FirewallRule(direction="in", protocol="tcp", port="8080", source_ips=WORLD))(bench):
        bench.sh(
            "nft -j list ruleset >/run/ruleset.json; nft add rule inet clawdlets input tcp dport 8080 accept; "
            'systemd-run -q --unit=door python3 -c \'import socket as s, time as t; x = s.create_server(("::", 8080), '
            "family=s.AF_INET6, dualstack_ipv6=True); t.sleep(900)'; until ss -Hltn | grep -q :8080; do :; done; "
            "printf '#!/bin/sh\\n/usr/bin/ss \"$@\" | grep -v :8080\\n' >/run/lie-ss; "
            'printf \'#!/bin/sh\\n[ "$*" != "-j list ruleset" ] || exec cat /run/ruleset.json\\nexec /usr/sbin/nft "$@"\\n\' >/run/lie-nft; '
            f"({LIE.format('ss')}); ({LIE.format('nft')})"
        )
        try:
            yield
        finally:
            bench.sh(f"({TRUTH.format('ss')}); ({TRUTH.format('nft')}); systemctl stop door; {UNDO_NFT}")


@contextmanager
def in_private_network(bench: Bench) -> Iterator[None]:
    client = bench.client()
    network = client.networks.create("canary", "10.0.0.0/16")
    network.add_subnet(
        NetworkSubnet(ip_range="10.0.1.0/24", type="cloud", network_zone="eu-central")
    ).wait_until_finished()
    server = client.servers.get_by_name(bench.name)
    assert server is not None
    server.attach_to_network(network).wait_until_finished()
    try:
        yield
    finally:
        server.detach_from_network(network).wait_until_finished()
        network.delete()


class Pending:
    """The real API, but for one word on the way: no firewall of any server is applied yet."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cloud, name)

    def server(self, name: str) -> Server | None:
        found = self._cloud.server(name)
        return found and replace(found, firewalls=dict.fromkeys(found.firewalls, "pending"))


@contextmanager
def never_applied(bench: Bench) -> Iterator[None]:
    kept = bench.tools
    bench.tools = replace(kept, cloud=cast("Cloud", Pending(kept.cloud)))
    try:
        yield
    finally:
        bench.tools = kept


# A program that lies lies in /run, and is put before the real one; what was there is put back.
LIE = (
    "chmod +x /run/lie-{0}; cd /run/current-system/sw/bin; if [ -e {0} ]; then mv {0} {0}.kept; fi; mv /run/lie-{0} {0}"
)
TRUTH = "cd /run/current-system/sw/bin; rm {0}; if [ -e {0}.kept ]; then mv {0}.kept {0}; fi"
KEY_RUNS_OUT = f"""printf '#!/bin/sh\\necho "\\\\"BackendState\\\\": \\\\"Running\\\\", \\\\"RunSSH\\\\": false, \\\\"KeyExpiry\\\\": \\\\"%s\\\\""\\n' "$(date -u -d '+5 days' +%FT%TZ)" >/run/lie-tailscale; {LIE.format("tailscale")}"""

# What a daemon says it is, is nobody's evidence: this one says that it is another program.
LYING_BANNER = (
    "mkdir -p /run/lie /run/systemd/system/ssh.service.d; sed s/OpenSSH_/dropbear/g /usr/sbin/sshd >/run/lie/sshd; chmod +x /run/lie/sshd; "
    "printf '[Service]\\nExecStart=\\nExecStart=/run/lie/sshd -D\\n' >/run/systemd/system/ssh.service.d/lie.conf; systemctl daemon-reload"
)
HONEST_BANNER = "rm -r /run/lie /run/systemd/system/ssh.service.d; systemctl daemon-reload"
BANNER_LIES = "[ \"$(timeout 5 bash -c 'exec 3<>/dev/tcp/127.0.0.1/22; head -c 16 <&3')\" = SSH-2.0-dropbear ]"

SEEDS = [
    Seed("a Match block for one address", "SSH-01", f"printf 'Match User root Address 127.0.0.1\\n  PasswordAuthentication yes\\n' >>{SSHD}; {RESTART}", UNDO_SSHD),
    Seed("a configuration that nobody has read", "SSH-02", f"touch -d '+1 minute' {SSHD}", UNDO_SSHD),
    Seed("a daemon that does what its file denies", "SSH-02 SSH-03 SSH-04", f"sed -i 's/^AuthenticationMethods.*//; s/^PasswordAuthentication no/PasswordAuthentication yes/; s/^AllowUsers.*//' {SSHD}; {RESTART}; cp /run/kept-sshd {SSHD}; touch -d '+1 minute' {SSHD}", UNDO_SSHD),
    Seed("a daemon that calls itself another", "", f"{LYING_BANNER}; {RESTART}; {BANNER_LIES}", f"{HONEST_BANNER}; {UNDO_SSHD}"),
    Seed("a daemon that calls itself another and takes passwords", "SSH-01 SSH-03 SSH-04", f"{LYING_BANNER}; sed -i 's/^AuthenticationMethods.*//; s/^PasswordAuthentication no/PasswordAuthentication yes/' {SSHD}; {RESTART}; {BANNER_LIES}", f"{HONEST_BANNER}; {UNDO_SSHD}"),
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
    Seed("a range of ports at the edge", "EXP-01", around=other_rules(FirewallRule(direction="in", protocol="tcp", port="20-30", source_ips=WORLD))),
    Seed("no direct way for the tailnet", "UDP-01", around=other_rules(without_udp=True)),
    Seed("open at the edge and on the host", "EXP-01 EXP-03 EXP-04 EXP-05 EXP-07", around=open_on_both_sides),
    Seed("an edge that is never applied", "EXP-02", around=never_applied),
    Seed("a tailnet that is half shut", "TS-01", "nft insert rule inet clawdlets input iifname tailscale0 ip6 saddr fd7a:115c:a1e0::/48 tcp dport 22 drop", UNDO_NFT),
    Seed("a node whose key runs out in five days", "TS-03", KEY_RUNS_OUT, TRUTH.format("tailscale")),
    Seed("a secret in the store", "STO-01", f"mkdir -p /nix/store/abc-app/etc; cp {TOKEN} /nix/store/abc-app/etc/app.conf", "rm -r /nix/store/abc-app"),
    Seed("a secret in the store as base64", "STO-01", f"mkdir -p /nix/store/abc-app; tr -d '\\n' <{TOKEN} | base64 -w 0 >/nix/store/abc-app/x.json", "rm -r /nix/store/abc-app"),
    Seed("a secret in a derivation", "STO-03", f"(printf 'Derive(TOKEN='; cat {TOKEN}) >/nix/store/abc-app.drv", "rm /nix/store/abc-app.drv"),
    Seed("a secret in a unit", "STO-06", f"printf '[Service]\\nType=oneshot\\nRemainAfterExit=yes\\nExecStart=/bin/true\\nEnvironment=TOKEN=%s\\n' \"$(cat {TOKEN})\" >/run/systemd/system/leaky.service; systemctl daemon-reload; systemctl start leaky", "systemctl stop leaky; rm /run/systemd/system/leaky.service; systemctl daemon-reload"),
    Seed("a core dump", "FS-05", "mkdir -p /var/lib/systemd/coredump; : >/var/lib/systemd/coredump/core.bot.1", "rm -r /var/lib/systemd/coredump"),
    Seed("a process that may dump its memory", "FS-05", "systemd-run -q --unit=dumper -p LimitCORE=infinity -p User=bot-maren sleep 900", "systemctl stop dumper"),
    Seed("a clock an hour ahead", "CLK-01", f"""printf '#!/bin/sh\\n[ "$*" != +%%s ] || exec /bin/date -d "+1 hour" +%%s\\nexec /bin/date "$@"\\n' >/run/lie-date; {LIE.format("date")}""", TRUTH.format("date")),
    Seed("a private network", "EXP-09", around=in_private_network),
    Seed("an open port that the host hides", "EXP-11", around=hidden_door),
    Seed("IPv6 forgotten on both sides", "EXP-01 EXP-03 EXP-05 EXP-07", around=open_to_ipv6),
    Seed("a second SSH server on another port", "SSH-07", "systemd-run -q --unit=door /usr/sbin/sshd -D -p 2222; until ss -Hltn | grep -q :2222; do :; done", "systemctl stop door"),
    Seed("keys in an odd place", "SSH-06", f"mkdir -p /var/lib/odd; ssh-keygen -q -t ed25519 -N '' -f /run/eve; cp /run/eve.pub /var/lib/odd/admin; sed -i 's|^AuthorizedKeysFile.*|& /var/lib/odd/%u|' {SSHD}; grep -q /var/lib/odd {SSHD}; {RESTART}", f"{UNDO_SSHD}; rm -rf /var/lib/odd /run/eve /run/eve.pub"),
    Seed("a session from before", "EXP-07", around=stale_session),
    Seed("a repository that forgets", "GIT-01", around=in_repository(".gitignore", "/.clawdlets/[!x]*\n/.cache\n__pycache__/\n")),
    Seed("a token in the work tree", "GIT-03", around=in_repository("notes.txt", f"key = {Maker().tailscale()}\n")),
    Seed("a file of the runtime dir in git", "GIT-02", around=in_repository(".clawdlets/note", "nothing\n", mode=0o600, add=True)),
    Seed("a run's record for all to read", "RTD-01", around=in_repository(".clawdlets/note", "nothing\n")),
    Seed("a merge without a look", "SUP-03", around=together(WEEKLY, in_repository(".github/workflows/x.yml", "jobs:\n  a:\n    steps:\n      - run: gh pr merge --auto 7\n", add=True)), unknown=""),
]  # fmt: skip


@pytest.fixture(scope="module")
def host(project: LabProject) -> Bench:
    project.bootstrap()
    made = Bench(project)
    made.sh(f"cp -p {SSHD} /run/kept-sshd")
    return made


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_a_seeded_fault_turns_exactly_its_checks_red(host: Bench, seed: Seed) -> None:
    host.proves(seed)


def test_all_is_mended_and_every_check_was_made(host: Bench) -> None:
    made = host.report()
    states = {one["check"]: one["state"] for one in made.document["findings"]}
    assert states.keys() == {check.id for check in catalogue.catalogue()}
    assert set(states.values()) <= {"pass", "not-applicable"}, made.document["summary"]
    assert made.signature is not None, made.unsigned
    assert json.loads((made.folder / "report.json").read_text())["exitCode"] == 0
