"""The whole story on the lab: a bot asks, a machine appears, joins the tailnet, fetches its environment once, runs the task as
nobody in particular, sends the result back, and is gone. The real orchestrator, and the real tailnet where it is built.

The orchestrator runs beside the operator's node of the tailnet, with users and groups of its own (a mount namespace), and gets
at the emulated API through a relay on that namespace's loopback.
"""

from __future__ import annotations

import grp
import json
import multiprocessing
import os
import pwd
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.cattle import labels
from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.hetzner import HetznerCloud
from clawdlets_ops.lab import cattle_image, control
from clawdlets_ops.lab.headscale import BOOTSTRAP_PORT, CATTLE_TAG, REAL, Programs, RealTailnet, login_server, obstacle
from clawdlets_ops.lab.network import in_namespace
from clawdlets_ops.lab.registry import LabRecord, read_record
from clawdlets_ops.layout import Layout
from clawdlets_ops.orchestrator.client import Client
from clawdlets_ops.process import Command, LocalRunner, Result
from clawdlets_ops.project import load_project
from clawdlets_ops.testing import canary
from tests.lab.conftest import ROOT, TAILNET, LabProject

HINDERED = obstacle(ROOT / ".cache" / "tools", Path("/run"), os.environ.get("PATH", ""))

pytestmark = [
    pytest.mark.lab,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(HINDERED is not None, reason=f"no real tailnet here: {HINDERED}"),
    pytest.mark.skipif(
        TAILNET == "stand-in", reason="the stand-in has no address that an orchestrator could listen on"
    ),
]

SECRET = canary("model-api-key")
MESSAGE = "canary-message-that-no-argument-may-hold"
BOT_UID, BOTS_GID = 61001, 61002
RUN = """#!/bin/sh
# Says what a task can see, and ends when the test has looked at the machine.
exec python3 - 3<&0 <<'END'
import hashlib, json, os, time, urllib.request
task = json.load(os.fdopen(3))
def tried(what):
    try:
        return str(what())[:200]
    except Exception as error:
        return type(error).__name__
seen = {
    "user": os.popen("id -un").read().strip(),
    "message": task["message"],
    "greeting": os.environ.get("GREETING"),
    "secret": hashlib.sha256(os.environ["MODEL_API_KEY"].encode()).hexdigest(),
    "variables": sorted(os.environ),
    "metadata": tried(lambda: urllib.request.urlopen("http://169.254.169.254/hetzner/v1/userdata", timeout=2).read()),
    "environment file": tried(lambda: open("/run/clawdlets/cattle/env").read()),
    "written": tried(lambda: open("/etc/x", "w")),
}
open("ready", "w").close()
deadline = time.time() + 200
while not os.path.exists("go") and time.time() < deadline:
    time.sleep(0.05)
print(json.dumps(seen))
END
"""


class _Relay(socketserver.ThreadingTCPServer):
    """What a host on the internet would have: a way to the API. Bytes are passed on as they are."""

    daemon_threads = True
    target: tuple[str, int]


class _Pass(socketserver.BaseRequestHandler):
    server: _Relay

    def handle(self) -> None:
        with socket.create_connection(self.server.target) as onward:
            back = threading.Thread(target=self._pump, args=(onward, self.request), daemon=True)
            back.start()
            self._pump(self.request, onward)
            back.join(timeout=30)

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@dataclass
class Orchestra:
    """A running orchestrator, and what a test asks of it."""

    project: LabProject
    record: LabRecord
    folder: Path
    process: subprocess.Popen[bytes]
    runner: LocalRunner
    cloud: HetznerCloud
    marks: dict[str, float] = field(default_factory=dict)

    @property
    def client(self) -> Client:
        return Client(str(self.folder / "run" / "clf.sock"), timeout_s=60)

    @property
    def log(self) -> str:
        return (self.folder / "daemon.log").read_text()

    def as_bot(self, work: Callable[[Client], Any]) -> Any:
        """``work`` done by a process of the user bot-maren, who is in the group of the bots and nothing else."""
        out, inner = multiprocessing.Pipe(duplex=False)

        def child() -> None:
            os.setgroups([BOTS_GID])
            os.setgid(BOT_UID)
            os.setuid(BOT_UID)
            try:
                inner.send(("ok", work(self.client)))
            except ClawdletsError as error:
                inner.send(("error", str(error)))

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        assert out.poll(30)
        word, found = out.recv()
        process.join(timeout=30)
        assert word == "ok", found
        return found

    def until(self, what: str, condition: Callable[[], Any], timeout_s: float = 150.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{what}: not in time\n{self.log[-3000:]}"
            assert self.process.poll() is None, self.log[-3000:]
            time.sleep(0.05)
        self.marks.setdefault(what, time.monotonic())
        return found

    def servers(self) -> tuple[Any, ...]:
        return self.cloud.servers_with({labels.CATTLE: "true"})

    def guest(self, name: str, *argv: str) -> Result:
        command = Command(control.guest_argv(Layout(self.project.root), name, argv), "look into the machine")
        return self.runner.run(command)


@pytest.fixture(scope="module")
def orchestra(project: LabProject) -> Iterator[Orchestra]:
    loaded = load_project(project.root, project.env())
    record = read_record(Layout(project.root).lab)
    assert record is not None
    runner = LocalRunner(loaded.environ)
    image = cattle_image.make(Layout(project.root), runner)
    folder = Path(tempfile.mkdtemp(prefix="clf-"))
    folder.chmod(0o755)
    process: subprocess.Popen[bytes] | None = None
    api = loaded.hcloud_endpoint.split("//")[1].split("/")[0].split(":")
    relay = in_namespace(record.net.tailnet_ns, lambda: _Relay(("127.0.0.1", 0), _Pass))
    relay.target = (api[0], int(api[1]))
    threading.Thread(target=relay.serve_forever, daemon=True).start()
    try:
        _lay_out(folder, record, loaded, image, relay.server_address[1], runner)
        process = _start(folder, record)
        yield Orchestra(project, record, folder, process, runner, HetznerCloud(loaded.token, loaded.hcloud_endpoint))
    finally:
        if process is not None:
            process.terminate()
            process.wait(timeout=60)
        relay.shutdown()
        relay.server_close()
        shutil.rmtree(folder)


def _lay_out(folder: Path, record: LabRecord, loaded: Any, image: int, port: int, runner: LocalRunner) -> None:
    for name, mode in (
        ("secrets", 0o700),
        ("state", 0o700),
        ("personas", 0o755),
        ("personas/rex", 0o755),
        ("run", 0o750),
    ):
        (folder / name).mkdir()
        (folder / name).chmod(mode)
    os.chown(folder / "run", 0, BOTS_GID)
    (folder / "personas" / "rex" / "run").write_text(RUN)
    (folder / "personas" / "rex" / "run").chmod(0o755)
    secrets = {"hcloud_token": loaded.token.reveal(), "model_api_key": SECRET.reveal()}
    tailnet: dict[str, Any] = {"key": "static"}
    if record.tailnet == REAL:
        programs = Programs.find(Layout(record.root).cache / "tools")
        assert programs is not None
        own = RealTailnet(record.net, programs, record.lab_dir / "tailnet", runner, path=record.path)
        secrets["headscale_api_key"] = own.api_key().reveal()
        tailnet = {
            "key": "headscale",
            "headscaleUser": "operator",
            "apiEndpoint": login_server(record.net),
            "tag": CATTLE_TAG,
        }
    else:
        secrets["tailscale_cattle_auth_key"] = (record.lab_dir / "tailnet_auth_key").read_text().strip()
    for name, value in secrets.items():
        (folder / "secrets" / name).write_text(value)
    cattle = {
        "enabled": True, "host": "alpha", "images": [str(image)], "maxInstances": 2, "maxPerBot": 1, "defaultTtl": "5m",
        "tailnet": tailnet, "bots": {"maren": {"personas": ["rex"]}},
        "personas": {"rex": {"variables": {"GREETING": "good morning"}, "secrets": {"MODEL_API_KEY": "model_api_key"}}},
    }  # fmt: skip
    config = {
        "socketPath": str(folder / "run" / "clf.sock"), "database": str(folder / "state" / "state.sqlite"), "workers": 2,
        "bootstrap": {
            "listen": record.net.tailnet(1)[0], "port": BOOTSTRAP_PORT, "whois": "tailscaled" if record.tailnet == REAL else "none",
            "tailscaledSocket": str(record.lab_dir / "tailnet" / "operator.sock"),
        },
        "secretFolders": [str(folder / "secrets")], "hcloudEndpoint": f"http://127.0.0.1:{port}/v1",
        "personas": str(folder / "personas"), "cattle": cattle, "authorizedKeys": list(loaded.admin_keys("alpha")),
        **({"tailnetCa": str(record.lab_dir / "tailnet" / "cert.pem")} if record.tailnet == REAL else {}),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    users = Path("/etc/passwd").read_text() + f"bot-maren:x:{BOT_UID}:{BOT_UID}::/:/bin/false\n"
    groups = Path("/etc/group").read_text() + f"clf-bots:x:{BOTS_GID}:bot-maren\nclf-operators:x:{BOTS_GID + 1}:\n"
    (folder / "passwd").write_text(users)
    (folder / "group").write_text(groups)
    for name in ("passwd", "group"):
        (folder / name).chmod(0o644)
    assert BOT_UID not in [one.pw_uid for one in pwd.getpwall()]
    assert BOTS_GID not in [one.gr_gid for one in grp.getgrall()]


def _start(folder: Path, record: LabRecord) -> subprocess.Popen[bytes]:
    script = (
        f"mount --bind {folder}/passwd /etc/passwd && mount --bind {folder}/group /etc/group && "
        f'exec {sys.executable} -c "from clawdlets_ops.clf_orchestrator import main; main()" --config {folder}/config.json'
    )
    argv = ["ip", "netns", "exec", record.net.tailnet_ns, "unshare", "--mount", "sh", "-c", script]
    with (folder / "daemon.log").open("wb") as out:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)


def payload(**changes: Any) -> dict[str, Any]:
    task = {"schemaVersion": 1, "taskId": "t-1", "type": "clawdbot.gateway.agent", "message": MESSAGE}
    return {"persona": "rex", "task": task, **changes}


FETCH_AGAIN = """
import glob, json, os, sys, urllib.error, urllib.request
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
text = direct.open("http://169.254.169.254/hetzner/v1/userdata", timeout=5).read().decode()
files = {one["path"]: one["content"] for one in json.loads(text.partition(chr(10))[2])["write_files"]}
bootstrap = json.loads(files["/run/clawdlets/cattle/bootstrap.json"])
ident = direct.open("http://169.254.169.254/hetzner/v1/metadata/instance-id", timeout=5).read().decode()
headers = {"Authorization": "Bearer " + bootstrap["token"], "X-Clf-Server-Id": ident, "X-Clf-Fetch-Id": "another01"}
try:
    status = direct.open(urllib.request.Request(bootstrap["baseUrl"] + "/v1/cattle/env", headers=headers), timeout=10).status
except urllib.error.HTTPError as error:
    status = error.code
def holds(path, needle):
    try:
        return needle in open(path, "rb").read()
    except OSError:
        return False
needles = [bootstrap["token"], files["/run/clawdlets/cattle/tailscale_auth_key"].strip()]
argv = b"".join(open(path, "rb").read() for path in glob.glob("/proc/[0-9]*/cmdline") if path.split("/")[2] != str(os.getpid()))
control = "/root/control-of-the-search"  # the search finds what is there
open(control, "w").write(needles[0])
disk = [path for folder in ("/var/lib/cloud", "/var/log", "/etc", "/root") for path in glob.glob(folder + "/**", recursive=True)
        if any(holds(path, needle.encode()) for needle in needles)]
os.unlink(control)
print(json.dumps({"status": status, "disk": disk, "argv": [word for word in [*needles, sys.argv[1], sys.argv[2]] if word[2:].encode() in argv],
                  "control": holds("/proc/self/cmdline", sys.argv[1].encode())}))
"""


def test_a_bot_asks_and_a_machine_appears_does_it_and_is_gone(orchestra: Orchestra) -> None:
    began = time.monotonic()
    job_id = orchestra.until(
        "enqueued", lambda: _try(lambda: orchestra.as_bot(lambda client: client.enqueue("cattle.spawn", payload())))
    )
    (server,) = orchestra.until("server ordered", orchestra.servers)
    assert labels.read(server.labels).bot == "maren"  # type: ignore[union-attr]
    work = "/var/lib/clawdlets/cattle/work"
    orchestra.until(
        "task runs",
        lambda: (
            _ended(orchestra.client.show(job_id))
            or _quiet(lambda: orchestra.guest(server.name, "test", "-e", f"{work}/ready").ok)
        ),
    )
    running = orchestra.client.show(job_id)
    assert running["status"] == "running", json.dumps(running["result"])

    # What somebody has who reads the user data later: root on the machine itself, with the right server id.
    said = json.loads(
        orchestra.guest(server.name, "python3", "-c", FETCH_AGAIN, f"xx{MESSAGE}", f"xx{SECRET.reveal()}")
        .check()
        .stdout
    )
    assert said["status"] == 401, "the second fetch is refused"
    assert said["control"], "the search of argv can find something"
    assert said["argv"] == []
    assert said["disk"] == ["/root/control-of-the-search"], "cloud-init's copies are scrubbed"
    place = orchestra.guest(server.name, "stat", "--file-system", "--format=%T", "/run/clawdlets/cattle").stdout
    assert place.strip() == "tmpfs"
    gone = orchestra.guest(server.name, "ls", "/run/clawdlets/cattle").stdout.split()
    assert {"tailscale_auth_key", "bootstrap.json"} & set(gone) == set()

    # What an operator sees of it, and the way in: over the tailnet.
    project = orchestra.project
    assert f"for maren  job {job_id}" in project.run("clawdlets", "cattle", "list").stdout
    assert project.run("clawdlets", "cattle", "ssh", server.name, "id", "-un").stdout.splitlines()[-1] == "admin"
    assert "fetchedAt" in project.run("clawdlets", "cattle", "logs", server.name).stdout

    orchestra.guest(server.name, "touch", f"{work}/go").check()
    job = orchestra.until("job ended", lambda: _ended(orchestra.client.show(job_id)))
    assert job["status"] == "done", (job, orchestra.log[-3000:])
    orchestra.until("server gone", lambda: not orchestra.servers())
    result = job["result"]
    seen = json.loads(result["task"]["output"])
    assert seen["user"] == "clawdlets-task"
    assert (seen["message"], seen["greeting"]) == (MESSAGE, "good morning")
    assert seen["secret"] == sha256(SECRET.reveal().encode()).hexdigest()
    assert seen["metadata"] in ("URLError", "TimeoutError")
    assert seen["environment file"] in ("PermissionError", "FileNotFoundError")
    assert seen["written"] in ("OSError", "PermissionError")
    assert not [name for name in seen["variables"] if "TOKEN" in name or "TAILSCALE" in name]
    log = orchestra.log
    for secret in (SECRET.reveal(), MESSAGE):
        assert secret not in log
    assert "environment token of" in log
    assert "refused (used)" in log
    _print_timeline(result, orchestra, began)


def test_a_bot_sees_its_own_jobs_and_what_it_may_not_have_is_refused_with_the_field(orchestra: Orchestra) -> None:
    jobs = orchestra.as_bot(lambda client: [job["requester"] for job in client.list_jobs()])
    assert set(jobs) == {"maren"}
    with pytest.raises(AssertionError, match="not acceptable"):
        orchestra.as_bot(lambda client: client.enqueue("cattle.spawn", payload(serverType="ccx63")))
    with pytest.raises(AssertionError):
        orchestra.as_bot(lambda client: client.enqueue("cattle.reap", {}))


def _print_timeline(result: Any, orchestra: Orchestra, began: float) -> None:
    moments = {**result["timeline"], **{f"machine: {name}": at for name, at in result["task"]["timeline"].items()}}
    first = moments["enqueuedAt"]
    print()  # noqa: T201
    for name, at in sorted(moments.items(), key=lambda pair: pair[1]):
        print(f"{(at - first) / 1000:8.2f} s  {name}")  # noqa: T201
    print(f"{time.monotonic() - began:8.2f} s  in all, as seen by the test")  # noqa: T201


def _ended(job: Any) -> Any:
    return job if job["status"] in ("done", "failed", "canceled") else None


def _try(ask: Callable[[], Any]) -> Any:
    """The orchestrator may not be up yet."""
    try:
        return ask()
    except AssertionError:
        return None


def _quiet(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except ClawdletsError:
        return False
