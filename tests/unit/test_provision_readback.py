from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from clawdlets_ops.hetzner import FirewallRule, PrimaryIp, Volume
from clawdlets_ops.provision.observed import Observed
from clawdlets_ops.provision.readback import differences
from clawdlets_ops.provision.render import edge_rules, hold, labels_of, render
from tests.gate_table import FIREWALL, KEY, KEY_LINE, OURS, declared, server

WIDE = FirewallRule("in", "tcp", "22", ("0.0.0.0/0",))
VOLUME = Volume(6, "alpha-data", OURS, 10, 44)
ADDRESS = PrimaryIp(5, "alpha-ipv4", OURS, "ipv4", 44)


def told(hetzner: dict[str, Any] | None = None, **seen: Any) -> list[str]:
    found = {"server": server(), "firewall": FIREWALL, **seen}
    return differences("alpha", declared(hetzner=hetzner or {}), window_open=False, **found)


def test_what_is_as_asked_for_is_no_difference() -> None:
    assert told() == []
    with_volume = server(volumes=frozenset({6}))
    assert told({"volumes": {"data": {}}}, server=with_volume, volumes=(VOLUME,)) == []


@pytest.mark.parametrize(
    ("hetzner", "seen", "said"),
    [
        ({}, {"server": None}, "not there"),
        ({}, {"firewall": None}, "not there"),
        ({}, {"firewall": dataclasses.replace(FIREWALL, rules=(*FIREWALL.rules, WIDE))}, "wanted [in udp/41641"),
        ({}, {"firewall": dataclasses.replace(FIREWALL, rules=())}, "the firewall has []"),
        ({}, {"server": server(firewalls={38: "pending"})}, "the firewall is pending"),
        ({}, {"server": server(firewalls={})}, "not attached"),
        ({}, {"server": server(firewalls={38: "applied", 39: "applied"})}, "other firewalls are attached: 39"),
        ({}, {"server": server(status="off")}, "the server is off"),
        ({}, {"server": server(labels={})}, "labels"),
        ({}, {"server": server(protected=False)}, "not protected"),
        ({}, {"server": server(location="fsn1")}, "in fsn1, wanted nbg1"),
        ({}, {"server": server(server_type="cx33")}, "is a cx33, wanted cx23"),
        ({"ipv6": False}, {}, "has an ipv6 address"),
        ({}, {"server": server(ipv4=None)}, "has no ipv4 address"),
        ({"reservedIps": True}, {"primary_ips": (ADDRESS,)}, "the reserved ipv6 address is not the server's"),
        (
            {"reservedIps": True, "ipv6": False},
            {"server": server(ipv6=None), "primary_ips": (dataclasses.replace(ADDRESS, auto_delete=True),)},
            "would go with the server",
        ),
        ({"volumes": {"data": {}}}, {}, "alpha-data is not attached"),
        (
            {"volumes": {"data": {"sizeGb": 20}}},
            {"server": server(volumes=frozenset({6})), "volumes": (VOLUME,)},
            "has 10 GB, wanted 20",
        ),
        ({"placementGroup": "apart"}, {}, "placement group"),
    ],
)
def test_every_difference_is_said(hetzner: dict[str, Any], seen: dict[str, Any], said: str) -> None:
    faults = told(hetzner, **seen)
    assert len(faults) == 1
    assert said in faults[0]


def rendered(**host: Any) -> dict[str, Any]:
    made = declared(**host)
    return render(
        "alpha",
        made,
        edge_rules(made, window_open=True),
        public_key=KEY_LINE,
        endpoint="http://h/v1",
        server_type="cx23",
        own_key=True,
        own_group=True,
    )


def test_every_field_of_the_model_is_rendered() -> None:
    everything = {
        "ipv4": False,
        "reservedIps": True,
        "placementGroup": "apart",
        "volumes": {"data": {"sizeGb": 20, "format": "xfs"}, "0cold": {}},
        "labels": {"team": "bots"},
        "deleteProtection": False,
    }
    resources = rendered(hetzner=everything)["resource"]
    host = resources["hcloud_server"]["host"]
    assert host["public_net"] == {
        "ipv4_enabled": False,
        "ipv6_enabled": True,
        "ipv6": "${hcloud_primary_ip.ipv6.id}",
    }
    assert host["placement_group_id"] == "${hcloud_placement_group.apart.id}"
    assert (host["delete_protection"], host["rebuild_protection"]) == (False, False)
    assert set(resources["hcloud_primary_ip"]) == {"ipv6"}
    assert resources["hcloud_primary_ip"]["ipv6"]["auto_delete"] is False
    assert resources["hcloud_volume"]["data"]["size"] == 20
    assert resources["hcloud_volume"]["_0cold"]["name"] == "alpha-0cold"
    for kind in resources.values():
        for one in kind.values():
            assert one["labels"] == {"team": "bots", **OURS}


@pytest.mark.parametrize("loses", [False, True])
def test_opentofu_itself_forbids_the_end_of_what_is_precious_unless_it_was_named(*, loses: bool) -> None:
    made = declared(hetzner={"reservedIps": True, "volumes": {"data": {}}})
    config = render(
        "alpha", made, edge_rules(made, window_open=True), public_key=KEY_LINE, endpoint="http://h/v1",
        server_type="cx23", own_key=True, own_group=True, may_replace=loses,
    )  # fmt: skip
    for kind in ("hcloud_server", "hcloud_primary_ip", "hcloud_volume"):
        for one in config["resource"][kind].values():
            assert one["lifecycle"]["prevent_destroy"] is not loses


def test_no_rule_set_is_empty_and_every_network_has_its_mask() -> None:
    provisioning = {"adminCidrs": ["203.0.113.7", "2001:DB8::1"]}
    rules = rendered(provisioning=provisioning)["resource"]["hcloud_firewall"]["edge"]["rule"]
    assert {network for rule in rules for network in rule["source_ips"]} == {
        "203.0.113.7/32",
        "2001:db8::1/128",
        "0.0.0.0/0",
        "::/0",
    }
    closed = declared(tailnet={"allowUdpIngress": False})
    assert edge_rules(closed, window_open=False)


def test_holding_still_says_nothing_but_the_protection() -> None:
    observed = Observed(server(), FIREWALL, KEY, (VOLUME,), (ADDRESS,), host="alpha")
    for kind in hold(observed, endpoint="http://h/v1")["resource"].values():
        for one in kind.values():
            said = set(one) - {"lifecycle", "depends_on", "delete_protection", "rebuild_protection"}
            assert said <= set(one["lifecycle"]["ignore_changes"])
            assert one.get("delete_protection", False) is False
    assert labels_of("alpha", declared(hetzner={"labels": {"team": "bots"}})) == {"team": "bots", **OURS}
