"""The orchestrator's database: SQLite in a private folder, or PostgreSQL by URL.

What is to be written at one time is committed together, and each caller is answered only after *its* commit (group commit): with
``synchronous = FULL`` nothing that was acknowledged is lost to a power cut, at a fraction of a commit per row. A thread commits
what other threads ask for; what an event loop asks for in one turn, the loop commits itself while SQLite's disk is quick, since
handing it to a thread and back takes longer than the disk does. SQLite facts: sqlite.org/pragma.html, sqlite.org/rescode.html.
"""

from __future__ import annotations

import asyncio
import math
import os
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from clawdlets_ops.errors import StoreError
from clawdlets_ops.orchestrator.batch import (
    RESTORE,
    Asked,
    Committer,
    Operation,
    Row,
    T,
    Told,
    Waiter,
    in_words,
    settle,
    tell,
)

SCHEMA = 1
BATCH = 256
BUSY_TIMEOUT_MS = 5_000
_OF_THE_STORE = frozenset({"busy", "full", "readonly", "io", "corrupt", "unreachable"})
"""Reasons of a StoreError that have nothing to do with what was to be written."""
QUICK_S = 0.05
THREAD_FOR_S = 5.0
"""A commit that an event loop waited longer for than QUICK_S is the last one for a while: THREAD_FOR_S."""

metadata = sa.MetaData()

schema_version = sa.Table("clf_schema", metadata, sa.Column("version", sa.Integer, nullable=False))

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("job_id", sa.String(36), primary_key=True),
    sa.Column("kind", sa.String(64), nullable=False),
    sa.Column("payload_json", sa.Text, nullable=False),
    sa.Column("payload_digest", sa.String(64), nullable=False),
    sa.Column("requester", sa.String(128), nullable=False),
    sa.Column("idempotency_key", sa.String(256), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("run_at", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.Column("finished_at", sa.BigInteger),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("max_attempts", sa.Integer, nullable=False),
    sa.Column("lease_id", sa.String(36)),
    sa.Column("worker", sa.String(128)),
    sa.Column("lease_until", sa.BigInteger),
    sa.Column("cancel_requested_at", sa.BigInteger),
    sa.Column("last_error", sa.Text, nullable=False, server_default=""),
    sa.Column("result_json", sa.Text),
    sa.Column("state_json", sa.Text, nullable=False, server_default="{}"),
    sa.Column("task_result_json", sa.Text),
)
sa.Index(
    "jobs_idempotency",
    jobs.c.requester,
    jobs.c.idempotency_key,
    unique=True,
    sqlite_where=jobs.c.idempotency_key != "",
    postgresql_where=jobs.c.idempotency_key != "",
)
sa.Index("jobs_due", jobs.c.status, jobs.c.run_at)
sa.Index("jobs_requester", jobs.c.requester, jobs.c.created_at)

events = sa.Table(
    "job_events",
    metadata,
    # SQLite counts rows up by itself only for a plain INTEGER
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("job_id", sa.ForeignKey("jobs.job_id", ondelete="CASCADE"), nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("type", sa.String(16), nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
)
sa.Index("job_events_job", events.c.job_id, events.c.id)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("token_hash", sa.String(64), primary_key=True),
    sa.Column("purpose", sa.String(16), nullable=False),
    sa.Column("job_id", sa.String(36), nullable=False),
    sa.Column("requester", sa.String(128), nullable=False),
    sa.Column("node", sa.String(63), nullable=False),
    sa.Column("server_id", sa.BigInteger),
    sa.Column("address", sa.String(64)),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger, nullable=False),
    sa.Column("used_at", sa.BigInteger),
    sa.Column("used_by", sa.String(64)),
    sa.Column("spec_json", sa.Text, nullable=False),
)
sa.Index("tokens_job", tokens.c.job_id)
sa.Index("tokens_expiry", tokens.c.expires_at)


class Ids:
    """UUIDs of version 7 (RFC 9562): the time in ms, then 74 random bits. What is new stands together in an index, and a commit
    writes few of its pages. The random bytes are fetched many at a time: each fetch lets go of the interpreter for a while."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._left: list[str] = []

    def __call__(self) -> str:
        time = self._clock() & 0xFFFF_FFFF_FFFF
        while True:
            try:
                return f"{time >> 16:08x}-{time & 0xFFFF:04x}-{self._left.pop()}"
            except IndexError:
                some = os.urandom(10 * 64).hex()
                self._left += [_version_7(some[at : at + 20]) for at in range(0, len(some), 20)]


def _version_7(random: str) -> str:
    """The last three groups of a UUID, of 20 hex digits; the version and the variant take six of the 80 bits."""
    return f"7{random[1:4]}-{'89ab'[int(random[4], 16) & 3]}{random[5:8]}-{random[8:]}"


class Store:
    """Open it, ``write`` and ``read`` with operations on a connection, ``close`` it. StoreError says what is wrong."""

    def __init__(self, engine: Engine, *, path: Path | None = None) -> None:
        self._engine = engine
        self._path = path
        self._lock = threading.Condition()
        self._waiting: list[Asked] = []
        self._closed = False
        self._turn = threading.Lock()
        self._committer = Committer(engine)
        self._here: list[Asked] = []
        self._loop: tuple[int, asyncio.AbstractEventLoop | None] = (0, None)
        self._committer_here = Committer(engine, patient=False)
        self._thread_until = 0.0 if path is not None else math.inf
        with in_words():
            _migrate(engine)
        if path is not None:
            check_modes(path)
        self._writer = threading.Thread(target=self._work, name="clf-store", daemon=True)
        self._writer.start()

    @property
    def engine(self) -> Engine:
        """For statements that need no transaction of the writer."""
        return self._engine

    @property
    def is_sqlite(self) -> bool:
        """Whether this is SQLite."""
        return self._path is not None

    def submit(self, operation: Operation[T] | Row) -> Future[T]:
        """A future of the operation's result, set once it is durable."""
        future: Future[T] = Future()
        self._enqueue(operation, future)
        return future

    def _enqueue(self, operation: Operation[Any] | Row, waiter: Waiter) -> None:
        with self._lock:
            if self._closed:
                raise StoreError("is closed", reason="closed")
            self._waiting.append((operation, waiter))
            self._lock.notify()

    def submit_here(self, operation: Operation[T] | Row) -> asyncio.Future[T]:
        """As ``submit``, with a future of the running event loop."""
        loop = self._running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if self._closed or time.monotonic() < self._thread_until:
            self._enqueue(operation, future)
        else:
            self._here.append((operation, future))
            if len(self._here) == 1:
                loop.call_soon(self._commit_here, loop, 0)
        return future

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """As asyncio's, which asks the kernel for the process each time: a thread runs one loop at a time."""
        thread, loop = self._loop
        if loop is None or thread != threading.get_ident() or not loop.is_running():
            loop = asyncio.get_running_loop()
            self._loop = threading.get_ident(), loop
        return loop

    def _commit_here(self, loop: asyncio.AbstractEventLoop, before: int) -> None:
        """Commit what the loop's turns bring, once one brings no more; what does not succeed at once is the thread's."""
        if before < len(self._here) < BATCH:
            loop.call_soon(self._commit_here, loop, len(self._here))
            return
        batch, self._here = self._here[:BATCH], self._here[BATCH:]
        if self._here:
            loop.call_soon(self._commit_here, loop, 0)
        if not self._closed and self._turn.acquire(blocking=False):
            begun = time.monotonic()
            try:
                told = self._committer_here.commit(batch)
            except Exception:  # whatever it is, the thread meets it again, and tells whom it concerns
                self._thread_until = time.monotonic() + THREAD_FOR_S
            else:  # it is committed, and must not be tried again, come what may
                if (now := time.monotonic()) - begun > QUICK_S:
                    self._thread_until = now + THREAD_FOR_S
                settle(told)
                return
            finally:
                self._turn.release()
        for operation, waiter in batch:
            try:
                self._enqueue(operation, waiter)
            except StoreError as error:
                settle([(waiter, None, error)])

    def write(self, operation: Operation[T]) -> T:
        """The operation's result, once it is durable."""
        return self.submit(operation).result()

    def read(self, operation: Operation[T]) -> T:
        """The result of an operation that only reads; it never waits for the writer."""
        with in_words(), self._engine.connect().execution_options(clf_read=True) as connection:
            return operation(connection)

    def tidy(self) -> None:
        """After a prune: deleted rows leave the write-ahead log, and free pages go back to the disk."""
        if not self.is_sqlite:
            return
        with in_words(), self._engine.connect().execution_options(clf_bare=True) as connection:
            raw: Any = connection.connection.dbapi_connection
            try:
                for pragma in ("incremental_vacuum", "wal_checkpoint(TRUNCATE)"):
                    raw.execute(f"PRAGMA {pragma}").fetchall()  # the first works a page a step, until all are fetched
            except Exception as error:
                raise StoreError(f"could not be tidied ({type(error).__name__})", reason="busy") from None

    def close(self) -> None:
        """Finish what was submitted, then let go of the database."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._writer.join()
        with self._turn:
            self._committer_here.close()
        self._engine.dispose()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._waiting and not self._closed:
                    self._lock.wait()
                batch, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
                if not batch:
                    break
            with self._turn:
                told = self._commit(batch)
            tell(told)
        self._committer.close()

    def _commit(self, batch: list[Asked], *, again: bool = False) -> list[Told]:
        """One transaction for all; when one of them fails, one for each, unless it is the store that fails: then none of them
        has a chance, and each trying by itself would have all wait for all."""
        try:
            return self._committer.commit(batch)
        except BaseException as error:
            if not again and isinstance(error, StoreError) and error.reason == "unreachable":
                return self._commit(batch, again=True)  # a connection may be stale: the next one is new
            if len(batch) == 1 or (isinstance(error, StoreError) and error.reason in _OF_THE_STORE):
                return [(waiter, None, error) for _, waiter in batch]
            return [told for one in batch for told in self._commit([one])]


def open_sqlite(path: Path, *, busy_timeout_ms: int = BUSY_TIMEOUT_MS) -> Store:
    """The store in the file ``path``, made when missing (0600, in a folder that must be 0700); StoreError otherwise."""
    check_modes(path)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StoreError(f"cannot be opened ({error.strerror})", where=str(path), reason="unreachable") from error
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)), connect_args={"check_same_thread": False, "timeout": 0}
    )

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours, see below
        for pragma in (
            f"busy_timeout = {busy_timeout_ms}",
            "auto_vacuum = INCREMENTAL",
            "wal_autocheckpoint = 4000",  # pages, 16 MB: who commits when it is due waits for it, and should be one in many
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "secure_delete = ON",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        if not options.get("clf_bare"):
            raw: Any = connection.connection.dbapi_connection
            raw.execute("BEGIN" if options.get("clf_read") else "BEGIN IMMEDIATE")

    with in_words(str(path)):
        with engine.connect().execution_options(clf_read=True) as connection:
            verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if verdict != "ok":
            raise StoreError("is damaged", where=str(path), fix=RESTORE, reason="corrupt")
    return Store(engine, path=path)


def open_postgresql(url: str) -> Store:
    """The store in a PostgreSQL database; ``url`` as libpq takes it, ``postgresql://user@host/name``."""
    rest = url.split("://", 1)[-1]
    try:
        engine = sa.create_engine(
            f"postgresql+psycopg://{rest}",
            poolclass=NullPool,
            hide_parameters=True,
            connect_args={"client_encoding": "utf8"},  # without it text of a SQL_ASCII database comes as bytes
        )
    except SQLAlchemyError:
        raise StoreError("the PostgreSQL URL cannot be read", reason="unreachable") from None
    return Store(engine)


def check_modes(path: Path) -> None:
    """StoreError when the folder of ``path`` is open to group or others, or the database, -wal, -shm or -journal is."""
    folder = path.parent
    try:
        info = os.lstat(folder)
    except OSError as error:
        raise StoreError(f"cannot be looked at ({error.strerror})", where=str(folder), reason="unreachable") from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid not in (os.geteuid(), 0):
        raise StoreError("is not a folder of this user", where=str(folder), reason="modes")
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise StoreError(
            f"is open to others ({stat.S_IMODE(info.st_mode):04o})",
            where=str(folder),
            fix=f"chmod 700 {folder}",
            reason="modes",
        )
    for name in (path.name, *(path.name + suffix for suffix in ("-wal", "-shm", "-journal"))):
        try:
            info = os.lstat(folder / name)
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(info.st_mode) or stat.S_IMODE(info.st_mode) & 0o177:
            raise StoreError(
                f"is not a private file ({stat.S_IMODE(info.st_mode):04o})",
                where=str(folder / name),
                fix=f"chmod 600 {folder / name}",
                reason="modes",
            )


def _migrate(engine: Engine) -> None:
    """Bring the database to SCHEMA; refuse one that we do not know."""
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(1668048225)")  # one at a time; "clfa"
        present = set(sa.inspect(connection).get_table_names())
        if schema_version.name not in present:
            if present & {table.name for table in metadata.sorted_tables}:
                raise StoreError(
                    "holds tables of somebody else's", fix="give it a database of its own", reason="unknown"
                )
            metadata.create_all(connection)
            connection.execute(schema_version.insert(), {"version": SCHEMA})
            return
        found = connection.execute(sa.select(schema_version.c.version)).scalars().all()
        if found != [SCHEMA]:
            raise StoreError(
                f"has the schema version {', '.join(map(str, found)) or 'none'}; this program knows {SCHEMA}",
                fix="run the version of clf-orchestrator that wrote it, or a newer one",
                reason="unknown",
            )
