"""Verifies several hosts at once and reports on all of them: a page, JSON, SARIF, JUnit, and the operator's signature."""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.files import ensure_dir, write_atomic
from clawdlets_ops.finding import Finding, State, exit_code
from clawdlets_ops.hetzner import Cloud
from clawdlets_ops.journal import printable
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.verify import catalogue, fleet_report, repository, run, signature
from clawdlets_ops.verify import host as one_host
from clawdlets_ops.verify.run import Report

FLEET_REPORT_VERSION = 1
ASKED_AT_ONCE = 4
REPORTS_KEPT = 100
NOT_RUN = "RUN-01"

States = dict[str, dict[str, str]]
"""Host → check → how it came out."""


@dataclass(frozen=True)
class FleetReport:
    """A verification of several hosts. ``document`` is what ``report.json`` holds; ``unsigned`` says why there is no
    signature. ``exit_code``: 0 all passed, 1 something failed, 2 something is unknown."""

    document: Mapping[str, Any]
    folder: Path
    exit_code: int
    signature: Path | None
    unsigned: str

    @property
    def page(self) -> Path:
        """The report for people."""
        return self.folder / "report.html"


def verify_fleet(
    project: Project,
    hosts: Sequence[str],
    *,
    runner: Runner,
    cloud: Cloud,
    only: Sequence[str] = (),
    parallel: int = run.PARALLEL,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> FleetReport:
    """Verify ``hosts``, ``parallel`` at a time, and write the report below ``.clawdlets/reports/_fleet`` (0700, files 0600).

    ``only`` names checks in any case; VerifyError for one that does not exist, FleetError for such a host. A host that
    could not be verified at all is a finding of the state unknown, and does not keep the others from being verified. One
    pytest judges all of them, and the vantages look at all of them at once.
    """
    checks = catalogue.catalogue()
    wanted = tuple(dict.fromkeys(catalogue.find(ident, checks).id for ident in only))
    for host in hosts:
        project.fleet.host(host)
    started, at = time.monotonic(), now()
    folder = project.layout.fleet_reports / at.strftime("%Y%m%dT%H%M%S%fZ")
    seen = functools.cache(lambda: one_host.peers(project, hosts, runner=runner))

    def expect(host: str) -> Mapping[str, Any] | ClawdletsError:
        try:
            return one_host.expect(project, host, cloud=cloud, seen=seen)
        except ClawdletsError as error:
            return error

    with ThreadPoolExecutor(max_workers=max(1, min(ASKED_AT_ONCE, len(hosts)))) as pool:
        found = dict(zip(hosts, pool.map(expect, hosts), strict=True))
    outcomes: dict[str, Report | ClawdletsError] = {
        host: one for host, one in found.items() if isinstance(one, ClawdletsError)
    }
    subjects = {
        host: (one, one_host.report_folder(project, host))
        for host, one in found.items()
        if not isinstance(one, ClawdletsError)
    }
    if subjects:
        asked = repository.is_asked(checks, wanted)
        try:
            outcomes |= run.verify_hosts(
                project,
                subjects,
                runner=runner,
                folder=folder,
                only=wanted,
                parallel=parallel,
                diagnose=(lambda: repository.diagnose(project, tuple(subjects), cloud=cloud)) if asked else None,
                now=lambda: at,
            )
        except ClawdletsError as error:
            outcomes |= dict.fromkeys(subjects, error)
    outcomes = {host: outcomes[host] for host in hosts}
    before = newest(project.layout.fleet_reports, whole=not wanted)
    ensure_dir(folder)
    document = _document(
        outcomes, wanted, before, folder, at=at, duration_s=time.monotonic() - started, declared=project.fleet.hosts
    )
    for name, text in (
        ("report.json", json.dumps(document, indent=2, ensure_ascii=False) + "\n"),
        ("report.html", fleet_report.page(document, checks)),
        ("report.sarif", fleet_report.sarif(document, checks) + "\n"),
        ("junit.xml", fleet_report.junit(document)),
    ):
        write_atomic(folder / name, text.encode(errors="replace"))
    last_whole = newest(project.layout.fleet_reports, whole=True) if wanted else document
    _prune(project.layout.fleet_reports, spare=last_whole["run"] if last_whole else "")
    for host in hosts:
        _prune(project.layout.reports(host))
    signed, why = _sign(project, hosts, folder / "report.json", runner)
    return FleetReport(document, folder, document["exitCode"], signed, why)


def _prune(folder: Path, *, spare: str = "") -> None:
    """Keep the newest reports, and the one that the next whole verification is compared with; what else is there stays."""
    stamped = sorted(path for path in folder.glob("[0-9]*T[0-9]*Z") if path.is_dir() and not path.is_symlink())
    for path in stamped[:-REPORTS_KEPT]:
        if path.name != spare:
            shutil.rmtree(path)


def newest(folder: Path, *, whole: bool = False) -> dict[str, Any] | None:
    """The last report of the fleet that can be read, None without one. ``whole``: none that was made of some checks alone."""
    for path in sorted(folder.glob("*/report.json"), reverse=True):
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(document, dict) or document.get("fleetReportVersion") != FLEET_REPORT_VERSION:
            continue
        if not (whole and document.get("only")):
            return document
    return None


def states(findings: Sequence[Mapping[str, Any]]) -> States:
    """How each check came out."""
    found: States = {}
    for one in findings:
        found.setdefault(one["host"], {})[one["check"]] = one["state"]
    return found


def last_known(before: Mapping[str, Any] | None) -> States:
    """How each check came out when it was last made, as a report tells: also of a host that could not be verified then."""
    if before is None:
        return {}
    return {**states(before["findings"]), **before.get("known", {})}


def known_after(known: States, findings: Sequence[Mapping[str, Any]], *, whole: bool) -> States:
    """``known`` with what ``findings`` tell. What was not made this time stays as it was, unless a ``whole`` verification
    of the host had no such check any more."""
    after = dict(known)
    for host, now in states(findings).items():
        stays = {} if whole and NOT_RUN not in now else known.get(host, {})
        after[host] = {**{check: state for check, state in stays.items() if check != NOT_RUN}, **now}
    return after


def differences(known: States, findings: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What came out otherwise than when it was last made: ``{host, check, was, now}``.

    Of a host that is known, a check that was never made (``was`` is "") counts when it did not pass; that a host cannot be
    verified counts for each, and that it can be verified again is told as ``RUN-01`` that passes.
    """
    told = []
    for host, made in states(findings).items():
        was = known.get(host, {})
        now = {NOT_RUN: str(State.PASS), **made} if NOT_RUN in was else made
        for check, state in now.items():
            counts = (host in known and state in (State.FAIL, State.UNKNOWN)) or check == NOT_RUN
            if (check in was or counts) and was.get(check, "") != state:
                told.append({"host": host, "check": check, "was": was.get(check, ""), "now": state})
    return told


def changes(before: Mapping[str, Any] | None, findings: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The ``differences`` to what was known with ``before``; none without it."""
    return differences(last_known(before), findings) if before else []


def _document(
    outcomes: Mapping[str, Report | ClawdletsError],
    only: Sequence[str],
    before: Mapping[str, Any] | None,
    folder: Path,
    *,
    at: datetime,
    duration_s: float,
    declared: Collection[str],
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    findings: list[dict[str, Any]] = []
    for host, outcome in outcomes.items():
        if isinstance(outcome, ClawdletsError):
            lost = Finding(
                check=NOT_RUN,
                state=State.UNKNOWN,
                claim="The host can be verified at all.",
                host=host,
                observed=printable(outcome.what),
                vantage="this machine",
                fix=printable(outcome.fix),
            )
            findings.append({**lost.as_json(), "severity": "critical", "durationS": 0.0})
            rows.append({"host": host, "summary": lost.observed, "mode": "", "evidenceSha256": "", "page": ""})
        else:
            one = json.loads(outcome.report_json.read_text(encoding="utf-8"))
            findings += one["findings"]
            page = Path("..") / ".." / host / outcome.report_html.parent.name / outcome.report_html.name
            rows.append({**{key: one[key] for key in ("host", "summary", "mode", "evidenceSha256")}, "page": str(page)})
    made = [Finding(one["check"], State(one["state"]), one["claim"]) for one in findings]
    known = {host: one for host, one in last_known(before).items() if host in ("", *declared)}
    return {
        "fleetReportVersion": FLEET_REPORT_VERSION,
        "at": at.isoformat(timespec="seconds"),
        "run": folder.name,
        "durationS": round(duration_s, 3),
        "exitCode": exit_code(made),
        "summary": fleet_report.summary(len(rows), findings),
        "only": list(only),
        "hosts": rows,
        "findings": findings,
        "comparedWith": before["run"] if before else None,
        "changes": changes(before, findings),
        "known": known_after(known, findings, whole=not only),
    }


def _sign(project: Project, hosts: Sequence[str], path: Path, runner: Runner) -> tuple[Path | None, str]:
    """With the key that logs in at the first host; a fleet has one operator at a time."""
    try:
        identity = project.ssh_identity_file(hosts[0])
    except ClawdletsError as error:
        return None, error.what
    return signature.sign(path, identity, runner=runner)
