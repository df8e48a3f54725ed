"""Public addresses of the emulated cloud as resources of their own: made, assigned, and named in reverse DNS."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Final

from clawdlets_ops.lab import grammar
from clawdlets_ops.lab.backend import AddressingBackend, AddressPool, BackendError, MachineBackend
from clawdlets_ops.lab.catalogue import Json
from clawdlets_ops.lab.desk import Desk, answer, change_protection, require_unprotected, server_of
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.ledger import Ledger
from clawdlets_ops.lab.orders import ServerOrder, chosen
from clawdlets_ops.lab.records import Action, Server
from clawdlets_ops.lab.resources import PrimaryIp

FAMILIES: Final = ("ipv4", "ipv6")


class PrimaryIps(Desk[PrimaryIp]):
    """``unassigned_type`` is the assignee_type of an address that is nobody's: `unassigned` since August 2026."""

    kind = "primary_ips"

    def __init__(self, ledger: Ledger, backend: MachineBackend, pool: AddressPool, *, unassigned_type: str) -> None:
        super().__init__(ledger, unassigned_type=unassigned_type)
        self._backend = backend
        self._pool = pool

    def create(self, body: Json) -> Json:
        name, labels = self.named(body)
        family = body.get("type")
        if family not in FAMILIES:
            raise grammar.invalid("type", "must be ipv4 or ipv6")
        if body.get("datacenter"):
            raise grammar.invalid("datacenter", "was removed from the API in July 2026; use location")
        if body.get("assignee_type") not in (None, "", "server", "unassigned"):
            raise grammar.invalid("assignee_type", "must be server")
        auto_delete = grammar.flag(body, "auto_delete", False)
        server = None if body.get("assignee_id") is None else server_of(self.state, body["assignee_id"], "assignee_id")
        if (server is None) == (body.get("location") in (None, "")):
            raise grammar.invalid("location", "either location or assignee_id is needed, and not both")
        location = server.location if server else chosen("locations", body["location"], "location")["id"]
        slot = self.state.free_slot(family)
        text = self.allocate(slot)[family]
        address = PrimaryIp(
            self.state.next_id(self.kind),
            name,
            self.ledger.timestamp(),
            labels,
            family,
            text,
            slot,
            location,
            auto_delete,
        )
        if server is not None:
            self._require_assignable(server, address)
        self.state.add(address)
        action = self._assign(server, address) if server else None
        return {"primary_ip": self.view(address), "action": action and action.view()}

    def check_update(self, record: PrimaryIp, body: Json) -> Json:
        return {"auto_delete": grammar.flag(body, "auto_delete", record.auto_delete)}

    def delete(self, record: PrimaryIp) -> None:
        require_unprotected(record, "Primary IP deletion is protected")
        if record.assignee is not None:
            raise ApiError(422, "must_be_unassigned", f"primary IP with ID {record.id} must be unassigned first")
        self.state.remove(record)

    def act(self, record: PrimaryIp, command: str, body: Json) -> Json:
        match command:
            case "assign":
                if body.get("assignee_type", "server") != "server":
                    raise grammar.invalid("assignee_type", "must be server")
                server = server_of(self.state, body.get("assignee_id"), "assignee_id")
                self._require_assignable(server, record)
                return answer(self._assign(server, record))
            case "unassign":
                return answer(self._unassign(record))
            case "change_dns_ptr":
                change_pointer([record], body)
                return answer(self.ledger.done("change_dns_ptr", record))
            case "change_protection":
                return change_protection(self.ledger, record, body)
        raise grammar.not_implemented(f"primary IP action {command}")

    def allocate(self, slot: int) -> dict[str, str]:
        """The addresses of a slot by family."""
        try:
            return dict(zip(FAMILIES, self._pool.allocate(slot), strict=True))
        except BackendError as error:
            raise ApiError(403, error.code, error.message) from error

    # For servers

    def plan(self, order: ServerOrder, location: int) -> dict[str, PrimaryIp | tuple[int, str] | None]:
        """By family what a new server gets: a primary IP made before, a slot with its address, or nothing."""
        wanted = dict(zip(FAMILIES, (order.ipv4, order.ipv6), strict=True))
        plan: dict[str, PrimaryIp | tuple[int, str] | None] = {}
        for family in FAMILIES:
            if isinstance(sent := wanted[family], int) and not isinstance(sent, bool):
                plan[family] = address = self.get(sent)
                _require_fit(address, family, location)
        given = [address for address in plan.values() if isinstance(address, PrimaryIp)]
        new = [family for family in FAMILIES if wanted[family] is True]
        slot = self.state.free_slot(*new)
        if given and new and not self._taken(new[0], given[0].slot):
            slot = given[0].slot
        for family in new:
            plan[family] = slot, self.allocate(slot)[family]
        slots = {one.slot if isinstance(one, PrimaryIp) else one[0] for one in plan.values() if one is not None}
        if not isinstance(self._backend, AddressingBackend) and (len(plan) < len(FAMILIES) or len(slots) != 1):
            raise grammar.not_implemented(
                "on this machine backend, a server has an IPv4 and an IPv6 address of the same slot"
            )
        return plan

    def settle(self, server: Server, plan: dict[str, PrimaryIp | tuple[int, str] | None]) -> None:
        """Give a new server what was planned."""
        for family, planned in plan.items():
            if isinstance(planned, tuple):
                row_id = self.state.next_id(self.kind)
                slot, text = planned
                planned = PrimaryIp(
                    row_id,
                    f"primary_ip-{row_id}",
                    server.created,
                    {},
                    family,
                    text,
                    slot,
                    server.location,
                    auto_delete=True,
                )
                self.state.add(planned)
            if planned is not None:
                planned.assignee = server.id
                setattr(server, family, planned.id)

    def _taken(self, family: str, slot: int) -> bool:
        return any(address.type == family and address.slot == slot for address in self.state.primary_ips.values())

    def _require_assignable(self, server: Server, address: PrimaryIp) -> None:
        _require_fit(address, address.type, server.location)
        if getattr(server, address.type) is not None:
            code = f"server_has_{address.type}"
            raise ApiError(422, code, f"server already has an {address.type} address")
        self._require_changeable(server)

    def _require_changeable(self, server: Server) -> None:
        self.ledger.require_unlocked(server)
        if server.status != "off":
            raise ApiError(422, "server_not_stopped", "server must be stopped")
        if not isinstance(self._backend, AddressingBackend):
            raise grammar.not_implemented("another public address for a server that exists, on this machine backend")

    def _assign(self, server: Server, address: PrimaryIp) -> Action:
        address.assignee = server.id
        setattr(server, address.type, address.id)
        return self._hand_over("assign_primary_ip", server, address)

    def _unassign(self, address: PrimaryIp) -> Action:
        if address.assignee is None:
            raise ApiError(422, "service_error", "primary IP is not assigned")
        server = self.state.servers[address.assignee]
        self._require_changeable(server)
        address.assignee = None
        setattr(server, address.type, None)
        return self._hand_over("unassign_primary_ip", server, address)

    def _hand_over(self, command: str, server: Server, address: PrimaryIp) -> Action:
        backend = self._backend
        if not isinstance(backend, AddressingBackend):
            raise TypeError("not asked for a backend without set_addresses")
        action = self.ledger.claim(server, command, "off", address)
        self.ledger.start(server, [action], lambda spec, _: backend.set_addresses(spec), status="off")
        return action


def _require_fit(address: PrimaryIp, family: str, location: int) -> None:
    if address.type != family:
        raise ApiError(422, "primary_ip_version_mismatch", f"primary IP {address.id} is not an {family} address")
    if address.assignee is not None:
        raise ApiError(422, "primary_ip_already_assigned", f"primary IP {address.id} is assigned to a server")
    if address.location != location:
        raise ApiError(422, "primary_ip_datacenter_mismatch", f"primary IP {address.id} is in another location")


def change_pointer(addresses: list[PrimaryIp], body: Json) -> None:
    """POST …/actions/change_dns_ptr: the reverse name of one address; null is the default again."""
    sent, name = grammar.text(body, "ip"), body.get("dns_ptr")
    try:
        wanted = ip_address(sent)
    except ValueError as error:
        raise grammar.invalid("ip", f"'{sent}' is not an address") from error
    found = next((one for one in addresses if wanted in ip_network(one.ip)), None)
    if found is None:
        raise grammar.invalid("ip", f"'{sent}' is not an address of the resource")
    if name is None:
        found.pointers = {one: given for one, given in found.pointers.items() if one != str(wanted)}
    elif isinstance(name, str) and grammar.is_host_name(name):
        found.pointers = {**found.pointers, str(wanted): name}
    else:
        raise grammar.invalid("dns_ptr", "must be a host name")
