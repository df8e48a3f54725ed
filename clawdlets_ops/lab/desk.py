"""What every kind of resource of the emulated cloud can be asked: the frame that the kinds' own modules fill."""

from __future__ import annotations

from typing import ClassVar, Generic, TypeVar, cast

from clawdlets_ops.lab import grammar, views
from clawdlets_ops.lab.catalogue import Json
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.ledger import Ledger
from clawdlets_ops.lab.records import Action, Record, Server, SshKey, State
from clawdlets_ops.lab.resources import Network, PlacementGroup, PrimaryIp, Snapshot, Volume

R = TypeVar("R", bound=Record)

Protectable = Network | Volume | PrimaryIp | Snapshot


class Desk(Generic[R]):
    """One kind of resource. Every method runs inside a mutation of the ledger, and raises ApiError before any change."""

    kind: ClassVar[str]

    def __init__(self, ledger: Ledger, *, unassigned_type: str = "unassigned") -> None:
        self.ledger = ledger
        self._unassigned_type = unassigned_type

    @property
    def state(self) -> State:
        return self.ledger.state

    def create(self, body: Json) -> Json:  # noqa: ARG002 - for those that can be created
        raise grammar.not_implemented(f"create {self.kind}")

    def check_update(self, record: R, body: Json) -> Json:  # noqa: ARG002 - for those that have more to change
        """What an update changes besides name and labels, as fields of the record."""
        return {}

    def delete(self, record: R) -> Json | None:
        """The answer's body, or None when the record is gone at once."""
        raise NotImplementedError

    def act(self, record: R, command: str, body: Json) -> Json:  # noqa: ARG002 - for those that have actions
        raise grammar.not_implemented(f"{self.kind} action {command}")

    def get(self, row_id: int) -> R:
        record = self.state.named(self.kind).get(row_id)
        if record is None:
            raise grammar.not_found(self.kind, row_id)
        return cast("R", record)

    def view(self, record: R) -> Json:
        return views.view(self.state, record, unassigned_type=self._unassigned_type)

    def require_unique_name(self, name: str, *, but: int | None = None) -> None:
        for record in self.state.named(self.kind).values():
            if not isinstance(record, Snapshot) and record.name == name and record.id != but:
                raise grammar.not_unique("name", "name is already used")

    def named(self, body: Json) -> tuple[str, dict[str, str]]:
        """The name, which must be free, and the labels of a creation."""
        name, labels = grammar.text(body, "name"), grammar.labels(body.get("labels"))
        self.require_unique_name(name)
        return name, labels


def server_of(state: State, sent: object, field: str) -> Server:
    """The server that a request names by its id."""
    server_id = grammar.number(sent, field)
    if server_id not in state.servers:
        raise grammar.not_found("servers", server_id)
    return state.servers[server_id]


def change_protection(ledger: Ledger, record: Protectable, body: Json) -> Json:
    """POST …/actions/change_protection of what has protection against deletion only."""
    record.protected = grammar.flag(body, "delete", record.protected)
    return answer(ledger.done("change_protection", record))


def require_unprotected(record: Protectable, message: str) -> None:
    if record.protected:
        raise ApiError(423, "protected", message)


def answer(action: Action, **more: object) -> Json:
    return {"action": action.view(), **more}


class SshKeys(Desk[SshKey]):
    kind = "ssh_keys"

    def create(self, body: Json) -> Json:
        public_key = grammar.text(body, "public_key")
        fingerprint = grammar.ssh_fingerprint(public_key)
        name, labels = self.named(body)
        if any(key.fingerprint == fingerprint for key in self.state.ssh_keys.values()):
            raise grammar.not_unique("fingerprint", "SSH key with the same fingerprint already exists")
        key = SshKey(self.state.next_id(self.kind), name, self.ledger.timestamp(), labels, public_key, fingerprint)
        self.state.add(key)
        return {"ssh_key": key.view()}

    def delete(self, record: SshKey) -> None:
        self.state.remove(record)


class PlacementGroups(Desk[PlacementGroup]):
    kind = "placement_groups"

    def create(self, body: Json) -> Json:
        if body.get("type") != "spread":
            raise grammar.invalid("type", "must be spread")
        name, labels = self.named(body)
        group = PlacementGroup(self.state.next_id(self.kind), name, self.ledger.timestamp(), labels)
        self.state.add(group)
        return {"placement_group": self.view(group), "action": None}

    def delete(self, record: PlacementGroup) -> None:
        if views.members(self.state, record.id):
            raise ApiError(422, "resource_in_use", f"placement group with ID {record.id} is still in use")
        self.state.remove(record)
