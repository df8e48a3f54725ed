"""Our client against the emulator: a change is sent once, whatever becomes of its answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hcloud import Client
from hcloud.images import Image
from hcloud.server_types import ServerType

from clawdlets_ops.errors import CloudError, OutcomeUnknown, SettingsError
from clawdlets_ops.hetzner import FirewallRule, HetznerCloud
from clawdlets_ops.lab.cloud import BackendError, Cloud, LoopbackPool, StubBackend
from clawdlets_ops.lab.faults import FaultBook, FaultyEmulator, parse_fault
from clawdlets_ops.sensitive import Secret
from tests.contract.emulator_lab import TOKEN

pytestmark = pytest.mark.contract

RULES = (FirewallRule("in", "tcp", "22", ("203.0.113.0/24",), "ssh"),)


class Place:
    """A server and its firewall, and a client of ours that waits one second for an answer."""

    def __init__(self, folder: Path) -> None:
        self.backend = StubBackend()
        self.api = Cloud(backend=self.backend, addresses=LoopbackPool(), state_file=folder / "cloud.json")
        self._journal_file = folder / "journal.jsonl"
        self._book = FaultBook()
        self.emulator = FaultyEmulator(self.api, token=TOKEN, journal_file=self._journal_file, book=self._book)

    def furnish(self) -> None:
        self.client = Client(TOKEN, api_endpoint=self.emulator.endpoint, poll_interval=0.01, timeout=10)
        self.client.servers.create(
            "alpha", ServerType(name="cx23"), Image(name="debian-13")
        ).action.wait_until_finished()
        self.client.firewalls.create("alpha-edge")
        self.cloud = HetznerCloud(
            Secret(TOKEN), self.emulator.endpoint, poll_interval_s=0.01, order_timeout_s=1.0, sleep=lambda _s: None
        )
        server, edge = self.cloud.server("alpha"), self.cloud.firewall("alpha-edge")
        assert server is not None
        assert edge is not None
        self.server, self.edge = server, edge

    def fault(self, words: str) -> None:
        self._book.add(parse_fault(words.split()))

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._journal_file.read_text().splitlines()]

    def asked(self, method: str, ending: str) -> int:
        return sum(entry["method"] == method and entry["path"].endswith(ending) for entry in self.entries())

    @property
    def hits(self) -> int:
        """How many requests met a fault; one that was given up is in no journal yet."""
        return sum(one.hits for one in self._book.all())

    @property
    def rebuilt(self) -> int:
        return [call[0] for call in self.backend.calls].count("rebuild")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    place.emulator.start()
    try:
        place.furnish()
        yield place
    finally:
        place.emulator.stop()
        place.api.close()


def test_a_rebuild_is_one_request_and_is_waited_for(place: Place) -> None:
    place.cloud.rebuild(place.server, "debian-12")
    assert (place.rebuilt, place.asked("POST", "/actions/rebuild")) == (1, 1)


def test_a_protected_server_is_protected_again_after_its_rebuild(place: Place) -> None:
    bound = place.client.servers.get_by_id(place.server.id)
    bound.change_protection(delete=True, rebuild=True).wait_until_finished()
    place.cloud.rebuild(place.server, "debian-12")
    assert place.client.servers.get_by_id(place.server.id).protection == {"delete": True, "rebuild": True}
    assert place.rebuilt == 1


@pytest.mark.parametrize(
    "fault", ["lost-answer POST /servers/*", "slow POST /servers/* seconds=2", "answer 504 POST /servers/*"]
)
def test_a_rebuild_without_an_answer_is_not_asked_for_again(place: Place, fault: str) -> None:
    place.fault(fault)
    with pytest.raises(OutcomeUnknown, match="alpha"):
        place.cloud.rebuild(place.server, "debian-12")
    assert place.hits == 1


@pytest.mark.parametrize("code", ["429", "conflict"])
def test_what_was_not_begun_may_be_asked_again(place: Place, code: str) -> None:
    place.fault(f"answer {code} POST /servers/* times=1")
    place.cloud.rebuild(place.server, "debian-12")
    assert (place.rebuilt, place.asked("POST", "/actions/rebuild")) == (1, 2)


def test_a_rebuild_is_not_begun_again_when_it_cannot_be_waited_for(place: Place) -> None:
    place.cloud._client._client._retry_max_retries = 0  # python-hcloud would sleep
    place.fault("answer 429 GET /actions/*")
    with pytest.raises(OutcomeUnknown, match="the end of rebuild was not seen"):
        place.cloud.rebuild(place.server, "debian-12")
    assert place.asked("POST", "/actions/rebuild") == 1


def test_a_rebuild_that_fails_says_so(place: Place) -> None:
    def broken(*_: object) -> None:
        raise BackendError("no_space", "the disk is full")

    place.backend.rebuild = broken  # type: ignore[method-assign]
    with pytest.raises(CloudError, match=r"rebuild did not succeed.*the disk is full"):
        place.cloud.rebuild(place.server, "debian-12")


def test_an_image_that_is_not_there_is_refused_before_anything(place: Place) -> None:
    with pytest.raises(CloudError, match="no image"):
        place.cloud.rebuild(place.server, "plan-9")
    assert place.asked("POST", "/actions/rebuild") == 0


@pytest.mark.parametrize("fault", ["lost-answer {} /firewalls/*", "slow {} /firewalls/* seconds=2"])
def test_rules_and_labels_are_sent_once(place: Place, fault: str) -> None:
    place.fault(fault.format("POST"))
    place.fault(fault.format("PUT"))
    with pytest.raises(OutcomeUnknown, match="rules"):
        place.cloud.set_rules(place.edge, RULES)
    with pytest.raises(OutcomeUnknown, match="labels"):
        place.cloud.set_labels(place.edge, {"env": "lab"})
    assert place.hits == 2


def test_rules_and_labels_arrive_as_they_were_asked_for(place: Place) -> None:
    place.cloud.set_rules(place.edge, RULES)
    place.cloud.set_labels(place.edge, {"env": "lab"})
    found = place.cloud.firewall("alpha-edge")
    assert found is not None
    assert (found.rules, dict(found.labels)) == (RULES, {"env": "lab"})


def test_a_rule_says_no_more_than_it_has(place: Place) -> None:
    """Somebody's own rule is put back as it was: one of ICMP has no port."""
    ping = FirewallRule("in", "icmp", None, ("0.0.0.0/0",), "")
    out = FirewallRule("out", "tcp", "443", ("203.0.113.0/24",), "")
    place.cloud.set_rules(place.edge, (ping, out))
    sent = [entry["body"] for entry in place.entries() if entry["path"].endswith("/actions/set_rules")]
    assert sent[-1] == {
        "rules": [
            {"direction": "in", "protocol": "icmp", "source_ips": ["0.0.0.0/0"]},
            {"direction": "out", "protocol": "tcp", "port": "443", "destination_ips": ["203.0.113.0/24"]},
        ]
    }


def test_a_token_that_is_none_is_told_as_such(place: Place) -> None:
    stranger = HetznerCloud(Secret("canary" * 10 + "none"), place.emulator.endpoint, sleep=lambda _s: None)
    with pytest.raises(SettingsError, match="does not accept this token"):
        stranger.set_labels(place.edge, {})
