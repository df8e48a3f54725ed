"""Our client and what a gateway in front of the API may answer: none of it is an error that nobody expects."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from clawdlets_ops.cloud import Firewall
from clawdlets_ops.errors import CloudError, OutcomeUnknown
from clawdlets_ops.hetzner import HetznerCloud
from clawdlets_ops.sensitive import Secret
from tests.serving import serving

pytestmark = pytest.mark.integration

ANSWERS = (
    (502, b'{"error":{}}'),
    (502, b'{"error":null}'),
    (200, b""),
    (200, b"[]"),
    (200, b"null"),
    (200, b'{"error":{}}'),
    (200, b'{"servers":null,"firewalls":null}'),
    (200, b"<html>canary-text</html>"),
)


class Gateway(ThreadingHTTPServer):
    """A stand-in for what may stand before the API: answers everything with ``status`` and ``content``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.content = 200, b""
        self.changes = 0


class _Handler(BaseHTTPRequestHandler):
    server: Gateway

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def do_POST(self) -> None:
        self.server.changes += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    do_PUT = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with serving(Gateway()) as server:
        yield server


def asking(gateway: Gateway, status: int, content: bytes) -> HetznerCloud:
    """Our client before a gateway that answers so."""
    gateway.status, gateway.content = status, content
    endpoint = f"http://127.0.0.1:{gateway.server_address[1]}/v1"
    return HetznerCloud(Secret("canary-token"), endpoint, sleep=lambda _: None)


@pytest.mark.parametrize(("status", "content"), ANSWERS)
def test_a_question_that_is_answered_with_nonsense_is_an_error_of_ours(
    gateway: Gateway, status: int, content: bytes
) -> None:
    cloud = asking(gateway, status, content)
    asks = (lambda: cloud.server_by_id(7), lambda: cloud.server("alpha"), lambda: cloud.firewall("edge"))
    for ask in asks[:1] if status == 502 else asks:  # python-hcloud asks again, for seconds
        with pytest.raises(CloudError) as caught:
            ask()
        assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "content"), [(502, b'{"error":{}}'), (502, b""), (200, b"<html>canary-text</html>")]
)
def test_a_change_that_is_answered_with_nonsense_may_have_happened_and_is_sent_once(
    gateway: Gateway, status: int, content: bytes
) -> None:
    cloud = asking(gateway, status, content)
    with pytest.raises(OutcomeUnknown) as caught:
        cloud.set_labels(Firewall(3, "edge", {}, ()), {"a": "b"})
    assert "canary" not in str(caught.value)
    assert gateway.changes == 1
