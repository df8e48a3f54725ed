"""Logins over a link that breaks: a real sshd behind a door that cuts the first connections off."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from clawdlets_ops import ssh
from clawdlets_ops.errors import HostKeyError, UnreachableError

SSHD = Path("/usr/sbin/sshd")
BANNER = b"SSH-2.0-canary\r\n"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not SSHD.exists(), reason="/usr/sbin/sshd is not there (Debian: openssh-server)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="sshd needs root here"),
]


@dataclass
class Door:
    """Listens on loopback; cuts connections off as ``breaks`` says, one entry each, and hands all others to sshd."""

    config: Path
    target: ssh.Target
    listener: socket.socket
    breaks: list[str] = field(default_factory=list)
    met: int = 0
    held: list[socket.socket] = field(default_factory=list)
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.met += 1
            match self.breaks.pop(0) if self.breaks else "":
                case "cut":
                    connection.sendall(BANNER)
                    connection.close()
                case "silent":
                    connection.sendall(BANNER)
                    self.held.append(connection)
                case other:
                    with connection:
                        argv = [str(SSHD), "-i", "-f", str(self.config)]
                        if other == "booting":  # as pam_nologin(8): the key is right, and nobody is let in
                            argv += ["-o", "DenyUsers=*"]
                        server = subprocess.Popen(
                            argv, stdin=connection.fileno(), stdout=connection.fileno(), stderr=subprocess.DEVNULL
                        )
                    self.servers.append(server)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.held:
            connection.close()
        for server in self.servers:
            server.kill()
            server.wait()


def keygen(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "canary", "-f", path], check=True)
    return path.with_suffix(".pub").read_text().strip()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    made_run = not Path("/run/sshd").exists()
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    pin, public = keygen(tmp_path / "host_key"), keygen(tmp_path / "identity")
    (tmp_path / "authorized_keys").write_text(public + "\n")
    config = tmp_path / "sshd_config"
    config.write_text(
        f"HostKey {tmp_path / 'host_key'}\nAuthorizedKeysFile {tmp_path / 'authorized_keys'}\n"
        "PermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nPidFile none\n"
    )
    listener = socket.create_server(("127.0.0.1", 0))
    target = ssh.Target("alpha", "127.0.0.1", "root", tmp_path / "identity", pin, listener.getsockname()[1])
    made = Door(config, target, listener)
    thread = threading.Thread(target=made.serve)
    thread.start()
    try:
        yield made
    finally:
        made.close()
        thread.join()
        if made_run:
            Path("/run/sshd").rmdir()


def test_a_login_that_breaks_off_is_begun_anew(door: Door) -> None:
    door.breaks = ["cut", "silent"]
    with ssh.session(door.target, timeout_s=3.0) as shell:
        assert shell.check("echo here").strip() == "here"
    assert door.met == 3


def test_a_login_that_always_breaks_off_is_given_up(door: Door) -> None:
    door.breaks = ["cut"] * 10
    with pytest.raises(UnreachableError, match="no SSH session"), ssh.session(door.target, timeout_s=3.0):
        pass
    assert door.met == ssh.LOGIN_TRIES


def test_a_refused_key_and_another_host_key_are_not_tried_again(door: Door, tmp_path: Path) -> None:
    other = keygen(tmp_path / "other")
    for changed, error, says in (
        ({"identity_file": tmp_path / "other"}, UnreachableError, "refuses the key other"),
        ({"pin": other}, HostKeyError, "pinned is"),
    ):
        with pytest.raises(error, match=says), ssh.session(replace(door.target, **changed), timeout_s=3.0):
            pass
    assert door.met == 2


def test_whoever_is_let_in_only_after_the_boot_is_waited_for(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "BOOTING_POLL_S", 0.01)
    door.breaks += ["booting", "booting", "cut"]
    with ssh.session(door.target, booting_s=30) as shell:
        assert shell.run("echo in").stdout == "in\n"
    assert door.met == 4


def test_whoever_is_never_let_in_is_told_so_in_time(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "BOOTING_POLL_S", 0.01)
    door.breaks += ["booting"] * 1000
    with pytest.raises(UnreachableError, match="refuses the key"), ssh.session(door.target, booting_s=1):
        pass
    assert door.met > 1


DEAD_LINK = """
import subprocess, sys, time
from clawdlets_ops import ssh
from clawdlets_ops.errors import UnreachableError
from pathlib import Path
folder, when = Path(sys.argv[1]), sys.argv[2]
ssh.DEAD_AFTER_S, ssh.KEEPALIVE_S = 2.0, 1
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", folder / "sshd_config", "-p", "2222"])
try:
    deadline = time.monotonic() + 10
    while ssh.presented_key("127.0.0.1", port=2222) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    target = ssh.Target("alpha", "127.0.0.1", "root", folder / "identity", (folder / "host_key.pub").read_text(), 2222)
    with ssh.session(target) as shell:
        print(shell.check("echo here").strip(), flush=True)
        if when == "between":
            subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
        else:  # while a command is silent
            subprocess.Popen(["sh", "-c", "sleep 1; ip link set lo down"])
        began = time.monotonic()
        try:
            shell.run("echo there; sleep 60")
        except UnreachableError as error:
            print("told" if time.monotonic() - began < 25 else f"late: {error}")
finally:
    server.kill()
"""


@pytest.mark.parametrize("when", ["between", "during"])
def test_a_link_that_goes_dead_is_noticed_long_before_the_kernel_gives_up(
    door: Door, tmp_path: Path, when: str
) -> None:
    """A quarter of an hour, without limits of ours; a lockdown whose tailnet broke sat there for as long."""
    argv = ["unshare", "--net", sys.executable, "-c", DEAD_LINK, str(door.config.parent), when]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.stdout.splitlines() == ["here", "told"], done.stderr[-2000:]
