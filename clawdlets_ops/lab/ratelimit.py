"""The request budget of a project: a bucket that starts full and refills steadily, one for each token."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

PER_HOUR: Final = 3600


@dataclass(frozen=True)
class Rate:
    """What the RateLimit-* headers say: reset is when the budget is full again, in Unix seconds."""

    limit: int
    remaining: int
    reset: int


class Budget:
    """3600 an hour refill at one a second. ``clock`` gives Unix seconds. Raises ValueError for a limit below 1."""

    def __init__(self, per_hour: int = PER_HOUR, clock: Callable[[], float] = time.time) -> None:
        if per_hour < 1:
            raise ValueError("a budget is at least one request an hour")
        self._limit = per_hour
        self._per_second = per_hour / 3600
        self._clock = clock
        self._lock = threading.Lock()
        self._left = float(per_hour)
        self._at = clock()

    def take(self) -> tuple[bool, Rate]:
        """Spend one request if there is one; what is left then."""
        with self._lock:
            self._refill()
            granted = self._left >= 1
            if granted:
                self._left -= 1
            return granted, self._rate()

    def look(self) -> Rate:
        """What is left; spends nothing."""
        with self._lock:
            self._refill()
            return self._rate()

    def _refill(self) -> None:
        now = self._clock()
        # A clock that is set back refills nothing, and is believed from then on.
        self._left = min(float(self._limit), self._left + max(0.0, now - self._at) * self._per_second)
        self._at = now

    def _rate(self) -> Rate:
        missing_s = (self._limit - self._left) / self._per_second
        return Rate(self._limit, int(self._left), math.ceil(self._at + missing_s))
