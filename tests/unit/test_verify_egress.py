"""The suite's checks of confined bots, on good evidence and on evidence with one fault each."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest

from clawdlets_ops.egress import policy_of
from clawdlets_ops.verify.expectation import _egress
from clawdlets_ops.verify.suite import test_egress as suite
from clawdlets_ops.verify.suite.reading import Fault, NotApplicable, Unknown
from tests.egress_fleet import host_in

BOTS = {"maren": {}, "plain": {"egress": {"mode": "smtp-only"}}}
SHOW = """\
show maren User=bot-maren
show maren ActiveState=active
show maren ControlGroup=/system.slice/clawdlets-bot-maren.service
show maren IPAddressDeny=::/0 0.0.0.0/0
show maren IPAddressAllow=::1/128 127.0.0.1/32
show maren Delegate=no
show maren NoNewPrivileges=yes
show maren RestrictAddressFamilies=AF_UNIX AF_INET6 AF_INET
show maren Requires=clawdlets-egress.service system.slice
show maren After=clawdlets-egress.service network.target
"""
REQUESTS = [
    "CONNECT denied.invalid:443", "CONNECT example.org.denied.invalid:443", "CONNECT deniedexample.org:443", "CONNECT example.org:22",
    "CONNECT example.org:25", "CONNECT 192.0.2.1:443", "CONNECT [2001:db8::1]:443", "CONNECT 10.96.0.1:443", "CONNECT 127.0.0.1:443",
    "CONNECT 169.254.169.254:443", "GET http://example.org:25/", "GET http://denied.invalid/",
]  # fmt: skip


def good() -> str:
    tries = "try - root 192.0.2.1:9 sent\ntry - root 2001:db8::1:9 sent\n"
    for where in ("cgroup", "unit", "outside"):
        tries += f"try maren {where} 192.0.2.1:9 denied\ntry maren {where} 2001:db8::1:9 denied\n"
    tries += "try maren unit 127.0.0.53:53 denied\ntry maren unit 185.12.64.1:53 denied\n"
    sockets = "socket maren /run/nscd/socket absent\nsocket maren /run/dbus/system_bus_socket hidden\n"
    sockets += "".join(f"door maren {kind} no\n" for kind in ("sudo", "linger", "job", "socket"))
    asked = "".join(f"ask maren 403 {request}\n" for request in REQUESTS) + "ask maren 200 CONNECT example.org:443\n"
    return f"{tries}list host 3128 .example.org api.example.net\nlist bot-maren 3129 .example.org api.example.net\n{SHOW}{sockets}{asked}"


USERS = "user:bot-maren:995:995:/:/x\ngroup:bot-maren:995:\ngroup:clf-bots:990:bot-maren"
LISTEN = 'LISTEN 0 256 127.0.0.1:3128 0.0.0.0:* users:(("squid",pid=5,fd=1))\nLISTEN 0 256 127.0.0.1:3129 0.0.0.0:* users:(("squid",pid=5,fd=2))'


def run(
    text: str,
    *,
    users: str = USERS,
    listen: str = LISTEN,
    mode: str = "proxy-allowlist",
    bots: Any = None,
    rules: Any = (),
) -> dict[str, str]:
    """check → pass, or what was wrong."""
    found = {"egress": text, "users": users, "listen-tcp": listen, "nft": json.dumps({"nftables": rules})}
    facts = {"problem": None, "sections": {name: {"status": 0, "text": said} for name, said in found.items()}}
    expected = {"egress": _egress(policy_of(host_in(mode, BOTS if bots is None else bots)))}
    results = {}
    for function in [one for name, one in inspect.getmembers(suite, inspect.isfunction) if name.startswith("test_")]:
        check = next(mark for mark in function.pytestmark if mark.name == "check").kwargs["id"]
        try:
            function(expected, facts, lambda _: None)
            results[check] = "pass"
        except Fault as error:
            results[check] = f"fail: {error}"
        except Unknown as error:
            results[check] = f"unknown: {error}"
        except NotApplicable as error:
            results[check] = f"n/a: {error}"
    return results


@pytest.fixture(autouse=True)
def marker(pytestconfig: pytest.Config) -> None:
    pytestconfig.addinivalue_line(
        "markers", "check(id, severity, claim, fix, vantage): the entry of the check catalogue"
    )


def test_good_evidence_passes() -> None:
    results = run(good())
    assert results.pop("EGR-04") == "n/a: egress.mode is proxy-allowlist"
    assert set(results.values()) == {"pass"}, results
    assert results.keys() == {f"PXY-0{number}" for number in range(1, 9)}


def test_rules_that_hold_back_more_than_mail_are_seen() -> None:
    rules: list[dict[str, Any]] = [
        {
            "chain": {
                "family": "inet",
                "table": "more",
                "name": "out",
                "type": "filter",
                "hook": "output",
                "policy": "accept",
            }
        }
    ]
    assert run("", mode="smtp-only", rules=rules)["EGR-04"] == "pass"
    port = {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 443}}
    rules.append({"rule": {"family": "inet", "table": "more", "chain": "out", "expr": [port, {"drop": None}]}})
    assert "tcp/443 of bot-maren is dropped over IPv6" in run("", mode="smtp-only", rules=rules)["EGR-04"]


def test_where_there_is_no_confined_bot_nothing_is_claimed_and_none_is_loud() -> None:
    few, none = run("", mode="smtp-only"), run("", mode="none", bots={})
    for check in (f"PXY-0{number}" for number in range(1, 9)):
        assert few[check] == "n/a: no bot is in mode proxy-allowlist (egress.mode is smtp-only)"
        assert "NOTHING" in none[check]


Change = Callable[[str], str]


def swap(old: str, new: str) -> Change:
    def changed(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return changed


@pytest.mark.parametrize(
    ("checks", "change"),
    [
        ("PXY-01", swap("IPAddressDeny=::/0 0.0.0.0/0", "IPAddressDeny=0.0.0.0/0")),
        ("PXY-01", swap("IPAddressAllow=::1/128 127.0.0.1/32", "IPAddressAllow=127.0.0.0/8 ::1/128")),
        ("PXY-01", swap("Delegate=no", "Delegate=yes")),
        ("PXY-01", swap("User=bot-maren", "User=")),
        ("PXY-01", swap("try maren cgroup 2001:db8::1:9 denied", "try maren cgroup 2001:db8::1:9 sent")),
        ("PXY-02", swap("try maren unit 192.0.2.1:9 denied", "try maren unit 192.0.2.1:9 sent")),
        ("PXY-02", swap("try maren outside 2001:db8::1:9 denied", "try maren outside 2001:db8::1:9 sent")),
        ("PXY-04", swap("ask maren 403 CONNECT 10.96.0.1:443", "ask maren 200 CONNECT 10.96.0.1:443")),
        ("PXY-04", swap("ask maren 403 GET http://denied.invalid/", "ask maren 503 GET http://denied.invalid/")),
        ("PXY-04", swap("list bot-maren 3129 ", "list bot-maren 3129 .evil.example ")),
        ("PXY-04", swap("list bot-maren 3129 ", "list bot-maren 3128 ")),
        ("PXY-05", swap("try maren unit 127.0.0.53:53 denied", "try maren unit 127.0.0.53:53 sent")),
        ("PXY-05", swap("/run/dbus/system_bus_socket hidden", "/run/dbus/system_bus_socket visible")),
        ("PXY-06", swap("NoNewPrivileges=yes", "NoNewPrivileges=no")),
        ("PXY-06", swap("AF_UNIX AF_INET6 AF_INET", "AF_UNIX AF_PACKET AF_INET")),
        ("PXY-06", swap("RestrictAddressFamilies=AF_UNIX AF_INET6 AF_INET", "RestrictAddressFamilies=")),
        ("PXY-06", swap("door maren sudo no", "door maren sudo yes")),
        ("PXY-06", swap("door maren linger no", "door maren linger yes")),
        ("PXY-06", swap("door maren job no", "door maren job no\ndoor maren job yes /etc/cron.d/seed")),
        ("PXY-06", swap("door maren socket no", "door maren socket no\ndoor maren socket yes /run/docker.sock")),
        ("PXY-07", swap("Requires=clawdlets-egress.service system.slice", "Requires=system.slice")),
        ("PXY-08", swap("ask maren 200 CONNECT", "ask maren 403 CONNECT")),
        ("PXY-08", swap("list bot-maren 3129 .example.org api.example.net", "list bot-maren 3129 .example.org")),
    ],
)  # fmt: skip
def test_one_fault_turns_one_check_red(checks: str, change: Change) -> None:
    results = run(change(good()))
    assert {check for check, text in results.items() if text.startswith("fail")} == set(checks.split()), results
    assert not [text for text in results.values() if text.startswith("unknown")], results


@pytest.mark.parametrize(
    ("checks", "change"),
    [
        (
            "PXY-01 PXY-02",
            swap("try - root 192.0.2.1:9 sent\ntry - root 2001:db8::1:9 sent", "try - root 192.0.2.1:9 denied"),
        ),
        ("PXY-01", swap("try maren cgroup 2001:db8::1:9 denied\n", "")),
        ("PXY-01", swap("try maren cgroup 2001:db8::1:9 denied", "try maren cgroup 2001:db8::1:9 failed")),
        ("PXY-05", lambda text: text.replace(":53 denied", ":53 failed")),
        ("PXY-02", swap("try maren outside 2001:db8::1:9 denied\n", "")),
        ("PXY-01 PXY-04 PXY-05 PXY-06 PXY-07 PXY-08", swap("ActiveState=active", "ActiveState=activating")),
        ("PXY-06", swap("door maren sudo no", "door maren sudo unknown")),
        *(("PXY-06", swap(f"door maren {kind} no\n", "")) for kind in ("sudo", "linger", "job", "socket")),
        ("PXY-04", swap("ask maren 403 CONNECT 10.96.0.1:443", "ask maren none CONNECT 10.96.0.1:443")),
        ("PXY-04", swap("ask maren 403 CONNECT 10.96.0.1:443\n", "")),
        ("PXY-08", swap("ask maren 200 CONNECT example.org:443\n", "")),
        ("PXY-05", swap("socket maren /run/nscd/socket absent\nsocket maren /run/dbus/system_bus_socket hidden\n", "")),
        (
            "PXY-01 PXY-02 PXY-04 PXY-05 PXY-06 PXY-07 PXY-08",
            swap("try - root 192.0.2.1:9 sent", "Traceback (most recent call last):"),
        ),
    ],
)
def test_what_cannot_be_seen_is_unknown_never_passed(checks: str, change: Change) -> None:
    results = run(change(good()))
    assert {check for check, text in results.items() if text.startswith("unknown")} == set(checks.split()), results
    assert not [text for text in results.values() if text.startswith("fail")], results


def test_a_proxy_that_others_reach_is_red_and_so_is_one_that_is_not_there() -> None:
    assert "not on loopback" in run(good(), listen=LISTEN.replace("127.0.0.1:3129", "0.0.0.0:3129"))["PXY-03"]
    more = LISTEN + '\nLISTEN 0 256 *:8080 *:* users:(("squid",pid=5,fd=3))'
    assert "8080 is not on loopback" in run(good(), listen=more)["PXY-03"]
    assert "nobody listens on 127.0.0.1:3129" in run(good(), listen=LISTEN.splitlines()[0])["PXY-03"]


def test_a_bot_in_a_group_of_others_is_red() -> None:
    assert "docker" in run(good(), users=USERS + "\ngroup:docker:99:bot-maren")["PXY-06"]
