"""Rescue, snapshots, public addresses and cut flows through the API, on real machines and by real connections."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hcloud import APIException, Client
from hcloud.firewalls.domain import FirewallResource, FirewallRule
from hcloud.images.domain import Image
from hcloud.locations.domain import Location
from hcloud.server_types.domain import ServerType
from hcloud.servers.client import BoundServer
from hcloud.servers.domain import ServerCreatePublicNetwork

from clawdlets_ops.lab import control, overview
from clawdlets_ops.lab.control import LabServer
from clawdlets_ops.lab.network import in_namespace
from clawdlets_ops.lab.registry import read_record
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Command, LocalRunner, Result
from tests.lab.test_lab_machines import BASE, eventually, ssh

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]


@dataclass(frozen=True)
class Api:
    """A lab of its own, asked through its API."""

    layout: Layout
    client: Client

    def ssh(self, address: str, script: str) -> Result:
        return ssh(self.layout.runtime / "keys" / "operators" / "ssh_ed25519", address, script)

    def hostname(self, address: str) -> str:
        return self.ssh(address, "hostname; cat /srv/app 2>/dev/null").stdout

    def create(self, name: str, **more: Any) -> BoundServer:
        key = self.client.ssh_keys.get_by_name("operator")
        image = more.pop("image", Image(name="debian-12"))
        made = self.client.servers.create(name, ServerType("cx23"), image, ssh_keys=[key], **more)
        made.action.wait_until_finished()
        made.server.reload()
        return made.server

    def of(self, server: BoundServer) -> LabServer:
        return next(one for one in control.status(self.layout).servers if one.server_id == server.id)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    layout = Layout(tmp_path_factory.mktemp("api") / "checkout")
    (layout.root / "fleet").mkdir(parents=True)
    shutil.copy(BASE.parents[2] / "fleet" / "clawdlets.json", layout.root / "fleet")
    (layout.root / ".cache").symlink_to(BASE.parents[1])
    try:
        endpoint = control.up(layout, os.environ, tailnet="stand-in").endpoint
        client = Client((layout.lab / "token").read_text().strip(), api_endpoint=endpoint, poll_interval=0.05)
        public = layout.runtime / "keys" / "operators" / "ssh_ed25519.pub"
        client.ssh_keys.create("operator", public.read_text())
        yield Api(layout, client)
    finally:
        control.down(layout, os.environ)


def test_rescue_and_snapshot_through_the_api(api: Api) -> None:
    server = api.create("alpha")
    address = server.public_net.ipv4.ip
    eventually(lambda: api.hostname(address) == "alpha\n", "alpha")
    api.ssh(address, "echo golden > /srv/app").check()

    key = api.client.ssh_keys.get_by_name("operator")
    server.enable_rescue(type="linux64", ssh_keys=[str(key.id)]).action.wait_until_finished()
    server.reset().wait_until_finished()
    eventually(lambda: api.hostname(address) == "rescue\n", "the rescue system")
    assert "running (rescue)" in overview.text(control.status(api.layout))
    server.reset().wait_until_finished()
    eventually(lambda: api.hostname(address) == "alpha\ngolden\n", "alpha again")
    assert "(rescue)" not in overview.text(control.status(api.layout))
    server.reload()
    assert server.rescue_enabled is False

    taken = server.create_image(description="golden")
    taken.action.wait_until_finished()
    copy = api.create("beta", image=taken.image)
    eventually(lambda: api.hostname(copy.public_net.ipv4.ip) == "beta\ngolden\n", "beta")
    for each in (server, copy):
        each.delete().wait_until_finished()


def test_public_addresses_come_and_go_and_the_traffic_with_them(api: Api) -> None:
    """One family only, and a primary IP that moves from server to server; by real connections."""
    front = api.client.primary_ips.create("ipv4", "front", location=Location(name="fsn1")).primary_ip
    one = api.create("one", public_net=ServerCreatePublicNetwork(ipv4=front))
    six = api.create("six", public_net=ServerCreatePublicNetwork(enable_ipv4=False))
    four = api.create("four", public_net=ServerCreatePublicNetwork(enable_ipv6=False))
    assert six.public_net.ipv4 is None
    assert four.public_net.ipv6 is None
    record = read_record(api.layout.lab)
    assert record is not None

    def would_be(server: BoundServer) -> tuple[str, str]:
        """The addresses of the slot of which the server has one half."""
        seen = api.of(server)
        key = record.net.key_of(seen.ipv4 or seen.ipv6)
        assert key is not None
        ipv4, ipv6 = record.net.server(key)
        return ipv4, ipv6.replace("::/64", "::1")

    eventually(lambda: api.hostname(api.of(six).ipv6) == "six\n", "six over IPv6")
    eventually(lambda: api.hostname(api.of(four).ipv4) == "four\n", "four over IPv4")
    eventually(lambda: api.hostname(front.ip) == "one\n", "one over the primary IP")
    assert api.of(six).public_addresses == {6: would_be(six)[1]}
    # The two halves of one address slot lead to two servers, and neither has the other's.
    assert would_be(six) == would_be(four)
    assert (api.hostname(would_be(six)[0]), api.hostname(would_be(six)[1])) == ("four\n", "six\n")
    assert "inet " not in api.ssh(api.of(six).ipv6, "ip address show dev eth0").stdout

    # Only what is off can change.
    with pytest.raises(APIException, match="must be stopped"):
        front.unassign()
    six_net = api.of(six).ipv6
    for server in (one, six):
        server.power_off().wait_until_finished()
    front.unassign().wait_until_finished()
    front.assign(six.id, "server").wait_until_finished()
    for server in (one, six):
        server.power_on().wait_until_finished()
    eventually(lambda: api.hostname(front.ip) == "six\n", "the primary IP at six")
    eventually(lambda: api.hostname(six_net) == "six\n", "six over IPv6 still")
    eventually(lambda: api.hostname(api.of(one).ipv6) == "one\n", "one over IPv6 alone")
    assert api.of(one).ipv4 == ""
    # The rules are the server's, whatever its addresses.
    firewall = api.client.firewalls.create("shut", [], resources=[FirewallResource("server", server=six)]).firewall
    eventually(lambda: not api.ssh(front.ip, "true").ok, "six behind its firewall")
    assert api.hostname(api.of(four).ipv4) == "four\n"
    # A reboot of the lab's process keeps who has what.
    daemon = record.daemon
    assert daemon is not None
    daemon.signal(signal.SIGKILL)
    eventually(lambda: not daemon.alive(), "the daemon's death")
    control.up(api.layout, os.environ, tailnet="stand-in")
    for action in firewall.remove_from_resources([FirewallResource("server", server=six)]):
        action.wait_until_finished()
    eventually(lambda: api.hostname(front.ip) == "six\n", "the primary IP at six after a restart")
    firewall.delete()
    for server in (one, six, four):
        server.delete().wait_until_finished()
    front.reload()
    assert front.assignee_id is None
    front.delete()


def up(api: Api, *options: str) -> str:
    """What ``clawdlets lab up`` says of a lab that is up."""
    program = Path(sys.executable).with_name("clawdlets")
    command = Command([program, "lab", "up", *options], "tell the lab", cwd=api.layout.root, timeout_s=60)
    return LocalRunner(os.environ).run(command).check().stdout


def test_flows_are_cut_by_a_lab_that_was_told_so(api: Api) -> None:
    rule = FirewallRule(direction="in", protocol="tcp", port="4000", source_ips=["0.0.0.0/0"])
    firewall = api.client.firewalls.create("talk", [rule]).firewall
    server = api.create("talker", firewalls=[firewall])
    address, record = server.public_net.ipv4.ip, read_record(api.layout.lab)
    assert record is not None

    def talk() -> list[str]:
        """What arrives of a word before the rules go, and of one after that."""
        listener = in_namespace(record.net.machine_ns(server.id), lambda: socket.create_server((address, 4000)))
        client = in_namespace(record.net.stranger_ns, lambda: socket.create_connection((address, 4000), timeout=5))
        heard = []
        with listener, client:
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(1.5)
                for word in (b"before", b"after"):
                    client.sendall(word)
                    try:
                        heard.append(peer.recv(16).decode())
                    except TimeoutError:
                        heard.append("")
                    for action in firewall.set_rules([]):
                        action.wait_until_finished()
        for action in firewall.set_rules([rule]):
            action.wait_until_finished()
        return heard

    assert talk() == ["before", "after"]
    assert "ends the flows" in up(api, "--cut-established")
    assert control.status(api.layout).cut_established
    assert talk() == ["before", ""]
    assert "ends the flows" in up(api)
    assert "ends the flows" not in up(api, "--keep-established")
    assert talk() == ["before", "after"]
    server.delete().wait_until_finished()
    firewall.delete()
