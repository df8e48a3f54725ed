"""The two kinds of job that the orchestrator knows of cattle, wired to its queue, its tokens and its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from clawdlets_ops.cattle import personas
from clawdlets_ops.cattle.keys import STATIC, KeyDesk, MintedKeys, NoKeys, StaticKey
from clawdlets_ops.cattle.orders import judge, judge_reap
from clawdlets_ops.cattle.reap import Reaper, Seen
from clawdlets_ops.cattle.spawn import Spawner
from clawdlets_ops.errors import OrchestratorError
from clawdlets_ops.herd import Cattle, secrets_of
from clawdlets_ops.hetzner import HetznerCloud
from clawdlets_ops.orchestrator.daemon import DATABASE_URL, Config, Parts, Work
from clawdlets_ops.orchestrator.jobs import FINISHED, Context, Fatal, FieldError, Job, Json, Kind, Status
from clawdlets_ops.orchestrator.queue import NoSuchJob, Queue
from clawdlets_ops.orchestrator.tokens import Grant, Purpose, Tokens
from clawdlets_ops.orchestrator.vending import Needs, SecretFiles
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.tailscale_api import HeadscaleKeys, TailscaleKeys

SPAWN: Final = "cattle.spawn"
REAP: Final = "cattle.reap"
LEASE_S: Final = 60
MAX_ATTEMPTS: Final = 5
REAP_EVERY_S: Final = 120
HCLOUD_TOKEN: Final = "hcloud_token"  # noqa: S105 - a secret's name, as the next ones
OAUTH: Final = "tailscale_oauth_client_secret"
HEADSCALE: Final = "headscale_api_key"
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


def ending_kind(spawner: Spawner) -> Kind:
    """``cattle.spawn`` where cattle is not enabled any more: nothing new, and what was begun is deleted and fails."""

    def validate(payload: Mapping[str, Any], requester: str) -> Sequence[FieldError]:
        del payload, requester
        return [FieldError("kind", "cattle is not enabled")]

    def end(job: Job, context: Context) -> Json:
        spawner.clean_up(job, context)
        raise Fatal("cattle is not enabled any more")

    return Kind(
        SPAWN, validate=validate, handler=end, clean_up=spawner.clean_up, max_attempts=MAX_ATTEMPTS, lease_s=LEASE_S
    )


def reap_kind(reaper: Reaper) -> Kind:
    """``cattle.reap``: for operators, and for the timer."""

    def validate(payload: Mapping[str, Any], requester: str) -> Sequence[FieldError]:
        del requester
        return judge_reap(payload)

    return Kind(REAP, validate=validate, handler=reaper, max_attempts=3, lease_s=LEASE_S, operators_only=True)


def make_work(parts: Parts) -> Work:
    """What the orchestrator does for cattle, as its configuration says; OrchestratorError when a secret is missing."""
    config, cattle = parts.config, parts.config.cattle
    if cattle.host is None or not (cattle.enabled or parts.secrets.get(HCLOUD_TOKEN)):
        return Work()
    cloud = cloud_of(_needed(parts.secrets, HCLOUD_TOKEN), config.hcloud_endpoint)
    spawner = Spawner(
        host=cattle.host,
        cattle=lambda: cattle,
        files=partial(personas.read, Path(config.personas)),
        cloud=cloud,
        tokens=JobTokens(parts.tokens, lambda: cattle),
        keys=key_desk(cattle, config, parts.secrets) if cattle.enabled else NoKeys(),
        unfinished=lambda: unfinished(parts.queue),
        base_url=parts.bootstrap_url,
        never=lambda: never_sent(cattle, parts.secrets),
        authorized_keys=config.authorized_keys,
    )
    reaper = Reaper(host=cattle.host, cloud=cloud, jobs=lambda ids: seen(parts.queue, ids), clock=parts.clock)
    if not cattle.enabled:
        return Work(kinds=(ending_kind(spawner), reap_kind(reaper)), periodic={REAP: REAP_EVERY_S})

    def look(grant: Grant) -> Needs:
        persona = cattle.personas.get(str(parts.queue.get(grant.job_id).payload.get("persona")))
        if persona is None:
            raise OrchestratorError(f"the persona of job {grant.job_id} is not declared any more")
        return Needs(persona.secrets, persona.any_of)

    return Work(
        kinds=(spawn_kind(spawner, cattle), reap_kind(reaper)),
        look=look,
        periodic={REAP: REAP_EVERY_S},
        result_bytes=cattle.max_result_bytes,
    )


def cloud_of(token: Secret, endpoint: str) -> HetznerCloud:
    """The API's client for cattle."""
    return HetznerCloud(token, endpoint)


def key_desk(cattle: Cattle, config: Config, secrets: SecretFiles) -> KeyDesk:
    """Where auth keys come from, as the fleet file says; OrchestratorError when the secret for it is missing."""
    said = cattle.tailnet
    ca_file = Path(config.tailnet_ca) if config.tailnet_ca else None
    if said.key == "minted":
        return MintedKeys(TailscaleKeys(said.api_endpoint, _needed(secrets, OAUTH), ca_file), said.tag)
    if said.key == "headscale":
        api = HeadscaleKeys(said.api_endpoint, _needed(secrets, HEADSCALE), said.headscale_user, ca_file)
        return MintedKeys(api, said.tag)
    _needed(secrets, STATIC)
    return StaticKey(lambda: _needed(secrets, STATIC))


def never_sent(cattle: Cattle, secrets: SecretFiles) -> Sequence[Secret]:
    """What no user data may hold: whatever this host has that is a provider's or a persona's."""
    names = [HCLOUD_TOKEN, OAUTH, HEADSCALE, DATABASE_URL, *secrets_of(cattle)]
    return [found for name in names if (found := secrets.get(name)) is not None]


def _needed(secrets: SecretFiles, name: str) -> Secret:
    found = secrets.get(name)
    if found is None or not found:
        raise OrchestratorError(
            "is missing", where=name, fix="declare it among the host's secrets, for clf-orchestrator"
        )
    return found
