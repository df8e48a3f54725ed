"""Whether there is room for one more cattle server, in all and for its bot."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from clawdlets_ops.cattle import labels
from clawdlets_ops.cattle.orders import Wanted
from clawdlets_ops.cloud import Server
from clawdlets_ops.orchestrator.jobs import Job


@dataclass
class Servers:
    """Whose servers the API showed, by job, and when, on the monotonic clock."""

    owners: Mapping[str, str] = field(default_factory=dict)
    at: float = -math.inf


def full(
    job: Job,
    wanted: Wanted,
    unfinished: Sequence[Job],
    ask: Callable[[], Sequence[Server]],
    lately: Servers,
    *,
    good_for_s: float,
) -> str | None:
    """Why there is no room for ``job``, or None.

    What counts is every order whose server is not gone yet, and every server with our labels, whatever its power (one that is
    off is paid for too). The API (``ask``), whose requests are everybody's, is asked only where the orders leave room; what
    it said ``lately`` is gone by for ``good_for_s`` as long as it leaves none.
    """
    orders = {
        other.job_id: labels.bot_label(other.requester)
        for other in unfinished
        if other.state.get("order") and other.state.get("goneAt") is None
    }
    known = lately.owners if time.monotonic() - lately.at < good_for_s else {}
    for owners in (orders, {**orders, **known}):
        if said := _too_many(owners, job, wanted):
            return said
    lately.owners = {one.labels.get(labels.JOB, str(one.id)): one.labels.get(labels.BOT, "") for one in ask()}
    lately.at = time.monotonic()
    return _too_many({**orders, **lately.owners}, job, wanted)


def _too_many(owners: Mapping[str, str], job: Job, wanted: Wanted) -> str | None:
    """Whether these, each a job's or a stray server's and some bot's, are as many as there may be, without ``job``'s own."""
    others = {owner: bot for owner, bot in owners.items() if owner != job.job_id}
    of_bot = list(others.values()).count(labels.bot_label(job.requester))
    if len(others) >= wanted.max_in_all:
        return f"there are {len(others)} cattle servers, and {wanted.max_in_all} are the most"
    if of_bot >= wanted.max_of_bot:
        return f"{job.requester} has {of_bot} cattle servers, and {wanted.max_of_bot} are the most"
    return None
