"""The expectation document, the client's configuration, what a login attempt came to, the run and its report."""

from __future__ import annotations

import json
import stat
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.doctor.ignored import git_evidence
from clawdlets_ops.errors import CommandTimeout, VerifyError
from clawdlets_ops.finding import State
from clawdlets_ops.fleet import load_fleet, parse_fleet
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Command
from clawdlets_ops.project import Project
from clawdlets_ops.testing import FakeRunner
from clawdlets_ops.vantage import Vantage
from clawdlets_ops.verify.evidence import ATTEMPT_TIMEOUT_S, FACTS_TIMEOUT_S, read_attempt
from clawdlets_ops.verify.expectation import build_expectation, fingerprint
from clawdlets_ops.verify.report import document, page, summary
from clawdlets_ops.verify.run import ROUND_S, suite_timeout_s, verify_host, verify_hosts
from clawdlets_ops.verify.ssh_config import control_path, known_hosts, ssh_config

PIN = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE1vY2tIb3N0S2V5Rm9yVGVzdHNPbmx5MDAwMDAwMDAw root@alpha"
VANTAGES = (
    Vantage("operator", "internet", controls={4: ("198.19.7.3", 4242)}),
    Vantage("stranger", "internet", ("ip", "netns", "exec", "x")),
    Vantage("member", "tailnet"),
)


def expectation(root: Path, mode: Any = "tailnet", **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "host": "alpha",
        "declared": load_fleet(Layout(root).fleet_file).host("alpha"),
        "mode": mode,
        "public": {4: "198.18.7.10", 6: "2001:2:0:70a::1"},
        "tailnet": {4: "100.64.7.10", 6: "fd7a:115c:a1e0:7::a"},
        "pin": PIN,
        "admin_keys": (PIN,),
        "identity_file": "/somewhere/my key",
        "vantages": VANTAGES,
        "cloud": None,
    }
    return build_expectation(**{**given, **changes})


# --- expectation ---


def test_the_example_fleet_gives_a_document(root: Path) -> None:
    expected = json.loads(json.dumps(expectation(root)))
    assert expected["expectationVersion"] == 1
    assert expected["ssh"]["address"] == "100.64.7.10"
    assert expected["ssh"]["pin"] == " ".join(PIN.split()[:2])
    assert expected["passwordUsers"] == ["admin", "breakglass"]
    assert expected["secretsDir"] == {
        "path": "/var/lib/clawdlets/secrets/hosts/alpha", "mode": "0700", "owner": "root", "group": "root", "kind": "directory",
    }  # fmt: skip
    secrets = {secret["name"]: secret for secret in expected["secrets"]}
    assert sorted(secrets) == [
        "admin_password_hash", "breakglass_password_hash", "discord_token", "model_api_key", "tailscale_auth_key",
    ]  # fmt: skip
    assert secrets["discord_token"]["runtime"] == {
        "path": "/run/secrets/discord_token", "owner": "bot-maren", "group": None, "mode": "0400",
    }  # fmt: skip
    assert secrets["tailscale_auth_key"]["runtime"] is None
    assert secrets["tailscale_auth_key"]["file"]["mode"] == "0400"


@pytest.mark.parametrize(
    ("mode", "address", "reached"),
    [
        ("tailnet", "100.64.7.10", {"operator": "no", "stranger": "no", "member": "yes"}),
        ("bootstrap", "198.18.7.10", {"operator": "no", "stranger": "no", "member": "yes"}),
        ("public", "198.18.7.10", {"operator": "yes", "stranger": "no", "member": "yes"}),
    ],
)
def test_the_mode_decides_who_may_reach_the_host(root: Path, mode: str, address: str, reached: dict[str, str]) -> None:
    expected = expectation(root, mode)
    assert expected["ssh"]["address"] == address
    assert {one["name"]: one["expect"] for one in expected["vantages"]} == reached


def test_a_host_declared_open_to_the_world_is_reached_by_strangers(root: Path) -> None:
    cidrs = {"adminCidrs": ["0.0.0.0/0"], "adminCidrAllowWorldOpen": True, "sshPubkeyFile": "x.pub"}
    hosts = {"alpha": {"provisioning": cidrs, "sshExposure": {"mode": "public"}}}
    declared = parse_fleet(json.dumps({"schemaVersion": 1, "hosts": hosts})).host("alpha")
    assert {one["expect"] for one in expectation(root, "public", declared=declared)["vantages"]} == {"yes"}
    assert expectation(root, "tailnet", declared=declared)["vantages"][1]["expect"] == "no"


def test_a_host_without_an_address_cannot_be_verified(root: Path) -> None:
    with pytest.raises(VerifyError, match="no tailnet address"):
        expectation(root, tailnet={})
    with pytest.raises(VerifyError, match="no public address"):
        expectation(root, "public", public={})


def test_an_ipv6_only_host_is_logged_in_to_over_ipv6(root: Path) -> None:
    assert expectation(root, tailnet={6: "fd7a::a"})["ssh"]["address"] == "fd7a::a"


def test_a_fingerprint_is_as_openssh_prints_it() -> None:
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGPKSUTyz1HwHReFVvD5obVsALAgJRNarH4TRpNePnAS"
    assert fingerprint(key) == "SHA256:qH8baHrA5X0qCBovKCZyM02Q7TFtK4GMqVgOo4TZJAE"  # ssh-keygen -lf
    with pytest.raises(VerifyError):
        fingerprint("ssh-ed25519")


# --- the client's configuration ---


def test_the_client_is_pinned_and_takes_nothing_of_the_user_s(root: Path, tmp_path: Path) -> None:
    folder = Path("/t/clv-12345678")
    text = ssh_config(expectation(root), folder)
    for line in (
        "Host alpha",
        "  HostName 100.64.7.10",
        "  HostKeyAlias alpha",
        "  StrictHostKeyChecking yes",
        "  GlobalKnownHostsFile /dev/null",
        '  UserKnownHostsFile "/t/clv-12345678/known_hosts"',
        '  IdentityFile "/somewhere/my key"',
        "  IdentitiesOnly yes",
        "  IdentityAgent none",
        "  BatchMode yes",
    ):
        assert line in text.splitlines()
    assert known_hosts(expectation(root)) == f"alpha {' '.join(PIN.split()[:2])}\n"


def test_a_name_that_the_configuration_cannot_hold_is_refused(root: Path) -> None:
    assert '"/a%%b/key"' in ssh_config(expectation(root, identity_file="/a%b/key"), Path("/t"))
    with pytest.raises(VerifyError):
        ssh_config(expectation(root, identity_file='/a"\n  ProxyCommand x'), Path("/t"))


def test_a_folder_too_long_for_a_socket_is_refused() -> None:
    with pytest.raises(VerifyError, match="too long"):
        control_path(Path("/" + "x" * 90))


# --- login attempts ---

REFUSED = """OpenSSH_9.2p1 Debian-2+deb12u10, OpenSSL 3.0.19
debug1: Server host key: ssh-ed25519 SHA256:abc+/123
debug1: Authentications that can continue: publickey
debug1: No more authentication methods to try.
admin@100.64.7.10: Permission denied (publickey).
"""


def test_a_refused_login_is_read() -> None:
    assert read_attempt(REFUSED) == {
        "result": "denied",
        "methods": ["publickey"],
        "presented": "SHA256:abc+/123",
        "why": "admin@100.64.7.10: Permission denied (publickey).",
    }


@pytest.mark.parametrize(
    ("said", "result", "methods"),
    [
        (REFUSED.replace("continue: publickey", "continue: publickey,password"), "denied", ["password", "publickey"]),
        ('Authenticated to alpha ([1.2.3.4]:22) using "none".\n', "admitted", None),
        ("debug1: Authentication succeeded (publickey).\n", "admitted", None),
        ("ssh: connect to host alpha port 22: Connection timed out\n", "failed", None),
        ("debug1: Server host key: ssh-ed25519 SHA256:x\nHost key verification failed.\n", "failed", None),
        ("", "failed", None),
    ],
)
def test_what_a_login_attempt_came_to(said: str, result: str, methods: list[str] | None) -> None:
    answer = read_attempt(said)
    assert (answer["result"], answer["methods"]) == (result, methods)
    assert answer["why"]


# --- the run and its report ---


def finding(check: str, state: str, **more: str) -> dict[str, Any]:
    usual = {"claim": "c", "host": "alpha", "observed": "o", "vantage": "v", "fix": "", "severity": "high"}
    return {"check": check, "state": state, **usual, **more}


def make_document(root: Path, findings: list[dict[str, Any]]) -> dict[str, Any]:
    cells = [
        {
            "vantage": "stranger",
            "side": "internet",
            "family": 4,
            "address": "198.18.7.10",
            "port": 22,
            "reach": "no",
            "detail": "filtered",
        }
    ]
    return document(
        expected=expectation(root),
        findings=findings,
        exposure=cells,
        evidence_sha256="00ff",
        at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        duration_s=1.23456,
        exit_code=1,
    )


def test_the_page_says_all_of_it_and_needs_nothing_else(root: Path) -> None:
    findings = [finding("A-1", "pass"), finding("A-2", "fail", observed="<script>alert(1)</script>", fix="close it")]
    text = page(make_document(root, findings))
    for part in (
        "alpha",
        "2026-01-02T03:04:05",
        "A-2",
        "To do: close it",
        "stranger",
        "filtered",
        "1 passed, 1 failed",
        "00ff",
    ):
        assert part in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script" not in text
    assert "http" not in text
    assert text.index("A-2") < text.index("A-1")


def test_a_page_without_anything_seen(root: Path) -> None:
    empty = {**make_document(root, []), "exposure": [], "evidenceSha256": "", "vantages": []}
    assert "Nobody looked." in page(empty)
    assert summary([]) == "0 passed"


class ScriptedSuite(FakeRunner):
    """Stands in for pytest: writes findings as the plugin does, and ends with ``status``."""

    def __init__(self, findings: list[dict[str, Any]] | None, status: int) -> None:
        super().__init__(script=[((sys.executable,), self.suite)])
        self.findings, self.status = findings, status

    def suite(self, command: Command) -> tuple[int, str]:
        target = Path(command.argv[command.argv.index("--findings") + 1])
        if self.findings is not None:
            evidence = {"alpha": {"sha256": "ab", "facts": "=== facts"}}
            target.write_text(json.dumps({"findings": self.findings, "exposure": {}, "evidence": evidence}))
        return self.status, ""


def make_project(root: Path, tmp_path: Path) -> Project:
    return Project(Layout(tmp_path), load_fleet(Layout(root).fleet_file), "maren", {"PATH": "/usr/bin:/bin"})


def test_a_run_leaves_a_private_report(root: Path, tmp_path: Path) -> None:
    runner = ScriptedSuite([finding("A-1", "pass"), finding("A-2", "unknown")], 2)
    folder = tmp_path / "report"
    report = verify_host(make_project(root, tmp_path), "alpha", expectation(root), runner=runner, report_dir=folder)
    assert (report.exit_code, report.summary) == (2, "1 passed, 1 unknown")
    assert [found.state for found in report.findings] == [State.PASS, State.UNKNOWN]
    assert json.loads(report.report_json.read_text())["summary"] == "1 passed, 1 unknown"
    assert "1 unknown" in report.report_html.read_text()
    assert (folder / "facts.txt").read_text() == "=== facts"
    assert json.loads((folder / "expectation.json").read_text())["repository"] is None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("expectation.json", "report.html", "report.json", "facts.txt"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    (command,) = runner.ran
    assert command.timeout_s == 300
    assert command.env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] == "1"


def test_a_text_that_is_no_unicode_is_in_the_report_all_the_same(root: Path, tmp_path: Path) -> None:
    runner = ScriptedSuite([finding("A-1", "fail", observed="a chain \ud800")], 1)
    folder = tmp_path / "report"
    verify_host(make_project(root, tmp_path), "alpha", expectation(root), runner=runner, report_dir=folder)
    assert json.loads((folder / "report.json").read_text())["findings"][0]["observed"] == "a chain ?"
    assert "a chain ?" in (folder / "report.html").read_text()


def test_every_host_has_the_time_to_hang_when_they_are_asked_one_after_the_other() -> None:
    assert ROUND_S == FACTS_TIMEOUT_S + ATTEMPT_TIMEOUT_S
    assert [suite_timeout_s(hosts, 16) for hosts in (0, 1, 16, 17)] == [300, 300, 300, 300 + ROUND_S]
    for hosts in range(1, 40):
        assert suite_timeout_s(hosts, 1) > hosts * ROUND_S


def test_the_suite_is_given_the_time_that_its_hosts_may_take(root: Path, tmp_path: Path) -> None:
    runner = ScriptedSuite([finding("A-1", "pass"), finding("A-1", "pass", host="beta")], 0)
    subjects = {host: ({**expectation(root), "host": host}, tmp_path / host) for host in ("alpha", "beta")}
    verify_hosts(make_project(root, tmp_path), subjects, runner=runner, folder=tmp_path / "all", parallel=1)
    assert runner.ran[0].timeout_s == 300 + ROUND_S


@pytest.mark.parametrize(
    ("findings", "status"),
    [
        (None, 0),
        (None, 4),
        ([finding("A-1", "pass")], 2),
        ([finding("A-1", "fail")], 0),
        ([], 0),
    ],
)
def test_a_suite_that_contradicts_itself_is_an_error(
    root: Path, tmp_path: Path, findings: list[dict[str, Any]] | None, status: int
) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "findings.json").write_text('{"findings": [], "exposure": {}, "evidence": {}}')
    with pytest.raises(VerifyError):
        verify_host(
            make_project(root, tmp_path), "alpha", expectation(root), runner=ScriptedSuite(findings, status),
            report_dir=tmp_path / "report",
        )  # fmt: skip


def test_a_suite_that_hangs_is_an_error(root: Path, tmp_path: Path) -> None:
    def hang(command: Command) -> tuple[int, str]:
        raise CommandTimeout("too late")

    runner = FakeRunner(script=[((sys.executable,), hang)])
    with pytest.raises(VerifyError, match="did not end"):
        verify_host(make_project(root, tmp_path), "alpha", expectation(root), runner=runner, report_dir=tmp_path / "r")


# --- what git says of the runtime dir ---


def git_answers(*entries: tuple[str, str, str], status: int = 0, tracked: int = 0) -> FakeRunner:
    text = "".join(f"{source}\0{1}\0{pattern}\0{path}\0" for source, pattern, path in entries)

    def answer(command: Command) -> tuple[int, str]:
        return (status, text) if "check-ignore" in command.argv else (tracked, "")

    return FakeRunner(script=[(("git",), answer)])


def test_git_is_not_asked_outside_a_checkout(tmp_path: Path) -> None:
    assert git_evidence(tmp_path, runner=FakeRunner())["checkout"] is False


def test_git_s_answer_is_read(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    runner = git_answers((".gitignore", "/.clawdlets/", ".clawdlets/x"), ("", "", ".clawdlets/keys/y"))
    assert git_evidence(tmp_path, runner=runner)["paths"] == [
        {"source": ".gitignore", "pattern": "/.clawdlets/", "path": ".clawdlets/x", "tracked": True},
        {"source": "", "pattern": "", "path": ".clawdlets/keys/y", "tracked": False},
    ]


def test_a_git_that_fails_or_is_missing_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    assert "could not say" in git_evidence(tmp_path, runner=git_answers(status=128))["problem"]
    assert "not on PATH" in git_evidence(tmp_path, runner=FakeRunner(programs=frozenset()))["problem"]
