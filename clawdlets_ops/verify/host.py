"""Verify one host of a project: gather what is expected and what the API shows, then run the shipped suite."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clawdlets_ops import provision, tailnet
from clawdlets_ops.errors import VerifyError
from clawdlets_ops.hetzner import Cloud, Firewall, Server
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets import store
from clawdlets_ops.verify import repository
from clawdlets_ops.verify.catalogue import catalogue
from clawdlets_ops.verify.expectation import build_expectation
from clawdlets_ops.verify.run import Report, verify_host


def verify(project: Project, host: str, *, runner: Runner, cloud: Cloud, only: Sequence[str] = ()) -> Report:
    """Run the suite against ``host``, or those checks of it that ``only`` names; VerifyError when there is no such server.
    A failed check is in the report.

    As a stage does it: of the repository nothing but GIT-01 is looked at, because other hosts' stages may be writing to the
    runtime dir at the same time. ``fleet.verify_fleet`` looks at all of it.
    """
    return verify_host(
        project,
        host,
        expect(project, host, cloud=cloud, seen=lambda: peers(project, (host,), runner=runner)),
        runner=runner,
        report_dir=report_folder(project, host),
        only=only or repository.without(catalogue()),
        diagnose=lambda: repository.diagnose_ignored(project, runner=runner),
    )


def report_folder(project: Project, host: str) -> Path:
    """Where a report made now goes."""
    return project.layout.reports(host) / datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")


def peers(project: Project, hosts: Collection[str], *, runner: Runner) -> tuple[tailnet.Peer, ...]:
    """What this machine's tailscale sees, asked once; nothing when no host is on a tailnet, or it is not installed."""
    wanted = any(project.fleet.host(host).tailnet.mode != "none" for host in hosts)
    return tailnet.look(runner) if wanted and runner.which("tailscale") is not None else ()


def expect(
    project: Project, host: str, *, cloud: Cloud, seen: Callable[[], Collection[tailnet.Peer]]
) -> dict[str, Any]:
    """The expectation for ``host`` as it is declared and as the API shows it now; VerifyError when there is no such server.
    ``seen`` is asked for a host on a tailnet; ClawdletsError of its own."""
    declared = project.fleet.host(host)
    server, firewall = cloud.server(host), cloud.firewall(provision.firewall_name(host))
    if server is None:
        raise VerifyError("there is no such server", where=host, fix="bootstrap it first")
    node = tailnet.named(seen(), host) if declared.tailnet.mode != "none" else None
    inside = node.addresses if node else {}
    if declared.target_host:
        address = declared.target_host.rpartition("@")[2]
        inside = {6 if ":" in address else 4: address}
    return build_expectation(
        host=host,
        declared=declared,
        mode=declared.ssh_exposure.mode,
        public=server.addresses,
        tailnet=inside,
        tailnet_ports=project.fleet.tailnet_ports(host),
        pin=store.host_ssh_pin(project, host),
        admin_keys=project.admin_keys(host),
        identity_file=str(project.ssh_identity_file(host)),
        vantages=project.vantages,
        cloud=_as_observed(server, firewall),
        node=node,
    )


def _as_observed(server: Server, firewall: Firewall | None) -> dict[str, Any]:
    """The API's account, for the checks that read it."""
    attached: list[dict[str, Any]] = []
    if firewall is not None and firewall.id in server.firewalls:
        rules: list[dict[str, Any]] | None = [
            {
                "direction": rule.direction,
                "protocol": rule.protocol,
                "port": rule.port,
                "sourceIps": list(rule.networks),
            }
            for rule in firewall.rules
        ]
        attached.append({"name": firewall.name, "status": server.firewalls[firewall.id], "rules": rules})
    # A firewall that we do not know by name is still attached: shown without rules, so that it is never read as closed.
    for ident in server.firewalls.keys() - ({firewall.id} if firewall else set()):
        attached.append({"name": f"(id {ident})", "status": server.firewalls[ident], "rules": None})
    return {
        "server": {
            "name": server.name,
            "status": server.status,
            "labels": dict(server.labels),
            "privateAddresses": sorted(server.private_addresses),
        },
        "firewalls": attached,
    }
