"""The OpenTofu configuration of one host, in JSON syntax. Pure.

Canonical CIDRs, ``firewall_ids`` always said and given at creation, no empty rule set: the provider does not carry out the
removal of the last rule (its issue 1482), empties a set that has an address without mask (931), and leaves a firewall
attached that is no longer mentioned (998).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from clawdlets_ops.fleet import Fleet, Host, HttpState, PgState, S3State
from clawdlets_ops.hetzner import HOST_LABEL, MANAGED_BY, MANAGER, FirewallRule, fingerprint_md5
from clawdlets_ops.provision.observed import Observed
from clawdlets_ops.tofu import escape

PROVIDER_SOURCE = "hetznercloud/hcloud"
PROVIDER_VERSION = "~> 1.68"
TAILSCALE_UDP_PORT = "41641"
WORLD = ("0.0.0.0/0", "::/0")
FAMILIES = ("ipv4", "ipv6")

# This rule lets nothing in: 192.0.2.0/24 is not routed (RFC 5737).
NEVER_MATCHES = FirewallRule("in", "tcp", "1", ("192.0.2.1/32",), "keeps the rule set from being empty")

KEY, FIREWALL, SERVER = "hcloud_ssh_key.operator", "hcloud_firewall.edge", "hcloud_server.host"
GROUP = "hcloud_placement_group.apart"

# Changing one of these would replace the server; after the installation they mean nothing any more.
_AFTER_INSTALLATION = ["user_data", "image", "ssh_keys"]

# What ``hold`` does not say and does not change.
_SERVER_AS_IT_IS = (
    *("labels", "ssh_keys", "user_data", "firewall_ids", "placement_group_id", "public_net", "location"),
    *("backups", "iso", "rescue"),
)
_ADDRESS_AS_IT_IS = ("labels", "auto_delete", "assignee_id", "assignee_type")


def firewall_name(host: str) -> str:
    """The name of a host's cloud firewall."""
    return f"{host}-edge"


def address_name(host: str, family: str) -> str:
    """The name of a host's reserved address; ``family`` is ipv4 or ipv6."""
    return f"{host}-{family}"


def volume_name(host: str, volume: str) -> str:
    """What a host's volume is called in the project."""
    return f"{host}-{volume}"


def address_of_ip(family: str) -> str:
    """Where the configuration has the reserved address."""
    return f"hcloud_primary_ip.{family}"


def address_of_volume(volume: str) -> str:
    """Where the configuration has the volume."""
    return f"hcloud_volume.{_label(volume)}"


def edge_rules(declared: Host, *, window_open: bool) -> tuple[FirewallRule, ...]:
    """The cloud firewall's whole rule set."""
    rules = []
    if window_open:
        networks = tuple(sorted(declared.provisioning.admin_cidrs))
        rules.append(FirewallRule("in", "tcp", "22", networks, "SSH for the admin networks"))
    if declared.tailnet.mode == "tailscale" and declared.tailnet.allow_udp_ingress:
        rules.append(FirewallRule("in", "udp", TAILSCALE_UDP_PORT, WORLD, "direct Tailscale connections"))
    return tuple(sorted(rules or [NEVER_MATCHES]))


def labels_of(host: str, declared: Host) -> dict[str, str]:
    """Every label that the host's resources have: who made them, for which host, and what the fleet file adds."""
    return {**declared.hetzner.labels, MANAGED_BY: MANAGER, HOST_LABEL: host}


def key_name(public_key: str) -> str:
    """The name of an operator's key in the project: of its content, as the API has each content once only."""
    return f"clawdlets-{hashlib.sha256(public_key.split()[1].encode()).hexdigest()[:12]}"


def render(
    host: str,
    declared: Host,
    rules: tuple[FirewallRule, ...],
    *,
    public_key: str,
    endpoint: str,
    server_type: str,
    own_key: bool,
    own_group: bool,
    may_replace: bool = False,
) -> dict[str, Any]:
    """The configuration. A key or placement group that another host's state owns is only looked up. With
    ``may_replace`` OpenTofu itself does not forbid the server's end either; the gate still does."""
    labels, order = labels_of(host, declared), declared.hetzner
    kind, body = public_key.split()[:2]
    server: dict[str, Any] = {
        "name": host,
        "server_type": server_type,
        "location": order.location,
        "image": order.image,
        "labels": escape(labels),
        "ssh_keys": [_ref(KEY if own_key else f"data.{KEY}")],
        "firewall_ids": [_ref(FIREWALL)],
        "delete_protection": order.delete_protection,
        "rebuild_protection": order.delete_protection,
        "lifecycle": {"ignore_changes": _AFTER_INSTALLATION, "prevent_destroy": not may_replace},
    }
    resources: dict[str, Any] = {
        "hcloud_firewall": {
            "edge": {
                "name": firewall_name(host),
                "labels": escape(labels),
                "rule": [_render_rule(rule) for rule in rules],
            }
        },
        "hcloud_server": {"host": server},
    }
    data: dict[str, Any] = {}
    if own_key:
        resources["hcloud_ssh_key"] = {
            "operator": {"name": key_name(public_key), "public_key": f"{kind} {body}", "labels": escape(labels)}
        }
    else:
        data["hcloud_ssh_key"] = {"operator": {"fingerprint": fingerprint_md5(public_key)}}
    if order.reserved_ips or not (order.ipv4 and order.ipv6):
        server["public_net"] = {f"{family}_enabled": getattr(order, family) for family in FAMILIES}
    if order.reserved_ips:
        wanted = [family for family in FAMILIES if getattr(order, family)]
        resources["hcloud_primary_ip"] = {
            family: {
                "name": address_name(host, family),
                "type": family,
                "location": order.location,
                "auto_delete": False,
                "delete_protection": order.delete_protection,
                "labels": escape(labels),
                "lifecycle": {"prevent_destroy": not may_replace},
            }
            for family in wanted
        }
        server["public_net"] |= {family: _ref(address_of_ip(family)) for family in wanted}
    if order.placement_group:
        server["placement_group_id"] = _ref(GROUP if own_group else f"data.{GROUP}")
        if own_group:
            group = {"name": order.placement_group, "type": "spread", "labels": escape(labels)}
            resources["hcloud_placement_group"] = {"apart": group}
        else:
            data["hcloud_placement_group"] = {"apart": {"name": order.placement_group}}
    if order.volumes:
        resources["hcloud_volume"] = {
            _label(name): {
                "name": volume_name(host, name),
                "size": volume.size_gb,
                "format": volume.format,
                "server_id": _ref(SERVER),
                "automount": False,
                "delete_protection": order.delete_protection,
                "labels": escape(labels),
                "lifecycle": {"ignore_changes": ["format"], "prevent_destroy": not may_replace},
            }
            for name, volume in sorted(order.volumes.items())
        }
    outputs = {"server_id": "id", "ipv4": "ipv4_address", "ipv6": "ipv6_address"}
    return {
        **frame(endpoint),
        "resource": resources,
        **({"data": data} if data else {}),
        "output": {name: {"value": _ref(SERVER, attribute)} for name, attribute in outputs.items()},
    }


def hold(observed: Observed, *, endpoint: str, group_labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A configuration that leaves everything as it is and takes the delete protection off. It is made of what the API
    shows, so that a host that has left the fleet file, or differs from it, can be destroyed too. ``group_labels`` are new
    ones for the placement group."""
    resources: dict[str, dict[str, Any]] = {}

    def put(address: str, body: Mapping[str, Any], *ignored: str, after: Iterable[str] = ()) -> None:
        kind, _, name = address.partition(".")
        kept = [*(key for key in body if key not in ("delete_protection", "rebuild_protection")), *ignored]
        made = {**escape(body), "lifecycle": {"ignore_changes": sorted(set(kept))}}
        resources.setdefault(kind, {})[name] = {**made, "depends_on": sorted(after)}

    if server := observed.server:
        body = {
            "name": server.name,
            "server_type": server.server_type,
            "image": server.image or "debian-12",
            "delete_protection": False,
            "rebuild_protection": False,
        }
        # The order of creation, turned round, is that of deletion: a volume before its server, and that before the rest.
        before = [address_of_ip(address.family) for address in observed.primary_ips]
        before += [FIREWALL] if observed.firewall else []
        before += [GROUP] if observed.placement_group else []
        put(SERVER, body, *_SERVER_AS_IT_IS, after=before)
    if firewall := observed.firewall:
        put(FIREWALL, {"name": firewall.name}, "labels", "rule")
    if key := observed.ssh_key:
        put(KEY, {"name": key.name, "public_key": key.public_key}, "labels")
    if group := observed.placement_group:
        put(GROUP, {"name": group.name, "type": "spread"}, *(() if group_labels is not None else ("labels",)))
        if group_labels is not None:
            resources["hcloud_placement_group"]["apart"]["labels"] = escape(dict(group_labels))
    for address in observed.primary_ips:
        # The provider wants a location, whatever it is: here it is not compared.
        body = {"name": address.name, "type": address.family, "location": "nbg1", "delete_protection": False}
        put(address_of_ip(address.family), body, *_ADDRESS_AS_IT_IS)
    for volume in observed.volumes:
        body = {"name": volume.name, "size": volume.size_gb, "delete_protection": False}
        name = volume.name.removeprefix(f"{observed.host}-")
        others = ("labels", "server_id", "location", "format", "automount")
        put(address_of_volume(name), body, *others, after=[SERVER] if observed.server else [])
    return {**frame(endpoint), "resource": resources}


def frame(endpoint: str) -> dict[str, Any]:
    """What every configuration has: versions and the provider's settings."""
    return {
        "terraform": {
            "required_version": ">= 1.10",
            "required_providers": {"hcloud": {"source": PROVIDER_SOURCE, "version": PROVIDER_VERSION}},
        },
        "provider": {"hcloud": {"endpoint": escape(endpoint), "poll_interval": "500ms", "poll_function": "constant"}},
    }


def backend(fleet: Fleet, host: str) -> dict[str, Any]:
    """The ``backend`` block of one host's state, without any credential; empty for the runtime dir."""
    match fleet.state:
        case S3State() as state:
            block: dict[str, Any] = {
                "bucket": state.bucket,
                "key": f"{state.prefix}/{host}.tfstate",
                "region": state.region,
                "use_lockfile": True,
            }
            if state.endpoint:  # something that only speaks like S3: no AWS accounts, regions or metadata service
                block |= {
                    "endpoints": {"s3": state.endpoint},
                    "use_path_style": True,
                    "skip_credentials_validation": True,
                    "skip_requesting_account_id": True,
                    "skip_metadata_api_check": True,
                    "skip_region_validation": True,
                    "skip_s3_checksum": True,
                }
            return {"s3": block}
        case PgState() as state:
            return {"pg": {"schema_name": f"{state.schema_prefix}_{host.replace('-', '_')}"}}
        case HttpState() as state:
            address = f"{state.address.rstrip('/')}/{host}"
            lock = {"lock_address": f"{address}/lock", "unlock_address": f"{address}/lock"}
            return {"http": {"address": address, **lock, "lock_method": "LOCK", "unlock_method": "UNLOCK"}}
        case _:
            return {}


def _ref(address: str, attribute: str = "id") -> str:
    return "${%s.%s}" % (address, attribute)  # noqa: UP031 - braces of its own


def _label(name: str) -> str:
    """A name as a label of the configuration, which begins with a letter or underscore."""
    return name if name[0].isalpha() else f"_{name}"


def _render_rule(rule: FirewallRule) -> dict[str, Any]:
    networks = "source_ips" if rule.direction == "in" else "destination_ips"
    rendered: dict[str, Any] = {
        "direction": rule.direction,
        "protocol": rule.protocol,
        networks: list(rule.networks),
        "description": rule.description,
    }
    return {**rendered, "port": rule.port} if rule.port else rendered
