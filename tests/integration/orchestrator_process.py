"""The orchestrator as a real process on a real socket, for the tests of this folder."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BOT, OTHER_BOT, OPERATOR, NOBODY_IN_PARTICULAR = 61001, 61002, 61003, 61004
WHO = {
    BOT: ("scout", "bot-scout", False),
    OTHER_BOT: ("miner", "bot-miner", False),
    OPERATOR: ("operator:olga", "olga", True),
    0: ("operator:root", "root", True),
}


@dataclass
class Reply:
    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Process:
    """The running orchestrator; ``folder`` is short, as a socket's path has 107 characters."""

    folder: Path
    popen: subprocess.Popen[bytes]

    @property
    def socket_path(self) -> Path:
        return self.folder / "run" / "orchestrator.sock"

    @property
    def database(self) -> Path:
        return self.folder / "state" / "state.sqlite"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def ask(self, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """As this process's own user."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.connect(str(self.socket_path))
            connection.sock.settimeout(30)
            connection.request(method, target, raw, {} if headers is None else headers)
            answer = connection.getresponse()
            content = answer.read()
            return Reply(answer.status, json.loads(content), {k.lower(): v for k, v in answer.getheaders()})
        finally:
            connection.close()

    def ask_as(self, uid: int, method: str, target: str, body: Any = None) -> Reply:
        """As another user: a child process becomes it, so that the kernel vouches for it."""
        program = become(uid, self.socket_path.stat().st_gid) + (
            "path, method, target, body = json.load(sys.stdin)\n"
            "c = http.client.HTTPConnection('localhost', timeout=30)\n"
            "c.sock = socket.socket(socket.AF_UNIX); c.sock.connect(path)\n"
            "c.request(method, target, body)\n"
            "r = c.getresponse(); print(json.dumps([r.status, json.loads(r.read())]))\n"
        )
        text = None if body is None else json.dumps(body)
        done = subprocess.run(
            [sys.executable, "-I", "-c", program],
            input=json.dumps([str(self.socket_path), method, target, text]),
            capture_output=True,
            text=True,
            check=True,
        )
        status, content = json.loads(done.stdout)
        return Reply(status, content)

    def enqueue(self, kind: str = "later", payload: Any = None, **more: Any) -> Reply:
        body = {"protocolVersion": 1, "kind": kind, "payload": {} if payload is None else payload, **more}
        return self.ask("POST", "/v1/jobs/enqueue", body)

    def job(self, job_id: str) -> Any:
        return self.ask("GET", f"/v1/jobs/{job_id}").body["job"]

    def until(self, job_id: str, *statuses: str) -> Any:
        def there() -> Any:
            job = self.job(job_id)
            return job if job["status"] in statuses else None

        return until(there, f"job {job_id} to be {statuses}")

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> int:
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(timeout=60)


def become(uid: int, gid: int) -> str:
    """The first lines of a Python program that goes on as that user; the kernel notes who it is when it connects."""
    return (
        f"import http.client, json, os, resource, socket, sys; os.setgroups([]); os.setgid({gid}); os.setuid({uid})\n"
    )


def until(what: Any, words: str, *, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s for {words}")


def start(folder: Path, *, wait: bool = True, environ: dict[str, str] | None = None, **config: Any) -> Process:
    """Start it in ``folder``, made by ``short_folder``; the same folder again is the same store."""
    (folder / "run").mkdir(mode=0o755, exist_ok=True)
    (folder / "state").mkdir(mode=0o700, exist_ok=True)
    settings = {
        "socketPath": str(folder / "run" / "orchestrator.sock"),
        "database": str(folder / "state" / "state.sqlite"),
        "botsGroup": "nogroup",
        "operatorsGroup": "root",
        "bootstrap": None,
        "secretFolders": [str(folder / "secrets")],
        **config,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "who.json").write_text(json.dumps({str(uid): who for uid, who in WHO.items()}))
    with (folder / "log").open("ab") as log:
        popen = subprocess.Popen(
            [sys.executable, "-m", "tests.orchestrator_program", folder / "config.json", folder / "who.json"],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], **(environ or {})},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    process = Process(folder, popen)
    if wait:

        def answers() -> bool:
            assert popen.poll() is None, process.log
            try:
                return process.ask("GET", "/healthz").status == 200
            except OSError:
                return False

        until(answers, "the orchestrator to answer")
    return process


@contextmanager
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="clf-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def running(**config: Any) -> Iterator[Process]:
    with short_folder() as folder:
        process = start(folder, **config)
        try:
            yield process
        finally:
            if process.popen.poll() is None:
                process.kill()
