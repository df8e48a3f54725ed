"""What changed between verifications: against what is last known of each check, whatever report came in between."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.errors import VerifyError
from clawdlets_ops.finding import Finding, State, exit_code
from clawdlets_ops.fleet import parse_fleet
from clawdlets_ops.layout import Layout
from clawdlets_ops.project import Project
from clawdlets_ops.testing import FakeCloud, FakeRunner
from clawdlets_ops.verify import fleet, fleet_report
from clawdlets_ops.verify.run import Report
from clawdlets_ops.verify.watch import watch

GOOD = {"SSH-01": "pass", "EXP-04": "pass"}
ACCEPTED = {"SSH-01": "fail", "EXP-04": "pass"}
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE1vY2tIb3N0S2V5Rm9yVGVzdHNPbmx5MDAwMDAwMDAw x"
NEVER = "could not be verified"

Round = Mapping[str, Mapping[str, str] | str]


class Verifications:
    """Verifies two hosts of a project again and again; each round says how checks come out, or why there is no host."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        one = {"sshAuthorizedKeys": [KEY], "provisioning": {"adminCidrs": ["198.51.100.0/24"]}}
        declared = {"schemaVersion": 1, "hosts": {"alpha": one, "beta": one}}
        self.project = Project(Layout(folder), parse_fleet(json.dumps(declared)), "maren", {})
        self._round: Round = {}
        self._at = datetime(2026, 11, 22, tzinfo=UTC)
        monkeypatch.setattr("clawdlets_ops.verify.host.expect", self._expect)
        monkeypatch.setattr("clawdlets_ops.verify.run.verify_hosts", self._verify_hosts)
        monkeypatch.setattr("clawdlets_ops.verify.repository.is_asked", lambda *_: False)

    def _expect(self, _project: Project, host: str, **_: Any) -> dict[str, Any]:
        found = self._round[host]
        if isinstance(found, str):
            raise VerifyError(found)
        return {}

    def _verify_hosts(self, _project: Project, subjects: Mapping[str, Any], **_: Any) -> dict[str, Report]:
        made = {}
        for host, (_, folder) in subjects.items():
            results = self._round[host]
            assert not isinstance(results, str)
            findings = [Finding(check, State(state), "c", host, "o") for check, state in results.items()]
            folder.mkdir(parents=True)
            document = {
                "host": host, "summary": "s", "mode": "tailnet", "evidenceSha256": "",
                "findings": [{**one.as_json(), "severity": "high", "durationS": 0.0} for one in findings],
            }  # fmt: skip
            (folder / "report.json").write_text(json.dumps(document))
            report = (folder / "report.html", folder / "report.json")
            made[host] = Report(tuple(findings), exit_code(findings), *report, 0.0, "s")
        return made

    def __call__(self, only: tuple[str, ...] = (), **results: Mapping[str, str] | str) -> fleet.FleetReport:
        self._round, self._at = results, self._at + timedelta(minutes=15)
        return fleet.verify_fleet(
            self.project, tuple(results), runner=FakeRunner(), cloud=FakeCloud(), only=only, now=lambda: self._at
        )

    def told(self, only: tuple[str, ...] = (), **results: Mapping[str, str] | str) -> list[tuple[str, ...]]:
        """The changes of one more verification."""
        return [tuple(change.values()) for change in self(only, **results).document["changes"]]


@pytest.fixture
def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Verifications:
    return Verifications(tmp_path, monkeypatch)


def test_a_host_that_cannot_be_verified_any_more_is_told_and_so_is_what_then_fails(verify: Verifications) -> None:
    assert verify.told(alpha=GOOD, beta=ACCEPTED) == []
    assert verify.told(alpha=NEVER, beta=ACCEPTED) == [("alpha", "RUN-01", "", "unknown")]
    assert verify.told(alpha=NEVER, beta=ACCEPTED) == []
    assert verify.told(alpha={"SSH-01": "fail", "EXP-04": "fail"}, beta=ACCEPTED) == [
        ("alpha", "RUN-01", "unknown", "pass"),
        ("alpha", "SSH-01", "pass", "fail"),
        ("alpha", "EXP-04", "pass", "fail"),
    ]


def test_what_was_accepted_before_a_host_was_gone_is_not_told_again(verify: Verifications) -> None:
    verify(alpha=ACCEPTED)
    verify(alpha=NEVER)
    assert verify.told(alpha=ACCEPTED) == [("alpha", "RUN-01", "unknown", "pass")]
    assert verify.told(alpha=ACCEPTED) == []


def test_a_new_check_is_told_when_it_does_not_pass_and_a_new_host_when_it_cannot_be_verified(
    verify: Verifications,
) -> None:
    verify(alpha={"SSH-01": "pass"})
    assert verify.told(alpha={"SSH-01": "pass", "EXP-04": "fail", "TS-01": "unknown", "FS-01": "pass"}) == [
        ("alpha", "EXP-04", "", "fail"),
        ("alpha", "TS-01", "", "unknown"),
    ]
    assert verify.told(beta=NEVER) == [("beta", "RUN-01", "", "unknown")]


def test_a_first_report_has_nothing_to_compare_with(verify: Verifications) -> None:
    assert verify.told(alpha=NEVER, beta=ACCEPTED) == []


def test_a_verification_of_one_check_or_one_host_in_between_does_not_blind_the_next(verify: Verifications) -> None:
    first = verify(alpha=GOOD, beta=GOOD)
    verify(("ssh-01",), alpha={"SSH-01": "pass"}, beta={"SSH-01": "pass"})
    second = verify(alpha=GOOD, beta=ACCEPTED)
    assert second.document["comparedWith"] == first.document["run"]
    assert [one["host"] for one in second.document["changes"]] == ["beta"]
    verify(alpha=GOOD)
    assert verify.told(alpha=GOOD, beta=GOOD) == [("beta", "SSH-01", "fail", "pass")]


def test_a_verification_of_one_check_compares_with_the_last_of_any_kind(verify: Verifications) -> None:
    verify(alpha=GOOD)
    assert verify.told(("ssh-01",), alpha={"SSH-01": "fail"}) == [("alpha", "SSH-01", "pass", "fail")]
    assert verify.told(("ssh-01",), alpha={"SSH-01": "fail"}) == []
    assert verify.told(("exp-04",), alpha={"EXP-04": "fail"}) == [("alpha", "EXP-04", "pass", "fail")]
    assert verify.told(alpha=GOOD) == []  # the last whole one saw the same


def test_the_last_whole_report_outlives_many_of_one_check(
    verify: Verifications, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "REPORTS_KEPT", 2)
    verify(alpha=GOOD)
    for _ in range(4):
        verify(("ssh-01",), alpha={"SSH-01": "pass"})
    assert len(list(verify.project.layout.fleet_reports.iterdir())) == 3
    assert verify.told(alpha=ACCEPTED) == [("alpha", "SSH-01", "pass", "fail")]
    assert len(list(verify.project.layout.fleet_reports.iterdir())) == 2


def test_a_host_that_left_the_fleet_is_not_remembered_and_a_report_without_memory_is_read(
    verify: Verifications,
) -> None:
    path = verify(alpha=GOOD).folder / "report.json"
    document = json.loads(path.read_text())
    document["findings"].append({**document["findings"][0], "host": "gone"})
    del document["known"]
    path.write_text(json.dumps(document))
    made = verify(alpha=ACCEPTED).document
    assert made["known"] == {"alpha": ACCEPTED}
    assert made["changes"] == [{"host": "alpha", "check": "SSH-01", "was": "pass", "now": "fail"}]


def test_a_check_that_is_new_is_shown_as_such(verify: Verifications) -> None:
    verify(alpha=GOOD)
    made = verify(alpha=NEVER)
    assert "changed alpha  RUN-01: new → unknown" in fleet_report.text(made.document, "p")
    assert "alpha RUN-01</strong>: new → " in made.page.read_text()


def test_a_watcher_is_told_what_happened_to_a_host_among_others_that_stay_red(verify: Verifications) -> None:
    rounds = iter(
        (
            {"alpha": GOOD, "beta": ACCEPTED},
            {"alpha": NEVER, "beta": ACCEPTED},
            {"alpha": ACCEPTED, "beta": ACCEPTED},
            {"alpha": ACCEPTED, "beta": ACCEPTED},
        )
    )
    said: list[str] = []
    watch(lambda: verify(**next(rounds)), every_s=1, times=4, wait=lambda _: False, say=said.append)
    assert [line.partition("; ")[2] for line in said] == [
        "",
        "alpha RUN-01: new → unknown",
        "alpha RUN-01: unknown → pass; alpha SSH-01: pass → fail",
    ]


@pytest.mark.parametrize("only", [(), ("ssh-01",)])
def test_a_watcher_is_told_what_somebody_else_s_verification_saw_first(
    verify: Verifications, only: tuple[str, ...]
) -> None:
    now = {check: state for check, state in GOOD.items() if not only or check == "SSH-01"}
    rounds = iter(({"alpha": now, "beta": ACCEPTED}, {"alpha": {**now, "SSH-01": "fail"}, "beta": ACCEPTED}))
    said: list[str] = []

    def in_between(_: float) -> bool:
        verify(alpha=ACCEPTED, beta=ACCEPTED)
        return False

    watch(lambda: verify(only, **next(rounds)), every_s=1, times=2, wait=in_between, say=said.append)
    assert said[1].partition("; ")[2] == "alpha SSH-01: pass → fail"


def test_a_host_that_speaks_no_unicode_gets_its_line_and_the_report_is_made(verify: Verifications) -> None:
    made = verify(alpha="said \udcff\x1b[2J\nbeta: all passed", beta={**GOOD, "TS-01\ud800": "unknown"})
    for name in ("report.json", "report.html", "report.sarif", "junit.xml"):
        assert (made.folder / name).read_bytes().decode()
    text = fleet_report.text(made.document, "p")
    assert "\x1b" not in text
    assert "\nbeta: all passed" not in text
    assert text.encode()
