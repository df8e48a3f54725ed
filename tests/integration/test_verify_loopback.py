"""The verification against real programs: sshd on loopback, sockets, git.

Nothing here leaves the machine; what is started is ended by its pid.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tenacity import Retrying, stop_after_delay, wait_fixed

from clawdlets_ops.doctor.ignored import git_evidence
from clawdlets_ops.errors import VerifyError
from clawdlets_ops.fleet import load_fleet
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import Project
from clawdlets_ops.vantage import Vantage
from clawdlets_ops.verify import evidence as evidence_module
from clawdlets_ops.verify.catalogue import catalogue
from clawdlets_ops.verify.evidence import HostEvidence
from clawdlets_ops.verify.expectation import build_expectation
from clawdlets_ops.verify.exposure import measure_exposure, probe_from
from clawdlets_ops.verify.run import verify_host
from clawdlets_ops.verify.suite.reading import Unknown, section
from clawdlets_ops.verify.vantage import by_ssh, parse_control

pytestmark = pytest.mark.integration

SSHD = Path("/usr/sbin/sshd")
PATH = "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
RUNNER = LocalRunner({"PATH": PATH})
PROFILE = Path("clawdlets_ops/lab/profile")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="sshd and the facts program need root")
needs_sshd = pytest.mark.skipif(not SSHD.exists(), reason="/usr/sbin/sshd is not there (Debian: openssh-server)")


def keygen(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "canary", "-f", path], check=True)
    return path.with_suffix(".pub").read_text().strip()


def free_port() -> int:
    with socket.socket() as stream:
        stream.bind(("127.0.0.1", 0))
        return int(stream.getsockname()[1])


# --- a real sshd ---


@dataclass(frozen=True)
class Door:
    """An sshd on loopback: its port, its log, its public host key, and the key file that it lets in."""

    port: int
    log: Path
    pin: str
    identity: Path

    def logins(self) -> int:
        return self.log.read_text().count("Accepted publickey")

    def connections(self) -> int:
        return self.log.read_text().count("Connection from")


@pytest.fixture
def door(tmp_path: Path, root: Path) -> Iterator[Door]:
    """sshd as root on a high port, with a config of its own; ``sudo`` is a stand-in that runs what it is given."""
    folder = tmp_path / "door"
    folder.mkdir(mode=0o700)
    made_run = not Path("/run/sshd").exists()
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    pin, public = keygen(folder / "host_key"), keygen(folder / "identity")
    (folder / "authorized_keys").write_text(public + "\n")
    programs = folder / "bin"
    programs.mkdir()
    (programs / "sudo").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (programs / "sudo").chmod(0o755)
    port = free_port()
    (folder / "sshd_config").write_text(
        f"""Port {port}
ListenAddress 127.0.0.1
HostKey {folder / "host_key"}
AuthorizedKeysFile {folder / "authorized_keys"}
PermitRootLogin prohibit-password
AuthenticationMethods publickey
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
PidFile none
LogLevel VERBOSE
SetEnv PATH={programs}:{PATH}
"""
    )
    log = folder / "log"
    with log.open("wb") as handle:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stdout=handle, stderr=handle)
    try:
        for attempt in Retrying(stop=stop_after_delay(10), wait=wait_fixed(0.05), reraise=True):
            with attempt:
                assert server.poll() is None, log.read_text()
                assert "Server listening" in log.read_text()
        yield Door(port, log, pin, folder / "identity")
    finally:
        os.kill(server.pid, signal.SIGTERM)
        server.wait(timeout=10)
        if made_run:
            Path("/run/sshd").rmdir()


def expectation_for(door: Door, root: Path) -> dict[str, Any]:
    """What is expected of a "host" that is this machine behind the loopback sshd."""
    expected = build_expectation(
        host="alpha",
        declared=load_fleet(Layout(root).fleet_file).host("alpha"),
        mode="tailnet",
        public={4: "127.0.0.1"},
        tailnet={4: "127.0.0.1"},
        ssh_port=door.port,
        pin=door.pin,
        admin_keys=(door.identity.with_suffix(".pub").read_text(),),
        identity_file=str(door.identity),
        vantages=(),
        cloud=None,
    )
    expected["ssh"]["user"] = "root"
    expected["factsProgram"] = str(root / PROFILE / "clawdlets-facts")
    return expected


def wait_until_gone(folder: str) -> None:
    """Until no process names ``folder`` in its command line: the shared connection has ended."""
    for attempt in Retrying(stop=stop_after_delay(5), wait=wait_fixed(0.05), reraise=True):
        with attempt:
            left = [
                path.parent.name
                for path in Path("/proc").glob("[0-9]*/cmdline")
                if path.exists() and folder.encode() in _read(path)
            ]
            assert left == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@needs_root
@needs_sshd
def test_one_login_and_one_exec_for_all_facts_and_a_user_s_own_commands(door: Door, root: Path) -> None:
    evidence = HostEvidence(expectation_for(door, root), runner=RUNNER)
    folder = evidence._folder.name
    try:
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        facts = evidence.facts
        assert facts["problem"] is None
        assert facts["sections"]["users"]["status"] == 0
        assert "user:root:0:0:" in facts["sections"]["users"]["text"]
        assert all(part["status"] is not None for part in facts["sections"].values())
        assert evidence.facts is facts
        assert door.log.read_text().count("Starting session: command") == 1
        assert evidence.host.run("id -u").stdout.strip() == "0"
        assert evidence.host.run("exit 7").rc == 7
        assert (door.logins(), door.connections()) == (1, 1)
    finally:
        evidence.close()
    assert not Path(folder).exists()
    wait_until_gone(folder)


@needs_root
@needs_sshd
def test_a_wrong_pin_lets_nothing_pass(door: Door, root: Path, tmp_path: Path) -> None:
    other = keygen(tmp_path / "other_key")
    evidence = HostEvidence(expectation_for(replace(door, pin=other), root), runner=RUNNER)
    try:
        facts = evidence.facts
        assert "Host key verification failed" in facts["problem"]
        assert facts["sections"] == {}
        tried = evidence.attempt("root", "none")
        assert tried["result"] == "failed"
        assert tried["presented"] != evidence.expected["ssh"]["pinFingerprint"]
        assert door.logins() == 0
    finally:
        evidence.close()


@needs_root
@needs_sshd
def test_refused_logins_are_fresh_connections_made_once(door: Door, root: Path) -> None:
    evidence = HostEvidence(expectation_for(door, root), runner=RUNNER)
    try:
        assert evidence.facts["problem"] is None
        nothing = evidence.attempt("root", "none")
        assert (nothing["result"], nothing["methods"]) == ("denied", ["publickey"])
        assert nothing["presented"] == evidence.expected["ssh"]["pinFingerprint"]
        assert evidence.attempt("root", "password")["methods"] == ["publickey"]
        assert evidence.attempt("nobody-such", "publickey")["result"] == "denied"
        assert evidence.attempt("root", "publickey")["result"] == "admitted"
        assert evidence.attempt("root", "none") is nothing
        assert door.connections() == 5
    finally:
        evidence.close()


@needs_root
@needs_sshd
@pytest.mark.parametrize("pinned", ["right", "wrong"])
def test_the_whole_run_writes_a_report_and_never_passes_this_machine(
    door: Door, root: Path, tmp_path: Path, pinned: str
) -> None:
    expected = expectation_for(door if pinned == "right" else replace(door, pin=keygen(tmp_path / "other_key")), root)
    project = Project(Layout(tmp_path), load_fleet(Layout(root).fleet_file), "maren", {"PATH": PATH})
    report = verify_host(project, "alpha", expected, runner=RUNNER, report_dir=tmp_path / "report")
    states = {finding.check: str(finding.state) for finding in report.findings}
    assert report.exit_code == 1
    assert states.keys() == {check.id for check in catalogue()}
    assert len(states) == len(report.findings)
    assert states["SSH-09"] == "fail"  # this machine's own host keys are not the pinned one, or the pin is wrong
    assert states["EXP-01"] == states["EXP-04"] == "unknown"
    if pinned == "right":
        assert states["SSH-03"] == states["SSH-04"] == "pass"
        assert door.logins() == 2  # our own, and root's with a good key, which SSH-05 tries
        assert states["SSH-05"] == "fail"
    else:
        assert door.logins() == 0
        assert {check for check, state in states.items() if state == "pass"} == set()
    assert "alpha" in report.report_html.read_text()
    assert json.loads(report.report_json.read_text())["exitCode"] == 1
    wait_until_gone(str(tmp_path / "report"))


# --- a host whose answer cannot be used ---

REAL = "{real}"
LIES = {
    "nothing": ("exit 0", "no section"),
    "binary": ("head -c 70000 /dev/urandom", "no section"),
    "no nonce": (f"{REAL} $1 | sed 's/^=== [0-9a-f]* /=== /'", "no section"),
    "another host's nonce": (f"{REAL} {'a' * 32}", "no section"),
    "the nonce and no frame": ("while :; do echo $1 begin users; done | head -n 5000", "no section"),
    "truncated": (f"{REAL} $1 | head -n 4", "no section"),
    "huge": ("head -c 9000000 /dev/zero | tr '\\0' x", "longer than"),
    "a status": ("echo no such thing >&2; exit 3", "ended with status 3"),
    "goes away in the middle": (f"{REAL} $1 | head -n 4; kill -9 $SSHD_CHILD", "no session"),
    "never ends": ("echo $$ >$0.pid; exec sleep 600", "did not end its answer"),
}


@needs_root
@needs_sshd
@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_cannot_be_used_lets_nothing_pass(
    door: Door, root: Path, tmp_path: Path, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, says = LIES[lie]
    program = tmp_path / "facts"
    # The shell's forefathers are sudo and the session's own sshd, which is killed where the host goes away.
    find = 'SSHD_CHILD=$PPID; until grep -q "^Name:.sshd" /proc/$SSHD_CHILD/status; do SSHD_CHILD=$(awk "/^PPid/ {print \\$2}" /proc/$SSHD_CHILD/status); done'
    program.write_text(f"#!/bin/sh\n{find}\n{words.replace(REAL, f'bash {root / PROFILE}/clawdlets-facts')}\n")
    program.chmod(0o755)
    monkeypatch.setattr(evidence_module, "FACTS_TIMEOUT_S", 4.0 if lie == "never ends" else 120.0)
    evidence = HostEvidence({**expectation_for(door, root), "factsProgram": str(program)}, runner=RUNNER)
    try:
        facts = evidence.facts
        for name in ("users", "nft", "isolation", "store"):
            with pytest.raises(Unknown, match=says):
                section(facts, name)
    finally:
        evidence.close()
        left = Path(f"{program}.pid")  # sshd does not end what it began
        if left.exists():
            os.kill(int(left.read_text()), signal.SIGKILL)


# --- probes ---


@pytest.fixture
def listener() -> Iterator[tuple[str, int]]:
    """A port that is open and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "127.0.0.1", server.getsockname()[1]


@pytest.fixture
def full() -> Iterator[int]:
    """A port whose queue is full: the kernel drops what else comes, as a firewall would."""
    waiting: list[socket.socket] = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port = server.getsockname()[1]
        for _ in range(8):
            one = socket.socket()
            one.settimeout(0.3)
            waiting.append(one)
            try:
                one.connect(("127.0.0.1", port))
            except TimeoutError:
                break
        else:
            pytest.fail("the queue took everything")
        yield port
    for one in waiting:
        one.close()


def test_open_closed_and_dropped_ports_are_told_apart(listener: tuple[str, int], full: int) -> None:
    closed = free_port()
    targets = [
        (4, "127.0.0.1", listener[1]),
        (4, "127.0.0.1", closed),
        (4, "127.0.0.1", full),
        (6, "127.0.0.1", closed),
    ]
    started = time.monotonic()
    results = probe_from(Vantage("here", "internet"), targets, runner=RUNNER)
    took_s = time.monotonic() - started
    assert [one["outcome"] for one in results] == ["open", "refused", "filtered", "error"]
    assert [one["banner"] for one in results] == ["", "", "", ""]
    assert took_s < 6.0  # all targets, and the three connects of each, at the same time


def test_a_banner_is_read(listener: tuple[str, int], tmp_path: Path) -> None:
    talker = subprocess.Popen(
        [sys.executable, "-c", "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
         "while True: c, _ = s.accept(); c.sendall(b'SSH-2.0-canary\\r\\n' + b'x' * 99); c.close()"],
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert talker.stdout is not None
        port = int(talker.stdout.readline())
        (seen,) = probe_from(Vantage("here", "internet"), [(4, "127.0.0.1", port)], runner=RUNNER)
        assert seen["outcome"] == "open"
        assert seen["banner"].startswith("SSH-2.0-canary")
        assert len(seen["banner"]) <= 60
    finally:
        talker.kill()
        talker.wait(timeout=10)
        if talker.stdout:
            talker.stdout.close()


def test_a_closed_port_counts_only_with_its_control(listener: tuple[str, int]) -> None:
    closed, dead = free_port(), free_port()
    here = Vantage("here", "internet", controls={4: listener})
    lost = Vantage("lost", "internet", controls={4: ("127.0.0.1", dead)})
    for vantages, reach in (((here,), "no"), ((lost,), "unknown")):
        exposure = measure_exposure(vantages, {4: "127.0.0.1"}, {}, runner=RUNNER, port=closed)
        assert [cell.reach for cell in exposure.cells] == [reach]
    assert measure_exposure((lost,), {4: "127.0.0.1"}, {}, runner=RUNNER, port=listener[1]).cells[0].reach == "yes"


# --- git ---


def test_git_says_which_rule_ignores_the_runtime_dir(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", tmp_path, *words], check=True, stdout=subprocess.DEVNULL)

    git("init", "-q")
    assert [entry["source"] for entry in git_evidence(tmp_path, runner=RUNNER)["paths"]] == [""] * 4
    (tmp_path / ".git" / "info" / "exclude").write_text(".clawdlets/\n")
    assert {entry["source"] for entry in git_evidence(tmp_path, runner=RUNNER)["paths"]} == {".git/info/exclude"}
    (tmp_path / ".gitignore").write_text("/.clawdlets/\n")
    found = git_evidence(tmp_path, runner=RUNNER)["paths"]
    assert {(entry["source"], entry["pattern"], entry["tracked"]) for entry in found} == {
        (".gitignore", "/.clawdlets/", False)
    }
    git("add", ".gitignore")
    assert {entry["tracked"] for entry in git_evidence(tmp_path, runner=RUNNER)["paths"]} == {True}
    project = tmp_path / "projects" / "one"
    project.mkdir(parents=True)
    (tmp_path / ".gitignore").write_text(".clawdlets/\n")
    below = git_evidence(project, runner=RUNNER)["paths"]
    assert {(entry["source"].rpartition("/")[2], entry["tracked"]) for entry in below} == {(".gitignore", True)}


def test_a_place_without_python_looks_with_bash_and_says_the_same(listener: tuple[str, int], full: int) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: refused
        targets = [(4, *listener), (4, "127.0.0.1", held.getsockname()[1]), (4, "127.0.0.1", full)]
        seen = [probe_from(Vantage("x", "internet", bash=bash), targets, runner=RUNNER) for bash in (False, True)]
    assert [[one["outcome"] for one in some] for some in seen] == [["open", "refused", "filtered"]] * 2


@pytest.mark.parametrize("word", ["-oProxyCommand=x", "", "a b", "x;y", "$(x)"])
def test_what_is_no_ssh_destination_is_refused(word: str) -> None:
    with pytest.raises(VerifyError, match="no SSH destination"):
        by_ssh(word, {})


def test_a_control_is_read_for_either_family() -> None:
    assert parse_control("192.0.2.1:443") == (4, ("192.0.2.1", 443))
    assert parse_control("[2001:db8::1]:22") == (6, ("2001:db8::1", 22))
    for wrong in ("2001:db8::1:22", "192.0.2.1", "host:22", "192.0.2.1:0", "192.0.2.1:70000"):
        with pytest.raises(VerifyError, match="no control"):
            parse_control(wrong)
