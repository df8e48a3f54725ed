"""A run read back from its events: which host was in which stage when, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from clawdlets_ops.errors import SettingsError
from clawdlets_ops.journal import ENDS, EVENTS, journals, printable, read_journal

OPEN: Final = "unfinished"
ORDER: Final = ("payload", "provision", "install", "lockdown", "verify")
_WORST: Final = ("failed", OPEN, "done", "unchanged")


@dataclass(frozen=True)
class Span:
    """A stage on a host. ``state`` is done, unchanged, failed or unfinished; ``ended`` None for the last. ``steps`` are what
    it said, with the time; ``text`` is why it failed."""

    host: str
    stage: str
    state: str
    started: datetime
    ended: datetime | None
    text: str = ""
    steps: tuple[tuple[datetime, str], ...] = ()

    @property
    def seconds(self) -> float | None:
        """How long it took."""
        return (self.ended - self.started).total_seconds() if self.ended else None


@dataclass(frozen=True)
class Run:
    """A run. ``path`` is its folder, or its one file when version 0.1 made it."""

    id: str
    path: Path
    spans: tuple[Span, ...]
    started: datetime
    last: datetime

    @property
    def hosts(self) -> tuple[str, ...]:
        """In the order in which they were begun."""
        return tuple(dict.fromkeys(span.host for span in self.spans))

    @property
    def stages(self) -> tuple[str, ...]:
        """In the workflow's order; others behind, as they came."""
        met = dict.fromkeys(span.stage for span in self.spans)
        return (*(stage for stage in ORDER if stage in met), *(stage for stage in met if stage not in ORDER))

    @property
    def state(self) -> str:
        """The worst of its spans'; "unfinished": still at work, or killed."""
        return worst(span.state for span in self.spans)

    def of(self, host: str, stage: str | None = None) -> tuple[Span, ...]:
        """The spans of a host, all or of one stage."""
        return tuple(span for span in self.spans if span.host == host and stage in (None, span.stage))

    def as_json(self) -> dict[str, Any]:
        """For programs; times in ISO 8601."""
        return {
            "id": self.id,
            "state": self.state,
            "startedAt": self.started.isoformat(),
            "lastAt": self.last.isoformat(),
            "hosts": {
                host: {
                    "state": worst(span.state for span in self.of(host)),
                    "stages": [
                        {
                            "stage": span.stage,
                            "state": span.state,
                            "startedAt": span.started.isoformat(),
                            "endedAt": span.ended.isoformat() if span.ended else None,
                            "text": span.text,
                            "steps": [{"at": at.isoformat(), "text": text} for at, text in span.steps],
                        }
                        for span in self.of(host)
                    ],
                }
                for host in self.hosts
            },
        }


def worst(states: Iterable[str]) -> str:
    """The state that says most of several."""
    met = set(states)
    return next((state for state in _WORST if state in met), OPEN)


def list_runs(runs: Path) -> list[Run]:
    """All runs that can be read, the newest first."""
    return [run for path in reversed(journals(runs)) if (run := _read(path)) is not None]


def find_run(runs: Path, ident: str | None) -> Run:
    """The run whose id begins with ``ident``, or the newest; SettingsError when there is none or more than one."""
    files = [path for path in journals(runs) if ident is None or _id(path).startswith(ident)]
    if ident is None:
        files = files[-1:]
    if len(files) != 1:
        what = "there is no such run" if not files else "more than one run begins so"
        raise SettingsError(what, where=ident or str(runs), fix="clawdlets runs list")
    run = _read(files[0])
    if run is None:
        raise SettingsError("nothing that happened is in its events", where=str(files[0]))
    return run


def read_run(ident: str, path: Path, events: Sequence[Mapping[str, Any]]) -> Run | None:
    """The run that these events tell of; None when they tell of no host. What is no event is left out."""
    spans: list[Span] = []
    open_spans: dict[tuple[str, str], int] = {}
    times: list[datetime] = []
    for event in events:
        at = _time(event.get("ts"))
        host, stage, kind, text = (printable(str(event.get(key, ""))) for key in ("host", "stage", "event", "text"))
        if at is None or not stage or not kind:
            continue
        times.append(at)
        if not host:
            continue
        number = open_spans.get((host, stage))
        if kind == "started" or number is None:
            open_spans[host, stage] = number = len(spans)
            spans.append(Span(host, stage, OPEN, at, None))
        span = spans[number]
        if kind in ENDS:
            spans[number] = Span(host, stage, kind, span.started, at, text, span.steps)
            del open_spans[host, stage]
        elif kind == "step":
            spans[number] = Span(host, stage, OPEN, span.started, None, "", (*span.steps, (at, text)))
    if not spans:
        return None
    return Run(ident, path, tuple(spans), min(times), max(times))


def _read(file: Path) -> Run | None:
    try:
        events = read_journal(file)
    except OSError:  # pruned in this moment
        return None
    return read_run(_id(file), file.parent if file.name == EVENTS else file, events)


def _id(file: Path) -> str:
    return file.parent.name if file.name == EVENTS else file.stem


def _time(text: object) -> datetime | None:
    try:
        at = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return at if at.tzinfo else None
