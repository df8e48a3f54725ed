"""What the fleet file's egress policy becomes, and what it says of a request."""

from __future__ import annotations

import configparser
import re

import pytest

from clawdlets_ops import egress
from clawdlets_ops.errors import ClawdletsError
from tests.egress_fleet import host_in

MODES = ("smtp-only", "proxy-allowlist", "none")
PATHS = {"nft": "/usr/sbin/nft", "squid": "/usr/sbin/squid", "left_open": "/bin/sleep infinity"}


def users_of(rules: str, name: str) -> set[str]:
    body = re.search(rf"  set {name} \{{\n(.*?)\n  \}}", rules, re.DOTALL)
    assert body is not None
    return set(re.findall(r'"([^"]+)"', body[1]))


@pytest.mark.parametrize("mode", MODES)
def test_each_bot_is_in_the_set_of_its_own_mode(mode: str) -> None:
    rules = egress.nft_rules(egress.policy_of(host_in(mode)))
    confined = {"bot-tight"} | ({"bot-maren"} if mode == "proxy-allowlist" else set())
    assert users_of(rules, "confined") == users_of(rules, "proxy_port") == confined
    assert users_of(rules, "may_mail") == (set() if mode == "none" else {"bot-free"})
    assert users_of(rules, "no_mail") == ({"bot-plain", "bot-tight"} if mode == "none" else set())
    assert "@" not in rules.replace("@confined", "").replace("@proxy_port", "").replace("@may_mail", "").replace(
        "@no_mail", ""
    ).replace("@inside4", "").replace("@inside6", "")
    assert "169.254.169.254 meta skuid != 0 counter drop" in rules
    assert ('counter drop comment "forwarded"' in rules) is (mode == "proxy-allowlist")


def test_every_line_has_a_port_and_a_list_of_its_own_and_there_is_no_proxy_where_nobody_needs_it() -> None:
    host = host_in("proxy-allowlist")
    policy = egress.policy_of(host)
    ports = {line.name: line.port for line in policy.lines}
    assert len(set(ports.values())) == len(ports)
    files = egress.etc_files(host)
    assert files["bot-tight.domains"] == "api.tight.example\n"
    assert files["bot-maren.domains"] == files["host.domains"] == ".example.org\napi.example.net\n"
    for name in ("host", "bot-maren", "bot-tight"):
        assert f"http_port 127.0.0.1:{ports[name]} name={name}" in files["squid.conf"]
        assert f"http_access deny from_{name} !to_{name}" in files["squid.conf"]
    assert "bot-plain" not in files["squid.conf"]
    assert egress.etc_files(host_in("smtp-only", {"maren": {}})).keys() == {"mode", "rules.nft"}
    assert egress.PROXY_UNIT not in egress.units(host_in("smtp-only", {"maren": {}}), **PATHS)


def test_the_proxy_denies_before_it_allows() -> None:
    rules = [
        line
        for line in egress.squid_conf(egress.policy_of(host_in("proxy-allowlist"))).splitlines()
        if line.startswith("http_access")
    ]
    first_allow = next(place for place, line in enumerate(rules) if " allow " in line)
    assert all(" deny " in line for line in rules[:first_allow])
    assert rules[first_allow - 1] == "http_access deny inside"
    assert rules[-1] == "http_access deny all"


def directives(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition("=")
        found.setdefault(key, []).append(value)
    return found


def test_a_confined_unit_reaches_exactly_two_addresses_and_an_unconfined_one_is_hardened_all_the_same() -> None:
    units = egress.units(host_in("proxy-allowlist"), **PATHS)
    tight, plain = (directives(units[f"clawdlets-bot-{name}.service"]) for name in ("tight", "plain"))
    assert tight["IPAddressDeny"] == ["any"]
    assert tight["IPAddressAllow"] == ["127.0.0.1/32", "::1/128"]
    assert {"-/run/nscd", "-/run/systemd/resolve", "-/run/dbus/system_bus_socket"} <= set(tight["InaccessiblePaths"])
    assert "IPAddressDeny" not in plain
    for unit in (tight, plain):
        assert unit["NoNewPrivileges"] == ["true"]
        assert unit["RestrictAddressFamilies"] == ["AF_UNIX", "AF_INET", "AF_INET6"]
        assert unit["Requires"] == [egress.RULES_UNIT]
        assert "Delegate" not in unit
    assert tight["ExecStart"] == ["/usr/bin/tight --serve"]
    assert plain["ExecStart"] == ["/bin/sleep infinity"]
    assert plain["CPUQuota"] == ["50%"]
    port = egress.policy_of(host_in("proxy-allowlist")).bot("tight").port
    assert f'"https_proxy=http://127.0.0.1:{port}"' in tight["Environment"]
    assert r'"GREETING=a \"50 %%\" \\ day"' in tight["Environment"]
    assert not any("proxy" in value for value in plain.get("Environment", []))


def test_units_are_well_formed() -> None:
    for mode in MODES:
        for text in egress.units(host_in(mode), **PATHS).values():
            parser = configparser.RawConfigParser(strict=False)
            parser.read_string(text)
            assert parser.sections() == ["Unit", "Service", "Install"]
            assert "@" not in text.replace("@system-service", "").replace("@privileged", "")


def test_what_a_bot_declares_is_never_taken_for_a_mark_of_the_template() -> None:
    declared = {"execStart": "/usr/bin/tight @BOT@", "environment": {"GREETING": "@EXEC@ @BOT@ @PORT@"}}
    text = egress.units(host_in("smtp-only", {"tight": declared}), **PATHS)["clawdlets-bot-tight.service"]
    assert 'Environment="GREETING=@EXEC@ @BOT@ @PORT@"\n' in text
    assert "ExecStart=/usr/bin/tight @BOT@\n" in text
    assert "User=bot-tight\n" in text


@pytest.mark.parametrize(
    ("mode", "bot", "url", "allowed", "rule"),
    [
        ("proxy-allowlist", "maren", "https://example.org/x?y=1", True, "egress.allowedDomains[0]"),
        ("proxy-allowlist", "maren", "https://WWW.Example.org.", True, "egress.allowedDomains[0]"),
        ("proxy-allowlist", "maren", "api.example.net:443", True, "egress.allowedDomains[1]"),
        ("proxy-allowlist", "maren", "http://api.example.net", True, "egress.allowedDomains[1]"),
        ("proxy-allowlist", "maren", "https://www.api.example.net", False, "egress.allowedDomains"),
        ("proxy-allowlist", "maren", "https://notexample.org", False, "egress.allowedDomains"),
        ("proxy-allowlist", "maren", "https://example.org.evil.example", False, "egress.allowedDomains"),
        ("proxy-allowlist", "maren", "https://example.org:8443", False, "ports"),
        ("proxy-allowlist", "maren", "https://example.org:80", False, "ports"),
        ("proxy-allowlist", "maren", "example.org:22", False, "egress.mode"),
        ("proxy-allowlist", "maren", "udp://example.org:53", False, "egress.mode"),
        ("proxy-allowlist", "maren", "https://192.0.2.1", False, "egress.allowedDomains"),
        ("proxy-allowlist", "maren", "https://[2001:db8::1]/", False, "egress.allowedDomains"),
        ("proxy-allowlist", "tight", "https://example.org", False, "bots.tight.egress.allowedDomains"),
        ("proxy-allowlist", "tight", "https://api.tight.example", True, "bots.tight.egress.allowedDomains[0]"),
        ("proxy-allowlist", "plain", "https://192.0.2.1", True, "bots.plain.egress.mode"),
        ("proxy-allowlist", "plain", "mail.example.org:25", False, "bots.plain.egress.mode"),
        ("proxy-allowlist", "free", "mail.example.org:25", True, "bots.free.egress.mode"),
        ("proxy-allowlist", None, "https://anything.example", True, "egress.mode"),
        ("proxy-allowlist", None, "mail.example.org:587", False, "egress.mode"),
        ("smtp-only", "maren", "https://anything.example", True, "egress.mode"),
        ("smtp-only", None, "smtp://mail.example.org:465", False, "egress.mode"),
        ("none", "maren", "mail.example.org:2525", True, "egress.mode"),
        ("none", "plain", "mail.example.org:2525", False, "bots.plain.egress.mode"),
        ("none", "maren", "http://169.254.169.254/hetzner/v1/userdata", False, "metadata"),
        ("none", "maren", "http://[::ffff:169.254.169.254]/", False, "metadata"),
        ("smtp-only", None, "169.254.169.254:80", False, "metadata"),
    ],
)
def test_a_request_is_explained(mode: str, bot: str | None, url: str, allowed: bool, rule: str) -> None:
    answer = egress.explain(egress.policy_of(host_in(mode)), url, bot=bot)
    assert (answer.allowed, answer.rule) == (allowed, rule), answer.why


def test_a_name_of_another_script_is_explained_as_it_goes_over_the_wire() -> None:
    bots = {"maren": {"egress": {"mode": "proxy-allowlist", "allowedDomains": ["xn--bcher-kva.example"]}}}
    answer = egress.explain(egress.policy_of(host_in("smtp-only", bots)), "https://bücher.example", bot="maren")
    assert answer.allowed


@pytest.mark.parametrize("url", ["", "example.org:port", "gopher://example.org", "https://", "[::1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ClawdletsError):
        egress.explain(egress.policy_of(host_in("smtp-only")), url)


def test_mode_none_says_so_loudly() -> None:
    assert "NOTHING" in egress.explain(egress.policy_of(host_in("none")), "https://example.org").why


def test_an_unknown_bot_is_named() -> None:
    with pytest.raises(ClawdletsError, match="declared are: free, maren, plain, tight"):
        egress.policy_of(host_in("none")).bot("marten")
