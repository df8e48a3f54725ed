"""What separates a host from what is declared. Pure: compares, and decides what OpenTofu is to be given."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from clawdlets_ops.errors import CloudError, PlanRefused
from clawdlets_ops.fleet import Host
from clawdlets_ops.hetzner import HOST_LABEL, MANAGED_BY, MANAGER, FirewallRule, Server, fingerprint_md5, is_ours
from clawdlets_ops.provision import render as rendering
from clawdlets_ops.provision.observed import Observed
from clawdlets_ops.provision.render import FAMILIES, FIREWALL, GROUP, KEY, SERVER, edge_rules, firewall_name, labels_of

RUNNING = "running"
ON_THE_WAY = ("initializing", "starting", "rebuilding", "migrating")


@dataclass(frozen=True)
class ProvisionPlan:
    """What is to be done. ``steps`` are for people; ``window_open`` says whether tcp/22 stays open at the edge.

    ``adopt`` maps addresses of the configuration to ids of what exists already. ``loses`` are addresses whose resource
    would be deleted or replaced, which happens only to a host that was named for it.
    """

    host: str
    steps: tuple[str, ...]
    window_open: bool
    config: dict[str, Any]
    adopt: dict[str, int]
    observed: Observed = field(default_factory=lambda: Observed(None, None, None))
    server_type: str = ""
    loses: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """True when the cloud is as declared."""
        return not self.steps

    def __str__(self) -> str:
        return "\n".join(self.steps) or "nothing to do"


def window_is_open(declared: Host, observed: Observed) -> bool:
    """Whether tcp/22 should be open at the edge now: it opens with a new server and is never reopened by itself."""
    if declared.ssh_exposure.mode != "tailnet":
        return True
    if observed.server is None:
        return True
    return observed.firewall is None or observed.firewall.ssh_is_open


def plan(
    host: str,
    declared: Host,
    observed: Observed,
    *,
    public_key: str,
    endpoint: str,
    window_open: bool | None = None,
    server_type: str | None = None,
    may_replace: bool = False,
) -> ProvisionPlan:
    """Compare declared with observed. CloudError for something of a needed name that is not ours, PlanRefused for a
    difference that would need a new server or lose an address or a volume, unless ``may_replace``.

    ``window_open`` is set by lockdown, else derived; ``server_type`` is the one to order for a new server.
    """
    _refuse_foreign(host, observed)
    if window_open is None and observed.firewall is not None:  # a breakglass window has its own end
        observed = replace(observed, firewall=observed.firewall.without_window())
    server = observed.server
    loses = _lost(host, declared, observed, may_replace=may_replace)
    window = window_is_open(declared, observed) if window_open is None else window_open
    rules = edge_rules(declared, window_open=window)
    chosen = server_type or declared.hetzner.server_type
    if server is not None and SERVER not in loses:
        chosen = server.server_type
    steps = [f"LOSE {what}" for what in loses.values()]
    steps += _edge_steps(host, observed, rules, labels_of(host, declared))
    if observed.whole and observed.ssh_key is None:
        steps.insert(0, f"add the SSH key {fingerprint_md5(public_key)}")
    steps += _address_steps(host, declared, observed)
    if server is None or SERVER in loses:
        order = declared.hetzner
        steps.append(f"create the server {host} ({chosen}, {order.location}, {order.image})")
    else:
        steps += _server_steps(host, declared, observed, server)
    steps += _volume_steps(host, declared, observed)
    return ProvisionPlan(
        host=host,
        steps=tuple(steps),
        window_open=window,
        config=rendering.render(
            host,
            declared,
            rules,
            public_key=public_key,
            endpoint=endpoint,
            server_type=chosen,
            own_key=_own_key(host, observed),
            own_group=_own_group(host, observed),
            may_replace=bool(loses),
        ),
        adopt={address: ident for address, ident in existing(host, observed).items() if _wanted(address, declared)},
        observed=observed,
        server_type=chosen,
        loses=tuple(loses),
    )


def existing(host: str, observed: Observed) -> dict[str, int]:
    """Everything of ours that the API showed for the host: address in the configuration to id."""
    found: dict[str, int] = {}
    for address, one in ((FIREWALL, observed.firewall), (SERVER, observed.server)):
        if one is not None:
            found[address] = one.id
    if observed.ssh_key is not None and _own_key(host, observed):
        found[KEY] = observed.ssh_key.id
    if observed.placement_group is not None and _own_group(host, observed):
        found[GROUP] = observed.placement_group.id
    found |= {rendering.address_of_ip(address.family): address.id for address in observed.primary_ips}
    found |= {
        rendering.address_of_volume(volume.name.removeprefix(f"{host}-")): volume.id for volume in observed.volumes
    }
    return found


def _own_key(host: str, observed: Observed) -> bool:
    return observed.ssh_key is None or is_ours(observed.ssh_key.labels, host)


def _own_group(host: str, observed: Observed) -> bool:
    return observed.placement_group is None or is_ours(observed.placement_group.labels, host)


def _wanted(address: str, declared: Host) -> bool:
    """Whether the configuration has this address."""
    kind, _, name = address.partition(".")
    match kind:
        case "hcloud_primary_ip":
            return declared.hetzner.reserved_ips and bool(getattr(declared.hetzner, name))
        case "hcloud_volume":
            return address in {rendering.address_of_volume(volume) for volume in declared.hetzner.volumes}
        case "hcloud_placement_group":
            return declared.hetzner.placement_group is not None
        case _:
            return True


def _refuse_foreign(host: str, observed: Observed) -> None:
    """CloudError for what has a name that we need and is not ours, and for a server that is not up."""
    needed = (
        ("server", observed.server),
        ("firewall", observed.firewall),
        *(("volume", volume) for volume in observed.volumes),
        *(("primary IP", address) for address in observed.primary_ips),
    )
    for what, found in needed:
        if found is not None and not is_ours(found.labels, host):
            raise CloudError(
                f"there is already a {what} called {found.name!r} (id {found.id}) that this project did not make",
                where=f"hosts.{host}",
                fix=f"give the host another name, or label that {what} {MANAGED_BY}={MANAGER},{HOST_LABEL}={host} if it is this host",
            )
    server = observed.server
    if server is not None and server.status not in (RUNNING, *ON_THE_WAY):
        # Its creation may have failed, or somebody stopped it: neither is ours to decide, and it is never deleted here.
        raise CloudError(
            f"the server exists (id {server.id}), but is {server.status}",
            where=f"hosts.{host}",
            fix="look at its console; power it on, or, if it holds nothing, delete it there, and run again",
        )


def _lost(host: str, declared: Host, observed: Observed, *, may_replace: bool) -> dict[str, str]:
    """What would be deleted or replaced: address to a sentence. PlanRefused for the first, unless the host was named."""
    order, server = declared.hetzner, observed.server
    lost: dict[str, str] = {}

    def lose(address: str, field_name: str, what: str, instead: str) -> None:
        if not may_replace:
            raise PlanRefused(
                what,
                where=f"hosts.{host}.hetzner.{field_name}",
                fix=f"{instead}; or, if what is on it may be lost: --allow-replace {host}",
            )
        lost[address] = f"{address}: {field_name} {what}"

    if server is not None:
        wanted_ips = {family for family in FAMILIES if getattr(order, family)}
        ours = {address.family: address.id for address in observed.primary_ips}
        kept = {family: server.primary_ips.get(family) for family in ours}
        group = observed.placement_group.id if observed.placement_group else None
        has = {"ipv4": server.ipv4 is not None, "ipv6": server.ipv6 is not None}
        differences = [
            ("serverType", server.server_type, order.server_types[0], server.server_type in order.server_types),
            ("location", server.location, order.location, server.location == order.location),
            *((family, _on(has[family]), _on(not has[family]), has[family] == (family in wanted_ips)) for family in FAMILIES),
        ]  # fmt: skip
        if observed.whole:
            in_group = server.placement_group == group if order.placement_group else server.placement_group is None
            reserved = (kept == ours and set(ours) == wanted_ips) if order.reserved_ips else not ours
            differences += [
                ("placementGroup", f"group {server.placement_group}" if server.placement_group else "none", order.placement_group or "none", in_group),
                ("reservedIps", _on(ours), _on(not ours), reserved or not order.reserved_ips),
            ]  # fmt: skip
        for field_name, found, wanted, same in differences:
            if not same:
                lose(
                    SERVER,
                    field_name,
                    f"is declared {wanted}, the server has {found}: changing it would stop or replace the server",
                    f"declare {found}, or make a new host",
                )
    for address in observed.primary_ips:
        at = rendering.address_of_ip(address.family)
        if not _wanted(at, declared):
            said = f"no longer wants {address.name} (id {address.id}), and a reserved address is never given up unless named"
            lose(at, "reservedIps", said, "declare it again")
    for volume in observed.volumes:
        at = rendering.address_of_volume(volume.name.removeprefix(f"{host}-"))
        if not _wanted(at, declared):
            said = f"no longer names {volume.name} (id {volume.id}, {volume.size_gb} GB), and a volume is never deleted unless named"
            lose(at, "volumes", said, "declare it again")
    return lost


def _on(there: object) -> str:
    return "true" if there else "false"


def _edge_steps(host: str, observed: Observed, rules: tuple[FirewallRule, ...], labels: dict[str, str]) -> list[str]:
    firewall = observed.firewall
    if firewall is None:
        return [f"create the firewall {firewall_name(host)}: {'; '.join(map(str, rules))}"]
    steps = []
    if firewall.rules != rules:
        gone = [f"close {rule}" for rule in firewall.rules if rule not in rules]
        new = [f"open {rule}" for rule in rules if rule not in firewall.rules]
        steps.append(f"change the firewall {firewall.name}: {'; '.join(gone + new)}")
    if dict(firewall.labels) != labels:
        steps.append(f"label the firewall {firewall.name}")
    return steps


def _address_steps(host: str, declared: Host, observed: Observed) -> list[str]:
    order = declared.hetzner
    steps = []
    if observed.whole and order.reserved_ips:
        found = {address.family: address for address in observed.primary_ips}
        for family in FAMILIES:
            if not getattr(order, family):
                continue
            name = rendering.address_name(host, family)
            if family not in found:
                steps.append(f"reserve the address {name}")
            elif found[family].protected != order.delete_protection or found[family].auto_delete:
                steps.append(f"{'protect' if order.delete_protection else 'unprotect'} the address {name}")
    if observed.whole and order.placement_group and observed.placement_group is None:
        steps.append(f"create the placement group {order.placement_group}")
    return steps


def _server_steps(host: str, declared: Host, observed: Observed, server: Server) -> list[str]:
    firewall, order = observed.firewall, declared.hetzner
    steps = []
    if firewall is None:
        steps.append(f"attach the new firewall to {host}")
    elif firewall.id not in server.firewalls:
        steps.append(f"attach the firewall {firewall.name} to {host}")
    if firewall is not None and set(server.firewalls) - {firewall.id}:
        others = ", ".join(str(ident) for ident in sorted(set(server.firewalls) - {firewall.id}))
        steps.append(f"detach the firewall with id {others} from {host}")
    if dict(server.labels) != labels_of(host, declared):
        steps.append(f"label the server {host}")
    if server.protected != order.delete_protection:
        steps.append(f"{'protect' if order.delete_protection else 'unprotect'} the server {host}")
    if server.status != RUNNING:
        steps.append(f"wait for the server, which is {server.status}")
    return steps


def _volume_steps(host: str, declared: Host, observed: Observed) -> list[str]:
    if not observed.whole:
        return []
    found = {volume.name: volume for volume in observed.volumes}
    steps = []
    for name, wanted in declared.hetzner.volumes.items():
        called = rendering.volume_name(host, name)
        volume = found.get(called)
        if volume is None:
            steps.append(f"create the volume {called} ({wanted.size_gb} GB, {wanted.format})")
            continue
        if volume.size_gb > wanted.size_gb:
            raise PlanRefused(
                f"is declared {wanted.size_gb}, the volume has {volume.size_gb}, and a volume only grows",
                where=f"hosts.{host}.hetzner.volumes.{name}.sizeGb",
                fix=f"declare {volume.size_gb} or more",
            )
        if volume.size_gb < wanted.size_gb:
            steps.append(f"enlarge the volume {called} from {volume.size_gb} to {wanted.size_gb} GB")
        if observed.server is None or volume.server != observed.server.id:
            steps.append(f"attach the volume {called} to {host}")
        if volume.protected != declared.hetzner.delete_protection:
            steps.append(f"{'protect' if declared.hetzner.delete_protection else 'unprotect'} the volume {called}")
    return steps
