"""The emulated cloud beside servers and firewalls: networks, volumes, addresses, images, groups, limits; no sockets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tenacity

from clawdlets_ops.lab.backend import BackendError, LoopbackPool, MachineSpec, StubBackend
from clawdlets_ops.lab.catalogue import Json
from clawdlets_ops.lab.cloud import Cloud
from clawdlets_ops.lab.edge import Rules
from clawdlets_ops.lab.grammar import ApiError

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMFuYXJ5Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5Y2Fu canary@lab"
SUBNET = {"type": "cloud", "network_zone": "eu-central", "ip_range": "10.0.1.0/29"}


class PlainBackend:
    """What a MachineBackend must have and nothing more, as the lab's machines once had."""

    def create(self, spec: MachineSpec, rules: Rules) -> None: ...
    def power_on(self, server_id: int) -> None: ...
    def power_off(self, server_id: int, *, graceful: bool) -> None: ...
    def reboot(self, server_id: int, *, hard: bool) -> None: ...
    def rebuild(self, spec: MachineSpec, rules: Rules) -> None: ...
    def delete(self, server_id: int) -> None: ...
    def set_rules(self, server_id: int, rules: Rules) -> None: ...


@pytest.fixture
def backend() -> StubBackend:
    return StubBackend()


@pytest.fixture
def cloud(backend: StubBackend) -> Iterator[Cloud]:
    made = Cloud(backend=backend, addresses=LoopbackPool(), state_file=None)
    yield made
    made.close()


def settled(cloud: Cloud, answer: Json | None) -> Json:
    """The action of an answer, once it no longer runs."""
    assert answer is not None
    retry = tenacity.Retrying(
        stop=tenacity.stop_after_delay(10),
        wait=tenacity.wait_fixed(0.002),
        retry=tenacity.retry_if_result(lambda row: row["status"] == "running"),
    )
    row: Json = retry(cloud.row, "actions", answer["action"]["id"])
    return row


def server(cloud: Cloud, name: str = "alpha", **more: Any) -> int:
    answer = cloud.create("servers", {"name": name, "server_type": "cx23", "image": "debian-13", **more})
    settled(cloud, answer)
    server_id: int = answer["server"]["id"]
    return server_id


def act(cloud: Cloud, kind: str, row_id: int, command: str, **body: Any) -> Json:
    answer = cloud.act(kind, row_id, command, body)
    assert settled(cloud, answer)["status"] == "success"
    return answer


def refused(call: Any, *arguments: Any, **named: Any) -> tuple[int, str, str]:
    with pytest.raises(ApiError) as caught:
        call(*arguments, **named)
    return caught.value.status, caught.value.code, caught.value.message


def network(cloud: Cloud, name: str = "home", **more: Any) -> int:
    body = {"name": name, "ip_range": "10.0.0.0/16", "subnets": [SUBNET], **more}
    row_id: int = cloud.create("networks", body)["network"]["id"]
    return row_id


class TestNetworks:
    def test_only_the_network_s_first_address_is_the_gateway(self, cloud: Cloud) -> None:
        home, alpha = network(cloud), server(cloud)
        act(cloud, "servers", alpha, "attach_to_network", network=home)
        [interface] = cloud.row("servers", alpha)["private_net"]
        assert (interface["ip"], cloud.row("networks", home)["subnets"][0]["gateway"]) == ("10.0.1.1", "10.0.0.1")
        assert cloud.row("networks", home)["servers"] == [alpha]

    def test_a_subnet_that_is_full_or_asked_for_what_is_taken(self, cloud: Cloud) -> None:
        home, alpha, beta = network(cloud), server(cloud), server(cloud, "beta")
        act(
            cloud,
            "servers",
            alpha,
            "attach_to_network",
            network=home,
            ip="10.0.1.6",
            alias_ips=[f"10.0.1.{n}" for n in range(1, 6)],
        )
        body = {"network": home}
        assert refused(cloud.act, "servers", beta, "attach_to_network", body)[1] == "no_subnet_available"
        assert (
            refused(cloud.act, "servers", beta, "attach_to_network", body | {"ip": "10.0.1.6"})[1] == "ip_not_available"
        )
        assert refused(cloud.act, "servers", alpha, "attach_to_network", body)[1] == "server_already_attached"
        other = network(cloud, "other", ip_range="10.0.0.0/8")
        assert refused(cloud.act, "servers", alpha, "attach_to_network", {"network": other})[1] == "networks_overlap"

    def test_a_subnet_in_use_stays_and_a_protected_network_too(self, cloud: Cloud) -> None:
        home, alpha = network(cloud), server(cloud)
        act(cloud, "servers", alpha, "attach_to_network", network=home)
        status, code, message = refused(cloud.act, "networks", home, "delete_subnet", {"ip_range": "10.0.1.0/29"})
        assert (status, code) == (422, "service_error")
        assert "servers are attached" in message  # what the provider waits for
        act(cloud, "networks", home, "change_protection", delete=True)
        assert refused(cloud.delete, "networks", home) == (423, "protected", "network is delete protected")
        act(cloud, "networks", home, "change_protection", delete=False)
        assert cloud.delete("networks", home) is None
        assert cloud.row("servers", alpha)["private_net"] == []

    @pytest.mark.parametrize(
        ("command", "body", "code"),
        [
            ("add_subnet", SUBNET, "invalid_input"),
            ("add_subnet", SUBNET | {"ip_range": "10.1.0.0/24"}, "invalid_input"),
            ("add_subnet", SUBNET | {"type": "vswitch", "vswitch_id": 1}, "service_error"),
            ("add_route", {"destination": "10.0.1.0/24", "gateway": "10.0.1.2"}, "invalid_input"),
            ("add_route", {"destination": "10.9.0.0/16", "gateway": "10.0.0.1"}, "invalid_input"),
            ("delete_route", {"destination": "10.9.0.0/16", "gateway": "10.0.1.2"}, "not_found"),
            ("change_ip_range", {"ip_range": "10.0.0.0/24"}, "invalid_input"),
            ("change_ip_range", {"ip_range": "8.0.0.0/8"}, "invalid_input"),
        ],
    )
    def test_refusals_change_nothing(self, cloud: Cloud, command: str, body: Json, code: str) -> None:
        home = network(cloud)
        before = cloud.row("networks", home)
        assert refused(cloud.act, "networks", home, command, body)[1] == code
        assert cloud.row("networks", home) == before

    def test_a_subnet_without_a_range_is_the_first_free_one(self, cloud: Cloud) -> None:
        home = network(cloud)
        act(cloud, "networks", home, "add_subnet", type="cloud", network_zone="eu-central")
        act(cloud, "networks", home, "add_subnet", type="cloud", network_zone="eu-central")
        assert [subnet["ip_range"] for subnet in cloud.row("networks", home)["subnets"]] == [
            "10.0.1.0/29",
            "10.0.0.0/24",
            "10.0.2.0/24",
        ]


class TestVolumes:
    def test_attach_detach_grow_delete(self, cloud: Cloud) -> None:
        alpha, far = server(cloud), server(cloud, "far", location="hel1")
        volume = cloud.create("volumes", {"name": "data", "size": 10, "server": alpha})["volume"]["id"]
        assert cloud.row("servers", alpha)["volumes"] == [volume]
        assert refused(cloud.delete, "volumes", volume)[:2] == (422, "resource_in_use")
        assert refused(cloud.act, "volumes", volume, "attach", {"server": alpha})[1] == "volume_already_attached"
        act(cloud, "volumes", volume, "detach")
        assert refused(cloud.act, "volumes", volume, "attach", {"server": far})[1] == "invalid_input"
        assert refused(cloud.act, "volumes", volume, "resize", {"size": 10})[1] == "invalid_input"
        act(cloud, "volumes", volume, "resize", size=20)
        act(cloud, "volumes", volume, "change_protection", delete=True)
        assert refused(cloud.delete, "volumes", volume)[:2] == (423, "protected")

    def test_a_server_that_goes_leaves_its_volumes(self, cloud: Cloud) -> None:
        volume = cloud.create("volumes", {"name": "data", "size": 10, "location": "fsn1"})["volume"]["id"]
        alpha = server(cloud, volumes=[volume])
        assert cloud.row("volumes", volume)["server"] == alpha
        settled(cloud, cloud.delete("servers", alpha))
        assert cloud.row("volumes", volume)["server"] is None


class TestPrimaryIps:
    def test_assigned_only_to_a_server_that_is_off_and_handed_to_the_machine(
        self, cloud: Cloud, backend: StubBackend
    ) -> None:
        alpha = server(cloud)
        row = cloud.create("primary_ips", {"name": "front", "type": "ipv4", "location": "fsn1"})["primary_ip"]
        assert (row["ip"], row["assignee_type"], row["assignee_id"]) == ("127.0.1.2", "unassigned", None)
        own = cloud.row("servers", alpha)["public_net"]["ipv4"]["id"]
        assert refused(cloud.act, "primary_ips", own, "unassign", {})[1] == "server_not_stopped"
        assert refused(cloud.delete, "primary_ips", own)[:2] == (422, "must_be_unassigned")
        act(cloud, "servers", alpha, "poweroff")
        assign = {"assignee_id": alpha, "assignee_type": "server"}
        assert refused(cloud.act, "primary_ips", row["id"], "assign", assign)[1] == "server_has_ipv4"
        act(cloud, "primary_ips", own, "unassign")
        assert cloud.row("servers", alpha)["public_net"]["ipv4"] is None
        act(cloud, "primary_ips", row["id"], "assign", **assign)
        handed = [call[1].ipv4 for call in backend.calls if isinstance(call[1], MachineSpec)]
        assert handed == ["127.0.1.1", "", "127.0.1.2"]
        assert cloud.delete("primary_ips", own) is None

    def test_a_server_with_addresses_made_before_keeps_them_apart_from_its_life(self, cloud: Cloud) -> None:
        address = cloud.create("primary_ips", {"name": "front", "type": "ipv4", "location": "fsn1"})["primary_ip"]["id"]
        alpha = server(cloud, public_net={"ipv4": address, "enable_ipv6": True})
        net = cloud.row("servers", alpha)["public_net"]
        assert (net["ipv4"]["ip"], net["ipv6"]["ip"]) == ("127.0.1.1", "::/64")
        settled(cloud, cloud.delete("servers", alpha))
        assert [(row["id"], row["assignee_id"]) for row in cloud.rows("primary_ips")] == [(address, None)]
        assert refused(server, cloud, "far", location="hel1", public_net={"ipv4": address})[1] == (
            "primary_ip_datacenter_mismatch"
        )

    def test_a_server_without_a_public_address_has_no_firewall(self, cloud: Cloud) -> None:
        private = {"enable_ipv4": False, "enable_ipv6": False}
        alpha = server(cloud, public_net=private)
        assert cloud.servers()[0].ipv4 == ""
        edge = cloud.create("firewalls", {"name": "edge"})["firewall"]["id"]
        body = {"apply_to": [{"type": "server", "server": {"id": alpha}}]}
        assert refused(cloud.act, "firewalls", edge, "apply_to_resources", body)[1] == "private_net_only_server"

    @pytest.mark.parametrize(
        "public_net",
        [{"enable_ipv4": False}, {"ipv4": 4001, "ipv6": 4004}],
        ids=["no IPv4", "addresses of two slots"],
    )
    def test_a_backend_that_cannot_do_it_is_not_asked(self, public_net: Json) -> None:
        cloud = Cloud(backend=PlainBackend(), addresses=LoopbackPool(), state_file=None)
        for index, family in enumerate(("ipv4", "ipv4", "ipv6", "ipv6")):
            cloud.create("primary_ips", {"name": f"a{index}", "type": family, "location": "fsn1"})
        assert refused(server, cloud, public_net=public_net)[:2] == (501, "not_implemented")
        assert cloud.servers() == ()
        assert server(cloud, public_net={"ipv4": 4002, "ipv6": 4004}) == 1001
        cloud.close()

    def test_reverse_names(self, cloud: Cloud) -> None:
        alpha = server(cloud)
        assert cloud.row("servers", alpha)["public_net"]["ipv4"]["dns_ptr"] == "static.1.1.0.127.clients.lab.invalid"
        act(cloud, "servers", alpha, "change_dns_ptr", ip="127.0.1.1", dns_ptr="alpha.lab.invalid")
        act(cloud, "servers", alpha, "change_dns_ptr", ip="::1", dns_ptr="six.lab.invalid")
        net = cloud.row("servers", alpha)["public_net"]
        assert net["ipv4"]["dns_ptr"] == "alpha.lab.invalid"
        assert net["ipv6"]["dns_ptr"] == [{"ip": "::1", "dns_ptr": "six.lab.invalid"}]
        act(cloud, "servers", alpha, "change_dns_ptr", ip="::1", dns_ptr=None)
        assert cloud.row("servers", alpha)["public_net"]["ipv6"]["dns_ptr"] == []
        assert refused(cloud.act, "servers", alpha, "change_dns_ptr", {"ip": "10.0.0.1"})[1] == "invalid_input"

    def test_the_old_name_of_nobody(self) -> None:
        cloud = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=None, unassigned_type="server")
        body = {"name": "front", "type": "ipv6", "location": "fsn1"}
        assert cloud.create("primary_ips", body)["primary_ip"]["assignee_type"] == "server"
        assert cloud.rows("primary_ips")[0]["assignee_type"] == "server"
        cloud.close()


class TestServerActions:
    def test_a_guest_that_powered_itself_off_can_be_powered_on(self, cloud: Cloud, backend: StubBackend) -> None:
        alpha = server(cloud)
        assert act(cloud, "servers", alpha, "poweron")["action"]["command"] == "start_server"
        assert backend.calls[-1] == ("power_on", alpha)
        cloud.mark_off(alpha)
        cloud.mark_off(7)
        assert cloud.row("servers", alpha)["status"] == "off"
        act(cloud, "servers", alpha, "poweron")
        assert cloud.row("servers", alpha)["status"] == "running"

    def test_change_type_needs_a_stopped_server_and_a_type_that_fits(self, cloud: Cloud) -> None:
        alpha = server(cloud)
        body = {"server_type": "cx33", "upgrade_disk": False}
        assert refused(cloud.act, "servers", alpha, "change_type", body)[1] == "server_not_stopped"
        act(cloud, "servers", alpha, "poweroff")
        assert refused(cloud.act, "servers", alpha, "change_type", body | {"server_type": "cax11"})[1] == (
            "invalid_server_type"
        )
        act(cloud, "servers", alpha, "change_type", **body)
        row = cloud.row("servers", alpha)
        assert (row["server_type"]["name"], row["primary_disk_size"], row["status"]) == ("cx33", 40, "off")

    def test_rescue_is_for_one_boot(self, cloud: Cloud, backend: StubBackend) -> None:
        cloud.create("ssh_keys", {"name": "operator", "public_key": KEY})
        alpha = server(cloud)
        answer = act(cloud, "servers", alpha, "enable_rescue", type="linux64", ssh_keys=["operator"])
        assert "canary" in answer["root_password"]
        assert backend.calls[-1] == ("enable_rescue", alpha, (KEY,))
        assert cloud.row("servers", alpha)["rescue_enabled"]
        act(cloud, "servers", alpha, "reset")
        assert not cloud.row("servers", alpha)["rescue_enabled"]

    def test_a_placement_group_is_joined_off_and_starts_the_server(self, cloud: Cloud) -> None:
        group = cloud.create("placement_groups", {"name": "apart", "type": "spread"})["placement_group"]["id"]
        alpha = server(cloud)
        body = {"placement_group": group}
        assert refused(cloud.act, "servers", alpha, "add_to_placement_group", body)[1] == "server_not_stopped"
        act(cloud, "servers", alpha, "poweroff")
        act(cloud, "servers", alpha, "add_to_placement_group", **body)
        row = cloud.row("servers", alpha)
        assert (row["status"], row["placement_group"]["servers"]) == ("running", [alpha])
        assert refused(cloud.delete, "placement_groups", group)[:2] == (422, "resource_in_use")

    def test_a_snapshot_is_made_used_protected_and_deleted(self, cloud: Cloud, backend: StubBackend) -> None:
        alpha = server(cloud)
        image = act(cloud, "servers", alpha, "create_image", description="before")["image"]
        assert (image["status"], cloud.row("images", image["id"])["status"]) == ("creating", "available")
        assert backend.calls[-1] == ("create_image", alpha, image["id"])
        act(cloud, "servers", alpha, "rebuild", image=image["id"])
        spec = backend.calls[-1][1]
        assert isinstance(spec, MachineSpec)
        assert spec.image == str(image["id"])
        act(cloud, "images", image["id"], "change_protection", delete=True)
        assert refused(cloud.delete, "images", image["id"]) == (423, "protected", "snapshot deletion is protected")
        act(cloud, "images", image["id"], "change_protection", delete=False)
        assert cloud.delete("images", image["id"]) is None
        assert cloud.row("servers", alpha)["image"] is None
        assert refused(cloud.delete, "images", 114690387)[:2] == (403, "forbidden")
        cloud.close()
        assert backend.calls[-1] == ("delete_image", image["id"])

    def test_a_snapshot_that_fails_is_gone_and_its_server_as_before(self) -> None:
        class Full(StubBackend):
            def create_image(self, server_id: int, image_id: int) -> None:
                raise BackendError("no_space", "the disk is full")

        cloud = Cloud(backend=Full(), addresses=LoopbackPool(), state_file=None)
        alpha = server(cloud)
        assert settled(cloud, cloud.act("servers", alpha, "create_image", {}))["error"]["code"] == "no_space"
        assert [row["type"] for row in cloud.rows("images") if row["type"] != "system"] == []
        assert (cloud.row("servers", alpha)["status"], cloud.row("servers", alpha)["locked"]) == ("running", False)
        cloud.close()

    def test_backups_go_with_their_server_or_their_switch(self, cloud: Cloud) -> None:
        alpha = server(cloud)
        assert refused(cloud.act, "servers", alpha, "create_image", {"type": "backup"})[1] == "service_error"
        act(cloud, "servers", alpha, "enable_backup")
        image = act(cloud, "servers", alpha, "create_image", type="backup")["image"]["id"]
        assert cloud.row("images", image)["bound_to"] == alpha
        act(cloud, "servers", alpha, "disable_backup")
        assert refused(cloud.row, "images", image)[1] == "not_found"


class TestLimits:
    def test_firewalls_a_project(self, cloud: Cloud) -> None:
        for index in range(50):
            cloud.create("firewalls", {"name": f"edge-{index}"})
        assert refused(cloud.create, "firewalls", {"name": "more"})[:2] == (403, "resource_limit_exceeded")

    def test_effective_rules_of_a_firewall_and_of_a_server(self, cloud: Cloud) -> None:
        def rules(count: int) -> list[Json]:
            networks = [f"10.0.{index}.0/24" for index in range(count)]
            return [{"direction": "in", "protocol": "tcp", "port": "22", "source_ips": networks}]

        most = rules(100) * 5
        first = cloud.create("firewalls", {"name": "first", "rules": most})["firewall"]["id"]
        body = {"rules": [*most, *rules(1)]}
        assert refused(cloud.act, "firewalls", first, "set_rules", body)[:2] == (403, "resource_limit_exceeded")
        assert len(cloud.row("firewalls", first)["rules"]) == 5
        second = cloud.create("firewalls", {"name": "second", "rules": rules(1)})["firewall"]["id"]
        alpha = server(cloud, firewalls=[{"firewall": first}])
        body = {"apply_to": [{"type": "server", "server": {"id": alpha}}]}
        assert refused(cloud.act, "firewalls", second, "apply_to_resources", body)[1] == "resource_limit_exceeded"
        cloud.act("firewalls", second, "set_rules", {"rules": []})
        assert len(cloud.act("firewalls", second, "apply_to_resources", body)["actions"]) == 1


def test_all_of_it_survives_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    cloud = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=file)
    group = cloud.create("placement_groups", {"name": "apart", "type": "spread"})["placement_group"]["id"]
    alpha = server(cloud, networks=[network(cloud)], placement_group=group)
    cloud.create("volumes", {"name": "data", "size": 10, "server": alpha})
    act(cloud, "servers", alpha, "create_image")
    act(cloud, "servers", alpha, "change_dns_ptr", ip="127.0.1.1", dns_ptr="alpha.lab.invalid")
    cloud.close()
    kinds = ("servers", "networks", "volumes", "placement_groups", "primary_ips", "images", "actions")
    again = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=file)
    for kind in kinds:
        assert again.rows(kind) == cloud.rows(kind)
        assert again.rows(kind)
    again.close()
