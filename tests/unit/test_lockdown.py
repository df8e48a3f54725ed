import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from clawdlets_ops.errors import LockdownError, UnreachableError
from clawdlets_ops.fleet import Host, parse_fleet
from clawdlets_ops.lockdown import (
    HostExposure,
    parse_account,
    parse_status,
    plan,
    refuse_short_lived,
    tailnet_addresses,
)
from clawdlets_ops.lockdown.plan import refuse_wrong_clock
from clawdlets_ops.tailnet import Peer
from clawdlets_ops.testing import FakeRunner

KEY_LINE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s canary@example"


def declared(mode: str = "tailnet", **host: Any) -> Host:
    base = {
        "provisioning": {"adminCidrs": ["203.0.113.0/24"]},
        "sshAuthorizedKeys": [KEY_LINE],
        "sshExposure": {"mode": mode},
    }
    return parse_fleet(json.dumps({"schemaVersion": 1, "hosts": {"alpha": {**base, **host}}})).host("alpha")


@pytest.mark.parametrize(
    ("mode", "edge_open", "on_host", "empty"),
    [
        ("tailnet", False, HostExposure("tailnet", armed=False), True),
        ("tailnet", True, HostExposure("tailnet", armed=False), False),
        ("tailnet", False, HostExposure("bootstrap", armed=False), False),
        ("tailnet", False, HostExposure("tailnet", armed=True), False),  # on trial: it will open by itself
        ("tailnet", True, None, False),
        ("bootstrap", True, HostExposure("bootstrap", armed=False), True),
        ("bootstrap", True, HostExposure("tailnet", armed=False), False),
        ("public", True, HostExposure("public", armed=False), True),
        ("public", True, HostExposure("bootstrap", armed=False), False),
        ("public", True, None, True),
    ],
)
def test_the_plan_is_what_separates_both_doors_from_the_declaration(
    mode: str, on_host: HostExposure | None, *, edge_open: bool, empty: bool
) -> None:
    assert plan("alpha", declared(mode), edge_open=edge_open, on_host=on_host).empty is empty


def test_closing_begins_with_a_login_and_ends_with_a_look_from_outside() -> None:
    steps = plan("alpha", declared(), edge_open=True, on_host=HostExposure("bootstrap", armed=False)).steps
    assert "log in over the tailnet" in steps[0]
    assert "probe from outside on IPv4 and IPv6" in steps[-1]
    assert len(steps) == 4


def test_the_hosts_own_account_is_understood_or_refused() -> None:
    assert parse_status("mode=tailnet armed=no\n") == HostExposure("tailnet", armed=False)
    assert parse_status("mode=bootstrap armed=yes") == HostExposure("bootstrap", armed=True)
    for nonsense in ("", "mode=open armed=no", "mode=tailnet", "sudo: a password is required"):
        with pytest.raises(LockdownError):
            parse_status(nonsense)


def status(peers: dict[str, Any], state: str = "Running") -> FakeRunner:
    return FakeRunner(script=[(("tailscale",), (0, json.dumps({"BackendState": state, "Peer": peers})))])


def test_where_a_host_is_on_the_tailnet() -> None:
    peer = {"n": {"HostName": "alpha", "TailscaleIPs": ["100.64.0.7"], "Online": True}}
    assert tailnet_addresses(status(peer), "alpha", declared()) == {4: "100.64.0.7"}
    assert tailnet_addresses(status({}), "alpha", declared()) == {}
    assert tailnet_addresses(FakeRunner(programs=frozenset()), "alpha", declared()) == {}
    closed = declared("public", tailnet={"mode": "none"})
    assert tailnet_addresses(FakeRunner(), "alpha", closed) == {}


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("admin@100.64.0.9", {4: "100.64.0.9"}),
        ("100.64.0.9", {4: "100.64.0.9"}),
        ("fd7a:115c:a1e0::9", {6: "fd7a:115c:a1e0::9"}),
    ],
)
def test_a_declared_target_host_wins_over_what_tailscale_says(target: str, found: dict[int, str]) -> None:
    assert tailnet_addresses(FakeRunner(), "alpha", declared(targetHost=target)) == found


def test_an_operator_off_the_tailnet_is_an_error_not_an_absent_host() -> None:
    with pytest.raises(UnreachableError):
        tailnet_addresses(status({}, state="Stopped"), "alpha", declared())


def test_a_node_whose_key_is_about_to_run_out_closes_nothing() -> None:
    now = datetime(2026, 11, 22, tzinfo=UTC)

    def node(days: float | None) -> Peer:
        return Peer("alpha", {4: "100.64.0.2"}, online=True, key_expiry=now + timedelta(days=days) if days else None)

    refuse_short_lived("alpha", node(None), now=now)
    refuse_short_lived("alpha", node(30), now=now)
    refuse_short_lived("alpha", None, now=now)
    with pytest.raises(LockdownError, match="2026-12-21 23:59 UTC; nothing was closed"):
        refuse_short_lived("alpha", node(29.9999), now=now)


ACCOUNT = "mode=tailnet\narmed=yes\nkept=bootstrap\nowner=0123456789abcdef\nleft_s=41\nnow=1700000000\ntailnet=ab12\n"


def test_the_hosts_whole_account_is_understood_or_refused() -> None:
    account = parse_account(ACCOUNT)
    assert (account.mode, account.armed, account.kept, account.left_s) == ("tailnet", True, "bootstrap", 41)
    assert not account.closed_for_good
    done = (
        ACCOUNT.replace("armed=yes", "armed=no")
        .replace("kept=bootstrap", "kept=tailnet")
        .replace("left_s=41", "left_s=")
    )
    assert parse_account(done).closed_for_good
    assert parse_account(done).left_s is None
    for nonsense in (
        "",
        ACCOUNT.replace("now=17", "now=x"),
        ACCOUNT.replace("mode=tailnet", "mode=off"),
        ACCOUNT + "more=1\n",
    ):
        with pytest.raises(LockdownError, match="not understood"):
            parse_account(nonsense)


@pytest.mark.parametrize(("off_s", "refused"), [(0, ""), (-119, ""), (121, "ahead of"), (-86400, "behind")])
def test_a_clock_that_is_minutes_off_stops_everything(off_s: int, refused: str) -> None:
    account = parse_account(ACCOUNT.replace("1700000000", str(1700000000 + off_s)))
    now = datetime.fromtimestamp(1700000000, UTC)
    if not refused:
        refuse_wrong_clock("alpha", account, now=now)
        return
    with pytest.raises(LockdownError, match=f"{refused} this machine's; nothing was changed"):
        refuse_wrong_clock("alpha", account, now=now)
