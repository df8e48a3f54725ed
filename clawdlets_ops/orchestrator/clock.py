"""Wall-clock milliseconds that do not jump while the process lives.

Leases and tokens are compared with times in the database, so they need the wall clock; but an administrator or a time
daemon that sets it an hour ahead would let every lease expire under its worker. So the wall clock is read once, and what
passes since then is taken from the boot clock, which also counts a suspended machine's sleep.
"""

from __future__ import annotations

import time
from collections.abc import Callable

JUMP_MS = 2_000
"""The wall clock is followed in steps of at most this; more than that is a jump, and is reported."""


def boot_ms() -> int:
    """Milliseconds since the machine started (CLOCK_BOOTTIME, clock_gettime(2))."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def wall_ms() -> int:
    """The wall clock, milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


class SteadyClock:
    """Callable: milliseconds since the epoch, never backwards, never by leaps."""

    def __init__(self, wall: Callable[[], int] = wall_ms, boot: Callable[[], int] = boot_ms) -> None:
        self._wall = wall
        self._boot = boot
        self._offset = wall() - boot()

    def __call__(self) -> int:
        return self._boot() + self._offset

    def drift_ms(self) -> int:
        """How far the wall clock is ahead of this one; more than JUMP_MS means that it was set."""
        return self._wall() - self()
