"""The pytest plugin that runs the shipped suite, or a user's own tests, against hosts. Only ever loaded by name:

    pytest --pyargs clawdlets_ops.verify.suite -p clawdlets_ops.verify.plugin --expectation alpha.json

Fixtures: ``expected`` (the expectation), ``facts`` (the host's evidence, fetched once), ``exposure`` (port 22 from every
vantage), ``probe(vantage, address, port)``, ``attempt(user, method)``, ``observe(text)``, ``unknown(why)``,
``not_applicable(why)`` and ``host``, testinfra's own, over one shared connection with the pinned host key.

Four results: passed, failed, unknown (nobody could see; counts as not passed), not applicable. Exit status: 0 all passed, 1
something failed, 2 something is unknown or nothing was checked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.files import write_atomic
from clawdlets_ops.finding import Finding, State, exit_code
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.verify.evidence import HostEvidence
from clawdlets_ops.verify.expectation import EXPECTATION_VERSION
from clawdlets_ops.verify.suite.reading import NotApplicable, Unknown

FINDINGS_VERSION = 1
SEARCH_PATH = f"/run/current-system/sw/bin:/usr/local/bin:{os.defpath}"
_RANK = {State.NOT_APPLICABLE: 0, State.PASS: 1, State.UNKNOWN: 2, State.FAIL: 3}
_VANTAGE = {
    "api": "the Hetzner API",
    "repository": "the operator's repository",
    "outside": "connections from {vantages}",
    "client": "a client's login attempt at {address}",
    "host": "the host, over SSH to {address}",
}


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    # testinfra's own plugin would make `host` the local machine when no --hosts is given.
    pluginmanager.set_blocked("pytest11.testinfra")
    group = parser.getgroup("clawdlets")
    group.addoption(
        "--expectation", action="append", default=[], metavar="FILE", help="What must hold on a host; repeatable."
    )
    group.addoption("--findings", default=None, metavar="FILE", help="Where to write all findings (JSON, 0600).")
    group.addoption("--only", action="append", default=[], metavar="ID", help="Only this check; repeatable.")
    group.addoption(
        "--search-path", default=SEARCH_PATH, metavar="PATH", help="Where ssh and the vantages' programs are."
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "check(id, severity, claim, fix, vantage): the entry of the check catalogue")
    config.pluginmanager.register(Verification(config), "clawdlets-verification")


class Verification:
    """One pytest run: the evidence of each host, and the findings."""

    def __init__(self, config: pytest.Config) -> None:
        self._findings_file = config.getoption("--findings")
        # Kept as it was given: the plugin reads no environment, whoever runs it says where programs are.
        self._runner = LocalRunner({"PATH": config.getoption("--search-path")})
        self.expectations = [read_expectation(Path(name)) for name in config.getoption("--expectation")]
        self._evidence: dict[str, HostEvidence] = {}
        self._collected: dict[str, pytest.Item] = {}
        self._found: dict[str, tuple[State, str]] = {}
        self._seconds: dict[str, float] = {}
        self.observed: dict[str, list[str]] = {}

    def evidence(self, expected: dict[str, Any]) -> HostEvidence:
        """The evidence on one host, made when it is first asked for."""
        if expected["host"] not in self._evidence:
            self._evidence[expected["host"]] = HostEvidence(expected, runner=self._runner)
        return self._evidence[expected["host"]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "expected" in metafunc.fixturenames:
            hosts = [expected["host"] for expected in self.expectations]
            metafunc.parametrize("expected", self.expectations, ids=hosts, indirect=True, scope="session")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        only = set(config.getoption("--only"))
        if unheard := only - {_entry(item).get("id") for item in items}:
            raise pytest.UsageError(f"--only {', '.join(sorted(unheard))}: there is no such check")
        if only:
            config.hook.pytest_deselected(items=[item for item in items if _entry(item).get("id") not in only])
            items[:] = [item for item in items if _entry(item).get("id") in only]
        # Refused logins come last: a host may well shut us out after a few of them.
        items.sort(key=lambda item: "attempt" in getattr(item, "fixturenames", ()))
        self._collected = {item.nodeid: item for item in items}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        self._seconds[item.nodeid] = self._seconds.get(item.nodeid, 0.0) + call.duration
        state, text = self._judge(item, call)
        if state is not None:
            known = self._found.get(item.nodeid)
            if known is None or _RANK[state] >= _RANK[known[0]]:
                self._found[item.nodeid] = (state, text)
            # On the item: JUnit takes the properties from the report of the last phase.
            item.user_properties[:] = _properties(item, self._found[item.nodeid][0])
            report.user_properties = list(item.user_properties)
            if state is State.UNKNOWN:
                report.outcome, report.longrepr = "failed", f"unknown: {text}"
            elif state is State.FAIL:
                report.longrepr = text
            elif state is State.NOT_APPLICABLE:
                report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1] or 0, f"Skipped: {text}")
        return report

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        if report.failed and isinstance(report.longrepr, str) and report.longrepr.startswith("unknown: "):
            return "unknown", "?", "UNKNOWN"
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        findings = [self._finding(nodeid, item) for nodeid, item in self._collected.items()]
        told = exit_code(finding for finding, _ in findings)
        # What pytest itself could not do (a broken test module, an interruption) is never better than unknown.
        ordinary = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
        session.exitstatus = told if session.exitstatus in ordinary or told == 1 else 2
        if self._findings_file:
            document = {
                "findingsVersion": FINDINGS_VERSION,
                "findings": [{**finding.as_json(), **more} for finding, more in findings],
                "exposure": {host: one.exposure for host, one in self._evidence.items() if one.measured},
                "evidence": {
                    host: {"sha256": one.facts_sha256, "facts": one.raw_facts} for host, one in self._evidence.items()
                },
            }
            write_atomic(Path(self._findings_file), json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def pytest_unconfigure(self) -> None:
        for one in self._evidence.values():
            one.close()

    def _judge(self, item: pytest.Item, call: pytest.CallInfo[None]) -> tuple[State | None, str]:
        """The state that one phase of a test gives it; None for a phase that says nothing."""
        error = call.excinfo.value if call.excinfo else None
        if error is None:
            return (State.PASS, "; ".join(self.observed.get(item.nodeid, ()))) if call.when == "call" else (None, "")
        if isinstance(error, NotApplicable):
            return State.NOT_APPLICABLE, str(error)
        if isinstance(error, Unknown):
            return State.UNKNOWN, str(error)
        if isinstance(error, AssertionError) and call.when == "call":
            return State.FAIL, str(error)
        if isinstance(error, pytest.skip.Exception):
            return State.UNKNOWN, f"was skipped: {error.msg}"
        if isinstance(error, ClawdletsError):
            return State.UNKNOWN, error.what.strip().splitlines()[0]
        return (
            State.UNKNOWN,
            f"the check broke: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}",
        )

    def _finding(self, nodeid: str, item: pytest.Item) -> tuple[Finding, dict[str, Any]]:
        state, observed = self._found.get(nodeid, (State.UNKNOWN, "was not run"))
        entry = _entry(item)
        given = item.callspec.params.get("expected") if hasattr(item, "callspec") else None
        expected = given if isinstance(given, dict) else None  # pytest puts a marker there when there is no host
        finding = Finding(
            check=entry.get("id", nodeid.rpartition("::")[2]),
            state=state,
            claim=entry.get("claim", ""),
            host=expected["host"] if expected else "",
            observed=observed,
            vantage=_vantage_text(entry.get("vantage", "host"), expected) if expected else "",
            fix=entry.get("fix", "") if state in (State.FAIL, State.UNKNOWN) else "",
        )
        # The first check that asks for the host's evidence is the one that waits for it.
        seconds = round(self._seconds.get(nodeid, 0.0), 4)
        return finding, {"severity": str(entry.get("severity", "medium")), "durationS": seconds}


def read_expectation(path: Path) -> dict[str, Any]:
    """The document in ``path``; pytest.UsageError when it is missing, or of another version."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"--expectation {path}: {error}") from error
    if document.get("expectationVersion") != EXPECTATION_VERSION:
        raise pytest.UsageError(f"--expectation {path}: is not of version {EXPECTATION_VERSION}")
    return document


def _entry(item: pytest.Item) -> dict[str, Any]:
    marker = item.get_closest_marker("check")
    return dict(marker.kwargs) if marker else {}


def _properties(item: pytest.Item, state: State) -> list[tuple[str, object]]:
    """What JUnit readers find a check by: node ids hold the path of the installation."""
    entry = _entry(item)
    return [(name, entry[name]) for name in ("id", "severity", "claim") if name in entry] + [("state", str(state))]


def _vantage_text(kind: str, expected: dict[str, Any]) -> str:
    names = ", ".join(vantage["name"] for vantage in expected["vantages"])
    return _VANTAGE.get(kind, kind).format(vantages=names or "nowhere", address=expected["ssh"]["address"])


def _verification(request: pytest.FixtureRequest) -> Verification:
    found = request.config.pluginmanager.get_plugin("clawdlets-verification")
    if not isinstance(found, Verification):
        raise pytest.UsageError("clawdlets_ops.verify.plugin is not configured")
    return found


@pytest.fixture(scope="session")
def expected(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What must hold on this host."""
    document: dict[str, Any] = request.param
    return document


@pytest.fixture(scope="session")
def _evidence(request: pytest.FixtureRequest, expected: dict[str, Any]) -> HostEvidence:
    return _verification(request).evidence(expected)


@pytest.fixture(scope="session")
def facts(_evidence: HostEvidence) -> dict[str, Any]:
    """What the host said of itself: one login, one exec."""
    return _evidence.facts


@pytest.fixture(scope="session")
def exposure(_evidence: HostEvidence) -> list[dict[str, Any]]:
    """Port 22 as seen from every vantage."""
    return _evidence.exposure


@pytest.fixture(scope="session")
def probe(_evidence: HostEvidence) -> Callable[[str, str, int], dict[str, Any]]:
    """``probe(vantage, address, port)``: one TCP probe."""
    return _evidence.probe


@pytest.fixture(scope="session")
def attempt(_evidence: HostEvidence) -> Callable[[str, str], dict[str, Any]]:
    """``attempt(user, method)``: a login that should be refused, made once a run."""
    return _evidence.attempt


@pytest.fixture(scope="session")
def host(_evidence: HostEvidence) -> Any:
    """testinfra's host, over the shared connection."""
    return _evidence.host


@pytest.fixture
def observe(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """``observe(text)``: what a passing check saw."""
    return _verification(request).observed.setdefault(request.node.nodeid, []).append


@pytest.fixture
def unknown() -> Callable[[str], NoReturn]:
    """``unknown(why)``: ends the test; it could not be seen."""

    def end(why: str) -> NoReturn:
        raise Unknown(why)

    return end


@pytest.fixture
def not_applicable() -> Callable[[str], NoReturn]:
    """``not_applicable(why)``: ends the test; the claim is not made for this host."""

    def end(why: str) -> NoReturn:
        raise NotApplicable(why)

    return end
