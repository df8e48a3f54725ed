"""The suite's checks of the orchestrator, on good evidence and on evidence with one fault each; and the evidence itself, on a
store that is as it should be and on one that is not."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.orchestrator import evidence, tokens
from clawdlets_ops.verify.expectation import _orchestrator
from clawdlets_ops.verify.suite import test_orchestrator as suite
from clawdlets_ops.verify.suite.reading import Fault, NotApplicable, Unknown
from tests.egress_fleet import host_in

STATE = "/var/lib/clf/orchestrator"
# As a lab host said it, once through the installed program.
FILES = f"""\
755 root root directory 4096 /
755 root root directory 4096 /var
755 root root directory 4096 /var/lib
755 root root directory 4096 /run
755 root root directory 4096 /var/lib/clf
750 root clf-bots directory 60 /run/clf
660 root clf-bots socket 0 /run/clf/orchestrator.sock
700 clf-orchestrator clf-orchestrator directory 4096 {STATE}
600 clf-orchestrator clf-orchestrator regular file 4096 {STATE}/state.sqlite
600 clf-orchestrator clf-orchestrator regular file 90672 {STATE}/state.sqlite-wal
600 clf-orchestrator clf-orchestrator regular file 32768 {STATE}/state.sqlite-shm
"""
USERS = """\
user:root:0:0:/root:/bin/sh
user:admin:1000:1000:/home/admin:/bin/sh
user:bot-maren:998:998::/nologin
user:clf-orchestrator:996:996::/nologin
user:nobody:65534:65534::/nologin
group:root:0:
group:admin:1000:
group:bot-maren:998:
group:clf-orchestrator:996:
group:nogroup:65534:
group:clf-bots:990:bot-maren,admin
group:clf-operators:989:admin"""
LISTEN = """\
LISTEN 0 256 100.64.7.10:18337 0.0.0.0:* users:(("clf-orchestrato",pid=88,fd=9))
LISTEN 0 128 0.0.0.0:22 0.0.0.0:* users:(("sshd",pid=8,fd=3))"""
SAID: dict[str, Any] = {
    "factsVersion": 1,
    "socket": {"root": "ok", "admin": "ok", "bot-maren": "ok", "nobody": "EACCES"},
    "store": {
        "kind": "sqlite",
        "tokens": 2,
        "hashed": 2,
        "livesS": {"environment": [600.0, 600.0], "result": [7200.0, 7200.0]},
        "plaintext": 0,
        "secrets": [],
        "control": True,
    },
    "rehearsal": {
        "lives": [
            *(["-1", 30.0], ["0", 30.0], ["29", 30.0], ["30", 30.0], ["31", 31.0], ["600", 600.0], ["3599", 3599.0]),
            *(["3600", 3600.0], ["3601", 3600.0], ["1000000000000.0", 3600.0], ["'abc'", 600.0], ["None", 600.0]),
            *(["nan", 600.0], ["inf", 3600.0], ["'5m'", 600.0], ["True", 600.0]),
        ],
        "atOnce": {"asked": 50, "granted": 1, "later": "used"},
        "refusals": {
            "another server": "other-machine",
            "another machine": "other-machine",
            "another purpose": "other-purpose",
            "a guess": "unknown",
            "after its end": "expired",
        },
        "stillGood": "granted",
        "many": {"made": 67, "different": 67, "formed": 67},
        "written": {"plaintext": 0, "hashes": 67},
    },
}
ALL = {"ORC-01", "ORC-02", "ORC-03", "ORC-04", "TOK-01", "TOK-02", "TOK-03"}

World = dict[str, Any]


@pytest.fixture(autouse=True)
def marker(pytestconfig: pytest.Config) -> None:
    pytestconfig.addinivalue_line(
        "markers", "check(id, severity, claim, expect, fix, vantage): an entry of the catalogue"
    )


def good(tailnet: str = "tailscale", **orchestrator: Any) -> World:
    host = host_in("smtp-only", {"maren": {}})
    declared = host.orchestrator.model_copy(update={"enable": True, **orchestrator})
    return {
        "expected": {
            "orchestrator": _orchestrator(host.model_copy(update={"orchestrator": declared})),
            "tailnet": {"mode": tailnet},
        },
        "sections": {"files": FILES, "users": USERS, "listen-tcp": LISTEN},
        "said": copy.deepcopy(SAID),
    }


def run(world: World) -> dict[str, str]:
    """check → pass, or what was wrong."""
    texts = {"orchestrator": json.dumps(world["said"]), **world["sections"]}
    facts = {"problem": None, "sections": {name: {"status": 0, "text": text} for name, text in texts.items()}}
    results = {}
    for function in [one for name, one in inspect.getmembers(suite, inspect.isfunction) if name.startswith("test_")]:
        check = next(mark for mark in function.pytestmark if mark.name == "check").kwargs["id"]
        seen: list[str] = []
        try:
            function(world["expected"], facts, seen.append)
            assert seen, f"{check} passes without saying what it saw"
            results[check] = "pass"
        except Fault as error:
            results[check] = f"fail: {error}"
        except Unknown as error:
            results[check] = f"unknown: {error}"
        except NotApplicable as error:
            results[check] = f"n/a: {error}"
    return results


def with_state(results: dict[str, str], state: str) -> set[str]:
    return {check for check, text in results.items() if text.startswith(state)}


def text(name: str, old: str, new: str) -> Callable[[World], None]:
    def seed(world: World) -> None:
        assert old in world["sections"][name], old
        world["sections"][name] = world["sections"][name].replace(old, new)

    return seed


def says(part: str, **changes: Any) -> Callable[[World], None]:
    return lambda world: world["said"][part].update(changes)


def says_in(part: str, inner: str, **changes: Any) -> Callable[[World], None]:
    return lambda world: world["said"][part][inner].update(changes)


def lives(name: str, life: Any) -> Callable[[World], None]:
    def seed(world: World) -> None:
        next(one for one in world["said"]["rehearsal"]["lives"] if one[0] == name)[1] = life

    return seed


def test_a_good_host_passes() -> None:
    assert run(good()) == dict.fromkeys(ALL, "pass")


def test_where_it_is_not_declared_nothing_is_claimed() -> None:
    world = good()
    world["expected"]["orchestrator"] = _orchestrator(host_in("smtp-only", {"maren": {}}))
    assert with_state(run(world), "n/a: hosts.<host>.orchestrator is not enabled") == ALL


FAULTS = [
    ("ORC-01", "world-open", text("files", "660 root clf-bots socket", "666 root clf-bots socket")),
    ("ORC-01", "another group", text("files", "660 root clf-bots socket", "660 root users socket")),
    ("ORC-01", "a file", text("files", "socket 0 /run/clf", "regular file 0 /run/clf")),
    ("ORC-01", "missing", text("files", "660 root clf-bots socket 0 /run/clf/orchestrator.sock\n", "")),
    ("ORC-01", "a folder of the bots", text("files", "750 root clf-bots directory 60", "770 root clf-bots directory 60")),
    ("ORC-01", "a stranger in the group", text("users", "clf-bots:990:bot-maren", "clf-bots:990:bot-maren,nobody")),
    ("ORC-01", "a bot outside", text("users", "clf-bots:990:bot-maren,", "clf-bots:990:")),
    ("ORC-01", "nobody gets in", says("socket", nobody="ok")),
    ("ORC-01", "a bot does not", says("socket", **{"bot-maren": "EACCES"})),
    ("ORC-02", "the folder", text("files", f"700 clf-orchestrator clf-orchestrator directory 4096 {STATE}", f"750 clf-orchestrator clf-orchestrator directory 4096 {STATE}")),
    ("ORC-02", "the database", text("files", "600 clf-orchestrator clf-orchestrator regular file 4096", "640 clf-orchestrator clf-orchestrator regular file 4096")),
    ("ORC-02", "the journal", text("files", "600 clf-orchestrator clf-orchestrator regular file 90672", "644 clf-orchestrator clf-orchestrator regular file 90672")),
    ("ORC-02", "a file of root's", text("files", "600 clf-orchestrator clf-orchestrator regular file 32768", "600 root root regular file 32768")),
    ("ORC-02", "no database", text("files", f"600 clf-orchestrator clf-orchestrator regular file 4096 {STATE}/state.sqlite\n", "")),
    ("ORC-02", "a parent for all", text("files", "755 root root directory 4096 /var/lib/clf\n", "777 root root directory 4096 /var/lib/clf\n")),
    ("ORC-03", "a token", says("store", plaintext=1)),
    ("ORC-03", "a secret", says("store", secrets=["discord_token"])),
    ("ORC-03", "no hash", says("store", hashed=1)),
    ("ORC-04", "IPv4 wildcard", text("listen-tcp", "100.64.7.10:18337", "0.0.0.0:18337")),
    ("ORC-04", "any address", text("listen-tcp", "100.64.7.10:18337", "*:18337")),
    ("ORC-04", "public address", text("listen-tcp", "100.64.7.10:18337", "[2001:db8::1]:18337")),
    ("TOK-01", "longer than 1 h", lives("inf", 36000.0)),
    ("TOK-01", "shorter than 30 s", lives("0", 0.0)),
    ("TOK-01", "the reference's 15 min", lives("3600", 900.0)),
    ("TOK-01", "an hour by default", lives("None", 3600.0)),
    ("TOK-01", "in the store", says("store", livesS={"environment": [600.0, 7200.0]})),
    ("TOK-02", "two at once", says_in("rehearsal", "atOnce", granted=2)),
    ("TOK-02", "again", says_in("rehearsal", "atOnce", later="granted")),
    ("TOK-03", "after its end", says_in("rehearsal", "refusals", **{"after its end": "granted"})),
    ("TOK-03", "another machine", says_in("rehearsal", "refusals", **{"another machine": "granted"})),
    ("TOK-03", "short ones", says_in("rehearsal", "many", formed=66)),
    ("TOK-03", "the same twice", says_in("rehearsal", "many", different=66)),
    ("TOK-03", "written down", says_in("rehearsal", "written", plaintext=1)),
]  # fmt: skip
DOUBTS = [
    ("ORC-01", "root cannot either", says("socket", root="ENOENT")),
    ("ORC-01", "nobody did not try", lambda world: world["said"]["socket"].pop("nobody")),
    ("ORC-01", "another error", says("socket", nobody="ETIMEDOUT")),
    ("ORC-03", "the search is blind", says("store", control=False)),
    ("ORC-03", "no list", says("store", secrets=None)),
    ("ORC-04", "nothing listens", text("listen-tcp", "100.64.7.10:18337", "127.0.0.1:18338")),
    ("TOK-01", "a life not asked for", lambda world: world["said"]["rehearsal"]["lives"].pop(0)),
    ("TOK-01", "no number", lives("inf", "long")),
    ("TOK-02", "nobody got any", says_in("rehearsal", "atOnce", granted=0)),
    ("TOK-02", "fewer than fifty", says_in("rehearsal", "atOnce", asked=2)),
    ("TOK-02", "refused for something else", says_in("rehearsal", "atOnce", later="expired")),
    ("TOK-03", "the right one is refused too", says("rehearsal", stillGood="expired")),
    ("TOK-03", "no hash is found", says_in("rehearsal", "written", hashes=0)),
    ("TOK-03", "nobody guessed", lambda world: world["said"]["rehearsal"]["refusals"].pop("a guess")),
]


@pytest.mark.parametrize(("check", "what", "seed"), FAULTS, ids=[f"{check} {what}" for check, what, _ in FAULTS])
def test_a_fault_turns_its_check_red(check: str, what: str, seed: Callable[[World], None]) -> None:
    world = good()
    seed(world)
    results = run(world)
    assert with_state(results, "fail") == {check}, results
    assert with_state(results, "unknown") == set(), results


@pytest.mark.parametrize(("check", "what", "seed"), DOUBTS, ids=[f"{check} {what}" for check, what, _ in DOUBTS])
def test_what_cannot_be_seen_is_unknown(check: str, what: str, seed: Callable[[World], None]) -> None:
    world = good()
    seed(world)
    results = run(world)
    assert with_state(results, "unknown") == {check}, results
    assert with_state(results, "fail") == set(), results


def test_without_the_program_only_what_the_host_itself_shows_is_judged() -> None:
    for words in ("absent", "", "Traceback: no", '{"factsVersion": 2, "socket": {}, "store": {}, "rehearsal": {}}'):
        world = good()
        world["sections"]["orchestrator"] = words
        results = run(world)
        assert with_state(results, "unknown") == ALL - {"ORC-02", "ORC-04"}, (words, results)


def test_of_postgresql_there_is_no_file_to_look_at() -> None:
    world = good(store="postgresql")
    world["sections"]["files"] = "\n".join(line for line in FILES.splitlines() if STATE not in line)
    world["said"]["store"] = {"kind": "postgresql"}
    results = run(world)
    assert with_state(results, "n/a") == {"ORC-02", "ORC-03"}
    assert with_state(results, "pass") == ALL - {"ORC-02", "ORC-03"}


def test_without_a_tailnet_nothing_has_to_listen_but_a_wildcard_is_a_fault() -> None:
    world = good(tailnet="none")
    text("listen-tcp", "100.64.7.10:18337", "127.0.0.1:18338")(world)
    assert run(world)["ORC-04"].startswith("n/a")
    text("listen-tcp", "127.0.0.1:18338", "0.0.0.0:18337")(world)
    assert run(world)["ORC-04"].startswith("fail")


TOKEN = "0123456789abcdef" * 4
ROW = {
    "token_hash": hashlib.sha256(TOKEN.encode()).hexdigest(),
    "purpose": "environment",
    "created_at": 0,
    "expires_at": 600_000,
}
PAGE = b"CREATE TABLE tokens (token_hash " + str(ROW["token_hash"]).encode() + b"environment"
KNOWN = [("discord_token", b"canary-of-this-test")]


def test_a_clean_store_is_found_clean() -> None:
    found = evidence.judge_bytes([ROW], [PAGE, b"wal"], KNOWN)
    assert found == {
        "tokens": 1,
        "hashed": 1,
        "livesS": {"environment": [600.0, 600.0]},
        "plaintext": 0,
        "secrets": [],
        "control": True,
    }


@pytest.mark.parametrize("around", [b"%s", b"ab%s", b'{"token": "%scd"}'])
def test_a_token_in_a_freed_page_is_found_whatever_stands_beside_it(around: bytes) -> None:
    found = evidence.judge_bytes([ROW], [PAGE, around % TOKEN.encode()], KNOWN)
    assert (found["plaintext"], found["control"]) == (1, True)


def test_a_secret_in_the_journal_is_named_and_not_shown() -> None:
    found = evidence.judge_bytes([ROW], [PAGE, b"..canary-of-this-test.."], KNOWN)
    assert found["secrets"] == ["discord_token"]
    assert "canary" not in json.dumps(found)


def test_a_search_that_does_not_find_the_hashes_says_so() -> None:
    assert evidence.judge_bytes([ROW], [b"CREATE TABLE tokens (token_hash"], KNOWN)["control"] is False
    assert evidence.judge_bytes([], [b""], KNOWN)["control"] is False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "private"
    made.mkdir(mode=0o700)
    return made


def judged(rehearsal: dict[str, Any]) -> dict[str, str]:
    world = good()
    world["said"]["rehearsal"] = rehearsal
    return {check: told for check, told in run(world).items() if told != "pass"}


def test_the_code_as_it_is_passes_its_rehearsal(folder: Path) -> None:
    said = evidence.rehearse(folder)
    assert judged(said) == {}
    assert not [run for run in json.dumps(said).split('"') if len(run) == 64], "a token or a hash is told"


@pytest.mark.parametrize(
    ("check", "name", "value"),
    [
        ("TOK-01", "TTL_MAX_S", 36_000),
        ("TOK-01", "TTL_MIN_S", 1),
        ("TOK-01", "TTL_DEFAULT_S", 3_600),
        ("TOK-02", "_within_grace", lambda *_: True),
        ("TOK-03", "_hash", lambda token: token),
    ],
)
def test_code_that_is_wrong_does_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, check: str, name: str, value: Any
) -> None:
    monkeypatch.setattr(tokens, name, value)
    found = judged(evidence.rehearse(folder))
    assert found.keys() == {check}
    assert found[check].startswith("fail: "), found
