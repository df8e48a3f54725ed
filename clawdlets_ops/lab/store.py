"""The cloud's state on disk, so that storing a change costs as much as the change.

One file (0600): its first line is a whole state, every further line a change of it (``State.apply``). A change is one
write, made before its request is answered: a lab that is killed at any instant comes back with all that it has answered. A
last line without its end was never answered, and is dropped. Snapshots, and the file when it is closed, are synced to the
disk; single changes are not: a power cut takes the machines and may take the last changes too.

A file of an earlier lab is a whole state and nothing more, which is what the first line is.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Final

from clawdlets_ops.errors import LabError
from clawdlets_ops.files import read_private, write_atomic
from clawdlets_ops.lab.records import KINDS, STATE_VERSION, State

# A new snapshot is written when the changes are this much, and twice the state: on average a change costs its own size.
_CHANGES_KEPT_BYTES: Final = 1024 * 1024


class Store:
    """Loads a State and stores its changes; without a file it only tells whether there were any. Not thread-safe."""

    def __init__(self, file: Path | None) -> None:
        """LabError or SettingsError when the file is not usable."""
        self.state = State() if file is None or not file.exists() else _load(file)
        self._file = file
        self._fd: int | None = None
        self._texts = {
            kind: {row_id: json.dumps(vars(record)) for row_id, record in self.state.named(kind).items()}
            for kind in KINDS
        }
        self._next_ids = dict(self.state.next_ids)
        self._changes_bytes = 0
        self._snapshot_bytes = 0
        self._snapshot()

    def commit(self) -> bool:
        """Store what has changed since the last time; whether anything has. OSError: it will be stored the next time."""
        state = self.state
        changes: dict[str, dict[int, str | None]] = {}
        for kind, row_id in sorted(state.changed):
            record = state.named(kind).get(row_id)
            text = None if record is None else json.dumps(vars(record))
            if text != self._texts[kind].get(row_id):
                changes.setdefault(kind, {})[row_id] = text
        if changes or state.next_ids != self._next_ids:
            self._append(self._line(changes))
            self._take(changes)
            if self._changes_bytes > max(_CHANGES_KEPT_BYTES, 2 * self._snapshot_bytes):
                self._snapshot()
            return True
        state.changed.clear()
        return False

    def close(self) -> None:
        """Sync and close the file; a later commit opens it again."""
        if self._fd is not None:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = None

    def _line(self, changes: dict[str, dict[int, str | None]]) -> str:
        parts = []
        for kind, rows in changes.items():
            told = ", ".join(f'"{row_id}": {text or "null"}' for row_id, text in rows.items())
            parts.append(f'"{kind}": {{{told}}}')
        if self.state.next_ids != self._next_ids:
            parts.append(f'"nextIds": {json.dumps(self.state.next_ids)}')
        return f"{{{', '.join(parts)}}}\n"

    def _take(self, changes: dict[str, dict[int, str | None]]) -> None:
        for kind, rows in changes.items():
            for row_id, text in rows.items():
                if text is None:
                    self._texts[kind].pop(row_id, None)
                else:
                    self._texts[kind][row_id] = text
        self._next_ids = dict(self.state.next_ids)
        self.state.changed.clear()

    def _append(self, line: str) -> None:
        if self._file is None:
            return
        if self._fd is None:
            self._fd = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        data = line.encode()
        size = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._file))
        except OSError:
            os.ftruncate(self._fd, size)  # a piece of a line would spoil the next one
            raise
        self._changes_bytes += len(data)

    def _snapshot(self) -> None:
        if self._file is None:
            return
        self.close()
        tables = "".join(f', "{kind}": [{", ".join(rows.values())}]' for kind, rows in self._texts.items())
        whole = f'{{"version": {STATE_VERSION}, "nextIds": {json.dumps(self._next_ids)}{tables}}}\n'
        write_atomic(self._file, whole)
        self._snapshot_bytes, self._changes_bytes = len(whole), 0


def _load(file: Path) -> State:
    """The state that a file holds; LabError, SettingsError."""
    first, *changes = read_private(file).split("\n")
    try:
        state = State.from_json(first)
        for line in changes[:-1]:  # behind the last line's end there is nothing, or what was cut off
            state.apply(json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "take the lab down, and remove the file"
        raise LabError(f"is not a state of this lab ({error})", where=str(file), fix=fix) from error
    state.changed.clear()
    return state
