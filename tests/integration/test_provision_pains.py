"""Known pains of Hetzner Cloud and its provider, one by one, with the real OpenTofu and provider on the emulator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcloud
import pytest
from hcloud.firewalls import FirewallResource
from hcloud.images import Image
from hcloud.server_types import ServerType

from clawdlets_ops import provision
from clawdlets_ops.errors import CloudError, CommandError, PlanRefused, SettingsError
from clawdlets_ops.hetzner import HetznerCloud
from tests.integration.provisioning import TOKEN, Site, site_in

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_in(tmp_path) as made:
        yield made


@pytest.fixture
def client(site: Site) -> Iterator[hcloud.Client]:
    """Somebody else with the same account."""
    made = hcloud.Client(TOKEN, api_endpoint=site.emulator.endpoint, poll_interval=0.02, timeout=10)
    yield made
    made._client._session.close()


def only(rows: list[dict[str, Any]]) -> dict[str, Any]:
    [row] = rows
    return row


def rules(site: Site, host: str = "alpha") -> list[tuple[str, str, tuple[str, ...]]]:
    found = next(row for row in site.rows("firewalls") if row["name"] == f"{host}-edge")
    return sorted((rule["protocol"], rule["port"], tuple(sorted(rule["source_ips"]))) for rule in found["rules"])


def test_a_key_that_the_project_has_is_used_and_never_made_twice(site: Site, client: hcloud.Client) -> None:
    line = (site.root / "key.pub").read_text()
    client.ssh_keys.create(name="laptop", public_key=line.replace("canary", "another comment"))
    site.provision()
    assert only(site.rows("ssh_keys"))["name"] == "laptop"
    created = only([entry for entry in site.requests() if (entry["method"], entry["path"]) == ("POST", "/v1/servers")])
    assert created["body"]["ssh_keys"] == [only(site.rows("ssh_keys"))["id"]]
    # The firewall is there before the first boot, and nothing is handed over by user_data.
    assert created["body"]["firewalls"] == [{"firewall": only(site.rows("firewalls"))["id"]}]
    assert "user_data" not in created["body"]
    assert not [entry for entry in site.requests() if "/datacenters" in entry["path"]]


def test_rules_are_what_was_asked_for_whatever_the_provider_says(site: Site, client: hcloud.Client) -> None:
    document = json.loads(site.layout.fleet_file.read_text())
    document["hosts"]["alpha"]["tailnet"] = {"allowUdpIngress": False}
    document["hosts"]["alpha"]["provisioning"]["adminCidrs"] = ["203.0.113.7", "2001:DB8::/48"]
    site.layout.fleet_file.write_text(json.dumps(document))
    site.provision()
    window = [("tcp", "22", ("2001:db8::/48", "203.0.113.7/32"))]
    assert rules(site) == window
    # 931: a change of labels wipes the rules of a set with an address that has no mask.
    document["hosts"]["alpha"]["hetzner"] = {"labels": {"team": "bots"}}
    site.layout.fleet_file.write_text(json.dumps(document))
    site.provision()
    assert rules(site) == window
    # 1482: the last rule cannot be removed; the set is never empty.
    site.provision(window_open=False)
    assert rules(site) == [("tcp", "1", ("192.0.2.1/32",))]
    # 998: another firewall, which adds to what is let in, is detached although no configuration mentions it.
    wide = client.firewalls.create("wide").firewall
    server = client.servers.get_by_name("alpha")
    for action in client.firewalls.apply_to_resources(wide, [FirewallResource(type="server", server=server)]):
        action.wait_until_finished()
    assert site.plan().steps == (f"detach the firewall with id {wide.id} from alpha",)
    site.provision()
    assert [entry["id"] for entry in only(site.rows("servers"))["public_net"]["firewalls"]] != []
    assert wide.id not in [entry["id"] for entry in only(site.rows("servers"))["public_net"]["firewalls"]]
    assert site.plan().empty


def test_a_drift_of_image_or_key_replaces_nothing_and_one_of_location_is_refused(
    site: Site, client: hcloud.Client
) -> None:
    made = site.provision()
    server = client.servers.get_by_name("alpha")
    server.change_protection(delete=False, rebuild=False).wait_until_finished()
    server.rebuild(image=client.images.get_by_name_and_architecture("debian-13", "x86")).action.wait_until_finished()
    (site.root / "key.pub").write_text((site.root / "key.pub").read_text().replace("canary", "renamed"))
    site.declare(image="ubuntu-24.04")
    assert site.provision(refresh=True).id == made.id
    assert site.rows("servers")[0]["protection"] == {"delete": True, "rebuild": True}
    for changed in ({"location": "fsn1"}, {"serverType": "cx33"}):
        site.declare(**changed)
        before = len(site.changed())
        with pytest.raises(PlanRefused, match="stop or replace"):
            site.provision()
        assert len(site.changed()) == before
    site.declare(location="fsn1")
    replaced = site.provision(allow_replace="alpha")
    assert (replaced.id != made.id, replaced.location, replaced.protected) == (True, "fsn1", True)
    assert len(site.rows("servers")) == 1


def test_addresses_and_volumes_stay_when_the_server_is_replaced(site: Site) -> None:
    kept: dict[str, Any] = {"reservedIps": True, "volumes": {"data": {"sizeGb": 10}}, "placementGroup": "apart"}
    site.declare(serverType="cx99", serverTypeFallbacks=["cax11", "cx33"], **kept)
    first = site.provision()
    assert first.server_type == "cx33"
    site.declare(serverType="cx23", **{**kept, "volumes": {"data": {"sizeGb": 20}}})
    with pytest.raises(PlanRefused, match="is declared cx23, the server has cx33"):
        site.provision()
    second = site.provision(allow_replace="alpha")
    assert second.id != first.id
    assert (second.ipv4, second.primary_ips, second.volumes) == (first.ipv4, first.primary_ips, first.volumes)
    volume = only(site.rows("volumes"))
    assert (volume["size"], volume["server"], volume["protection"]["delete"]) == (20, second.id, True)
    assert site.plan().empty
    site.declare(serverType="cx23", **{**kept, "volumes": {}})
    with pytest.raises(PlanRefused, match="alpha-data"):
        site.provision()
    assert only(site.rows("volumes"))["server"] == second.id


def test_a_host_with_ipv6_alone(site: Site) -> None:
    site.declare(ipv4=False)
    made = site.provision()
    assert (made.ipv4, set(made.primary_ips)) == (None, {"ipv6"})
    assert site.plan().empty


@pytest.mark.parametrize(
    ("fault", "said", "servers"),
    [
        ("answer locked POST /servers/*/actions/change_protection times=1", "locked", 1),
        ("answer resource_unavailable POST /servers times=1", "no machine of this type in this location now", 0),
        ("lost-answer POST /servers times=1", "EOF", 1),
        ("cut POST /servers times=1", "EOF", 0),
        ("answer conflict POST /servers times=9", "conflict", 0),
        ("lost-answer POST /servers/*/actions/change_protection times=1", "EOF", 1),
    ],
)
def test_a_creation_that_goes_wrong_is_finished_by_the_next_run(
    site: Site, fault: str, said: str, servers: int
) -> None:
    site.fault(fault)
    with pytest.raises(CommandError, match=said):
        site.provision()
    assert len(site.rows("servers")) == servers
    site.book.clear(None)
    site.provision()
    row = only(site.rows("servers"))
    assert row["protection"] == {"delete": True, "rebuild": True}
    assert len([line for line in site.changed() if line == "POST /v1/servers"]) == 1
    assert not [line for line in site.changed() if line.startswith("DELETE")]
    assert site.plan().empty


def test_a_limit_of_the_project_is_told_and_nothing_is_left_half_made(site: Site) -> None:
    """No API tells a project's limits, so the order finds it; here that for firewalls (50)."""
    others = [site.cloud.create("firewalls", {"name": f"other-{number}"})["firewall"]["id"] for number in range(50)]
    with pytest.raises(CommandError, match="the project's limit is reached") as caught:
        site.provision()
    assert "ask for a higher limit in the console" in str(caught.value)
    assert site.rows("servers") == []  # the edge comes first: no server without one
    site.cloud.delete("firewalls", others[0])
    assert site.provision().status == "running"
    assert len(site.rows("firewalls")) == 50


def test_an_api_that_answers_429_for_a_minute(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("hcloud._client.time.sleep", slept.append)
    api = HetznerCloud(site.project().token, site.emulator.endpoint, sleep=slept.append)
    site.fault("answer 429 * * times=12")
    assert api.server("alpha") is None
    assert sum(slept) > 60
    site.book.clear(None)
    site.fault("answer 429 * *")
    with pytest.raises(CloudError, match="request budget"):
        api.server("alpha")
    site.book.clear(None)
    # The provider has a patience of its own.
    site.fault("answer 429 POST /servers times=1")
    assert site.provision().status == "running"


def test_a_server_that_vanished_is_made_anew_and_one_of_that_name_is_not_taken(
    site: Site, client: hcloud.Client
) -> None:
    first = site.provision()
    server = client.servers.get_by_name("alpha")
    server.change_protection(delete=False, rebuild=False).wait_until_finished()
    server.delete().wait_until_finished()
    assert site.provision().id != first.id
    server = client.servers.get_by_name("alpha")
    server.change_protection(delete=False, rebuild=False).wait_until_finished()
    server.delete().wait_until_finished()
    other = client.servers.create("alpha", ServerType("cx23"), Image(name="debian-12")).server
    with pytest.raises(CloudError, match="did not make"):
        site.provision()
    assert only(site.rows("servers"))["id"] == other.id


def test_a_token_that_may_only_read_is_refused_before_anything_is_made(site: Site) -> None:
    for method in ("POST", "PUT", "DELETE"):
        site.fault(f"answer token_readonly {method} *")
    assert not site.plan().empty  # a look does not even ask
    assert {entry["method"] for entry in site.requests()} == {"GET"}
    with pytest.raises(SettingsError, match="may only read"):
        site.provision()
    assert site.changed() == []


def test_what_the_api_shows_is_compared_and_not_believed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that reports success and has changed nothing, as its issue 1482 describes: the apply is left out."""
    site.provision()
    monkeypatch.setattr("clawdlets_ops.tofu.Tofu.apply", lambda *_, **__: None)
    monkeypatch.setattr("clawdlets_ops.provision.readback.APPLIED_WITHIN_S", 0.1)
    with pytest.raises(CloudError, match="does not show what was asked for: the firewall has"):
        site.provision(window_open=False)


def test_a_run_in_which_nothing_changed_asks_twice_and_starts_no_program(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.declare(reservedIps=True, volumes={"data": {}}, placementGroup="apart")
    site.provision()
    before = len(site.requests())
    assert site.plan().empty
    assert [entry["path"] for entry in site.requests()[before:]] == ["/v1/servers", "/v1/firewalls"]
    monkeypatch.setitem(site.environ, "PATH", "/nonexistent")
    site.provision()
    monkeypatch.undo()
    # --refresh compares everything, and finds nothing.
    assert (
        provision.apply(site.project(refresh=True), "alpha", runner=site.runner(), cloud=site.api).status == "running"
    )
    assert not site.plan(refresh=True).empty
    assert not [entry for entry in site.requests()[before:] if entry["mutates"]]
