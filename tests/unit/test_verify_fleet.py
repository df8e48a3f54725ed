"""The report of several hosts: what a page, SARIF, JUnit and the text say of pass, fail, unknown and not applicable."""

from __future__ import annotations

import json
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from clawdlets_ops.errors import ClawdletsError, VerifyError
from clawdlets_ops.fleet import load_fleet
from clawdlets_ops.layout import Layout
from clawdlets_ops.project import Project
from clawdlets_ops.testing import FakeCloud, FakeRunner
from clawdlets_ops.verify import catalogue, fleet, fleet_report
from clawdlets_ops.verify.catalogue import Check

HOSTILE = '<script>alert(1)</script>\x1b[2J & "quotes" ]]>'
CHECKS = (
    Check("EXP-01", "critical", "Closed to the internet.", "close it", "api", "The rules as the API gives them back."),
    Check("SSH-01", "high", "Keys only.", "no passwords", "host", ""),
)


def finding(host: str, check: str, state: str, observed: str = "seen") -> dict[str, Any]:
    return {
        "host": host, "check": check, "state": state, "claim": f"claim of {check}", "observed": observed,
        "vantage": "the host", "fix": "do it" if state in ("fail", "unknown") else "", "severity": "critical", "durationS": 0.25,
    }  # fmt: skip


@pytest.fixture
def document() -> dict[str, Any]:
    findings = [
        finding("alpha", "EXP-01", "pass"),
        finding("alpha", "SSH-01", "fail", HOSTILE),
        finding("beta", "EXP-01", "unknown", "no vantage"),
        finding("beta", "SSH-01", "not-applicable", "no sshd"),
    ]
    hosts = [
        {"host": name, "summary": "…", "mode": "tailnet", "evidenceSha256": "ab", "page": ""}
        for name in ("alpha", "beta")
    ]
    return {
        "fleetReportVersion": 1, "at": "2026-11-22T10:00:00+00:00", "run": "x", "durationS": 1.5, "exitCode": 1,
        "summary": fleet_report.summary(2, findings), "only": [], "hosts": hosts, "findings": findings,
        "comparedWith": None, "changes": [],
    }  # fmt: skip


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def test_a_page_holds_every_cell_and_nothing_foreign(document: dict[str, Any]) -> None:
    tags = parse(fleet_report.page(document, CHECKS))
    assert not [tag for tag, _ in tags.seen if tag in ("script", "link", "img", "iframe")]
    assert not [value for _, attributes in tags.seen for value in attributes.values() if "//" in (value or "")]
    assert HOSTILE in tags.text  # as text, not as a tag
    assert len([tag for tag, _ in tags.seen if tag == "details"]) == 4
    assert "beta EXP-01: no vantage" in tags.text
    assert "The rules as the API gives them back." in tags.text


def test_the_filter_hides_only_rows_without_a_fault(document: dict[str, Any]) -> None:
    document["findings"] += [finding("alpha", "TS-01", "pass"), finding("beta", "TS-01", "not-applicable")]
    rows = [attributes for tag, attributes in parse(fleet_report.page(document, CHECKS)).seen if tag == "tr"]
    assert [row.get("class") for row in rows[1:]] == [None, None, "clean"]


def test_what_changed_is_said_on_the_page_and_in_the_text(document: dict[str, Any]) -> None:
    before = {
        "run": "20261122T090000000000Z",
        "findings": [finding("alpha", "SSH-01", "pass"), finding("gone", "SSH-01", "fail")],
    }
    document["changes"] = fleet.changes(before, document["findings"])
    document["comparedWith"] = before["run"]
    assert document["changes"] == [{"host": "alpha", "check": "SSH-01", "was": "pass", "now": "fail"}]
    assert "alpha SSH-01: passed → failed" in parse(fleet_report.page(document, CHECKS)).text
    assert "changed alpha  SSH-01: pass → fail" in fleet_report.text(document, "p")


def test_sarif_has_failures_as_results_and_the_unknown_as_notifications(document: dict[str, Any]) -> None:
    run = json.loads(fleet_report.sarif(document, CHECKS))["runs"][0]
    assert [(one["ruleId"], one["level"]) for one in run["results"]] == [("SSH-01", "error")]
    assert {one["id"] for one in run["tool"]["driver"]["rules"]} == {"EXP-01", "SSH-01"}
    invocation = run["invocations"][0]
    assert invocation["executionSuccessful"] is False
    assert [one["message"]["text"] for one in invocation["toolExecutionNotifications"]] == [
        "beta: EXP-01 is unknown: no vantage"
    ]


def test_junit_counts_and_can_be_parsed_whatever_a_host_said(document: dict[str, Any]) -> None:
    suites = ElementTree.fromstring(fleet_report.junit(document))  # noqa: S314 - our own
    counts = [(one.get("name"), one.get("failures"), one.get("errors"), one.get("skipped")) for one in suites]
    assert counts == [("alpha", "1", "0", "0"), ("beta", "0", "1", "1")]
    failure = suites.find("./testsuite/testcase/failure")
    assert failure is not None
    assert "<script>alert(1)</script>\N{REPLACEMENT CHARACTER}[2J" in str(failure.get("message"))


def test_the_text_names_what_did_not_pass_and_what_to_do(document: dict[str, Any]) -> None:
    text = fleet_report.text(document, "report.html")
    assert text.index("FAIL    alpha  SSH-01") < text.index("unknown beta  EXP-01")
    assert text.count("→ do it") == 2
    assert text.splitlines()[-2] == "2 hosts: 1 passed, 1 failed, 1 unknown, 1 not applicable"


def test_nothing_that_a_host_said_reaches_the_terminal_as_a_command(document: dict[str, Any]) -> None:
    document["hosts"][0]["summary"] = HOSTILE
    document["findings"][2]["observed"] = "no vantage\x1b]0;x\x07\u202e\nalpha: 60 passed"
    text = fleet_report.text(document, "report.html")
    assert not set("\x1b\x07\u202e") & set(text)
    assert text.count("<script>alert(1)</script>\N{REPLACEMENT CHARACTER}[2J") == 2
    assert "\nalpha: 60 passed" not in text


def test_every_check_of_the_suite_is_in_the_catalogue_once() -> None:
    checks = catalogue.catalogue()
    idents = [check.id for check in checks]
    assert len(idents) == len(set(idents))
    assert {"SSH-01", "EXP-04", "FS-04", "GIT-01"} <= set(idents)
    assert {check.severity for check in checks} <= {"critical", "high", "medium", "low"}
    assert not [check.id for check in checks if not (check.claim and check.fix and check.how and check.expect)]


def test_a_check_is_found_in_any_case_and_a_misspelt_one_is_named() -> None:
    assert catalogue.find("exp-01", CHECKS).severity == "critical"
    with pytest.raises(VerifyError, match=r"did you mean EXP-01\?"):
        catalogue.find("exp-11", CHECKS)


def test_a_host_that_cannot_be_verified_is_unknown_and_the_report_is_made(root: Path, tmp_path: Path) -> None:
    project = Project(Layout(tmp_path), load_fleet(Layout(root).fleet_file), "maren", {"PATH": "/usr/bin:/bin"})
    made = fleet.verify_fleet(project, ("alpha",), runner=FakeRunner(), cloud=FakeCloud(), only=("ssh-01",))
    assert made.exit_code == 2
    assert [(one["check"], one["state"], one["observed"]) for one in made.document["findings"]] == [
        (fleet.NOT_RUN, "unknown", "there is no such server")
    ]
    assert made.signature is None
    assert made.unsigned
    for name in ("report.json", "report.html", "report.sarif", "junit.xml"):
        assert stat.S_IMODE((made.folder / name).stat().st_mode) == 0o600
    assert fleet.newest(project.layout.fleet_reports) == made.document
    again = fleet.verify_fleet(project, ("alpha",), runner=FakeRunner(), cloud=FakeCloud())
    assert again.document["comparedWith"] is None  # the first was of one check alone
    last = fleet.verify_fleet(project, ("alpha",), runner=FakeRunner(), cloud=FakeCloud())
    assert last.document["comparedWith"] == again.document["run"]


@pytest.mark.parametrize(("hosts", "only"), [(("gamma",), ()), (("alpha",), ("SSH-99",))])
def test_what_does_not_exist_is_refused_before_anything_is_done(
    root: Path, tmp_path: Path, hosts: tuple[str, ...], only: tuple[str, ...]
) -> None:
    project = Project(Layout(tmp_path), load_fleet(Layout(root).fleet_file), "maren", {})
    with pytest.raises(ClawdletsError, match="there is no"):
        fleet.verify_fleet(project, hosts, runner=FakeRunner(), cloud=FakeCloud(), only=only)
    assert not project.layout.fleet_reports.exists()
