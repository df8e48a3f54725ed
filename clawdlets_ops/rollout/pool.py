"""Hosts through all stages, some at a time. A failing host stops no other; a signal ends all of them in order."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from clawdlets_ops import workflow
from clawdlets_ops.errors import ClawdletsError, CloudError
from clawdlets_ops.files import no_room
from clawdlets_ops.hetzner import Budget
from clawdlets_ops.project import Project

log = logging.getLogger(__name__)

RESERVE: Final = 100
"""Requests of the hourly budget (3600) that are left to others: below it no change is begun."""
STAGE_COST: Final = 25
"""Requests that a stage may make, OpenTofu's among them: as much is set aside for each one that is at work."""
STOP_GRACE_S: Final = 15.0


class State(StrEnum):
    """How a host came out of a run."""

    CHANGED = "changed"
    UNCHANGED = "unchanged"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    NOT_BEGUN = "not begun"


@dataclass(frozen=True)
class HostEnd:
    """How a host came out: the last stage it was in, and in ``text`` the error, or what the last stage said."""

    host: str
    state: State
    stage: str = ""
    text: str = ""
    duration_s: float = 0.0
    outcomes: tuple[workflow.Outcome, ...] = ()

    @property
    def ok(self) -> bool:
        """As declared, and verified."""
        return self.state in (State.CHANGED, State.UNCHANGED)


Flow = Callable[[str], Iterator[workflow.Outcome]]


def bootstrap(
    project: Project,
    hosts: Sequence[str],
    *,
    tools: workflow.Tools,
    snapshot: workflow.Snapshot,
    stop: threading.Event,
    parallel: int,
    on_end: Callable[[HostEnd], None] = lambda _: None,
    until: str = workflow.STAGES[-1],
) -> tuple[HostEnd, ...]:
    """Every host through the stages to ``until``, ``parallel`` at a time; how each came out, in the order given. Nothing is
    raised for a host. ``stop`` has to be the one that ``tools`` was made with."""

    at_work = _Gauge()

    def flow(host: str) -> Iterator[workflow.Outcome]:
        if getattr(tools.cloud, "budget", None) is None:
            with suppress(ClawdletsError):  # what is wrong is said by the stage that needs an answer
                snapshot.look()  # which the stages look at anyway; the answer tells the budget

        def check(others: int) -> None:
            check_budget(getattr(tools.cloud, "budget", None), where=host, at_work=others)

        # What looks, or has nothing to do, goes on with few requests too: it costs a handful for all hosts.
        with at_work.turn(check) as begin:
            yield from workflow.bootstrap(project, host, tools, snapshot=snapshot, until=until, before_change=begin)

    tools.journal.say("", "run", "started", f"bootstrap {' '.join(hosts)}", hosts=list(hosts), parallel=parallel)
    started = time.monotonic()
    ends = run(flow, hosts, parallel=parallel, stop=stop, on_end=on_end)
    good = sum(end.ok for end in ends)
    tools.journal.say(
        "",
        "run",
        "done" if good == len(ends) else "failed",
        f"{good} of {len(ends)} hosts",
        durationS=round(time.monotonic() - started, 3),
    )
    return ends


def check_budget(budget: Budget | None, *, where: str, at_work: int = 0) -> None:
    """CloudError when so few requests are left that a stage might be cut off in its middle. ``at_work``: other hosts whose
    stages draw on the same budget."""
    if budget is None or budget.remaining >= min(RESERVE, budget.limit // 4) + at_work * STAGE_COST:
        return
    whole = datetime.fromtimestamp(budget.resets_at, UTC)
    raise CloudError(
        f"{budget.remaining} of the project's {budget.limit} API requests an hour are left"
        + (f", on which {at_work} other hosts draw" if at_work else "")
        + ": no change is begun with so few",
        where=where,
        fix=f"run again later (the budget is whole again at {whole:%H:%M} UTC), or with fewer hosts",
    )


def run(
    flow: Flow,
    hosts: Sequence[str],
    *,
    parallel: int,
    stop: threading.Event,
    on_end: Callable[[HostEnd], None] = lambda _: None,
    grace_s: float = STOP_GRACE_S,
) -> tuple[HostEnd, ...]:
    """Each host's flow to its end, ``parallel`` at a time.

    Once ``stop`` is set no host is begun, and those at work have ``grace_s`` to end: what a thread is in the middle of then
    is a read or a wait (programs have been ended by their runner), and it is left behind.
    """
    work = _Work(flow, deque(hosts), stop, on_end)
    threads = [
        threading.Thread(target=work.serve, name=f"host-{number}", daemon=True)
        for number in range(min(parallel, len(hosts)))
    ]
    for thread in threads:
        thread.start()
    deadline = None
    while any(thread.is_alive() for thread in threads):
        if stop.is_set() and deadline is None:
            deadline = time.monotonic() + grace_s
        if deadline is not None and time.monotonic() > deadline:
            break
        threads[0].join(timeout=0.1) if threads[0].is_alive() else time.sleep(0.02)
    return work.ends(hosts)


class _Gauge:
    """How many have begun to change something. Who is turned away by its own check was never counted by another's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    @contextmanager
    def turn(self, check: Callable[[int], None]) -> Iterator[Callable[[], None]]:
        """What to call before each change: one more is inside, unless ``check`` of how many others are raises."""
        inside = False

        def begin() -> None:
            nonlocal inside
            with self._lock:
                check(self._inside - inside)
                self._inside += not inside
                inside = True

        try:
            yield begin
        finally:
            with self._lock:
                self._inside -= inside


@dataclass
class _Work:
    flow: Flow
    waiting: deque[str]
    stop: threading.Event
    on_end: Callable[[HostEnd], None]
    done: dict[str, HostEnd] = field(default_factory=dict)
    begun: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False

    def serve(self) -> None:
        while True:
            with self.lock:
                if not self.waiting or self.stop.is_set():
                    return
                host = self.waiting.popleft()
                self.begun[host] = time.monotonic()
            end = self._one(host)
            with self.lock:
                if self.closed:
                    return
                self.done[host] = end
            self.on_end(end)

    def ends(self, hosts: Sequence[str]) -> tuple[HostEnd, ...]:
        """As it stands; what comes later is not heard any more."""
        with self.lock:
            self.closed = True
            now = time.monotonic()
            for host in hosts:
                if host in self.begun:
                    missing = HostEnd(host, State.INTERRUPTED, duration_s=round(now - self.begun[host], 3))
                else:
                    missing = HostEnd(host, State.NOT_BEGUN)
                self.done.setdefault(host, missing)
            return tuple(self.done[host] for host in hosts)

    def _one(self, host: str) -> HostEnd:
        outcomes: list[workflow.Outcome] = []

        def end(state: State, text: str) -> HostEnd:
            took = round(time.monotonic() - self.begun[host], 3)
            done = [outcome.stage for outcome in outcomes]
            reached = (
                done[-1] if state in (State.CHANGED, State.UNCHANGED) and done else _after(done[-1] if done else "")
            )
            return HostEnd(host, state, reached, text, took, tuple(outcomes))

        try:
            for outcome in self.flow(host):
                outcomes.append(outcome)
                if self.stop.is_set():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            return end(State.INTERRUPTED, "")
        except ClawdletsError as error:
            return end(State.FAILED, str(error))
        except Exception as error:
            if isinstance(error, OSError) and (told := no_room(error, where=host)):
                return end(State.FAILED, str(told))
            # A fault of ours must not take the other hosts with it; the log has the traceback.
            log.exception("%s", host)
            return end(State.FAILED, f"{type(error).__name__}: {error}")
        changed = any(outcome.changed for outcome in outcomes)
        return end(State.CHANGED if changed else State.UNCHANGED, outcomes[-1].text if outcomes else "")


def _after(stage: str) -> str:
    """The stage that comes after ``stage``; the first one after none."""
    following = (*workflow.STAGES, workflow.STAGES[-1])
    return following[following.index(stage) + 1] if stage else following[0]


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set ``stop`` inside; a second one is as it was before. Only in the main thread."""
    before: dict[int, Any] = {}

    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for handled, old in before.items():
            signal.signal(handled, old)
