"""What nobody should send, sent to a running emulator: the documented error, a whole state, and answers for everybody else."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from clawdlets_ops.lab.backend import StubBackend
from clawdlets_ops.lab.connections import BODY_LIMIT_BYTES, HEAD_LIMIT_BYTES, MAX_CONNECTIONS
from clawdlets_ops.lab.ratelimit import Budget
from tests.contract.emulator_lab import KEY, TOKEN, Lab, running_lab

PARALLEL = 2000
NAMES = 500
WITHIN_S = 60.0
PLENTY = 10**9
AUTHORIZED = f"Authorization: Bearer {TOKEN}\r\n"
SERVER = {"name": "alpha", "server_type": "cx23", "image": "debian-12"}

EMULATOR = """
import sys
from pathlib import Path
from clawdlets_ops.lab.api import Emulator
from clawdlets_ops.lab.backend import LoopbackPool, StubBackend
from clawdlets_ops.lab.cloud import Cloud
from clawdlets_ops.lab.ratelimit import Budget
cloud = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=Path(sys.argv[2]))
emulator = Emulator(cloud, token=sys.argv[1], journal_file=None, budget=Budget(10**9))
emulator.start()
print(emulator.endpoint, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with running_lab(tmp_path, StubBackend(), budget=Budget(PLENTY), request_timeout_s=2.0) as lab:
        yield lab


def connect(lab: Lab) -> socket.socket:
    parts = urlsplit(lab.emulator.endpoint)
    return socket.create_connection((parts.hostname, parts.port), timeout=WITHIN_S)


def ask(endpoint: str, method: str, path: str, body: object = None, raw: bytes | None = None) -> tuple[int, Any]:
    parts = urlsplit(endpoint)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=WITHIN_S)
    try:
        content = raw if raw is not None else None if body is None else json.dumps(body)
        connection.request(method, parts.path + path, content, {"Authorization": f"Bearer {TOKEN}"})
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None
    finally:
        connection.close()


def told(answer: tuple[int, Any]) -> tuple[int, str]:
    """Status and error code of an answer in the envelope."""
    status, payload = answer
    assert set(payload["error"]) == {"code", "message", "details"}
    assert payload["error"]["message"]
    return status, payload["error"]["code"]


def read_all(connection: socket.socket) -> tuple[int, Any]:
    """Status and body of the last answer on a connection that the server ends."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"\r\nConnection: close" in head
    return int(head.split()[1]), json.loads(body)


def state(lab: Lab) -> dict[str, Any]:
    return {kind: lab.cloud.rows(kind) for kind in ("servers", "ssh_keys", "firewalls", "primary_ips", "volumes")}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", (400, "json_error")),
        (b"[]", (400, "json_error")),
        (b"\xff\xfe\x00", (400, "json_error")),
        (b'{"name": NaN}', (400, "json_error")),
        (b'{"name":' * 100_000, (400, "json_error")),
        (b'{"name": ' + b"9" * 10_000 + b"}", (400, "json_error")),
        (b"{}", (422, "invalid_input")),
        (b"null", (422, "invalid_input")),
        (json.dumps(SERVER | {"name": ["alpha"]}).encode(), (422, "invalid_input")),
        (json.dumps(SERVER | {"labels": [1]}).encode(), (422, "invalid_input")),
        (json.dumps(SERVER | {"ssh_keys": {"a": 1}}).encode(), (422, "invalid_input")),
        (json.dumps(SERVER | {"start_after_create": "yes"}).encode(), (422, "invalid_input")),
        (json.dumps(SERVER | {"ssh_keys": [99]}).encode(), (404, "not_found")),
        (json.dumps(SERVER | {"networks": [99]}).encode(), (404, "not_found")),
        (json.dumps(SERVER | {"user_data": "x" * 32_769}).encode(), (422, "invalid_input")),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_order_is_refused_and_nothing_is_made(lab: Lab, body: bytes, expected: tuple[int, str]) -> None:
    before = state(lab)
    assert told(ask(lab.emulator.endpoint, "POST", "/servers", raw=body)) == expected
    assert state(lab) == before


def test_doubles_unknown_ids_and_what_is_in_use(lab: Lab) -> None:
    endpoint = lab.emulator.endpoint
    assert ask(endpoint, "POST", "/servers", SERVER | {"no_such_field": [1], "rules": None})[0] == 201
    assert told(ask(endpoint, "POST", "/servers", SERVER)) == (409, "uniqueness_error")
    assert ask(endpoint, "POST", "/ssh_keys", {"name": "one", "public_key": KEY})[0] == 201
    assert told(ask(endpoint, "POST", "/ssh_keys", {"name": "two", "public_key": KEY})) == (409, "uniqueness_error")
    apply_to = [{"type": "server", "server": {"id": 1001}}]
    firewall = ask(endpoint, "POST", "/firewalls", {"name": "edge", "apply_to": apply_to})[1]["firewall"]["id"]
    volume = ask(endpoint, "POST", "/volumes", {"name": "data", "size": 10, "server": 1001})[1]["volume"]["id"]
    before = state(lab)
    for path in (f"/firewalls/{firewall}", f"/volumes/{volume}"):
        assert told(ask(endpoint, "DELETE", path)) == (422, "resource_in_use")
    assert told(ask(endpoint, "DELETE", "/primary_ips/4001")) == (422, "must_be_unassigned")
    for method, path, body in (
        ("GET", "/servers/9", None),
        ("PUT", "/servers/9", {"name": "x"}),
        ("DELETE", "/servers/9", None),
        ("POST", "/servers/9/actions/poweron", {}),
        ("POST", "/volumes/9/actions/attach", {"server": 1001}),
        ("GET", "/actions/9", None),
    ):
        assert told(ask(endpoint, method, path, body)) == (404, "not_found")
    assert state(lab) == before


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (f"POST /v1/servers HTTP/1.1\r\n{AUTHORIZED}Content-Length: {BODY_LIMIT_BYTES + 1}\r\n\r\n", (413, "invalid_input")),
        (f"POST /v1/servers HTTP/1.1\r\n{AUTHORIZED}Content-Length: {'9' * 5000}\r\n\r\n", (413, "invalid_input")),
        (f"POST /v1/servers HTTP/1.1\r\n{AUTHORIZED}Transfer-Encoding: chunked\r\n\r\n", (413, "invalid_input")),
        (f"GET /v1/servers HTTP/1.1\r\nX: {'x' * 2 * HEAD_LIMIT_BYTES}", (431, "invalid_input")),
        ("GET /v1/servers\r\n\r\n", (400, "invalid_input")),
        ("GET /v1/servers HTTP/1.1\r\nno colon\r\n\r\n", (400, "invalid_input")),
        ("GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", (400, "invalid_input")),
        ("GET / HTTP/1.1\r\nContent-Length : 1\r\n\r\n", (400, "invalid_input")),
        ("TRACE / HTTP/1.1\r\n\r\n", (405, "method_not_allowed")),
        (f"POST /v1/servers HTTP/1.1\r\n{AUTHORIZED}Content-Length: 40\r\n\r\n{{", (408, "request_timeout")),
        ("GET /v1/ser", (408, "request_timeout")),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_what_is_no_request_is_told_so_and_its_connection_ended(lab: Lab, sent: str, expected: tuple[int, str]) -> None:
    with connect(lab) as connection:
        connection.sendall(sent.encode())
        assert told(read_all(connection)) == expected


def test_requests_in_one_piece_and_in_many_on_one_connection(lab: Lab) -> None:
    body = json.dumps({"name": "apart", "type": "spread"})
    create = f"POST /v1/placement_groups HTTP/1.1\r\n{AUTHORIZED}Content-Length: {len(body)}\r\n"
    get = f"GET /v1/placement_groups HTTP/1.1\r\n{AUTHORIZED}"
    with connect(lab) as connection:
        connection.sendall(f"{create}Expect: 100-continue\r\n\r\n".encode())
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(f"{body}{get}\r\n{get}Connection: close\r\n\r\n".encode())
        received = b""
        while piece := connection.recv(65536):
            received += piece
    assert re.findall(rb"HTTP/1\.1 (\d+) ", received) == [b"201", b"200", b"200"]
    with connect(lab) as connection:
        for letter in f"{get}Connection: close\r\n\r\n":
            connection.sendall(letter.encode())
        assert read_all(connection)[0] == 200


def test_slow_clients_wait_alone(lab: Lab) -> None:
    """Hundreds that stop in the middle, and hundreds that say nothing: the others are answered, and the slow ones told."""
    slow = [connect(lab) for _ in range(200)]
    silent = [connect(lab) for _ in range(200)]
    try:
        for connection in slow:
            connection.sendall(b"POST /v1/servers HTTP/1.1\r\nContent-Le")
        for index in range(50):
            name = {"name": f"apart-{index}", "type": "spread"}
            assert ask(lab.emulator.endpoint, "POST", "/placement_groups", name)[0] == 201
        assert [told(read_all(connection)) for connection in slow] == [(408, "request_timeout")] * len(slow)
        # Who has said nothing has done nothing wrong.
        silent[0].sendall(f"GET /v1/servers HTTP/1.1\r\n{AUTHORIZED}\r\n".encode())
        assert silent[0].recv(12) == b"HTTP/1.1 200"
    finally:
        for connection in (*slow, *silent):
            connection.close()
    assert len(lab.cloud.rows("placement_groups")) == 50
    assert lab.cloud.servers() == ()


def test_who_does_not_read_the_answers_holds_nobody_up(lab: Lab) -> None:
    request = f"GET /v1/server_types HTTP/1.1\r\n{AUTHORIZED}\r\n".encode()
    with connect(lab) as greedy:
        greedy.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                greedy.send(request * 100)
        assert ask(lab.emulator.endpoint, "GET", "/servers")[0] == 200
        # It is ended, whatever it still has to say.
        greedy.settimeout(WITHIN_S)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            greedy.sendall(request * 1_000_000)


def test_more_connections_than_there_are_places_take_turns(lab: Lab) -> None:
    """Those that say nothing give way; those that ask are all answered."""
    silent = [connect(lab) for _ in range(MAX_CONNECTIONS + 50)]
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda _: ask(lab.emulator.endpoint, "GET", "/servers")[0], range(40))
            assert set(answers) == {200}
    finally:
        for connection in silent:
            connection.close()


def test_thousands_of_parallel_creations_leave_one_of_each_name(lab: Lab) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        answers = all_at_once(lab, [f"apart-{index % NAMES}" for index in range(PARALLEL)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    outcomes = Counter((status, payload.get("error", {}).get("code")) for status, payload in answers)
    assert outcomes == {(201, None): NAMES, (409, "uniqueness_error"): PARALLEL - NAMES}
    rows = lab.cloud.rows("placement_groups")
    assert sorted(row["id"] for row in rows) == list(range(7001, 7001 + NAMES))
    assert len({row["name"] for row in rows}) == NAMES
    given = {payload["placement_group"]["name"]: payload["placement_group"]["id"] for status, payload in answers if status == 201}  # fmt: skip
    assert given == {row["name"]: row["id"] for row in rows}
    made = [entry for entry in lab.journal() if entry["method"] == "POST" and entry["mutates"]]
    assert len(made) == NAMES


def all_at_once(lab: Lab, names: list[str]) -> list[tuple[int, Any]]:
    """Every name asked for on a connection of its own, all of them asked before the first answer is read."""
    waiting = selectors.DefaultSelector()
    received: dict[socket.socket, bytes] = {}
    for name in names:
        body = json.dumps({"name": name, "type": "spread"})
        head = f"POST /v1/placement_groups HTTP/1.1\r\n{AUTHORIZED}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection = connect(lab)
        connection.sendall((head + body).encode())
        waiting.register(connection, selectors.EVENT_READ)
        received[connection] = b""
    deadline = time.monotonic() + WITHIN_S
    while waiting.get_map():
        assert time.monotonic() < deadline, f"{len(waiting.get_map())} of {len(names)} have no answer"
        for key, _ in waiting.select(1.0):
            connection = key.fileobj  # type: ignore[assignment]
            if piece := connection.recv(65536):
                received[connection] += piece
            else:
                waiting.unregister(connection)
                connection.close()
    heads = [raw.partition(b"\r\n\r\n") for raw in received.values()]
    return [(int(head.split()[1]), json.loads(body)) for head, _, body in heads]


def test_a_killed_emulator_comes_back_with_all_that_it_has_answered(tmp_path: Path) -> None:
    answered: dict[str, int] = {}
    for life in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", EMULATOR, TOKEN, str(tmp_path / "cloud.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            endpoint = process.stdout.readline().strip()
            rows = listed(endpoint)
            assert answered.items() <= rows.items(), f"life {life}"
            assert len(rows) <= len(answered) + 4, "more than was under way when it died"
            answered = dict(rows)

            def create(
                index: int, life: int = life, endpoint: str = endpoint, process: subprocess.Popen[str] = process
            ) -> tuple[str, int] | None:
                try:
                    status, payload = ask(endpoint, "POST", "/placement_groups", {"name": f"g{life}-{index}", "type": "spread"})  # fmt: skip
                except (OSError, http.client.HTTPException):
                    return None
                assert status == 201
                if index == 60:  # others are in the middle of theirs
                    process.send_signal(signal.SIGKILL)
                return payload["placement_group"]["name"], payload["placement_group"]["id"]

            with ThreadPoolExecutor(4) as pool:
                answered |= dict(filter(None, pool.map(create, range(120))))
            assert process.wait(timeout=10) == -signal.SIGKILL
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
    assert len(answered) > 200


def listed(endpoint: str) -> dict[str, int]:
    rows: dict[str, int] = {}
    page: int | None = 1
    while page:
        _, payload = ask(endpoint, "GET", f"/placement_groups?per_page=50&page={page}")
        rows |= {row["name"]: row["id"] for row in payload["placement_groups"]}
        page = payload["meta"]["pagination"]["next_page"]
    return rows
