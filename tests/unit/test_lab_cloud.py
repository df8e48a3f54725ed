"""The lab's emulated cloud: what it accepts, what it remembers, and what it tells the machines; no sockets, no machines."""

from __future__ import annotations

import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tenacity

from clawdlets_ops.errors import LabError
from clawdlets_ops.lab.cloud import (
    ApiError,
    BackendError,
    Cloud,
    LoopbackPool,
    MachineSpec,
    Rule,
    StubBackend,
)

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMFuYXJ5Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5Y2Fu canary@lab\n"
OTHER_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMJuYXJ5Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5Y2Fu canary@lab"
SSH_RULE = {"direction": "in", "protocol": "tcp", "port": "22", "source_ips": ["10.0.0.0/8", "2001:DB8::/32"]}


class GatedBackend(StubBackend):
    """Lets a call of ``held`` wait until the gate opens, and fails those named in ``failures``."""

    def __init__(self, held: str = "", failures: dict[str, Exception] | None = None) -> None:
        super().__init__()
        self.gate = threading.Event()
        self._held = held
        self._failures = failures or {}

    def _record(self, *call: object) -> None:
        super()._record(*call)
        if call[0] == self._held:
            assert self.gate.wait(10)
        if call[0] in self._failures:
            raise self._failures[str(call[0])]


def make_cloud(backend: StubBackend | None = None, state_file: Path | None = None) -> Cloud:
    return Cloud(
        backend=backend or StubBackend(),
        addresses=LoopbackPool(),
        state_file=state_file,
        clock=lambda: datetime(2026, 11, 22, 12, 0, tzinfo=UTC),
    )


@pytest.fixture
def backend() -> StubBackend:
    return StubBackend()


@pytest.fixture
def cloud(backend: StubBackend) -> Iterator[Cloud]:
    made = make_cloud(backend)
    yield made
    made.close()


def finished(cloud: Cloud, action: dict[str, Any]) -> dict[str, Any]:
    """The action once it no longer runs."""
    retry = tenacity.Retrying(
        stop=tenacity.stop_after_delay(10),
        wait=tenacity.wait_fixed(0.002),
        retry=tenacity.retry_if_result(lambda row: row["status"] == "running"),
    )
    row: dict[str, Any] = retry(cloud.row, "actions", action["id"])
    return row


def new_key(cloud: Cloud, name: str = "operator", public_key: str = KEY) -> dict[str, Any]:
    key: dict[str, Any] = cloud.create("ssh_keys", {"name": name, "public_key": public_key})["ssh_key"]
    return key


def new_firewall(cloud: Cloud, name: str, *rules: dict[str, Any], **more: Any) -> int:
    firewall_id: int = cloud.create("firewalls", {"name": name, "rules": list(rules), **more})["firewall"]["id"]
    return firewall_id


def new_server(cloud: Cloud, name: str = "alpha", *, firewalls: tuple[int, ...] = (), **more: Any) -> dict[str, Any]:
    """A server whose machine is made; the whole answer."""
    body = {"name": name, "server_type": "cx23", "image": "debian-13", "location": "nbg1", **more}
    made = cloud.create("servers", body | {"firewalls": [{"firewall": one} for one in firewalls]})
    finished(cloud, made["action"])
    return made


def last_rules(backend: StubBackend) -> object:
    return [call for call in backend.calls if call[0] in ("set_rules", "create")][-1][-1]


def refused(call: Any, *arguments: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*arguments)
    return caught.value


class TestInput:
    @pytest.mark.parametrize(
        "change",
        [
            {"source_ips": ["10.0.0.1/8"]},
            {"source_ips": ["10.0.0.1"]},
            {"source_ips": ["2001:db8::1/64"]},
            {"source_ips": []},
            {"port": None},
            {"port": "0"},
            {"port": "90-80"},
            {"port": "70000"},
            {"protocol": "icmp"},
            {"protocol": "sctp"},
            {"direction": "both"},
            {"destination_ips": ["10.0.0.0/8"]},
        ],
    )
    def test_bad_rules_are_refused(self, cloud: Cloud, change: dict[str, Any]) -> None:
        error = refused(new_firewall, cloud, "edge", SSH_RULE | change)
        assert (error.status, error.code) == (422, "invalid_input")
        assert cloud.rows("firewalls") == []

    def test_networks_come_back_canonical_and_a_rule_has_all_six_keys(self, cloud: Cloud) -> None:
        firewall_id = new_firewall(cloud, "edge", SSH_RULE)
        assert cloud.row("firewalls", firewall_id)["rules"] == [
            {
                "direction": "in",
                "protocol": "tcp",
                "port": "22",
                "source_ips": ["10.0.0.0/8", "2001:db8::/32"],
                "destination_ips": [],
                "description": None,
            }
        ]

    def test_user_data_above_32_kib_is_refused(self, cloud: Cloud) -> None:
        assert new_server(cloud, user_data="x" * 32768)["server"]["id"] == 1001
        error = refused(lambda: new_server(cloud, "beta", user_data="x" * 32769))
        assert error.details is not None
        assert error.details["fields"][0]["name"] == "user_data"

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            ({"name": "no_host_name"}, "invalid_input"),
            ({"image": "debian-99"}, "invalid_input"),
            ({"image": 114690389}, "invalid_input"),  # the arm one, for an x86 type
            ({"server_type": "cx1"}, "invalid_input"),
            ({"datacenter": "fsn1-dc14"}, "invalid_input"),
            ({"labels": {"-": ""}}, "invalid_input"),
            ({"ssh_keys": [7]}, "not_found"),
            ({"firewalls": [{"firewall": 7}]}, "not_found"),
            ({"networks": [1]}, "not_found"),
        ],
    )
    def test_bad_servers_are_refused_and_nothing_is_made(self, cloud: Cloud, change: dict[str, Any], code: str) -> None:
        body = {"name": "alpha", "server_type": "cx23", "image": "debian-13"}
        before = cloud.mutations()
        assert refused(cloud.create, "servers", body | change).code == code
        assert (cloud.servers(), cloud.mutations()) == ((), before)

    def test_location_type_and_image_by_numeric_string(self, cloud: Cloud) -> None:
        server = new_server(cloud, server_type="45", image="debian-13", location="3")["server"]
        assert (server["server_type"]["name"], server["location"]["name"]) == ("cax11", "hel1")
        assert server["image"]["architecture"] == "arm"
        assert "datacenter" not in server


class TestUniqueness:
    def test_names(self, cloud: Cloud) -> None:
        new_server(cloud)
        new_firewall(cloud, "edge")
        for call in (lambda: new_server(cloud), lambda: new_firewall(cloud, "edge")):
            error = refused(call)
            assert (error.status, error.code, error.message) == (409, "uniqueness_error", "name is already used")

    def test_a_key_is_unique_by_name_and_by_fingerprint(self, cloud: Cloud) -> None:
        key = new_key(cloud)
        assert key["public_key"] == KEY
        assert key["fingerprint"] == "01:71:58:37:51:a5:75:1e:5d:c9:93:70:5e:16:03:6e"  # ssh-keygen -E md5 -l
        by_name = refused(new_key, cloud, "operator", OTHER_KEY)
        by_fingerprint = refused(new_key, cloud, "other", KEY.replace("canary@lab", "another comment"))
        assert [error.code for error in (by_name, by_fingerprint)] == ["uniqueness_error"] * 2
        assert [error.details for error in (by_name, by_fingerprint)] == [
            {"fields": [{"name": "name"}]},
            {"fields": [{"name": "fingerprint"}]},
        ]

    def test_a_rename_to_a_taken_name_is_refused_and_to_the_own_name_is_not(self, cloud: Cloud) -> None:
        new_server(cloud)
        beta = new_server(cloud, "beta")["server"]["id"]
        assert refused(cloud.update, "servers", beta, {"name": "alpha"}).code == "uniqueness_error"
        assert cloud.update("servers", beta, {"name": "beta"})["server"]["name"] == "beta"

    def test_of_parallel_requests_for_one_name_one_wins(self, cloud: Cloud) -> None:
        def create(_: int) -> str:
            try:
                return str(
                    cloud.create("servers", {"name": "alpha", "server_type": "cx23", "image": "debian-13"}).keys()
                )
            except ApiError as error:
                return error.code

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(create, range(24)))
        assert results.count("uniqueness_error") == 23
        assert len(cloud.servers()) == 1


class TestFirewalls:
    def test_no_firewall_is_none_and_one_without_rules_is_empty(self, cloud: Cloud, backend: StubBackend) -> None:
        new_server(cloud, "open")
        assert last_rules(backend) is None
        new_server(cloud, "shut", firewalls=(new_firewall(cloud, "edge"),))
        assert last_rules(backend) == ()

    def test_rules_and_keys_are_with_the_machine_at_its_creation(self, cloud: Cloud, backend: StubBackend) -> None:
        key = new_key(cloud)
        edge = new_firewall(cloud, "edge", SSH_RULE)
        answer = new_server(cloud, firewalls=(edge,), ssh_keys=[key["id"]], user_data="#cloud-config")
        spec = MachineSpec(1001, "alpha", "127.0.1.1", "::/64", "debian-13", (KEY.strip(),), "#cloud-config")
        rule = Rule("in", "tcp", "22", ("10.0.0.0/8", "2001:db8::/32"), None)
        assert backend.calls == (("create", spec, (rule,)),)
        assert answer["root_password"] is None
        assert cloud.row("servers", 1001)["public_net"]["firewalls"] == [{"id": edge, "status": "applied"}]

    def test_the_effective_rules_are_the_union(self, cloud: Cloud, backend: StubBackend) -> None:
        icmp = {"direction": "in", "protocol": "icmp", "source_ips": ["0.0.0.0/0"]}
        out = {"direction": "out", "protocol": "udp", "port": "any", "destination_ips": ["::/0"]}
        first = new_firewall(cloud, "first", SSH_RULE, icmp)
        second = new_firewall(cloud, "second", SSH_RULE, out)
        new_server(cloud, firewalls=(first,))
        to_alpha = {"apply_to": [{"type": "server", "server": {"id": 1001}}]}
        [action] = cloud.act("firewalls", second, "apply_to_resources", to_alpha)["actions"]
        finished(cloud, action)
        ssh = Rule("in", "tcp", "22", ("10.0.0.0/8", "2001:db8::/32"), None)
        assert last_rules(backend) == (
            ssh,
            Rule("in", "icmp", None, ("0.0.0.0/0",), None),
            Rule("out", "udp", "1-65535", ("::/0",), None),
        )
        finished(cloud, cloud.act("firewalls", second, "set_rules", {"rules": None})["actions"][1])
        assert last_rules(backend) == (ssh, Rule("in", "icmp", None, ("0.0.0.0/0",), None))

    def test_detaching_the_last_one_opens_everything(self, cloud: Cloud, backend: StubBackend) -> None:
        edge = new_firewall(cloud, "edge")
        new_server(cloud, firewalls=(edge,))
        body = {"remove_from": [{"type": "server", "server": {"id": 1001}}]}
        [action] = cloud.act("firewalls", edge, "remove_from_resources", body)["actions"]
        assert action["command"] == "remove_firewall"
        finished(cloud, action)
        assert last_rules(backend) is None
        assert (
            refused(cloud.act, "firewalls", edge, "remove_from_resources", body).code == "firewall_resource_not_found"
        )
        assert cloud.act("firewalls", edge, "remove_from_resources", {"remove_from": []}) == {"actions": []}

    def test_a_used_firewall_cannot_be_deleted(self, cloud: Cloud) -> None:
        edge = new_firewall(cloud, "edge")
        new_server(cloud, firewalls=(edge,))
        error = refused(cloud.delete, "firewalls", edge)
        assert (error.status, error.code, error.message) == (
            422,
            "resource_in_use",
            f"firewall with ID {edge} is still in use",
        )
        deletion = cloud.delete("servers", 1001)
        assert deletion is not None
        finished(cloud, deletion["action"])
        assert cloud.delete("firewalls", edge) is None

    def test_pending_until_in_force(self) -> None:
        backend = GatedBackend(held="set_rules")
        cloud = make_cloud(backend)
        edge = new_firewall(cloud, "edge")
        new_server(cloud, firewalls=(edge,))
        [_, action] = cloud.act("firewalls", edge, "set_rules", {"rules": [SSH_RULE]})["actions"]
        assert action["status"] == "running"
        assert cloud.row("servers", 1001)["public_net"]["firewalls"] == [{"id": edge, "status": "pending"}]
        backend.gate.set()
        finished(cloud, action)
        assert cloud.row("servers", 1001)["public_net"]["firewalls"] == [{"id": edge, "status": "applied"}]
        cloud.close()

    def test_rules_that_could_not_be_set_stay_pending(self) -> None:
        cloud = make_cloud(GatedBackend(failures={"set_rules": BackendError("nft_failed", "no such chain")}))
        edge = new_firewall(cloud, "edge")
        new_server(cloud, firewalls=(edge,))
        [_, action] = cloud.act("firewalls", edge, "set_rules", {"rules": [SSH_RULE]})["actions"]
        assert finished(cloud, action)["error"] == {"code": "nft_failed", "message": "no such chain"}
        assert cloud.row("servers", 1001)["public_net"]["firewalls"] == [{"id": edge, "status": "pending"}]
        cloud.close()

    def test_a_label_selector_comes_into_force_after_the_boot_and_follows_labels(
        self, cloud: Cloud, backend: StubBackend
    ) -> None:
        to_prod = [{"type": "label_selector", "label_selector": {"selector": "env=prod"}}]
        edge = new_firewall(cloud, "edge", SSH_RULE, apply_to=to_prod)
        new_server(cloud, labels={"env": "prod"})
        cloud.update("servers", 1001, {"labels": {"env": "lab"}})
        cloud.update("servers", 1001, {"labels": {"env": "lab", "more": ""}})
        assert cloud.row("firewalls", edge)["applied_to"][0]["applied_to_resources"] == []
        finished(cloud, cloud.rows("actions")[-1])
        rule = Rule("in", "tcp", "22", ("10.0.0.0/8", "2001:db8::/32"), None)
        assert [call[-1] for call in backend.calls if call[0] == "create"] == [None]
        assert [call[0] for call in backend.calls] == ["create", "set_rules", "set_rules"]
        # The worker hands over what is wanted when its turn comes, which may already be the second state.
        assert backend.calls[1][-1] in ((rule,), None)
        assert backend.calls[2][-1] is None


class TestActions:
    def test_a_server_is_locked_while_its_action_runs(self) -> None:
        backend = GatedBackend(held="create")
        cloud = make_cloud(backend)
        made = cloud.create("servers", {"name": "alpha", "server_type": "cx23", "image": "debian-13"})
        assert (made["action"]["command"], made["action"]["status"]) == ("create_server", "running")
        assert [action["command"] for action in made["next_actions"]] == ["start_server"]
        assert (made["server"]["status"], made["server"]["locked"]) == ("initializing", True)
        for call in (lambda: cloud.act("servers", 1001, "poweroff", {}), lambda: cloud.delete("servers", 1001)):
            error = refused(call)
            assert (error.status, error.code) == (423, "locked")
        backend.gate.set()
        assert finished(cloud, made["next_actions"][0])["progress"] == 100
        assert (cloud.servers()[0].status, cloud.row("servers", 1001)["locked"]) == ("running", False)
        cloud.close()

    @pytest.mark.parametrize(
        ("failure", "code"),
        [(BackendError("no_space", "the disk is full"), "no_space"), (ZeroDivisionError("canary"), "server_error")],
    )
    def test_a_failing_machine_ends_the_action_and_can_be_deleted(self, failure: Exception, code: str) -> None:
        cloud = make_cloud(GatedBackend(failures={"create": failure}))
        made = new_server(cloud)
        action = cloud.row("actions", made["action"]["id"])
        assert (action["status"], action["error"]["code"]) == ("error", code)
        assert "canary" not in action["error"]["message"]
        assert (cloud.servers()[0].status, cloud.row("servers", 1001)["locked"]) == ("unknown", False)
        deletion = cloud.delete("servers", 1001)
        assert deletion is not None
        assert finished(cloud, deletion["action"])["status"] == "success"
        assert cloud.servers() == ()
        cloud.close()

    def test_power_and_rebuild(self, cloud: Cloud, backend: StubBackend) -> None:
        new_server(cloud, user_data="first")
        seen = []
        for command, body in (
            ("poweroff", {}),
            ("poweroff", {}),  # nothing to do
            ("poweron", {}),
            ("reboot", {}),
            ("reset", {}),
            ("shutdown", {}),
            ("rebuild", {"image": "debian-12"}),
        ):
            action = cloud.act("servers", 1001, command, body)["action"]
            assert finished(cloud, action)["status"] == "success"
            seen.append(cloud.servers()[0].status)
        assert seen == ["off", "off", "running", "running", "running", "off", "running"]
        assert [call[0] for call in backend.calls[1:]] == [
            "power_off",
            "power_on",
            "reboot",
            "reboot",
            "power_off",
            "rebuild",
        ]
        assert [call[2] for call in backend.calls if call[0] in ("power_off", "reboot")] == [False, False, True, True]
        spec = backend.calls[-1][1]
        assert isinstance(spec, MachineSpec)
        assert (spec.image, spec.user_data) == ("debian-12", "first")
        assert cloud.row("servers", 1001)["image"]["name"] == "debian-12"

    def test_protection(self, cloud: Cloud) -> None:
        new_server(cloud)
        assert refused(cloud.act, "servers", 1001, "change_protection", {"delete": True}).code == "invalid_input"
        cloud.act("servers", 1001, "change_protection", {"delete": True, "rebuild": True})
        for call in (
            lambda: cloud.delete("servers", 1001),
            lambda: cloud.act("servers", 1001, "rebuild", {"image": "debian-12"}),
        ):
            error = refused(call)
            assert (error.status, error.code) == (423, "protected")
        cloud.act("servers", 1001, "change_protection", {"delete": False, "rebuild": False})
        assert cloud.delete("servers", 1001) is not None

    def test_addresses_are_free_again_after_deletion(self, cloud: Cloud) -> None:
        new_server(cloud, "alpha")
        new_server(cloud, "beta")
        assert [row["ip"] for row in cloud.rows("primary_ips")] == ["127.0.1.1", "::/64", "127.0.1.2", "::/64"]
        deletion = cloud.delete("servers", 1001)
        assert deletion is not None
        finished(cloud, deletion["action"])
        assert new_server(cloud, "gamma")["server"]["public_net"]["ipv4"]["ip"] == "127.0.1.1"
        assert refused(cloud.row, "servers", 1001).code == "not_found"


class TestRestart:
    def test_everything_is_as_before(self, tmp_path: Path) -> None:
        file = tmp_path / "state.json"
        cloud = make_cloud(state_file=file)
        key = new_key(cloud)
        edge = new_firewall(cloud, "edge", SSH_RULE)
        new_server(cloud, firewalls=(edge,), ssh_keys=[key["name"]], labels={"env": "prod"}, user_data="canary")
        cloud.close()
        kinds = ("servers", "firewalls", "ssh_keys", "actions", "primary_ips")
        before = {kind: cloud.rows(kind) for kind in kinds}
        backend = StubBackend()
        again = make_cloud(backend, state_file=file)
        assert {kind: again.rows(kind) for kind in kinds} == before
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert backend.calls == ()
        assert new_server(again, "beta")["server"]["id"] == 1002
        finished(again, again.act("servers", 1001, "rebuild", {"image": "debian-12"})["action"])
        [rebuilt] = [call[1] for call in backend.calls if call[0] == "rebuild"]
        assert isinstance(rebuilt, MachineSpec)
        assert (rebuilt.user_data, rebuilt.authorized_keys) == ("canary", (KEY.strip(),))
        again.close()

    def test_a_cut_off_action_is_an_error_and_its_server_unknown_but_not_locked(self, tmp_path: Path) -> None:
        file = tmp_path / "state.json"
        backend = GatedBackend(held="create")
        cloud = make_cloud(backend, state_file=file)
        cut_off = cloud.create("servers", {"name": "alpha", "server_type": "cx23", "image": "debian-13"})["action"]
        again = make_cloud(state_file=file)
        assert again.row("actions", cut_off["id"])["error"]["code"] == "interrupted"
        assert (again.servers()[0].status, again.row("servers", 1001)["locked"]) == ("unknown", False)
        backend.gate.set()
        cloud.close()
        again.close()

    def test_rules_that_were_not_in_force_are_set_again(self, tmp_path: Path) -> None:
        file = tmp_path / "state.json"
        backend = GatedBackend(held="set_rules")
        cloud = make_cloud(backend, state_file=file)
        edge = new_firewall(cloud, "edge", SSH_RULE)
        new_server(cloud, firewalls=(edge,))
        [_, cut_off] = cloud.act("firewalls", edge, "set_rules", {"rules": []})["actions"]
        second = StubBackend()
        again = make_cloud(second, state_file=file)
        assert finished(again, cut_off)["status"] == "success"
        assert second.calls == (("set_rules", 1001, ()),)
        backend.gate.set()
        cloud.close()
        again.close()

    def test_a_file_that_is_no_state_is_an_error_that_names_it(self, tmp_path: Path) -> None:
        file = tmp_path / "state.json"
        file.touch(0o600)
        file.write_text('{"version": 99}')
        with pytest.raises(LabError, match=r"state\.json"):
            make_cloud(state_file=file)
