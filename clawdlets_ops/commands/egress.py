"""``clawdlets egress``: what may go out of a host, why, and what was held back."""

from __future__ import annotations

import json
import sys

import click

from clawdlets_ops import denials, workflow
from clawdlets_ops.commands.context import with_project
from clawdlets_ops.egress import explain, policy_of
from clawdlets_ops.project import Project


@click.group()
def egress() -> None:
    """What may go out of a host: the policy, explained, and what it has held back."""


@egress.command("explain")
@click.argument("host")
@click.argument("url")
@click.option("--bot", help="Ask for this bot; without it, for the host's own programs.")
@click.option("--json", "as_json", is_flag=True)
@with_project
def egress_explain(project: Project, host: str, url: str, bot: str | None, *, as_json: bool) -> None:
    """Whether URL (or NAME:PORT) can be reached from HOST, and by which rule. Exit status 1: it cannot."""
    answer = explain(policy_of(project.fleet.host(host)), url, bot=bot)
    rule = f"hosts.{host}.{answer.rule}" if "." in answer.rule else answer.rule
    if as_json:
        click.echo(json.dumps({"allowed": answer.allowed, "rule": rule, "why": answer.why}, indent=2))
    else:
        click.echo(f"{'allowed' if answer.allowed else 'denied'}  {rule}: {answer.why}")
    if not answer.allowed:
        sys.exit(1)


@egress.command("log")
@click.argument("host")
@click.option("--json", "as_json", is_flag=True)
@with_project
def egress_log(project: Project, host: str, *, as_json: bool) -> None:
    """What HOST's policy has held back: packets since its rules were loaded, requests of the last 24 hours."""
    tools = workflow.tools_for(project)
    found = denials.fetch(project, host, runner=tools.runner, cloud=tools.cloud)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
        return
    mode = project.fleet.host(host).egress.mode
    if mode == "none":
        click.echo("egress.mode is none: NOTHING of the host itself is held back, mail included", err=True)
    for rule, packets in sorted(found.packets.items()):
        click.echo(f"{packets:>9} packets  {denials.RULES.get(rule, rule)}")
    for user, packets in sorted(found.confined.items()):
        click.echo(f"{packets:>9} packets  sent in all by {user}")
    for one in found.denied:
        who = one.bot or "host"
        click.echo(f"{one.at:%Y-%m-%d %H:%M:%S}Z  {who:12}  {one.status:20}  {one.method} {one.name}:{one.port}")
    if not found.denied:
        click.echo("the proxy denied nothing in the last 24 hours")
