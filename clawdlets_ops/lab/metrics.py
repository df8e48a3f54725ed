"""GET /servers/{id}/metrics: the right shape, with nothing measured in it."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Final

from clawdlets_ops.lab import grammar
from clawdlets_ops.lab.catalogue import Json
from clawdlets_ops.lab.grammar import Query

_SERIES: Final = {
    "cpu": ("cpu",),
    "disk": ("disk.0.iops.read", "disk.0.iops.write", "disk.0.bandwidth.read", "disk.0.bandwidth.write"),
    "network": ("network.0.pps.in", "network.0.pps.out", "network.0.bandwidth.in", "network.0.bandwidth.out"),
}
_POINTS: Final = 500


def metrics(query: Query) -> Json:
    """Ones and noughts in turn, at every step from start to end; at most 500 of them.

    All noughts made Debian's hcloud CLI 1.30.3 panic: its plot divides by the height of the curve.
    """
    wanted = [kind for sent in query.get("type", ()) for kind in sent.split(",")]
    if not wanted or not set(wanted) <= set(_SERIES):
        raise grammar.invalid("type", f"must be of {', '.join(_SERIES)}")
    start, end = _time(query, "start"), _time(query, "end")
    if end <= start:
        raise grammar.invalid("end", "must be after start")
    step_s = max(_step_s(query, end - start), (end - start) / _POINTS)
    values = [[start + index * step_s, str(index % 2)] for index in range(math.floor((end - start) / step_s) + 1)]
    return {
        "metrics": {
            "start": query["start"][-1],
            "end": query["end"][-1],
            "step": step_s,
            "time_series": {name: {"values": values} for kind in wanted for name in _SERIES[kind]},
        }
    }


def _time(query: Query, field: str) -> float:
    # A plus sign that a client did not escape has become a blank.
    sent = query.get(field, [""])[-1].replace(" ", "+")
    try:
        return datetime.fromisoformat(sent).timestamp()
    except (ValueError, OverflowError) as error:
        raise grammar.invalid(field, "must be a time in ISO 8601") from error


def _step_s(query: Query, length_s: float) -> float:
    if not query.get("step"):
        return max(1.0, length_s / 100)
    sent = query["step"][-1]
    try:
        step_s = float(sent)
    except ValueError as error:
        raise grammar.invalid("step", "must be a number of seconds") from error
    if not math.isfinite(step_s) or step_s <= 0:
        raise grammar.invalid("step", "must be a number of seconds")
    return step_s
