"""One phase as a process: with real programs, the real OpenSSH client and server, and small scripts in the program's place.

The scripts are stand-ins: each does one thing that the real nixos-anywhere does, such as trying the same for ever.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from clawdlets_ops import ssh
from clawdlets_ops.errors import BusyError, CommandError, CommandTimeout, HostKeyError, UnreachableError
from clawdlets_ops.files import locked
from clawdlets_ops.nixos_anywhere import InstallSpec, run_phase
from clawdlets_ops.process import LOG_KEPT_BYTES, LOG_LIMIT_BYTES, LocalRunner

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
SSHD = Path("/usr/sbin/sshd")
MARKS = "echo '### Uploading install SSH keys ###'\n"


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


@dataclass
class Bench:
    """A folder with a script in the place of nixos-anywhere, and all that a phase needs."""

    folder: Path
    known_hosts: str = ""

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @property
    def log(self) -> Path:
        return self.folder / "phase.log"

    def program(self, text: str) -> None:
        path = self.folder / "bin" / "nixos-anywhere"
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
        path.chmod(0o755)

    def run(self, phase: str = "kexec", *, real_ssh: Path = Path("/usr/bin/ssh"), timeout_s: float = 60.0) -> list[str]:
        said: list[str] = []
        (self.folder / "known_hosts").write_text(self.known_hosts)
        shim = ssh.shim(
            self.folder / "shim",
            real_ssh=real_ssh,
            known_hosts=self.folder / "known_hosts",
            identity_file=self.folder / "identity",
        )
        spec = InstallSpec("git+file:///p#alpha", "127.0.0.1", self.folder / "identity", self.folder / "extra", shim)
        search_path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        with locked(self.folder / "lock", what="it") as lock_fd:
            run_phase(
                LocalRunner({**os.environ, "PATH": search_path, "SSH_AUTH_SOCK": "/a-canary", "SSHPASS": "a-canary"}),
                spec,
                phase,
                scratch=self.scratch,
                search_path=search_path,
                log_file=self.log,
                lock_fd=lock_fd,
                say=said.append,
                timeout_s=timeout_s,
            )
        return said

    def running(self) -> list[str]:
        """Processes with this bench in their environment, such as HOME."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"{self.scratch}/home".encode() in path.read_bytes():
                    found.append(path.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "identity"], check=True)
    yield made
    assert made.running() == []


@dataclass(frozen=True)
class Door:
    port: int
    key: str


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    """A real sshd on loopback that lets nobody in."""
    if os.geteuid() != 0 or not SSHD.exists():
        pytest.skip("a real sshd on loopback needs root and /usr/sbin/sshd")
    folder = tmp_path / "sshd"
    folder.mkdir()
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    port = free_port()
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'key'}\nAuthorizedKeysFile {folder / 'none'}\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\n"
    )
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "config"], stdout=log, stderr=log)
    try:
        until(lambda: ssh.presented_key("127.0.0.1", port=port, timeout_s=1) is not None)
        yield Door(port, " ".join((folder / "key.pub").read_text().split()[:2]))
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    listed = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"
    return int(subprocess.run([sys.executable, "-c", listed], check=True, capture_output=True, text=True).stdout)


ENDLESS = MARKS + "until ssh -p {port} root@127.0.0.1 exit 0; do sleep 0.1; done\n"


def test_another_host_key_ends_the_endless_loop(bench: Bench, door: Door) -> None:
    other = bench.folder / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    key = other.with_suffix(".pub").read_text()
    bench.known_hosts = f"[127.0.0.1]:{door.port} {key}"
    bench.program(ENDLESS.format(port=door.port))
    with pytest.raises(HostKeyError, match="another host key"):
        bench.run()
    assert not bench.scratch.exists()


def test_a_script_that_asks_for_no_host_key_check_gets_one_all_the_same(bench: Bench, door: Door) -> None:
    asks = "ssh -o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no -p {port} root@127.0.0.1 exit 0 || exit 7"
    bench.program(MARKS + asks.format(port=door.port))
    with pytest.raises(HostKeyError):  # nothing is pinned for it
        bench.run()


def test_a_key_that_is_refused_ends_the_endless_loop(bench: Bench, door: Door) -> None:
    bench.known_hosts = f"[127.0.0.1]:{door.port} {door.key}\n"
    bench.program(ENDLESS.format(port=door.port))
    with pytest.raises(UnreachableError, match="refuses our key for root"):
        bench.run()


def test_a_closed_port_ends_the_endless_loop(bench: Bench) -> None:
    bench.program(ENDLESS.format(port=free_port()))
    with pytest.raises(UnreachableError, match="does not let us connect") as caught:
        bench.run()
    assert "adminCidrs" in caught.value.fix


def test_what_the_program_is_given_and_what_not(bench: Bench) -> None:
    bench.program("""
        env >"$HOME/../../seen"
        readlink /proc/self/fd/0 >>"$HOME/../../seen"
        ssh -G example.org >>"$HOME/../../seen"
    """)
    bench.run()
    seen = (bench.folder / "seen").read_text()
    assert "a-canary" not in seen
    assert "\n/dev/null\n" in seen
    for option in (
        "stricthostkeychecking true",
        f"userknownhostsfile {bench.folder / 'known_hosts'}",
        "globalknownhostsfile /dev/null",
        "identityagent none",
        "batchmode yes",
        "serveralivecountmax 3",
    ):
        assert option in seen


def test_a_hundred_megabytes_with_binary_are_neither_kept_nor_shown(bench: Bench) -> None:
    """Measured in a process of its own: what this one has used before does not count."""
    bench.program("""
        echo '### Gathering machine facts ###'
        head -c 50000000 /dev/urandom
        yes "copying path '/nix/store/00000000000000000000000000000000-canary-1.0' from 'https://cache.example.org'..." | head -c 50000000
        printf '\\033]0;title\\007\\n### Done! ###\\n'
        exit 3
    """)
    script = """
        import json, resource, sys
        from pathlib import Path
        from clawdlets_ops.errors import CommandError
        from tests.integration.test_nixos_anywhere import Bench
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        bench = Bench(Path(sys.argv[1]))
        try:
            bench.run()
        except CommandError as error:
            text = str(error)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"grown_kib": after - before, "text": text}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(bench.folder)], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert found["grown_kib"] < 40_000
    assert "status 3" in found["text"]
    assert "\x1b" not in found["text"]
    assert len(found["text"]) < 20_000
    assert bench.log.stat().st_size <= LOG_LIMIT_BYTES + 8 * LOG_KEPT_BYTES
    assert bench.log.read_bytes().endswith(b"### Done! ###\n")


def test_a_phase_that_hangs_is_ended_with_all_that_it_started(bench: Bench) -> None:
    bench.program("""
        trap '' TERM
        sh -c 'trap "" TERM; while :; do sleep 0.1; done' &
        while :; do sleep 0.1; done
    """)
    with pytest.raises(CommandTimeout, match="kexec phase did not end within 1 s"):
        bench.run(timeout_s=1.0)
    assert bench.running() == []
    assert not bench.scratch.exists()


def test_told_to_end_the_program_has_time_to_clean_up(bench: Bench) -> None:
    bench.program("""
        trap 'sleep 0.3; touch "$HOME/../../cleaned"; exit 143' TERM
        while :; do sleep 0.05; done
    """)
    with pytest.raises(CommandTimeout):
        bench.run(timeout_s=1.0)
    assert (bench.folder / "cleaned").exists()


def test_killed_without_warning_the_phase_ends_marks_that_and_removes_its_folders(bench: Bench) -> None:
    recorder = bench.folder / "recorder"
    recorder.write_text(f'#!/bin/sh\necho "$@" >>{bench.folder}/ssh-calls\n')
    recorder.chmod(0o755)
    bench.program('echo a canary, no key >"$TMPDIR/key"; until [ -e "$HOME/../../go" ]; do sleep 0.05; done')
    script = (
        "import sys; from pathlib import Path; from tests.integration.test_nixos_anywhere import Bench; "
        "Bench(Path(sys.argv[1])).run('disko', real_ssh=Path(sys.argv[1]) / 'recorder')"
    )
    caller = subprocess.Popen([sys.executable, "-c", script, str(bench.folder)])
    until((bench.scratch / "tmp" / "key").exists)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert bench.running()  # the positive control: the phase is still at work, without us
    with pytest.raises(BusyError), locked(bench.folder / "lock", what="it"):
        pass
    (bench.folder / "go").touch()
    until(lambda: not bench.running())
    assert not bench.scratch.exists()
    assert (
        "root@127.0.0.1 mkdir -p /run/clawdlets-install && touch /run/clawdlets-install/disko"
        in (bench.folder / "ssh-calls").read_text()
    )
    with locked(bench.folder / "lock", what="it"):
        pass


def test_a_phase_that_failed_is_not_marked_as_done(bench: Bench) -> None:
    recorder = bench.folder / "recorder"
    recorder.write_text(f"#!/bin/sh\ntouch {bench.folder}/called\n")
    recorder.chmod(0o755)
    bench.program("exit 42")
    with pytest.raises(CommandError) as caught:
        bench.run("disko", real_ssh=recorder)
    assert caught.value.exit_code == 42
    assert not (bench.folder / "called").exists()


def test_a_full_disk_on_this_machine_fails_the_phase_and_nothing_stays(bench: Bench) -> None:
    if os.geteuid() != 0:
        pytest.skip("a file system of its own needs root")
    small = bench.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "clawdlets-test", str(small)], check=True)
    try:
        full = Bench(small)
        full.program('yes >"$TMPDIR/much" || exit 9')
        with pytest.raises(CommandError) as caught:
            full.run()
        assert caught.value.exit_code == 9
        assert not full.scratch.exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


HOLD = """
import sys
from pathlib import Path
from clawdlets_ops.files import locked
with locked(Path(sys.argv[1]), what="it", holder="olive on box (process 1, since 10:00:00 UTC)") as fd:
    import os, subprocess
    os.set_inheritable(fd, True)
    child = subprocess.Popen(["sleep", "600"], pass_fds=(fd,))
    print(child.pid, flush=True)
    child.wait()
"""


def test_who_holds_a_lock_is_told_at_once_while_they_live_and_waited_for_when_they_do_not(tmp_path: Path) -> None:
    lock = tmp_path / "locks" / "alpha.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)

    try:
        with (
            pytest.raises(BusyError, match=r"the installation is still being worked on by olive on box \(process 1"),
            locked(lock, what="the installation", wait_s=60, refuse_living=True, sleep=sleep),
        ):
            pass
        assert slept == []
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with locked(lock, what="the installation", wait_s=60, refuse_living=True, sleep=sleep):
            assert len(slept) >= 3
    finally:
        holder.stdout.close()
        for pid in (holder.pid, child):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        holder.wait()
