"""Lockdown on a bad day: it never closes the way in, and it never leaves a door half shut without saying so."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import hcloud
import pytest
from hcloud.firewalls import FirewallRule

from clawdlets_ops import lockdown, ssh, workflow
from clawdlets_ops.doctor import doors
from clawdlets_ops.errors import BusyError, LockdownError
from clawdlets_ops.install import ADMIN
from clawdlets_ops.journal import journals, read_journal
from clawdlets_ops.lab import control, faults
from clawdlets_ops.lab.processes import wait_until
from clawdlets_ops.layout import Layout
from clawdlets_ops.lockdown import Timing, edge, proof, watchdog
from clawdlets_ops.lockdown.drift import Door, drift, open_windows
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import Project, load_project
from clawdlets_ops.secrets import store
from clawdlets_ops.verify.exposure import Exposure, measure_exposure
from tests.lab.conftest import LabProject, stay_logged_in

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


class Bench:
    """The project's host, installed and not locked down, with ways to look at it and to break it."""

    def __init__(self, lab: LabProject) -> None:
        self.project: Project = load_project(lab.root, lab.env())
        self.tools = workflow.tools_for(self.project)
        self.runner = LocalRunner(self.project.environ)
        server = self.tools.cloud.server("alpha")
        assert server is not None
        self.server = server

    def lock_down(
        self,
        *,
        say: Callable[[str], None] = lambda _: None,
        project: Project | None = None,
        timing: Timing | None = None,
    ) -> lockdown.LockdownOutcome:
        return lockdown.apply(
            project or self.project,
            "alpha",
            runner=self.runner,
            cloud=self.tools.cloud,
            server=self.server,
            pin=store.host_ssh_pin(self.project, "alpha"),
            say=say,
            timing=timing,
            journal=self.tools.journal.folder,
        )

    def measure(self) -> Exposure:
        addresses = lockdown.tailnet_addresses(self.runner, "alpha", self.project.fleet.host("alpha"))
        return measure_exposure(self.project.vantages, self.server.addresses, addresses, runner=self.runner)

    def reach(self, vantage: str, family: int = 4) -> str:
        return next(cell.reach for cell in self.measure().cells if (cell.vantage, cell.family) == (vantage, family))

    def leader(self) -> int | None:
        return control.status(Layout(self.project.layout.root)).servers[0].leader_pid

    def guest(self, *argv: str) -> str:
        """Run in the guest, past its network."""
        return subprocess.run(
            ["nsenter", "-t", str(self.leader()), "-a", *argv], check=True, capture_output=True, text=True
        ).stdout

    def edge_rules(self) -> list[tuple[str, str | None]]:
        firewall = self.tools.cloud.firewall("alpha-edge")
        assert firewall is not None
        return [(rule.protocol, rule.port) for rule in firewall.rules]

    def open_everything_behind_our_back(self) -> None:
        client = hcloud.Client(
            token=self.project.token.reveal(), api_endpoint=self.project.hcloud_endpoint, timeout=10, poll_interval=0.05
        )
        everywhere = FirewallRule(direction="in", protocol="tcp", port="22", source_ips=["0.0.0.0/0", "::/0"])
        bound = client.firewalls.get_by_name("alpha-edge")
        assert bound is not None
        for action in bound.set_rules([everywhere]):
            action.wait_until_finished()
        self.guest("nft", "flush", "ruleset")


@pytest.fixture(scope="module")
def bench(project: LabProject) -> Bench:
    for stage in ("payload", "provision", "install"):
        project.run("pyinfra", "-y", "inventory/lab.py", f"deploys/{stage}.py")
    return Bench(project)


def test_a_host_that_is_not_on_the_tailnet_stays_as_it_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(proof, "tailnet_addresses", lambda *_: {})
    with pytest.raises(LockdownError, match="nothing was closed"):
        bench.lock_down(say=said.append, timing=Timing(tailnet_s=1.0))
    monkeypatch.undo()
    assert ("tcp", "22") in bench.edge_rules()
    assert bench.reach("operator") == "yes"
    assert not any("trial" in text for text in said)


def test_a_host_that_shows_another_key_on_the_tailnet_is_not_closed(bench: Bench) -> None:
    with pytest.raises(Exception, match="host key") as caught:
        lockdown.apply(
            bench.project, "alpha", runner=bench.runner, cloud=bench.tools.cloud, server=bench.server,
            pin="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s",
        )  # fmt: skip
    assert "pinned is" in str(caught.value)
    assert ("tcp", "22") in bench.edge_rules()
    assert bench.reach("operator", 6) == "yes"


def test_a_tailnet_that_breaks_after_the_edge_closed_opens_the_edge_and_the_host_reverts_by_itself(
    bench: Bench,
) -> None:
    def break_it(text: str) -> None:
        if text.startswith("the edge is closed"):
            bench.guest("nft", "add table inet cut; add chain inet cut c { type filter hook input priority -10; }")
            bench.guest("nft", "add rule inet cut c iifname tailscale0 drop")

    with pytest.raises(LockdownError) as caught:
        bench.lock_down(say=break_it)
    said = str(caught.value)
    assert "the edge is open again" in said
    assert "reverts by itself" in said
    assert ("tcp", "22") in bench.edge_rules()
    # The host is still on trial. Its own timer is armed and needs nobody; run what it runs, instead of waiting for it.
    assert bench.guest("systemctl", "is-active", "clawdlets-exposure-revert.timer").strip() == "active"
    assert bench.reach("operator") == "no"
    bench.guest("systemctl", "start", "clawdlets-exposure-revert.service")
    assert bench.reach("operator") == "yes"
    bench.guest("nft", "delete table inet cut")
    assert bench.guest("cat", "/run/clawdlets/exposure").strip() == "bootstrap"


def test_a_port_that_is_still_open_from_outside_rolls_back_and_says_from_where(bench: Bench) -> None:
    def somebody_opens_it(text: str) -> None:
        if text.startswith("the edge is closed"):
            bench.open_everything_behind_our_back()

    with pytest.raises(LockdownError) as caught:
        bench.lock_down(say=somebody_opens_it)
    assert "stranger over IPv4" in str(caught.value)
    assert "stranger over IPv6" in str(caught.value)
    assert "the host's firewall is as before" in str(caught.value)
    assert bench.edge_rules() == [("tcp", "22"), ("udp", "41641")]
    assert bench.reach("stranger") == "no"
    assert bench.reach("operator") == "yes"


EXPOSURE = "/run/current-system/sw/bin/clawdlets-exposure"
SHORT = Timing(trial_s=300, watchdog_s=240.0, edge_s=60.0, tailnet_s=120.0, restore_s=6.0)


def is_open_as_before(bench: Bench) -> bool:
    return ("tcp", "22") in bench.edge_rules() and bench.reach("operator") == "yes" and bench.reach("stranger") == "no"


def test_a_console_without_a_good_password_closes_nothing(bench: Bench) -> None:
    secret = bench.project.layout.secret_file("alpha", "breakglass_password_hash")
    aside = secret.rename(secret.with_suffix(".aside"))
    try:
        with pytest.raises(LockdownError, match="it is the last way in; nothing was closed"):
            bench.lock_down()
    finally:
        aside.rename(secret)
    assert ("tcp", "22") in bench.edge_rules()


def test_somebody_elses_trial_is_waited_for_and_left_alone(bench: Bench) -> None:
    bench.guest(EXPOSURE, "try", "public", "200", "f" * 16)
    with pytest.raises(BusyError, match="somebody else is changing its exposure"):
        bench.lock_down(timing=SHORT)
    assert "owner=ffffffffffffffff" in bench.guest(EXPOSURE, "account")
    bench.guest(EXPOSURE, "revert", "f" * 16)
    assert not watchdog.lives(bench.project.layout, "alpha")
    assert is_open_as_before(bench)


def test_a_command_that_is_killed_after_the_edge_closed_opens_it_by_its_watchdog(
    bench: Bench, project: LabProject
) -> None:
    command = project.popen("clawdlets", "lockdown", "--host", "alpha", start_new_session=True)
    assert command.stdout is not None
    for line in command.stdout:
        if "the edge is closed" in line:
            break
    assert ("tcp", "22") not in bench.edge_rules()
    pid = int(json.loads((bench.project.layout.lockdown_dir("alpha") / "watchdog.json").read_text())["pid"])
    command.kill()
    command.communicate()
    assert wait_until(lambda: not watchdog.lives(bench.project.layout, "alpha"), timeout_s=120)
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists(), timeout_s=10)
    assert is_open_as_before(bench)
    said = [
        event["text"]
        for path in journals(bench.project.layout.runs)
        for event in read_journal(path)
        if str(event.get("text")).startswith("watchdog: the operator's command is gone without a word")
    ]
    assert len(said) == 1
    assert "opened the edge again; the host's firewall is as before" in said[0]


def test_a_watchdog_that_is_killed_is_missed_before_anything_is_confirmed(bench: Bench) -> None:
    def kill_it(text: str) -> None:
        if text.startswith("the edge is closed"):
            order = edge.read_order(bench.project.layout, "alpha")
            assert order is not None
            os.kill(int(watchdog.state_of(bench.project.layout, order)["pid"]), signal.SIGKILL)

    with pytest.raises(LockdownError, match="the watchdog has ended") as caught:
        bench.lock_down(say=kill_it, timing=SHORT)
    assert "the edge is open again" in str(caught.value)
    assert is_open_as_before(bench)


def test_a_host_that_reboots_on_trial_is_open_and_so_is_its_edge(bench: Bench) -> None:
    def reboot(text: str) -> None:
        if text.startswith("the edge is closed"):
            before = bench.leader()
            bench.guest("systemctl", "reboot")
            assert wait_until(lambda: bench.leader() not in (before, None), timeout_s=60)

    with pytest.raises(LockdownError) as caught:
        bench.lock_down(say=reboot, timing=SHORT)
    assert "the edge is open again" in str(caught.value)
    assert wait_until(lambda: is_open_as_before(bench), timeout_s=60)
    assert "mode=bootstrap" in bench.guest(EXPOSURE, "status")


def test_a_firewall_that_stays_pending_is_put_back_and_what_was_left_is_gone_on_from(bench: Bench) -> None:
    layout = Layout(bench.project.layout.root)

    def hold(text: str) -> None:
        if "is on trial" in text:
            faults.inject(layout, faults.parse_fault(["firewall-pending", "alpha"]))

    try:
        with pytest.raises(LockdownError, match="THE EDGE COULD NOT BE OPENED AGAIN"):
            bench.lock_down(say=hold, timing=dataclasses.replace(SHORT, edge_s=10.0))
        assert wait_until(lambda: not watchdog.lives(layout, "alpha"), timeout_s=120)
        assert is_open_as_before(bench)  # the rules are those of before, though nobody could see them applied
        left = edge.unfinished(layout, "alpha")
        assert left is not None
    finally:
        faults.clear(layout)
    said: list[str] = []
    bench.lock_down(say=said.append)
    assert any("was left unfinished: its rules are the ones to go back to" in text for text in said)
    assert edge.unfinished(layout, "alpha") is None
    report = bench.project.layout.reports("alpha") / "lockdown.json"
    told = json.loads(report.read_text())
    assert (told["proof"]["logins"], told["rulesAfter"]) == (3, ["in udp/41641 0.0.0.0/0, ::/0"])
    assert report.with_name("lockdown.json.sig").is_file()


def test_a_vantage_that_cannot_look_leaves_the_doors_closed_and_unknown(bench: Bench) -> None:
    blind = [
        dataclasses.replace(vantage, controls={}) if vantage.side == "internet" else vantage
        for vantage in bench.project.vantages
    ]
    bench.lock_down(project=dataclasses.replace(bench.project, vantages=tuple(blind)))
    assert ("tcp", "22") not in bench.edge_rules()
    recorded = json.loads((bench.project.layout.reports("alpha") / "exposure-after.json").read_text())
    assert {cell["reach"] for cell in recorded["cells"] if cell["side"] == "internet"} == {"unknown"}
    assert bench.reach("stranger") == "no"  # with its control it can be seen


def test_a_locked_host_opens_again_when_it_is_declared_so_and_closes_again(bench: Bench, project: LabProject) -> None:
    def declare(mode: str) -> None:
        project.fleet(lambda document: document["hosts"]["alpha"]["sshExposure"].update(mode=mode))

    declare("public")
    for stage in ("provision", "lockdown"):
        project.run("pyinfra", "-y", "inventory/lab.py", f"deploys/{stage}.py")
    assert (bench.reach("operator"), bench.reach("stranger")) == ("yes", "no")
    assert project.run("clawdlets", "verify", "--host", "alpha").returncode == 0
    stale = stay_logged_in(bench.project, "alpha", bench.server.addresses[4])
    declare("tailnet")
    project.run("pyinfra", "-y", "inventory/lab.py", "deploys/lockdown.py")
    # Both firewalls are stateful and would let it go on; lockdown ends it.
    stale.communicate(timeout=30)
    assert stale.returncode != 0
    assert (bench.reach("operator"), bench.reach("stranger"), bench.reach("member", 6)) == ("no", "no", "yes")


def test_the_host_firewall_survives_a_reboot(bench: Bench) -> None:
    tailnet = lockdown.tailnet_addresses(bench.runner, "alpha", bench.project.fleet.host("alpha"))
    target = ssh.Target(
        "alpha", tailnet[4], ADMIN, bench.project.ssh_identity_file("alpha"), store.host_ssh_pin(bench.project, "alpha")
    )
    before = bench.leader()
    bench.guest("systemctl", "reboot")
    # Going down it answers for a while.
    assert wait_until(lambda: bench.leader() not in (before, None), timeout_s=30)
    address, _ = ssh.wait_for_key(
        [tailnet[4]], frozenset({target.pin}), why="after the reboot", timeout_s=60, poll_s=0.3
    )
    assert address == tailnet[4]
    assert lockdown.read_status(target) == lockdown.HostExposure("tailnet", armed=False)
    assert bench.reach("operator") == "no"


def test_a_window_is_for_few_and_short_and_closes_by_itself(bench: Bench, project: LabProject) -> None:
    for words in (
        ("open", "alpha", "--for", "30m", "--cidr", "0.0.0.0/1", "--cidr", "128.0.0.0/1"),
        ("open", "alpha", "--for", "5h", "--cidr", "198.51.100.7/32"),
        ("open", "alpa", "--for", "5m", "--cidr", "198.51.100.7/32"),
    ):
        assert "→" in project.run("clawdlets", *words, ok=False).stdout
    assert ("tcp", "22") not in bench.edge_rules()
    networks = tuple(bench.project.fleet.host("alpha").provisioning.admin_cidrs)
    pin = store.host_ssh_pin(bench.project, "alpha")
    lockdown.open_window(
        bench.project, "alpha", networks, timedelta(seconds=45), runner=bench.runner, cloud=bench.tools.cloud,
        server=bench.server, pin=pin, journal=bench.tools.journal.folder,
    )  # fmt: skip
    assert (bench.reach("operator"), bench.reach("stranger")) == ("yes", "no")
    assert "mode=window armed=yes" in bench.guest(EXPOSURE, "status")
    door = doors.look_at_doors(bench.project, ["alpha"], runner=bench.runner, cloud_of=lambda _: bench.tools.cloud)[
        "alpha"
    ]
    assert isinstance(door, Door)
    assert open_windows(door, datetime.now(UTC))
    assert any("lets tcp/22 in" in fault for fault in drift(door).faults)
    assert workflow.plan("provision", bench.project, "alpha", bench.tools).empty
    stale = stay_logged_in(bench.project, "alpha", bench.server.addresses[4])
    assert wait_until(lambda: ("tcp", "22") not in bench.edge_rules(), timeout_s=120)
    assert wait_until(lambda: "mode=tailnet armed=no" in bench.guest(EXPOSURE, "status"), timeout_s=60)
    stale.communicate(timeout=60)
    firewall = bench.tools.cloud.firewall("alpha-edge")
    assert firewall is not None
    assert "clawdlets-window" not in firewall.labels
    assert wait_until(lambda: not watchdog.lives(bench.project.layout, "alpha"), timeout_s=60)
    assert bench.reach("operator") == "no"


def test_a_window_is_closed_on_demand_and_by_a_lockdown(bench: Bench, project: LabProject) -> None:
    cidr = bench.project.fleet.host("alpha").provisioning.admin_cidrs[0]
    opened = project.run("clawdlets", "open", "alpha", "--for", "30m", "--cidr", cidr).stdout
    assert "alpha: open to" in opened
    assert bench.reach("operator") == "yes"
    assert (
        "has a window already"
        in project.run("clawdlets", "open", "alpha", "--for", "30m", "--cidr", cidr, ok=False).stdout
    )
    assert "operator" in project.run("clawdlets", "close", "alpha").stdout
    assert bench.reach("operator") == "no"
    assert not watchdog.lives(bench.project.layout, "alpha")
    project.run("clawdlets", "open", "alpha", "--for", "30m", "--cidr", cidr)
    project.run("clawdlets", "lockdown", "--all")
    assert bench.reach("operator") == "no"
    assert not watchdog.lives(bench.project.layout, "alpha")


def test_admin_can_run_the_exact_words_and_nothing_else_without_a_password(bench: Bench) -> None:
    tailnet = lockdown.tailnet_addresses(bench.runner, "alpha", bench.project.fleet.host("alpha"))
    target = ssh.Target(
        "alpha", tailnet[4], ADMIN, bench.project.ssh_identity_file("alpha"), store.host_ssh_pin(bench.project, "alpha")
    )
    program = "/run/current-system/sw/bin/clawdlets-exposure"
    with ssh.session(target) as shell:
        assert shell.run(f"sudo -n {program} status").ok
        for words in (
            f"{program} restore",
            f"{program} try tailnet extra",
            f"{program} 'status;id'",
            "/bin/sh",
            "cat /etc/shadow",
        ):
            assert not shell.run(f"sudo -n {words}").ok, words
        assert not shell.run("cat /run/secrets/discord_token").ok
        assert not shell.run("cat /var/lib/sops-nix/key.txt").ok


def test_nothing_secret_is_on_the_hosts_disk_world_readable(bench: Bench) -> None:
    values = json.loads((bench.project.layout.lab / "secrets.json").read_text())["alpha"]
    needles = "\n".join(values.values())
    script = "grep -rlF -f - /etc /nix /var /home /root /opt /usr/local 2>/dev/null || true"
    leader = control.status(Layout(Path(bench.project.layout.root))).servers[0].leader_pid
    argv = ["nsenter", "-t", str(leader), "-a", "sh", "-c", script]
    assert subprocess.run(argv, input=needles, check=True, capture_output=True, text=True).stdout == ""
    # the positive control: the same search finds them where they belong, on the ramfs
    control_argv = [*argv[:-1], script.replace("/etc /nix", "/run/secrets.d")]
    found = subprocess.run(control_argv, input=needles, check=True, capture_output=True, text=True).stdout.split()
    assert {Path(path).name for path in found} >= {"discord_token", "model_api_key", "tailscale_auth_key"}
