"""The install stage on its bad days: interrupted, killed, raced, reset, lied to, and short of room."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hcloud
import pytest

from clawdlets_ops.lab import control
from clawdlets_ops.layout import Layout
from tests.lab.conftest import ROOT, LabProject, make_project

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

HOSTS = ("stopped", "upset")
PHASES = ("preflight", "kexec", "disko", "install", "reboot")
BY_HAND = "bob on another-machine (checkout 00000000)"


@dataclass(frozen=True)
class Site:
    project: LabProject

    @property
    def layout(self) -> Layout:
        return Layout(self.project.root)

    def argv(self, stage: str, host: str) -> list[str]:
        return ["pyinfra", "-y", "inventory/lab.py", f"deploys/{stage}.py", "--limit", f"@clawdlets/{host}"]

    def run(self, stage: str, host: str, *, ok: bool | None = True) -> str:
        said = self.project.run(*self.argv(stage, host), ok=ok).stdout
        assert "Traceback" not in said, said
        return said

    def guest(self, host: str, script: str, *, ok: bool = True) -> str:
        argv = control.guest_argv(self.layout, host, ["sh", "-c", script])
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        assert not ok or done.returncode == 0, done.stderr
        return done.stdout

    def reset(self, host: str) -> None:
        settings = self.project.settings()
        client = hcloud.Client(settings["HCLOUD_TOKEN"], api_endpoint=settings["HCLOUD_ENDPOINT"], poll_interval=0.05)
        server = client.servers.get_by_name(host)
        assert server is not None
        server.reset().wait_until_finished()

    def receipt(self, host: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.layout.install_receipt(host).read_text())
        return found

    def until_in(self, process: subprocess.Popen[str], host: str, phase: str) -> None:
        """Wait until ``phase`` has written to the log that this run has begun."""
        log = self.layout.reports(host) / f"install-{phase}.log"
        log.unlink(missing_ok=True)
        until(lambda: process.poll() is not None or (log.exists() and log.stat().st_size > 0))
        assert process.poll() is None, f"it ended before {phase}:\n{process.communicate()[0]}"

    def at_work(self, host: str) -> list[str]:
        """Command lines and environments of processes that work for an installation of ``host``."""
        needle = str(self.layout.install_dir(host)).encode()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes()
                if needle in line or needle in (path / "environ").read_bytes():
                    found.append(line.replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue
        return found

    def private_keys(self, host: str) -> list[Path]:
        """Private keys in clear below what an installation makes for itself."""
        files = [path for path in self.layout.install_dir(host).rglob("*") if path.is_file()]
        return [path for path in files if b"PRIVATE KEY" in path.read_bytes()]


def until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def fill(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as handle:
        while True:
            handle.write(b"\0" * 4096)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A lab with a provisioned, fresh server per story."""

    def hosts(document: dict[str, Any]) -> None:
        alpha = document["hosts"]["alpha"]
        document["hosts"] = {name: copy.deepcopy(alpha) for name in HOSTS}
        document.pop("cattle", None)  # it names the host that was the only one

    project = make_project(tmp_path_factory.mktemp("install"))
    project.fleet(hosts)
    commit = ["git", "-C", str(project.root), "-c", "user.name=t", "-c", "user.email=t@example", "commit", "-qam", "f"]
    subprocess.run(commit, check=True, env=project.env())
    try:
        control.up(Layout(project.root), project.env())
        for stage in ("payload", "provision"):
            project.run("pyinfra", "-y", "inventory/lab.py", f"deploys/{stage}.py")
        yield Site(project)
    finally:
        control.down(Layout(project.root), os.environ)


def test_stopped_or_killed_in_each_phase_it_goes_on_and_leaves_nothing(site: Site) -> None:
    host = "stopped"
    for phase, number in zip(
        PHASES, (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM), strict=True
    ):
        process = site.project.popen(*site.argv("install", host))
        site.until_in(process, host, phase)
        assert site.at_work(host), phase  # the positive control of what is asserted below
        process.send_signal(number)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), said
        if number == signal.SIGKILL:
            until(lambda: not site.at_work(host))  # what it began goes on to the end of its phase, and no further
        else:
            assert site.at_work(host) == [], phase
            assert "run the same command again" in said
        assert site.private_keys(host) == [], phase
    site.run("install", host)
    assert not site.layout.install_dir(host).exists()
    assert not site.layout.installer_pin(host).exists()
    receipt = site.receipt(host)
    on_host = json.loads(site.guest(host, "cat /var/lib/clawdlets/install-receipt.json"))
    assert site.guest(host, "stat -c '%a %U %G' /var/lib/clawdlets/install-receipt.json") == "644 root root\n"
    assert receipt["payloadDigest"] == on_host["payloadDigest"] == receipt["installedAs"]["payloadDigest"]
    assert receipt["firstContact"]["trust"] == "at first sight"
    assert "first look" in receipt["firstContact"]["sameKeySeenAgainIn"]
    assert receipt["flake"]["revision"]
    assert set(receipt["tools"]) >= {"clawdlets-ops", "nixos-anywhere", "ssh"}
    assert receipt["systemState"] == "running"
    assert "discord_token" in receipt["secretsActivated"]
    before = site.guest(host, "cat /proc/sys/kernel/random/boot_id")
    said = site.run("install", host)
    assert "No changes" in said
    assert site.receipt(host) == receipt
    assert site.guest(host, "cat /proc/sys/kernel/random/boot_id") == before


def test_a_target_that_changes_under_our_hands_is_refused_or_begun_again(site: Site) -> None:
    """In one story, as each part begins where the one before it left the server."""
    host = "upset"
    real = site.layout.lab / "bin" / "nixos-anywhere"
    program = real.read_text()

    # Kexec that ends well and leaves the old system, twice.
    real.write_text('#!/bin/sh\ncase "$*" in *"--phases kexec") echo "### Done! ###"; exit 0 ;; esac\n' + program)
    try:
        said = site.run("install", host, ok=False)
    finally:
        real.write_text(program)
    assert (
        "kexec left the server in its old system: once more" in said or "still in its old system after 2 tries" in said
    )
    assert "look at the server's console" in said

    # A second operator of this checkout, while the first is at work; then the machine is reset in the middle.
    held = 'case "$*" in *"--phases disko") echo held; while :; do sleep 0.1; done ;; esac\n'
    real.write_text("#!/bin/sh\n" + held + program)
    try:
        process = site.project.popen(*site.argv("install", host))
        site.until_in(process, host, "disko")
        second = site.run("install", host, ok=False)
    finally:
        real.write_text(program)
    assert f"the installation of {host} is still being worked on by olive on {os.uname().nodename} (process" in second
    assert "VARIANT_ID=installer" in site.guest(host, "cat /etc/os-release")
    site.reset(host)
    until(lambda: "VARIANT_ID" not in site.guest(host, "cat /etc/os-release", ok=False))  # it was in memory only
    process.send_signal(signal.SIGTERM)
    assert "Traceback" not in process.communicate(timeout=120)[0]
    assert site.at_work(host) == []

    # An operator of another checkout has written themselves down on the server.
    site.guest(host, f"mkdir -p /run/clawdlets-install && echo '{BY_HAND}' >/run/clawdlets-install/lease")
    said = site.run("install", host, ok=False)
    assert f"is being installed by {BY_HAND}" in said
    site.guest(host, "rm /run/clawdlets-install/lease")

    # The server shows another key than the one that was pinned when it was first met.
    keep = "cd /etc/ssh && mkdir -p /root/old && mv ssh_host_ed25519_key* /root/old/"
    make = "ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key && systemctl restart ssh"
    site.guest(host, f"{keep} && {make}")
    said = site.run("install", host, ok=False)
    assert "which is neither the host's own nor the one that the fresh server had" in said
    assert f"--data reinstall={host}" in said
    site.guest(host, "mv /root/old/* /etc/ssh/ && systemctl restart ssh")

    # This machine has no room for what an installation writes down.
    folder = site.layout.install_dir(host)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "clawdlets-test", str(folder)], check=True)
    try:
        fill(folder / "full")
        said = site.run("install", host, ok=False)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert "No space left on device" in said
    assert "run again" in said

    # Half a formatting: mounted, in use, and never marked as done.
    site.guest(
        host,
        "folder=/run/clawdlets-lab-installer && mkdir -p $folder"
        " && printf 'ID=nixos\\nVARIANT_ID=installer\\n' >$folder/os-release"
        " && mount --bind $folder/os-release /etc/os-release && mount --bind /mnt /mnt && touch /mnt/half",
    )
    site.run("install", host)
    assert site.guest(host, "ls /half", ok=False) == ""
    events = "\n".join(path.read_text() for path in site.layout.runs.glob("*/events.jsonl"))
    assert "unmount what a formatting that was cut short left" in events
    receipt = site.receipt(host)
    assert {"first look", "disko", "install"} <= set(receipt["firstContact"]["sameKeySeenAgainIn"])

    # Installed, and now it shows a key that nobody knows, as its rescue system would: never fresh again.
    site.guest(host, f"{keep} && {make}")
    boot = site.guest(host, "cat /proc/sys/kernel/random/boot_id")
    said = site.run("install", host, ok=False)
    assert "somebody else may be answering" in said
    site.guest(host, "mv /root/old/* /etc/ssh/ && systemctl restart ssh")
    assert "No changes" in site.run("install", host)
    assert site.guest(host, "cat /proc/sys/kernel/random/boot_id") == boot
    assert site.receipt(host) == receipt


def test_the_story_leaves_no_mount_and_no_process_here(site: Site) -> None:
    for host in HOSTS:
        assert site.at_work(host) == []
    assert "clawdlets-test" not in Path("/proc/mounts").read_text()
    assert ROOT.exists()
