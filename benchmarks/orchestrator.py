"""The orchestrator's socket against the disk beneath it, in one run: what is durable, and how fast.

The floor is SQLite itself on the same file system: one row, one commit, WAL, synchronous = FULL, no server. Ours is the real
``clf-orchestrator`` process with the real API: a POST is parsed, judged by its kind and inserted (job and event), and answered after
the commit that holds it. Clients are processes of their own with keep-alive connections over the unix socket. SQLite at 1, 16 and 64
clients, then PostgreSQL where it is installed (``fsync`` on, its own folder on the same disk). The other floor is the same server
(Starlette, uvicorn, uvloop, httptools) that answers and stores nothing: where that is not much faster than the disk, no server in
Python is. Floors and ours take turns, and the median of each counts. Prints ratios and counts; the seconds are this machine's.

    python benchmarks/orchestrator.py [--seconds 3] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CLIENTS = (1, 16, 64)

SERVER = """
import json, logging, os, sys
from pathlib import Path
from clawdlets_ops.orchestrator import daemon
from clawdlets_ops.orchestrator.identity import Who
from clawdlets_ops.orchestrator.jobs import Kind
kind = Kind("later", lambda payload, requester: (), lambda job, context: None, max_unfinished=None, max_unfinished_in_all=None)
sys.exit(daemon.run(daemon.read_config(Path(sys.argv[1])), os.environ, lambda parts: daemon.Work(kinds=[kind]),
    identify=lambda uid: Who("scout", "bot-scout", False)))
"""

EMPTY = """
import sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
async def answer(request):
    await request.body()
    return Response(b'{"ok":true,"jobId":"none"}', media_type="application/json")
uvicorn.run(Starlette(routes=[Route("/v1/jobs/enqueue", answer, methods=["POST"])]), uds=sys.argv[1], loop="uvloop", http="httptools",
    log_level="error", access_log=False)
"""

# One process, many connections: each has one request on its way, as a bot has. A selector, no framework: the load is cheap.
LOAD = """
import json, selectors, socket, sys, time
path, clients, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
body = json.dumps({"protocolVersion": 1, "kind": "later", "payload": {"text": "x" * 100}, "runAt": ""}).encode()
request = b"POST /v1/jobs/enqueue HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body)
chosen, took, begun, parts = selectors.DefaultSelector(), [], {}, {}
for _ in range(clients):
    s = socket.socket(socket.AF_UNIX)
    s.connect(path)
    chosen.register(s, selectors.EVENT_READ)
    begun[s] = time.perf_counter()
    s.sendall(request)
start = time.perf_counter()
end = start + seconds
now = start
while now < end:
    for key, _ in chosen.select(1):
        s = key.fileobj
        said = parts.pop(s, b"") + s.recv(65536)
        if not said.endswith(b'"}'):  # the head and the body come apart
            parts[s] = said
            continue
        now = time.perf_counter()
        if not said.startswith(b"HTTP/1.1 200"):
            sys.exit(said.decode())
        took.append(now - begun[s])
        begun[s] = now
        s.sendall(request)
took.sort()
print(json.dumps({"rate": len(took) / (now - start), "p50": took[len(took) // 2], "p99": took[int(len(took) * 0.99)]}))
"""


def raw(folder: Path, seconds: float) -> float:
    """Rows a second, one commit each, WAL and FULL, by the sqlite3 module alone."""
    path = folder / "raw.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode = WAL", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    connection.execute("CREATE TABLE IF NOT EXISTS jobs (id INTEGER PRIMARY KEY, payload TEXT)")
    count, begun = 0, time.perf_counter()
    while (now := time.perf_counter()) - begun < seconds:
        connection.execute("INSERT INTO jobs (payload) VALUES (?)", ("x" * 300,))
        count += 1
    connection.close()
    return count / (now - begun)


@contextmanager
def orchestrator(folder: Path, **store: str) -> Iterator[Path]:
    """The process, with as many workers as by default none: the queue alone is measured."""
    (folder / "state").mkdir(mode=0o700, parents=True)
    (folder / "run").mkdir(mode=0o755)
    config = {
        "socketPath": str(folder / "run" / "o.sock"),
        "database": str(folder / "state" / "state.sqlite"),
        "botsGroup": "root" if os.geteuid() == 0 else "users",
        "bootstrap": None,
        "workers": 0,
        "secretFolders": [str(folder)],
        **store,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with serving([SERVER, str(folder / "config.json")], folder / "run" / "o.sock") as path:
        yield path


@contextmanager
def serving(words: list[str], path: Path) -> Iterator[Path]:
    """A program of Python's, while it serves on the socket ``path``."""
    process = subprocess.Popen([sys.executable, "-c", *words], cwd=ROOT)
    try:
        deadline = time.monotonic() + 180
        while not path.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield path
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def load(path: Path, clients: int, seconds: float) -> dict[str, float]:
    """Requests a second and the times of one, in s."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, path, str(clients), str(seconds)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A PostgreSQL of our own with its usual durability; its URL."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    folder.mkdir()
    os.chown(folder, user.pw_uid, user.pw_gid)
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    made = [programs / "initdb", "-D", folder / "data", "-U", "clf", "-A", "trust"]
    done = subprocess.run(made, env=env, cwd=folder, capture_output=True, text=True, **who)
    assert done.returncode == 0, done.stderr
    argv = [programs / "postgres", "-D", folder / "data", "-k", folder, "-c", "listen_addresses="]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, env=env, cwd=folder, stdout=log, stderr=log, **who)
    try:
        deadline = time.monotonic() + 60
        ready = [programs / "pg_isready", "-h", folder]
        while subprocess.run(ready, capture_output=True).returncode != 0:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"postgresql://clf@/postgres?host={folder}"
    finally:
        process.terminate()
        process.wait(60)


def measure(path: Path, empty: Path, folder: Path, *, seconds: float, rounds: int, of: str) -> None:
    """A table for one store."""
    print(f"\n{of}\n  clients   requests/s     p50 ms    p99 ms    raw commits/s   ratio    storing nothing/s   ratio")
    for clients in CLIENTS:
        floors, servers, ours = [], [], []
        for _ in range(rounds):
            floors.append(raw(folder, seconds / 2))
            ours.append(load(path, clients, seconds))
            servers.append(load(empty, clients, seconds / 2)["rate"])
        floor, server = statistics.median(floors), statistics.median(servers)
        rate, p50, p99 = (statistics.median(one[key] for one in ours) for key in ("rate", "p50", "p99"))
        print(
            f"  {clients:7}   {rate:10.0f}   {p50 * 1000:8.2f}  {p99 * 1000:8.2f}    {floor:13.0f}   {rate / floor:5.2f}"
            f"    {server:17.0f}   {rate / server:5.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended and removed
    folder = Path(tempfile.mkdtemp(prefix="clf-bench-", dir="/var/tmp"))
    folder.chmod(0o755)
    how = {"seconds": arguments.seconds, "rounds": arguments.rounds}
    with serving([EMPTY, str(folder / "empty.sock")], folder / "empty.sock") as empty:
        compare(folder, empty, how)


def compare(folder: Path, empty: Path, how: Mapping[str, Any]) -> None:
    """Both stores; the folder is removed at the end."""
    try:
        with orchestrator(folder / "sqlite") as path:
            measure(path, empty, folder, of="SQLite, WAL, synchronous = FULL, group commit", **how)
        if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
            print("\nPostgreSQL is not installed")
            return
        with postgresql(folder / "pg") as url:
            (folder / "served").mkdir()
            (folder / "served" / "clf_database_url").write_text(url)
            with orchestrator(folder / "served", store="postgresql") as path:
                measure(path, empty, folder, of="PostgreSQL, fsync = on, group commit", **how)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
