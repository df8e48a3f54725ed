"""What a host says that it held back, read: by rule, by bot, and never from an answer that is not understood."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clawdlets_ops.denials import read_log
from clawdlets_ops.egress import policy_of
from clawdlets_ops.errors import EgressError
from tests.egress_fleet import host_in

POLICY = policy_of(host_in("proxy-allowlist"))


def rule(comment: str, packets: int) -> dict[str, Any]:
    return {"rule": {"comment": comment, "expr": [{"counter": {"packets": packets, "bytes": 1}}, {"drop": None}]}}


RULES = {
    "nftables": [
        {"metainfo": {"version": "1.0.6"}},
        {"set": {"name": "confined", "elem": [{"elem": {"val": 995, "counter": {"packets": 7, "bytes": 1}}}]}},
        rule("mail", 3),
        rule("mail", 4),
        rule("metadata", 0),
        {"rule": {"expr": [{"accept": None}]}},
    ]
}
GOOD = f"""\
user clawdlets-egress 997
user bot-maren 995
nft {json.dumps(RULES)}
proxy 1795739642.664 3130 TCP_DENIED/403 CONNECT evil.example 443 -
proxy 1795739643.000 3128 TCP_DENIED/403 GET evil.example 80 -
"""


def test_packets_are_told_by_rule_and_by_user_and_requests_by_bot() -> None:
    found = read_log(GOOD, POLICY)
    assert found.packets == {"mail": 7, "metadata": 0}
    assert found.confined == {"bot-maren": 7}
    assert [(one.bot, one.method, one.name, one.port) for one in found.denied] == [
        ("maren", "CONNECT", "evil.example", 443),
        ("", "GET", "evil.example", 80),
    ]
    assert found.as_json()["denied"][0]["at"] == "2026-11-27T00:34:02.664000+00:00"


def test_a_host_that_denied_nothing_says_so() -> None:
    found = read_log('nft {"nftables": []}\n', POLICY)
    assert (found.packets, found.confined, found.denied) == ({}, {}, ())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "user bot-maren 995\n",
        "nft {\n",
        'nft {"nftables": [{"rule": {"comment": "mail", "expr": [{"counter": null}]}}]}\n',
        GOOD.replace("1795739642.664", "yesterday"),
        GOOD.replace(" 443 -", ""),
        GOOD + "sudo: a password is required\n",
        GOOD.replace("1795739642.664", "1e300"),
    ],
)
def test_an_answer_that_is_not_understood_is_never_nothing_denied(text: str) -> None:
    with pytest.raises(EgressError, match="not understood"):
        read_log(text, POLICY)
