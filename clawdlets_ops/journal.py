"""What happened in a run, in a folder of its own: events as JSON lines, and a log for each host.

Progress, ``clawdlets runs`` and the run's report live on it. Nothing secret is given to it on purpose; what is known to be
secret is scrubbed all the same.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from clawdlets_ops.files import PRIVATE_FILE, ensure_dir
from clawdlets_ops.sensitive import Redactor

EVENTS: Final = "events.jsonl"
RUNS_KEPT: Final = 50
AT_WORK_S: Final = 3600.0  # a run that wrote within this time is not pruned
LOG_LIMIT_BYTES: Final = 8 * 1024 * 1024
TEXT_LIMIT_CHARS: Final = 16_384
ENDS: Final = ("done", "unchanged", "failed")
RUN_ID: Final = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{1,8}(\.jsonl)?")  # with .jsonl: a run of version 0.1
HOST_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")

# What a terminal would take for a command, and what turns the reading direction of a text: C0 without tab and newline,
# DEL, C1, and the bidirectional controls of Unicode (UAX 9).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def new_run_id(at: datetime | None = None) -> str:
    """A name for a run that sorts by time."""
    return f"{at or datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"


def printable(text: str) -> str:
    """``text`` with all that a terminal or a browser would act on replaced."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


@dataclass(frozen=True)
class Journal:
    """The events of one run, appended to ``folder/events.jsonl``, and ``folder/<host>.log``; all files 0600.

    Every line has ``ts`` (ISO 8601, UTC), ``host`` ("" for the run as a whole), ``stage``, ``event`` (``started``,
    ``step``, ``done``, ``unchanged``, ``failed``) and ``text``; ``done`` and ``failed`` carry ``durationS``. The folder is
    made with the first event; older runs than the newest ``RUNS_KEPT`` are then removed.
    """

    folder: Path
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    listen: Callable[[str, str, str], None] | None = None
    redactor: Redactor = field(default_factory=Redactor)

    @property
    def path(self) -> Path:
        """The events."""
        return self.folder / EVENTS

    def say(self, host: str, stage: str, event: str, text: str = "", **more: Any) -> None:
        """Append one event."""
        text = printable(self.redactor.scrub(text))[:TEXT_LIMIT_CHARS]
        now = self.now()
        line = {"ts": now.isoformat(), "host": host, "stage": stage, "event": event, "text": text, **more}
        self._begin()
        _append(self.path, json.dumps(line, ensure_ascii=False) + "\n")
        if host:
            self.note(host, f"{stage} {event}{f': {text}' if text else ''}")
        if self.listen is not None:
            self.listen(host, stage, f"{event}: {text}" if text else event)

    def note(self, host: str, text: str) -> None:
        """Append to the host's log, with the time before each line. A log that is full takes no more."""
        if not HOST_NAME.fullmatch(host):
            raise ValueError(f"{host!r} cannot be a host's name")
        self._begin()
        path = self.folder / f"{host}.log"
        if path.exists() and path.stat().st_size > LOG_LIMIT_BYTES:
            return
        stamp = self.now().strftime("%H:%M:%S")
        lines = printable(self.redactor.scrub(text))[:TEXT_LIMIT_CHARS].splitlines() or [""]
        _append(path, "".join(f"{stamp} {line}\n" for line in lines))

    @contextmanager
    def stage(self, host: str, stage: str) -> Iterator[Callable[[str], None]]:
        """Frame a stage: yields a function that records its steps; a raised error is recorded and goes on up."""
        started = time.monotonic()
        self.say(host, stage, "started")
        try:
            yield lambda text: self.say(host, stage, "step", text)
        except BaseException as error:
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
            self.say(host, stage, "failed", why, durationS=round(time.monotonic() - started, 3))
            raise
        self.say(host, stage, "done", durationS=round(time.monotonic() - started, 3))

    def _begin(self) -> None:
        if not self.folder.is_dir():
            ensure_dir(self.folder)
            prune(self.folder.parent)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a journal; the last one may have been cut by a kill and is then left out."""
    events: list[dict[str, Any]] = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def journals(runs: Path) -> list[Path]:
    """The event files of all runs below ``runs``, the oldest first."""
    if not runs.is_dir():
        return []
    found = [path for path in runs.iterdir() if RUN_ID.fullmatch(path.name) and not path.is_symlink()]
    files = [path / EVENTS if path.is_dir() else path for path in sorted(found)]
    return [path for path in files if path.is_file()]


def prune(runs: Path, *, keep: int = RUNS_KEPT, now_s: Callable[[], float] = time.time) -> None:
    """Remove all runs but the newest ``keep`` and those that may be at work. Nothing else in the folder is touched."""
    for path in journals(runs)[:-keep]:
        try:
            if now_s() - path.stat().st_mtime > AT_WORK_S:
                shutil.rmtree(path.parent) if path.name == EVENTS else path.unlink()
        except FileNotFoundError:  # another run prunes too
            continue


def _append(path: Path, text: str) -> None:
    """One write for all of it: what several threads and processes append does not mix."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, PRIVATE_FILE)
    try:
        os.write(fd, text.encode(errors="replace"))
    finally:
        os.close(fd)
