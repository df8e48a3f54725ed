"""The emulator against the clients that people use: python-hcloud, Debian's hcloud CLI, and the real provider in OpenTofu."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hcloud import APIException, Client
from hcloud.actions import ActionFailedException
from hcloud.firewalls import FirewallResource, FirewallRule
from hcloud.images import Image
from hcloud.locations import Location
from hcloud.server_types import ServerType
from hcloud.servers import Server

from clawdlets_ops.lab.cloud import BackendError, Rule, StubBackend
from tests.contract.emulator_lab import KEY, TOKEN, Lab, Tofu, run, running_lab

pytestmark = pytest.mark.contract

FINGERPRINT = "01:71:58:37:51:a5:75:1e:5d:c9:93:70:5e:16:03:6e"

RESOURCES = ("hcloud_firewall.edge", "hcloud_server.alpha", "hcloud_ssh_key.operator")
CREATE = {address: ["create"] for address in RESOURCES}
NO_CHANGE = {address: ["no-op"] for address in RESOURCES}


def listed_by_cli(lab: Lab, program: str, kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(run([program, kind, "list", "-o", "json"], lab.environment()))
    return rows


def ssh_rule(*networks: str) -> FirewallRule:
    return FirewallRule(direction="in", protocol="tcp", port="22", source_ips=list(networks), description="ssh")


class TestPythonHcloud:
    def test_a_server_s_life(self, client: Client, lab: Lab) -> None:
        key = client.ssh_keys.create(name="operator", public_key=KEY, labels={"env": "lab"})
        assert key.fingerprint == FINGERPRINT
        assert client.ssh_keys.get_by_fingerprint(FINGERPRINT).id == key.id
        firewall = client.firewalls.create(name="edge", rules=[ssh_rule("203.0.113.0/24")]).firewall
        created = client.servers.create(
            name="alpha",
            server_type=ServerType(name="cx23"),
            image=Image(name="debian-13"),
            location=Location(name="hel1"),
            ssh_keys=[key],
            firewalls=[firewall],
            labels={"env": "lab"},
            user_data="#cloud-config\n",
        )
        created.action.wait_until_finished()
        for action in created.next_actions:
            action.wait_until_finished()

        server = client.servers.get_by_name("alpha")
        assert (server.status, server.location.name, server.server_type.architecture) == ("running", "hel1", "x86")
        assert (server.image.name, server.public_net.ipv4.ip) == ("debian-13", "127.0.1.1")
        assert [(attached.firewall.id, attached.status) for attached in server.public_net.firewalls] == [
            (firewall.id, "applied")
        ]
        assert client.servers.get_all(label_selector="env in (lab, prod),!old")[0].id == server.id
        assert client.servers.get_all(label_selector="env!=lab") == []

        for action in firewall.set_rules([]):
            action.wait_until_finished()
        assert lab.backend.calls[-1] == ("set_rules", server.id, ())
        assert client.firewalls.get_by_id(firewall.id).rules == []

        server.update(name="beta", labels={})
        server.power_off().wait_until_finished()
        assert client.servers.get_by_id(server.id).status == "off"
        server.rebuild(Image(name="debian-12")).action.wait_until_finished()
        with pytest.raises(APIException, match="still in use") as in_use:
            firewall.delete()
        assert in_use.value.code == "resource_in_use"
        assert in_use.value.correlation_id
        for action in firewall.remove_from_resources([FirewallResource("server", server=Server(id=server.id))]):
            action.wait_until_finished()
        assert firewall.delete()
        server.delete().wait_until_finished()
        assert client.servers.get_by_name("beta") is None
        assert key.delete()

    def test_the_catalogue_and_primary_ips(self, client: Client) -> None:
        assert [location.name for location in client.locations.get_all()] == ["fsn1", "nbg1", "hel1"]
        for server_type in client.server_types.get_all():
            assert {offer.location.name for offer in server_type.locations} == {"fsn1", "nbg1", "hel1"}
            assert server_type.prices[0]["price_monthly"]["gross"]
        arm = client.images.get_by_name_and_architecture("ubuntu-24.04", "arm")
        assert client.images.get_by_id(arm.id).architecture == "arm"
        client.servers.create(
            name="alpha", server_type=ServerType(name="cax11"), image=Image(name="ubuntu-24.04")
        ).action.wait_until_finished()
        addresses = client.primary_ips.get_all()
        assert [(address.type, address.assignee_type) for address in addresses] == [
            ("ipv4", "server"),
            ("ipv6", "server"),
        ]
        assert client.primary_ips.get_by_id(addresses[0].id).ip == "127.0.1.1"

    def test_more_than_one_page(self, client: Client) -> None:
        for index in range(51):
            client.placement_groups.create(name=f"spread-{index}", type="spread")
        assert len(client.placement_groups.get_all()) == 51

    def test_errors_have_their_codes(self, client: Client, lab: Lab) -> None:
        client.ssh_keys.create(name="operator", public_key=KEY)

        def code(call: Any) -> str | int:
            with pytest.raises(APIException) as caught:
                call()
            return caught.value.code

        assert code(lambda: client.ssh_keys.create(name="again", public_key=KEY)) == "uniqueness_error"
        assert code(lambda: client.firewalls.create("edge", rules=[ssh_rule("10.0.0.1/8")])) == "invalid_input"
        assert code(lambda: client.servers.get_by_id(7)) == "not_found"
        stranger = Client(TOKEN[::-1], api_endpoint=lab.emulator.endpoint, timeout=10)
        assert code(stranger.servers.get_all) == "unauthorized"
        stranger._client._session.close()

    def test_a_machine_that_cannot_be_made_is_a_failed_action(self, tmp_path: Path) -> None:
        class Broken(StubBackend):
            def create(self, *_: object) -> None:
                raise BackendError("no_space", "the disk is full")

        with running_lab(tmp_path, Broken()) as lab, lab.client() as client:
            created = client.servers.create("alpha", ServerType(name="cx23"), Image(name="debian-13"))
            with pytest.raises(ActionFailedException, match="the disk is full"):
                created.action.wait_until_finished()


class TestHttp:
    @pytest.fixture
    def connection(self, lab: Lab) -> Iterator[HTTPConnection]:
        address = urlsplit(lab.emulator.endpoint)
        made = HTTPConnection(str(address.hostname), address.port, timeout=10)
        yield made
        made.close()

    def test_one_connection_carries_many_requests_until_the_emulator_stops(
        self, connection: HTTPConnection, lab: Lab
    ) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        sockets = set()
        for path, status in (("/v1/locations", 200), ("/v1/servers/7", 404), ("/v1/images/45557056", 200)):
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            assert (answer.status, answer.headers["Content-Type"]) == (status, "application/json")
            assert int(answer.headers["X-Correlation-Id"], 16)
            assert {"RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"} <= set(answer.headers)
            json.load(answer)
            sockets.add(connection.sock)
        assert len(sockets) == 1
        lab.emulator.stop()
        assert connection.sock.recv(1) == b""

    def test_an_endless_body_is_refused_unread(self, connection: HTTPConnection) -> None:
        connection.putrequest("POST", "/v1/servers")
        connection.putheader("Content-Length", str(10**9))
        connection.endheaders()
        assert connection.getresponse().status == 413


class TestHcloudCli:
    def test_a_server_s_life(self, lab: Lab, hcloud_program: str, tmp_path: Path) -> None:
        def hcloud(*words: str, expected: int = 0) -> str:
            return run([hcloud_program, "--poll-interval", "10ms", *words], lab.environment(), expected=expected)

        (tmp_path / "key.pub").write_text(KEY)
        for kind in ("location", "server-type", "image", "primary-ip", "server", "firewall", "ssh-key"):
            hcloud(kind, "list")
        hcloud("ssh-key", "create", "--name", "operator", "--public-key-from-file", str(tmp_path / "key.pub"))
        hcloud("firewall", "create", "--name", "edge")
        rule = ["--direction", "in", "--protocol", "tcp", "--port", "22", "--source-ips", "10.0.0.0/8"]
        hcloud("firewall", "add-rule", "edge", *rule)
        options = ["--ssh-key", "operator", "--firewall", "edge", "--location", "nbg1", "--label", "env=lab"]
        hcloud("server", "create", "--name", "alpha", "--type", "cx23", "--image", "debian-12", *options)
        assert lab.backend.calls[0][2] == (Rule("in", "tcp", "22", ("10.0.0.0/8",), None),)
        assert "alpha" in hcloud("server", "list", "-l", "env in (lab)")
        assert "alpha" not in hcloud("server", "list", "-l", "!env")
        assert "nbg1" in hcloud("server", "describe", "alpha", "-o", "json")
        hcloud("server", "poweroff", "alpha")
        hcloud("server", "poweron", "alpha")
        hcloud("server", "rebuild", "alpha", "--image", "debian-13")
        assert "(resource_in_use)" in hcloud("firewall", "delete", "edge", expected=1)
        assert "(not_implemented)" in hcloud("load-balancer", "list", expected=1)
        assert "(deprecated_api_endpoint)" in hcloud("datacenter", "list", expected=1)
        hcloud("server", "delete", "alpha")
        hcloud("firewall", "delete", "edge")
        hcloud("ssh-key", "delete", "operator")


def write(tofu: Tofu, *, networks: list[str], labels: dict[str, str]) -> None:
    """One key, one firewall and one server."""
    tofu.write(
        resource={
            "hcloud_ssh_key": {"operator": {"name": "operator", "public_key": KEY}},
            "hcloud_firewall": {
                "edge": {
                    "name": "edge",
                    "labels": labels,
                    "rule": [
                        {"direction": "in", "protocol": "tcp", "port": "22", "source_ips": networks},
                        {"direction": "in", "protocol": "icmp", "source_ips": ["0.0.0.0/0", "::/0"]},
                        {"direction": "in", "protocol": "udp", "port": "any", "source_ips": ["::/0"]},
                    ],
                }
            },
            "hcloud_server": {
                "alpha": {
                    "name": "alpha",
                    "server_type": "cx23",
                    "image": "debian-12",
                    "location": "fsn1",
                    "ssh_keys": ["${hcloud_ssh_key.operator.id}"],
                    "firewall_ids": ["${hcloud_firewall.edge.id}"],
                    "user_data": "#cloud-config\n",
                    "labels": labels,
                }
            },
        },
        output={"server_id": {"value": "${hcloud_server.alpha.id}"}},
    )


class TestProvider:
    def test_create_change_and_destroy_without_a_replacement(self, tofu: Tofu, lab: Lab) -> None:
        write(tofu, networks=["10.0.0.0/8"], labels={"env": "lab"})
        tofu("init", "-input=false", "-no-color")
        assert tofu.planned() == CREATE
        assert not any(entry["mutates"] for entry in lab.journal())
        tofu.apply()
        assert tofu.planned() == NO_CHANGE
        at_boot = lab.backend.calls[0][2]
        assert isinstance(at_boot, tuple)
        assert set(at_boot) == {
            Rule("in", "icmp", None, ("0.0.0.0/0", "::/0"), None),
            Rule("in", "tcp", "22", ("10.0.0.0/8",), None),
            Rule("in", "udp", "1-65535", ("::/0",), None),
        }

        write(tofu, networks=["10.0.0.0/8", "2001:db8::/32"], labels={"env": "lab"})
        assert tofu.planned() == {**NO_CHANGE, "hcloud_firewall.edge": ["update"]}
        tofu.apply()
        assert tofu.planned() == NO_CHANGE

        write(tofu, networks=["10.0.0.0/8", "2001:db8::/32"], labels={"env": "prod"})
        updates = {"hcloud_firewall.edge": ["update"], "hcloud_server.alpha": ["update"]}
        assert tofu.planned() == {**NO_CHANGE, **updates}
        tofu.apply()
        assert tofu.planned() == NO_CHANGE
        assert not any(entry["method"] == "DELETE" for entry in lab.journal())
        assert json.loads(tofu("output", "-json", "server_id")) == "1001"
        assert [call[0] for call in lab.backend.calls] == ["create", "set_rules"]

        tofu("destroy", "-auto-approve", "-input=false", "-no-color")
        assert (lab.cloud.servers(), lab.cloud.rows("firewalls"), lab.cloud.rows("ssh_keys")) == ((), [], [])
        assert {entry["userAgent"].partition("/")[0] for entry in lab.journal()} == {"hcloud-terraform"}
        assert {entry["status"] for entry in lab.journal()} <= {200, 201, 204}

    def test_what_it_made_is_what_the_other_clients_list(self, tofu: Tofu, lab: Lab, hcloud_program: str) -> None:
        write(tofu, networks=["10.0.0.0/8"], labels={"env": "lab"})
        tofu("init", "-input=false", "-no-color")
        tofu.apply()
        [server] = listed_by_cli(lab, hcloud_program, "server")
        [firewall] = listed_by_cli(lab, hcloud_program, "firewall")
        with lab.client() as client:
            [same_server] = client.servers.get_all()
            [same_firewall] = client.firewalls.get_all()
        assert (server["id"], server["name"], server["status"]) == (same_server.id, "alpha", same_server.status)
        assert server["public_net"]["ipv4"]["ip"] == same_server.public_net.ipv4.ip
        assert (firewall["id"], firewall["name"]) == (same_firewall.id, same_firewall.name)
        assert [rule.get("port") for rule in firewall["rules"]] == [rule.port for rule in same_firewall.rules]
        assert same_firewall.applied_to[0].server.id == same_server.id

    def test_a_server_that_vanished_is_made_again(self, tofu: Tofu, lab: Lab) -> None:
        write(tofu, networks=["10.0.0.0/8"], labels={})
        tofu("init", "-input=false", "-no-color")
        tofu.apply()
        with lab.client() as client:
            client.servers.get_by_name("alpha").delete().wait_until_finished()
        assert tofu.planned() == {**NO_CHANGE, "hcloud_server.alpha": ["create"]}

    def test_a_machine_that_cannot_be_made_ends_the_apply_with_its_reason(self, tmp_path: Path) -> None:
        class Broken(StubBackend):
            def create(self, *_: object) -> None:
                raise BackendError("no_space", "the disk is full")

        with running_lab(tmp_path, Broken()) as lab:
            tofu = Tofu(lab, tmp_path)
            write(tofu, networks=["10.0.0.0/8"], labels={})
            tofu("init", "-input=false", "-no-color")
            assert "the disk is full (no_space" in tofu(
                "apply", "-auto-approve", "-input=false", "-no-color", expected=1
            )
