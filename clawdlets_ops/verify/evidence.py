"""Gathers what the suite judges: the host's facts in one login and one exec, port 22 from outside, refused logins."""

from __future__ import annotations

import hashlib
import re
import secrets
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import testinfra

from clawdlets_ops.errors import ClawdletsError, CommandError, CommandTimeout
from clawdlets_ops.files import write_atomic
from clawdlets_ops.process import Command, LocalRunner, Runner
from clawdlets_ops.vantage import Vantage
from clawdlets_ops.verify.exposure import Sight, measure_hosts, probe_from
from clawdlets_ops.verify.ssh_config import CONTROL_PATH_MAX_BYTES, known_hosts, ssh_config
from clawdlets_ops.verify.suite.reading import parse_frames

ATTEMPT_TIMEOUT_S = 30.0
FACTS_TIMEOUT_S = 180.0
FACTS_LIMIT_BYTES = 8 * 1024 * 1024
SSH_FAILED = 255
CLOSE_TIMEOUT_S = 10.0
SHORT_FOLDER = "/tmp"  # noqa: S108 - a private folder is made in it

# What a client offers; the first never sends anything, the second would send a password if it were asked for one.
METHODS = {
    "none": ("PreferredAuthentications=none", "PubkeyAuthentication=no"),
    "password": ("PreferredAuthentications=password,keyboard-interactive", "PubkeyAuthentication=no"),
    "publickey": ("PreferredAuthentications=publickey",),
}


T = TypeVar("T")


class Once(Generic[T]):
    """A value that is made when it is first asked for, by whoever comes first; the others wait for it."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: list[T] = []

    def __call__(self) -> T:
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


def look_at(expectations: Sequence[Mapping[str, Any]], *, runner: Runner) -> dict[str, list[dict[str, Any]]]:
    """The cells of each host, where all of ``expectations`` have the same vantages: these look at all hosts in one go."""
    sights = {}
    for expected in expectations:
        addresses = {
            network: {int(family): address for family, address in found.items()}
            for network, found in expected["addresses"].items()
        }
        sights[expected["host"]] = Sight(
            addresses["public"],
            addresses["tailnet"],
            expected["ssh"]["port"],
            tuple(expected.get("closedPorts", ())),
        )
    measured = measure_hosts([vantage_of(entry) for entry in expectations[0]["vantages"]], sights, runner=runner)
    return {host: one.as_json()["cells"] for host, one in measured.items()}


class HostEvidence:
    """The evidence on one host. Everything is looked at once, when it is first asked for; ``close`` ends the connection."""

    def __init__(
        self,
        expected: Mapping[str, Any],
        *,
        runner: LocalRunner,
        nonce: Callable[[], str] = lambda: secrets.token_hex(16),
        look: Callable[[], list[dict[str, Any]]] | None = None,
    ) -> None:
        self.expected = expected
        self.raw_facts = ""
        self._runner = runner
        self._nonce = nonce
        self._look = look or (lambda: look_at([expected], runner=runner)[expected["host"]])
        self._lock = threading.RLock()  # who asks while somebody else is looking waits for what is seen
        self._looking = threading.RLock()
        self._trying = threading.Lock()
        self._answering = threading.Event()
        self._folder = tempfile.TemporaryDirectory(prefix="clv-", dir=_short_folder())
        self._facts: dict[str, Any] | None = None
        self._exposure: list[dict[str, Any]] | None = None
        self._attempts: dict[tuple[str, str], Once[dict[str, Any]]] = {}
        folder = Path(self._folder.name)
        self._config = folder / "ssh_config"
        write_atomic(folder / "known_hosts", known_hosts(expected))
        write_atomic(self._config, ssh_config(expected, folder))
        # controlpersist=0: the connection is shared as our configuration says, not as testinfra's own options would.
        self.host = testinfra.get_host(f"ssh://{expected['host']}", ssh_config=str(self._config), controlpersist=0)

    def close(self) -> None:
        """End the shared connection and remove its files."""
        try:
            if (Path(self._folder.name) / "s").exists():
                self._runner.run(
                    Command(
                        ["ssh", "-F", self._config, "-O", "exit", self.expected["host"]],
                        "end the shared connection",
                        timeout_s=CLOSE_TIMEOUT_S,
                    )
                )
        finally:
            self._folder.cleanup()

    @property
    def facts(self) -> dict[str, Any]:
        """See ``suite.reading`` for the shape; ``problem`` says why there are none."""
        with self._lock:
            if self._facts is None:
                try:
                    self._facts = self._fetch()
                finally:
                    self._answering.set()
            return self._facts

    def wait_for_answer(self) -> None:
        """Return once the host has begun to answer, or will not: its session is there, whoever is refused after it."""
        self._answering.wait()

    @property
    def facts_sha256(self) -> str:
        """The digest of what the host said, or nothing when it said nothing."""
        return hashlib.sha256(self.raw_facts.encode()).hexdigest() if self.raw_facts else ""

    @property
    def exposure(self) -> list[dict[str, Any]]:
        """Port 22 and some other ports from every vantage; the shape of ``Exposure.as_json()["cells"]``."""
        with self._looking:
            if self._exposure is None:
                self._exposure = self._look()
            return self._exposure

    @property
    def measured(self) -> bool:
        """Whether port 22 has been looked at."""
        return self._exposure is not None

    def probe(self, vantage: str, address: str, port: int) -> dict[str, Any]:
        """One TCP probe from a vantage: ``{family, address, port, outcome, banner, detail}``; ClawdletsError."""
        entry = next((one for one in self.expected["vantages"] if one["name"] == vantage), None)
        if entry is None:
            raise ClawdletsError(f"there is no vantage {vantage!r}", where=self.expected["host"])
        return probe_from(vantage_of(entry), [(6 if ":" in address else 4, address, port)], runner=self._runner)[0]

    def attempt(self, user: str, method: str) -> dict[str, Any]:
        """A login that should be refused, over a fresh connection, once: ``{result: admitted | denied | failed, methods:
        [str] | None, presented: fingerprint | None, why}``."""
        with self._trying:
            once = self._attempts.setdefault((user, method), Once(lambda: self._attempt(user, method)))
        return once()

    @property
    def attempts(self) -> dict[str, dict[str, Any]]:
        """Every attempt so far, by ``user method``."""
        return {f"{user} {method}": once() for (user, method), once in sorted(self._attempts.items())}

    def _attempt(self, user: str, method: str) -> dict[str, Any]:
        options = (
            "ControlMaster=no",
            "ControlPath=none",
            f"User={user}",
            "NumberOfPasswordPrompts=0",
            *METHODS[method],
        )
        words = [word for option in options for word in ("-o", option)]
        command = Command(
            ["ssh", "-v", "-F", self._config, *words, self.expected["host"], "true"],
            f"try to log in as {user} with {method}",
            timeout_s=ATTEMPT_TIMEOUT_S,
        )
        try:
            said = self._runner.run(command).stderr
        except ClawdletsError as error:
            return {"result": "failed", "methods": None, "presented": None, "why": error.what.splitlines()[0]}
        return read_attempt(said)

    def _fetch(self) -> dict[str, Any]:
        ssh = self.expected["ssh"]
        facts: dict[str, Any] = {"problem": None, "network": ssh["network"], "address": ssh["address"], "sections": {}}
        nonce = self._nonce()
        words = ["ssh", "-F", self._config, self.expected["host"]]
        command = Command(
            [*words, f"sudo -n {shlex.quote(self.expected['factsProgram'])} {nonce}"],
            "ask the host",
            timeout_s=FACTS_TIMEOUT_S,
        )
        began = time.time()
        try:
            with self._runner.stream(command) as output:
                said = output.read(1)
                self._answering.set()
                said += output.read(FACTS_LIMIT_BYTES)
        except CommandTimeout:
            return {**facts, "problem": f"the host did not end its answer within {FACTS_TIMEOUT_S:g} s"}
        except CommandError as error:
            last = _last_line(error.what)
            if error.exit_code == SSH_FAILED:
                return {**facts, "problem": f"no session with {ssh['address']}: {last}"}
            return {**facts, "problem": f"clawdlets-facts ended with status {error.exit_code} ({last})"}
        except ClawdletsError as error:
            return {**facts, "problem": error.what.splitlines()[0]}
        if len(said) > FACTS_LIMIT_BYTES:
            return {
                **facts,
                "problem": f"the host's answer is longer than {FACTS_LIMIT_BYTES} bytes: none of it is read",
            }
        text = said.decode("utf-8", errors="replace")
        self.raw_facts = text
        return {
            **facts,
            "asked": {"from": began, "to": time.time()},
            "sections": parse_frames(text, nonce),
        }


def vantage_of(entry: Mapping[str, Any]) -> Vantage:
    """A vantage as the expectation holds it."""
    return Vantage(
        name=entry["name"],
        side=entry["side"],
        via=tuple(entry["via"]),
        controls={int(family): (target[0], int(target[1])) for family, target in entry["controls"].items()},
        bash=bool(entry.get("bash", False)),
    )


def read_attempt(said: str) -> dict[str, Any]:
    """What ``ssh -v`` said of a login attempt. Pure; the words are those of OpenSSH 8 to 10."""
    offered = re.findall(r"^debug1: Authentications that can continue: (\S+)", said, re.MULTILINE)
    presented = re.search(r"^debug1: Server host key: \S+ (SHA256:\S+)", said, re.MULTILINE)
    if re.search(r"^(debug1: Authentication succeeded|Authenticated to )", said, re.MULTILINE):
        result = "admitted"
    elif re.search(r"Permission denied \(", said):
        result = "denied"
    else:
        result = "failed"
    return {
        "result": result,
        "methods": sorted(set(offered[-1].split(","))) if offered else None,
        "presented": presented[1] if presented else None,
        "why": _last_line("\n".join(line for line in said.splitlines() if not line.startswith("debug"))),
    }


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no reason was given"


def _short_folder() -> str:
    """Where temporary folders are made, unless that name is too long for a socket in it."""
    usual = tempfile.gettempdir()
    return usual if len(usual.encode()) + len("/clv-xxxxxxxx/s") <= CONTROL_PATH_MAX_BYTES else SHORT_FOLDER
