"""The orchestrator as a process of its own, with kinds of jobs for tests and people by uid: ``CONFIG.json WHO.json``.

Without the second, people are this machine's users and groups, as in the field."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from clawdlets_ops.orchestrator import daemon
from clawdlets_ops.orchestrator.identity import Who
from clawdlets_ops.orchestrator.jobs import Context, FieldError, Job, Kind
from clawdlets_ops.orchestrator.vending import Needs

SECRETS = {"MODEL_KEY": "model_key", "OTHER_KEY": "other_key"}


def validate(payload: Any, requester: str) -> list[FieldError]:
    faults = [FieldError(f"payload.{name}", "unknown field") for name in payload if name not in ("text", "log")]
    if not isinstance(payload.get("text", ""), str):
        faults.append(FieldError("payload.text", "must be text"))
    return faults


def count(job: Job, context: Context) -> Any:
    """Says in the file ``log`` that it began and ended this attempt."""
    with Path(job.payload["log"]).open("a") as handle:
        handle.write(f"begin {job.job_id} {job.attempt} {os.getpid()}\n")
        handle.flush()
        context.remember(step=1)
        context.check()
        handle.write(f"end {job.job_id} {job.attempt} {os.getpid()}\n")
    return {"attempt": job.attempt}


def slow(job: Job, context: Context) -> Any:
    context.sleep(600)


def undo(job: Job, context: Context) -> None:
    context.note("cleaned up")


def make_work(parts: daemon.Parts) -> daemon.Work:
    wait = int(os.environ.get("LEASE_S", "5"))
    return daemon.Work(
        kinds=[
            Kind("later", validate, lambda job, context: time.sleep(0), max_attempts=1),
            Kind("count", validate, count, max_attempts=20, lease_s=wait, max_unfinished=1000),
            Kind("slow", validate, slow, clean_up=undo, lease_s=wait),
            Kind("reap", validate, lambda job, context: None, operators_only=True),
        ],
        look=lambda grant: Needs(SECRETS, any_of=[["MODEL_KEY", "OTHER_KEY"]]),
    )


def main() -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    config = daemon.read_config(Path(sys.argv[1]))
    if len(sys.argv) < 3:
        return daemon.run(config, os.environ, make_work)
    people = {int(uid): Who(*who) for uid, who in json.loads(Path(sys.argv[2]).read_text()).items()}
    return daemon.run(config, os.environ, make_work, identify=people.get)


if __name__ == "__main__":
    sys.exit(main())
