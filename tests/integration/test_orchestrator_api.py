"""The unix socket's API as a real process: the peer's protocol, its defects repaired, and what may be thrown at it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from clawdlets_ops.orchestrator.app import Answer, read_object
from clawdlets_ops.orchestrator.client import Client, ClientError, Exit
from tests.integration.orchestrator_process import (
    BOT,
    NOBODY_IN_PARTICULAR,
    OPERATOR,
    OTHER_BOT,
    ROOT,
    Process,
    become,
    running,
    short_folder,
    start,
    until,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be several users"),
]

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


@pytest.fixture(scope="module")
def orchestrator() -> Iterator[Process]:
    with running() as process:
        yield process


def fields(reply: Any) -> dict[str, str]:
    return {one["field"]: one["message"] for one in reply.body["error"].get("fields", ())}


def body(**more: Any) -> dict[str, Any]:
    return {"protocolVersion": 1, "kind": "later", "payload": {}, "runAt": "2026-12-20T00:00:00Z", **more}


# --- the peer's protocol ---


def test_a_peers_client_keeps_working(orchestrator: Process) -> None:
    asked = {"protocolVersion": 1, "requester": "bot-scout", "idempotencyKey": "", "kind": "count"}
    where = str(orchestrator.folder / "counted")
    made = orchestrator.ask_as(BOT, "POST", "/v1/jobs/enqueue", {**asked, "payload": {"log": where}, "priority": 0})
    # the folder is root's, so the handler can write; only the asking is the bot's
    assert made.status == 200
    assert set(made.body) == {"protocolVersion", "jobId"}
    assert made.body["protocolVersion"] == 1
    job_id = made.body["jobId"]
    assert UUID.fullmatch(job_id)
    shown = orchestrator.until(job_id, "done")
    assert set(shown) == {
        *("jobId", "kind", "status", "requester", "idempotencyKey", "createdAt", "updatedAt", "runAt"),
        *("attempt", "maxAttempts", "lastError", "result", "payload"),
    }
    assert shown["requester"] == "scout"
    assert shown["payload"] == {"log": where}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", shown["createdAt"])
    listed = orchestrator.ask("GET", "/v1/jobs?requester=scout&status=done,nonsense&limit=x").body
    assert listed["protocolVersion"] == 1
    assert [job["jobId"] for job in listed["jobs"]] == [job_id]
    assert "payload" not in listed["jobs"][0]
    late = orchestrator.ask_as(BOT, "POST", "/v1/jobs/enqueue", body())
    assert orchestrator.ask_as(BOT, "POST", f"/v1/jobs/{late.body['jobId']}/cancel", {}).body == {
        "protocolVersion": 1,
        "ok": True,
    }
    again = orchestrator.ask_as(BOT, "POST", f"/v1/jobs/{late.body['jobId']}/cancel", {})
    assert (again.status, again.body["error"]["message"]) == (409, "job not cancelable (status=canceled)")
    assert orchestrator.ask("GET", "/healthz").body == {"ok": True}


def test_the_answer_is_compact_json_of_a_known_length(orchestrator: Process) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(orchestrator.socket_path))
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        said = b"".join(iter(lambda: raw.recv(65536), b""))
    head, _, content = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert b"content-type: application/json" in head
    assert b"content-length: 11" in head
    assert content == b'{"ok":true}'


# --- who asks (defect 26) ---


def test_who_asks_is_known_from_the_socket_and_not_from_the_body(orchestrator: Process) -> None:
    spoofed = orchestrator.ask_as(BOT, "POST", "/v1/jobs/enqueue", body(requester="miner"))
    assert (spoofed.status, fields(spoofed)) == (403, {"requester": "you are scout"})
    mine = orchestrator.ask_as(BOT, "POST", "/v1/jobs/enqueue", body(requester="scout"))
    assert mine.status == 200
    job_id = mine.body["jobId"]
    assert orchestrator.job(job_id)["requester"] == "scout"
    assert orchestrator.ask_as(BOT, "GET", f"/v1/jobs/{job_id}").status == 200
    assert orchestrator.ask_as(OPERATOR, "GET", f"/v1/jobs/{job_id}").status == 200


def test_a_bot_sees_and_cancels_its_own_jobs_only(orchestrator: Process) -> None:
    job_id = orchestrator.ask_as(BOT, "POST", "/v1/jobs/enqueue", body(payload={"text": "mine"})).body["jobId"]
    hidden = orchestrator.ask_as(OTHER_BOT, "GET", f"/v1/jobs/{job_id}")
    missing = orchestrator.ask_as(OTHER_BOT, "GET", "/v1/jobs/00000000-0000-4000-8000-000000000000")
    assert (hidden.status, hidden.body) == (missing.status, missing.body)
    assert hidden.status == 404
    assert orchestrator.ask_as(OTHER_BOT, "POST", f"/v1/jobs/{job_id}/cancel", {}).status == 404
    assert orchestrator.ask_as(OTHER_BOT, "GET", "/v1/jobs?requester=scout").status == 403
    own = orchestrator.ask_as(OTHER_BOT, "GET", "/v1/jobs?limit=500").body["jobs"]
    assert [job for job in own if job["requester"] != "miner"] == []
    assert orchestrator.job(job_id)["status"] == "queued"
    assert orchestrator.ask_as(OPERATOR, "POST", f"/v1/jobs/{job_id}/cancel", {}).status == 200


def test_a_user_who_is_neither_bot_nor_operator_gets_nothing(orchestrator: Process) -> None:
    for method, target in (("GET", "/v1/jobs"), ("POST", "/v1/jobs/enqueue"), ("GET", "/v1/jobs/x")):
        assert orchestrator.ask_as(NOBODY_IN_PARTICULAR, method, target).status == 403
    assert orchestrator.ask_as(NOBODY_IN_PARTICULAR, "GET", "/healthz").status == 200


def test_what_is_for_operators_is_not_for_bots(orchestrator: Process) -> None:
    refused = orchestrator.ask_as(BOT, "POST", "/v1/jobs/enqueue", body(kind="reap"))
    assert (refused.status, fields(refused)) == (400, {"kind": "must be one of: count, later, slow"})
    assert orchestrator.ask_as(OPERATOR, "POST", "/v1/jobs/enqueue", body(kind="reap")).status == 200


# --- every fault by its field (defects 28, 29) ---


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"protocolVersion": 2}, "protocolVersion"),
        ({"protocolVersion": True}, "protocolVersion"),
        ({"kind": "nonsense"}, "kind"),
        ({"kind": 7}, "kind"),
        ({"payload": []}, "payload"),
        ({"payload": {"text": 7}}, "payload.text"),
        ({"payload": {"image": "evil"}}, "payload.image"),
        ({"priority": "high"}, "priority"),
        ({"priority": 101}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"priority": True}, "priority"),
        ({"runAt": "soon"}, "runAt"),
        ({"runAt": 5}, "runAt"),
        ({"runAt": "9999-12-31T00:00:00Z"}, "runAt"),
        ({"idempotencyKey": "a b"}, "idempotencyKey"),
        ({"idempotencyKey": "x" * 201}, "idempotencyKey"),
        ({"requester": 7}, "requester"),
        ({"maxAttempts": 99}, "maxAttempts"),
    ],
)
def test_a_fault_is_named_by_its_field(orchestrator: Process, change: dict[str, Any], field: str) -> None:
    refused = orchestrator.ask("POST", "/v1/jobs/enqueue", body(**change))
    assert refused.status == 400
    assert field in fields(refused)
    assert refused.body["error"]["message"].startswith("the request is not acceptable: ")
    assert len(refused.body["error"]["message"]) <= 200


def test_all_faults_are_named_at_once(orchestrator: Process) -> None:
    refused = orchestrator.ask("POST", "/v1/jobs/enqueue", {"kind": "later", "payload": {"x": 1, "text": 2}, "more": 1})
    assert set(fields(refused)) == {"more", "protocolVersion", "payload.x", "payload.text"}


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b'{"a":',
        b"\x00\xff\xfe",
        b"[1]",
        b"null",
        b'"text"',
        b'{"a":NaN}',
        b'{"protocolVersion":1,"protocolVersion":1}',
        b"[" * 100_000,
        b'{"kind":"later","payload":{"text":"\\ud800"},"protocolVersion":1}',
        b'{"priority":' + b"9" * 5000 + b"}",
        bytes(range(256)) * 16,
        b"",
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_garbage_is_400_and_changes_nothing(orchestrator: Process, raw: bytes) -> None:
    before = len(orchestrator.ask("GET", "/v1/jobs?limit=500").body["jobs"])
    assert orchestrator.ask("POST", "/v1/jobs/enqueue", raw).status == 400
    assert len(orchestrator.ask("GET", "/v1/jobs?limit=500").body["jobs"]) == before


@pytest.mark.parametrize(("number", "kept"), [("1e308", True), ("1e309", False), ("-1e999", False)])
def test_a_number_that_is_none_in_json_is_not_kept(number: str, kept: bool) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"x":%s}' % number.encode(), "more_body": False}

    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    if kept:
        assert asyncio.run(read_object(request, 100)) == {"x": 1e308}
        return
    with pytest.raises(Answer, match="is larger than any number"):
        asyncio.run(read_object(request, 100))


def test_a_body_ten_times_too_large_is_413_before_it_is_read(orchestrator: Process) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(orchestrator.socket_path))
        raw.sendall(b"POST /v1/jobs/enqueue HTTP/1.1\r\nHost: x\r\nContent-Length: 2621440\r\n\r\n")
        said = raw.recv(65536)  # nothing of the body was sent
    assert said.startswith(b"HTTP/1.1 413 ")


def test_a_body_too_large_without_a_length_is_413(orchestrator: Process) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(orchestrator.socket_path))
        raw.settimeout(30)
        raw.sendall(b"POST /v1/jobs/enqueue HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(80):
                raw.sendall(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_body_at_the_limit_is_read(orchestrator: Process) -> None:
    raw = json.dumps(body(payload={"text": ""})).encode()
    raw = raw.replace(b'"text": ""', b'"text": "' + b"x" * (262_144 - len(raw)) + b'"')
    assert len(raw) == 262_144
    assert orchestrator.ask("POST", "/v1/jobs/enqueue", raw).status == 200
    assert orchestrator.ask("POST", "/v1/jobs/enqueue", raw + b" ").status == 413


def test_a_body_that_is_cut_off_changes_nothing(orchestrator: Process) -> None:
    before = len(orchestrator.ask("GET", "/v1/jobs?limit=500").body["jobs"])
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(orchestrator.socket_path))
        raw.sendall(b"POST /v1/jobs/enqueue HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert orchestrator.ask("GET", "/healthz").status == 200
    assert len(orchestrator.ask("GET", "/v1/jobs?limit=500").body["jobs"]) == before


@pytest.mark.parametrize(
    ("method", "target", "allow"),
    [
        ("PUT", "/v1/jobs/enqueue", "POST"),
        ("DELETE", "/v1/jobs", "GET"),
        ("POST", "/healthz", "GET"),
        ("GET", "/v1/jobs/some-id/cancel", "POST"),
    ],
)
def test_a_method_that_is_not_for_it_is_405(orchestrator: Process, method: str, target: str, allow: str) -> None:
    refused = orchestrator.ask(method, target)
    assert refused.status == 405
    assert refused.body["error"]["message"] == "method not allowed"
    assert allow in refused.headers["allow"]


@pytest.mark.parametrize("target", ["/", "/v2/jobs", "/v1/jobs/", "/v1/jobs/%00/cancel/x", "/../etc/passwd"])
def test_what_is_not_there_is_404_in_json(orchestrator: Process, target: str) -> None:
    assert orchestrator.ask("GET", target).body["error"]["message"] in ("not found", "job not found")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", "nonsense"])
def test_another_content_type_is_415(orchestrator: Process, kind: str) -> None:
    assert orchestrator.ask("POST", "/v1/jobs/enqueue", body(), {"content-type": kind}).status == 415
    fine = {"content-type": "application/json; charset=utf-8"}
    assert orchestrator.ask("POST", "/v1/jobs/enqueue", body(), fine).status == 200


# --- idempotency (defect 31) and caps ---


def test_the_same_key_with_another_payload_is_409(orchestrator: Process) -> None:
    first = orchestrator.ask("POST", "/v1/jobs/enqueue", body(idempotencyKey="k1", payload={"text": "a"}))
    same = orchestrator.ask("POST", "/v1/jobs/enqueue", body(idempotencyKey="k1", payload={"text": "a"}))
    other = orchestrator.ask("POST", "/v1/jobs/enqueue", body(idempotencyKey="k1", payload={"text": "b"}))
    assert (same.status, same.body) == (200, first.body)
    assert (other.status, set(fields(other))) == (409, {"idempotencyKey"})
    theirs = orchestrator.ask_as(BOT, "POST", "/v1/jobs/enqueue", body(idempotencyKey="k1"))
    assert theirs.body["jobId"] != first.body["jobId"]


def test_a_bot_has_so_many_unfinished_jobs_and_no_more(orchestrator: Process) -> None:
    program = become(OTHER_BOT, orchestrator.socket_path.stat().st_gid) + (
        "path, body = json.load(sys.stdin)\n"
        "c = http.client.HTTPConnection('localhost'); c.sock = socket.socket(socket.AF_UNIX); c.sock.connect(path)\n"
        "seen = []\n"
        "for _ in range(120):\n"
        "    c.request('POST', '/v1/jobs/enqueue', body); r = c.getresponse(); r.read(); seen.append(r.status)\n"
        "print(json.dumps(seen))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        input=json.dumps([str(orchestrator.socket_path), json.dumps(body())]),
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(done.stdout)
    assert seen.count(200) <= 100
    assert seen[-1] == 429
    assert orchestrator.ask_as(BOT, "POST", "/v1/jobs/enqueue", body()).status == 200


# --- many and slow ---


@pytest.mark.parametrize("many", [1_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_thousands_of_slow_connections_of_one_bot_leave_the_others_alone(orchestrator: Process, many: int) -> None:
    """They connect, say half a request and keep still; whoever is over the bound (64) is told so and cut off."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < many + 100:
        many = hard - 200
    program = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({many + 50}, {hard}))\n"
    program += become(BOT, orchestrator.socket_path.stat().st_gid) + (
        "kept = []\n"
        f"for _ in range({many}):\n"
        "    s = socket.socket(socket.AF_UNIX)\n"
        "    s.connect(sys.argv[1])\n"
        "    s.settimeout(10)\n"
        "    kept.append(s)\n"
        "    try:\n"
        "        s.send(b'POST /v1/jobs/enqueue HTTP/1.1\\r\\nHost: x\\r\\n')\n"
        "    except OSError:\n"
        "        pass\n"
        "print(len(kept), flush=True)\n"
        "sys.stdin.read()\n"
    )
    slow = subprocess.Popen(
        [sys.executable, "-I", "-c", program, str(orchestrator.socket_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    served = 0
    try:
        assert slow.stdout is not None
        os.set_blocking(slow.stdout.fileno(), False)
        said = b""
        while not said:
            assert orchestrator.ask_as(OTHER_BOT, "GET", "/healthz").status == 200
            assert orchestrator.ask("GET", "/v1/jobs?limit=1").status == 200
            served += 1
            said = slow.stdout.read() or b""
            assert slow.poll() is None
        assert int(said) == many
        descriptors = len(list(Path(f"/proc/{orchestrator.popen.pid}/fd").iterdir()))
        assert descriptors < 64 + 60
    finally:
        slow.communicate()
    assert served
    assert orchestrator.ask_as(BOT, "GET", "/v1/jobs").status == 200


def test_a_slow_head_and_a_slow_body_end_with_408(orchestrator: Process) -> None:
    slow = (
        b"",
        b"POST /v1/jobs/enqueue HTTP/1.1\r\nHost:",
        b"POST /v1/jobs/enqueue HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{",
    )
    with ExitStack() as opened:
        waiting = []
        for sent in slow:  # all at once: each is waited for as long as its bound says
            raw = opened.enter_context(socket.socket(socket.AF_UNIX))
            raw.settimeout(60)
            raw.connect(str(orchestrator.socket_path))
            raw.sendall(sent)
            waiting.append(raw)
        for raw in waiting:
            assert raw.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_an_endless_head_is_431(orchestrator: Process) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(30)
        raw.connect(str(orchestrator.socket_path))
        with suppress(BrokenPipeError, ConnectionResetError):
            raw.sendall(b"GET /healthz HTTP/1.1\r\n" + b"x-more: " + b"y" * 60_000)
        assert raw.recv(65536).startswith(b"HTTP/1.1 431 ")


def answered(raw: socket.socket) -> bytes:
    raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    said = b""
    while not said.endswith(b'{"ok":true}'):
        said += raw.recv(65536)
    return said


def test_an_answer_to_head_comes_at_once_and_the_connection_stays(orchestrator: Process) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(3)
        raw.connect(str(orchestrator.socket_path))
        raw.sendall(b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 200 OK")
        assert answered(raw).startswith(b"HTTP/1.1 200 OK")


def test_an_empty_line_after_an_answer_does_not_hold_the_connection_for_ever(orchestrator: Process) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(20)
        raw.connect(str(orchestrator.socket_path))
        answered(raw)
        raw.sendall(b"\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 408 ")
        assert raw.recv(65536) == b""


def test_a_body_that_nests_deeply_is_refused(orchestrator: Process) -> None:
    def nested(levels: int) -> dict[str, Any]:
        inner: Any = []
        for _ in range(levels - 3):  # body, payload and the innermost
            inner = [inner]
        return body(payload={"text": "x", "more": inner})

    assert "nests deeper than 64" in str(orchestrator.ask_as(BOT, "POST", "/v1/jobs/enqueue", nested(65)).body)
    assert "unknown field" in str(orchestrator.ask_as(BOT, "POST", "/v1/jobs/enqueue", nested(64)).body)


def test_a_time_that_is_long_past_is_now(orchestrator: Process) -> None:
    made = orchestrator.ask_as(BOT, "POST", "/v1/jobs/enqueue", body(runAt="0001-01-01T00:00:00+01:00"))
    assert made.status == 200
    listed = orchestrator.ask_as(OPERATOR, "GET", "/v1/jobs?limit=500")
    assert listed.status == 200
    (mine,) = [job for job in listed.body["jobs"] if job["jobId"] == made.body["jobId"]]
    assert mine["runAt"] == mine["createdAt"]


# --- start and stop, kills ---


def test_a_socket_or_folder_that_is_open_to_others_is_refused_at_the_start() -> None:
    with short_folder() as folder:
        (folder / "run").mkdir()
        (folder / "run").chmod(0o777)
        process = start(folder, wait=False)
        assert process.popen.wait(60) == 1
        assert "can be written by group or others" in process.log
        (folder / "run").chmod(0o755)
        (folder / "state").chmod(0o750)
        process = start(folder, wait=False)
        assert process.popen.wait(60) == 1
        assert "chmod 700" in process.log


def test_a_second_one_on_the_same_socket_is_refused_and_a_stale_socket_is_replaced() -> None:
    with short_folder() as folder:
        first = start(folder)
        second = start(folder, wait=False)
        assert second.popen.wait(60) == 1
        assert "somebody is listening there already" in second.log
        assert first.ask("GET", "/healthz").status == 200
        first.kill()
        assert first.socket_path.exists()
        third = start(folder)
        assert oct(third.socket_path.stat().st_mode & 0o7777) == "0o660"
        assert third.stop() == 0
        assert not third.socket_path.exists()


def test_systemds_socket_is_taken_and_left_in_place() -> None:
    """As systemd passes it: descriptor 3, LISTEN_PID and LISTEN_FDS (sd_listen_fds(3))."""
    with short_folder() as folder:
        (folder / "run").mkdir(mode=0o755)
        path = folder / "run" / "orchestrator.sock"
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        path.chmod(0o660)
        os.chown(path, 0, 65534)
        listening.listen(64)
        starter = (
            "import os, sys\n"
            "os.dup2(int(sys.argv[1]), 3)\n"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n"
            "os.execv(sys.executable, [sys.executable, '-m', 'tests.orchestrator_program', *sys.argv[2:]])\n"
        )
        prepared = start(folder, wait=False)  # writes the configuration; it sees that somebody listens there, and ends
        assert prepared.popen.wait(60) == 1
        with (folder / "log").open("ab") as log:
            popen = subprocess.Popen(
                [sys.executable, "-c", starter, str(listening.fileno()), folder / "config.json", folder / "who.json"],
                cwd=ROOT,
                pass_fds=[listening.fileno()],
                stdout=log,
                stderr=log,
            )
        process = Process(folder, popen)
        try:
            assert process.ask("GET", "/healthz").status == 200
            assert process.enqueue().status == 200
            assert process.stop() == 0
            assert path.exists()
        finally:
            popen.kill()
            popen.wait()
            listening.close()


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.long)])
def test_killed_again_and_again_no_acknowledged_job_is_lost_and_each_is_done(kills: int) -> None:
    """kill -9 at arbitrary moments, between asking, leasing, remembering and completing; attempts are 20."""
    if kills > 10 and os.environ.get("LONG") != "1":
        pytest.skip("minutes: LONG=1 runs it")
    with short_folder() as folder:
        where = str(folder / "counted")
        accepted: list[str] = []
        for round_number in range(kills):
            process = start(folder, environ={"LEASE_S": "5"})
            try:
                for _ in range(6):
                    made = process.enqueue("count", {"log": where})
                    assert made.status == 200
                    accepted.append(made.body["jobId"])
                    time.sleep(0.001 * (round_number % 4))
            finally:
                process.kill()
        process = start(folder, environ={"LEASE_S": "5"})
        try:
            for job_id in accepted:
                assert process.until(job_id, "done")["status"] == "done"
            listed = process.ask("GET", "/v1/jobs?limit=500").body["jobs"]
            assert sorted(job["jobId"] for job in listed) == sorted(accepted)
            assert process.stop() == 0
        finally:
            process.kill()
        ended = [line.split()[1] for line in Path(where).read_text().splitlines() if line.startswith("end ")]
        assert set(ended) == set(accepted)


def test_a_job_at_work_is_given_back_when_the_orchestrator_is_stopped() -> None:
    with short_folder() as folder:
        process = start(folder)
        job_id = process.enqueue("slow").body["jobId"]
        process.until(job_id, "running")
        assert process.stop() == 0
        process = start(folder, workers=0)
        job = process.job(job_id)
        assert (job["status"], job["attempt"]) == ("queued", 0)
        process.kill()


# --- clf ---


def clf(process: Process, *words: str, given: str = "", socket_path: str | None = None) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "clawdlets_ops.clf", "--socket", socket_path or str(process.socket_path), *words],
        cwd=ROOT,
        input=given,
        capture_output=True,
        text=True,
    )


def test_clf_asks_waits_lists_shows_and_cancels(orchestrator: Process) -> None:
    where = str(orchestrator.folder / "by-clf")
    made = clf(orchestrator, "jobs", "enqueue", "count", "--payload", "-", "--json", given=json.dumps({"log": where}))
    assert made.returncode == 0, made.stderr
    job_id = json.loads(made.stdout)["jobId"]
    waited = clf(orchestrator, "jobs", "wait", job_id, "--timeout", "60", "--json")
    assert (waited.returncode, json.loads(waited.stdout)["status"]) == (0, "done")
    listed = json.loads(clf(orchestrator, "jobs", "list", "--kind", "count", "--json").stdout)
    assert job_id in [job["jobId"] for job in listed]
    assert json.loads(clf(orchestrator, "jobs", "show", job_id, "--json").stdout)["payload"] == {"log": where}
    assert "status: done" in clf(orchestrator, "jobs", "show", job_id).stdout


def test_clfs_exit_status_is_the_peers(orchestrator: Process, tmp_path: Path) -> None:
    assert clf(orchestrator, "jobs", "enqueue", "later", "--payload", "{").returncode == 2
    assert clf(orchestrator, "jobs", "nonsense").returncode == 2
    refused = clf(orchestrator, "jobs", "enqueue", "nonsense", "--payload", "{}")
    assert refused.returncode == 2
    assert "kind: must be one of" in refused.stderr
    assert clf(orchestrator, "jobs", "list", socket_path=str(tmp_path / "nobody")).returncode == 3
    gone = "00000000-0000-4000-8000-000000000000"
    assert clf(orchestrator, "jobs", "show", gone).returncode == 4
    job_id = orchestrator.enqueue("slow").body["jobId"]
    orchestrator.until(job_id, "running")
    assert clf(orchestrator, "jobs", "wait", job_id, "--timeout", "0").returncode == 1
    assert clf(orchestrator, "jobs", "cancel", job_id).returncode == 0
    assert clf(orchestrator, "jobs", "wait", job_id, "--timeout", "60").returncode == 4
    assert clf(orchestrator, "jobs", "cancel", job_id).returncode == 4
    assert orchestrator.job(job_id)["status"] == "canceled"


def test_a_client_bounds_time_and_size(tmp_path: Path) -> None:
    with short_folder() as folder, socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(folder / "s"))
        silent.listen(8)
        with pytest.raises(ClientError, match=r"no answer in 0\.25 s") as caught:
            Client(str(folder / "s"), timeout_s=0).list_jobs()
        assert caught.value.exit is Exit.OTHER


def test_nothing_of_a_payload_is_in_the_log(orchestrator: Process) -> None:
    needle = "canary-payload-5b1e"
    assert orchestrator.enqueue(payload={"text": needle}).status == 200
    assert orchestrator.enqueue(payload={"text": needle, needle: 1}).status == 400
    orchestrator.ask("POST", "/v1/jobs/enqueue", b'{"' + needle.encode())
    stored = until(
        lambda: [one.name for one in orchestrator.database.parent.iterdir() if needle.encode() in one.read_bytes()],
        "the search itself to find it in the database",
    )
    assert stored
    assert needle not in orchestrator.log
