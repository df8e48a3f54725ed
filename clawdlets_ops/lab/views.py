"""How the records of the emulated cloud look in an answer, where that takes more than the record itself."""

from __future__ import annotations

from clawdlets_ops.lab import edge
from clawdlets_ops.lab.catalogue import Json, by_id, find
from clawdlets_ops.lab.records import Action, Firewall, Record, Server, State
from clawdlets_ops.lab.resources import Network, PlacementGroup, PrimaryIp


def view(state: State, record: Record | Action, *, unassigned_type: str = "unassigned") -> Json:
    """The API's object of any record."""
    match record:
        case Server():
            return server(state, record)
        case Firewall():
            return record.view([edge.hits(state, expression) for expression in record.selectors])
        case Network():
            return record.view(attached_to(state, record.id))
        case PlacementGroup():
            return record.view(members(state, record.id))
        case PrimaryIp():
            return record.view(unassigned_type=unassigned_type)
        case _:
            return record.view()


def attached_to(state: State, network_id: int) -> list[int]:
    """The servers in a network."""
    return [
        server.id
        for server in state.servers.values()
        if any(interface["network"] == network_id for interface in server.private_net)
    ]


def members(state: State, group_id: int) -> list[int]:
    """The servers of a placement group."""
    return [server.id for server in state.servers.values() if server.placement_group == group_id]


def server(state: State, record: Server) -> Json:
    """A server; `datacenter` is left out, as the API does since July 2026."""
    server_type = by_id("server_types", record.server_type)
    group = None if record.placement_group is None else state.placement_groups[record.placement_group]
    ipv4, ipv6 = state.addresses(record)
    return {
        "id": record.id,
        "name": record.name,
        "status": record.status,
        "created": record.created,
        "public_net": {
            "ipv4": ipv4 and {"id": ipv4.id, "ip": ipv4.ip, "blocked": False, "dns_ptr": ipv4.pointer},
            "ipv6": ipv6 and {"id": ipv6.id, "ip": ipv6.ip, "blocked": False, "dns_ptr": ipv6.dns_ptr()},
            "floating_ips": [],
            "firewalls": _firewalls(state, record),
        },
        "private_net": [dict(interface) for interface in record.private_net],
        "server_type": server_type,
        "location": by_id("locations", record.location),
        "image": state.image(record.image),
        "iso": None if record.iso is None else find("isos", record.iso),
        "rescue_enabled": record.rescue,
        "locked": record.locked,
        "backup_window": record.backup_window,
        "outgoing_traffic": 0,
        "ingoing_traffic": 0,
        "included_traffic": server_type["prices"][0]["included_traffic"],
        "protection": {"delete": record.protected, "rebuild": record.protected},
        "labels": dict(record.labels),
        "volumes": [volume.id for volume in state.volumes.values() if volume.server == record.id],
        "load_balancers": [],
        "primary_disk_size": record.disk,
        "placement_group": group and view(state, group),
    }


def _firewalls(state: State, record: Server) -> list[Json]:
    status = "applied" if record.edge_in_force == record.edge_wanted else "pending"
    return [{"id": firewall.id, "status": status} for firewall in edge.attached(state, record)]
