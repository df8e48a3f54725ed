"""The tailnet of real programs: nodes join by key, reach each other through closed firewalls, and nobody outside is asked."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from clawdlets_ops.lab.addressing import Addressing
from clawdlets_ops.lab.headscale import CATTLE_TAG, Programs, RealTailnet, login_server, node_environment, up_words
from clawdlets_ops.lab.network import Network, in_namespace
from clawdlets_ops.lab.processes import Group, wait_until
from clawdlets_ops.lab.registry import claim_number, release_number
from clawdlets_ops.process import Background, Command, LocalRunner, Result, spawn
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.tailnet import peers
from clawdlets_ops.tailscale_api import HeadscaleKeys

ROOT = Path(__file__).parents[2]
PROGRAMS = Programs.find(ROOT / ".cache" / "tools")
RUNNER = LocalRunner(os.environ)
SERVER_ID = 7

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(240),
    pytest.mark.skipif(PROGRAMS is None, reason="headscale and tailscaled are not built (make tailnet)"),
]

GREET = """
import socket, sys
with socket.create_server((sys.argv[1], 22), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET) as server:
    while True:
        connection, peer = server.accept()
        connection.sendall(peer[0].encode())
        connection.close()
"""
ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], 22), timeout=3) as connection:
    print(connection.recv(99).decode())
"""


def watch(net: Addressing) -> str:
    """Keeps the addresses of what is for nobody of the lab, wherever it would leave."""
    v4, v6 = ([str(n) for n in net.networks if n.version == version] for version in (4, 6))
    return f"""table inet watch {{
  set seen4 {{ type ipv4_addr; flags dynamic; size 64; }}
  set seen6 {{ type ipv6_addr; flags dynamic; size 64; }}
  chain look {{
    ip daddr {{ 127.0.0.0/8, 172.31.1.0/30, {", ".join(v4)} }} return
    ip6 daddr {{ ::1, fe80::/10, ff00::/8, {", ".join(v6)} }} return
    ip daddr 224.0.0.0/4 return
    ip daddr 100.100.100.100 return comment "every tailscaled's own service address: asked before tailscale0 has its route"
    add @seen4 {{ ip daddr }}
    add @seen6 {{ ip6 daddr }}
  }}
  chain leaving {{ type filter hook output priority 0; jump look; }}
  chain passing {{ type filter hook prerouting priority 0; jump look; }}
}}
"""


@dataclass
class Tailnet:
    network: Network
    real: RealTailnet
    folder: Path
    children: list[Background]

    def spawn(self, *argv: str | Path) -> Background:
        namespace = self.network.net.machine_ns(SERVER_ID)
        env = {"PATH": os.environ["PATH"], "TS_LOGS_DIR": str(self.folder), **node_environment(self.real.certificate)}
        child = spawn(["ip", "netns", "exec", namespace, *argv], env=env, log_file=self.folder / "server.log")
        self.children.append(child)
        return child

    def node(self) -> Background:
        """The server's tailscaled, with the state that an earlier one left."""
        assert PROGRAMS is not None
        state = self.folder / "server"
        child = self.spawn(
            PROGRAMS.tailscaled, "--no-logs-no-support", "--tun=tailscale0", f"--statedir={state}", f"--state={state}/state",
            f"--socket={self.folder / 'server.sock'}",
        )  # fmt: skip
        assert wait_until(lambda: self.inside("version", "--daemon").ok, timeout_s=10)
        return child

    def state(self) -> tuple[str, tuple[str, ...]]:
        """What the server's node says of itself: its state and addresses."""
        found = self.inside("status", "--json", "--peers=false").check().json()
        return found["BackendState"], tuple(found["TailscaleIPs"] or ())

    def inside(self, *argv: str) -> Result:
        assert PROGRAMS is not None
        socket = f"--socket={self.folder / 'server.sock'}"
        return RUNNER.run(Command([PROGRAMS.tailscale, socket, *argv], "ask the server's node"))

    def join(self, key: Secret) -> Result:
        (self.folder / "auth").write_text(key.reveal())
        return self.inside(*up_words(self.network.net, "alpha", str(self.folder / "auth")))

    def ask(self, namespace: str | None, address: str) -> str:
        via = ["ip", "netns", "exec", namespace] if namespace else []
        result = RUNNER.run(Command([*via, sys.executable, "-S", "-c", ASK, address], "connect", timeout_s=20))
        return result.stdout.strip() if result.ok else result.tail().splitlines()[-1]


def nft(namespace: str, text: str) -> None:
    RUNNER.run(Command(["ip", "netns", "exec", namespace, "nft", "-f", "-"], "load rules", stdin=text)).check()


@pytest.fixture
def tailnet(tmp_path: Path) -> Iterator[Tailnet]:
    assert PROGRAMS is not None
    number = claim_number(tmp_path, RUNNER)
    network = Network(Addressing(number), RUNNER)
    net = network.net
    children: list[Background] = []
    real = RealTailnet(net, PROGRAMS, tmp_path / "tailnet", RUNNER, path=os.environ["PATH"])
    try:
        (tmp_path / "tailnet" / "db.sqlite").write_bytes(b"left half-made by a headscale that was killed")
        network.up(nodes=True)
        network.attach(SERVER_ID, *net.server(10))
        network.filter({SERVER_ID: ()})
        for namespace in (net.internet_ns, net.tailnet_ns, net.member_ns, net.machine_ns(SERVER_ID)):
            nft(namespace, watch(net))
        real.start()
        yield Tailnet(network, real, tmp_path, children)
    finally:
        for child in children:
            child.terminate()
        real.stop()
        Group(net.prefix).remove()
        network.sweep()
        assert network.leftovers() == []
        release_number(number, tmp_path)


def test_a_machine_behind_a_closed_firewall_joins_and_is_reached_by_members_alone(tailnet: Tailnet) -> None:
    real, net = tailnet.real, tailnet.network.net
    tailnet.node()

    wrong = Secret(f"hskey-auth-canarycanary-{'canary00' * 8}")
    refused = tailnet.join(wrong)
    assert not refused.ok
    assert "key" in refused.tail()
    short = real.mint(expires_in_s=1)
    over = datetime.now(UTC) + timedelta(seconds=1.1)
    assert wait_until(lambda: datetime.now(UTC) > over, timeout_s=5)
    assert "authkey expired" in tailnet.join(short).tail()
    once = real.mint(reusable=False)
    assert tailnet.join(once).ok

    def joined() -> bool:
        return any(peer.name == "alpha" and peer.online for peer in peers(real.status()))

    assert wait_until(joined, timeout_s=20)
    alpha = next(entry for entry in real.status()["Peer"].values() if entry["HostName"] == "alpha")
    assert alpha["Tags"] == ["tag:clawdlets"]
    assert real.addresses({SERVER_ID: "alpha", 8: "bravo"}) == {SERVER_ID: tuple(alpha["TailscaleIPs"])}
    found = next(peer for peer in peers(real.status()) if peer.name == "alpha")
    assert found.key_expiry is None

    for address in alpha["TailscaleIPs"]:
        tailnet.spawn(sys.executable, "-S", "-c", GREET, address)
    family = {6 if ":" in text else 4: text for text in alpha["TailscaleIPs"]}
    own, member = real.status()["Self"]["TailscaleIPs"], net.tailnet(2)
    for version, mine, theirs in ((4, own[0], member[0]), (6, own[1], member[1])):
        assert wait_until(lambda v=version, m=mine: tailnet.ask(None, family[v]) == m, timeout_s=20)  # type: ignore[misc]
        assert tailnet.ask(net.member_ns, family[version]) == theirs
        assert "Error" in tailnet.ask(net.stranger_ns, family[version])
    assert "Error" in tailnet.ask(None, net.server(10)[0])

    later = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    real.expire("alpha", later)
    assert wait_until(
        lambda: next(peer.key_expiry for peer in peers(real.status()) if peer.name == "alpha") == later, timeout_s=10
    )
    real.expire("alpha")
    assert wait_until(
        lambda: any(e.get("Expired") for e in real.status()["Peer"].values() if e["HostName"] == "alpha"), timeout_s=10
    )

    for namespace in (net.internet_ns, net.tailnet_ns, net.member_ns, net.machine_ns(SERVER_ID)):
        argv = ["ip", "netns", "exec", namespace, "nft", "list", "table", "inet", "watch"]
        assert re.findall(r"elements = .*", RUNNER.run(Command(argv, "read strays")).check().stdout) == [], namespace


def test_a_restart_ends_a_node_that_joined_by_an_ephemeral_key_and_no_other(tailnet: Tailnet) -> None:
    """What headscale 0.28 does, and why a host's key is not ephemeral."""
    daemon = tailnet.node()
    assert tailnet.join(tailnet.real.mint(ephemeral=True)).ok
    passing = tailnet.state()
    assert passing[0] == "Running"
    daemon.terminate()
    daemon = tailnet.node()
    assert wait_until(lambda: tailnet.state()[0] == "NeedsLogin", timeout_s=10)
    assert "alpha" not in {node["given_name"] for node in tailnet.real.nodes()}
    assert tailnet.join(tailnet.real.mint()).ok
    lasting = tailnet.state()
    assert lasting != passing
    daemon.terminate()
    tailnet.node()
    assert wait_until(lambda: tailnet.state() == lasting, timeout_s=10)


def test_a_key_that_was_revoked_lets_nobody_join_and_one_that_was_used_keeps_its_node(tailnet: Tailnet) -> None:
    """What the orchestrator does with the keys of cattle, against headscale's own API."""
    net, real = tailnet.network.net, tailnet.real
    api = HeadscaleKeys(login_server(net), real.api_key(), "operator", real.certificate)

    def mint() -> tuple[str, Secret]:
        return in_namespace(net.internet_ns, lambda: api.mint("alpha", tag=CATTLE_TAG, ttl_s=600))

    def revoke(ident: str) -> None:
        in_namespace(net.internet_ns, lambda: api.revoke(ident))

    tailnet.node()
    ident, key = mint()
    revoke(ident)
    assert "authkey expired" in tailnet.join(key).tail()
    ident, key = mint()
    assert tailnet.join(key).ok
    revoke(ident)
    revoke(ident)
    assert tailnet.state()[0] == "Running"
    assert "alpha" in {node["given_name"] for node in real.nodes()}


def test_a_tailnet_that_is_started_again_knows_its_nodes(tailnet: Tailnet) -> None:
    before = {(node["given_name"], node["node_key"]) for node in tailnet.real.nodes()}
    assert {name for name, _ in before} == {"operator", "member"}
    tailnet.real.start()
    assert {(node["given_name"], node["node_key"]) for node in tailnet.real.nodes()} == before
    assert tailnet.real.status()["BackendState"] == "Running"
    assert json.dumps(tailnet.real.status()).count("100.64.") > 0
    said = (tailnet.folder / "tailnet" / "operator.log").read_bytes()
    assert b"Engine created" in said
    assert b"system state directory" not in said  # /var/lib/tailscale is this machine's
