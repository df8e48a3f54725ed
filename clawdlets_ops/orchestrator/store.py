"""The orchestrator's database: SQLite in a private folder, or PostgreSQL by URL.

All writes go through one thread. What arrives while a transaction is being committed goes into the next one, together, and
each caller is answered only after *its* commit (group commit): with ``synchronous = FULL`` nothing that was acknowledged is
lost to a power cut, at a fraction of a commit per row. SQLite facts: sqlite.org/pragma.html, sqlite.org/rescode.html.
"""

from __future__ import annotations

import asyncio
import os
import stat
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from clawdlets_ops.errors import StoreError

T = TypeVar("T")
Waiter = Future[Any] | asyncio.Future[Any]

SCHEMA = 1
BATCH = 256
BUSY_TIMEOUT_MS = 5_000

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


class Refusal(Exception):
    """An operation refused before it wrote anything: its caller is told, its companions in the batch are committed."""


Operation = Callable[[Connection], T]
Rows = Sequence[tuple[sa.Table, Mapping[str, Any]]]


Told = tuple[Waiter, Any, BaseException | None]


def _tell(told: list[Told]) -> None:
    """Give every caller its answer; those that wait in an event loop, all of a loop by one call."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Told]] = {}
    for one in told:
        if isinstance(one[0], asyncio.Future):
            by_loop.setdefault(one[0].get_loop(), []).append(one)
        else:
            _settle([one])
    for loop, many in by_loop.items():
        with suppress(RuntimeError):  # the loop has ended, and its callers with it
            loop.call_soon_threadsafe(_settle, many)


def _settle(told: list[Told]) -> None:
    for waiter, result, error in told:
        if waiter.cancelled():
            continue
        if error is None:
            waiter.set_result(result)
        else:
            waiter.set_exception(error)


class Ids:
    """Random UUIDs (version 4), whose bytes are fetched many at a time: each fetch lets go of the interpreter for a while."""

    def __init__(self) -> None:
        self._left: list[str] = []

    def __call__(self) -> str:
        while True:
            try:
                return self._left.pop()
            except IndexError:
                some = os.urandom(16 * 64)
                made = [uuid.UUID(bytes=some[at : at + 16], version=4) for at in range(0, len(some), 16)]
                self._left += [str(one) for one in made]


class Store:
    """Open it, ``write`` and ``read`` with operations on a connection, ``close`` it. StoreError says what is wrong.

    An operation may run twice (a companion failed, the batch is done again one by one), so it touches only its connection.
    """

    def __init__(self, engine: Engine, *, path: Path | None = None) -> None:
        self._engine = engine
        self._path = path
        self._lock = threading.Condition()
        self._waiting: list[tuple[Operation[Any] | Rows, Waiter]] = []
        self._closed = False
        self._connection: Connection | None = None
        with _in_words():
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

    def submit(self, operation: Operation[T] | Rows) -> Future[T]:
        """A future of the operation's result, set once it is durable. ``Rows`` are inserts, done together with others."""
        future: Future[T] = Future()
        self._enqueue(operation, future)
        return future

    def _enqueue(self, operation: Operation[Any] | Rows, waiter: Waiter) -> None:
        with self._lock:
            if self._closed:
                raise StoreError("is closed", reason="closed")
            self._waiting.append((operation, waiter))
            self._lock.notify()

    def submit_here(self, operation: Operation[T] | Rows) -> asyncio.Future[T]:
        """As ``submit``, with a future of the running event loop; a whole batch is told to the loop at once."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._enqueue(operation, future)
        return future

    def write(self, operation: Operation[T]) -> T:
        """The operation's result, once it is durable."""
        return self.submit(operation).result()

    def read(self, operation: Operation[T]) -> T:
        """The result of an operation that only reads; it never waits for the writer."""
        with _in_words(), self._engine.connect().execution_options(clf_read=True) as connection:
            return operation(connection)

    def tidy(self) -> None:
        """After a prune: deleted rows leave the write-ahead log, and free pages go back to the disk."""
        if not self.is_sqlite:
            return
        with _in_words(), self._engine.connect().execution_options(clf_bare=True) as connection:
            raw: Any = connection.connection.driver_connection
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
        self._engine.dispose()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._waiting and not self._closed:
                    self._lock.wait()
                batch, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
                if not batch:
                    break
            _tell(self._commit(batch))
        if self._connection is not None:
            self._connection.close()

    def _commit(self, batch: list[tuple[Operation[Any] | Rows, Waiter]]) -> list[Told]:
        """One transaction for all; when one of them fails, one for each."""
        try:
            answers = self._transaction(batch)
        except BaseException as error:
            self._reset()
            if len(batch) == 1:
                return [(batch[0][1], None, error)]
            return [told for one in batch for told in self._commit([one])]
        return [(waiter, *answer) for (_, waiter), answer in zip(batch, answers, strict=True)]

    def _transaction(self, batch: list[tuple[Operation[Any] | Rows, Waiter]]) -> list[tuple[Any, Refusal | None]]:
        answers: list[tuple[Any, Refusal | None]] = []
        rows: dict[sa.Table, list[Mapping[str, Any]]] = {}
        with _in_words():
            if self._connection is None:
                self._connection = self._engine.connect()
            with self._connection.begin():
                for operation, _ in batch:
                    if not callable(operation):
                        for table, row in operation:
                            rows.setdefault(table, []).append(row)
                        answers.append((None, None))
                        continue
                    _insert(self._connection, rows)
                    try:
                        answers.append((operation(self._connection), None))
                    except Refusal as refusal:
                        answers.append((None, refusal))
                _insert(self._connection, rows)
        return answers

    def _reset(self) -> None:
        """The next transaction begins on a connection of its own."""
        if self._connection is not None:
            with suppress(SQLAlchemyError):
                self._connection.invalidate()
                self._connection.close()
            self._connection = None


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
            connection.exec_driver_sql("BEGIN" if options.get("clf_read") else "BEGIN IMMEDIATE")

    with _in_words(str(path)):
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


RESTORE = "stop clf-orchestrator, move state.sqlite and its -wal and -shm away, and restore a backup"


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


def _insert(connection: Connection, rows: dict[sa.Table, list[Mapping[str, Any]]]) -> None:
    for table, many in rows.items():
        connection.execute(table.insert(), many)
    rows.clear()


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


class _in_words:
    """Turns what the database drivers raise into StoreError, without the statement's parameters."""

    def __init__(self, where: str = "the store") -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DBAPIError):
            raise _described(error, self._where) from None
        if isinstance(error, StoreError) and not error.where:
            raise StoreError(error.what, where=self._where, fix=error.fix, reason=error.reason) from None


def _described(error: DBAPIError, where: str) -> StoreError:
    name = str(getattr(error.orig, "sqlite_errorname", ""))
    for prefix, reason, what, fix in (
        ("SQLITE_BUSY", "busy", "is locked by another process", "end what else has it open"),
        ("SQLITE_LOCKED", "busy", "is locked by another process", "end what else has it open"),
        ("SQLITE_FULL", "full", "the disk is full", "free space below /var/lib/clf"),
        ("SQLITE_READONLY", "readonly", "cannot be written", "check the owner of the files and the mount"),
        ("SQLITE_CANTOPEN", "unreachable", "cannot be opened", "check the owner of the folder"),
        ("SQLITE_IOERR", "io", f"the disk answers with an error ({name})", "look at the kernel's log"),
        ("SQLITE_CORRUPT", "corrupt", "is damaged", RESTORE),
        ("SQLITE_NOTADB", "corrupt", "is not a SQLite database", RESTORE),
    ):
        if name.startswith(prefix):
            return StoreError(what, where=where, fix=fix, reason=reason)
    state = str(getattr(error.orig, "sqlstate", None) or "")
    if state.startswith("53"):  # insufficient resources, postgresql.org/docs: errcodes
        return StoreError("PostgreSQL has no room", where=where, fix="free space on its disk", reason="full")
    kind = type(error.orig).__name__
    if kind in ("OperationalError", "InterfaceError") or error.connection_invalidated:
        return StoreError("the database does not answer", where=where, fix="is PostgreSQL up?", reason="unreachable")
    return StoreError(f"the database refused ({kind} {state or name})".rstrip(), where=where, reason="refused")
