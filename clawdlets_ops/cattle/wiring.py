"""The two kinds of job that the orchestrator knows of cattle, wired to its queue and its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from clawdlets_ops.cattle.orders import judge, judge_reap
from clawdlets_ops.cattle.reap import Reaper, Seen
from clawdlets_ops.cattle.spawn import Spawner
from clawdlets_ops.herd import Cattle
from clawdlets_ops.orchestrator.jobs import FINISHED, FieldError, Job, Kind, Status
from clawdlets_ops.orchestrator.queue import NoSuchJob, Queue
from clawdlets_ops.orchestrator.tokens import Grant, Purpose, Tokens
from clawdlets_ops.sensitive import Secret

SPAWN: Final = "cattle.spawn"
REAP: Final = "cattle.reap"
LEASE_S: Final = 60
MAX_ATTEMPTS: Final = 5
_MOST: Final = 100_000


@dataclass(frozen=True)
class JobTokens:
    """The orchestrator's one-time tokens, as a spawn asks for them. What a machine may be given is its persona's."""

    tokens: Tokens
    cattle: Callable[[], Cattle]

    def issue(self, job: Job, *, node: str, persona: str, ttl_s: int) -> Secret:
        """A bootstrap token for the machine of this job."""
        declared = self.cattle().personas[persona]
        grant = Grant(
            job_id=job.job_id,
            requester=job.requester,
            node=node,
            purpose=Purpose.ENVIRONMENT,
            env_keys=tuple(sorted(declared.secrets)),
            public_env=dict(declared.variables),
        )
        return self.tokens.issue(grant, ttl_s=ttl_s)

    def bind(self, job_id: str, server_id: int) -> None:
        """The job's tokens are this server's."""
        self.tokens.bind(job_id, server_id=server_id)

    def revoke(self, job_id: str) -> None:
        """The job's tokens are nobody's."""
        self.tokens.revoke(job_id)


def unfinished(queue: Queue) -> Sequence[Job]:
    """The spawns that are running or waiting."""
    return queue.list_jobs(kinds=[SPAWN], statuses=[Status.QUEUED, Status.RUNNING], limit=_MOST)


def seen(queue: Queue, job_ids: Sequence[str]) -> Seen:
    """What has become of these jobs."""
    ended: dict[str, float] = {}
    running: set[str] = set()
    for job_id in job_ids:
        try:
            job = queue.get(job_id)
        except NoSuchJob:
            continue
        if job.status in FINISHED:
            ended[job_id] = (job.finished_at or job.updated_at) / 1000
        else:
            running.add(job_id)
    return Seen(ended, frozenset(running))


def spawn_kind(spawner: Spawner, cattle: Cattle) -> Kind:
    """``cattle.spawn``: its lease is short, as heartbeats renew it; a killed worker's job is another's after a minute."""

    def validate(payload: Mapping[str, Any], requester: str) -> Sequence[FieldError]:
        return judge(payload, requester, spawner.cattle())[1]

    return Kind(
        SPAWN,
        validate=validate,
        handler=spawner,
        clean_up=spawner.clean_up,
        max_attempts=MAX_ATTEMPTS,
        lease_s=LEASE_S,
        max_unfinished=max(10, 4 * cattle.max_per_bot),
        max_unfinished_in_all=max(100, 4 * cattle.max_instances),
    )


def reap_kind(reaper: Reaper) -> Kind:
    """``cattle.reap``: for operators, and for the timer."""

    def validate(payload: Mapping[str, Any], requester: str) -> Sequence[FieldError]:
        del requester
        return judge_reap(payload)

    return Kind(REAP, validate=validate, handler=reaper, max_attempts=3, lease_s=LEASE_S, operators_only=True)
