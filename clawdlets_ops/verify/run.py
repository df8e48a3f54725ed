"""Runs the shipped suite against one host in a pytest of its own, and reports.

Needs the project's runner and a report folder; the suite itself gets nothing but the expectation document.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clawdlets_ops.errors import CommandTimeout, ToolMissingError, VerifyError
from clawdlets_ops.files import ensure_dir, write_atomic
from clawdlets_ops.finding import Finding, State, exit_code
from clawdlets_ops.layout import RUNTIME_DIR
from clawdlets_ops.process import Command, Runner
from clawdlets_ops.project import Project
from clawdlets_ops.verify import report as report_text

SUITE = "clawdlets_ops.verify.suite"
SUITE_TIMEOUT_S = 300.0
GIT_TIMEOUT_S = 30.0
# One path of each kind that the runtime dir holds.
RUNTIME_SAMPLES = ("x", "keys/operators/x.agekey", "extra-files/h/x", "infra/opentofu/h/x")


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
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Report:
    """Judge ``host`` by ``expectation`` and write the report into ``report_dir`` (0700, its files 0600).

    ``only`` names the checks to make; none means all. VerifyError when the suite could not be run at all; a host that
    cannot be reached is a report full of unknowns.
    """
    started, at = time.monotonic(), now()
    ensure_dir(report_dir)
    expected = {**expectation, "asOf": at.isoformat(), "git": git_evidence(project.layout.root, runner=runner)}
    findings_file = report_dir / "findings.json"
    findings_file.unlink(missing_ok=True)
    write_atomic(report_dir / "expectation.json", json.dumps(expected, indent=2) + "\n")
    status = _run_suite(project, runner, report_dir, findings_file, host, only)
    found = _read_findings(findings_file, host, report_dir)
    findings = tuple(_finding(entry) for entry in found["findings"])
    code = exit_code(findings)
    if status != code:
        raise VerifyError(
            f"the suite ended with status {status}, its findings say {code}",
            where=host,
            fix=f"see {report_dir / 'pytest.log'}",
        )
    evidence = found["evidence"].get(host, {"sha256": "", "facts": ""})
    write_atomic(report_dir / "facts.txt", evidence["facts"])
    duration_s = time.monotonic() - started
    document = report_text.document(
        expected=expected,
        findings=found["findings"],
        exposure=found["exposure"].get(host, []),
        evidence_sha256=evidence["sha256"],
        at=at,
        duration_s=duration_s,
        exit_code=code,
    )
    write_atomic(report_dir / "report.json", json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    write_atomic(report_dir / "report.html", report_text.page(document))
    return Report(
        findings=findings,
        exit_code=code,
        report_html=report_dir / "report.html",
        report_json=report_dir / "report.json",
        duration_s=duration_s,
        summary=document["summary"],
    )


def git_evidence(root: Path, *, runner: Runner) -> dict[str, Any]:
    """Which rule ignores the runtime dir: ``{checkout, problem, paths: [{path, source, pattern, tracked}]}``.

    ``problem`` is why git could not say, else None; ``source`` is empty for a path that no rule matches.
    """
    paths = [f"{RUNTIME_DIR}/{sample}" for sample in RUNTIME_SAMPLES]
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        return {"checkout": False, "problem": None, "paths": []}
    try:
        asked = runner.run(
            _git(
                root,
                "ask which rule ignores the runtime dir",
                "check-ignore",
                "-v",
                "-z",
                "--no-index",
                "--non-matching",
                "--stdin",
                stdin="".join(f"{path}\0" for path in paths),
            )
        )
        # Status 1: none is ignored.
        if asked.exit_code not in (0, 1):
            return {"checkout": True, "problem": f"git could not say: {asked.tail()}", "paths": []}
        fields = asked.stdout.split("\0")
        entries = [
            {"source": fields[at], "pattern": fields[at + 2], "path": fields[at + 3]}
            for at in range(0, len(fields) - 3, 4)
        ]
        # The source is named from the top of the checkout, which may be above the project.
        tracked = {
            source: runner.run(
                _git(
                    root,
                    "ask whether the rule is tracked",
                    "ls-files",
                    "--error-unmatch",
                    "--",
                    f":(top,literal){source}",
                )
            ).ok
            for source in {entry["source"] for entry in entries if entry["source"]}
        }
    except (ToolMissingError, CommandTimeout) as error:
        return {"checkout": True, "problem": error.what, "paths": []}
    return {
        "checkout": True,
        "problem": None,
        "paths": [{**entry, "tracked": tracked.get(entry["source"], False)} for entry in entries],
    }


def _git(root: Path, why: str, *words: str, stdin: str | None = None) -> Command:
    return Command(["git", "-C", root, *words], why, timeout_s=GIT_TIMEOUT_S, stdin=stdin)


def _run_suite(
    project: Project, runner: Runner, report_dir: Path, findings_file: Path, host: str, only: Sequence[str]
) -> int:
    """Run pytest and return its exit status; what it says goes to ``pytest.log``."""
    package_root = Path(__file__).resolve().parents[2]
    command = Command(
        [
            # -P: what lies in the working folder is not to be imported
            *(sys.executable, "-P", "-m", "pytest", "--pyargs", SUITE),
            *("-p", "clawdlets_ops.verify.plugin", "-p", "no:cacheprovider"),
            *("-c", "/dev/null", "--rootdir", report_dir, "-q", "--tb=line", "-ra"),
            *("--expectation", report_dir / "expectation.json", "--findings", findings_file),
            *("--junitxml", report_dir / "junit.xml"),
            *("--search-path", project.environ.get("PATH", "")),
            *(word for ident in only for word in ("--only", ident)),
        ],
        f"verify {host}",
        env={"PYTHONPATH": str(package_root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=report_dir,
        timeout_s=SUITE_TIMEOUT_S,
        log_file=report_dir / "pytest.log",
    )
    try:
        return runner.run(command).exit_code
    except CommandTimeout as error:
        raise VerifyError(
            f"the suite did not end within {SUITE_TIMEOUT_S:g} s",
            where=host,
            fix=f"see {report_dir / 'pytest.log'}; a vantage or the host hangs",
        ) from error


def _read_findings(path: Path, host: str, report_dir: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        log = report_dir / "pytest.log"
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
