"""The cloud's books: the state under one lock, every change persisted, and the actions with the jobs they stand for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from clawdlets_ops.lab import edge
from clawdlets_ops.lab.backend import MachineSpec
from clawdlets_ops.lab.catalogue import Json, find
from clawdlets_ops.lab.edge import Rules
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.records import RESOURCE_TYPES, Action, Record, Server, State
from clawdlets_ops.lab.store import Store
from clawdlets_ops.lab.workers import Workers, attempt

DELETED = "deleted"
UNKNOWN = "unknown"

_NO_SERVER = 0

log = logging.getLogger(__name__)


class Ledger:
    """Holds a State and stores its changes; LabError or SettingsError when the state file is not usable.

    ``state`` is read under ``lock`` and changed inside ``mutation`` only.
    """

    def __init__(self, state_file: Path | None, clock: Callable[[], datetime]) -> None:
        self.lock = threading.RLock()
        self._store = Store(state_file)
        self.state = self._store.state
        self._clock = clock
        self._local = threading.local()
        self._workers = Workers()

    def now(self) -> datetime:
        return self._clock().astimezone(UTC)

    def timestamp(self) -> str:
        return self.now().isoformat(timespec="seconds")

    def mutations(self) -> int:
        """How many changes of the state the calling thread has made so far."""
        count: int = getattr(self._local, "mutations", 0)
        return count

    @contextmanager
    def mutation(self) -> Iterator[State]:
        """Hold the lock, then store what changed. A refusal (an exception inside) must come before any change."""
        with self.lock:
            yield self.state
            if self._store.commit():
                self._local.mutations = self.mutations() + 1

    def action(self, command: str, *resources: Record) -> Action:
        """A new running action."""
        named: list[Json] = [{"id": resource.id, "type": RESOURCE_TYPES[type(resource)]} for resource in resources]
        action = Action(self.state.next_id("actions"), command, "running", self.timestamp(), named)
        self.state.add(action)
        self.state.forget_old_actions()
        return action

    def done(self, command: str, *resources: Record) -> Action:
        """A new action that has succeeded."""
        action = self.action(command, *resources)
        action.settle(self.timestamp(), None)
        return action

    def require_unlocked(self, server: Server) -> None:
        """423 when an action has the server."""
        if server.locked:
            raise ApiError(423, "locked", "server is locked: another action is running")

    def claim(self, server: Server, command: str, status: str, *resources: Record) -> Action:
        """Lock the server for an action that is going to run, on it and ``resources``; 423 when another one has it."""
        self.require_unlocked(server)
        server.locked, server.status = True, status
        return self.action(command, server, *resources)

    def start(
        self,
        server: Server,
        actions: Sequence[Action],
        call: Callable[[MachineSpec, Rules], None],
        *,
        status: str | None = None,
        enforces: bool = False,
        direct_only: bool = False,
        failed: str = UNKNOWN,
        then: Callable[[Json | None], None] | None = None,
    ) -> None:
        """Queue ``call`` on the server's worker; the actions end with it.

        status is what the server becomes by it (``failed`` when it fails); None leaves status and lock alone. enforces
        says that the rules handed over are in force afterwards. direct_only leaves out attachments by label selector.
        ``then`` is told the error, or None, and may change the state.
        """

        def job() -> None:
            with self.lock:
                exists = server.id in self.state.servers
                spec, wanted = _spec(self.state, server), server.edge_wanted
                rules = edge.effective(self.state, server, direct_only=direct_only)
                whole = rules == edge.effective(self.state, server)
            # A server that was deleted meanwhile has nothing left to enforce.
            error = attempt(lambda: call(spec, rules)) if exists else None
            with self.mutation():
                if error is None and enforces and whole:
                    server.edge_in_force = wanted
                if status is not None:
                    server.locked, server.status = False, status if error is None else failed
                if exists and server.status == DELETED:
                    self.state.forget_server(server)
                if then is not None:
                    then(error)
                for action in actions:
                    action.settle(self.timestamp(), error)

        self._workers.submit(server.id, job)

    def aside(self, call: Callable[[], None]) -> None:
        """Queue what no action stands for, and no server waits for; a failure is logged."""

        def job() -> None:
            if (error := attempt(call)) is not None:
                log.warning("the lab's cloud could not tidy up: %s", error["message"])

        self._workers.submit(_NO_SERVER, job)

    def resume(self, enforce: Callable[[Server, Sequence[Action]], None]) -> None:
        """After a restart: nothing runs any more, and rules that were asked for still have to come into force."""
        with self.mutation() as state:
            orphans = [action for action in state.actions.values() if action.status == "running"]
            for image in [image for image in state.images.values() if image.status == "creating"]:
                state.remove(image)
            for server in state.servers.values():
                if server.locked:
                    server.locked, server.status = False, UNKNOWN
                if server.edge_in_force != server.edge_wanted:
                    resumed = [a for a in orphans if a.command.endswith("_firewall") and a.concerns(server)]
                    orphans = [action for action in orphans if action not in resumed]
                    enforce(server, resumed)
            for action in orphans:
                action.settle(self.timestamp(), {"code": "interrupted", "message": "the lab was stopped meanwhile"})

    def close(self, timeout_s: float) -> None:
        """Let the workers finish what is queued, for at most ``timeout_s`` seconds."""
        self._workers.wait(timeout_s)
        with self.lock:
            self._store.close()


def _spec(state: State, server: Server) -> MachineSpec:
    ipv4, ipv6 = state.addresses(server) if server.id in state.servers else (None, None)
    image = find("images", server.image)
    return MachineSpec(
        server_id=server.id,
        name=server.name,
        ipv4=ipv4.ip if ipv4 else "",
        ipv6_network=ipv6.ip if ipv6 else "",
        image=image["name"] if image else str(server.image),
        authorized_keys=tuple(server.authorized_keys),
        user_data=server.user_data,
    )
