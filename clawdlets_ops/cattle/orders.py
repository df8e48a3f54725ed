"""What a job asks for, with the fleet's defaults, within the fleet's caps. Pure.

Judged when the job is enqueued, and again when its server is ordered: the fleet file may have changed in between.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from clawdlets_ops.herd import MIN_TTL_S, BotLimits, Cattle, seconds
from clawdlets_ops.orchestrator.jobs import FieldError

SCHEMA_VERSION: Final = 1
OPERATOR: Final = "operator:"
TASK_ID: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
TASK_TYPE: Final = re.compile(r"[a-z][a-z0-9._-]{0,62}")
MAX_MESSAGE_BYTES: Final = 16384

_FIELDS: Final = ("persona", "task", "ttl", "image", "serverType", "location")
_PEERS: Final = ("autoShutdown", "withGithubToken")
"""The peer's, taken when they say what holds here anyway: a server is always deleted, and no token is given on demand."""
_TASK_FIELDS: Final = ("schemaVersion", "taskId", "type", "message", "callbackUrl")


@dataclass(frozen=True)
class Offer:
    """One combination that may be ordered."""

    image: str
    server_type: str
    location: str


@dataclass(frozen=True)
class Wanted:
    """What a job comes to. ``offers`` in the order in which they are tried; ``task`` is what the machine is told."""

    persona: str
    ttl_s: int
    offers: tuple[Offer, ...]
    task: Mapping[str, Any]
    max_of_bot: int
    max_in_all: int


def judge(payload: Mapping[str, Any], requester: str, cattle: Cattle) -> tuple[Wanted | None, Sequence[FieldError]]:
    """What ``payload`` comes to for this requester (a bot's name, or ``operator:NAME``), or everything that is wrong."""
    faults: list[FieldError] = []
    limits = _limits(requester, cattle)
    if not cattle.enabled:
        return None, [FieldError("kind", "cattle is not enabled in the fleet file")]
    if limits is None:
        return None, [FieldError("requester", f"{requester} may not ask for cattle: it has no entry in cattle.bots")]
    faults += [FieldError(f"payload.{name}", "unknown field") for name in payload if name not in (*_FIELDS, *_PEERS)]
    if payload.get("withGithubToken", False) is not False:
        faults.append(FieldError("payload.withGithubToken", "is not given on demand: declare it for the persona"))
    if payload.get("autoShutdown", True) is not True:
        faults.append(
            FieldError("payload.autoShutdown", "cannot be switched off: a server goes when its task has ended")
        )
    persona = payload.get("persona")
    if not isinstance(persona, str) or persona not in limits.personas:
        allowed = ", ".join(limits.personas) or "none"
        faults.append(FieldError("payload.persona", f"one of those that {requester} may use: {allowed}"))
    ttl_s = _ttl(payload.get("ttl"), cattle, limits, faults)
    task = _task(payload.get("task"), faults)
    offers = _offers(payload, cattle, limits, faults)
    if faults or task is None:
        return None, faults
    wanted = Wanted(
        persona=str(persona),
        ttl_s=ttl_s,
        offers=offers,
        task=task,
        max_of_bot=limits.max_instances or cattle.max_per_bot,
        max_in_all=cattle.max_instances,
    )
    return wanted, ()


def judge_reap(payload: Mapping[str, Any]) -> Sequence[FieldError]:
    """What is wrong with the payload of ``cattle.reap``."""
    faults = [FieldError(f"payload.{name}", "unknown field") for name in payload if name != "dryRun"]
    if not isinstance(payload.get("dryRun", False), bool):
        faults.append(FieldError("payload.dryRun", "true or false"))
    return faults


def _limits(requester: str, cattle: Cattle) -> BotLimits | None:
    """An operator may use every persona, within what holds for all; a bot what its entry says, or nothing."""
    if requester.startswith(OPERATOR):
        personas = tuple(sorted(cattle.personas))
        return BotLimits.model_construct(
            personas=personas,
            max_instances=cattle.max_instances,
            max_ttl=None,
            images=None,
            server_types=None,
            locations=None,
        )
    return cattle.bots.get(requester)


def _ttl(asked: object, cattle: Cattle, limits: BotLimits, faults: list[FieldError]) -> int:
    most = limits.max_ttl or cattle.max_ttl
    if asked is None or asked == "":
        return min(seconds(cattle.default_ttl), seconds(most))
    try:
        ttl_s = seconds(str(asked).strip().lower().replace(" ", "")) if isinstance(asked, str) else 0
    except ValueError:
        ttl_s = 0
    if not MIN_TTL_S <= ttl_s <= seconds(most):
        faults.append(FieldError("payload.ttl", f"a duration such as 90s, 5m or 2h, of 1m to {most}"))
    return ttl_s


def _task(found: object, faults: list[FieldError]) -> Mapping[str, Any] | None:
    if not isinstance(found, Mapping):
        faults.append(FieldError("payload.task", "an object with schemaVersion, taskId, type and message"))
        return None
    before = len(faults)
    faults += [FieldError(f"payload.task.{name}", "unknown field") for name in found if name not in _TASK_FIELDS]
    version = found.get("schemaVersion")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        faults.append(FieldError("payload.task.schemaVersion", f"must be {SCHEMA_VERSION}"))
    for name, form in (("taskId", TASK_ID), ("type", TASK_TYPE)):
        value = found.get(name)
        if not isinstance(value, str) or not form.fullmatch(value):
            faults.append(FieldError(f"payload.task.{name}", f"text of the form {form.pattern}"))
    message = found.get("message")
    if not isinstance(message, str) or not message or "\0" in message:
        faults.append(FieldError("payload.task.message", "text that is not empty"))
    elif len(message.encode(errors="surrogatepass")) > MAX_MESSAGE_BYTES:
        faults.append(FieldError("payload.task.message", f"at most {MAX_MESSAGE_BYTES} bytes"))
    elif not _is_unicode(message):
        faults.append(FieldError("payload.task.message", "text in Unicode, without lone surrogates"))
    if found.get("callbackUrl"):
        faults.append(FieldError("payload.task.callbackUrl", "is not called: the result is with the job"))
    if len(faults) > before:
        return None
    return {name: found[name] for name in ("schemaVersion", "taskId", "type", "message")}


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _offers(
    payload: Mapping[str, Any], cattle: Cattle, limits: BotLimits, faults: list[FieldError]
) -> tuple[Offer, ...]:
    """Every allowed combination: what was asked for by name is not replaced by another."""
    chosen: dict[str, tuple[str, ...]] = {}
    for field, everyones, own in (
        ("image", cattle.images, limits.images),
        ("serverType", cattle.server_types, limits.server_types),
        ("location", cattle.locations, limits.locations),
    ):
        allowed = everyones if own is None else tuple(one for one in everyones if one in own)
        asked = payload.get(field)
        if asked is None or asked == "":
            chosen[field] = allowed[:1] if field == "image" else allowed
        elif isinstance(asked, str) and asked in allowed:
            chosen[field] = (asked,)
        else:
            faults.append(FieldError(f"payload.{field}", f"one of {', '.join(allowed) or 'none'}"))
            chosen[field] = ()
    return tuple(
        Offer(image, server_type, location)
        for image in chosen["image"]
        for server_type in chosen["serverType"]
        for location in chosen["location"]
    )


def task_text(task: Mapping[str, Any]) -> str:
    """The task as the machine gets it."""
    return json.dumps(task, ensure_ascii=True, sort_keys=True) + "\n"
