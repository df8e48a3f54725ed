"""``clawdlets lockdown | open | close``: public SSH closed for good, opened for a while, closed again."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import click

from clawdlets_ops import lockdown as lockdowns
from clawdlets_ops import workflow
from clawdlets_ops.commands.context import with_project
from clawdlets_ops.errors import LockdownError
from clawdlets_ops.hetzner import Server
from clawdlets_ops.project import Project
from clawdlets_ops.rollout import pool
from clawdlets_ops.secrets import store


@click.command()
@click.option("--host", "hosts", multiple=True, help="This host; repeatable.")
@click.option("--all", "every", is_flag=True, help="Every host that is declared tailnet.")
@click.option(
    "--canary",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="So many hosts first, one after the other; the others only when all of these are locked down.",
)
@click.option(
    "--parallel", type=click.IntRange(1, 16), default=1, show_default=True, help="Hosts at a time, after the canaries."
)
@with_project
def lockdown(project: Project, hosts: tuple[str, ...], every: bool, canary: int, parallel: int) -> None:
    """Close public SSH, at the edge and on the host, as a transaction: both, or neither.

    Exit status: 0 every host is locked down; 1 one is not, and is as before.
    """
    chosen = choose(project, hosts, every=every)
    stop = threading.Event()
    tools = workflow.tools_for(
        project, stop=stop, listen=lambda host, _, text: click.echo(f"{host}: {text.removeprefix('step: ')}", err=True)
    )

    def flow(host: str) -> Iterator[workflow.Outcome]:
        yield workflow.apply("lockdown", project, host, tools)

    ends: list[pool.HostEnd] = []
    with pool.stopped_by_signals(stop):
        for number, host in enumerate(chosen[:canary]):
            ends += pool.run(flow, [host], parallel=1, stop=stop)
            if not ends[-1].ok:
                ends += [pool.HostEnd(left, pool.State.NOT_BEGUN) for left in chosen[number + 1 :]]
                break
        else:
            ends += pool.run(flow, chosen[canary:], parallel=parallel, stop=stop)
    for end in ends:
        click.echo(f"{end.host}: {end.state}{f': {end.text}' if end.text else ''}")
    sys.exit(0 if all(end.ok for end in ends) else 1)


def choose(project: Project, hosts: tuple[str, ...], *, every: bool) -> list[str]:
    """The hosts that are meant; FleetError, LockdownError for one that is not declared to be locked down."""
    if bool(hosts) == every:
        raise click.UsageError("name hosts with --host, or say --all")
    declared = project.fleet.hosts
    if every:
        chosen = [name for name, host in declared.items() if host.ssh_exposure.mode == "tailnet"]
        if not chosen:
            raise LockdownError("no host is declared tailnet", where="hosts", fix="set sshExposure.mode to tailnet")
        return chosen
    for name in hosts:
        mode = project.fleet.host(name).ssh_exposure.mode
        if mode != "tailnet":
            raise LockdownError(
                f"is declared {mode}, and nothing is closed that is declared open",
                where=f"hosts.{name}.sshExposure.mode",
                fix="declare tailnet (with tailnet.mode tailscale), and run again",
            )
    return list(dict.fromkeys(hosts))


@click.command("open")
@click.argument("host")
@click.option("--for", "length", required=True, metavar="30m", help="How long: 1m to 4h.")
@click.option("--cidr", "cidrs", multiple=True, required=True, help="From which network; repeatable, at most 8.")
@with_project
def open_host(project: Project, host: str, length: str, cidrs: tuple[str, ...]) -> None:
    """A breakglass window: public SSH to HOST for some networks and some minutes. It closes by itself.

    For a host that is locked down. The host's own timer and a watchdog on this machine end it; the label clawdlets-window
    on its firewall says when. `clawdlets close HOST` ends it at once.
    """
    project.fleet.host(host)
    networks, span = lockdowns.parse_networks(cidrs), lockdowns.parse_duration(length)
    tools = workflow.tools_for(project)
    server = _server(tools, host)
    with tools.journal.stage(host, "window") as note:

        def say(text: str) -> None:
            note(text)
            click.echo(text, err=True)

        window = lockdowns.open_window(
            project, host, networks, span, runner=tools.runner, cloud=tools.cloud, server=server,
            pin=store.host_ssh_pin(project, host), say=say, journal=tools.journal.folder,
        )  # fmt: skip
    click.echo(f"{host}: open to {', '.join(window.networks)} until {window.until:%Y-%m-%d %H:%M:%S} UTC")
    if window.by_hand:
        click.echo(f"only the edge is open; on the host's console, as root: {window.by_hand}")


@click.command()
@click.argument("host")
@with_project
def close(project: Project, host: str) -> None:
    """End the breakglass window of HOST now, and look from outside whether it is closed."""
    project.fleet.host(host)
    tools = workflow.tools_for(project)
    server = _server(tools, host)
    with tools.journal.stage(host, "window") as note:

        def say(text: str) -> None:
            note(text)
            click.echo(text, err=True)

        after = lockdowns.close_window(
            project, host, runner=tools.runner, cloud=tools.cloud, server=server,
            pin=store.host_ssh_pin(project, host), say=say,
        )  # fmt: skip
    click.echo(str(after))
    if unknown := after.unknown():
        click.echo(f"unknown: {'; '.join(unknown)}")
        sys.exit(2)


def _server(tools: workflow.Tools, host: str) -> Server:
    if (server := tools.cloud.server(host)) is None:
        raise LockdownError("there is no such server", where=host, fix="provision and install it first")
    return server
