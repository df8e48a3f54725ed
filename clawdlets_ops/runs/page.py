"""A run as a page: a timeline of hosts and stages that needs nothing else, neither a script nor a network.

What hosts and programs said is in it, so all text is escaped, and a policy in the page forbids everything but its own style.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clawdlets_ops import pages
from clawdlets_ops.files import write_atomic
from clawdlets_ops.journal import EVENTS, read_journal
from clawdlets_ops.runs.record import OPEN, Run, read_run, worst

PAGE: Final = "report.html"
WORDS: Final = {"done": "done", "unchanged": "nothing to do", "failed": "failed", OPEN: "unfinished"}
WIDTH: Final = 1000.0
_ROW: Final = 26
_MIN_WIDTH: Final = 3.0
_TICKS: Final = 8
_NICE_S: Final = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)


@dataclass(frozen=True)
class Bar:
    """A stage in the timeline, in the drawing's units."""

    x: float
    width: float
    y: int
    state: str
    stage: str
    title: str


def write_page(run: Run) -> str:
    """Write ``report.html`` into the run's folder (0600); its path, or "" for a run that has no folder."""
    if not (run.path / EVENTS).is_file():
        return ""
    path = run.path / PAGE
    write_atomic(path, render(run))
    return str(path)


def refresh(folder: Path) -> None:
    """Write the page of the run in ``folder`` unless it is as new as the run's events, or these tell of no host."""
    events, page = folder / EVENTS, folder / PAGE
    if not events.is_file() or (page.is_file() and page.stat().st_mtime_ns > events.stat().st_mtime_ns):
        return
    if (run := read_run(folder.name, folder, read_journal(events))) is not None:
        write_page(run)


def render(run: Run) -> str:
    """The page as text."""
    total_s = max(1.0, (run.last - run.started).total_seconds())
    return pages.render(
        "clawdlets_ops.runs",
        "page.html.j2",
        filters={"seconds": seconds},
        run=run,
        words=WORDS,
        hosts=[(host, worst(span.state for span in run.of(host)), host_seconds(run, host)) for host in run.hosts],
        bars=bars(run, total_s),
        ticks=[(WIDTH * at / total_s, seconds(float(at))) for at in ticks(total_s)],
        counts=counts(run),
        total=seconds(total_s),
        width=WIDTH,
        row=_ROW,
        height=_ROW * len(run.hosts),
    )


def bars(run: Run, total_s: float) -> list[Bar]:
    """Where each stage is in the timeline: each wide enough to be seen."""
    found = []
    for number, host in enumerate(run.hosts):
        for span in run.of(host):
            x = WIDTH * (span.started - run.started).total_seconds() / total_s
            ended = span.ended or run.last
            width = max(_MIN_WIDTH, WIDTH * (ended - span.started).total_seconds() / total_s)
            title = f"{host}: {span.stage}, {WORDS[span.state]}, {seconds(span.seconds)}"
            found.append(
                Bar(round(min(x, WIDTH - _MIN_WIDTH), 1), round(width, 1), number * _ROW, span.state, span.stage, title)
            )
    return found


def ticks(total_s: float) -> list[int]:
    """Round times, at most ``_TICKS`` of them."""
    step = next((step for step in _NICE_S if total_s / step <= _TICKS), _NICE_S[-1])
    return list(range(0, int(total_s) + 1, step))


def counts(run: Run) -> str:
    """``18 done, 2 failed``."""
    states = [worst(span.state for span in run.of(host)) for host in run.hosts]
    return ", ".join(
        f"{states.count(state)} {WORDS[state]}" for state in ("done", "unchanged", "failed", OPEN) if state in states
    )


def host_seconds(run: Run, host: str) -> str:
    """From a host's first event to its last."""
    spans = run.of(host)
    return seconds(
        (max(span.ended or run.last for span in spans) - min(span.started for span in spans)).total_seconds()
    )


def seconds(value: float | None) -> str:
    """For people: ``0.4 s``, ``12 s``, ``3 min 5 s``, ``1 h 2 min``."""
    if value is None:
        return "no end"
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
