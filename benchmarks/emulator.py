"""The emulator against a floor measured in the same run: a plain in-memory HTTP server that always says the same.

Both run as processes of their own, with the same clients: python-hcloud one request at a time (p50 of a get by id, most of
which is the client's own), the same get over a bare socket, and keep-alive connections of a third process that ask as fast
as they can; the emulator's budget is out of the way, so that every answer is the whole server. They take turns, in several
rounds, and the best of each counts: the others on this machine only ever make it slower. Then 1,000 stub servers with their
state on disk: making, listing, label selection, a restart, a kill; and the rate limit. Prints ratios and counts; the seconds
are this machine's and mean nothing elsewhere.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
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
SECONDS = 2.0
ROUNDS = 5
FLEET = 1000

OURS = """
import sys
from pathlib import Path
from clawdlets_ops.lab.api import Emulator
from clawdlets_ops.lab.backend import LoopbackPool, StubBackend
from clawdlets_ops.lab.cloud import Cloud
from clawdlets_ops.lab.ratelimit import Budget
token, budget, state, journal = sys.argv[1], *(Path(word) if word else None for word in sys.argv[2:])
cloud = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=state)
emulator = Emulator(cloud, token=token, journal_file=journal, budget=Budget(int(str(budget))))
emulator.start()
print(emulator.endpoint, flush=True)
sys.stdin.read()
"""
UNLIMITED = str(10**9)

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
    def handle_error(self, *_): pass
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


# A client that costs next to nothing: prints the median of single gets in ms, then the gets a second of several connections.
LOAD = """
import selectors, socket, statistics, sys, time
host, port, path, token, connections, seconds = sys.argv[1], int(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5]), float(sys.argv[6])
request = f"GET {path} HTTP/1.1\\r\\nHost: {host}\\r\\nAccept: */*\\r\\nUser-Agent: load\\r\\nAuthorization: Bearer {token}\\r\\n\\r\\n".encode()
def whole(data):
    head, gap, body = data.partition(b"\\r\\n\\r\\n")
    if not gap: return False
    assert head[9:12] == b"200", head
    at = head.index(b"Content-Length: ") + 16
    return len(body) >= int(head[at:].split(b"\\r", 1)[0])
def connect():
    made = socket.create_connection((host, port))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made
one, took = connect(), []
until = time.monotonic() + seconds
while time.monotonic() < until:
    started, data = time.perf_counter(), b""
    one.sendall(request)
    while not whole(data): data += one.recv(262144)
    took.append(time.perf_counter() - started)
one.close()
waiting, data, done = selectors.DefaultSelector(), {}, 0
for _ in range(connections):
    each = connect()
    waiting.register(each, selectors.EVENT_READ)
    data[each] = b""
    each.sendall(request)
until = time.monotonic() + seconds
while time.monotonic() < until:
    for key, _ in waiting.select(1):
        data[key.fileobj] += key.fileobj.recv(262144)
        if whole(data[key.fileobj]):
            done, data[key.fileobj] = done + 1, b""
            key.fileobj.sendall(request)
print(statistics.median(took) * 1000, done / seconds)
"""


def load(endpoint: str, server_id: int) -> tuple[float, float]:
    """Median of single gets in ms, gets a second over a few keep-alive connections; every answer is 200."""
    parts = urlsplit(endpoint)
    words = [parts.hostname or "", str(parts.port), f"/v1/servers/{server_id}", TOKEN, str(CONNECTIONS), str(SECONDS)]
    done = subprocess.run([sys.executable, "-S", "-c", LOAD, *words], capture_output=True, text=True, check=True)
    median, rate = map(float, done.stdout.split())
    return median, rate


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


def measured(program: str, *arguments: str, record: str | None = None) -> tuple[dict[str, float], str]:
    """One round's figures, and the server as it is sent."""
    with served(program, TOKEN, *arguments) as (endpoint, pid, start_s):
        client = client_for(endpoint)
        server_id = 1001 if record else make_server(client, "one")
        record = record or raw_server(endpoint, server_id)
        figures = {"start s": start_s, "p50 ms hcloud": p50_ms(client, server_id)}
        figures["p50 ms bare"], figures["GET/s"] = load(endpoint, server_id)
        figures["RSS MB"] = rss_mb(pid)
    return figures, record


def main() -> None:
    rounds: dict[str, list[dict[str, float]]] = {"emulator": [], "with disk": [], "floor": []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(ROUNDS):
            on_disk = (f"{scratch}/{number}.json", f"{scratch}/{number}.jsonl")
            ours, record = measured(OURS, UNLIMITED, "", "")
            rounds["emulator"].append(ours)
            rounds["with disk"].append(measured(OURS, UNLIMITED, *on_disk)[0])
            rounds["floor"].append(measured(FLOOR, record, record=record)[0])
    names = list(rounds["floor"][0])
    figures = {
        who: {name: (max if name == "GET/s" else min)(row[name] for row in rows) for name in names}
        for who, rows in rounds.items()
    }
    print(f"best of {ROUNDS:<7}" + "".join(f"{name:>15}" for name in names))
    for who, best in figures.items():
        print(f"{who:14}" + "".join(f"{best[name]:15.2f}" for name in names))
    for who in ("emulator", "with disk"):
        ratios = {name: figures[who][name] / figures["floor"][name] for name in names}
        print(f"{who + ' / floor':22}" + ", ".join(f"{name} x {ratio:.2f}" for name, ratio in ratios.items()))
    with tempfile.TemporaryDirectory() as scratch:
        large_fleet(Path(scratch))


def large_fleet(folder: Path) -> None:
    """1,000 stub servers, with state and journal on disk: requests and rows, counted."""
    words = (TOKEN, "3600", str(folder / "cloud.json"), str(folder / "journal.jsonl"))
    with served(OURS, *words) as (endpoint, pid, _):
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
        refusals = 0
        for _ in range(int(remaining) + 200):
            connection.request("GET", "/v1/pricing", headers=headers)
            answer = connection.getresponse()
            answer.read()
            refusals += answer.status == 429
        connection.close()
        print(
            f"\n{made} stub servers: made in {made_s:.1f} s ({refused} refused by the rate limit), "
            f"{rows} listed with {-(-rows // 50)} requests in {listed_s:.2f} s, {chosen} chosen by label; "
            f"budget left {remaining} of {limit}; {rss_mb(pid):.0f} MB; "
            f"of {int(remaining) + 200} requests more, {refusals} were refused"
        )
        os.kill(pid, signal.SIGKILL)
    with served(OURS, *words) as (endpoint, pid, start_s):
        rows = len(client_for(endpoint).servers.get_all())
        size_mb = (folder / "cloud.json").stat().st_size / 1e6
        print(
            f"killed and started again: {start_s:.2f} s, {rows} servers, {rss_mb(pid):.0f} MB, state of {size_mb:.1f} MB"
        )


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    main()
