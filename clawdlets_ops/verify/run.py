"""Runs the shipped suite against hosts, all in one pytest of its own, and reports on each.

Needs the project's runner and a report folder for each host; the suite itself gets nothing but the expectation documents,
and what the doctor says of the repository, which it says while the hosts are being asked.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clawdlets_ops.errors import CommandTimeout, VerifyError
from clawdlets_ops.files import ensure_dir, write_atomic
from clawdlets_ops.finding import Finding, State, exit_code
from clawdlets_ops.process import Command, Runner
from clawdlets_ops.project import Project
from clawdlets_ops.verify import report as report_text

SUITE = "clawdlets_ops.verify.suite"
SUITE_TIMEOUT_S = 300.0  # with as many hosts as are asked at a time
# How long further hosts may keep it waiting: evidence.FACTS_TIMEOUT_S and ATTEMPT_TIMEOUT_S, without importing testinfra.
ROUND_S = 210.0
PARALLEL = 16

Diagnose = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class Report:
    """How a verification came out. ``exit_code``: 0 all passed, 1 something failed, 2 something is unknown."""

    findings: tuple[Finding, ...]
    exit_code: int
    report_html: Path
    report_json: Path
    duration_s: float
    summary: str


def verify_host(
    project: Project,
    host: str,
    expectation: Mapping[str, Any],
    *,
    runner: Runner,
    report_dir: Path,
    only: Sequence[str] = (),
    diagnose: Diagnose | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Report:
    """Judge one host by ``expectation``: ``verify_hosts`` of one, with everything in ``report_dir``."""
    return verify_hosts(
        project,
        {host: (expectation, report_dir)},
        runner=runner,
        folder=report_dir,
        only=only,
        diagnose=diagnose,
        now=now,
    )[host]


def verify_hosts(
    project: Project,
    subjects: Mapping[str, tuple[Mapping[str, Any], Path]],
    *,
    runner: Runner,
    folder: Path,
    only: Sequence[str] = (),
    parallel: int = PARALLEL,
    diagnose: Diagnose | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> dict[str, Report]:
    """Judge each host by its expectation and write its report into its folder (0700, files 0600); ``folder`` takes what is
    of the whole run.

    ``only`` names the checks to make; none means all. ``diagnose`` says what the doctor says of the repository, in the shape
    of ``suite.test_repository``. VerifyError when the suite could not be run at all; a host that cannot be reached is a
    report full of unknowns.
    """
    started, at = time.monotonic(), now()
    ensure_dir(folder)
    documents = {}
    for host, (expectation, report_dir) in subjects.items():
        ensure_dir(report_dir)
        documents[host] = {**expectation, "asOf": at.isoformat()}
        write_atomic(report_dir / "expectation.json", json.dumps(documents[host], indent=2) + "\n")
    findings_file, repository_file = folder / "findings.json", folder / "repository.json"
    for left in (findings_file, repository_file):
        left.unlink(missing_ok=True)
    with ThreadPoolExecutor(max_workers=1) as pool:
        said = pool.submit(_diagnosed, diagnose, repository_file) if diagnose else None
        words = [
            word for _, report_dir in subjects.values() for word in ("--expectation", report_dir / "expectation.json")
        ]
        words += ["--repository", repository_file] if diagnose else []
        words += [word for ident in only for word in ("--only", ident)]
        words += ["--parallel", str(parallel)]
        within_s = suite_timeout_s(len(subjects), parallel)
        status = _run_suite(project, runner, folder, findings_file, tuple(subjects), words, within_s)
        repository = said.result() if said else None
    found = _read_findings(findings_file, ", ".join(subjects), folder)
    codes = exit_code(_finding(entry) for entry in found["findings"])
    if status != codes:
        raise VerifyError(
            f"the suite ended with status {status}, its findings say {codes}",
            where=", ".join(subjects),
            fix=f"see {folder / 'pytest.log'}",
        )
    reports = {}
    for host, (_, report_dir) in subjects.items():
        document = {**documents[host], "repository": repository}
        write_atomic(report_dir / "expectation.json", json.dumps(document, indent=2) + "\n")
        reports[host] = _report(host, document, found, report_dir, at=at, duration_s=time.monotonic() - started)
    return reports


def suite_timeout_s(hosts: int, parallel: int) -> float:
    """How long the suite may take: every host may hang as long as one may, ``parallel`` of them at a time."""
    return SUITE_TIMEOUT_S + max(0, math.ceil(hosts / max(1, parallel)) - 1) * ROUND_S


def _report(
    host: str, expected: Mapping[str, Any], found: Mapping[str, Any], folder: Path, *, at: datetime, duration_s: float
) -> Report:
    mine = [entry for entry in found["findings"] if entry["host"] in (host, "")]
    findings = tuple(_finding(entry) for entry in mine)
    code = exit_code(findings)
    evidence = found["evidence"].get(host, {"sha256": "", "facts": ""})
    write_atomic(folder / "facts.txt", evidence["facts"].encode(errors="replace"))
    document = report_text.document(
        expected=expected,
        findings=mine,
        exposure=[cell for cell in found["exposure"].get(host, []) if cell["port"] == expected["ssh"]["port"]],
        evidence_sha256=evidence["sha256"],
        at=at,
        duration_s=duration_s,
        exit_code=code,
    )
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    write_atomic(folder / "report.json", text.encode(errors="replace"))
    write_atomic(folder / "report.html", report_text.page(document).encode(errors="replace"))
    return Report(
        findings=findings,
        exit_code=code,
        report_html=folder / "report.html",
        report_json=folder / "report.json",
        duration_s=duration_s,
        summary=document["summary"],
    )


def _diagnosed(diagnose: Diagnose, target: Path) -> Mapping[str, Any]:
    """What the doctor says, left for the suite, which waits for it: also when the doctor breaks."""
    try:
        said = diagnose()
    except Exception as error:  # whatever it was: the suite must not wait for ever, and nothing was seen
        said = {"problem": f"the doctor broke: {type(error).__name__}", "findings": []}
    write_atomic(target, json.dumps(said) + "\n")
    return said


def _run_suite(
    project: Project,
    runner: Runner,
    folder: Path,
    findings_file: Path,
    hosts: Sequence[str],
    words: Sequence[str | Path],
    within_s: float,
) -> int:
    """Run pytest and return its exit status; what it says goes to ``pytest.log``."""
    package_root = Path(__file__).resolve().parents[2]
    command = Command(
        [
            # -P: what lies in the working folder is not to be imported
            *(sys.executable, "-P", "-m", "pytest", "--pyargs", SUITE),
            *("-p", "clawdlets_ops.verify.plugin", "-p", "no:cacheprovider"),
            *("-c", "/dev/null", "--rootdir", folder, "-q", "--tb=line", "-ra"),
            *("--findings", findings_file),
            *("--search-path", project.environ.get("PATH", "")),
            *words,
        ],
        f"verify {', '.join(hosts)}",
        env={"PYTHONPATH": str(package_root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=folder,
        timeout_s=within_s,
        log_file=folder / "pytest.log",
    )
    try:
        return runner.run(command).exit_code
    except CommandTimeout as error:
        raise VerifyError(
            f"the suite did not end within {within_s:g} s",
            where=", ".join(hosts),
            fix=f"see {folder / 'pytest.log'}; a vantage or the host hangs",
        ) from error


def _read_findings(path: Path, host: str, folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        log = folder / "pytest.log"
        raise VerifyError("the suite left no findings", where=host, fix=f"see {log}") from error
    return found


def _finding(entry: Mapping[str, Any]) -> Finding:
    return Finding(
        check=entry["check"],
        state=State(entry["state"]),
        claim=entry["claim"],
        host=entry["host"],
        observed=entry["observed"],
        vantage=entry["vantage"],
        fix=entry["fix"],
    )
