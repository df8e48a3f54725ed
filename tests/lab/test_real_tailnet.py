"""The whole way on the real tailnet: bootstrap, what the operator's own client says, a reboot, and programs that are killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.errors import LabError
from clawdlets_ops.finding import State
from clawdlets_ops.lab import control
from clawdlets_ops.lab.headscale import REAL, TAG, obstacle
from clawdlets_ops.lab.processes import Group
from clawdlets_ops.lab.registry import LabRecord, read_record
from clawdlets_ops.lab.scenario import Scenario
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.tailnet import find_peer
from tests.lab.conftest import ROOT, LabProject, make_project

HINDERED = obstacle(ROOT / ".cache" / "tools", Path("/run"), os.environ.get("PATH", ""))

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(420),
    pytest.mark.skipif(HINDERED is not None, reason=f"no real tailnet here: {HINDERED}"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    folder = tmp_path_factory.mktemp("real")
    with Scenario(ROOT, hosts=["alpha"], folder=folder, environ=os.environ, tailnet="real") as lab:
        yield lab


def until(condition: Callable[[], bool], what: str, *, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s"
        time.sleep(0.05)


def tailscale(lab: Scenario) -> dict[str, Any]:
    """What the operator's client says."""
    return dict(json.loads(lab.run(str(lab.layout.lab / "bin" / "tailscale"), "status", "--json").check().stdout))


def alpha(lab: Scenario) -> dict[str, Any]:
    (found,) = (peer for peer in tailscale(lab)["Peer"].values() if peer["HostName"] == "alpha" and peer["Online"])
    return dict(found)


def record_of(layout: Layout) -> LabRecord:
    record = read_record(layout.lab)
    assert record is not None
    return record


def programs(layout: Layout) -> dict[str, int]:
    """Name to process id of the lab's own headscale and nodes."""
    found = {}
    for pid in Group(f"{record_of(layout).net.prefix}/tailnet").pids():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        sockets = [word for word in words if word.startswith("--socket=")]
        found[Path(sockets[0]).stem if sockets else Path(words[0]).name] = pid
    return found


def all_run(layout: Layout) -> bool:
    return set(programs(layout)) == {"headscale", "operator", "member"}


def traces(layout: Layout, number: int) -> list[str]:
    """Everything of this lab that can be seen from outside its folder."""
    found = [*Path("/run/netns").glob(f"clf{number}-*"), *Path("/sys/class/net").glob(f"clf{number}[it]")]
    found += [folder for folder in Group(f"clf{number}").folders if folder.exists()]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(layout.lab).encode() in process.read_bytes():
                found.append(process)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [str(path) for path in found]


class TestOneHost:
    """In order, on one lab."""

    def test_a_host_joins_by_its_key_and_is_verified_over_wireguard(self, lab: Scenario) -> None:
        assert lab.bootstrap().changed == 4
        assert lab.bootstrap().changed == 0
        assert {finding.state for finding in lab.verify("alpha")} <= {State.PASS, State.NOT_APPLICABLE}
        seen = {
            (vantage, family): lab.reach(vantage, "alpha", family)
            for vantage in ("operator", "stranger", "operator-tailnet", "member")
            for family in (4, 6)
        }
        assert {place for place, reach in seen.items() if reach == "yes"} == {
            (vantage, family) for vantage in ("operator-tailnet", "member") for family in (4, 6)
        }
        assert "unknown" not in seen.values()

        # The operator's client is the real one, and what it says is what the toolkit reads.
        server, peer = control.find_server(lab.layout, "alpha"), alpha(lab)
        read = find_peer(LocalRunner(lab.environ), "alpha")
        assert read is not None
        assert read.addresses == server.tailnet_addresses
        assert set(read.addresses) == {4, 6}
        assert read.key_expiry is None
        assert peer["Tags"] == [TAG]
        # The packets go straight to the server's public address, on the one port that its edge lets in.
        assert peer["CurAddr"] in (f"{server.ipv4}:41641", f"[{server.ipv6}]:41641")

    def test_status_and_doctor_tell_which_tailnet_it_is_and_by_what(self, lab: Scenario) -> None:
        told = json.loads(lab.run("clawdlets", "lab", "status", "--json").check().stdout)["tailnet"]
        assert (told["kind"], told["works"]) == ("real", True)
        assert "headscale v0.28" in told["evidence"]
        assert "the operator's node is Running, 2 of 2 other nodes are online" in told["evidence"]
        assert "its tailnet is the real one: headscale v0.28" in lab.run("clawdlets", "lab", "status").stdout
        assert "the lab's tailnet is the real one: headscale v0.28" in lab.run("clawdlets", "lab", "doctor").stdout
        refused = lab.run("clawdlets", "lab", "up", "--tailnet", "stand-in")
        assert refused.exit_code == 1
        assert "this lab's tailnet is the real one" in refused.stderr

    def test_the_node_outlives_a_reboot(self, lab: Scenario) -> None:
        before = alpha(lab)
        leader = control.find_server(lab.layout, "alpha").leader_pid
        lab.guest("alpha", "systemctl", "reboot")
        until(lambda: control.find_server(lab.layout, "alpha").leader_pid not in (leader, None), "reboot")
        until(lambda: lab.reach("member", "alpha", 6) == "yes", "reached again")
        assert {key: alpha(lab)[key] for key in ("PublicKey", "TailscaleIPs")} == {
            key: before[key] for key in ("PublicKey", "TailscaleIPs")
        }
        assert lab.reach("stranger", "alpha", 4) == "no"

    def test_what_is_killed_is_told_and_up_mends_it_with_the_same_nodes(self, lab: Scenario) -> None:
        before = alpha(lab)["TailscaleIPs"]
        os.kill(programs(lab.layout)["headscale"], signal.SIGKILL)
        until(lambda: "headscale" not in programs(lab.layout), "headscale's end")
        said = lab.run("clawdlets", "lab", "status").stdout
        assert "headscale ended" in said
        assert "clawdlets lab up mends it" in said
        daemon = record_of(lab.layout).daemon
        assert "the operator's node is Running" in lab.run("clawdlets", "lab", "up").check().stdout
        assert record_of(lab.layout).daemon != daemon
        until(lambda: lab.reach("member", "alpha", 4) == "yes", "reached again")
        assert alpha(lab)["TailscaleIPs"] == before

        daemon = record_of(lab.layout).daemon
        assert daemon is not None
        daemon.signal(signal.SIGKILL)
        until(lambda: not daemon.alive(), "the daemon's end")
        assert all_run(lab.layout)  # they outlive it
        assert lab.run("clawdlets", "lab", "up").check().stdout.startswith("the lab is up")
        until(lambda: lab.reach("operator-tailnet", "alpha", 4) == "yes", "reached again")
        assert all_run(lab.layout)


MOMENTS: dict[str, Callable[[Layout], bool]] = {
    "headscale runs": lambda layout: "headscale" in programs(layout),
    "the operator joined": lambda layout: (layout.lab / "tailnet" / "member" / "state").exists(),
}


def kill_half_way(project: LabProject, reached: Callable[[Layout], bool]) -> int:
    """Kill ``lab up`` and the lab's process at this moment; the lab's number."""
    layout = Layout(project.root)
    process = project.popen("clawdlets", "lab", "up", "--tailnet", "real")
    try:
        until(
            lambda: process.poll() is not None or ((layout.lab / "lab.json").exists() and reached(layout)),
            "the moment to kill",
            within_s=120.0,
        )
        ended = process.poll()
    finally:
        process.kill()
        said, _ = process.communicate()
    assert ended is None, said
    record = record_of(layout)
    assert record.daemon is not None
    record.daemon.signal(signal.SIGKILL)
    return record.number


def test_killed_half_way_up_mends_and_down_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    project = make_project(tmp_path_factory.mktemp("k") / "p")  # a socket's path has 107 bytes
    layout = Layout(project.root)
    try:
        for reached in MOMENTS.values():
            number = kill_half_way(project, reached)
            assert traces(layout, number) != []
            project.run("clawdlets", "lab", "down")
            assert traces(layout, number) == []
            assert not layout.lab.exists()
            kill_half_way(project, reached)
            status = control.up(layout, project.env())
            assert status.tailnet is not None
            assert (status.tailnet.kind, status.tailnet.works) == (REAL, True)
            assert all_run(layout)
            project.run("clawdlets", "lab", "down")
            assert traces(layout, number) == []
    finally:
        project.run("clawdlets", "lab", "down")


def test_without_the_programs_the_real_one_is_refused_and_auto_is_the_stand_in(tmp_path: Path) -> None:
    project = make_project(tmp_path / "p")
    layout = Layout(project.root)
    layout.cache.unlink()
    layout.cache.mkdir()
    (layout.cache / "lab").symlink_to(ROOT / ".cache" / "lab")
    with pytest.raises(LabError, match="are not built") as caught:
        control.up(layout, project.env(), tailnet="real")
    assert caught.value.fix == "make tailnet"
    try:
        status = control.up(layout, project.env())
        assert status.tailnet is not None
        assert status.tailnet.kind == "stand-in"
        assert "no, the stand-in" in project.run("clawdlets", "lab", "doctor", ok=None).stdout
    finally:
        control.down(layout, project.env())
