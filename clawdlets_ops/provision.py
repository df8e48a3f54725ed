"""Provision: the server, its key and its firewall as declared, through OpenTofu; compared with what the API shows.

``plan`` is pure. The public SSH window of a host that is declared ``tailnet`` is open from creation until lockdown; once
it has been closed a later provision keeps it closed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from clawdlets_ops.errors import CloudError, PlanRefused, SettingsError
from clawdlets_ops.files import ensure_dir, locked, write_atomic
from clawdlets_ops.fleet import Host
from clawdlets_ops.hetzner import (
    HOST_LABEL,
    MANAGED_BY,
    MANAGER,
    Cloud,
    Firewall,
    FirewallRule,
    Server,
    SshKey,
    fingerprint_md5,
    is_ours,
)
from clawdlets_ops.process import Runner
from clawdlets_ops.project import Project, read_public_key
from clawdlets_ops.tofu import Change, Tofu, escape, gate

PROVIDER_SOURCE = "hetznercloud/hcloud"
PROVIDER_VERSION = "~> 1.68"
TAILSCALE_UDP_PORT = "41641"
WORLD = ("0.0.0.0/0", "::/0")
RULES_APPLIED_WITHIN_S = 60.0
LOCK_WAIT_S = 600.0
RUNNING = "running"
ON_THE_WAY = ("initializing", "starting", "rebuilding", "migrating")

# The provider sends no request when the last rule is removed (its issue 1482): a set is never empty. This rule lets
# nothing in: 192.0.2.0/24 is not routed (RFC 5737).
NEVER_MATCHES = FirewallRule("in", "tcp", "1", ("192.0.2.1/32",), "keeps the rule set from being empty")

KEY, FIREWALL, SERVER = "hcloud_ssh_key.operator", "hcloud_firewall.edge", "hcloud_server.host"


@dataclass(frozen=True)
class Observed:
    """What the API showed for one host."""

    server: Server | None
    firewall: Firewall | None
    ssh_key: SshKey | None


@dataclass(frozen=True)
class ProvisionPlan:
    """What is to be done. ``steps`` are for people; ``window_open`` says whether tcp/22 stays open at the edge."""

    host: str
    steps: tuple[str, ...]
    window_open: bool
    config: dict[str, Any]
    adopt: dict[str, int]

    @property
    def empty(self) -> bool:
        """True when the cloud is as declared."""
        return not self.steps

    def __str__(self) -> str:
        return "\n".join(self.steps) or "nothing to do"


def firewall_name(host: str) -> str:
    """The name of a host's cloud firewall."""
    return f"{host}-edge"


def window_is_open(declared: Host, observed: Observed) -> bool:
    """Whether tcp/22 should be open at the edge now: it opens with a new server and is never reopened by itself."""
    if declared.ssh_exposure.mode != "tailnet":
        return True
    if observed.server is None:
        return True
    return observed.firewall is None or observed.firewall.ssh_is_open


def edge_rules(declared: Host, *, window_open: bool) -> tuple[FirewallRule, ...]:
    """The cloud firewall's whole rule set."""
    rules = []
    if window_open:
        networks = tuple(sorted(declared.provisioning.admin_cidrs))
        rules.append(FirewallRule("in", "tcp", "22", networks, "SSH for the admin networks"))
    if declared.tailnet.mode == "tailscale" and declared.tailnet.allow_udp_ingress:
        rules.append(FirewallRule("in", "udp", TAILSCALE_UDP_PORT, WORLD, "direct Tailscale connections"))
    return tuple(sorted(rules or [NEVER_MATCHES]))


def plan(
    host: str, declared: Host, observed: Observed, *, public_key: str, endpoint: str, window_open: bool | None = None
) -> ProvisionPlan:
    """Compare declared with observed; pure. CloudError for a server of this name that is not ours, PlanRefused for a
    difference that would need a new server. ``window_open`` is set by lockdown, else derived."""
    server, firewall, key = observed.server, observed.firewall, observed.ssh_key
    for what, found in (("server", server), ("firewall", firewall)):
        if found is not None and not is_ours(found.labels, host):
            raise CloudError(
                f"there is already a {what} called {found.name!r} (id {found.id}) that this project did not make",
                where=f"hosts.{host}",
                fix=f"give the host another name, or label that {what} {MANAGED_BY}={MANAGER},{HOST_LABEL}={host} if it is this host",
            )
    if server is not None:
        if server.status not in (RUNNING, *ON_THE_WAY):
            # Its creation may have failed, or somebody stopped it: neither is ours to decide, and it is never deleted here.
            raise CloudError(
                f"the server exists (id {server.id}), but is {server.status}",
                where=f"hosts.{host}",
                fix="look at its console; power it on, or, if it holds nothing, delete it there, and run again",
            )
        for field, found_value, wanted in (
            ("serverType", server.server_type, declared.hetzner.server_type),
            ("location", server.location, declared.hetzner.location),
        ):
            if found_value != wanted:
                raise PlanRefused(
                    f"is declared {wanted}, the server has {found_value}: changing it would stop or replace the server",
                    where=f"hosts.{host}.hetzner.{field}",
                    fix=f"declare {found_value}, or make a new host",
                )
    window = window_is_open(declared, observed) if window_open is None else window_open
    rules = edge_rules(declared, window_open=window)
    steps = []
    if key is None:
        steps.append(f"add the SSH key {fingerprint_md5(public_key)}")
    if firewall is None:
        steps.append(f"create the firewall {firewall_name(host)}: {'; '.join(map(str, rules))}")
    elif firewall.rules != rules:
        gone = [f"close {rule}" for rule in firewall.rules if rule not in rules]
        new = [f"open {rule}" for rule in rules if rule not in firewall.rules]
        steps.append(f"change the firewall {firewall.name}: {'; '.join(gone + new)}")
    if server is None:
        steps.append(
            f"create the server {host} ({declared.hetzner.server_type}, {declared.hetzner.location}, {declared.hetzner.image})"
        )
    elif firewall is not None and firewall.id not in server.firewalls:
        steps.append(f"attach the firewall {firewall.name} to {host}")
    elif server is not None and firewall is None:
        steps.append(f"attach the new firewall to {host}")
    if server is not None and server.status != RUNNING:
        steps.append(f"wait for the server, which is {server.status}")
    owned_key = key is None or is_ours(key.labels, host)
    adopt = {address: found.id for address, found in ((FIREWALL, firewall), (SERVER, server)) if found is not None}
    if key is not None and owned_key:
        adopt[KEY] = key.id
    return ProvisionPlan(
        host=host,
        steps=tuple(steps),
        window_open=window,
        config=render(host, declared, rules, public_key=public_key, endpoint=endpoint, own_key=owned_key),
        adopt=adopt,
    )


def render(
    host: str, declared: Host, rules: tuple[FirewallRule, ...], *, public_key: str, endpoint: str, own_key: bool
) -> dict[str, Any]:
    """The OpenTofu configuration of one host, in JSON syntax. A key that another host's state owns is only looked up."""
    labels = {MANAGED_BY: MANAGER, HOST_LABEL: host}
    kind, body = public_key.split()[:2]
    resources: dict[str, Any] = {
        "hcloud_firewall": {
            "edge": {"name": firewall_name(host), "labels": labels, "rule": [_render_rule(rule) for rule in rules]}
        },
        "hcloud_server": {
            "host": {
                "name": host,
                "server_type": declared.hetzner.server_type,
                "location": declared.hetzner.location,
                "image": declared.hetzner.image,
                "labels": labels,
                "ssh_keys": ["${%s.id}" % (KEY if own_key else f"data.{KEY}")],
                "firewall_ids": ["${%s.id}" % FIREWALL],  # noqa: UP031
                # Changing one of these would replace the server; after the installation they mean nothing any more.
                "lifecycle": {"ignore_changes": ["user_data", "image", "ssh_keys"], "prevent_destroy": True},
            }
        },
    }
    config: dict[str, Any] = {
        "terraform": {
            "required_version": ">= 1.10",
            "required_providers": {"hcloud": {"source": PROVIDER_SOURCE, "version": PROVIDER_VERSION}},
        },
        "provider": {"hcloud": {"endpoint": escape(endpoint), "poll_interval": "500ms", "poll_function": "constant"}},
        "resource": resources,
        "output": {
            "server_id": {"value": "${%s.id}" % SERVER},  # noqa: UP031
            "ipv4": {"value": "${%s.ipv4_address}" % SERVER},  # noqa: UP031
            "ipv6": {"value": "${%s.ipv6_address}" % SERVER},  # noqa: UP031
        },
    }
    if own_key:
        name = f"clawdlets-{hashlib.sha256(body.encode()).hexdigest()[:12]}"
        resources["hcloud_ssh_key"] = {"operator": {"name": name, "public_key": f"{kind} {body}", "labels": labels}}
    else:
        config["data"] = {"hcloud_ssh_key": {"operator": {"fingerprint": fingerprint_md5(public_key)}}}
    return config


def check_binding(project: Project) -> None:
    """SettingsError when this runtime dir holds the state of another cloud than the one we would talk to now."""
    marker = project.layout.bound_to
    if marker.exists() and marker.read_text().strip() != _binding(project):
        raise SettingsError(
            f"this runtime dir belongs to {marker.read_text().strip()}, not to {_binding(project)}: "
            "their states, keys and secrets are not to be mixed",
            where=str(marker),
            fix="use another checkout for the other environment (or, after the lab, remove .clawdlets and secrets)",
        )


def observe(cloud: Cloud, host: str, public_key: str) -> Observed:
    """Three reads of the API."""
    return Observed(cloud.server(host), cloud.firewall(firewall_name(host)), cloud.ssh_key(fingerprint_md5(public_key)))


def plan_for(project: Project, host: str, *, cloud: Cloud, window_open: bool | None = None) -> ProvisionPlan:
    """The plan against what the API shows now."""
    check_binding(project)
    public_key = read_public_key(project.ssh_public_key_file(host))
    return plan(
        host,
        project.fleet.host(host),
        observe(cloud, host, public_key),
        public_key=public_key,
        endpoint=project.hcloud_endpoint,
        window_open=window_open,
    )


def apply(
    project: Project,
    host: str,
    *,
    runner: Runner,
    cloud: Cloud,
    window_open: bool | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Server:
    """Bring the cloud to the plan and prove by reading it back; returns the server.

    Under a lock for the project (hosts share the SSH key), which a killed run's OpenTofu keeps until it has ended; the
    plan is therefore made anew inside.
    """
    token = project.token
    with locked(project.layout.lock("cloud"), what="the cloud", wait_s=LOCK_WAIT_S) as lock_fd:
        planned = plan_for(project, host, cloud=cloud, window_open=window_open)
        if planned.empty:
            return _read_back(planned, project.fleet.host(host), cloud, project.poll_interval_s)
        ensure_dir(project.layout.tofu_dir(host))
        write_atomic(project.layout.bound_to, _binding(project) + "\n")
        tofu = Tofu(
            runner,
            project.layout.tofu_dir(host),
            token=token,
            cli_config=project.environ.get("TF_CLI_CONFIG_FILE"),
            lock_fds=(lock_fd,),
        )
        tofu.prepare(planned.config)
        orphans = {address: ident for address, ident in planned.adopt.items() if address not in tofu.owned()}
        if orphans:
            # Made by us in an earlier run whose state was lost or cut short: taken over, never made twice.
            say(f"adopt {', '.join(sorted(orphans))}")
            imports = [{"to": address, "id": str(ident)} for address, ident in sorted(orphans.items())]
            tofu.prepare({**planned.config, "import": imports})
        planned_changes = tofu.plan()
        gate(
            planned_changes,
            host=host,
            allowed=lambda change: _is_ours_to_do(change, server_exists=SERVER in planned.adopt),
        )
        for change in planned_changes:
            say(str(change))
        if planned_changes or orphans:
            tofu.apply()
        if orphans:
            tofu.prepare(planned.config)
        server = _read_back(planned, project.fleet.host(host), cloud, project.poll_interval_s)
        said = tofu.outputs()
        if str(said.get("server_id")) != str(server.id) or said.get("ipv4") != server.ipv4:
            raise CloudError(
                f"OpenTofu's state speaks of server {said.get('server_id')}, the API of {server.id}",
                where=f"hosts.{host}",
            )
        return server


def _render_rule(rule: FirewallRule) -> dict[str, Any]:
    networks = "source_ips" if rule.direction == "in" else "destination_ips"
    rendered: dict[str, Any] = {
        "direction": rule.direction,
        "protocol": rule.protocol,
        networks: list(rule.networks),
        "description": rule.description,
    }
    return {**rendered, "port": rule.port} if rule.port else rendered


def _is_ours_to_do(change: Change, *, server_exists: bool) -> bool:
    """Whether a plan's change is one that provisioning is about: making what is missing, and the firewall's rules."""
    if change.actions == ("create",):
        return not (change.address == SERVER and server_exists)
    # An adopted or drifted server may get its labels and firewall back; what would stop it is refused in plan().
    return change.actions == ("update",)


def _read_back(planned: ProvisionPlan, declared: Host, cloud: Cloud, poll_s: float) -> Server:
    """The server, once the API shows exactly what was planned; the provider's word alone is not enough (its issues
    1482, 931, 998)."""
    wanted = edge_rules(declared, window_open=planned.window_open)

    def look() -> tuple[Server | None, str]:
        server, firewall = cloud.server(planned.host), cloud.firewall(firewall_name(planned.host))
        if server is None or firewall is None:
            return None, "the server or its firewall is not there"
        if firewall.rules != wanted:
            return (
                None,
                f"the firewall has [{'; '.join(map(str, firewall.rules))}], wanted [{'; '.join(map(str, wanted))}]",
            )
        if server.firewalls.get(firewall.id) != "applied":
            return None, f"the firewall is {server.firewalls.get(firewall.id, 'not attached')}"
        if server.status != RUNNING:
            return None, f"the server is {server.status}"
        return server, ""

    server, why = Retrying(
        stop=stop_after_delay(RULES_APPLIED_WITHIN_S),
        wait=wait_fixed(poll_s),
        retry=retry_if_result(lambda found: found[0] is None),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else (None, "no answer"),
    )(look)
    if server is None:
        raise CloudError(
            f"the API does not show what was asked for: {why}",
            where=f"hosts.{planned.host}",
            fix="run again; if it stays, look at the project's console",
        )
    return server


def _binding(project: Project) -> str:
    """What a runtime dir is bound to. The lab's port changes with every start, so the lab is bound by its name."""
    return "the lab" if project.environ.get("CLAWDLETS_ENVIRONMENT") == "lab" else project.hcloud_endpoint
