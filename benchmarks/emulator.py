"""The emulator against a floor measured in the same run: a plain in-memory HTTP server that always says the same.

Both run as processes of their own, with the same clients: python-hcloud one request at a time (p50 of a get by id), and
keep-alive connections that ask as fast as they can. Then 1,000 stub servers: listing, label selection, the rate limit.
Prints ratios and counts; the seconds are this machine's and mean nothing elsewhere.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hcloud
from hcloud.images import Image
from hcloud.server_types import ServerType

TOKEN = "canary00" * 8
GETS = 400
CONNECTIONS = 4
SECONDS = 3.0
FLEET = 1000

OURS = """
import sys
from pathlib import Path
from clawdlets_ops.lab.api import Emulator
from clawdlets_ops.lab.backend import LoopbackPool, StubBackend
from clawdlets_ops.lab.cloud import Cloud
cloud = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=None)
emulator = Emulator(cloud, token=sys.argv[1], journal_file=Path(sys.argv[2]) if len(sys.argv) > 2 else None)
emulator.start()
print(emulator.endpoint, flush=True)
sys.stdin.read()
"""

FLOOR = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
RECORD = json.loads(sys.argv[2])
BODY = json.dumps(RECORD).encode()
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def log_message(self, *_): pass
    def do_GET(self):
        body = BODY
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
class Server(ThreadingHTTPServer):
    daemon_threads = True
server = Server(("127.0.0.1", 0), Handler)
print(f"http://127.0.0.1:{server.server_address[1]}/v1", flush=True)
import threading
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.stdin.read()
"""


@contextmanager
def served(program: str, *arguments: str) -> Iterator[tuple[str, int, float]]:
    """Endpoint, pid and start-up seconds of a server that ends with its standard input."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), process.pid, time.monotonic() - started
    finally:
        process.stdin.close()
        process.wait(timeout=10)
        process.stdout.close()


def rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no VmRSS")


def client_for(endpoint: str) -> hcloud.Client:
    return hcloud.Client(token=TOKEN, api_endpoint=endpoint, poll_interval=0.01, timeout=30)


def p50_ms(client: hcloud.Client, server_id: int) -> float:
    """Median of single gets by id through python-hcloud."""
    took = []
    for _ in range(GETS):
        started = time.perf_counter()
        client.servers.get_by_id(server_id)
        took.append(time.perf_counter() - started)
    return statistics.median(took) * 1000


def per_second(endpoint: str, server_id: int) -> float:
    """Gets a second over a few keep-alive connections, from a process of their own so as not to share an interpreter."""
    parts = urlsplit(endpoint)
    done = [0] * CONNECTIONS
    until = time.monotonic() + SECONDS

    def ask(index: int) -> None:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        while time.monotonic() < until:
            connection.request("GET", f"/v1/servers/{server_id}", headers=headers)
            answer = connection.getresponse()
            answer.read()
            # The budget is refilled slower than this asks: a refusal is an answer too, and costs the server as much.
            assert answer.status in (200, 429), answer.status
            done[index] += 1
        connection.close()

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / SECONDS


def make_server(client: hcloud.Client, name: str, **more: Any) -> int:
    made = client.servers.create(name=name, server_type=ServerType("cx23"), image=Image(name="debian-12"), **more)
    made.action.wait_until_finished()
    return int(made.server.id)


def raw_server(endpoint: str, server_id: int) -> str:
    parts = urlsplit(endpoint)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    connection.request("GET", f"/v1/servers/{server_id}", headers={"Authorization": f"Bearer {TOKEN}"})
    body = connection.getresponse().read().decode()
    connection.close()
    return body


def main() -> None:
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        with served(OURS, TOKEN) as (endpoint, pid, start_s):
            client = client_for(endpoint)
            server_id = make_server(client, "one")
            record = raw_server(endpoint, server_id)
            figures["emulator"] = {"start s": start_s, "p50 ms": p50_ms(client, server_id)}
            figures["emulator"]["GET/s"] = per_second(endpoint, server_id)
            figures["emulator"]["RSS MB"] = rss_mb(pid)
        with served(OURS, TOKEN, f"{scratch}/journal.jsonl") as (endpoint, pid, start_s):
            client = client_for(endpoint)
            server_id = make_server(client, "one")
            figures["with journal"] = {"start s": start_s, "p50 ms": p50_ms(client, server_id)}
            figures["with journal"]["GET/s"] = per_second(endpoint, server_id)
            figures["with journal"]["RSS MB"] = rss_mb(pid)
        with served(FLOOR, TOKEN, record) as (endpoint, pid, start_s):
            client = client_for(endpoint)
            figures["floor"] = {"start s": start_s, "p50 ms": p50_ms(client, server_id)}
            figures["floor"]["GET/s"] = per_second(endpoint, server_id)
            figures["floor"]["RSS MB"] = rss_mb(pid)
    names = list(figures["floor"])
    print(f"{'':14}" + "".join(f"{name:>10}" for name in names))
    for who, row in figures.items():
        print(f"{who:14}" + "".join(f"{row[name]:10.2f}" for name in names))
    for who in ("emulator", "with journal"):
        ratios = {name: figures[who][name] / figures["floor"][name] for name in names}
        print(f"{who + ' / floor':22}" + ", ".join(f"{name} x {ratio:.2f}" for name, ratio in ratios.items()))
    large_fleet()


def large_fleet() -> None:
    """1,000 stub servers: requests and rows, counted."""
    with served(OURS, TOKEN) as (endpoint, pid, _):
        parts = urlsplit(endpoint)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        refused = made = 0
        started = time.monotonic()
        while made < FLEET:
            body = {
                "name": f"bot-{made}",
                "server_type": "cx23",
                "image": "debian-12",
                "labels": {"group": f"g{made % 10}", "ring": "canary" if made % 100 == 0 else "all"},
            }
            connection.request("POST", "/v1/servers", body=json.dumps(body), headers=headers)
            answer = connection.getresponse()
            said = json.loads(answer.read())
            if answer.status == 429:
                refused += 1
                time.sleep(max(0.05, float(answer.headers["RateLimit-Reset"]) - time.time()) if refused > 20 else 0.2)
            elif answer.status == 201:
                made += 1
            else:
                raise RuntimeError(f"server {made}: {answer.status} {said}")
        made_s = time.monotonic() - started
        client = client_for(endpoint)
        started = time.monotonic()
        rows = len(client.servers.get_all())
        listed_s = time.monotonic() - started
        chosen = len(client.servers.get_all(label_selector="group in (g1,g2),ring!=canary"))
        connection.request("GET", "/v1/servers?per_page=1", headers=headers)
        answer = connection.getresponse()
        answer.read()
        limit, remaining = answer.headers["RateLimit-Limit"], answer.headers["RateLimit-Remaining"]
        connection.close()
        print(
            f"\n{made} stub servers: made in {made_s:.1f} s ({refused} refused by the rate limit), "
            f"{rows} listed with {-(-rows // 50)} requests in {listed_s:.2f} s, {chosen} chosen by label; "
            f"budget left {remaining} of {limit}; {rss_mb(pid):.0f} MB"
        )


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    main()
