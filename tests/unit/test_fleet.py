import json
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.errors import FleetError
from clawdlets_ops.fleet import json_schema, load_fleet, parse_cidr, parse_fleet, world_open

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s canary@example"


def fleet(**host: Any) -> str:
    base = {"provisioning": {"adminCidrs": ["203.0.113.0/24"]}, "sshAuthorizedKeys": [KEY]}
    return json.dumps({"schemaVersion": 1, "hosts": {"alpha": {**base, **host}}})


def refused(text: str) -> str:
    with pytest.raises(FleetError) as caught:
        parse_fleet(text)
    return str(caught.value)


def test_the_example_fleet_is_accepted_and_its_schema_file_is_current(root: Path) -> None:
    example = load_fleet(root / "fleet" / "clawdlets.json")
    assert example.host("alpha").ssh_exposure.mode == "tailnet"
    assert json.loads((root / "fleet" / "clawdlets.schema.json").read_text()) == json_schema()


def test_defaults_are_the_safe_ones() -> None:
    host = parse_fleet(fleet()).host("alpha")
    assert (host.ssh_exposure.mode, host.tailnet.mode, host.egress.mode) == ("tailnet", "tailscale", "smtp-only")
    assert host.tailnet.allow_udp_ingress


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ({"sshExposre": {}}, "hosts.alpha.sshExposre: unknown key; did you mean 'sshExposure'?"),
        ({"tailnet": {"mod": "none"}}, "hosts.alpha.tailnet.mod: unknown key; did you mean 'mode'?"),
        ({"secrets": {"token": {"ownr": "bot"}}}, "hosts.alpha.secrets.token.ownr: unknown key; did you mean 'owner'?"),
        ({"ssh_exposure": {}}, "did you mean 'sshExposure'?"),
        ({"sshExposure": {"mode": "closed"}}, "hosts.alpha.sshExposure.mode"),
        ({"diskDevice": "rm -rf /"}, "hosts.alpha.diskDevice"),
        ({"diskDevice": "/dev/disk/../../etc/passwd"}, "plain path below /dev"),
        ({"tailnet": {"mode": "none"}}, "a host that nobody can reach"),
        ({"sshAuthorizedKeys": []}, "no admin key"),
        ({"sshAuthorizedKeys": ['command="x" ssh-ed25519 AAAA']}, "no options"),
        ({"sshAuthorizedKeys": ["ssh-rsa AAAA x"]}, "not accepted"),
        ({"sshAuthorizedKeys": ["-----BEGIN OPENSSH PRIVATE KEY-----"]}, "this is a private key"),
        ({"provisioning": {"adminCidrs": []}}, "nobody could reach the host to install it"),
        ({"egress": {"mode": "proxy-allowlist"}}, "needs at least one entry in allowedDomains"),
        ({"egress": {"mode": "proxy-allowlist", "allowedDomains": ["*.example.org"]}}, "allowedDomains"),
        ({"egress": {"allowedDomains": ["https://example.org"]}}, "without scheme and path"),
        ({"egress": {"allowedDomains": ["example.org:443"]}}, "has a port"),
        ({"egress": {"allowedDomains": ["a.*.example.org"]}}, "write .example.org for"),
        ({"egress": {"allowedDomains": ["192.0.2.1"]}}, "is an IP address"),
        ({"egress": {"allowedDomains": ["[2001:db8::1]"]}}, "is an IP address"),
        ({"egress": {"allowedDomains": ["2001:db8::1"]}}, "is an IP address"),
        ({"egress": {"allowedDomains": ["192.0.2.0x1"]}}, "is an IP address"),
        ({"egress": {"allowedDomains": ["bücher.example"]}}, "(xn--bcher-kva.example)"),
        ({"egress": {"allowedDomains": ["Example.org"]}}, "write 'example.org'"),
        ({"egress": {"allowedDomains": ["example.org."]}}, "write 'example.org'"),
        ({"egress": {"allowedDomains": ["org"]}}, "is not a domain name of at least two labels"),
        ({"egress": {"allowedDomains": ["exa mple.org"]}}, "is not a domain name"),
        ({"egress": {"allowedDomains": [f"{'a' * 64}.org"]}}, "is not a domain name"),
        ({"egress": {"allowedDomains": ["-a.example.org"]}}, "is not a domain name"),
        ({"egress": {"allowedDomains": [".example.org", "api.example.org"]}}, "is covered by '.example.org'"),
        ({"egress": {"allowedDomains": [".example.org", "example.org"]}}, "is covered by '.example.org'"),
        ({"egress": {"allowedDomains": ["example.org", "example.org"]}}, "is covered by 'example.org'"),
        ({"bots": {"Maren": {}}}, "hosts.alpha.bots.Maren"),
        ({"bots": {"a" * 27: {}}}, "hosts.alpha.bots.aaa"),
        (
            {"bots": {"maren": {"exec": "/bin/true"}}},
            "hosts.alpha.bots.maren.exec: unknown key; did you mean 'execStart'?",
        ),
        ({"bots": {"maren": {"execStart": "maren"}}}, "hosts.alpha.bots.maren.execStart"),
        ({"bots": {"maren": {"execStart": "/bin/x\nUser=root"}}}, "hosts.alpha.bots.maren.execStart"),
        ({"bots": {"maren": {"environment": {"A": "x\nUser=root"}}}}, "hosts.alpha.bots.maren.environment.A"),
        ({"bots": {"maren": {"environment": {"HTTPS_PROXY": "x"}}}}, "is set from the egress policy"),
        ({"bots": {"maren": {"secrets": ["token"]}}}, "which is not among the host's secrets"),
        ({"bots": {"maren": {"secrets": ["token"]}}, "secrets": {"token": {}}}, "set secrets.token.owner to bot-maren"),
        ({"bots": {"maren": {"egress": {"mode": "proxy-allowlist"}}}}, "bots.maren.egress: mode proxy-allowlist needs"),
        ({"bots": {"maren": {"limits": {"memoryMaxMb": 1}}}}, "hosts.alpha.bots.maren.limits.memoryMaxMb"),
        ({"secrets": {"tailscale_auth_key": {}}}, "not to be wired here"),
        ({"secrets": {"api_unencrypted": {}}}, "api_unencrypted: sops leaves a value of such a name in clear"),
        ({"secrets": {"token": {"mode": "0644"}}}, "hosts.alpha.secrets.token.mode"),
        ({"targetHost": "-oProxyCommand=x"}, "hosts.alpha.targetHost"),
        ({"tailnet": {"allowUdpIngress": "yes"}}, "hosts.alpha.tailnet.allowUdpIngress"),
        ({"hetzner": {"ipv4": False, "ipv6": False}}, "nobody could reach the host"),
        ({"hetzner": {"labels": {"managed-by": "me"}}}, "is set by clawdlets or Hetzner"),
        ({"hetzner": {"labels": {"hetzner.cloud/x": "me"}}}, "is set by clawdlets or Hetzner"),
        ({"hetzner": {"labels": {"two words": "x"}}}, "hosts.alpha.hetzner.labels.two words"),
        ({"hetzner": {"labels": {"team": "-x"}}}, "hosts.alpha.hetzner.labels.team"),
        ({"hetzner": {"volumes": {"data": {"sizeGb": 9}}}}, "hosts.alpha.hetzner.volumes.data.sizeGb"),
        ({"hetzner": {"volumes": {"Data": {}}}}, "hosts.alpha.hetzner.volumes.Data"),
        ({"hetzner": {"volumes": {"data": {"size": 10}}}}, "volumes.data.size: unknown key; did you mean 'sizeGb'?"),
        ({"hetzner": {"serverType": "cx23", "serverTypeFallbacks": ["cx23"]}}, "repeat serverType"),
    ],
)
def test_a_wrong_host_is_refused_with_its_key_path(host: dict[str, Any], said: str) -> None:
    assert said in refused(fleet(**host))


@pytest.mark.parametrize(
    "cidrs",
    [
        ["0.0.0.0/0"],
        ["::/0"],
        ["0.0.0.0/1"],
        ["1.2.3.4/0"],
        ["::0/0"],
        ["0.0.0.0/1", "128.0.0.0/1"],
        ["2000::/3"],
        ["9.0.0.0/8", "8.0.0.0/8"],
    ],
)
def test_a_network_that_is_the_world_is_refused_unless_said_so(cidrs: list[str]) -> None:
    assert "internet at large" in refused(fleet(provisioning={"adminCidrs": cidrs}))
    opened = parse_fleet(fleet(provisioning={"adminCidrs": cidrs, "adminCidrAllowWorldOpen": True}))
    assert len(opened.host("alpha").provisioning.admin_cidrs) == len(cidrs)


def test_cidrs_become_canonical() -> None:
    host = parse_fleet(fleet(provisioning={"adminCidrs": ["203.0.113.7", "2001:DB8:0::/48", "198.51.100.0/24"]})).host(
        "alpha"
    )
    assert host.provisioning.admin_cidrs == ("203.0.113.7/32", "2001:db8::/48", "198.51.100.0/24")


def test_host_bits_are_refused_with_what_was_probably_meant() -> None:
    assert "did you mean 10.0.0.0/24?" in refused(fleet(provisioning={"adminCidrs": ["10.0.0.5/24"]}))


def test_ordinary_networks_are_not_the_world() -> None:
    assert world_open(parse_cidr(text) for text in ("10.0.0.0/8", "203.0.113.0/24", "2001:db8::/32", "fd00::/20")) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ('{"schemaVersion": 1, "hosts": {"a": {}, "a": {}}}', "appears twice"),
        ('{"schemaVersion": 2, "hosts": {"alpha": {}}}', "schemaVersion"),
        ('{"schemaVersion": 1, "hosts": {}}', "hosts"),
        ('{"schemaVersion": 1}', "hosts: is required"),
        ('{"schemaVersion": 1, "state": {"backend": "gcs"}, "hosts": {}}', "state.backend: is none of"),
        ('{"schemaVersion": 1, "state": {"backend": "s3"}, "hosts": {}}', "state.s3.bucket: is required"),
        (
            '{"schemaVersion": 1, "state": {"backend": "http", "address": "https://canary@x/y"}, "hosts": {}}',
            "state.http.address",
        ),
        ("[]", "(top)"),
    ],
)
def test_a_wrong_file_is_refused(text: str, said: str) -> None:
    assert said in refused(text)


@pytest.mark.parametrize("name", ["Alpha", "a_b", "-a", "a-", "a" * 64, "a.b", ""])
def test_a_name_that_is_no_dns_label_is_refused(name: str) -> None:
    text = fleet().replace('"alpha"', json.dumps(name))
    assert "hosts" in refused(text)


def test_comments_are_dropped_and_do_not_hide_other_keys() -> None:
    host = parse_fleet(fleet(tailnet={"$comment": "why", "mode": "tailscale"}))
    assert host.host("alpha").tailnet.mode == "tailscale"
    assert "unknown key" in refused(fleet(tailnet={"comment": "why"}))


def test_an_unknown_host_name_gets_the_nearest() -> None:
    with pytest.raises(FleetError, match="did you mean 'alpha'"):
        parse_fleet(fleet()).host("alhpa")


def test_a_missing_file_says_where_a_project_is_named(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="--project"):
        load_fleet(tmp_path / "fleet" / "clawdlets.json")
