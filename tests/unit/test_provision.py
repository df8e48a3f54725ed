import dataclasses
import json
from typing import Any

import pytest

from clawdlets_ops.errors import CloudError, PlanRefused
from clawdlets_ops.fleet import Host, parse_fleet
from clawdlets_ops.hetzner import HOST_LABEL, MANAGED_BY, MANAGER, Firewall, FirewallRule, Server, SshKey
from clawdlets_ops.provision import FIREWALL, KEY, NEVER_MATCHES, SERVER, Observed, edge_rules, plan, window_is_open

KEY_LINE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s canary@example"
OURS = {MANAGED_BY: MANAGER, HOST_LABEL: "alpha"}
SSH_RULE = FirewallRule("in", "tcp", "22", ("203.0.113.0/24",))
UDP_RULE = FirewallRule("in", "udp", "41641", ("0.0.0.0/0", "::/0"))


def declared(**host: Any) -> Host:
    base = {"provisioning": {"adminCidrs": ["203.0.113.0/24"]}, "sshAuthorizedKeys": [KEY_LINE]}
    return parse_fleet(json.dumps({"schemaVersion": 1, "hosts": {"alpha": {**base, **host}}})).host("alpha")


def server(**changes: Any) -> Server:
    made = Server(
        44, "alpha", "running", OURS, "cx23", "nbg1", "198.51.100.7", "2001:db8::1", {38: "applied"}, protected=True
    )
    return dataclasses.replace(made, **changes)


def firewall(*rules: FirewallRule, **changes: Any) -> Firewall:
    return dataclasses.replace(Firewall(38, "alpha-edge", OURS, tuple(sorted(rules))), **changes)


def key(host: str = "alpha") -> SshKey:
    return SshKey(7, "k", {MANAGED_BY: MANAGER, HOST_LABEL: host}, "aa:bb")


def planned(host: Host, observed: Observed, **more: Any):
    return plan("alpha", host, observed, public_key=KEY_LINE, endpoint="http://127.0.0.1:1/v1", **more)


NOTHING = Observed(None, None, None)
DONE = Observed(server(), firewall(SSH_RULE, UDP_RULE), key())
LOCKED = Observed(server(), firewall(UDP_RULE), key())


def test_from_nothing_everything_is_made_with_the_firewall_at_creation() -> None:
    made = planned(declared(), NOTHING)
    assert [step.split()[0] for step in made.steps] == ["add", "create", "create"]
    host = made.config["resource"]["hcloud_server"]["host"]
    assert host["firewall_ids"] == ["${hcloud_firewall.edge.id}"]
    assert set(host["lifecycle"]["ignore_changes"]) == {"user_data", "image", "ssh_keys"}
    assert host["lifecycle"]["prevent_destroy"] is True
    assert "user_data" not in host
    assert made.adopt == {}


def test_what_is_as_declared_needs_nothing() -> None:
    assert planned(declared(), DONE).empty
    assert planned(declared(), LOCKED).empty


@pytest.mark.parametrize(
    ("mode", "observed", "is_open"),
    [
        ("tailnet", NOTHING, True),
        ("tailnet", DONE, True),
        ("tailnet", LOCKED, False),
        ("tailnet", Observed(server(), None, key()), True),
        ("bootstrap", LOCKED, True),
        ("public", LOCKED, True),
    ],
)
def test_the_public_window_opens_with_a_new_server_and_is_not_reopened_by_itself(
    mode: str, observed: Observed, *, is_open: bool
) -> None:
    assert window_is_open(declared(sshExposure={"mode": mode}), observed) is is_open


def test_lockdown_changes_the_rules_and_nothing_else() -> None:
    made = planned(declared(), DONE, window_open=False)
    assert made.steps == ("change the firewall alpha-edge: close in tcp/22 203.0.113.0/24",)


def test_a_rule_set_is_never_empty() -> None:
    assert edge_rules(declared(tailnet={"allowUdpIngress": False}), window_open=False) == (NEVER_MATCHES,)
    assert not NEVER_MATCHES.covers_tcp(22)


def test_udp_ingress_belongs_to_tailscale_and_can_be_declined() -> None:
    assert UDP_RULE in edge_rules(declared(), window_open=True)
    assert UDP_RULE not in edge_rules(declared(tailnet={"allowUdpIngress": False}), window_open=True)
    closed = declared(tailnet={"mode": "none"}, sshExposure={"mode": "public"})
    assert edge_rules(closed, window_open=True) == (SSH_RULE,)


@pytest.mark.parametrize(
    ("port", "covers"),
    [("22", True), ("1-65535", True), ("20-30", True), ("any", True), (None, True), ("23", False), ("2200", False)],
)
def test_a_port_range_that_holds_22_is_ssh(port: str | None, *, covers: bool) -> None:
    assert FirewallRule("in", "tcp", port, ("0.0.0.0/0",)).covers_tcp(22) is covers
    assert not FirewallRule("out", "tcp", port, ("0.0.0.0/0",)).covers_tcp(22)


@pytest.mark.parametrize(
    "observed",
    [
        Observed(server(labels={}), None, None),
        Observed(server(labels={MANAGED_BY: MANAGER, HOST_LABEL: "beta"}), None, None),
        Observed(None, firewall(UDP_RULE, labels={"managed-by": "somebody"}), None),
    ],
)
def test_a_thing_of_that_name_that_is_not_ours_is_refused(observed: Observed) -> None:
    with pytest.raises(CloudError, match="did not make"):
        planned(declared(), observed)


@pytest.mark.parametrize("changes", [{"server_type": "cx33"}, {"location": "fsn1"}])
def test_a_difference_that_would_replace_or_stop_the_server_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(PlanRefused, match="stop or replace"):
        planned(declared(), Observed(server(**changes), firewall(SSH_RULE, UDP_RULE), key()))


@pytest.mark.parametrize("status", ["off", "unknown", "stopping", "deleting"])
def test_a_server_that_is_not_up_is_not_taken_for_done_nor_touched(status: str) -> None:
    with pytest.raises(CloudError, match=f"id 44.*but is {status}"):
        planned(declared(), Observed(server(status=status), firewall(SSH_RULE, UDP_RULE), key()))


@pytest.mark.parametrize("status", ["initializing", "starting"])
def test_a_server_on_its_way_is_waited_for(status: str) -> None:
    made = planned(declared(), Observed(server(status=status), firewall(SSH_RULE, UDP_RULE), key()))
    assert made.steps == (f"wait for the server, which is {status}",)


def test_a_detached_firewall_is_attached_again() -> None:
    made = planned(declared(), Observed(server(firewalls={}), firewall(SSH_RULE, UDP_RULE), key()))
    assert made.steps == ("attach the firewall alpha-edge to alpha",)


def test_a_key_of_another_host_is_looked_up_not_made_twice() -> None:
    made = planned(declared(), Observed(None, None, key("beta")))
    assert "hcloud_ssh_key" not in made.config["resource"]
    assert made.config["resource"]["hcloud_server"]["host"]["ssh_keys"] == ["${data.hcloud_ssh_key.operator.id}"]
    assert KEY not in made.adopt


def test_what_exists_is_named_for_adoption() -> None:
    assert planned(declared(), DONE).adopt == {KEY: 7, FIREWALL: 38, SERVER: 44}


def test_the_rendered_key_has_no_comment_and_nothing_is_a_template_by_accident() -> None:
    made = plan(
        "alpha",
        declared(),
        NOTHING,
        public_key=KEY_LINE.replace("canary@example", "${file(1)}"),
        endpoint="http://h/${x}",
    )
    text = json.dumps(made.config)
    assert "file(1)" not in text
    assert made.config["provider"]["hcloud"]["endpoint"] == "http://h/$${x}"
