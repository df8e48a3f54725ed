"""A lab for one test: a temporary project with a fleet, a cloud of its own, and the questions a test asks of it.

    with Scenario(Path(), environ=os.environ) as lab:
        lab.bootstrap("alpha")
        assert lab.reach("stranger", "alpha", 4) == "no"

As a pytest fixture: the same ``with`` around a ``yield``. It needs what ``clawdlets lab up`` needs (Linux, root, ``make
setup``); ``LabError`` says what is missing. Several may be up at once, each with its own addresses.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from clawdlets_ops import workflow
from clawdlets_ops.errors import CommandError, LabError
from clawdlets_ops.finding import Finding
from clawdlets_ops.fleet import parse_fleet
from clawdlets_ops.lab import control
from clawdlets_ops.lab.faults import inject, parse_fault
from clawdlets_ops.lab.headscale import AUTO
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Command, LocalRunner, Result
from clawdlets_ops.project import Project, load_project
from clawdlets_ops.scaffold.shipped import texts
from clawdlets_ops.verify import host as verify_host
from clawdlets_ops.verify.exposure import SSH_PORT, Reach, measure_exposure

COMMAND_TIMEOUT_S = 1800.0
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INVENTORY = Path("inventory") / "lab.py"
IGNORED = "/.clawdlets/\n/.cache\n__pycache__/\n"

_TOTAL = re.compile(r"^\s*Grand total\s+(\S+)\s+(\S+)\s+(\S+)\s+(\S+)", flags=re.MULTILINE)


@dataclass(frozen=True)
class Deployed:
    """What pyinfra's results table said: operations run, how many of them changed something, and all that was printed."""

    ran: int
    changed: int
    text: str


def read_results(text: str) -> Deployed:
    """The last results table in pyinfra's output; LabError when there is none."""
    found = _TOTAL.findall(text)
    if not found:
        raise LabError(f"pyinfra printed no results:\n{text[-2000:]}", where="pyinfra")
    ran, changed, *_ = (0 if word == "-" else int(word) for word in found[-1])
    return Deployed(ran, changed, text)


def environment(environ: Mapping[str, str], *, programs: Path | None = None) -> dict[str, str]:
    """What a command in a scenario gets: PATH with ``programs`` first (default: where this Python's are), HOME, locale,
    an operator called olive; nothing that carries an identity or a token."""
    keep = {key: environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in environ}
    path = f"{programs or Path(sys.executable).parent}:{keep.get('PATH', SYSTEM_PATH)}"
    return {**keep, "PATH": path, "USER": "olive", "NO_COLOR": "1", "COLUMNS": "200"}


def lay_out(
    root: Path,
    fleet: Path | Mapping[str, Any],
    *,
    cache: Path,
    environ: Mapping[str, str],
    hosts: Collection[str] | None = None,
) -> None:
    """Make ``root`` a project in a git repository of its own; FleetError, CommandError.

    ``fleet`` is a project (its ``fleet``, ``deploys`` and ``inventory`` are copied), a fleet file, or a fleet file's
    content. ``hosts`` leaves all others out. ``cache`` holds the base image and the tools that ``make setup`` made.
    """
    layout = Layout(root)
    (root / "fleet").mkdir(parents=True, exist_ok=True)
    if isinstance(fleet, Path) and fleet.is_dir():
        for name in ("fleet", "deploys", "inventory"):
            if (fleet / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(fleet / name, root / name, dirs_exist_ok=True, ignore=ignored)
        document = json.loads(layout.fleet_file.read_text(encoding="utf-8"))
    else:
        document = dict(fleet) if isinstance(fleet, Mapping) else json.loads(fleet.read_text(encoding="utf-8"))
    declared = parse_fleet(json.dumps(document), where=str(layout.fleet_file))
    if hosts is not None:
        for name in hosts:
            declared.host(name)
        document = {**document, "hosts": {name: document["hosts"][name] for name in hosts}}
    if hosts is not None or not layout.fleet_file.exists():
        layout.fleet_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for name, text in {**texts("deploys", ".py"), **texts("inventory", ".py")}.items():
        _unless_there(root / name, text)
    _unless_there(root / ".gitignore", IGNORED)
    layout.cache.symlink_to(cache.resolve())
    runner = LocalRunner(environ)
    who = ["-c", "user.name=olive", "-c", "user.email=olive@example.invalid"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "start"]):
        runner.run(Command(["git", "-C", root, *words], "make the scenario's repository")).check()


class Scenario:
    """A project with a lab of its own, up inside the ``with``, and gone after it, whatever happened.

    ``fleet`` and ``hosts`` are as in ``lay_out``. ``folder``: where the project goes; then it stays, with its reports, and
    only the lab goes. ``cache``: default is ``.cache`` of the project that ``fleet`` is, else of the current directory.
    ``programs``: the folder of ``clawdlets`` and ``pyinfra``. ``environ``: where PATH, HOME and locale come from;
    pass ``os.environ`` when something that is needed is not on the system's usual search path. ``faults``: what is to go
    wrong from the start, in the words of ``clawdlets lab fault add``; LabError for words that make no sense. ``tailnet``:
    as for ``clawdlets lab up``: "auto", "real" or "stand-in". ``cut_established``: a change of firewall rules ends the
    flows that the new rules would not let begin; as a rule they go on.
    """

    def __init__(
        self,
        fleet: Path | Mapping[str, Any],
        *,
        hosts: Collection[str] | None = None,
        folder: Path | None = None,
        cache: Path | None = None,
        programs: Path | None = None,
        environ: Mapping[str, str] | None = None,
        faults: Collection[str] = (),
        tailnet: str = AUTO,
        cut_established: bool = False,
    ) -> None:
        self._tailnet = tailnet
        self._cut_established = cut_established
        self._faults = [parse_fault(words.split()) for words in faults]
        self._fleet = fleet
        self._hosts = hosts
        self._folder = folder
        self._cache = cache or (fleet if isinstance(fleet, Path) and fleet.is_dir() else Path()) / ".cache"
        self._shell = environment(environ or {}, programs=programs)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._root: Path | None = None

    def __enter__(self) -> Scenario:
        """Lay the project out and bring its lab up; FleetError, LabError, ToolMissingError, CommandError."""
        try:
            if self._folder is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="clawdlets-scenario-")
                self._root = Path(self._temporary.name).resolve() / "project"
            else:
                self._root = self._folder.resolve()
            self._shell.setdefault("HOME", str(self._root.parent))
            lay_out(self._root, self._fleet, cache=self._cache, environ=self._shell, hosts=self._hosts)
            control.up(self.layout, self._shell, tailnet=self._tailnet, cut_established=self._cut_established or None)
            for fault in self._faults:
                inject(self.layout, fault)
        except BaseException:
            self._take_down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._take_down()

    @property
    def root(self) -> Path:
        """The project's folder; LabError outside the ``with``."""
        if self._root is None:
            raise LabError("the scenario is not entered", where="Scenario", fix="use it in a with statement")
        return self._root

    @property
    def layout(self) -> Layout:
        """The project's paths."""
        return Layout(self.root)

    @property
    def project(self) -> Project:
        """The project as it is declared now: read anew each time."""
        return load_project(self.root, self._shell)

    @property
    def environ(self) -> dict[str, str]:
        """For commands of your own in the project: search path, API endpoint and token of the lab."""
        return dict(self.project.environ)

    def run(self, *argv: str, timeout_s: float = COMMAND_TIMEOUT_S) -> Result:
        """A command as an operator types it in the project, such as ``clawdlets verify``; the result, however it ended."""
        command = Command(argv, f"run {argv[0]}", env=self._shell, cwd=self.root, timeout_s=timeout_s)
        return LocalRunner(self._shell).run(command)

    def deploy(self, name: str, host: str | None = None) -> Deployed:
        """Run ``deploys/<name>.py`` with pyinfra, on one host or all; CommandError with all its output when it failed."""
        if host is not None:
            self.project.fleet.host(host)
        chosen = ["--limit", f"@clawdlets/{host}"] if host else []
        result = self.run("pyinfra", "-y", str(INVENTORY), f"deploys/{name}.py", *chosen)
        said = result.stdout + result.stderr
        if not result.ok:
            raise CommandError(f"{name} failed:\n{said}", where=host or "every host", exit_code=result.exit_code)
        return read_results(said)

    def bootstrap(self, host: str | None = None) -> Deployed:
        """From nothing to verified and locked down; CommandError."""
        return self.deploy("bootstrap", host)

    def verify(self, host: str) -> tuple[Finding, ...]:
        """Run the shipped suite against ``host``; VerifyError when it is not there. What failed is in the findings."""
        tools = workflow.tools_for(self.project)
        return tuple(verify_host.verify(self.project, host, runner=tools.runner, cloud=tools.cloud).findings)

    def journal(self) -> list[dict[str, Any]]:
        """Every API request so far: ts, method, path, query, body, status, userAgent, requestId, mutates."""
        return control.requests(self.layout)

    def guest(self, host: str, *argv: str, timeout_s: float = 120.0) -> Result:
        """Run ``argv`` in the machine as root, past its network and firewalls; LabError when it is off."""
        command = Command(control.guest_argv(self.layout, host, argv), f"run {argv[0]} in {host}", timeout_s=timeout_s)
        return LocalRunner(self._shell).run(command)

    def reach(self, vantage: str, host: str, family: int, *, port: int = SSH_PORT) -> Reach:
        """Whether TCP ``port`` of ``host`` opens from that vantage point (operator, stranger, member, …) over IPv4 or
        IPv6, by a real connection: yes, no, or unknown when it could not be seen. LabError for names that are none."""
        points = {point.name: point for point in self.project.vantages}
        if vantage not in points:
            raise LabError(f"there is no vantage point {vantage!r}", fix=f"there are: {', '.join(points)}")
        server = control.find_server(self.layout, host)
        measured = measure_exposure(
            [points[vantage]],
            server.public_addresses,
            server.tailnet_addresses,
            runner=LocalRunner(self._shell),
            port=port,
        )
        return next((cell.reach for cell in measured.cells if cell.family == family), "unknown")

    def declare(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the fleet file: ``change`` gets its content and alters it in place; FleetError when that is no fleet."""
        file = self.layout.fleet_file
        document = json.loads(file.read_text(encoding="utf-8"))
        change(document)
        text = json.dumps(document, indent=2) + "\n"
        parse_fleet(text, where=str(file))
        file.write_text(text, encoding="utf-8")

    def _take_down(self) -> None:
        try:
            if self._root is not None and self._root.exists():
                control.down(self.layout, self._shell)
        finally:
            self._root = None
            if self._temporary is not None:
                self._temporary.cleanup()
                self._temporary = None


def _unless_there(path: Path, text: str) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
