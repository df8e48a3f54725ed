"""What happened in a run, as JSON lines: progress, the run report and a later reader live on it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clawdlets_ops.files import PRIVATE_FILE, ensure_dir


@dataclass(frozen=True)
class Journal:
    """Appends one JSON object a line to ``path`` (0600). Nothing secret is ever given to it.

    Every line has ``ts`` (ISO 8601, UTC), ``host``, ``stage``, ``event`` (``started``, ``step``, ``done``,
    ``unchanged``, ``failed``) and ``text``; ``done`` and ``failed`` carry ``durationS``.
    """

    path: Path
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    listen: Callable[[str, str, str], None] | None = None

    def say(self, host: str, stage: str, event: str, text: str = "", **more: Any) -> None:
        """Append one event."""
        line = {"ts": self.now().isoformat(), "host": host, "stage": stage, "event": event, "text": text, **more}
        ensure_dir(self.path.parent)
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, PRIVATE_FILE)
        try:
            os.write(fd, (json.dumps(line, ensure_ascii=False) + "\n").encode())
        finally:
            os.close(fd)
        if self.listen is not None:
            self.listen(host, stage, f"{event}: {text}" if text else event)

    @contextmanager
    def stage(self, host: str, stage: str) -> Iterator[Callable[[str], None]]:
        """Frame a stage: yields a function that records its steps; a raised error is recorded and goes on up."""
        started = time.monotonic()
        self.say(host, stage, "started")
        try:
            yield lambda text: self.say(host, stage, "step", text)
        except BaseException as error:
            self.say(host, stage, "failed", str(error), durationS=round(time.monotonic() - started, 3))
            raise
        self.say(host, stage, "done", durationS=round(time.monotonic() - started, 3))


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a journal; the last one may have been cut by a kill and is then left out."""
    events: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
