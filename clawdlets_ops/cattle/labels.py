"""What a cattle server carries: its name, and labels that say whose it is, for which job, and until when. Pure.

A server is ours only with the whole set, each value of its form: one label missing, and it is somebody else's, which is
never deleted. Labels: docs.hetzner.cloud, "Labels"; a host name has 63 characters at most (RFC 1123).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from clawdlets_ops.cloud import MANAGED_BY, MANAGER

CATTLE: Final = "clawdlets-cattle"
ORCHESTRATOR: Final = "clawdlets-orchestrator"
JOB: Final = "clawdlets-job"
ORDER: Final = "clawdlets-order"
PERSONA: Final = "clawdlets-persona"
BOT: Final = "clawdlets-bot"
TTL: Final = "clawdlets-ttl"
DEADLINE: Final = "clawdlets-deadline"

_FORMS: Final = {
    MANAGED_BY: re.compile(re.escape(MANAGER)),
    CATTLE: re.compile("true"),
    ORCHESTRATOR: re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"),
    JOB: re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    ORDER: re.compile(r"[0-9a-f]{16}"),
    PERSONA: re.compile(r"[a-z](?:[a-z0-9-]{0,22}[a-z0-9])?"),
    BOT: re.compile(r"[a-z0-9](?:[a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?"),
    TTL: re.compile(r"[1-9][0-9]{0,6}"),
    DEADLINE: re.compile(r"[1-9][0-9]{8,11}"),
}


@dataclass(frozen=True)
class Brand:
    """The labels of one cattle server, read. ``ttl_s`` seconds from its creation, ``deadline_s`` seconds since the epoch
    by the clock of the host that ordered it; ``order`` tells one attempt of a job from the next."""

    orchestrator: str
    job_id: str
    order: str
    persona: str
    bot: str
    ttl_s: int
    deadline_s: int

    def labels(self, declared: Mapping[str, str]) -> dict[str, str]:
        """All labels that the server gets: the fleet's own, and ours, which nothing overrides."""
        return {
            **declared,
            MANAGED_BY: MANAGER,
            CATTLE: "true",
            ORCHESTRATOR: self.orchestrator,
            JOB: self.job_id,
            ORDER: self.order,
            PERSONA: self.persona,
            BOT: self.bot,
            TTL: str(self.ttl_s),
            DEADLINE: str(self.deadline_s),
        }


def read(labels: Mapping[str, str]) -> Brand | None:
    """The brand of a server, None unless every label is there and has its form."""
    if any(not form.fullmatch(labels.get(name, "")) for name, form in _FORMS.items()):
        return None
    return Brand(
        orchestrator=labels[ORCHESTRATOR],
        job_id=labels[JOB],
        order=labels[ORDER],
        persona=labels[PERSONA],
        bot=labels[BOT],
        ttl_s=int(labels[TTL]),
        deadline_s=int(labels[DEADLINE]),
    )


def are_of(job_id: str, labels: Mapping[str, str]) -> bool:
    """Whether these are the whole label set of a server of this job."""
    brand = read(labels)
    return brand is not None and brand.job_id == job_id


def missing(labels: Mapping[str, str]) -> tuple[str, ...]:
    """Which of our labels are not there, or are not of their form."""
    return tuple(name for name, form in _FORMS.items() if not form.fullmatch(labels.get(name, "")))


def of_orchestrator(host: str) -> dict[str, str]:
    """What to list by: the servers that this host's orchestrator ordered."""
    return {MANAGED_BY: MANAGER, CATTLE: "true", ORCHESTRATOR: host}


def of_job(host: str, job_id: str) -> dict[str, str]:
    """What to list by: the servers of one job."""
    return {**of_orchestrator(host), JOB: job_id}


def server_name(persona: str, job_id: str) -> str:
    """The one name of a job's server. The API takes a name once in a project: an order that was sent twice makes one."""
    return f"cattle-{persona}-{job_id.replace('-', '')[-12:]}"


def bot_label(requester: str) -> str:
    """The requester as a label's value: ``operator:olive`` has a character that the API refuses."""
    return re.sub(r"[^A-Za-z0-9._-]", ".", requester).strip("._-").lower()[:63].rstrip("._-") or "unknown"
