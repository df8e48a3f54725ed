import json

import pytest

from clawdlets_ops.errors import ClawdletsError, UnreachableError
from clawdlets_ops.tailnet import find_peer, peers
from clawdlets_ops.testing import FakeRunner


def status(*peer: dict[str, object], state: str = "Running") -> dict[str, object]:
    return {"BackendState": state, "Peer": {f"nodekey:{i}": entry for i, entry in enumerate(peer)}}


ALPHA = {
    "HostName": "alpha",
    "TailscaleIPs": ["100.64.0.7", "fd7a:115c:a1e0::7"],
    "Online": True,
    "KeyExpiry": "2026-06-01T00:00:00Z",
}


def runner(document: object, exit_code: int = 0) -> FakeRunner:
    return FakeRunner(script=[(("tailscale", "status"), (exit_code, json.dumps(document)))])


def test_a_peer_has_its_addresses_by_family_and_its_expiry() -> None:
    peer = find_peer(runner(status(ALPHA)), "alpha")
    assert peer is not None
    assert peer.addresses == {4: "100.64.0.7", 6: "fd7a:115c:a1e0::7"}
    assert peer.key_expiry is not None
    assert peer.key_expiry.year == 2026


def test_an_offline_or_absent_peer_is_none_and_an_online_twin_wins() -> None:
    assert find_peer(runner(status({**ALPHA, "Online": False})), "alpha") is None
    assert find_peer(runner(status()), "alpha") is None
    twin = find_peer(runner(status({**ALPHA, "Online": False, "TailscaleIPs": ["100.64.0.9"]}, ALPHA)), "alpha")
    assert twin is not None
    assert twin.addresses[4] == "100.64.0.7"


def test_of_two_online_the_younger_is_the_host_and_the_other_its_forerunner() -> None:
    old = {**ALPHA, "Created": "2026-01-31T10:00:00.9Z", "TailscaleIPs": ["100.64.0.8"]}
    new = {**ALPHA, "Created": "2026-02-01T09:00:00Z", "TailscaleIPs": ["100.64.0.9"]}
    for pair in ((old, new), (new, old)):
        found = find_peer(runner(status(*pair)), "alpha")
        assert found is not None
        assert found.addresses == {4: "100.64.0.9"}


def test_a_peer_without_expiry_does_not_expire() -> None:
    assert peers(status({**ALPHA, "KeyExpiry": None}))[0].key_expiry is None


@pytest.mark.parametrize("state", ["Stopped", "NeedsLogin", "unknown"])
def test_an_operator_who_is_not_on_the_tailnet_is_told(state: str) -> None:
    with pytest.raises(UnreachableError, match="tailscale up"):
        peers(status(state=state))


def test_a_failing_tailscale_is_an_error_not_an_empty_tailnet() -> None:
    with pytest.raises(ClawdletsError, match="tailscaled running"):
        find_peer(runner({}, exit_code=1), "alpha")
