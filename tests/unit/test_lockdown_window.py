"""What may be asked of a breakglass window, who a canary holds back, and what provision makes of a window."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from clawdlets_ops.errors import LockdownError, SettingsError
from clawdlets_ops.hetzner import WINDOW_LABEL, WINDOW_RULE, Firewall, FirewallRule
from clawdlets_ops.lockdown import open_until, parse_duration, parse_networks
from clawdlets_ops.pyinfra_plugin.canaries import failed_canaries

UDP = FirewallRule("in", "udp", "41641", ("0.0.0.0/0", "::/0"))
WINDOW = FirewallRule("in", "tcp", "22", ("203.0.113.7/32",), f"{WINDOW_RULE} until then, by olive")


@pytest.mark.parametrize(("text", "seconds"), [("1m", 60), ("60s", 60), ("30m", 1800), ("4h", 14400)])
def test_a_window_has_a_length(text: str, seconds: int) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text", ["", "30", "59s", "5h", "241m", "0m", "-5m", "1.5h", "30 m", "30m ", "٣0m", "99999999m"]
)
def test_lengths_that_are_refused(text: str) -> None:
    with pytest.raises(LockdownError, match="is not a length from 1m to 4h"):
        parse_duration(text)


def test_networks_are_canonical_and_each_counts_once() -> None:
    assert parse_networks(["203.0.113.7", "203.0.113.7/32", "2001:db8::/64"]) == ("2001:db8::/64", "203.0.113.7/32")


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ([], "0 networks"),
        (["0.0.0.0/0"], "the internet at large"),
        (["::/0"], "the internet at large"),
        (["0.0.0.0/1", "128.0.0.0/1"], "the internet at large"),
        (["203.0.113.7/24"], "host bits"),
        (["here"], "not a network"),
        (["127.0.0.1/32"], "nobody comes from"),
        (["198.51.100.1/32; reboot"], "not a network"),
        ([f"198.51.100.{number}/32" for number in range(9)], "9 networks"),
    ],
)
def test_networks_that_are_refused(texts: list[str], why: str) -> None:
    with pytest.raises(LockdownError, match=why):
        parse_networks(texts)


def test_the_label_says_until_when_and_nonsense_is_not_read_as_none() -> None:
    closed = Firewall(3, "alpha-edge", {}, (UDP,))
    assert open_until(None) is None
    assert open_until(closed) is None
    opened = replace(closed, labels={WINDOW_LABEL: "20261127T120000Z"})
    assert open_until(opened) == datetime(2026, 11, 27, 12, tzinfo=UTC)
    with pytest.raises(LockdownError, match="which is no time"):
        open_until(replace(closed, labels={WINDOW_LABEL: "noon"}))


def test_a_firewall_without_its_window_is_the_one_before() -> None:
    before = Firewall(3, "alpha-edge", {"managed-by": "clawdlets"}, (UDP,))
    opened = replace(before, labels={**before.labels, WINDOW_LABEL: "20261127T120000Z"}, rules=(WINDOW, UDP))
    assert opened.without_window() == before
    assert before.without_window() is before
    # a rule of that name without the label is no window: it is not overlooked
    assert replace(before, rules=(WINDOW, UDP)).without_window().ssh_is_open


@pytest.mark.parametrize(
    ("count", "host", "failed", "held_by"),
    [
        ("0", "c", {"a"}, []),
        ("1", "a", set(), []),
        ("1", "b", {"a"}, ["a"]),
        ("2", "b", {"a"}, []),
        ("2", "c", {"a", "b"}, ["a", "b"]),
        ("9", "c", {"a"}, []),
    ],
)
def test_a_failed_canary_holds_back_those_after_it(count: str, host: str, failed: set[str], held_by: list[str]) -> None:
    assert failed_canaries(["a", "b", "c"], count, host, failed) == held_by


@pytest.mark.parametrize("count", ["one", "-1", "1.5", "²"])
def test_a_number_of_canaries_is_a_number(count: str) -> None:
    with pytest.raises(SettingsError, match="no number of hosts"):
        failed_canaries(["a"], count, "a", set())
