"""One-time tokens and the tailnet listener, as real HTTP: replayed, expired, guessed, of another machine, fifty at once."""

from __future__ import annotations

import http.client
import json
import logging
import math
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from clawdlets_ops.errors import OrchestratorError
from clawdlets_ops.orchestrator.app import quiet
from clawdlets_ops.orchestrator.bootstrap import RateLimit, make_bootstrap_app
from clawdlets_ops.orchestrator.clock import SteadyClock
from clawdlets_ops.orchestrator.daemon import Config, secret_files
from clawdlets_ops.orchestrator.queue import Queue
from clawdlets_ops.orchestrator.serving import Bounds, Server, server
from clawdlets_ops.orchestrator.store import Store, open_sqlite
from clawdlets_ops.orchestrator.tailnode import listen_address, whois
from clawdlets_ops.orchestrator.tokens import GRACE_S, Asker, Grant, Purpose, Refused, Tokens, clamp_ttl_s
from clawdlets_ops.orchestrator.vending import Needs, SecretFiles, Vending

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

START_MS = 1_700_000_000_000
NODE, SERVER = "cattle-scout-1", 4711
CANARY = "canary-model-key-77ab12cd"


class HandClock:
    def __init__(self) -> None:
        self.now = START_MS

    def __call__(self) -> int:
        return self.now


@dataclass
class Site:
    """The listener on loopback, with a store, secrets in files, and a tailnet that says what the test tells it."""

    folder: Path
    clock: HandClock
    store: Store
    queue: Queue
    tokens: Tokens
    port: int = 0
    node: str | Exception | None = NODE
    needs: Needs = field(default_factory=lambda: Needs({"MODEL_KEY": "model_key"}))
    asked: list[str] = field(default_factory=list)

    def node_of(self, address: str, port: int) -> str | None:
        self.asked.append(address)
        if isinstance(self.node, Exception):
            raise self.node
        return self.node

    def secret(self, name: str, value: str) -> None:
        path = self.folder / "secrets" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(value)

    def issue(self, *, bound: bool = True, purpose: Purpose = Purpose.ENVIRONMENT, ttl_s: Any = 600) -> str:
        job_id = self.queue.enqueue("later", {}, requester="scout")
        grant = Grant(job_id, "scout", NODE, purpose, env_keys=("MODEL_KEY",), public_env={"LANG": "C"})
        token = self.tokens.issue(grant, ttl_s=ttl_s).reveal()
        if bound:
            assert self.tokens.bind(job_id, server_id=SERVER) == 1
        self.job_id = job_id
        return token

    def ask(self, method: str, target: str, token: str | None, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {"x-clf-server-id": str(SERVER)} | {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            sent["authorization"] = f"Bearer {token}"
        try:
            connection.request(method, target, None if body is None else json.dumps(body), sent)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def fetch(self, token: str | None, **headers: str) -> tuple[int, Any]:
        return self.ask("GET", "/v1/cattle/env", token, **headers)

    @property
    def needles(self) -> Any:
        return lambda text: [
            one.name for one in self.folder.rglob("*") if one.is_file() and text.encode() in one.read_bytes()
        ]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    store, clock = open_sqlite(folder / "state.sqlite"), HandClock()
    made = Site(tmp_path, clock, store, Queue(store, clock), Tokens(store, clock))
    made.secret("model_key", CANARY + "\n")
    vending = Vending(lambda grant: made.needs, SecretFiles([tmp_path / "secrets"]))
    app = make_bootstrap_app(
        made.tokens, made.queue, vending, made.node_of, result_bytes=2048, rate=RateLimit(1000, 1000)
    )
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    made.port = listening.getsockname()[1]
    running: Server = server(quiet(app), Bounds(in_all=256, of_one=128, head_s=2))
    thread = threading.Thread(target=lambda: uvloop.run(running.serve(sockets=[listening])))
    thread.start()
    yield made
    running.should_exit = True
    thread.join()
    store.close()


# --- TTL, entropy, storage (TOK-01, TOK-03) ---


@pytest.mark.parametrize(
    ("ttl", "seconds"),
    [
        (-1, 30),
        (0, 30),
        (29, 30),
        (30, 30),
        (31, 31),
        (300, 300),
        (3599, 3599),
        (3600, 3600),
        (3601, 3600),
        (1e12, 3600),
        (math.inf, 3600),
        (-math.inf, 30),
        (math.nan, 600),
        ("abc", 600),
        ("5m", 600),
        (None, 600),
        (True, 600),
    ],
)
def test_a_tokens_life_is_clamped_to_30_s_to_1_h(ttl: object, seconds: int) -> None:
    assert clamp_ttl_s(ttl) == seconds


@given(st.one_of(st.integers(), st.floats(), st.text(), st.none(), st.booleans(), st.binary(), st.lists(st.integers())))
def test_whatever_is_asked_for_a_token_lives_30_s_to_1_h(ttl: object) -> None:
    assert 30 <= clamp_ttl_s(ttl) <= 3600


def test_a_token_is_32_random_bytes_and_only_its_hash_is_stored(site: Site) -> None:
    made = {site.issue() for _ in range(50)}
    assert len(made) == 50
    assert all(re.fullmatch(r"[0-9a-f]{64}", token) for token in made)
    rows = site.store.read(lambda connection: connection.exec_driver_sql("SELECT token_hash FROM tokens").fetchall())
    assert all(re.fullmatch(r"[0-9a-f]{64}", row[0]) for row in rows)
    assert {row[0] for row in rows} & made == set()
    assert site.needles(rows[0][0]), "the search finds what is there"
    for token in made:
        assert site.needles(token) == []
        assert site.needles(token.upper()) == []


# --- the environment ---


def test_a_machine_gets_what_its_persona_needs_and_nothing_else(site: Site) -> None:
    site.secret("hcloud_token", "canary-provider-token-11aa")
    status, answer = site.fetch(site.issue())
    assert (status, answer["ok"], answer["env"]) == (200, True, {"MODEL_KEY": CANARY, "LANG": "C"})
    assert "canary-provider" not in json.dumps(answer)
    assert answer["result"]["path"] == "/v1/cattle/result"


def test_a_token_is_good_once(site: Site) -> None:
    token = site.issue()
    assert site.fetch(token)[0] == 200
    assert site.fetch(token) == (401, {"ok": False, "error": {"message": "invalid/expired token"}})


def test_of_fifty_at_once_one_wins(site: Site) -> None:
    token = site.issue()
    barrier, seen = threading.Barrier(50), []

    def ask() -> None:
        barrier.wait()
        seen.append(site.fetch(token)[0])

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [200] + [401] * 49


def test_of_fifty_at_once_one_wins_in_the_store_itself(site: Site) -> None:
    token = site.issue()
    barrier, won, lost = threading.Barrier(50), [], []

    def ask(number: int) -> None:
        barrier.wait()
        try:
            won.append(
                site.tokens.redeem(token, Purpose.ENVIRONMENT, Asker("100.64.0.9", NODE, SERVER), lambda g: number)
            )
        except Refused as refused:
            lost.append(refused.reason)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), lost) == (1, ["used"] * 49)


def test_a_lost_answer_may_be_fetched_again_for_a_moment_by_the_same_fetch(site: Site) -> None:
    token = site.issue()
    assert site.fetch(token, x_clf_fetch_id="a1b2c3d4e5")[0] == 200
    assert site.fetch(token, x_clf_fetch_id="a1b2c3d4e5")[0] == 200
    assert site.fetch(token, x_clf_fetch_id="another0one")[0] == 401
    assert site.fetch(token)[0] == 401
    site.clock.now += GRACE_S * 1000
    assert site.fetch(token, x_clf_fetch_id="a1b2c3d4e5")[0] == 200
    site.clock.now += 1
    assert site.fetch(token, x_clf_fetch_id="a1b2c3d4e5")[0] == 401


def test_a_lost_answer_is_not_for_another_address(site: Site) -> None:
    token = site.issue()
    first = Asker("100.64.0.9", NODE, SERVER, "a1b2c3d4e5")
    assert site.tokens.redeem(token, Purpose.ENVIRONMENT, first, lambda grant: 1) == 1
    other = Asker("100.64.0.10", NODE, SERVER, "a1b2c3d4e5")
    with pytest.raises(Refused, match="other-machine"):
        site.tokens.redeem(token, Purpose.ENVIRONMENT, other, lambda grant: 1)


def test_an_expired_a_guessed_and_a_malformed_token_are_refused_alike(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    expired = site.issue(ttl_s=30)
    site.clock.now += 30_000
    answers = [site.fetch(token) for token in (expired, "0" * 64, "g" * 64, "short", "é" * 3, expired.upper())]
    assert {status for status, _ in answers} == {401}
    assert len({json.dumps(answer) for _, answer in answers}) == 1
    reasons = re.findall(r"refused \(([a-z-]+)\)", caplog.text)
    assert reasons == ["expired", "unknown", "malformed", "malformed", "malformed", "malformed"]
    assert expired not in caplog.text
    assert "0" * 64 not in caplog.text


def test_a_token_from_before_the_clock_was_set_back_is_refused(site: Site) -> None:
    token = site.issue()
    site.clock.now -= 3600_000
    assert site.fetch(token)[0] == 401


def test_the_environment_is_looked_at_before_the_token_is_used_up(site: Site) -> None:
    token = site.issue()
    (site.folder / "secrets" / "model_key").unlink()
    message = "missing required variable on the host: MODEL_KEY"
    for _ in range(2):
        assert site.fetch(token) == (500, {"ok": False, "error": {"message": message}})
    site.secret("model_key", CANARY)
    assert site.fetch(token)[0] == 200


def test_of_a_group_one_variable_is_enough(site: Site) -> None:
    site.needs = Needs({"MODEL_KEY": "model_key", "OTHER": "other_key"}, any_of=[["MODEL_KEY", "OTHER"]])
    token = site.issue()
    (site.folder / "secrets" / "model_key").unlink()
    assert site.fetch(token)[0] == 500
    site.secret("model_key", CANARY)
    assert site.fetch(token)[1]["env"]["MODEL_KEY"] == CANARY


def test_a_token_is_bound_to_its_server_its_node_and_then_its_address(site: Site) -> None:
    unbound = site.issue(bound=False)
    assert site.fetch(unbound)[0] == 503
    token = site.issue()
    assert site.fetch(token, x_clf_server_id="4712")[0] == 401
    assert site.fetch(token, x_clf_server_id="")[0] == 401
    site.node = "somebody-else"
    assert site.fetch(token)[0] == 401
    site.node = OrchestratorError("tailscaled does not answer")
    assert site.fetch(token)[0] == 503, "unknown is not taken for good"
    site.node = NODE
    assert site.fetch(token)[0] == 200
    assert set(site.asked) == {"127.0.0.1"}


def test_a_token_bound_to_an_address_is_good_from_there_only(site: Site) -> None:
    token = site.issue()
    site.tokens.bind(site.job_id, server_id=SERVER, address="100.64.0.9")
    assert site.fetch(token)[0] == 401


def test_a_token_of_a_job_that_has_ended_is_refused(site: Site) -> None:
    token = site.issue()
    site.queue.cancel(site.job_id)
    assert site.fetch(token)[0] == 401
    other = site.issue()
    assert site.tokens.revoke(site.job_id) == 1
    assert site.fetch(other)[0] == 401


def test_a_new_token_of_a_job_voids_the_one_before(site: Site) -> None:
    old = site.issue()
    grant = Grant(site.job_id, "scout", NODE, Purpose.ENVIRONMENT, env_keys=("MODEL_KEY",), server_id=SERVER)
    new = site.tokens.issue(grant).reveal()
    assert site.fetch(old)[0] == 401
    assert site.fetch(new)[0] == 200


def test_tokens_are_pruned_after_their_time(site: Site) -> None:
    site.issue(ttl_s=30)
    site.clock.now += 30_000 + 3600_000
    assert site.tokens.prune() == 0
    site.clock.now += 1
    assert site.tokens.prune() == 1


def test_tries_are_limited_by_address() -> None:
    moment = [0.0]
    rate = RateLimit(3, 0.5, monotonic=lambda: moment[0])
    assert [rate.allows("a") for _ in range(4)] == [True, True, True, False]
    assert rate.allows("b")
    moment[0] += 2
    assert [rate.allows("a") for _ in range(2)] == [True, False]


# --- the result ---


def test_a_result_is_taken_once_with_its_own_token(site: Site) -> None:
    token = site.issue()
    result = site.fetch(token)[1]["result"]
    assert site.ask("POST", result["path"], token, {"exit": 0})[0] == 401, "the environment's token is not for this"
    assert site.fetch(result["token"])[0] == 401, "and the other way round"
    assert site.ask("POST", result["path"], result["token"], {"exit": 0, "out": "done"}) == (200, {"ok": True})
    assert site.ask("POST", result["path"], result["token"], {"exit": 1})[0] == 401
    assert site.queue.get(site.job_id).task_result == {"exit": 0, "out": "done"}


@pytest.mark.parametrize("size", [2048, 2049, 20_480])
def test_a_result_is_bounded_and_a_larger_one_costs_no_token(site: Site, size: int) -> None:
    result = site.fetch(site.issue())[1]["result"]
    body = {"out": ""}
    body["out"] = "x" * (size - len(json.dumps(body)))
    try:
        status, _ = site.ask("POST", result["path"], result["token"], body)
    except (BrokenPipeError, ConnectionResetError):
        status = 413
    assert status == (200 if size <= 2048 else 413)
    if size > 2048:
        assert site.ask("POST", result["path"], result["token"], {"exit": 0})[0] == 200


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff"])
def test_a_result_that_is_no_object_costs_no_token(site: Site, raw: bytes) -> None:
    result = site.fetch(site.issue())[1]["result"]
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
    headers = {"authorization": f"Bearer {result['token']}", "x-clf-server-id": str(SERVER)}
    connection.request("POST", result["path"], raw, headers)
    status = connection.getresponse().status
    connection.close()
    assert status == (200 if raw == b"" else 400)


# --- what is logged, where it listens, where secrets come from ---


def test_every_try_is_logged_and_no_token_and_no_value(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = site.issue()
    status, answer = site.fetch(token)
    assert status == 200
    site.fetch(token)
    site.fetch(None)
    site.ask("POST", answer["result"]["path"], answer["result"]["token"], {"out": "canary-result-1f"})
    lines = [record.getMessage() for record in caplog.records if record.name == "clf.bootstrap"]
    assert [line.rpartition(": ")[2] for line in lines[:3]] == ["redeemed", "refused (used)", "refused (missing)"]
    for secret in (token, answer["result"]["token"], CANARY, "canary-result-1f"):
        assert secret not in caplog.text
    assert "127.0.0.1" in caplog.text


@pytest.mark.parametrize(
    "text", ["0.0.0.0", "::", "127.0.0.1", "192.0.2.1", "100.128.0.1", "*", "", "localhost", "::ffff:0.0.0.0"]
)
def test_the_listener_refuses_wildcards_and_what_is_not_the_tailnet(text: str) -> None:
    with pytest.raises(OrchestratorError):
        listen_address(text)


@pytest.mark.parametrize("text", ["100.64.0.1", "100.127.255.254", "fd7a:115c:a1e0::1"])
def test_the_listener_takes_an_address_of_the_tailnet(text: str) -> None:
    assert listen_address(text) == text


def test_whois_asks_tailscaled_and_takes_silence_for_unknown(tmp_path: Path) -> None:
    with pytest.raises(OrchestratorError, match="does not say"):
        whois("100.64.0.9", 40000, path=str(tmp_path / "nobody.sock"))


def test_answers_are_not_to_be_kept(site: Site) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
    connection.request(
        "GET", "/v1/cattle/env", headers={"authorization": f"bearer \t{site.issue()}", "x-clf-server-id": "4711"}
    )
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert answer.status == 200
    assert (answer.getheader("cache-control"), answer.getheader("x-content-type-options")) == ("no-store", "nosniff")


def test_secrets_come_from_systemds_credentials_first_and_never_from_the_environment(tmp_path: Path) -> None:
    for folder, value in (("credentials", "first"), ("run", "second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model_key").write_text(value)
    (tmp_path / "run" / "other_key").write_text("only")
    (tmp_path / "run" / "empty").write_text("")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "run" / "other_key")
    config = Config.model_validate_json(json.dumps({"secretFolders": [str(tmp_path / "run")]}))
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"), "model_key": "no", "ABSENT": "no"}
    secrets = secret_files(config, environ)
    found = {name: secrets.get(name) for name in ("model_key", "other_key", "absent")}
    assert {name: value and value.reveal() for name, value in found.items()} == {
        "model_key": "first",
        "other_key": "only",
        "absent": None,
    }
    for name in ("../run/model_key", "/etc/passwd", "ABSENT", "link"):
        with pytest.raises(OrchestratorError):
            secrets.get(name)


# --- the clock ---


def test_the_steady_clock_does_not_follow_a_wall_clock_that_jumps() -> None:
    wall, boot = [1_000_000], [50]
    clock = SteadyClock(lambda: wall[0], lambda: boot[0])
    assert clock() == 1_000_000
    wall[0] += 3_600_000
    boot[0] += 10
    assert clock() == 1_000_010
    assert clock.drift_ms() == 3_599_990
    wall[0] -= 7_200_000
    assert clock() == 1_000_010


def test_the_steady_clock_runs() -> None:
    clock = SteadyClock()
    begun = clock()
    deadline = time.monotonic() + 10
    while clock() == begun:
        assert time.monotonic() < deadline
    assert abs(clock.drift_ms()) < 5_000
