"""All of the orchestrator together, from one configuration file: store, workers, the unix socket, the tailnet listener."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import uvloop
from pydantic import Field, ValidationError

from clawdlets_ops.declared import Model
from clawdlets_ops.errors import ClawdletsError, OrchestratorError, StoreError
from clawdlets_ops.fleet import HttpAddress
from clawdlets_ops.herd import Cattle
from clawdlets_ops.layout import (
    CATTLE_DECLARED,
    CATTLE_PERSONAS,
    ORCHESTRATOR_DATABASE,
    ORCHESTRATOR_SOCKET,
    RUN_SECRETS,
)
from clawdlets_ops.orchestrator.app import make_app, quiet
from clawdlets_ops.orchestrator.bootstrap import RESULT_BYTES, make_bootstrap_app
from clawdlets_ops.orchestrator.clock import JUMP_MS, SteadyClock
from clawdlets_ops.orchestrator.identity import Identify, UnixIdentity
from clawdlets_ops.orchestrator.jobs import Clock, Kind
from clawdlets_ops.orchestrator.queue import Queue
from clawdlets_ops.orchestrator.serving import Bounds, Server, check_socket, own_socket, passed_socket, server
from clawdlets_ops.orchestrator.store import Store, open_postgresql, open_sqlite
from clawdlets_ops.orchestrator.tailnode import TAILSCALED, NodeOf, listen_address, whois
from clawdlets_ops.orchestrator.tokens import Grant, Tokens
from clawdlets_ops.orchestrator.vending import Look, Needs, SecretFiles, Vending
from clawdlets_ops.orchestrator.worker import Worker, start_workers
from clawdlets_ops.project import HETZNER_ENDPOINT

log = logging.getLogger("clf.daemon")

ITSELF = "operator:orchestrator"
"""Who asks for what is asked for by itself: no bot can be called so, nor take its idempotency keys."""
PRUNE_EVERY_S = 3600.0
LISTEN_AGAIN_S = 5.0
STOP_S = 30.0
SWITCH_S = 0.0005
"""The store's thread and the event loop share the interpreter; Python's own 5 ms would be most of a request's time."""


class BootstrapConfig(Model):
    """The tailnet listener. ``whois: none`` is for a tailnet that cannot be asked who an address is: a token is then
    bound to the server's id and to the first address only."""

    listen: str = "auto"
    port: Annotated[int, Field(ge=1024, le=65535)] = 18337
    whois: Literal["tailscaled", "none"] = "tailscaled"
    tailscaled_socket: str = TAILSCALED


class Config(Model):
    """``/etc/clf/orchestrator.json``: no secret, only where secrets are. ``cattle`` is the fleet file's section; where it is
    not said, it is read from ``cattleFile``, if that is there.

    ``baseUrl``: where machines fetch their environment, when it is not this process that listens there. ``personas``: a folder
    for each persona. ``authorizedKeys`` may log in to cattle. ``tailnetCa``: what a headscale's certificate is checked by.
    """

    socket_path: str = str(ORCHESTRATOR_SOCKET.path)
    store: Literal["sqlite", "postgresql"] = "sqlite"
    database: str = str(ORCHESTRATOR_DATABASE.path)
    bots_group: str = ORCHESTRATOR_SOCKET.group
    operators_group: str = "clf-operators"
    workers: Annotated[int, Field(ge=0, le=64)] = 2
    keep_days: Annotated[int, Field(ge=1, le=365)] = 7
    bootstrap: BootstrapConfig | None = Field(default_factory=BootstrapConfig)
    secret_folders: tuple[str, ...] = (str(RUN_SECRETS),)
    hcloud_endpoint: HttpAddress = HETZNER_ENDPOINT
    base_url: HttpAddress | None = None
    personas: str = str(CATTLE_PERSONAS.path)
    authorized_keys: tuple[str, ...] = ()
    tailnet_ca: str | None = None
    cattle_file: str = str(CATTLE_DECLARED.path)
    cattle: Cattle = Field(default_factory=Cattle)


DATABASE_URL = "clf_database_url"
M = TypeVar("M", bound=Model)


@dataclass(frozen=True)
class Parts:
    """What kinds of jobs are made from."""

    config: Config
    queue: Queue
    tokens: Tokens
    secrets: SecretFiles
    clock: Clock
    bootstrap_url: Callable[[], str]


def _nothing(grant: Grant) -> Needs:
    raise OrchestratorError(f"job {grant.job_id} is of no kind whose machines have an environment")


@dataclass(frozen=True)
class Work:
    """What this orchestrator does: its kinds, what a machine needs, and kinds that it asks for itself every so many seconds
    (with an empty payload, once for all orchestrators on one store)."""

    kinds: Sequence[Kind] = ()
    look: Look = _nothing
    periodic: Mapping[str, int] = field(default_factory=dict)
    result_bytes: int = RESULT_BYTES


MakeWork = Callable[[Parts], Work]


def read_config(path: Path) -> Config:
    """The configuration; OrchestratorError with the key that is wrong."""
    config = _read(Config, path)
    declared = Path(config.cattle_file)
    if "cattle" in config.model_fields_set or not declared.exists():
        return config
    return config.model_copy(update={"cattle": _read(Cattle, declared)})


def _read(kind: type[M], path: Path) -> M:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise OrchestratorError(f"cannot be read ({error.strerror})", where=str(path)) from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise OrchestratorError(f"is not acceptable: {faults}", where=str(path)) from None


def secret_files(config: Config, environ: Mapping[str, str]) -> SecretFiles:
    """Systemd's credentials first, then the folders of the configuration."""
    credentials = [Path(environ["CREDENTIALS_DIRECTORY"])] if environ.get("CREDENTIALS_DIRECTORY") else []
    return SecretFiles([*credentials, *map(Path, config.secret_folders)])


def open_store(config: Config, secrets: SecretFiles) -> Store:
    """The store that the configuration names; StoreError."""
    if config.store == "sqlite":
        return open_sqlite(Path(config.database))
    url = secrets.get(DATABASE_URL)
    if url is None:
        raise StoreError("its URL is missing", where=DATABASE_URL, fix="declare the secret", reason="unreachable")
    return open_postgresql(url.reveal())


class Daemon:
    """``serve`` until SIGTERM or SIGINT, or ``stop``."""

    def __init__(
        self, config: Config, environ: Mapping[str, str], make_work: MakeWork, *, identify: Identify | None = None
    ) -> None:
        self._config = config
        self._identify = identify or UnixIdentity(config.operators_group, config.bots_group)
        self._environ = environ
        self._clock = SteadyClock()
        secrets = secret_files(config, environ)
        self._store = open_store(config, secrets)
        self._queue = Queue(self._store, self._clock)
        self._tokens = Tokens(self._store, self._clock)
        self._wake = threading.Event()
        self._address = ""
        parts = Parts(config, self._queue, self._tokens, secrets, self._clock, self._bootstrap_url)
        self._work = make_work(parts)
        self._vending = Vending(self._work.look, secrets)
        self._servers: list[Server] = []
        self._stopping = asyncio.Event()

    def _bootstrap_url(self) -> str:
        """Where machines fetch their environment; OrchestratorError while this host is not on the tailnet."""
        if self._config.base_url is not None:
            return self._config.base_url
        if not self._address or self._config.bootstrap is None:
            raise OrchestratorError("this host does not listen on the tailnet yet")
        return f"http://{self._address}:{self._config.bootstrap.port}"

    def _call_workers(self) -> None:
        if not self._wake.is_set():
            self._wake.set()

    async def serve(self) -> None:
        """Serve; OrchestratorError or StoreError when it cannot begin."""
        sys.setswitchinterval(SWITCH_S)
        gc.freeze()  # what has been loaded stays: looking through all of it for garbage now and then takes longer than a commit
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        group = self._config.bots_group
        listening = passed_socket(self._environ, os.getpid())
        ours = listening is None
        if listening is None:
            listening = own_socket(Path(self._config.socket_path), group)
        path = check_socket(listening, group)
        app = quiet(make_app(self._queue, self._work.kinds, self._identify, on_enqueued=self._call_workers))
        workers = self._start_workers()
        tasks = [
            asyncio.create_task(self._run(server(app, Bounds()), listening)),
            asyncio.create_task(self._tidy()),
            *(asyncio.create_task(self._repeat(kind, every)) for kind, every in self._work.periodic.items()),
        ]
        if self._config.bootstrap is not None:
            tasks.append(asyncio.create_task(self._listen_on_tailnet(self._config.bootstrap)))
        log.info("serving on %s with %d workers", path, len(workers))
        notify(self._environ, "READY=1")
        waiting = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait([*tasks, waiting], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {waiting}:
                task.result()
        finally:
            await self._end(workers, tasks)
            if ours:
                path.unlink(missing_ok=True)

    def _start_workers(self) -> list[tuple[Worker, threading.Thread]]:
        name = f"{socket.gethostname()}/{os.getpid()}"

        def make(of: str) -> Worker:
            return Worker(self._queue, self._work.kinds, name=of, clock=self._clock)

        def make_timed(of: str) -> Worker:
            timed = [kind for kind in self._work.kinds if kind.name in self._work.periodic]
            return Worker(self._queue, timed, name=of, clock=self._clock)

        count = self._config.workers if self._work.kinds else 0
        workers = start_workers(count, make, name=name, wake=self._wake)
        if (
            count and self._work.periodic
        ):  # a job that lasts for hours holds its worker: what is timed does not wait for it
            workers += start_workers(1, make_timed, name=f"{name}/timed", wake=self._wake)
        return workers

    async def _end(self, workers: list[tuple[Worker, threading.Thread]], tasks: list[asyncio.Task[None]]) -> None:
        notify(self._environ, "STOPPING=1")
        for worker, _ in workers:
            worker.stopping.set()
        self._wake.set()
        for one in self._servers:
            one.should_exit = True
        for _, thread in workers:
            await asyncio.to_thread(thread.join, STOP_S)
        for task in tasks[1:]:
            task.cancel()
        await asyncio.wait(tasks, timeout=STOP_S)
        await asyncio.to_thread(self._store.close)

    async def _run(self, one: Server, listening: socket.socket) -> None:
        self._servers.append(one)
        await one.serve(sockets=[listening])

    async def _listen_on_tailnet(self, config: BootstrapConfig) -> None:
        """Listen as soon as this host has its address; bots are served meanwhile."""
        said = ""
        while True:
            try:
                address = listen_address(config.listen)
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                listening = socket.create_server((address, config.port), family=family, backlog=256)
                break
            except (OrchestratorError, OSError) as error:
                if str(error) != said:
                    log.warning("not listening on the tailnet yet: %s", error)
                    said = str(error)
                await asyncio.sleep(LISTEN_AGAIN_S)
        self._address = f"[{address}]" if ":" in address else address
        node_of: NodeOf = partial(whois, path=config.tailscaled_socket) if config.whois == "tailscaled" else _not_asked
        app = quiet(
            make_bootstrap_app(
                self._tokens,
                self._queue,
                self._vending,
                node_of,
                on_result=self._wake.set,
                result_bytes=self._work.result_bytes,
            )
        )
        log.info("machines are served on %s", self._bootstrap_url())
        await self._run(server(app, Bounds(in_all=256, of_one=8)), listening)

    async def _repeat(self, kind: str, every_s: int) -> None:
        """Ask for ``kind`` once in every period."""
        of = next(one for one in self._work.kinds if one.name == kind)
        while True:
            period = self._clock() // (every_s * 1000)
            try:
                await asyncio.to_thread(
                    self._queue.enqueue,
                    kind,
                    {},
                    requester=ITSELF,
                    idempotency_key=f"{kind}-{period}",
                    max_attempts=of.max_attempts,
                )
                self._wake.set()
            except StoreError as error:
                log.error("%s is not asked for: %s", kind, error)
            await asyncio.sleep((period + 1) * every_s - self._clock() / 1000 + 0.1)

    async def _tidy(self) -> None:
        """Prune, and look at the clock."""
        while True:
            await asyncio.sleep(PRUNE_EVERY_S)
            drift = self._clock.drift_ms()
            if abs(drift) > JUMP_MS:
                log.warning("the wall clock was set: %+d ms since this process began; restart it to follow", drift)
            try:
                jobs = await asyncio.to_thread(self._queue.prune, keep_ms=self._config.keep_days * 86_400_000)
                tokens = await asyncio.to_thread(self._tokens.prune)
                await asyncio.to_thread(self._store.tidy)
                log.info("pruned %d jobs and %d tokens", jobs.jobs, tokens)
            except StoreError as error:
                log.error("not pruned: %s", error)

    def stop(self) -> None:
        """From the loop's own thread: end ``serve``."""
        self._stopping.set()


def _not_asked(address: str, port: int) -> str | None:
    del address, port
    return None


def notify(environ: Mapping[str, str], words: str) -> None:
    """Tell systemd (sd_notify(3)), if it asked to be told."""
    address = environ.get("NOTIFY_SOCKET", "")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.connect("\0" + address[1:] if address.startswith("@") else address)
            out.send(words.encode())


def run(config: Config, environ: Mapping[str, str], make_work: MakeWork, *, identify: Identify | None = None) -> int:
    """Serve until told to stop; 0, or 1 with a message in the log."""

    async def main() -> None:
        await Daemon(config, environ, make_work, identify=identify).serve()

    try:
        uvloop.run(main())
    except ClawdletsError as error:
        log.error("%s", error)
        return 1
    return 0
