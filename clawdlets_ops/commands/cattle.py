"""``clawdlets cattle``: the throw-away servers, for operators. Bots use ``clf jobs``."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import UTC, datetime
from typing import Any, NoReturn

import click

from clawdlets_ops.cattle import labels, personas, reap, userdata
from clawdlets_ops.cattle.wiring import SPAWN, cloud_of
from clawdlets_ops.cloud import Server
from clawdlets_ops.commands.context import with_project
from clawdlets_ops.errors import CattleError
from clawdlets_ops.files import ensure_dir
from clawdlets_ops.herd import secrets_of
from clawdlets_ops.hetzner import HetznerCloud
from clawdlets_ops.layout import ORCHESTRATOR_SOCKET
from clawdlets_ops.orchestrator.client import Client
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import Project
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.tailnet import find_peer

ADMIN = "admin"
UNITS = ("clawdlets-cattle.service", "clawdlets-task.service")


@click.group()
def cattle() -> None:
    """Throw-away servers that run one task for a bot: what there is, and what is to go."""


@cattle.command("spawn")
@click.argument("persona")
@click.option("--message", required=True, help="- reads it from standard input.")
@click.option("--ttl", default="", help="Such as 30m; default and maximum are the fleet file's.")
@click.option("--task-id", default="by-hand", show_default=True)
@click.option("--key", default="", help="Idempotency key: asked twice, it is one job.")
@click.option("--socket", "socket_path", default=str(ORCHESTRATOR_SOCKET.path), show_default=True)
def cattle_spawn(persona: str, message: str, ttl: str, task_id: str, key: str, socket_path: str) -> None:
    """Ask the orchestrator for a server, on its host or through a forwarded socket; prints the job's id."""
    text = sys.stdin.read() if message == "-" else message
    task = {"schemaVersion": 1, "taskId": task_id, "type": "clawdbot.gateway.agent", "message": text}
    payload = {"persona": persona, "task": task, **({"ttl": ttl} if ttl else {})}
    click.echo(Client(socket_path).enqueue(SPAWN, payload, idempotency_key=key))


@cattle.command("list")
@click.option("--json", "as_json", is_flag=True)
@with_project
def cattle_list(project: Project, as_json: bool) -> None:
    """Every cattle server in the project, by its labels; those that lack some are marked."""
    rows = [_row(server) for server in _servers(project)[1]]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows or [{}]:
        if not row:
            click.echo("no cattle")
        elif row["missing"]:
            click.echo(
                f"{row['name']}  id {row['id']}  {row['status']}  NOT OURS BY ITS LABELS: {', '.join(row['missing'])}"
            )
        else:
            left = f"{row['secondsLeft'] // 60} min left" if row["secondsLeft"] > 0 else "its time is up"
            click.echo(f"{row['name']}  id {row['id']}  {row['status']}  for {row['bot']}  job {row['job']}  {left}")


@cattle.command("destroy")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_project
def cattle_destroy(project: Project, names: tuple[str, ...], yes: bool) -> None:
    """Delete these servers, each by its name, and only with our whole label set; their jobs then end as failed."""
    cloud, servers = _servers(project)
    chosen = [_named(servers, name) for name in names]
    if not yes:
        click.confirm(f"Delete {', '.join(f'{one.name} (id {one.id})' for one in chosen)}?", abort=True)
    named = (reap.Doomed(one.id, one.name, one.labels[labels.JOB], "an operator named it") for one in chosen)
    _delete(cloud, reap.Plan(tuple(named)))


@cattle.command("reap")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@with_project
def cattle_reap(project: Project, dry_run: bool) -> None:
    """Delete what has outlived its time, by both clocks. The orchestrator does this by itself, and knows of jobs too."""
    cloud = cloud_of(project.token, project.hcloud_endpoint)
    reaper = reap.Reaper(
        host=_home(project),
        cloud=cloud,
        jobs=lambda _: reap.Seen({}, frozenset()),
        clock=lambda: time.time_ns() // 1_000_000,
    )
    plan = reaper.observe()
    click.echo(str(plan))
    if dry_run:
        return
    _delete(cloud, plan)


@cattle.command("persona")
@click.argument("name", required=False)
@with_project
def cattle_persona(project: Project, name: str | None) -> None:
    """What each persona is given: files, variables, names of secrets, and how much of the user data it takes."""
    declared, folder = project.fleet.cattle, project.layout.personas_dir
    if name is not None and name not in declared.personas:
        raise CattleError("is not declared", where=f"cattle.personas.{name}", fix=", ".join(sorted(declared.personas)))
    for persona in [name] if name else sorted(declared.personas):
        said = declared.personas[persona]
        files = personas.read(folder, persona)
        bots = sorted(bot for bot, limits in declared.bots.items() if persona in limits.personas)
        click.echo(f"{persona}: {' '.join(said.command)}; for {', '.join(bots) or 'operators only'}")
        click.echo(f"  files: {', '.join(f'{one.name} ({len(one.content)} bytes)' for one in files) or 'none'}")
        click.echo(f"  variables: {', '.join(sorted(said.variables)) or 'none'}")
        secrets = ", ".join(f"{variable} from {secret}" for variable, secret in sorted(said.secrets.items()))
        click.echo(f"  secrets: {secrets or 'none'}")
        click.echo(f"  user data: {_size(files, said.command)} of {userdata.LIMIT_BYTES} bytes, before the task")
    for secret, by in secrets_of(declared).items():
        if name is None:
            click.echo(f"{secret} is given to {', '.join(by)}")


@cattle.command("ssh", context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@with_project
def cattle_ssh(project: Project, name: str, command: tuple[str, ...]) -> None:
    """A shell on a cattle machine over the tailnet, or COMMAND there. The tailnet says which machine it is; its host key is
    taken at sight and kept for as long as the machine lives."""
    _become(_ssh_argv(project, name, command))


@cattle.command("logs")
@click.argument("name")
@click.option("--follow", "-f", is_flag=True)
@with_project
def cattle_logs(project: Project, name: str, follow: bool) -> None:
    """What a machine's first boot and its task have said."""
    units = [word for unit in UNITS for word in ("-u", unit)]
    _become(_ssh_argv(project, name, ("journalctl", "--no-pager", *units, *(["-f"] if follow else []))))


def _servers(project: Project) -> tuple[HetznerCloud, tuple[Server, ...]]:
    cloud = cloud_of(project.token, project.hcloud_endpoint)
    return cloud, cloud.servers_with({labels.CATTLE: "true"})


def _named(servers: tuple[Server, ...], name: str) -> Server:
    for server in servers:
        if server.name == name:
            if labels.read(server.labels) is None:
                lacks = ", ".join(labels.missing(server.labels))
                raise CattleError(f"has no proper {lacks}: it is not ours by its labels", where=name)
            return server
    raise CattleError("there is no such cattle server", where=name, fix="clawdlets cattle list")


def _delete(cloud: HetznerCloud, plan: reap.Plan) -> None:
    deleted, faults = reap.apply(cloud, plan)
    click.echo(f"deleted: {', '.join(f'{one.name} (id {one.id})' for one in plan.go if one.id in deleted) or 'none'}")
    if faults:
        raise CattleError("; ".join(faults), where="cattle", fix="clawdlets cattle list")


def _row(server: Server) -> dict[str, Any]:
    brand = labels.read(server.labels)
    found: dict[str, Any] = {"id": server.id, "name": server.name, "status": server.status}
    if brand is None:
        return {**found, "missing": list(labels.missing(server.labels))}
    left = brand.deadline_s - int(datetime.now(UTC).timestamp())
    return {
        **found, "missing": [], "persona": brand.persona, "bot": brand.bot, "job": brand.job_id, "secondsLeft": left,
        "orchestrator": brand.orchestrator,
    }  # fmt: skip


def _home(project: Project) -> str:
    if project.fleet.cattle.host is None:
        raise CattleError("is not named", where="cattle.host", fix="name the host whose orchestrator orders cattle")
    return project.fleet.cattle.host


def _size(files: tuple[userdata.PersonaFile, ...], command: tuple[str, ...]) -> int:
    """With stand-ins of the usual length for what is not known yet."""
    parts = userdata.Parts(
        auth_key=Secret("k" * 62), token=Secret("0" * 64), base_url="http://100.100.100.100:18337", token_expires_s=10**9,
        settings={"command": list(command), "name": "n" * 40, "jobId": "j" * 36, "persona": "p" * 12}, task={}, files=files,
    )  # fmt: skip
    return len(userdata.render(parts).reveal().encode())


def _ssh_argv(project: Project, name: str, command: tuple[str, ...]) -> list[str]:
    _, servers = _servers(project)
    server = _named(servers, name)
    peer = find_peer(LocalRunner(project.environ), server.name)
    if peer is None:
        raise CattleError("is not on the tailnet", where=name, fix="clawdlets cattle list; it may be starting, or gone")
    known = ensure_dir(project.layout.runtime / "known_hosts") / f"cattle-{server.id}"
    options = ("StrictHostKeyChecking=accept-new", f"UserKnownHostsFile={known}", "ForwardAgent=no", "BatchMode=yes")
    identity = project.ssh_identity_file(_home(project))
    argv = ["ssh", "-F", "/dev/null", "-i", str(identity), *(word for one in options for word in ("-o", one))]
    return [*argv, f"{ADMIN}@{next(iter(peer.addresses.values()))}", *(["--", *command] if command else [])]


def _become(argv: list[str]) -> NoReturn:
    sys.stdout.flush()
    os.execvp(argv[0], argv)  # noqa: S606  (no shell is what we want)
