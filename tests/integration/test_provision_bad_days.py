"""Provisioning when programs and people misbehave: a tofu that hangs or babbles, kills at the worst moment, two at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clawdlets_ops import provision, tofu
from clawdlets_ops.errors import BusyError, CommandError, CommandTimeout
from clawdlets_ops.files import locked
from tests.integration.provisioning import Site, site_in

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_in(tmp_path) as made:
        yield made


def until(condition: Callable[[], object], what: str, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def stand_in(site: Site, script: str) -> None:
    """A shell script in the place of tofu, before the real one on PATH."""
    folder = site.root / "stand-ins"
    folder.mkdir(exist_ok=True)
    (folder / "tofu").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "tofu").chmod(0o755)
    site.environ["PATH"] = f"{folder}:{site.environ['PATH']}"


def provisioner(site: Site, host: str = "alpha") -> subprocess.Popen[str]:
    """Another process that provisions ``host``, in a session of its own."""
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from clawdlets_ops import provision, workflow\n"
        "from clawdlets_ops.project import load_project\n"
        "project = load_project(Path(sys.argv[1]), os.environ)\n"
        "tools = workflow.tools_for(project)\n"
        "provision.apply(project, sys.argv[2], runner=tools.runner, cloud=tools.cloud)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(site.root), host],
        env=site.environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def tofu_of(site: Site) -> list[int]:
    """Process ids of every program that works in the host's directory: tofu and its provider."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink() == site.folder() and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_a_tofu_that_hangs_is_ended_with_its_children(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tofu, "INIT_TIMEOUT_S", 1.0)
    stand_in(site, "sleep 600 & echo $! > child; sleep 600")
    with pytest.raises(CommandTimeout, match="did not end within 1 s"):
        site.provision()
    child = int((site.folder() / "child").read_text())
    until(lambda: not Path(f"/proc/{child}").exists() or is_dead(child), "the child of a hanging tofu lives on")
    assert site.changed() == []


def is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def test_a_hundred_megabytes_of_garbage_become_a_short_error(site: Site) -> None:
    stand_in(site, "head -c 100000000 /dev/urandom >&2; echo 'Error: the end' >&2; exit 1")
    with pytest.raises(CommandError) as caught:
        site.provision()
    assert "the end" in str(caught.value)
    assert len(str(caught.value)) < 100_000
    assert site.changed() == []


def test_json_that_is_none_is_no_plan(site: Site) -> None:
    stand_in(site, "[ $1 = show ] && echo '[1, 2' ; exit 0")
    with pytest.raises(CommandError, match="printed no JSON"):
        site.provision()
    assert site.changed() == []


@pytest.mark.parametrize("victims", ["us", "all"])
def test_a_kill_in_the_middle_of_an_apply_is_finished_by_the_next_run(site: Site, victims: str) -> None:
    site.fault("slow POST /servers seconds=1")
    process = provisioner(site)

    def ordered() -> bool:
        return any(path.endswith("POST /v1/firewalls") for path in site.changed())

    until(ordered, "the apply has not begun")
    os.killpg(process.pid, signal.SIGKILL)  # tofu has a session of its own and goes on
    process.wait()
    if victims == "all":
        for pid in tofu_of(site):
            os.kill(pid, signal.SIGKILL)
    site.book.clear(None)
    if process.stderr:
        process.stderr.close()
    site.provision()
    assert len(site.rows("servers")) == len(site.rows("firewalls")) == len(site.rows("ssh_keys")) == 1
    assert site.plan().empty
    until(lambda: tofu_of(site) == [], "a tofu is still at work")


def test_whoever_comes_second_is_told_who_works_on_the_host(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provision.applying, "LOCK_WAIT_S", 0.0)
    with (
        locked(site.layout.lock("provision-alpha"), what="alpha", holder="maren, since noon"),
        pytest.raises(BusyError, match="maren, since noon"),
    ):
        site.provision()
    assert site.changed() == []


def test_two_at_once_make_one_server(site: Site) -> None:
    processes = [provisioner(site), provisioner(site)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [line for line in site.changed() if line == "POST /v1/servers"] == ["POST /v1/servers"]


def test_several_hosts_at_once_share_the_key_and_the_group(site: Site) -> None:
    hosts = ("alpha", "beta", "gamma")
    for host in hosts:
        site.declare(host, placementGroup="apart")
    faults: list[BaseException] = []

    def one(host: str) -> None:
        try:
            provision.apply(site.project(), host, runner=site.runner(), cloud=site.api)
        except BaseException as error:  # a thread's errors are nobody's else
            faults.append(error)

    threads = [threading.Thread(target=one, args=(host,)) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(site.rows("servers")) == 3
    assert len(site.rows("ssh_keys")) == len(site.rows("placement_groups")) == 1
    assert all(site.plan(host).empty for host in hosts)
