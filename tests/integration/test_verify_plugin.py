"""The plugin's four results, in a pytest of its own: unknown is never passed, and no run ends with a wrong zero."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.fleet import load_fleet
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Command, LocalRunner, Result
from clawdlets_ops.verify.expectation import build_expectation

pytestmark = pytest.mark.integration

CHECKS = """
import pytest

def mark(name):
    return pytest.mark.check(id=name, severity="high", claim=f"claim {name}", fix="do <it>")

@mark("A-1")
def test_passes(expected, observe):
    observe(f"seen on {expected['host']}")

@mark("A-2")
def test_fails(expected):
    raise AssertionError("it is open")

@mark("A-3")
def test_unknown(expected, unknown):
    unknown("no vantage")

@mark("A-4")
def test_not_applicable(expected, not_applicable):
    not_applicable("not declared")

@mark("A-5")
def test_skips(expected):
    pytest.skip("no time")

@mark("A-6")
def test_breaks(expected):
    {}["missing"]

@pytest.fixture
def broken():
    raise OSError("no such place")

@mark("A-7")
def test_with_a_broken_fixture(expected, broken):
    pass

@mark("A-8")
def test_that_breaks_afterwards(expected, request):
    request.addfinalizer(lambda: {}["gone"])

def test_of_a_user(expected):
    pass

@mark("A-9")
def test_the_host_is_ours_and_never_this_machine(host):
    assert host.backend.get_pytest_id() == "ssh://alpha"
"""


def small_expectation(root: Path, host: str) -> dict[str, Any]:
    """Enough of an expectation for tests that look at nothing."""
    pin = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE1vY2tIb3N0S2V5Rm9yVGVzdHNPbmx5MDAwMDAwMDAw"
    return build_expectation(
        host=host,
        declared=load_fleet(Layout(root).fleet_file).host("alpha"),
        mode="tailnet",
        public={},
        tailnet={4: "100.64.7.10"},
        pin=pin,
        admin_keys=(),
        identity_file="/nowhere",
        vantages=(),
        cloud=None,
    )


def run_plugin(
    root: Path, folder: Path, code: str, *words: str, hosts: tuple[str, ...] = ("alpha",)
) -> tuple[Result, Any]:
    (folder / "test_it.py").write_text(code)
    options: list[str | Path] = []
    for host in hosts:
        (folder / f"{host}.json").write_text(json.dumps(small_expectation(root, host)))
        options += ["--expectation", folder / f"{host}.json"]
    command = Command(
        [sys.executable, "-P", "-m", "pytest", folder / "test_it.py", "-p", "clawdlets_ops.verify.plugin", "-p", "no:cacheprovider",
         "-c", "/dev/null", "--rootdir", folder, "-q", "--tb=line", "--findings", folder / "findings.json", *options, *words],
        "run the plugin",
        env={"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=folder,
        timeout_s=60,
    )  # fmt: skip
    result = LocalRunner({"PATH": "/usr/bin:/bin"}).run(command)
    written = folder / "findings.json"
    return result, json.loads(written.read_text()) if written.exists() else None


def test_every_way_a_check_can_end(root: Path, tmp_path: Path) -> None:
    result, found = run_plugin(root, tmp_path, CHECKS, "--junitxml", str(tmp_path / "junit.xml"))
    states = {finding["check"]: finding["state"] for finding in found["findings"]}
    assert states == {
        "A-1": "pass", "A-2": "fail", "A-3": "unknown", "A-4": "not-applicable", "A-5": "unknown", "A-6": "unknown",
        "A-7": "unknown", "A-8": "unknown", "test_of_a_user[alpha]": "pass", "A-9": "pass",
    }, result.stdout  # fmt: skip
    assert result.exit_code == 1
    observed = {finding["check"]: finding["observed"] for finding in found["findings"]}
    assert observed["A-1"] == "seen on alpha"
    assert observed["A-2"] == "it is open"
    assert "KeyError" in observed["A-6"]
    assert "OSError: no such place" in observed["A-7"]
    assert found["findings"][1]["host"] == "alpha"
    assert found["findings"][1]["fix"] == "do <it>"
    assert found["findings"][0]["severity"] == "high"
    assert stat.S_IMODE((tmp_path / "findings.json").stat().st_mode) == 0o600
    junit = (tmp_path / "junit.xml").read_text()
    assert '<property name="id" value="A-3" />' in junit
    assert '<property name="state" value="unknown" />' in junit


@pytest.mark.parametrize(
    ("chosen", "exit_code"),
    [
        ("test_passes or test_not_applicable", 0),
        ("test_passes or test_unknown", 2),
        ("test_not_applicable", 2),
        ("test_with_a_broken_fixture", 2),
        ("test_nothing_of_this_name", 2),
    ],
)
def test_the_exit_status(root: Path, tmp_path: Path, chosen: str, exit_code: int) -> None:
    assert run_plugin(root, tmp_path, CHECKS, "-k", chosen)[0].exit_code == exit_code


HOSTILE_HOST = """
import pytest

@pytest.mark.parametrize("state", ["pass", "fail", "unknown", "broken"])
def test_it(expected, _saw, observe, unknown, state):
    text = "chain \\ud800\\x1b[2J"
    if expected["host"] == "alpha":
        _saw.note("nft", text)
        if state == "fail":
            raise AssertionError(text)
        if state == "unknown":
            unknown(text)
        if state == "broken":
            raise ValueError(text)
        observe(text)
"""


def test_one_host_s_text_that_is_no_unicode_costs_no_other_host_its_findings(root: Path, tmp_path: Path) -> None:
    result, found = run_plugin(root, tmp_path, HOSTILE_HOST, hosts=("alpha", "beta"))
    assert found is not None, result.stdout + result.stderr
    of = {host: [one for one in found["findings"] if one["host"] == host] for host in ("alpha", "beta")}
    assert sorted(one["state"] for one in of["alpha"]) == ["fail", "pass", "unknown", "unknown"]
    assert all("chain \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[2J" in one["observed"] for one in of["alpha"])
    assert all(one["evidenceSha256"] for one in of["alpha"])
    assert {one["state"] for one in of["beta"]} == {"pass"}


def test_only_the_checks_that_were_named(root: Path, tmp_path: Path) -> None:
    result, found = run_plugin(root, tmp_path, CHECKS, "--only", "A-1", "--only", "A-4")
    assert [finding["check"] for finding in found["findings"]] == ["A-1", "A-4"], result.stdout
    assert result.exit_code == 0
    result, found = run_plugin(root, tmp_path, CHECKS, "--only", "A-1", "--only", "A-77")
    assert result.exit_code == pytest.ExitCode.USAGE_ERROR
    assert "A-77: there is no such check" in result.stderr


def test_a_module_that_cannot_be_imported_is_not_passed(root: Path, tmp_path: Path) -> None:
    assert run_plugin(root, tmp_path, "import there_is_no_such_module\n")[0].exit_code == 2


def test_a_test_for_no_host_is_not_passed(root: Path, tmp_path: Path) -> None:
    assert run_plugin(root, tmp_path, CHECKS, "-k", "test_passes", hosts=())[0].exit_code == 2


def test_each_host_is_judged(root: Path, tmp_path: Path) -> None:
    result, found = run_plugin(root, tmp_path, CHECKS, "-k", "test_passes", hosts=("alpha", "beta"))
    assert [finding["host"] for finding in found["findings"]] == ["alpha", "beta"]
    assert [finding["observed"] for finding in found["findings"]] == ["seen on alpha", "seen on beta"]
    assert result.exit_code == 0


@pytest.mark.parametrize("content", ["{}", '{"expectationVersion": 99}', "no JSON"])
def test_an_expectation_of_another_kind_is_refused(root: Path, tmp_path: Path, content: str) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text(content)
    result, found = run_plugin(root, tmp_path, CHECKS, "--expectation", str(wrong))
    assert result.exit_code == pytest.ExitCode.USAGE_ERROR
    assert found is None
