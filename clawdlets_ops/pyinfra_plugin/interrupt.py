"""SIGINT and SIGTERM under pyinfra: what runs for the hosts is ended, in order, before pyinfra is.

By itself pyinfra leaves at once on the first and dies of the second; the programs of its hosts would go on without it.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, Final

import gevent

ENDED_WITHIN_S: Final = 30.0

_state: Any = None
_ending = False


def end_hosts_on_signals(state: Any) -> None:
    """From now on a signal ends the hosts of ``state`` first; asked again, the same. Only in the main thread."""
    global _state
    if _state is state:
        return
    _state = state
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)


def _handle(number: int, _frame: object) -> None:
    """A second signal ends us as it would have."""
    global _ending
    if _ending:
        os._exit(128 + number)
    _ending = True
    gevent.spawn(_end, number)


def _end(number: int) -> None:
    sys.stderr.write(f"{signal.Signals(number).name}: ending what runs for the hosts\n")
    # Each host's greenlet unwinds: its program is ended with all that it started, its private folders are removed.
    _state.pool.kill(block=True, timeout=ENDED_WITHIN_S)
    sys.stderr.write("interrupted: run the same command again; each host goes on from where it stands\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + number)  # pyinfra's own greenlet would begin the next operation
