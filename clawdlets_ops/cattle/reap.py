"""Which cattle servers are to go, and their deletion. The plan is pure.

A server goes when its time is up or its job has ended, and only with our complete label set: one label missing, and it is
left alone and told. Time is up when both clocks say so: the API's (``created`` and the label with the seconds to live,
against the ``Date`` of its answer) and this host's (the label with the deadline). A clock that jumps, here or there, deletes
nothing; the end of a job is not a matter of time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol

from clawdlets_ops.cattle import labels
from clawdlets_ops.cloud import Server
from clawdlets_ops.errors import CloudError, OutcomeUnknown
from clawdlets_ops.orchestrator.jobs import Context, Job, Json, Retry

log = logging.getLogger(__name__)

SETTLE_S: Final = 60
"""A job that ended less than this ago deletes its own server."""
GONE_S: Final = 60.0
"""How long all that was asked to go is waited for; the API takes seconds for a deletion."""
LOOK_S: Final = 0.5


class Deleting(Protocol):
    """What a deletion asks of the Hetzner API."""

    def server_by_id(self, server_id: int) -> Server | None: ...

    def delete_server(self, server_id: int) -> None: ...


class Watching(Deleting, Protocol):
    """What the reaper asks of it besides."""

    @property
    def api_time_s(self) -> float | None: ...

    def servers_with(self, labels: Mapping[str, str]) -> tuple[Server, ...]: ...


@dataclass(frozen=True)
class Seen:
    """What is known of jobs: ``ended`` maps the id of a job that has ended to when (seconds since the epoch), ``running``
    are those that have not. A job that is in neither has been forgotten, or is another's: its server lives out its time."""

    ended: Mapping[str, float]
    running: frozenset[str]


@dataclass(frozen=True)
class Doomed:
    """A server that is to go, and why."""

    id: int
    name: str
    job_id: str
    why: str


@dataclass(frozen=True)
class Plan:
    """``go`` is deleted. ``kept`` has an age that is fine; ``strange`` looks like ours and lacks labels, and is not touched;
    ``off`` are those that are switched off, and are paid for all the same."""

    go: tuple[Doomed, ...] = ()
    kept: tuple[str, ...] = ()
    strange: tuple[str, ...] = ()
    off: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"delete {one.name} (id {one.id}): {one.why}" for one in self.go]
        lines += [f"left alone, not ours by its labels: {what}" for what in self.strange]
        lines += [f"switched off, and paid for: {name}" for name in self.off]
        return "\n".join([*lines, f"{len(self.kept)} stay"])


def plan(
    servers: Sequence[Server], seen: Seen, *, now_s: float, api_time_s: float | None, settle_s: float = SETTLE_S
) -> Plan:
    """What is to become of these servers. ``now_s``: this host's clock; ``api_time_s``: the API's, None when not known."""
    go: list[Doomed] = []
    kept: list[str] = []
    strange: list[str] = []
    off: list[str] = []
    for server in sorted(servers, key=lambda one: one.id):
        brand = labels.read(server.labels)
        if brand is None:
            lacks = ", ".join(labels.missing(server.labels))
            strange.append(f"{server.name} (id {server.id}) has no proper {lacks}")
            continue
        why = _why(server, brand, seen, now_s, api_time_s, settle_s)
        if why:
            go.append(Doomed(server.id, server.name, brand.job_id, why))
            continue
        kept.append(server.name)
        if server.status == "off":
            off.append(server.name)
    return Plan(tuple(go), tuple(kept), tuple(strange), tuple(off))


def _why(
    server: Server, brand: labels.Brand, seen: Seen, now_s: float, api_time_s: float | None, settle_s: float
) -> str:
    ended = seen.ended.get(brand.job_id)
    if ended is not None and not 0 <= now_s - ended < settle_s:
        return "its job has ended"
    if api_time_s is None or brand.job_id in seen.ended:
        return ""
    if now_s >= brand.deadline_s and api_time_s >= _created_s(server) + brand.ttl_s:
        return "its time is up"
    return ""


def _created_s(server: Server) -> float:
    """When the API made it, by the API's clock; far in the future when it does not say: then it lives."""
    try:
        return datetime.fromisoformat(server.created).timestamp()
    except ValueError:
        return float("inf")


@dataclass(frozen=True)
class Reaper:
    """The handler of ``cattle.reap``, and what the timer calls. ``jobs`` says what has become of the jobs with these ids."""

    host: str
    cloud: Watching
    jobs: Callable[[Sequence[str]], Seen]
    clock: Callable[[], int]
    settle_s: float = SETTLE_S

    def observe(self) -> Plan:
        """What would go now. The servers are listed before the jobs: one whose job ends meanwhile waits for the next time."""
        servers = self.cloud.servers_with(labels.of_orchestrator(self.host))
        return plan(
            servers,
            self.jobs([brand.job_id for one in servers if (brand := labels.read(one.labels)) is not None]),
            now_s=self.clock() / 1000,
            api_time_s=self.cloud.api_time_s,
            settle_s=self.settle_s,
        )

    def __call__(self, job: Job, context: Context) -> Json:
        """``{deletedIds, strange, off}``; with ``dryRun`` nothing is deleted, and ``wouldDelete`` says what would be."""
        found = self.observe()
        for line in str(found).splitlines():
            context.note(line)
        if job.payload.get("dryRun"):
            return {"wouldDelete": [one.id for one in found.go], **_rest(found)}
        deleted, faults = apply(self.cloud, found, check=context.check, sleep=context.sleep)
        if faults:
            raise Retry(f"{len(faults)} not deleted: {faults[0]}")
        return {"deletedIds": deleted, **_rest(found)}


def apply(
    cloud: Deleting,
    found: Plan,
    *,
    gone_s: float = GONE_S,
    check: Callable[[], None] = lambda: None,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[int], list[str]]:
    """Delete what the plan says, each after another look at its labels; the ids that were seen to be gone, and what went
    wrong. All are asked for before the first is waited for, and the last is waited for ``gone_s`` seconds at most."""
    begun: list[Doomed] = []
    faults: list[str] = []
    for doomed in found.go:
        check()
        try:
            seen = cloud.server_by_id(doomed.id)
            if seen is not None:
                if not labels.are_of(doomed.job_id, seen.labels):
                    faults.append(f"{doomed.name} is labelled differently now, and is left alone")
                    continue
                cloud.delete_server(doomed.id)
            begun.append(doomed)
        except OutcomeUnknown:
            begun.append(doomed)  # whether it goes is seen below
        except CloudError as error:
            faults.append(f"{doomed.name}: {error.what}")
    deadline = time.monotonic() + gone_s
    deleted: list[int] = []
    for doomed in begun:
        try:
            while (there := cloud.server_by_id(doomed.id) is not None) and time.monotonic() < deadline:
                sleep(LOOK_S)
        except CloudError as error:
            faults.append(f"{doomed.name} was asked to go, and whether it has is not known: {error.what}")
            continue
        if there:
            faults.append(f"{doomed.name} was asked to go, and is still there")
            continue
        deleted.append(doomed.id)
        log.info("reaped %s (id %d): %s", doomed.name, doomed.id, doomed.why)
    return deleted, faults


def _rest(found: Plan) -> dict[str, Any]:
    return {"strange": list(found.strange), "off": list(found.off), "kept": len(found.kept)}
