"""Verify one host of a project: gather what is expected and what the API shows, then run the shipped suite."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from clawdlets_ops import lockdown, provision
from clawdlets_ops.errors import VerifyError
from clawdlets_ops.hetzner import Cloud, Firewall, Server
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project
from clawdlets_ops.secrets import store
from clawdlets_ops.verify.expectation import build_expectation
from clawdlets_ops.verify.run import Report, verify_host


def verify(project: Project, host: str, *, runner: Runner, cloud: Cloud, only: Sequence[str] = ()) -> Report:
    """Run the suite against ``host``, or those checks of it that ``only`` names; VerifyError when there is no such server.
    A failed check is in the report."""
    declared = project.fleet.host(host)
    server, firewall = cloud.server(host), cloud.firewall(provision.firewall_name(host))
    if server is None:
        raise VerifyError("there is no such server", where=host, fix="bootstrap it first")
    expectation = build_expectation(
        host=host,
        declared=declared,
        mode=declared.ssh_exposure.mode,
        public=server.addresses,
        tailnet=lockdown.tailnet_addresses(runner, host, declared),
        pin=store.host_ssh_pin(project, host),
        admin_keys=project.admin_keys(host),
        identity_file=str(project.ssh_identity_file(host)),
        vantages=project.vantages,
        cloud=_as_observed(server, firewall),
        node=lockdown.tailnet_peer(runner, host, declared),
    )
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    folder = project.layout.reports(host) / stamp
    return verify_host(project, host, expectation, runner=runner, report_dir=folder, only=only)


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
        "server": {"name": server.name, "status": server.status, "labels": dict(server.labels)},
        "firewalls": attached,
    }
