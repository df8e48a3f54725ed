"""A run while it goes on: a row for each host on a terminal, a line for each event elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from clawdlets_ops.journal import printable
from clawdlets_ops.rollout.pool import HostEnd, State

REFRESH_HZ: Final = 4
STYLE: Final = {
    State.CHANGED: "green",
    State.UNCHANGED: "green",
    State.FAILED: "bold red",
    State.INTERRUPTED: "yellow",
    State.NOT_BEGUN: "dim",
}
_AT_WORK = "at work"


@dataclass
class _Row:
    state: str = "waiting"
    stage: str = ""
    line: str = ""
    started: float | None = None
    took_s: float = 0.0


@dataclass
class Progress:
    """Told of events by ``listen`` and of ends by ``end``, from any thread; ``shown`` is the block it is drawn in.

    On a terminal a table with a row a host is drawn anew; hosts that are done make room for those that are not when there
    are more than lines. Elsewhere every event is a line of its own.
    """

    hosts: Sequence[str]
    console: Console
    clock: Callable[[], float] = time.monotonic
    _rows: dict[str, _Row] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._rows = {host: _Row() for host in self.hosts}

    @property
    def shown(self) -> Any:
        """A context manager."""
        if not self.console.is_terminal:
            return nullcontext()
        return Live(
            get_renderable=self.table, console=self.console, refresh_per_second=REFRESH_HZ, redirect_stderr=False
        )

    def listen(self, host: str, stage: str, text: str) -> None:
        """An event of the journal."""
        if not host:
            return
        with self._lock:
            row = self._rows.setdefault(host, _Row())
            row.state, row.stage = _AT_WORK, stage
            row.line = text.partition("\n")[0].removeprefix("step: ")
            row.started = row.started or self.clock()
        if not self.console.is_terminal:
            self._print(f"{datetime.now():%H:%M:%S} {host}: {stage}: {text.removeprefix('step: ')}")

    def end(self, end: HostEnd) -> None:
        """A host is through."""
        with self._lock:
            row = self._rows.setdefault(end.host, _Row())
            row.state, row.stage, row.took_s = end.state, end.stage, end.duration_s
            row.line = end.text.partition("\n")[0]
        if not self.console.is_terminal:
            self._print(f"{datetime.now():%H:%M:%S} {end.host}: {end.state} ({end.duration_s:.1f} s)")

    def table(self) -> Group:
        """The rows, those at work first."""
        with self._lock:
            rows = [(host, row) for host, row in self._rows.items() if row.state == _AT_WORK]
            others = [(host, row) for host, row in self._rows.items() if row.state != _AT_WORK]
            order = (State.FAILED, State.INTERRUPTED, State.CHANGED, State.UNCHANGED)
            others.sort(key=lambda pair: order.index(pair[1].state) if pair[1].state in order else len(order))
            room = max(3, self.console.height - 4)
            shown = [*rows, *others][:room]
            table = Table("host", "state", "stage", "time", "last", box=None, pad_edge=False, expand=True)
            table.columns[4].no_wrap = True
            table.columns[4].ratio = 1
            for host, row in shown:
                took = self.clock() - row.started if row.state == _AT_WORK and row.started else row.took_s
                style = STYLE.get(State(row.state), "") if row.state in set(State) else ""
                # Text, not markup: what a host says is not to be obeyed.
                cells = (host, row.state, row.stage, f"{took:.0f} s" if took else "", printable(row.line))
                table.add_row(*(Text(cell, style=style, overflow="ellipsis") for cell in cells))
            done = sum(row.state in set(State) for row in self._rows.values())
            hidden = len(self._rows) - len(shown)
            foot = f"{done} of {len(self._rows)} hosts are through" + (f"; {hidden} not shown" if hidden else "")
        return Group(table, Text(foot, style="dim"))

    def _print(self, text: str) -> None:
        self.console.print(Text(printable(text)), soft_wrap=True, highlight=False)


def result_table(ends: Sequence[HostEnd]) -> Table:
    """How every host came out."""
    table = Table("host", "result", "stage", "seconds", "", box=None, pad_edge=False)
    for end in ends:
        first = printable(end.text.partition("\n")[0]) if end.state is State.FAILED else ""
        cells = (end.host, str(end.state), end.stage, f"{end.duration_s:.1f}", first)
        table.add_row(*(Text(cell, style=STYLE[end.state] if number == 1 else "") for number, cell in enumerate(cells)))
    return table
