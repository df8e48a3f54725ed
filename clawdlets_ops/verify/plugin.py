"""The pytest plugin that runs the shipped suite, or a user's own tests, against hosts. Only ever loaded by name:

    pytest --pyargs clawdlets_ops.verify.suite -p clawdlets_ops.verify.plugin --expectation alpha.json

Fixtures: ``expected`` (the expectation), ``facts`` (the host's evidence, fetched once), ``exposure`` (port 22 from every
vantage), ``repository`` (what the doctor says), ``cloud`` (what the API shows), ``probe(vantage, address, port)``,
``attempt(user, method)``, ``observe(text)``, ``unknown(why)``, ``not_applicable(why)`` and ``host``, testinfra's own, over
one shared connection with the pinned host key.

Four results: passed, failed, unknown (nobody could see; counts as not passed), not applicable. Exit status: 0 all passed, 1
something failed, 2 something is unknown or nothing was checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest

from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.files import write_atomic
from clawdlets_ops.finding import Finding, State, exit_code
from clawdlets_ops.journal import printable
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.verify import EXPECTATION_VERSION
from clawdlets_ops.verify.evidence import METHODS, HostEvidence, Once, look_at
from clawdlets_ops.verify.suite.reading import NotApplicable, Unknown

FINDINGS_VERSION = 1
PARALLEL = 16
REPOSITORY_WITHIN_S = 180.0
# What a check of each vantage goes by, where it has noted nothing of its own.
_COMMAND = {"api": "GET server and firewalls", "repository": "clawdlets doctor", "host": "clawdlets-facts"}
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
        "--repository", default=None, metavar="FILE", help="What the doctor says; waited for when it is not there yet."
    )
    group.addoption("--parallel", type=int, default=PARALLEL, metavar="N", help="Hosts that are asked at a time.")
    group.addoption(
        "--search-path", default=SEARCH_PATH, metavar="PATH", help="Where ssh and the vantages' programs are."
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "check(id, severity, claim, expect, fix, vantage): the entry of the check catalogue"
    )
    config.pluginmanager.register(Verification(config), "clawdlets-verification")


class Verification:
    """One pytest run: the evidence of each host, and the findings."""

    def __init__(self, config: pytest.Config) -> None:
        self._findings_file = config.getoption("--findings")
        # Kept as it was given: the plugin reads no environment, whoever runs it says where programs are.
        self._runner = LocalRunner({"PATH": config.getoption("--search-path")})
        self.expectations = [read_expectation(Path(name)) for name in config.getoption("--expectation")]
        self.repository = Once(lambda: read_repository(config.getoption("--repository")))
        self._pool = ThreadPoolExecutor(max_workers=max(1, config.getoption("--parallel")))
        self._looks = ThreadPoolExecutor(max_workers=2)
        self._begun: list[Future[Any]] = []
        self._evidence: dict[str, HostEvidence] = {}
        self._outside: dict[str, Once[dict[str, list[dict[str, Any]]]]] = self._from_outside()
        self._collected: dict[str, pytest.Item] = {}
        self._found: dict[str, tuple[State, str]] = {}
        self._seconds: dict[str, float] = {}
        self._gathering_s = 0.0
        self._saw: dict[str, Seen] = {}
        self.observed: dict[str, list[str]] = {}

    def _from_outside(self) -> dict[str, Once[dict[str, list[dict[str, Any]]]]]:
        """host → the look at it that it shares with every host that has the same vantages."""
        shared: dict[str, list[dict[str, Any]]] = {}
        for expected in self.expectations:
            places = [{**entry, "expect": ""} for entry in expected["vantages"]]
            shared.setdefault(json.dumps(places, sort_keys=True), []).append(expected)
        looks = [(some, Once(partial(look_at, some, runner=self._runner))) for some in shared.values()]
        return {expected["host"]: look for some, look in looks for expected in some}

    def evidence(self, expected: dict[str, Any]) -> HostEvidence:
        """The evidence on one host, made when it is first asked for."""
        host = expected["host"]
        if host not in self._evidence:
            look = self._outside[host]
            self._evidence[host] = HostEvidence(expected, runner=self._runner, look=lambda: look()[host])
        return self._evidence[host]

    def saw(self, nodeid: str) -> Seen:
        """What the test looks at, as it goes."""
        return self._saw.setdefault(nodeid, Seen())

    def _begin(self, items: list[pytest.Item]) -> None:
        """Ask every host and every vantage at once for what these tests will want; they wait for what is not there yet."""
        wanted: dict[str, set[str]] = {}
        for item in items:
            given = item.callspec.params.get("expected") if hasattr(item, "callspec") else None
            if isinstance(given, dict):
                wanted.setdefault(given["host"], set()).update(getattr(item, "fixturenames", ()))
        for expected in self.expectations:
            asked = wanted.get(expected["host"], set())
            one = self.evidence(expected) if asked & {"facts", "exposure", "attempt"} else None
            if one is not None and "exposure" in asked:
                self._begun.append(self._looks.submit(getattr, one, "exposure"))
            if one is not None and asked & {"facts", "attempt"}:
                self._begun.append(self._pool.submit(self._ask, one, facts="facts" in asked, tries="attempt" in asked))

    def _ask(self, one: HostEvidence, *, facts: bool, tries: bool) -> None:
        with ThreadPoolExecutor(max_workers=len(METHODS) + 1) as pool:
            if facts:
                pool.submit(getattr, one, "facts")
                one.wait_for_answer()
            # Refused logins are begun after the one that counts: a host may well shut us out after a few of them.
            if tries:
                list(pool.map(lambda pair: one.attempt(*pair), usual_attempts(one.expected)))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> None:
        """Everything that was asked for is there before the first check is made."""
        started = time.perf_counter()
        wait(self._begun)
        if any("repository" in getattr(item, "fixturenames", ()) for item in self._collected.values()):
            self.repository()
        self._gathering_s = time.perf_counter() - started

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
        self._begin(items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        self._seconds[item.nodeid] = self._seconds.get(item.nodeid, 0.0) + call.duration
        state, text = self._judge(item, call)
        text = printable(text)  # a host has a say in it
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
                "gatheringS": round(self._gathering_s, 3),
                "evidence": {
                    host: {"sha256": one.facts_sha256, "facts": one.raw_facts} for host, one in self._evidence.items()
                },
            }
            # One host's text that is no Unicode must not take the findings about all others along.
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            write_atomic(Path(self._findings_file), text.encode(errors="replace"))

    def pytest_unconfigure(self) -> None:
        for pool in (self._pool, self._looks):
            pool.shutdown(cancel_futures=True)
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
            return State.UNKNOWN, error.what.strip().partition("\n")[0]
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
        saw = self._saw.get(nodeid, Seen())
        return finding, {
            "severity": str(entry.get("severity", "medium")),
            "durationS": round(self._seconds.get(nodeid, 0.0), 4),
            "expected": entry.get("expect", ""),
            "command": saw.command or _COMMAND.get(entry.get("vantage", "host"), ""),
            "evidenceSha256": saw.sha256(),
        }


class Seen:
    """What one check looked at: the pieces of evidence by name, and what was run for them."""

    def __init__(self) -> None:
        self._pieces: dict[str, Any] = {}

    def note(self, name: str, piece: Any) -> Any:
        """``piece``, remembered under ``name``: a section of the facts, a login attempt, cells, the API's account."""
        self._pieces[name] = piece
        return piece

    @property
    def command(self) -> str:
        """What was run, in words for a report: the sections of clawdlets-facts, the logins tried."""
        return ", ".join(sorted(self._pieces))

    def sha256(self) -> str:
        """The digest of the pieces, in the order of their names; empty when nothing was looked at."""
        if not self._pieces:
            return ""
        text = json.dumps(self._pieces, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


class Watched(dict[str, Any]):
    """The sections of the facts; which of them a check reads is noted."""

    def __init__(self, sections: dict[str, Any], seen: Seen) -> None:
        super().__init__(sections)
        self._seen = seen

    def get(self, name: str, default: Any = None) -> Any:
        """As dict.get."""
        return self._seen.note(f"clawdlets-facts {name}", super().get(name, default))


def usual_attempts(expected: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The logins that the suite's own checks try, so that they can be tried at once. Pure."""
    admin = expected["ssh"]["user"]
    others = [(user, "password") for user in expected["passwordUsers"] if user != admin][:1]
    return [(admin, "none"), *others, ("root", "publickey")]


def read_repository(name: str | None) -> dict[str, Any]:
    """What the doctor says, from the file that is written when it has said it: ``{problem, findings}``."""
    if name is None:
        return {"problem": "the doctor was not asked", "findings": []}
    path, until = Path(name), time.monotonic() + REPOSITORY_WITHIN_S
    while not path.exists():
        if time.monotonic() > until:
            return {"problem": f"the doctor said nothing within {REPOSITORY_WITHIN_S:g} s", "findings": []}
        time.sleep(0.02)
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {"problem": f"what the doctor said cannot be read ({type(error).__name__})", "findings": []}
    return found


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


@pytest.fixture
def _saw(request: pytest.FixtureRequest) -> Seen:
    return _verification(request).saw(request.node.nodeid)


@pytest.fixture
def facts(_evidence: HostEvidence, _saw: Seen) -> dict[str, Any]:
    """What the host said of itself: one login, one exec."""
    found = _evidence.facts
    return {**found, "sections": Watched(found["sections"], _saw)}


@pytest.fixture
def exposure(_evidence: HostEvidence, _saw: Seen) -> list[dict[str, Any]]:
    """Port 22, and some ports that should be closed, as seen from every vantage."""
    cells: list[dict[str, Any]] = _saw.note("TCP connects from every vantage", _evidence.exposure)
    return cells


@pytest.fixture
def probe(_evidence: HostEvidence, _saw: Seen) -> Callable[[str, str, int], dict[str, Any]]:
    """``probe(vantage, address, port)``: one TCP probe."""

    def look(vantage: str, address: str, port: int) -> dict[str, Any]:
        found: dict[str, Any] = _saw.note(
            f"TCP connect from {vantage} to {address}:{port}", _evidence.probe(vantage, address, port)
        )
        return found

    return look


@pytest.fixture
def attempt(_evidence: HostEvidence, _saw: Seen) -> Callable[[str, str], dict[str, Any]]:
    """``attempt(user, method)``: a login that should be refused, made once a run."""

    def login(user: str, method: str) -> dict[str, Any]:
        found: dict[str, Any] = _saw.note(f"ssh as {user}, offering {method}", _evidence.attempt(user, method))
        return found

    return login


@pytest.fixture
def cloud(expected: dict[str, Any], _saw: Seen) -> dict[str, Any] | None:
    """What the Hetzner API shows of the server and its firewalls; None when it could not be asked."""
    found: dict[str, Any] | None = _saw.note("GET server and firewalls", expected["cloud"])
    return found


@pytest.fixture
def repository(request: pytest.FixtureRequest, expected: dict[str, Any]) -> dict[str, Any]:
    """What the doctor says of the repository and the operator's machine: ``{problem, findings}``."""
    return dict(expected.get("repository") or _verification(request).repository())


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
