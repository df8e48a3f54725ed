"""The ruleset evaluator on rules as nft 1.0.6 prints them, first among them what NixOS' firewall renders."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from clawdlets_ops.verify.suite import nft
from clawdlets_ops.verify.suite.nft import Packet, interfaces, judge, surely_dropped
from clawdlets_ops.verify.suite.reading import Unknown

IIFNAME = {"meta": {"key": "iifname"}}
DPORT = {"payload": {"protocol": "tcp", "field": "dport"}}
SADDR = {"payload": {"protocol": "ip", "field": "saddr"}}
STATE = {"ct": {"key": "state"}}
ACCEPT, DROP = {"accept": None}, {"drop": None}


def chain(name: str, *, family: str = "inet", table: str = "nixos-fw", **base: Any) -> dict[str, Any]:
    return {"chain": {"family": family, "table": table, "name": name, **base}}


def base(name: str, policy: str = "drop", **more: Any) -> dict[str, Any]:
    return chain(name, type="filter", hook="input", prio=0, policy=policy, **more)


def rule(chain_name: str, *expr: Any, family: str = "inet", table: str = "nixos-fw") -> dict[str, Any]:
    return {"rule": {"family": family, "table": table, "chain": chain_name, "handle": 1, "expr": list(expr)}}


def match(left: Any, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def nixos(*allowed: dict[str, Any]) -> list[dict[str, Any]]:
    """NixOS' nftables firewall: a map on the connection's state jumps to what is allowed, the rest is refused."""
    states = [
        ["invalid", DROP],
        ["established", ACCEPT],
        ["related", ACCEPT],
        ["new", {"jump": {"target": "input-allow"}}],
        ["untracked", {"jump": {"target": "input-allow"}}],
    ]
    tcp_flags = {"&": [{"payload": {"protocol": "tcp", "field": "flags"}}, ["fin", "syn", "rst", "ack"]]}
    return [
        base("input"),
        chain("input-allow"),
        chain("rpfilter", type="filter", hook="prerouting", prio=-140, policy="drop"),
        rule("input", match(IIFNAME, {"set": ["lo"]}), ACCEPT),
        rule("input", {"vmap": {"key": STATE, "data": {"set": states}}}),
        rule("input", match(tcp_flags, "syn"), {"log": {"prefix": "refused connection: ", "level": "info"}}),
        *allowed,
        rule("input-allow", match({"payload": {"protocol": "icmp", "field": "type"}}, "echo-request"), ACCEPT),
    ]


SSH_ON_TAILNET = rule("input-allow", match(IIFNAME, "tailscale0"), match(DPORT, 22), ACCEPT)


def dropped(objects: list[dict[str, Any]], interface: str = "eth0", family: int = 4, port: int = 22) -> bool:
    return surely_dropped(judge(objects, Packet(family, interface, port)))


def test_what_nixos_renders_for_the_tailnet() -> None:
    objects = nixos(
        SSH_ON_TAILNET, rule("input-allow", match({"payload": {"protocol": "udp", "field": "dport"}}, 41641), ACCEPT)
    )
    for family in (4, 6):
        assert dropped(objects, "eth0", family)
        assert dropped(objects, "tailscale1", family)
        assert not dropped(objects, "tailscale0", family)
        assert not dropped(objects, "lo", family)


@pytest.mark.parametrize(
    "opening",
    [
        rule("input-allow", match(DPORT, 22), ACCEPT),
        rule("input-allow", match(DPORT, {"set": [80, {"range": [20, 30]}]}), ACCEPT),
        rule("input-allow", match(DPORT, 1024, "<"), ACCEPT),
        rule("input-allow", match(DPORT, 80, "!="), ACCEPT),
        rule("input-allow", match(IIFNAME, "lo", "!="), ACCEPT),
        rule("input-allow", match(IIFNAME, "e*"), ACCEPT),
        rule("input-allow", match({"meta": {"key": "l4proto"}}, 6), ACCEPT),
        rule("input-allow", match(DPORT, 22), match(SADDR, {"prefix": {"addr": "198.18.0.0", "len": 24}}), ACCEPT),
        rule("input-allow", match({"meta": {"key": "mark"}}, 1), ACCEPT),
        rule("input-allow", match(STATE, ["new", "untracked"], "in"), {"limit": {"rate": 5, "per": "second"}}, ACCEPT),
        rule("input-allow", match({"concat": [IIFNAME, DPORT]}, {"set": [{"concat": ["eth0", 22]}]}), ACCEPT),
        rule("input-allow", match(DPORT, "@dynamic"), ACCEPT),
        rule("input-allow", {"vmap": {"key": DPORT, "data": {"set": [[{"range": [20, 30]}, ACCEPT]]}}}),
        rule("input-allow", {"xt": {"type": "target", "name": "LOG"}}),
        rule("input", match({"meta": {"key": "nfproto"}}, "ipv4"), ACCEPT),
    ],
)  # fmt: skip
def test_a_rule_that_may_let_port_22_in_is_seen(opening: dict[str, Any]) -> None:
    dynamic = {
        "set": {"family": "inet", "table": "nixos-fw", "name": "dynamic", "type": "inet_service", "flags": ["dynamic"]}
    }
    closed = nixos(SSH_ON_TAILNET)
    assert dropped(closed)
    assert not dropped([dynamic, opening, *nixos(SSH_ON_TAILNET)])


@pytest.mark.parametrize(
    "harmless",
    [
        rule("input-allow", match(DPORT, 80), ACCEPT),
        rule("input-allow", match(DPORT, {"range": [23, 80]}), ACCEPT),
        rule("input-allow", match({"payload": {"protocol": "udp", "field": "dport"}}, 22), ACCEPT),
        rule("input-allow", match({"payload": {"protocol": "ip6", "field": "saddr"}}, "2001:db8::1"), ACCEPT),
        rule("input-allow", match(STATE, "established", "in"), ACCEPT),
        rule("input-allow", match(DPORT, "@fixed"), ACCEPT),
        rule("input-allow", match({"meta": {"key": "l4proto"}}, 17), ACCEPT),
        rule("input-allow", match({"concat": [IIFNAME, DPORT]}, {"set": [{"concat": ["eth0", 80]}]}), ACCEPT),
        rule("input-allow", {"goto": {"target": "dead-end"}}),
        rule("input", {"counter": {"packets": 1, "bytes": 1}}, {"log": {}}),
    ],
)
def test_a_rule_about_something_else_changes_nothing(harmless: dict[str, Any]) -> None:
    fixed = {"set": {"family": "inet", "table": "nixos-fw", "name": "fixed", "type": "inet_service", "elem": [80, 443]}}
    assert dropped([fixed, chain("dead-end"), harmless, *nixos(SSH_ON_TAILNET)])


def test_a_drop_in_one_table_is_final_whatever_another_accepts() -> None:
    tailscale = [
        base("ts-input", "accept", family="ip", table="filter"),
        rule("ts-input", ACCEPT, family="ip", table="filter"),
    ]
    assert dropped([*tailscale, *nixos()])
    assert not dropped(tailscale)


def test_a_table_for_one_family_says_nothing_about_the_other() -> None:
    objects = [base("input", family="ip", table="filter")]
    assert dropped(objects, family=4)
    assert judge(objects, Packet(6, "eth0", 22)) == []
    assert not dropped(objects, family=6)


def test_no_rules_at_all_drop_nothing() -> None:
    assert not dropped([])


def test_a_drop_that_depends_on_something_is_no_drop() -> None:
    objects = [base("input", "accept"), rule("input", match({"meta": {"key": "skuid"}}, 0, "!="), DROP)]
    assert not dropped(objects)
    assert judge(objects, Packet(4, "eth0", 22))[0].outcomes == {"accept", "drop"}


def test_chains_that_call_each_other_end() -> None:
    objects = [base("input"), rule("input", {"jump": {"target": "a"}}), rule("a", {"jump": {"target": "input"}})]
    assert not dropped(objects)


def test_interfaces_are_those_that_rules_speak_of() -> None:
    objects = [
        *nixos(SSH_ON_TAILNET, rule("input-allow", match(IIFNAME, "en*"), ACCEPT)),
        rule("input-allow", match({"concat": [IIFNAME, DPORT]}, {"set": [{"concat": ["eth7", 80]}]}), ACCEPT),
        {"set": {"family": "inet", "table": "nixos-fw", "name": "lan", "type": "ifname", "elem": ["br0"]}},
    ]
    assert interfaces(objects) == {"lo", "tailscale0", "en0", "eth7", "br0"}


def test_a_rule_for_some_users_holds_for_them_alone() -> None:
    skuid = {"meta": {"key": "skuid"}}
    objects = [
        {"set": {"family": "inet", "table": "nixos-fw", "name": "free", "type": "uid", "elem": [{"elem": {"val": 7}}]}},
        chain("output", type="filter", hook="output", prio=0, policy="accept"),
        rule("output", match(skuid, "@free", "!="), match(DPORT, 25), DROP),
    ]

    def held(user: int | None) -> bool:
        return surely_dropped(judge(objects, Packet(4, "eth0", 25, hook="output", user=user)))

    assert [held(0), held(7), held(None)] == [True, False, False]
    objects[0]["set"]["elem"] = ["bot-free"]  # a name that we cannot compare with a number
    assert not held(0)


def jump(target: str) -> dict[str, Any]:
    return {"jump": {"target": target}}


def test_chains_that_each_jump_to_the_next_twice_are_followed_once() -> None:
    levels = [rule(f"c{number}", jump(f"c{number + 1}")) for number in range(60) for _ in range(2)]
    started = time.monotonic()
    assert dropped([base("input"), rule("input", jump("c0")), *levels])
    assert not dropped([base("input"), rule("input", jump("c0")), *levels, rule("c60", match(DPORT, 22), ACCEPT)])
    assert time.monotonic() - started < 5


class Forgetful(dict[str, Any]):
    """Keeps nothing: every chain is followed each time that something leads to it."""

    def __contains__(self, _name: object) -> bool:
        return False


class ForgetfulWalk(nft._Walk):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._ends = Forgetful()


def test_what_is_remembered_of_a_chain_changes_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(7)  # noqa: S311 - rulesets to try, no secrets
    open_match = match({"meta": {"key": "mark"}}, 1)
    rulesets = []
    for _ in range(400):
        objects = [base("c0", chance.choice(("drop", "accept")))]
        for number in range(6):
            for _ in range(chance.randint(0, 3)):
                verdict: Any = chance.choice((ACCEPT, DROP, {"return": None}, *[None] * 5))
                if verdict is None:
                    target = {"target": f"c{chance.randint(number + 1, 6)}"}
                    verdict = {chance.choice(("jump", "goto")): target}
                count: list[Any] = [{"counter": {"packets": 0, "bytes": 0}}] if chance.random() < 0.5 else []
                objects.append(rule(f"c{number}", *([open_match] if chance.random() < 0.5 else []), *count, verdict))
        rulesets.append(objects)
    found = [judge(objects, Packet(4, "eth0", 22)) for objects in rulesets]
    assert len({str(verdicts) for verdicts in found}) > 4
    monkeypatch.setattr(nft, "_Walk", ForgetfulWalk)
    assert [judge(objects, Packet(4, "eth0", 22)) for objects in rulesets] == found


def test_a_loop_is_never_surely_a_drop_wherever_it_is_entered() -> None:
    loop = [rule("a", jump("b")), rule("b", jump("a")), rule("b", DROP)]
    for first, second in (("a", "b"), ("b", "a")):
        assert not dropped([base("input"), rule("input", jump(first)), rule("input", jump(second)), *loop])


def test_sets_of_sets_that_take_too_many_steps_are_unknown() -> None:
    sets = [
        {"set": {"family": "inet", "table": "nixos-fw", "name": f"s{number}", "type": "inet_service", "elem": [f"@s{number + 1}"] * 2}}
        for number in range(40)
    ]  # fmt: skip
    with pytest.raises(Unknown, match="steps to follow"):
        dropped([base("input"), rule("input", match(DPORT, "@s0"), ACCEPT), *sets])


def test_many_base_chains_of_one_great_table_are_unknown() -> None:
    chains = [base(f"input{number}") for number in range(1000)]
    with pytest.raises(Unknown, match="steps to follow"):
        dropped([*chains, *(rule("other", ACCEPT) for _ in range(1000))])
