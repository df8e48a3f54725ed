"""One host, end to end: the stories of the first day, told once each and in this order."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

import hcloud
import pytest

from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import load_project
from clawdlets_ops.provision.state import open_tofu
from clawdlets_ops.tofu import is_encrypted
from clawdlets_ops.verify.catalogue import catalogue
from tests.lab.conftest import ROOT, TAILNET, LabProject, make_project

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


class ArgvSampler(threading.Thread):
    """Reads every process's command line, over and over, and keeps those that hold a needle."""

    def __init__(self, needles: list[bytes]) -> None:
        super().__init__(daemon=True)
        self.needles, self.hits, self.rounds, self.seen = needles, set(), 0, set()
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.is_set():
            self.rounds += 1
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = path.read_bytes()
                except OSError:
                    continue
                self.seen.add(line.split(b"\0")[0].rsplit(b"/", 1)[-1])
                if any(needle in line for needle in self.needles):
                    self.hits.add(line)

    def stop(self) -> None:
        self._stop_now.set()
        self.join(timeout=10)


def planted(project: LabProject) -> dict[str, str]:
    """Every secret that the lab planted, with the API token."""
    values = dict(json.loads((project.runtime / "lab" / "secrets.json").read_text())["alpha"])
    return {**values, "HCLOUD_TOKEN": project.settings()["HCLOUD_TOKEN"]}


def forms(value: str) -> list[bytes]:
    return [value.encode(), base64.b64encode(value.encode()).rstrip(b"="), quote(value, safe="").encode()]


def holding(folder: Path, needles: list[bytes], *, but: tuple[Path, ...] = ()) -> list[Path]:
    """Files below ``folder`` that hold a needle, those below ``but`` left out; links are not followed."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(parent, name) not in but and not Path(parent, name).is_symlink()]
        for name in names:
            path = Path(parent, name)
            if path in but or not stat.S_ISREG(path.lstat().st_mode):
                continue
            data = path.read_bytes()
            if any(needle in data for needle in needles):
                found.append(path)
    return found


def exposure(project: LabProject, when: str) -> dict[tuple[str, str, int], str]:
    document = json.loads((project.runtime / "reports" / "alpha" / f"exposure-{when}.json").read_text())
    return {(cell["vantage"], cell["side"], cell["family"]): cell["reach"] for cell in document["cells"]}


class TestTheFirstDay:
    """In order: each test leaves the world as the next one needs it."""

    def test_a_dry_run_shows_the_plan_and_changes_nothing(self, project: LabProject) -> None:
        said = project.run("pyinfra", "inventory/lab.py", "deploys/bootstrap.py", "--dry").stdout
        assert "create the server alpha (cx23, nbg1, debian-12)" in said
        assert "create the firewall alpha-edge" in said
        assert "install NixOS" in said
        requests = project.journal()
        assert requests  # it did look
        assert [entry for entry in requests if entry["mutates"] or entry["method"] != "GET"] == []
        assert not (project.root / "secrets").exists()

    def test_a_declared_host_becomes_verified_and_locked_down_and_no_secret_shows(self, project: LabProject) -> None:
        needles = [form for value in planted(project).values() for form in forms(value)]
        control = subprocess.Popen(["sh", "-c", "read wait", needles[0].decode()], stdin=subprocess.PIPE)
        sampler = ArgvSampler(needles)
        sampler.start()
        try:
            said = project.bootstrap()
        finally:
            sampler.stop()
            control.communicate()
        # the positive control: the sampler does find a secret in an argument list, and it saw the tools at work
        assert {hit.split(b"\0")[0] for hit in sampler.hits} == {b"sh"}
        assert {b"tofu", b"ssh"} <= sampler.seen
        assert sampler.rounds > 20
        assert not [form for form in needles if form.decode() in said]

    def test_secrets_are_nowhere_but_where_they_belong(self, project: LabProject) -> None:
        lab = project.runtime / "lab"
        belongs = (lab / "secrets.json", lab / "tailnet_auth_key", lab / "token", project.runtime / "env")
        for name, value in planted(project).items():
            needles = forms(value)
            assert holding(project.root, needles, but=(*belongs, project.root / ".cache", lab / "machines")) == [], name
            # the positive control: the same search finds it where it belongs
            assert holding(project.root, needles, but=(project.root / ".cache", lab / "machines")), name
        # on the machines' disks: the passwords never, in any form; decrypted values only on a ramfs
        for name, value in planted(project).items():
            assert holding(lab / "machines", forms(value), but=tuple(lab.glob("machines/*/root"))) == [], name
        for path in belongs:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_user_data_state_and_plan_hold_no_secret_and_are_private(self, project: LabProject) -> None:
        created = [entry for entry in project.journal() if entry["path"] == "/v1/servers" and entry["method"] == "POST"]
        assert len(created) == 1
        assert not created[0]["body"].get("user_data")
        folder = project.runtime / "infra" / "opentofu" / "alpha"
        assert (folder / "terraform.tfstate").exists()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert list(folder.glob("plan.bin")) == []
        # At rest both are OpenTofu's ciphertext; in what they say, once decrypted, there is no secret either.
        state = (folder / "terraform.tfstate").read_bytes()
        assert is_encrypted(state)
        assert b"alpha-edge" not in state
        deployed = load_project(project.root, project.env())
        tofu = open_tofu(deployed, "alpha", runner=LocalRunner(deployed.environ))
        told = json.dumps(tofu.plan()) + tofu.pull().reveal()
        assert is_encrypted((folder / "plan.bin").read_bytes())
        tofu.discard_plan()
        assert "alpha-edge" in told
        assert [
            name for name, value in planted(project).items() if any(form.decode() in told for form in forms(value))
        ] == []

    def test_a_second_bootstrap_changes_nothing(self, project: LabProject) -> None:
        before = len(project.journal())
        servers = [entry for entry in project.journal() if entry["mutates"]]
        said = project.bootstrap()
        results = next(line for line in said.splitlines()[::-1] if line.strip().startswith("Grand total"))
        ran, changed = results.split()[2], results.split()[3]
        assert ran == "5", said
        assert changed in ("-", "0"), said
        asked = [f"{entry['method']} {entry['path']}" for entry in project.journal()[before:]]
        assert len(asked) <= 6, asked
        assert [entry for entry in project.journal() if entry["mutates"]] == servers

    def test_the_program_in_the_readme_runs_as_it_stands_there(self, project: LabProject) -> None:
        program = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
        assert program is not None
        assert len(program[1].strip().splitlines()) <= 10
        said = project.run(sys.executable, "-c", program[1]).stdout.splitlines()
        assert [line.split()[:3] for line in said] == [
            ["alpha", stage, "unchanged"] for stage in ("payload", "provision", "install", "lockdown", "verify")
        ]

    def test_verify_passes_from_inside_and_outside(self, project: LabProject) -> None:
        said_by_verify = project.run("clawdlets", "verify", "--host", "alpha", "--format", "json").stdout
        findings = json.loads(said_by_verify)["findings"]
        states = {finding["check"]: finding["state"] for finding in findings}
        assert {
            "SSH-01",
            "SSH-03",
            "SSH-09",
            "EXP-01",
            "EXP-03",
            "EXP-04",
            "EXP-05",
            "TS-01",
            "FS-01",
            "FS-03",
            "FS-04",
        } <= set(states)
        assert set(states.values()) <= {"pass", "not-applicable"}, states

    def test_the_connector_serves_a_users_own_deploys_over_the_tailnet(self, project: LabProject) -> None:
        said = project.run("pyinfra", "inventory/lab.py", "exec", "--", "id", "-un").stdout
        assert re.search(r"\] admin$", said, flags=re.MULTILINE)
        fact = project.run(
            "pyinfra", "inventory/lab.py", "fact", "clawdlets_ops.pyinfra_plugin.facts.SshExposure"
        ).stdout
        assert '"mode": "tailnet"' in fact
        deploy = project.root / "deploys" / "own.py"
        deploy.write_text(
            "from pyinfra.operations import server\n"
            "server.shell(commands=['test \"$(cat)\" = given && exit 3'], _stdin='given', _success_exit_codes=[3])\n"
        )
        project.run("pyinfra", "-y", "inventory/lab.py", str(deploy))
        deploy.write_text("from pyinfra.operations import server\nserver.shell(commands=['exit 3'])\n")
        project.run("pyinfra", "-y", "inventory/lab.py", str(deploy), ok=False)

    def test_port_22_by_vantage_and_family_before_and_after(self, project: LabProject) -> None:
        before, after = exposure(project, "before"), exposure(project, "after")
        assert set(before) == set(after)
        for family in (4, 6):
            assert before["operator", "internet", family] == "yes"
            assert before["stranger", "internet", family] == "no"
            assert after["operator", "internet", family] == "no"
            assert after["stranger", "internet", family] == "no"
            assert (before["member", "tailnet", family], after["member", "tailnet", family]) == ("yes", "yes")

    def test_the_real_provider_was_there_and_the_ordinary_clients_agree(self, project: LabProject) -> None:
        agents = {entry["userAgent"] for entry in project.journal() if entry["mutates"]}
        assert any(
            "terraform-provider-hcloud" in agent or agent.startswith(("hcloud-terraform/", "OpenTofu/"))
            for agent in agents
        )
        settings = project.settings()
        client = hcloud.Client(token=settings["HCLOUD_TOKEN"], api_endpoint=settings["HCLOUD_ENDPOINT"], timeout=10)
        server, firewall = client.servers.get_by_name("alpha"), client.firewalls.get_by_name("alpha-edge")
        assert server is not None
        assert firewall is not None
        env = {
            **project.env(),
            **{key: settings[key] for key in ("HCLOUD_TOKEN", "HCLOUD_ENDPOINT")},
            "HCLOUD_CONFIG": "/dev/null",
        }
        for kind, ident, name in (("server", server.id, "alpha"), ("firewall", firewall.id, "alpha-edge")):
            out = subprocess.run(
                ["hcloud", kind, "list", "-o", "columns=id,name", "-o", "noheader"], env=env, check=True, capture_output=True, text=True
            ).stdout  # fmt: skip
            assert [line.split() for line in out.splitlines()] == [[str(ident), name]]

    def test_after_lockdown_the_edge_lets_in_nothing_but_tailscale(self, project: LabProject) -> None:
        settings = project.settings()
        client = hcloud.Client(token=settings["HCLOUD_TOKEN"], api_endpoint=settings["HCLOUD_ENDPOINT"], timeout=10)
        rules = client.firewalls.get_by_name("alpha-edge").rules
        assert [(rule.protocol, rule.port) for rule in rules] == [("udp", "41641")]

    def test_a_wrong_host_key_is_refused_before_anything_is_done(self, project: LabProject) -> None:
        pin = project.root / "secrets" / "keys" / "hosts" / "alpha.ssh_host_ed25519_key.pub"
        right = pin.read_text()
        pin.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s alpha\n")
        before = len(project.journal())
        try:
            said = project.run("pyinfra", "-y", "inventory/lab.py", "deploys/lockdown.py", ok=None)
            verified = project.run("clawdlets", "verify", "--host", "alpha", "--format", "json", ok=None)
        finally:
            pin.write_text(right)
        assert said.returncode != 0, said.stdout
        assert "host key" in said.stdout or "does not answer over the tailnet" in said.stdout, said.stdout
        assert verified.returncode == 1
        states = {finding["check"]: finding["state"] for finding in json.loads(verified.stdout)["findings"]}
        assert states["SSH-09"] == "fail"
        said_by_a_stranger = {one.id for one in catalogue() if one.vantage in ("host", "client")}
        assert {"SSH-02", "SSH-03", "STO-01"} <= said_by_a_stranger
        assert {check for check in said_by_a_stranger if states.get(check) == "pass"} == set()
        assert [entry for entry in project.journal()[before:] if entry["mutates"]] == []

    def test_an_installed_host_is_never_installed_over(self, project: LabProject) -> None:
        receipt = project.runtime / "reports" / "alpha" / "install-receipt.json"
        before = receipt.read_text()
        said = project.run("pyinfra", "-y", "inventory/lab.py", "deploys/install.py").stdout
        assert "No changes" in said
        assert receipt.read_text() == before

    def test_a_host_named_for_it_is_wiped_and_comes_back_verified(self, project: LabProject) -> None:
        receipt = project.runtime / "reports" / "alpha" / "install-receipt.json"
        before = receipt.read_text()
        project.bootstrap("--data", "reinstall=alpha")
        assert receipt.read_text() != before
        assert exposure(project, "after")["stranger", "internet", 4] == "no"


KILL_WHEN = {
    "payload": lambda project: (project.root / "secrets" / ".sops.yaml").exists(),
    "provision": lambda project: any(
        entry["path"] == "/v1/servers" and entry["method"] == "POST" for entry in project.journal()
    ),
    "install": lambda project: (project.runtime / "reports" / "alpha" / "install-disko.log").exists(),
    "lockdown": lambda project: (project.runtime / "reports" / "alpha" / "exposure-before.json").exists(),
    "verify": lambda project: any("pytest" in line for line in commands()),
}


def commands() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in found if "clawdlets_ops.verify" in line]


def test_killed_in_every_stage_a_rerun_converges(tmp_path_factory: pytest.TempPathFactory) -> None:
    """kill -9 of pyinfra inside each of the five stages in turn, on one host; the last run ends verified."""
    project = make_project(tmp_path_factory.mktemp("killed"))
    try:
        project.run("clawdlets", "lab", "up", "--tailnet", TAILNET)
        for stage, reached in KILL_WHEN.items():
            process = project.popen("pyinfra", "-y", "inventory/lab.py", "deploys/bootstrap.py")
            deadline = time.monotonic() + 240
            while not reached(project) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert process.poll() is None, f"{stage}: it ended before it could be killed:\n{process.communicate()[0]}"
            process.kill()
            process.communicate()
        said = project.bootstrap()
        said_by_verify = project.run("clawdlets", "verify", "--host", "alpha", "--format", "json").stdout
        findings = json.loads(said_by_verify)["findings"]
        assert {finding["state"] for finding in findings} <= {"pass", "not-applicable"}, said
        settings = project.settings()
        client = hcloud.Client(token=settings["HCLOUD_TOKEN"], api_endpoint=settings["HCLOUD_ENDPOINT"], timeout=10)
        assert len(client.servers.get_all()) == 1
        assert len(client.ssh_keys.get_all()) == 1
        assert len(client.firewalls.get_all()) == 1
        assert exposure(project, "after")["operator", "internet", 4] == "no"
    finally:
        project.run("clawdlets", "lab", "down")
