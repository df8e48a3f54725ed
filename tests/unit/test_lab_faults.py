"""Faults by themselves: how they are written, what the API does under each, and the packet rules that links get."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.errors import LabError
from clawdlets_ops.lab import faults
from clawdlets_ops.lab.addressing import Addressing
from clawdlets_ops.lab.api import Request
from clawdlets_ops.lab.backend import BackendError, LoopbackPool, MachineSpec, Rule, StubBackend
from clawdlets_ops.lab.cloud import Cloud
from clawdlets_ops.lab.distance import MARK, Delay, render_delays, render_rules, sides
from clawdlets_ops.lab.faults import ANSWERS, SHAPES, Fault, FaultBook, FaultyEmulator, Injected, parse_fault
from clawdlets_ops.layout import Layout

TOKEN = "canary".ljust(64, "0")
SERVER = {"name": "alpha", "server_type": "cx23", "image": "debian-12"}
NET = Addressing(7)

WRITTEN = [
    "answer 500 POST /servers times=2",
    "answer rate_limit_exceeded * *",
    "cut POST /servers times=1",
    "lost-answer * *",
    "timeout GET /servers* seconds=2.5",
    "slow GET /actions seconds=1 times=3",
    "action create_server times=1",
    "latency alpha milliseconds=80 from=stranger",
    "loss * percent=20",
    "never-boots alpha",
    "firewall-pending alpha",
    "sshd-late alpha seconds=10",
    "disk-full alpha",
    "scan alpha",
    "clock-skew api seconds=-7200",
]


@pytest.mark.parametrize("text", WRITTEN)
def test_what_is_written_is_what_is_understood(text: str) -> None:
    fault = parse_fault(text.split())
    assert " ".join(fault.words) == text
    assert parse_fault(fault.words) == fault


def test_every_kind_is_among_the_examples() -> None:
    assert {text.split()[0] for text in WRITTEN} == set(SHAPES)


def test_what_is_left_out_means_every_request() -> None:
    assert parse_fault(["answer", "500"]) == Fault("answer", "500", method="*", path="*")
    assert parse_fault(["answer", "500", "POST"]) == Fault("answer", "500", method="POST", path="*")
    assert parse_fault(["cut", "GET", "/v1/servers"]).path == "/servers"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "which fault?"),
        ("meteorite alpha", "no such fault"),
        ("answer", "needs a code"),
        ("answer 418", "'418' is none of 500"),
        ("answer 500 FETCH", "no method of this API"),
        ("answer 500 POST servers", "a path begins with /"),
        ("answer 500 POST /servers twice", "'twice'"),
        ("answer 500 POST /servers times=0", "times=0"),
        ("answer 500 seconds=3", "does not take seconds="),
        ("cut POST /servers times=1 times=2", "the same thing twice"),
        ("timeout POST /servers", "needs seconds="),
        ("timeout POST /servers seconds=soon", "seconds=soon"),
        ("loss alpha percent=120", "at most 100"),
        ("loss alpha percent=nan", "percent=nan"),
        ("loss percent=20", "needs a host"),
        ("loss al/pha percent=20", "cannot be a host's name"),
        ("latency alpha milliseconds=20 from=moon", "no vantage point"),
        ("action explode_server", "'explode_server' is none of create_server"),
        ("never-boots alpha bravo", "'bravo'"),
        ("clock-skew alpha seconds=60", "time namespaces for the monotonic clocks only"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_right_form(text: str, says: str) -> None:
    with pytest.raises(LabError) as caught:
        parse_fault(text.split())
    assert says in str(caught.value)


class Backend(StubBackend):
    """The stub, as the lab's machines ask the book."""

    def __init__(self, book: FaultBook) -> None:
        super().__init__()
        self.book = book

    def create(self, spec: MachineSpec, rules: tuple[Rule, ...] | None) -> None:
        self.book.act("create_server")
        super().create(spec, rules)


@dataclass
class Api:
    book: FaultBook
    emulator: FaultyEmulator
    journal_file: Path

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        sent = {"authorization": f"Bearer {TOKEN}", **headers}
        raw = b"" if body is None else json.dumps(body).encode()
        answer = self.emulator.handle(Request(method, f"/v1{path}", sent, raw))
        return answer.status, answer.payload

    def faulted(self) -> list[tuple[str, str, int, str]]:
        """The journal's lines that name a fault."""
        entries = [json.loads(line) for line in self.journal_file.read_text().splitlines()]
        return [
            (entry["method"], entry["path"], entry["status"], entry["fault"]) for entry in entries if "fault" in entry
        ]

    def add(self, text: str) -> str:
        return self.book.add(parse_fault(text.split())).id

    def journal(self) -> list[tuple[str, str, int]]:
        entries = [json.loads(line) for line in self.journal_file.read_text().splitlines()]
        return [(entry["method"], entry["path"], entry["status"]) for entry in entries]

    def names(self) -> list[str]:
        return [server["name"] for server in self.ask("GET", "/servers")[1]["servers"]]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    book = FaultBook()
    cloud = Cloud(backend=Backend(book), addresses=LoopbackPool(), state_file=None)
    emulator = FaultyEmulator(cloud, token=TOKEN, journal_file=tmp_path / "journal.jsonl", book=book)
    yield Api(book, emulator, tmp_path / "journal.jsonl")
    cloud.close()


@pytest.mark.parametrize("code", list(ANSWERS))
def test_an_answer_is_the_documented_one_and_nothing_is_done(api: Api, code: str) -> None:
    api.add(f"answer {code} POST /servers times=1")
    status, payload = api.ask("POST", "/servers", SERVER)
    assert (status, payload["error"]["code"]) == ANSWERS[code]
    assert api.names() == []
    assert api.ask("POST", "/servers", SERVER)[0] == 201  # one time, as asked for
    assert api.names() == ["alpha"]


def test_only_requests_of_the_pattern_are_hit_and_counted(api: Api) -> None:
    ident = api.add("answer 503 GET /servers/* times=2")
    assert api.ask("GET", "/servers")[0] == 200
    assert api.ask("GET", "/locations")[0] == 200
    assert [api.ask("GET", "/servers/1")[0] for _ in range(3)] == [503, 503, 404]
    assert api.book.all() == (
        Injected(ident, ("answer", "503", "GET", "/servers/*", "times=2"), 2, "spent", "GET /servers/1"),
    )


def test_a_fault_without_a_number_lasts_until_it_is_cleared(api: Api) -> None:
    ident = api.add("answer 500")
    assert [api.ask("GET", "/locations")[0] for _ in range(5)] == [500] * 5
    assert api.book.clear(ident) == 1
    assert api.ask("GET", "/locations")[0] == 200
    assert api.book.all() == ()


def test_the_labs_own_questions_meet_no_fault(api: Api) -> None:
    api.add("answer 500")
    assert api.ask("GET", "/servers", **{"user-agent": "clawdlets-lab"})[0] == 200
    assert api.ask("GET", "/servers", **{"user-agent": "hcloud-python/2"})[0] == 500


def test_a_stranger_without_a_token_meets_no_fault(api: Api) -> None:
    api.add("answer 500")
    assert api.ask("GET", "/servers", authorization="Bearer canary")[0] == 401
    assert api.book.all()[0].hits == 0


@pytest.mark.parametrize(("kind", "there"), [("cut", []), ("lost-answer", ["alpha"])])
def test_a_connection_ends_without_an_answer_before_or_after_the_deed(api: Api, kind: str, there: list[str]) -> None:
    api.add(f"{kind} POST /servers times=1")
    with pytest.raises(ConnectionAbortedError):
        api.ask("POST", "/servers", SERVER)
    assert api.names() == there
    assert api.journal()[0] == ("POST", "/v1/servers", 201 if there else 0)


def test_a_timeout_is_silence_and_then_the_end_and_a_slow_answer_comes(api: Api) -> None:
    api.add("timeout POST /servers seconds=0.3 times=1")
    started = time.monotonic()
    with pytest.raises(ConnectionAbortedError):
        api.ask("POST", "/servers", SERVER)
    assert time.monotonic() - started >= 0.3
    assert api.names() == []
    api.add("slow POST /servers seconds=0.3 times=1")
    started = time.monotonic()
    assert api.ask("POST", "/servers", SERVER)[0] == 201
    assert time.monotonic() - started >= 0.3


def test_a_request_that_waits_goes_on_when_the_fault_is_cleared(api: Api) -> None:
    ident = api.add("slow GET /locations seconds=60")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.ask, "GET", "/locations")
        deadline = time.monotonic() + 5
        while not api.book.all()[0].hits and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not answer.done()
        api.book.clear(ident)
        assert answer.result(timeout=5)[0] == 200


def test_an_action_ends_in_error_and_the_next_one_does_not(api: Api) -> None:
    ident = api.add("action create_server times=1")
    action = api.ask("POST", "/servers", SERVER)[1]["action"]
    deadline = time.monotonic() + 5
    while action["status"] == "running" and time.monotonic() < deadline:
        action = api.ask("GET", f"/actions/{action['id']}")[1]["action"]
    assert action["status"] == "error"
    assert action["error"] == {"code": "action_failed", "message": f"create_server failed (fault {ident})"}
    api.book.act("create_server")  # spent


def test_the_journal_names_the_fault_that_a_request_met_and_no_other_request(api: Api) -> None:
    for text in ("answer 503 GET /servers times=1", "slow GET /servers seconds=0.01 times=1"):
        api.add(text)
    for kind in ("cut", "lost-answer", "timeout"):
        more = " seconds=0.01" if kind == "timeout" else ""
        api.add(f"{kind} POST /ssh_keys{more} times=1")
    for _ in range(3):
        api.ask("GET", "/servers")
    for _ in range(3):
        with pytest.raises(ConnectionAbortedError):
            api.ask("POST", "/ssh_keys", {"name": "canary", "public_key": "canary"})
    assert api.ask("GET", "/locations")[0] == 200
    assert api.faulted() == [
        ("GET", "/v1/servers", 503, "f1: answer 503 GET /servers times=1"),
        ("GET", "/v1/servers", 200, "f2: slow GET /servers seconds=0.01 times=1"),
        ("POST", "/v1/ssh_keys", 0, "f3: cut POST /ssh_keys times=1"),
        ("POST", "/v1/ssh_keys", 422, "f4: lost-answer POST /ssh_keys times=1"),
        ("POST", "/v1/ssh_keys", 0, "f5: timeout POST /ssh_keys seconds=0.01 times=1"),
    ]


def test_the_journal_names_the_fault_of_an_action_where_the_client_learns_of_it(api: Api) -> None:
    api.add("action create_server times=1")
    action = api.ask("POST", "/servers", SERVER)[1]["action"]
    deadline = time.monotonic() + 5
    while action["status"] == "running" and time.monotonic() < deadline:
        action = api.ask("GET", f"/actions/{action['id']}")[1]["action"]
    assert action["status"] == "error"
    assert api.ask("GET", "/locations")[0] == 200
    told = api.faulted()
    assert {fault for *_, fault in told} == {"f1: action create_server times=1"}
    assert {path for _, path, *_ in told} <= {"/v1/servers", f"/v1/actions/{action['id']}"}


def test_the_clouds_clock_is_wrong_as_asked_for_and_the_journals_is_not(tmp_path: Path) -> None:
    book = FaultBook()
    cloud = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=None, clock=book.now)
    emulator = FaultyEmulator(cloud, token=TOKEN, journal_file=tmp_path / "journal.jsonl", book=book)
    skewed = Api(book, emulator, tmp_path / "journal.jsonl")
    behind = skewed.add("clock-skew api seconds=-7200")
    started = datetime.now(UTC).replace(microsecond=0)
    created = datetime.fromisoformat(skewed.ask("POST", "/servers", SERVER)[1]["server"]["created"])
    rate = emulator.handle(Request("GET", "/v1/servers", {"authorization": f"Bearer {TOKEN}"}, b"")).rate
    assert rate is not None
    for seen in (created, datetime.fromtimestamp(rate.reset, UTC), emulator.now()):
        assert timedelta(0) <= seen + timedelta(hours=2) - started < timedelta(minutes=5)
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert all(datetime.fromisoformat(line["ts"]) >= started for line in lines)
    book.clear(behind)
    assert emulator.now() >= started
    cloud.close()


def test_actions_of_another_name_are_left_alone() -> None:
    book = FaultBook()
    book.add(parse_fault(["action", "reboot_server"]))
    book.act("create_server")
    with pytest.raises(BackendError, match="reboot_server failed"):
        book.act("reboot_server")


def test_a_fault_that_cannot_be_made_is_not_in_the_list() -> None:
    def refuse(_ident: str, _fault: Fault) -> None:
        raise LabError("cannot be made")

    book = FaultBook(on_add=refuse)
    with pytest.raises(LabError):
        book.add(parse_fault(["never-boots", "alpha"]))
    assert book.all() == ()


def test_clearing_what_is_not_there_says_what_is() -> None:
    book = FaultBook()
    ident = book.add(parse_fault(["never-boots", "alpha"])).id
    with pytest.raises(LabError, match=ident):
        book.clear("f99")
    assert book.clear(None) == 1
    assert book.clear(None) == 0


def test_without_a_lab_there_is_nobody_to_ask(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for ask in (
        lambda: faults.faults(layout),
        lambda: faults.clear(layout),
        lambda: faults.inject(layout, Fault("scan", "a")),
    ):
        with pytest.raises(LabError, match="no lab"):
            ask()


def test_a_listed_fault_survives_the_wire() -> None:
    listed = Injected("f1", ("scan", "alpha"), 3, "done: nothing", "GET /servers")
    assert Injected.from_json(json.loads(json.dumps(listed.to_json()))) == listed


def test_a_listed_fault_reads_well() -> None:
    assert str(Injected("f1", ("never-boots", "alpha"))) == "f1  never-boots alpha  (armed)"
    met = Injected("f2", ("cut", "*", "*", "times=2"), 2, "spent", "GET /servers")
    assert str(met) == "f2  cut * * times=2  (spent; 2 met, the last GET /servers)"


INTERNET, TAILNET = sides(NET)


def test_a_vantage_point_is_on_one_side_only() -> None:
    at = {name: [side.namespace for side in sides(NET) if side.concerns(Fault("loss", "a", vantage=name))]
          for name in ("*", *faults.VANTAGES)}  # fmt: skip
    assert at["*"] == [NET.internet_ns, NET.tailnet_ns]
    assert at["operator"] == at["stranger"] == [NET.internet_ns]
    assert at["operator-tailnet"] == at["member"] == [NET.tailnet_ns]


def test_on_a_real_tailnet_what_comes_from_its_nodes_crosses_the_internet() -> None:
    (internet,) = sides(NET, nodes=True)
    assert internet.sources["operator-tailnet"] == NET.outside(5)
    text = render_rules(internet, [(Fault("loss", "alpha", percent=100, vantage="member"), "s1")])
    assert f'oifname "s1" ip saddr {NET.outside(6)[0]} drop' in text


def test_loss_is_random_in_both_directions_and_for_one_vantage_point_only() -> None:
    text = render_rules(INTERNET, [(Fault("loss", "alpha", percent=20, vantage="stranger"), "s1")])
    out4, out6 = NET.outside(2)
    assert f'oifname "s1" ip saddr {out4} numgen random mod 100000 < 20000 drop' in text
    assert f'iifname "s1" ip6 daddr {out6} numgen random mod 100000 < 20000 drop' in text
    everything = render_rules(INTERNET, [(Fault("loss", "alpha", percent=100), "s1")])
    assert '    oifname "s1" drop' in everything


def test_a_late_sshd_is_refused_outside_and_silent_on_the_bridge() -> None:
    fault = Fault("sshd-late", "alpha", seconds=3)
    assert 'oifname "s1" tcp dport 22 reject with tcp reset' in render_rules(INTERNET, [(fault, "s1")])
    assert 'oifname "t1" tcp dport 22 drop' in render_rules(TAILNET, [(fault, "t1")])


def test_delayed_frames_pass_once() -> None:
    text = render_delays([Delay("f1s1", "s1", 80, ("198.19.7.2", "2001:2:0:700::2")), Delay("f2s1", "s1", 10, ())])
    lines = [line.strip() for line in text.splitlines()]
    assert lines.index(f"meta mark {MARK:#x} accept") < lines.index('ip saddr 198.19.7.2 fwd to "f1s1"')
    assert lines.index('ip6 saddr 2001:2:0:700::2 fwd to "f1s1"') < lines.index(
        'meta protocol { ip, ip6 } fwd to "f2s1"'
    )
    assert text.count("chain ") == 1


@pytest.mark.skipif(shutil.which("nft") is None, reason="nft is not installed")
@pytest.mark.parametrize("side", [INTERNET, TAILNET], ids=["internet", "tailnet"])
def test_nft_takes_every_rule(side: Any) -> None:
    said = [Fault("loss", "a", percent=0.001), Fault("loss", "a", percent=50, vantage="operator"),
            Fault("never-boots", "a"), Fault("sshd-late", "a", seconds=1)]  # fmt: skip
    text = render_rules(side, [(fault, f"{side.letter}1") for fault in said]) + render_delays([])
    checked = subprocess.run(
        ["unshare", "--net", "--map-root-user", "nft", "--check", "-f", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    if re.search(r"unshare|Operation not permitted", checked.stderr):
        pytest.skip(f"no network namespace here: {checked.stderr.strip()}")
    assert checked.returncode == 0, checked.stderr
