"""Who gets how far: real users and groups in a mount namespace of this program's own, run as root by ``unshare --mount``.

Lays its own passwd and group over this machine's, ``/run`` and ``/var/lib`` in memory, makes the socket as systemd does (root, group
clf-bots, 0660, passed as descriptor 3), runs the orchestrator as the user clf-orchestrator, and then tries everything as each
user. Prints one JSON object. Nothing of it is outside the namespace, and its end is the namespace's.
"""

from __future__ import annotations

import json
import os
import pwd
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GROUPS = {
    "root": (0, []),
    "clf-bots": (700, ["bot-scout", "bot-miner", "olga", "helper"]),
    "clf-operators": (701, ["olga"]),
}
USERS = {
    "root": 0,
    "clf-orchestrator": 710,
    "bot-scout": 711,
    "bot-miner": 712,
    "bot-outside": 713,
    "web": 714,
    "olga": 715,
    "helper": 716,
}

TRY = """
import http.client, json, os, socket, sys
found = {}
def attempt(name, call):
    try:
        found[name] = call()
    except OSError as error:
        found[name] = type(error).__name__
def ask(method, target, body=None):
    c = http.client.HTTPConnection("localhost", timeout=30)
    c.sock = socket.socket(socket.AF_UNIX)
    try:
        c.sock.connect("/run/clf/orchestrator.sock")
        c.request(method, target, None if body is None else json.dumps(body))
        r = c.getresponse()
        return [r.status, json.loads(r.read())]
    finally:
        c.close()
later = {"protocolVersion": 1, "kind": "later", "payload": {}, "runAt": "2026-12-20T00:00:00Z"}
attempt("connect", lambda: ask("GET", "/healthz")[0])
attempt("list", lambda: ask("GET", "/v1/jobs")[0])
def enqueue():
    status, answer = ask("POST", "/v1/jobs/enqueue", later)
    return [status, answer.get("jobId")]
attempt("enqueue", enqueue)
attempt("seen", lambda: sorted({job["requester"] for job in ask("GET", "/v1/jobs")[1].get("jobs", [])}))
attempt("others", lambda: ask("GET", "/v1/jobs/" + sys.argv[1])[0])
attempt("read database", lambda: len(open("/var/lib/clf/orchestrator/state.sqlite", "rb").read(16)))
attempt("list state folder", lambda: sorted(os.listdir("/var/lib/clf/orchestrator")))
attempt("replace socket", lambda: os.rename("/run/clf/orchestrator.sock", "/run/clf/x") or "moved" if os.getuid() else "not tried")
print(json.dumps(found))
"""


def run(*argv: str | Path) -> None:
    subprocess.run(argv, check=True)


def reachable(folder: Path) -> None:
    """Let every user get to ``folder`` (an interpreter below root's home, say), in this namespace only."""
    for part in reversed([folder, *folder.parents]):
        if part.stat().st_mode & 0o001:
            continue
        stash = Path(tempfile.mkdtemp(prefix="clf-stash-"))
        run("mount", "--rbind", folder, stash)
        run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", part)
        folder.mkdir(parents=True, exist_ok=True)
        run("mount", "--rbind", stash, folder)
        stash_gone = subprocess.run(["umount", "-l", stash])
        if stash_gone.returncode == 0:
            stash.rmdir()
        return


def own_machine() -> None:
    """This namespace's users, groups, /run and /var/lib."""
    folder = Path(tempfile.mkdtemp(prefix="clf-etc-"))
    passwd = "".join(f"{name}:x:{uid}:{uid or 0}::/nonexistent:/bin/sh\n" for name, uid in USERS.items())
    group = "".join(f"{name}:x:{gid}:{','.join(members)}\n" for name, (gid, members) in GROUPS.items())
    group += "".join(f"{name}:x:{uid}:\n" for name, uid in USERS.items() if uid)
    for name, content in (("passwd", passwd), ("group", group)):
        (folder / name).write_text(content)
        (folder / name).chmod(0o644)
        run("mount", "--bind", folder / name, f"/etc/{name}")
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
    for place in ("/run", "/var/lib"):
        run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", place)
    Path("/run/clf").mkdir()
    Path("/run/clf").chmod(0o750)
    os.chown("/run/clf", 0, GROUPS["clf-bots"][0])
    Path("/var/lib/clf").mkdir(mode=0o755)
    Path("/var/lib/clf/orchestrator").mkdir(mode=0o700)
    os.chown("/var/lib/clf/orchestrator", USERS["clf-orchestrator"], USERS["clf-orchestrator"])
    Path("/run/config.json").write_text(json.dumps({"workers": 0, "bootstrap": None}))
    Path("/run/config.json").chmod(0o644)


def orchestrator() -> subprocess.Popen[bytes]:
    """As systemd starts it from its socket unit; its user is not in the group clf-bots."""
    listening = socket.socket(socket.AF_UNIX)
    before = os.umask(0o117)
    listening.bind("/run/clf/orchestrator.sock")
    os.umask(before)
    os.chown("/run/clf/orchestrator.sock", 0, GROUPS["clf-bots"][0])
    listening.listen(128)
    starter = (
        "import os, sys\n"
        "os.dup2(int(sys.argv[1]), 3)\n"
        "os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2])); os.umask(0o077)\n"
        "env = {'PATH': os.environ['PATH'], 'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'}\n"
        "os.execve(sys.executable, [sys.executable, '-B', '-m', 'tests.orchestrator_program', '/run/config.json'], env)\n"
    )
    uid = str(USERS["clf-orchestrator"])
    argv = [sys.executable, "-c", starter, str(listening.fileno()), uid]
    process = subprocess.Popen(argv, cwd=ROOT, pass_fds=[listening.fileno()])
    listening.close()
    return process


def as_user(name: str, others: str) -> Any:
    """What a user gets to; ``others`` is a job of the bot scout's."""
    uid = USERS[name]
    done = subprocess.run(
        ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--init-groups", sys.executable, "-I", "-c", TRY, others],
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


def main() -> None:
    for needed in (Path(sys.base_prefix), Path(sys.prefix), ROOT):
        reachable(needed.resolve())
    own_machine()
    process = orchestrator()
    found: dict[str, Any] = {}
    try:
        deadline = time.monotonic() + 120
        while not Path("/var/lib/clf/orchestrator/state.sqlite-wal").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit("the orchestrator did not begin")
            time.sleep(0.1)
        first = as_user("bot-scout", "none")
        others = first["enqueue"][1]
        operators = ["olga", "root"]  # last, when there is something of everybody to see
        found = {name: as_user(name, others) for name in [*(USERS.keys() - operators), *operators]}
        state = Path("/var/lib/clf/orchestrator")
        found["modes"] = {
            str(path): f"{path.stat().st_mode & 0o7777:04o} {pwd.getpwuid(path.stat().st_uid).pw_name}"
            for path in [Path("/run/clf"), Path("/run/clf/orchestrator.sock"), state, *sorted(state.iterdir())]
        }
    finally:
        process.terminate()
        process.wait(60)
    os.chown("/run/clf", 0, GROUPS["clf-operators"][0])  # the folder lets in others than the bots
    Path("/run/clf/orchestrator.sock").unlink()
    found["for another group"] = orchestrator().wait(120)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
