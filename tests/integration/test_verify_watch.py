"""Watching: told once, and again when something changed; a web hook on loopback, a textfile, and an end by signal."""

from __future__ import annotations

import http.server
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.errors import VerifyError
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.verify.fleet import FleetReport
from clawdlets_ops.verify.watch import metrics, watch
from tests.serving import serving

pytestmark = pytest.mark.integration


def report(code: int, *changes: tuple[str, str, str]) -> FleetReport:
    document = {
        "summary": f"1 host: code {code}", "exitCode": code,
        "changes": [{"host": "alpha", "check": check, "was": was, "now": now} for check, was, now in changes],
        "findings": [{"host": "alpha", "check": "SSH-01", "state": "pass"}, {"host": "alpha", "check": "EXP-04", "state": "unknown"}],
    }  # fmt: skip
    return FleetReport(document, Path("/nowhere"), code, None, "")


def verifier(*outcomes: FleetReport | Exception) -> Callable[[], FleetReport]:
    left = list(outcomes)

    def verify() -> FleetReport:
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return verify


@pytest.fixture
def hook() -> Iterator[tuple[str, list[Any]]]:
    """A web hook, and what it was told; it fails the second time."""
    told: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if len(told) == 2 else 204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silent."""

    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        yield f"http://127.0.0.1:{server.server_port}/canary-hook", told


def test_only_news_is_told(tmp_path: Path, hook: tuple[str, list[Any]]) -> None:
    url, told = hook
    said: list[str] = []
    waits: list[float] = []
    textfile = tmp_path / "clawdlets.prom"
    code = watch(
        verifier(
            report(0),
            report(0),
            report(1, ("SSH-01", "pass", "fail")),
            VerifyError("the suite left no findings"),
            VerifyError("the suite left no findings"),
            report(0, ("SSH-01", "fail", "pass")),
        ),
        every_s=900,
        times=6,
        wait=lambda seconds: bool(waits.append(seconds)),
        say=said.append,
        textfile=textfile,
        hook=Secret(url, "hook"),
    )
    assert code == 0
    assert waits == [900] * 5
    assert said == [
        "1 host: code 0",
        "1 host: code 1; alpha SSH-01: pass → fail",
        "the web hook answered with status 500",
        "could not verify: the suite left no findings",
        "1 host: code 0; alpha SSH-01: fail → pass",
    ]
    assert [one["exitCode"] for one in told] == [0, 1, 2, 0]
    assert told[1]["changes"] == [{"host": "alpha", "check": "SSH-01", "was": "pass", "now": "fail"}]
    assert textfile.read_text().endswith('clawdlets_check_state{host="alpha",check="EXP-04"} -1\n')


def test_a_hook_that_nobody_answers_is_said_without_its_address(tmp_path: Path) -> None:
    said: list[str] = []
    hook = Secret("http://127.0.0.1:1/canary-hook", "hook")
    assert watch(verifier(report(2)), every_s=1, times=1, wait=lambda _: False, say=said.append, hook=hook) == 2
    assert said[1] == "the web hook was not reached (ConnectionError)"
    assert "canary" not in "".join(said)


def test_it_ends_when_told_to_and_a_fleet_that_cannot_be_verified_is_no_success() -> None:
    assert watch(verifier(VerifyError("x")), every_s=1, times=None, wait=lambda _: True, say=lambda _: None) == 2


def test_metrics_without_findings_say_the_verdict_alone() -> None:
    assert metrics({"exitCode": 2}).splitlines()[-1] == "clawdlets_verify_exit_code 2"
