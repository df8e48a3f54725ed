"""Images of the emulated cloud that were made of servers; those of the catalogue cannot be changed."""

from __future__ import annotations

from clawdlets_ops.lab import grammar
from clawdlets_ops.lab.backend import MachineBackend, SnapshotBackend
from clawdlets_ops.lab.catalogue import Json, by_id, find
from clawdlets_ops.lab.desk import Desk, answer, change_protection, require_unprotected
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.ledger import Ledger
from clawdlets_ops.lab.records import Server
from clawdlets_ops.lab.resources import Snapshot


class Images(Desk[Snapshot]):
    kind = "images"

    def __init__(self, ledger: Ledger, backend: MachineBackend) -> None:
        super().__init__(ledger)
        self._backend = backend

    def get(self, row_id: int) -> Snapshot:
        if find(self.kind, row_id) is not None:
            raise ApiError(403, "forbidden", "a system image cannot be changed")
        return super().get(row_id)

    def update(self, record: Snapshot, body: Json) -> Json:
        labels = None if body.get("labels") is None else grammar.labels(body["labels"])
        description = None if body.get("description") is None else grammar.text(body, "description")
        if body.get("type") not in (None, "snapshot", record.type):
            raise grammar.invalid("type", "can become snapshot only")
        record.labels = record.labels if labels is None else labels
        record.description = description or record.description
        record.type = body.get("type") or record.type
        return {"image": record.view()}

    def delete(self, record: Snapshot) -> None:
        require_unprotected(record, "snapshot deletion is protected")
        if record.status == "creating":
            raise ApiError(423, "locked", "the image is being made")
        self.state.remove(record)
        backend = self._backend
        if isinstance(backend, SnapshotBackend):
            self.ledger.aside(lambda: backend.delete_image(record.id))

    def act(self, record: Snapshot, command: str, body: Json) -> Json:
        if command == "change_protection":
            return change_protection(self.ledger, record, body)
        raise grammar.not_implemented(f"image action {command}")

    def of_server(self, server: Server, body: Json) -> Json:
        """POST /servers/{id}/actions/create_image. Without a SnapshotBackend the image is a record and nothing more."""
        kind, labels = body.get("type") or "snapshot", grammar.labels(body.get("labels"))
        if kind not in ("snapshot", "backup"):
            raise grammar.invalid("type", "must be snapshot or backup")
        if kind == "backup" and server.backup_window is None:
            raise ApiError(422, "service_error", "backups are not enabled for the server")
        description = body.get("description") or f"snapshot of {server.name}"
        if not isinstance(description, str):
            raise grammar.invalid("description", "must be a string")
        self.ledger.require_unlocked(server)
        origin = self.state.image(server.image)
        image = Snapshot(
            id=self.state.next_id(self.kind),
            description=description,
            created=self.ledger.timestamp(),
            labels=labels,
            type=kind,
            status="available",
            server=server.id,
            server_name=server.name,
            disk_size=server.disk,
            architecture=by_id("server_types", server.server_type)["architecture"],
            os_flavor=origin["os_flavor"] if origin else "unknown",
            os_version=origin["os_version"] if origin else None,
        )
        self.state.add(image)
        backend = self._backend
        if not isinstance(backend, SnapshotBackend):
            return answer(self.ledger.done("create_image", server, image), image=image.view())
        image.status = "creating"

        def made(error: Json | None) -> None:
            image.status = "available"
            if error is not None and image.id in self.state.images:
                self.state.remove(image)

        action = self.ledger.claim(server, "create_image", server.status, image)
        self.ledger.start(
            server,
            [action],
            lambda spec, _: backend.create_image(spec.server_id, image.id),
            status=server.status,
            failed=server.status,
            then=made,
        )
        return answer(action, image=image.view())
