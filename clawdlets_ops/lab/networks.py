"""Private networks of the emulated cloud: subnets, routes, and the addresses that servers have in them. No packets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network
from itertools import islice
from typing import Any, Final

from clawdlets_ops.lab import grammar, views
from clawdlets_ops.lab.catalogue import Json
from clawdlets_ops.lab.desk import Desk, answer, change_protection, require_unprotected
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.records import Server, State
from clawdlets_ops.lab.resources import Network

# RFC 1918, section 3.
_PRIVATE: Final = tuple(IPv4Network(net) for net in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))
_SMALLEST_NETWORK: Final = 24
_SMALLEST_SUBNET: Final = 30
_ROUTES: Final = 100
_SUBNETS: Final = 50
_ALIASES: Final = 5
_ZONE: Final = "eu-central"
_LOCAL_ADDRESS: Final = IPv4Network("172.31.1.1/32")  # the gateway of the public interface, as on the real thing


class Networks(Desk[Network]):
    kind = "networks"

    def create(self, body: Json) -> Json:
        name, labels = self.named(body)
        ip_range = _network_range(body)
        exposed = grammar.flag(body, "expose_routes_to_vswitch", False)
        network = Network(self.state.next_id(self.kind), name, self.ledger.timestamp(), labels, ip_range)
        network.expose_routes_to_vswitch = exposed
        for subnet in grammar.objects(body, "subnets"):
            _add_subnet(network, subnet)
        for route in grammar.objects(body, "routes"):
            _add_route(network, route)
        self.state.add(network)
        return {"network": self.view(network)}

    def check_update(self, record: Network, body: Json) -> Json:
        sent = grammar.flag(body, "expose_routes_to_vswitch", record.expose_routes_to_vswitch)
        return {"expose_routes_to_vswitch": sent}

    def delete(self, record: Network) -> None:
        """Attached servers lose their interface in it."""
        require_unprotected(record, "network is delete protected")
        for server_id in views.attached_to(self.state, record.id):
            server = self.state.servers[server_id]
            server.private_net = [one for one in server.private_net if one["network"] != record.id]
        self.state.remove(record)

    def act(self, record: Network, command: str, body: Json) -> Json:
        match command:
            case "add_subnet":
                _add_subnet(record, body)
            case "delete_subnet":
                self._delete_subnet(record, grammar.text(body, "ip_range"))
            case "add_route":
                _add_route(record, body)
            case "delete_route":
                route = {name: grammar.text(body, name) for name in ("destination", "gateway")}
                if route not in record.routes:
                    raise grammar.not_found("routes", route["destination"])
                record.routes = [one for one in record.routes if one != route]
            case "change_ip_range":
                ip_range = _network_range(body)
                if not IPv4Network(record.ip_range).subnet_of(IPv4Network(ip_range)):
                    raise grammar.invalid("ip_range", "must contain the range that the network has")
                record.ip_range = ip_range
            case "change_protection":
                return change_protection(self.ledger, record, body)
            case _:
                raise grammar.not_implemented(f"network action {command}")
        return answer(self.ledger.done(command, record))

    def _delete_subnet(self, network: Network, ip_range: str) -> None:
        found = next((subnet for subnet in network.subnets if subnet["ip_range"] == ip_range), None)
        if found is None:
            raise grammar.not_found("subnets", ip_range)
        addresses = taken(self.state, network) - {network.gateway}
        if any(address in IPv4Network(ip_range) for address in addresses):
            raise ApiError(422, "service_error", "cannot delete subnet because servers are attached to it")
        network.subnets = [subnet for subnet in network.subnets if subnet != found]


def member_rows(state: State, network: Network) -> list[Json]:
    """GET /networks/{id}/members: the servers in it."""
    rows = []
    for server in state.servers.values():
        for interface in server.private_net:
            if interface["network"] == network.id:
                row = {key: interface[key] for key in ("ip", "alias_ips")}
                subnet = next(
                    (one for one in network.subnets if IPv4Address(row["ip"]) in IPv4Network(one["ip_range"])), None
                )
                rows.append(
                    {
                        "id": server.id,
                        "type": "server",
                        **row,
                        "subnet": subnet and subnet["ip_range"],
                        "status": "ok",
                    }
                )
    return rows


def attach(state: State, server: Server, network: Network, body: Json) -> None:
    """Give the server an interface: at ``ip``, in ``ip_range``, or at the first free address."""
    if any(interface["network"] == network.id for interface in server.private_net):
        raise ApiError(422, "server_already_attached", "server is already attached to the network")
    ours = IPv4Network(network.ip_range)
    if any(ours.overlaps(IPv4Network(state.networks[one["network"]].ip_range)) for one in server.private_net):
        raise ApiError(422, "networks_overlap", "the network overlaps with another network of the server")
    address = _choose(state, network, body)
    aliases = _aliases(state, network, body, own={address})
    interface = {
        "network": network.id,
        "ip": str(address),
        "alias_ips": aliases,
        "mac_address": f"86:00:00:{server.id >> 8 & 0xFF:02x}:{server.id & 0xFF:02x}:{network.id & 0xFF:02x}",
    }
    server.private_net = [*server.private_net, interface]


def interface_of(server: Server, network_id: int) -> Mapping[str, Any]:
    found = next((one for one in server.private_net if one["network"] == network_id), None)
    if found is None:
        raise ApiError(422, "service_error", f"server is not attached to network with ID {network_id}")
    return found


def change_aliases(state: State, server: Server, network: Network, body: Json) -> None:
    interface = interface_of(server, network.id)
    others = [one for one in server.private_net if one["network"] != network.id]
    before = server.private_net
    server.private_net = [*others, {**interface, "alias_ips": []}]
    try:
        aliases = _aliases(state, network, body, own={IPv4Address(interface["ip"])})
    except ApiError:
        server.private_net = before
        raise
    server.private_net = [one if one in others else {**one, "alias_ips": aliases} for one in before]


def taken(state: State, network: Network) -> set[IPv4Address]:
    """All addresses of the network that are somebody's, the gateway's among them."""
    found = {network.gateway}
    for server in state.servers.values():
        for interface in server.private_net:
            if interface["network"] == network.id:
                found |= {IPv4Address(address) for address in (interface["ip"], *interface["alias_ips"])}
    return found


def _choose(state: State, network: Network, body: Json) -> IPv4Address:
    subnets = [IPv4Network(subnet["ip_range"]) for subnet in network.subnets]
    if body.get("ip_range"):
        subnets = [subnet for subnet in subnets if str(subnet) == body["ip_range"]]
    if not subnets:
        raise ApiError(422, "no_subnet_available", "the network has no such subnet")
    used = taken(state, network)
    if body.get("ip"):
        address = _address(body["ip"], "ip")
        if address in used or not any(_usable(subnet, address) for subnet in subnets):
            raise ApiError(422, "ip_not_available", f"IP {address} is not available")
        return address
    for address in (address for subnet in subnets for address in _hosts(subnet)):
        if address not in used:
            return address
    raise ApiError(422, "no_subnet_available", "no subnet of the network has a free address")


def _aliases(state: State, network: Network, body: Json, *, own: set[IPv4Address]) -> list[str]:
    sent = body.get("alias_ips") or []
    if not isinstance(sent, list) or len(sent) > _ALIASES:
        raise grammar.invalid("alias_ips", f"must be a list of at most {_ALIASES} addresses")
    addresses = list(dict.fromkeys(_address(one, "alias_ips") for one in sent))
    for address in addresses:
        fits = any(_usable(IPv4Network(subnet["ip_range"]), address) for subnet in network.subnets)
        if not fits or address in taken(state, network) | own:
            raise ApiError(422, "ip_not_available", f"IP {address} is not available")
    return [str(address) for address in addresses]


def _hosts(subnet: IPv4Network) -> Iterator[IPv4Address]:
    # Lazily: a /8 has sixteen million of them.
    return (subnet[index] for index in range(1, subnet.num_addresses - 1))


def _usable(subnet: IPv4Network, address: IPv4Address) -> bool:
    return address in subnet and address not in (subnet.network_address, subnet.broadcast_address)


def _address(sent: object, field: str) -> IPv4Address:
    try:
        return IPv4Address(str(sent))
    except ValueError as error:
        raise grammar.invalid(field, f"'{sent}' is not an IPv4 address") from error


def _range(body: Json, field: str) -> IPv4Network:
    sent = grammar.text(body, field)
    try:
        return IPv4Network(sent)
    except ValueError as error:
        raise grammar.invalid(field, f"'{sent}' is not an IPv4 network: {error}") from error


def _network_range(body: Json) -> str:
    sent = _range(body, "ip_range")
    if sent.prefixlen > _SMALLEST_NETWORK or not any(sent.subnet_of(private) for private in _PRIVATE):
        raise grammar.invalid("ip_range", "must be a private network of at least 256 addresses (RFC 1918)")
    return str(sent)


def _add_subnet(network: Network, body: Json) -> None:
    kind = body.get("type")
    if kind not in ("cloud", "server", "vswitch"):
        raise grammar.invalid("type", "must be cloud, server or vswitch")
    if kind == "vswitch":
        raise ApiError(422, "service_error", "vswitch not found")
    if body.get("network_zone") != _ZONE:
        raise grammar.invalid("network_zone", f"must be {_ZONE}")
    if len(network.subnets) >= _SUBNETS:
        raise ApiError(403, "resource_limit_exceeded", f"at most {_SUBNETS} subnets per network")
    whole = IPv4Network(network.ip_range)
    others = [IPv4Network(subnet["ip_range"]) for subnet in network.subnets]
    if body.get("ip_range"):
        wanted = _range(body, "ip_range")
        if not wanted.subnet_of(whole) or wanted.prefixlen > _SMALLEST_SUBNET:
            raise grammar.invalid("ip_range", f"must be part of {whole} and at least a /{_SMALLEST_SUBNET}")
        if any(wanted.overlaps(other) for other in others):
            raise grammar.invalid("ip_range", "overlaps with another subnet")
    else:
        pieces = whole.subnets(new_prefix=_SMALLEST_NETWORK)
        # Each other subnet can be in the way of its own size at most.
        tries = islice(pieces, sum(max(1, other.num_addresses >> 8) for other in others) + 1)
        free = next((piece for piece in tries if not any(piece.overlaps(other) for other in others)), None)
        if free is None:
            raise ApiError(422, "no_subnet_available", "the network has no room for a subnet")
        wanted = free
    network.subnets = [*network.subnets, {"type": kind, "ip_range": str(wanted), "network_zone": _ZONE}]


def _add_route(network: Network, body: Json) -> None:
    destination, gateway = _range(body, "destination"), _address(grammar.text(body, "gateway"), "gateway")
    if len(network.routes) >= _ROUTES:
        raise ApiError(403, "resource_limit_exceeded", f"at most {_ROUTES} routes per network")
    if destination.overlaps(_LOCAL_ADDRESS) and destination.prefixlen > 0:
        raise grammar.invalid("destination", f"{_LOCAL_ADDRESS} is the servers' public gateway")
    if any(
        destination.overlaps(IPv4Network(subnet["ip_range"])) for subnet in network.subnets if destination.prefixlen
    ):
        raise grammar.invalid("destination", "overlaps with a subnet")
    if any(route["destination"] == str(destination) for route in network.routes):
        raise grammar.invalid("destination", "has a route")
    if gateway not in IPv4Network(network.ip_range) or gateway == network.gateway:
        raise grammar.invalid("gateway", "must be an address of the network, and not its first one")
    network.routes = [*network.routes, {"destination": str(destination), "gateway": str(gateway)}]
