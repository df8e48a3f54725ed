"""After an apply the API is read back and compared with what was asked: the provider's word alone is not enough (its issues
1482, 931 and 998: rules that stay, rules that vanish, a firewall that stays attached)."""

from __future__ import annotations

from tenacity import Retrying, retry_if_result, stop_after_delay, wait_exponential

from clawdlets_ops.errors import CloudError
from clawdlets_ops.fleet import Host
from clawdlets_ops.hetzner import Cloud, Firewall, PrimaryIp, Server, Volume
from clawdlets_ops.provision import render
from clawdlets_ops.provision.planning import RUNNING, ProvisionPlan

APPLIED_WITHIN_S = 60.0
MOST_POLLS = 5
"""The longest pause between two looks, in poll intervals: each costs two requests of the project's budget."""


def differences(
    host: str,
    declared: Host,
    *,
    window_open: bool,
    server: Server | None,
    firewall: Firewall | None,
    volumes: tuple[Volume, ...] = (),
    primary_ips: tuple[PrimaryIp, ...] = (),
) -> list[str]:
    """What the API shows otherwise than asked for, one sentence each; pure."""
    if server is None or firewall is None:
        return ["the server or its firewall is not there"]
    order, labels = declared.hetzner, render.labels_of(host, declared)
    wanted = render.edge_rules(declared, window_open=window_open)
    found = []
    if firewall.rules != wanted:
        found.append(
            f"the firewall has [{'; '.join(map(str, firewall.rules))}], wanted [{'; '.join(map(str, wanted))}]"
        )
    if server.firewalls.get(firewall.id) != "applied":
        found.append(f"the firewall is {server.firewalls.get(firewall.id, 'not attached')}")
    if more := set(server.firewalls) - {firewall.id}:
        found.append(f"other firewalls are attached: {', '.join(map(str, sorted(more)))}")
    if server.status != RUNNING:
        found.append(f"the server is {server.status}")
    if dict(server.labels) != labels or dict(firewall.labels) != labels:
        found.append("the labels are not those that were asked for")
    if server.protected != order.delete_protection:
        found.append(f"the server is {'' if server.protected else 'not '}protected against deletion")
    if server.location != order.location:
        found.append(f"the server is in {server.location}, wanted {order.location}")
    if server.server_type not in order.server_types:
        found.append(f"the server is a {server.server_type}, wanted {' or '.join(order.server_types)}")
    for family, address in (("ipv4", server.ipv4), ("ipv6", server.ipv6)):
        if (address is not None) != getattr(order, family):
            found.append(f"the server has {'an' if address else 'no'} {family} address")
    by_family = {ip.family: ip for ip in primary_ips if ip.server == server.id}
    if order.reserved_ips:
        missing = [family for family in render.FAMILIES if getattr(order, family) and family not in by_family]
        found += [f"the reserved {family} address is not the server's" for family in missing]
        found += [f"the address {ip.name} would go with the server" for ip in by_family.values() if ip.auto_delete]
    by_name = {volume.name: volume for volume in volumes}
    for name, asked in order.volumes.items():
        volume = by_name.get(render.volume_name(host, name))
        if volume is None or volume.server != server.id or volume.id not in server.volumes:
            found.append(f"the volume {render.volume_name(host, name)} is not attached")
        elif volume.size_gb != asked.size_gb:
            found.append(f"the volume {volume.name} has {volume.size_gb} GB, wanted {asked.size_gb}")
    if bool(order.placement_group) != (server.placement_group is not None):
        found.append("the server's placement group is not the one that was asked for")
    return found


def wait_until_as_planned(
    planned: ProvisionPlan, declared: Host, cloud: Cloud, poll_s: float, *, within_s: float = APPLIED_WITHIN_S
) -> Server:
    """The server, once the API shows exactly what was planned; CloudError when it does not within ``within_s``.

    Two reads each time, and one more for each of volumes and reserved addresses where they are declared.
    """
    host, order = planned.host, declared.hetzner

    def look() -> tuple[Server | None, list[str]]:
        server, firewall = cloud.server(host), cloud.firewall(render.firewall_name(host))
        if planned.empty and firewall is not None:
            firewall = firewall.without_window()
        faults = differences(
            host,
            declared,
            window_open=planned.window_open,
            server=server,
            firewall=firewall,
            volumes=cloud.volumes() if order.volumes else (),
            primary_ips=cloud.primary_ips() if order.reserved_ips else (),
        )
        return server, faults

    server, faults = Retrying(
        stop=stop_after_delay(within_s),
        wait=wait_exponential(multiplier=poll_s, max=MOST_POLLS * poll_s),
        retry=retry_if_result(lambda seen: bool(seen[1])),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else (None, ["no answer"]),
    )(look)
    if server is None or faults:
        raise CloudError(
            f"the API does not show what was asked for: {'; '.join(faults)}",
            where=f"hosts.{host}",
            fix="run again; if it stays, look at the project's console",
        )
    return server
