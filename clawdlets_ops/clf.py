"""``clf``: for bots. Asks clf-orchestrator over its unix socket; needs no secret, and holds none.

Exit status: 0 done; 2 the request is wrong or refused; 3 the orchestrator cannot be reached; 4 the job failed, was canceled, is not
there or cannot be canceled; 1 anything else, also a wait that ran out.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from clawdlets_ops.layout import ORCHESTRATOR_SOCKET
from clawdlets_ops.orchestrator.client import TIMEOUT_S, Client, ClientError, Exit

PAYLOAD_BYTES = 262_144


def main() -> None:
    """Console script."""
    try:
        clf.main(standalone_mode=False)
    except ClientError as error:
        click.echo(f"clf: {error}", err=True)
        for one in error.fields:
            click.echo(f"  {one.get('field')}: {one.get('message')}", err=True)
        sys.exit(error.exit)
    except click.ClickException as error:
        error.show()
        sys.exit(Exit.USER)
    except click.Abort:
        sys.exit(130)


@click.group()
@click.option("--socket", "socket_path", default=None, help=f"Default: $CLF_SOCKET, else {ORCHESTRATOR_SOCKET.path}.")
@click.option("--timeout", "timeout_s", type=float, default=TIMEOUT_S, show_default=True, help="Of one request, in s.")
@click.pass_context
def clf(context: click.Context, socket_path: str | None, timeout_s: float) -> None:
    """Ask the host's orchestrator for work, as the bot that this user is."""
    path = socket_path or os.environ.get("CLF_SOCKET") or str(ORCHESTRATOR_SOCKET.path)
    context.obj = Client(path, timeout_s)


@clf.group()
def jobs() -> None:
    """Jobs of this bot."""


as_json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable.")


@jobs.command()
@click.argument("kind")
@click.option("--payload", help="JSON object, @FILE, or - for standard input.", required=True)
@click.option("--idempotency-key", default="", help="The same key and payload within a day is the same job.")
@click.option("--run-at", default="", help="ISO 8601, not before then.")
@click.option("--priority", type=int, default=0)
@click.option("--wait", "wait_s", type=float, default=None, metavar="SECONDS", help="Wait for its end as well.")
@as_json_option
@click.pass_obj
def enqueue(
    client: Client,
    kind: str,
    payload: str,
    idempotency_key: str,
    run_at: str,
    priority: int,
    wait_s: float | None,
    as_json: bool,
) -> None:
    """Ask for a job of KIND; prints its id."""
    job_id = client.enqueue(kind, _payload(payload), idempotency_key=idempotency_key, run_at=run_at, priority=priority)
    if wait_s is not None:
        _ended(client.wait(job_id, timeout_s=wait_s), as_json)
    elif as_json:
        click.echo(json.dumps({"jobId": job_id}))
    else:
        click.echo(job_id)


@jobs.command("list")
@click.option("--status", default="", help="queued, running, done, failed, canceled; several with commas.")
@click.option("--kind", default="", help="Several with commas.")
@click.option("--requester", default="", help="For operators: one bot's jobs.")
@click.option("--limit", type=click.IntRange(1, 500), default=50, show_default=True)
@as_json_option
@click.pass_obj
def list_jobs(client: Client, status: str, kind: str, requester: str, limit: int, as_json: bool) -> None:
    """The newest jobs first: one's own, or for an operator all."""
    found = client.list_jobs(status=status, kind=kind, requester=requester, limit=limit)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for job in found:
        click.echo(
            f"{job['jobId']}  {job['status']:8}  {job['kind']:14}  {job['requester']:16}  {job['createdAt']}"
            + (f"  {job['lastError']}" if job["lastError"] else "")
        )


@jobs.command()
@click.argument("job_id")
@as_json_option
@click.pass_obj
def show(client: Client, job_id: str, as_json: bool) -> None:
    """One job, with its payload and its result."""
    _print(client.show(job_id), as_json)


@jobs.command()
@click.argument("job_id")
@as_json_option
@click.pass_obj
def cancel(client: Client, job_id: str, as_json: bool) -> None:
    """Ask for a job to be canceled; a running one is, once its worker has cleaned up."""
    client.cancel(job_id)
    click.echo(json.dumps({"ok": True}) if as_json else f"cancel of {job_id} is asked for")


@jobs.command()
@click.argument("job_id")
@click.option("--timeout", "timeout_s", type=float, default=300.0, show_default=True, help="In seconds.")
@as_json_option
@click.pass_obj
def wait(client: Client, job_id: str, timeout_s: float, as_json: bool) -> None:
    """Wait until a job has ended; exit status 0 when it is done, 4 when it failed or was canceled."""
    _ended(client.wait(job_id, timeout_s=timeout_s), as_json)


def _ended(job: Any, as_json: bool) -> None:
    _print(job, as_json)
    if job["status"] != "done":
        sys.exit(Exit.JOB)


def _print(job: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(job, indent=2))
        return
    for name, value in job.items():
        text = value if isinstance(value, str | int) else json.dumps(value, indent=2)
        click.echo(f"{name}: {text}")


def _payload(text: str) -> Any:
    """The JSON object in ``text``, in a file (@FILE) or on standard input (-)."""
    try:
        if text == "-":
            content = sys.stdin.buffer.read(PAYLOAD_BYTES + 1)
        elif text.startswith("@"):
            with Path(text[1:]).open("rb") as handle:
                content = handle.read(PAYLOAD_BYTES + 1)
        else:
            content = os.fsencode(text)
    except OSError as error:
        raise click.UsageError(f"--payload cannot be read: {error.strerror}") from error
    if len(content) > PAYLOAD_BYTES:
        raise click.UsageError(f"--payload is larger than {PAYLOAD_BYTES} bytes")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"--payload is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise click.UsageError("--payload is not a JSON object")
    return value


if __name__ == "__main__":
    main()
