"""The real provider against the emulator, with every resource in scope: create, change and destroy, no diff in between."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.emulator_lab import KEY, Lab, Tofu

pytestmark = pytest.mark.contract

# What the provider offers for these and nothing of it can be changed in place.
UNCHANGEABLE = frozenset({"hcloud_network_subnet.near", "hcloud_network_route.away", "hcloud_volume_attachment.spare"})


def fleet(*, second: bool, protected: bool) -> dict[str, Any]:
    """One of each resource; ``second`` is the same with everything changed that can be changed in place."""
    labels = {"round": "2" if second else "1"}
    more = {"labels": labels}
    protection = {"delete_protection": protected}
    rule = {"direction": "in", "protocol": "tcp", "port": "443" if second else "80", "source_ips": ["10.0.0.0/8"]}

    def named(name: str) -> str:
        return f"{name}-{labels['round']}"

    server = {"image": "debian-13", "location": "fsn1", "ssh_keys": ["${hcloud_ssh_key.operator.id}"]}
    return {
        "hcloud_ssh_key": {"operator": {"name": named("operator"), "public_key": KEY, **more}},
        "hcloud_firewall": {
            "edge": {"name": named("edge"), "rule": [rule], **more},
            "late": {"name": named("late"), "rule": [rule], **more},
        },
        "hcloud_firewall_attachment": {
            "late": {
                "firewall_id": "${hcloud_firewall.late.id}",
                **({"label_selectors": ["role=inner"]} if second else {"server_ids": ["${hcloud_server.plain.id}"]}),
            }
        },
        "hcloud_network": {"home": {"name": named("home"), "ip_range": "10.0.0.0/16", **more, **protection}},
        "hcloud_network_subnet": {
            "near": {
                "network_id": "${hcloud_network.home.id}",
                "type": "cloud",
                "network_zone": "eu-central",
                "ip_range": "10.0.1.0/24",
            }
        },
        "hcloud_network_route": {
            "away": {
                "network_id": "${hcloud_network.home.id}",
                "destination": "10.100.1.0/24",
                "gateway": "10.0.1.1",
            }
        },
        "hcloud_placement_group": {"apart": {"name": named("apart"), "type": "spread", **more}},
        "hcloud_primary_ip": {
            family: {
                "name": named(family),
                "type": family,
                "location": "fsn1",
                "auto_delete": False,
                **more,
                **protection,
            }
            for family in ("ipv4", "ipv6")
        },
        "hcloud_server": {
            "outer": {
                **server,
                "name": named("outer"),
                "server_type": "cx33" if second else "cx23",
                "keep_disk": True,
                "labels": labels,
                "firewall_ids": ["${hcloud_firewall.edge.id}"],
                "placement_group_id": "${hcloud_placement_group.apart.id}",
                "backups": second,
                "delete_protection": protected,
                "rebuild_protection": protected,
                "public_net": {"ipv4": "${hcloud_primary_ip.ipv4.id}", "ipv6": "${hcloud_primary_ip.ipv6.id}"},
            },
            "inner": {
                **server,
                "name": named("inner"),
                "server_type": "cx23",
                "labels": labels,
                "public_net": {"ipv4_enabled": False, "ipv6_enabled": False},
                "network": {
                    "network_id": "${hcloud_network.home.id}",
                    "ip": "10.0.1.5",
                    "alias_ips": ["10.0.1.6"] if second else ["10.0.1.6", "10.0.1.7"],
                },
                "depends_on": ["hcloud_network_subnet.near"],
            },
            "plain": {**server, "name": named("plain"), "server_type": "cx23", "labels": {"role": "inner"}},
        },
        "hcloud_server_network": {
            "outer": {
                "server_id": "${hcloud_server.outer.id}",
                "subnet_id": "${hcloud_network_subnet.near.id}",
                "alias_ips": ["10.0.1.9"] if second else [],
            }
        },
        "hcloud_volume": {
            "data": {
                "name": named("data"),
                "size": 20 if second else 10,
                "server_id": "${hcloud_server.outer.id}",
                "format": "ext4",
                **more,
                **protection,
            },
            "spare": {"name": named("spare"), "size": 10, "location": "fsn1", **more},
        },
        "hcloud_volume_attachment": {
            "spare": {"volume_id": "${hcloud_volume.spare.id}", "server_id": "${hcloud_server.plain.id}"}
        },
        "hcloud_rdns": {
            "server": {
                "server_id": "${hcloud_server.plain.id}",
                "ip_address": "${hcloud_server.plain.ipv4_address}",
                "dns_ptr": f"{named('plain')}.lab.invalid",
            },
            "address": {
                "primary_ip_id": "${hcloud_primary_ip.ipv4.id}",
                "ip_address": "${hcloud_primary_ip.ipv4.ip_address}",
                "dns_ptr": f"{named('outer')}.lab.invalid",
            },
        },
        "hcloud_snapshot": {
            "before": {"server_id": "${hcloud_server.plain.id}", "description": named("before"), **more}
        },
    }


DATA = {
    "hcloud_locations": {"all": {}},
    "hcloud_location": {"one": {"name": "fsn1"}},
    "hcloud_server_types": {"all": {}},
    "hcloud_server_type": {"one": {"name": "cx23"}},
    "hcloud_images": {"all": {"most_recent": True}},
    "hcloud_image": {
        "system": {"name": "debian-13"},
        "own": {"with_selector": "round", "most_recent": True, "depends_on": ["hcloud_snapshot.before"]},
    },
    "hcloud_ssh_keys": {"all": {}},
    "hcloud_network": {"home": {"id": "${hcloud_network.home.id}"}},
    "hcloud_volumes": {"all": {}},
    "hcloud_placement_groups": {"all": {}},
    "hcloud_primary_ips": {"all": {}},
    "hcloud_firewalls": {"all": {}},
    "hcloud_servers": {"all": {}},
}


def planned(tofu: Tofu) -> dict[str, list[str]]:
    """What a plan would do to each resource; data sources are left out."""
    return {name: actions for name, actions in tofu.planned().items() if not name.startswith("data.")}


def test_every_resource_in_scope_is_made_changed_and_destroyed(tofu: Tofu, lab: Lab) -> None:
    tofu.write(resource=fleet(second=False, protected=False))
    tofu("init", "-input=false", "-no-color")
    wanted = planned(tofu)
    assert {tuple(actions) for actions in wanted.values()} == {("create",)}
    tofu.apply()
    assert planned(tofu) == {name: ["no-op"] for name in wanted}

    tofu.write(resource=fleet(second=True, protected=True), data=DATA)
    changed = {name for name, actions in planned(tofu).items() if actions == ["update"]}
    assert set(wanted) - changed == UNCHANGEABLE
    tofu.apply()
    assert planned(tofu) == {name: ["no-op"] for name in wanted}
    assert not any(entry["method"] == "DELETE" for entry in lab.journal())

    tofu.write(resource=fleet(second=True, protected=False))
    tofu.apply()
    assert planned(tofu) == {name: ["no-op"] for name in wanted}
    tofu("destroy", "-auto-approve", "-input=false", "-no-color")
    for kind in ("servers", "firewalls", "ssh_keys", "networks", "volumes", "placement_groups", "primary_ips"):
        assert lab.cloud.rows(kind) == [], kind
    assert [image for image in lab.cloud.rows("images") if image["type"] != "system"] == []
