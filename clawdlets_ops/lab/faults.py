"""Bad days on order: what a fault is, how it is written, the list of those in force, and those of the API itself.

``parse_fault`` says how a fault is written. ``inject``, ``faults`` and ``clear`` ask the lab that runs; its list is in
memory alone, so that a lab that was started anew has no faults. Links and machines are in ``distance.py`` and
``mishaps.py``.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from clawdlets_ops.errors import LabError
from clawdlets_ops.lab.api import API_PREFIX, Answer, Emulator, Request
from clawdlets_ops.lab.backend import BackendError
from clawdlets_ops.lab.client import USER_AGENT, LabClient
from clawdlets_ops.lab.registry import read_record
from clawdlets_ops.layout import Layout

ROUTE: Final = "/lab/faults"
ANY: Final = "*"
VANTAGES: Final = ("operator", "stranger", "operator-tailnet", "member")

# The status and the error code of docs.hetzner.cloud, "Errors"; by what one writes.
ANSWERS: Final[Mapping[str, tuple[int, str]]] = {
    "500": (500, "server_error"),
    "502": (502, "bad_gateway"),
    "503": (503, "unavailable"),
    "504": (504, "timeout"),
    "429": (429, "rate_limit_exceeded"),
    "rate_limit_exceeded": (429, "rate_limit_exceeded"),
    "locked": (423, "locked"),
    "resource_unavailable": (412, "resource_unavailable"),
    "conflict": (409, "conflict"),
    "token_readonly": (403, "token_readonly"),
}
# The action's name to the backend's method that does its work.
ACTIONS: Final = (
    "create_server",
    "start_server",
    "stop_server",
    "shutdown_server",
    "reboot_server",
    "reset_server",
    "rebuild_server",
    "delete_server",
    "set_firewall_rules",
)

NO_CLOCK_SKEW: Final = (
    "a guest's clock cannot be moved: Linux has time namespaces for the monotonic clocks only, so the guest shares its"
    " wall clock with this machine; the API's clock can: clock-skew api seconds=S"
)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong. What a kind does not use is empty; see ``parse_fault``.

    subject is the answer, the action's name or the host (``*``: every host). path is a pattern without ``/v1``. times is
    how many requests or actions it hits, None: until it is cleared.
    """

    kind: str
    subject: str = ""
    method: str = ANY
    path: str = ANY
    times: int | None = None
    seconds: float = 0.0
    milliseconds: float = 0.0
    percent: float = 0.0
    vantage: str = ANY

    @property
    def words(self) -> tuple[str, ...]:
        """What ``parse_fault`` makes this fault of."""
        shape = SHAPES[self.kind]
        said = [self.kind]
        said += [self.subject] if shape.subject else []
        said += [self.method, self.path] if shape.requests else []
        said += [f"{name}={getattr(self, name):g}" for name in shape.amounts]
        said += [f"times={self.times}"] if self.times is not None else []
        said += [f"from={self.vantage}"] if self.vantage != ANY else []
        return tuple(said)

    def concerns(self, host: str) -> bool:
        """Whether it is about this host; only for a kind whose subject is one."""
        return self.subject in (ANY, host)


@dataclass(frozen=True)
class Shape:
    """How a kind of fault is written. ``amounts`` have to be given, with the largest that makes sense."""

    usage: str
    means: str
    subject: str = ""  # what the first word after the kind is
    requests: bool = False
    amounts: Mapping[str, float] = field(default_factory=dict)
    signed: bool = False
    options: tuple[str, ...] = ()


_DAY_S: Final = 86_400.0
SHAPES: Final[Mapping[str, Shape]] = {
    "answer": Shape(
        "answer CODE [METHOD [PATH]] [times=N]",
        "the API refuses, and does nothing; CODE is one of " + ", ".join(ANSWERS),
        subject="code",
        requests=True,
        options=("times",),
    ),
    "cut": Shape(
        "cut [METHOD [PATH]] [times=N]",
        "the connection ends without an answer; nothing was done",
        requests=True,
        options=("times",),
    ),
    "lost-answer": Shape(
        "lost-answer [METHOD [PATH]] [times=N]",
        "the API does what it was asked to, and the connection ends before the answer",
        requests=True,
        options=("times",),
    ),
    "timeout": Shape(
        "timeout [METHOD [PATH]] seconds=S [times=N]",
        "no answer for S seconds, then the connection ends; nothing was done",
        requests=True,
        amounts={"seconds": _DAY_S},
        options=("times",),
    ),
    "slow": Shape(
        "slow [METHOD [PATH]] seconds=S [times=N]",
        "the API waits S seconds, and then does as it was asked to",
        requests=True,
        amounts={"seconds": _DAY_S},
        options=("times",),
    ),
    "action": Shape(
        "action COMMAND [times=N]",
        "the action ends in error, its work undone; COMMAND is one of " + ", ".join(ACTIONS),
        subject="action",
        options=("times",),
    ),
    "latency": Shape(
        "latency HOST milliseconds=MS [from=VANTAGE]",
        "every round trip takes MS milliseconds longer",
        subject="host",
        amounts={"milliseconds": 60_000.0},
        options=("from",),
    ),
    "loss": Shape(
        "loss HOST percent=P [from=VANTAGE]",
        "P % of the packets are lost, in each direction",
        subject="host",
        amounts={"percent": 100.0},
        options=("from",),
    ),
    "never-boots": Shape("never-boots HOST", "it is said to be running, and nothing ever answers", subject="host"),
    "firewall-pending": Shape(
        "firewall-pending HOST",
        "what its firewall is to become stays pending, and the action runs, until the fault is cleared",
        subject="host",
    ),
    "sshd-late": Shape(
        "sshd-late HOST seconds=S",
        "port 22 is closed for S seconds after each boot",
        subject="host",
        amounts={"seconds": _DAY_S},
    ),
    "disk-full": Shape("disk-full HOST", "no space left on device, until it reboots", subject="host"),
    "clock-skew": Shape(
        "clock-skew api seconds=S",
        "the API's clock is S seconds ahead (below 0: behind): Date, created, started, finished, RateLimit-Reset",
        subject="clock",
        amounts={"seconds": 366 * _DAY_S},
        signed=True,
    ),
    "scan": Shape("scan HOST", "the stranger tries every TCP port once, over IPv4 and IPv6", subject="host"),
}


@dataclass(frozen=True)
class Injected:
    """A fault in the lab. ``hits`` counts requests and actions; ``state`` is armed, spent (times is used up) or, in
    words, what a fault that is done once has come to."""

    id: str
    words: tuple[str, ...]
    hits: int = 0
    state: str = "armed"
    last_hit: str = ""

    def __str__(self) -> str:
        hits = f"; {self.hits} met, the last {self.last_hit}" if self.hits else ""
        return f"{self.id}  {' '.join(self.words)}  ({self.state}{hits})"

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Injected:
        return cls(raw["id"], tuple(raw["words"]), raw["hits"], raw["state"], raw["lastHit"])

    def to_json(self) -> dict[str, object]:
        content = asdict(self)
        return {**content, "words": list(self.words), "lastHit": content.pop("last_hit")}


def parse_fault(words: Sequence[str]) -> Fault:
    """The fault that these words say; LabError with the right form. ``SHAPES`` lists the kinds."""
    kind = words[0] if words else ""
    if kind not in SHAPES:
        known = "; ".join(shape.usage for shape in SHAPES.values())
        raise LabError("there is no such fault" if kind else "which fault?", where=repr(kind), fix=f"one of: {known}")
    shape = SHAPES[kind]
    plain = [word for word in words[1:] if "=" not in word]
    given = [word.partition("=")[::2] for word in words[1:] if "=" in word]
    options = dict(given)
    if unknown := [name for name in options if name not in (*shape.amounts, *shape.options)]:
        raise _refused(shape, f"does not take {unknown[0]}=")
    if len(given) != len(options):
        raise _refused(shape, "is told the same thing twice")
    subject = plain.pop(0) if shape.subject and plain else ""
    _check_subject(shape, subject)
    if len(plain) > (2 if shape.requests else 0):
        raise _refused(shape, f"does not take the word {plain[-1]!r}")
    method, path = (*(plain[:2]), ANY, ANY)[:2] if len(plain) != 1 else (plain[0], ANY)
    if shape.requests and not re.fullmatch(r"\*|GET|POST|PUT|DELETE", method):
        raise _refused(shape, f"{method!r} is no method of this API (GET, POST, PUT, DELETE or *)")
    if path != ANY and not path.startswith(("/", ANY)):
        raise _refused(shape, f"a path begins with /, unlike {path!r}")
    vantage = options.get("from", ANY)
    if vantage != ANY and vantage not in VANTAGES:
        raise _refused(shape, f"{vantage!r} is no vantage point ({', '.join(VANTAGES)})")
    amounts = {name: _amount(shape, name, options.get(name), most) for name, most in shape.amounts.items()}
    times = _times(shape, options["times"]) if "times" in options else None
    return Fault(kind, subject, method, path.removeprefix(API_PREFIX), times, vantage=vantage, **amounts)


def _check_subject(shape: Shape, subject: str) -> None:
    if not shape.subject:
        return
    if not subject:
        raise _refused(shape, f"needs a {shape.subject}")
    if shape.subject == "clock" and subject != "api":
        raise LabError(NO_CLOCK_SKEW, where="clock-skew")
    wanted: Mapping[str, Sequence[str]] = {"code": tuple(ANSWERS), "action": ACTIONS}
    if shape.subject in wanted and subject not in wanted[shape.subject]:
        raise _refused(shape, f"{subject!r} is none of {', '.join(wanted[shape.subject])}")
    if shape.subject == "host" and not re.fullmatch(r"\*|[a-z0-9]([a-z0-9.-]*[a-z0-9])?", subject):
        raise _refused(shape, f"{subject!r} cannot be a host's name")


def _amount(shape: Shape, name: str, text: str | None, most: float) -> float:
    if text is None:
        raise _refused(shape, f"needs {name}=")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < (abs(value) if shape.signed else value) <= most:
        raise _refused(shape, f"{name}={text} is not above 0 and at most {most:g}")
    return value


def _times(shape: Shape, text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise _refused(shape, f"times={text} is no number from 1 to 999999")
    return int(text)


def _refused(shape: Shape, what: str) -> LabError:
    return LabError(what, where=shape.usage.split()[0], fix=f"write: {shape.usage}")


class _Entry:
    def __init__(self, ident: str, fault: Fault) -> None:
        self.ident, self.fault = ident, fault
        self.hits, self.state, self.last_hit = 0, "armed", ""
        self.gone = threading.Event()

    @property
    def label(self) -> str:
        """What the request journal calls it."""
        return f"{self.ident}: {' '.join(self.fault.words)}"

    def view(self) -> Injected:
        return Injected(self.ident, self.fault.words, self.hits, self.state, self.last_hit)


class FaultBook:
    """The faults of one lab; may be used from any thread.

    ``on_add`` and ``on_clear`` make a fault of links or machines happen and stop (any exception of theirs leaves it out
    of, or in, the list).
    """

    def __init__(
        self,
        *,
        on_add: Callable[[str, Fault], None] = lambda _id, _fault: None,
        on_clear: Callable[[str, Fault], None] = lambda _id, _fault: None,
    ) -> None:
        self._on_add = on_add
        self._on_clear = on_clear
        self._lock = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._count = 0
        self._failed: dict[str, str] = {}
        self._thread = threading.local()

    def add(self, fault: Fault) -> Injected:
        with self._lock:
            self._count += 1
            entry = _Entry(f"f{self._count}", fault)
            self._entries[entry.ident] = entry
            try:
                self._on_add(entry.ident, fault)
            except BaseException:
                del self._entries[entry.ident]
                raise
            self._thread.met = [entry.label]
            return entry.view()

    def all(self) -> tuple[Injected, ...]:
        with self._lock:
            return tuple(entry.view() for entry in self._entries.values())

    def clear(self, ident: str | None) -> int:
        """Take one away, or all; how many there were. LabError for an id that is none."""
        with self._lock:
            if ident is not None and ident not in self._entries:
                known = ", ".join(self._entries) or "none"
                raise LabError("there is no such fault", where=ident, fix=f"in force: {known}")
            chosen = [entry for entry in self._entries.values() if ident in (None, entry.ident)]
            for entry in chosen:
                self._on_clear(entry.ident, entry.fault)
                entry.gone.set()
                del self._entries[entry.ident]
            self._thread.met = [entry.label for entry in chosen]
            return len(chosen)

    def of_kind(self, *kinds: str) -> list[tuple[str, Fault]]:
        with self._lock:
            return [(ident, entry.fault) for ident, entry in self._entries.items() if entry.fault.kind in kinds]

    def note(self, ident: str, state: str) -> None:
        """Say what has become of a fault, if it is still in the list."""
        with self._lock:
            if ident in self._entries:
                self._entries[ident].state = state

    # The API

    def answer(self, request: Request) -> Answer | None:
        """What the emulator's hook gets: the faulted answer, or None after whatever wait is due."""
        if request.headers.get("user-agent") == USER_AGENT:
            return None
        path = request.target.partition("?")[0].removeprefix(API_PREFIX)

        def hit(fault: Fault) -> bool:
            return (
                SHAPES[fault.kind].requests
                and fault.method in (ANY, request.method)
                and fnmatch.fnmatchcase(path, fault.path)
            )

        entry = self._hit(hit, f"{request.method} {path}")
        if entry is None:
            return None
        self._thread.met = [entry.label]
        match entry.fault.kind:
            case "answer":
                status, code = ANSWERS[entry.fault.subject]
                error = {"code": code, "message": f"{code.replace('_', ' ')} (fault {entry.ident})", "details": {}}
                return Answer(status, {"error": error}, "")
            case "slow":
                entry.gone.wait(entry.fault.seconds)
                return None
            case "timeout":
                entry.gone.wait(entry.fault.seconds)
        self._thread.cut = True
        return None if entry.fault.kind == "lost-answer" else Answer(0, None, "")

    def take_cut(self) -> bool:
        """Whether the connection of the request that this thread has just answered is to be cut."""
        cut: bool = getattr(self._thread, "cut", False)
        self._thread.cut = False
        return cut

    def take_met(self, payload: object) -> str:
        """The faults that the request which this thread answers has met, put in or taken away, or whose failed action the
        answer tells of; "" for none."""
        met: list[str] = getattr(self._thread, "met", [])
        self._thread.met = []
        if not met and self._failed:
            said = json.dumps(payload)
            met = [label for ident, label in self._failed.items() if f"(fault {ident})" in said]
        return "; ".join(met)

    def now(self) -> datetime:
        """What the cloud's clock shows."""
        return datetime.now(UTC) + self.skew

    @property
    def skew(self) -> timedelta:
        """How far the cloud's clock is ahead."""
        return timedelta(seconds=sum(fault.seconds for _, fault in self.of_kind("clock-skew")))

    # Actions

    def act(self, command: str) -> None:
        """Raise BackendError when the work of this action is to fail."""
        entry = self._hit(lambda fault: fault.kind == "action" and fault.subject == command, command)
        if entry is not None:
            self._failed[entry.ident] = entry.label
            raise BackendError("action_failed", f"{command} failed (fault {entry.ident})")

    def hold(self, kind: str, host: str) -> None:
        """Return once no fault of this kind is about the host any more."""
        while entry := self._hit(lambda fault: fault.kind == kind and fault.concerns(host), f"{kind} of {host}"):
            entry.gone.wait()

    def _hit(self, wanted: Callable[[Fault], bool], what: str) -> _Entry | None:
        """The first armed fault that is wanted, counted."""
        with self._lock:
            for entry in self._entries.values():
                if entry.state == "armed" and wanted(entry.fault):
                    entry.hits, entry.last_hit = entry.hits + 1, what
                    if entry.fault.times is not None and entry.hits >= entry.fault.times:
                        entry.state = "spent"
                    return entry
        return None


class FaultyEmulator(Emulator):
    """The emulator with a book of faults; the journal has status 0 for a request that was never answered, and ``fault``
    ("f1: answer 500 POST /servers") for one that met a fault, or put one in or took it away, and for an answer that tells
    of an action that failed by one. Its ``ts`` is the true time, whatever the cloud's clock shows.
    """

    def __init__(self, *arguments: Any, book: FaultBook, **more: Any) -> None:
        super().__init__(*arguments, faults=book.answer, **more)
        self._book = book

    def handle(self, request: Request) -> Answer:
        """As the emulator's; ConnectionAbortedError, on which the server ends the connection without a word."""
        answer = super().handle(request)
        if self._book.take_cut():
            raise ConnectionAbortedError("a fault cuts this connection")
        if answer.rate is not None and (skew_s := round(self._book.skew.total_seconds())):
            answer = replace(answer, rate=replace(answer.rate, reset=answer.rate.reset + skew_s))
        return answer

    def remarks(self, payload: object) -> dict[str, Any]:
        """``fault``, and ``ts`` while the cloud's clock is wrong."""
        met = self._book.take_met(payload)
        said = {"fault": met} if met else {}
        return {**said, "ts": datetime.now(UTC).isoformat()} if self._book.skew else said


# Asking the lab that runs


def inject(layout: Layout, fault: Fault) -> Injected:
    """Put a fault into the lab of this checkout; LabError when there is none, or when it refuses."""
    return Injected.from_json(_client(layout).send("POST", ROUTE, {"words": list(fault.words)}))


def faults(layout: Layout) -> tuple[Injected, ...]:
    """The faults of the lab of this checkout, the oldest first; LabError when there is no lab."""
    return tuple(Injected.from_json(raw) for raw in _client(layout).get(ROUTE)["faults"])


def clear(layout: Layout, ident: str | None = None) -> int:
    """Take one fault (or all) out of the lab of this checkout; how many that were. LabError."""
    cleared = _client(layout).send("DELETE", ROUTE, {} if ident is None else {"id": ident})["cleared"]
    return int(cleared)


def _client(layout: Layout) -> LabClient:
    record = read_record(layout.lab)
    if record is None:
        raise LabError("there is no lab", where=str(layout.lab), fix="clawdlets lab up")
    return LabClient(record)
