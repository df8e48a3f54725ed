"""The lab as other people's tests use it, and as a person looks at it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clawdlets_ops.errors import CommandError, FleetError, LabError
from clawdlets_ops.finding import State
from clawdlets_ops.lab import control
from clawdlets_ops.lab.scenario import Scenario
from clawdlets_ops.layout import Layout
from tests.lab.conftest import ROOT, make_project

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def fleet_of(*names: str) -> dict[str, object]:
    document = json.loads((ROOT / "fleet" / "clawdlets.json").read_text())
    document["hosts"] = dict.fromkeys(names, document["hosts"]["alpha"])
    document.pop("cattle", None)  # it names the host that was the only one
    return document


def traces(word: str) -> list[str]:
    """Processes that name ``word`` in their command line, and mounts that do."""
    found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if word in line]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found


@pytest.fixture(scope="module")
def lab() -> Iterator[Scenario]:
    fleet, cache = fleet_of("alpha", "bravo"), ROOT / ".cache"
    with Scenario(fleet, hosts=["alpha"], cache=cache, environ=os.environ, tailnet="stand-in") as lab:
        yield lab


class TestOneHost:
    """In order, on one lab."""

    def test_only_the_chosen_hosts_are_there_and_names_that_are_none_are_told(self, lab: Scenario) -> None:
        assert list(lab.project.fleet.hosts) == ["alpha"]
        assert lab.environ["HCLOUD_ENDPOINT"].startswith("http://127.0.0.1:")
        with pytest.raises(FleetError, match="did you mean 'alpha'"):
            lab.bootstrap("alhpa")
        with pytest.raises(LabError, match="bootstrap a host"):
            lab.guest("alpha", "true")
        with pytest.raises(LabError, match="no vantage point 'nowhere'"):
            lab.reach("nowhere", "alpha", 4)

    def test_a_failed_deploy_raises_with_what_was_said(self, lab: Scenario) -> None:
        with pytest.raises(CommandError, match="there is no such server"):
            lab.deploy("verify")

    def test_bootstrap_then_nothing_changes_and_the_host_is_closed(self, lab: Scenario) -> None:
        first = lab.bootstrap("alpha")
        assert (first.ran, first.changed) == (5, 4)
        before = len(lab.journal())
        again = lab.bootstrap()
        assert (again.ran, again.changed) == (5, 0)
        assert [entry for entry in lab.journal()[before:] if entry["mutates"]] == []
        assert {finding.state for finding in lab.verify("alpha")} <= {State.PASS, State.NOT_APPLICABLE}
        seen = {(name, family): lab.reach(name, "alpha", family) for name in ("operator", "stranger", "member") for family in (4, 6)}  # fmt: skip
        assert {key for key, reach in seen.items() if reach == "yes"} == {("member", 4), ("member", 6)}
        assert "unknown" not in seen.values()

    def test_a_look_inside_goes_past_the_network(self, lab: Scenario) -> None:
        assert lab.guest("alpha", "cat", "/etc/hostname").check().stdout.strip() == "alpha"
        assert lab.guest("alpha", "sh", "-c", "exit 7").exit_code == 7
        # What stays behind in the machine is of the machine: it ends with it (see the reset below).
        lab.guest("alpha", "sh", "-c", "sleep 4321 >/dev/null 2>&1 &").check()

    def test_status_shows_machines_exposure_and_requests(self, lab: Scenario) -> None:
        said = lab.run("clawdlets", "lab", "status", "--probe").check().stdout
        assert re.search(r"^alpha +running +198\.\S+ +2001:\S+ +100\.\S+ fd\S+ +yes$", said, flags=re.MULTILINE), said
        assert re.search(r"^stranger +internet +no +no$", said, flags=re.MULTILINE), said
        assert re.search(r"^member +tailnet +yes +yes$", said, flags=re.MULTILINE), said
        assert re.search(r"^\d\d:\d\d:\d\d +GET +/v1/\S+ +200 +- +clawdlets-ops$", said, flags=re.MULTILINE), said
        document = json.loads(lab.run("clawdlets", "lab", "status", "--json").check().stdout)
        assert [machine["name"] for machine in document["machines"]] == ["alpha"]
        assert "exposure" not in document["machines"][0]
        assert len(document["requests"]) == 10

    def test_shell_passes_the_exit_status_and_logs_show(self, lab: Scenario) -> None:
        shell = lab.run("clawdlets", "lab", "shell", "alpha", "--", "sh", "-c", "hostname; exit 9")
        assert (shell.exit_code, shell.stdout.strip()) == (9, "alpha")
        assert "did you mean 'alpha'" in lab.run("clawdlets", "lab", "shell", "alpa").stderr
        assert "systemd" in lab.run("clawdlets", "lab", "logs", "alpha").check().stdout
        assert "sshd" in lab.run("clawdlets", "lab", "logs", "alpha", "--journal").check().stdout
        assert len(lab.run("clawdlets", "lab", "logs", "--api").check().stdout.splitlines()) == len(lab.journal())
        assert "answers at" in lab.run("clawdlets", "lab", "logs", "--daemon").check().stdout
        assert lab.run("clawdlets", "lab", "logs", "alpha", "--api").exit_code == 2

    def test_follow_shows_what_comes(self, lab: Scenario) -> None:
        argv = ["clawdlets", "lab", "logs", "--api", "--follow"]
        env = {key: lab.environ[key] for key in ("PATH", "HOME")}
        process = subprocess.Popen(argv, cwd=lab.root, env=env, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            for _ in lab.journal():
                process.stdout.readline()
            lab.run("clawdlets", "plan", "provision", "--host", "alpha").check()
            assert json.loads(process.stdout.readline())["method"] == "GET"
        finally:
            process.terminate()
            process.wait(timeout=10)
            process.stdout.close()

    def test_a_machine_that_is_off_is_told(self, lab: Scenario) -> None:
        settings = {key: lab.environ[key] for key in ("HCLOUD_TOKEN", "HCLOUD_ENDPOINT", "PATH")}
        env = {**settings, "HCLOUD_CONFIG": "/dev/null"}
        subprocess.run(["hcloud", "server", "poweroff", "alpha"], env=env, check=True, capture_output=True)
        said = lab.run("clawdlets", "lab", "shell", "alpha")
        assert said.exit_code == 1
        assert "is off, and has nothing running to go into" in said.stderr
        assert "hcloud server poweron alpha" in said.stderr
        with pytest.raises(LabError, match="is off"):
            lab.guest("alpha", "true")
        assert not [line for line in traces("sleep 4321") if "pytest" not in line]

    def test_reset_forgets_the_machines_and_a_bootstrap_starts_from_nothing(self, lab: Scenario) -> None:
        refused = lab.run("clawdlets", "lab", "reset")
        assert refused.exit_code != 0  # nobody said yes
        assert [server.name for server in control.status(lab.layout).servers] == ["alpha"]
        key = (lab.layout.runtime / "keys" / "operators" / "ssh_ed25519").read_text()
        assert (lab.layout.runtime / "infra").exists()
        assert "no machines" in lab.run("clawdlets", "lab", "reset", "--yes").check().stdout
        assert not (lab.layout.runtime / "infra").exists()
        assert not (lab.layout.runtime / "known_hosts").exists()
        assert (lab.layout.runtime / "keys" / "operators" / "ssh_ed25519").read_text() == key
        tailnet = control.status(lab.layout).tailnet
        assert tailnet is not None
        assert tailnet.kind == "stand-in"  # as before, though the real one may be built
        assert lab.bootstrap().changed == 4
        assert lab.reach("stranger", "alpha", 4) == "no"


def test_what_is_to_go_wrong_goes_wrong_from_the_start(tmp_path: Path) -> None:
    with Scenario(
        ROOT, folder=tmp_path / "p", environ=os.environ, faults=["answer locked POST /servers times=1"]
    ) as lab:
        lab.deploy("payload")
        with pytest.raises(CommandError, match="locked"):
            lab.deploy("provision")
        assert lab.deploy("provision").changed == 1


def test_it_is_taken_down_whatever_happened() -> None:
    roots = []

    def fail() -> None:
        with Scenario(ROOT, environ=os.environ) as lab:
            roots.append(lab.root)
            assert traces(str(lab.root))
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    deadline = time.monotonic() + 5
    while traces(str(roots[0])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert traces(str(roots[0])) == []
    assert not roots[0].parent.exists()
    with pytest.raises(LabError, match="not entered"):
        _ = Scenario(ROOT).root


def test_a_scenario_that_cannot_be_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="did you mean 'alpha'"):
        Scenario(fleet_of("alpha"), hosts=["alpa"], folder=tmp_path / "a", cache=ROOT / ".cache", environ=os.environ).__enter__()  # fmt: skip
    with pytest.raises(LabError, match="never-boot"):
        Scenario(ROOT, environ=os.environ, faults=["never-boot alpha"])
    with pytest.raises(LabError, match="the base image is there"):
        Scenario(ROOT, folder=tmp_path / "b", cache=tmp_path / "empty", environ=os.environ).__enter__()
    assert control.status(Layout(tmp_path / "b")).state == "down"


def test_reset_leaves_another_clouds_state_alone(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.bound_to.parent.mkdir(parents=True)
    layout.bound_to.write_text("https://api.hetzner.cloud/v1\n")
    with pytest.raises(LabError, match="belongs to https://api"):
        control.reset(layout, os.environ)
    assert layout.bound_to.exists()


def test_the_tests_in_the_howto_pass_as_they_stand_there(tmp_path: Path) -> None:
    program = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "howto" / "test-your-fleet.md").read_text(), re.DOTALL)
    assert program is not None
    checkout = make_project(tmp_path / "checkout")
    (checkout.root / "test_fleet.py").write_text(program[1])
    said = checkout.run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_fleet.py").stdout
    assert "4 passed" in said
    assert not checkout.runtime.exists()  # the scenario had its own
