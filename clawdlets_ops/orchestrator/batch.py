"""What many callers ask of the database, as one transaction: every caller gets its own answer, and only after the commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import dialect as sqlite
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from clawdlets_ops.errors import StoreError

T = TypeVar("T")
Waiter = Future[Any] | asyncio.Future[Any]

SQLITE_ERROR: type[Exception] = sqlite.import_dbapi().Error
"""What the driver raises where it is spoken to past SQLAlchemy, which costs more than the insert of a row."""

RESTORE = "stop clf-orchestrator, move state.sqlite and its -wal and -shm away, and restore a backup"


class Refusal(Exception):
    """An operation refused before it wrote anything: its caller is told, its companions in the batch are committed."""


Operation = Callable[[Connection], T]
"""It may run twice (a companion failed, and each is done again by itself), so it touches only its connection."""
Row = tuple[sa.Table, Mapping[str, Any]]
"""An insert that depends on nothing, done together with others."""

Asked = tuple[Operation[Any] | Row, Waiter]
Told = tuple[Waiter, Any, BaseException | None]


def tell(told: list[Told]) -> None:
    """Give every caller its answer; those that wait in an event loop, all of a loop by one call."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Told]] = {}
    for one in told:
        if isinstance(one[0], asyncio.Future):
            by_loop.setdefault(one[0].get_loop(), []).append(one)
        else:
            settle([one])
    for loop, many in by_loop.items():
        with suppress(RuntimeError):  # the loop has ended, and its callers with it
            loop.call_soon_threadsafe(settle, many)


def settle(told: list[Told]) -> None:
    """Give those that wait in this event loop, or anywhere by a future of theirs, their answers."""
    for waiter, result, error in told:
        if waiter.cancelled():
            continue
        if error is None:
            waiter.set_result(result)
        else:
            waiter.set_exception(error)


class Committer:
    """A connection that is made when it is needed, and anew after a failure. ``patient`` ones wait for a lock of SQLite's."""

    def __init__(self, engine: Engine, *, patient: bool = True) -> None:
        self._engine = engine
        self._patient = patient
        self._connection: Connection | None = None
        self._inserts: dict[tuple[sa.Table, tuple[str, ...]], tuple[str, Sequence[str] | None]] = {}

    def commit(self, batch: Sequence[Asked]) -> list[Told]:
        """One transaction for all of ``batch``: every one's answer, or the exception that ended it."""
        try:
            answers = self._transaction([operation for operation, _ in batch])
        except BaseException:
            with suppress(SQLAlchemyError):
                self.close(broken=True)
            raise
        return [(waiter, *answer) for (_, waiter), answer in zip(batch, answers, strict=True)]

    def close(self, *, broken: bool = False) -> None:
        """Let go of the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if broken:
                connection.invalidate()
            connection.close()

    def _transaction(self, operations: Sequence[Operation[Any] | Row]) -> list[tuple[Any, Refusal | None]]:
        answers: list[tuple[Any, Refusal | None]] = []
        rows: dict[sa.Table, list[Mapping[str, Any]]] = {}
        with in_words():
            connection = self._connection or self._connect()
            with connection.begin():
                for operation in operations:
                    if not callable(operation):
                        table, row = operation
                        rows.setdefault(table, []).append(row)
                        answers.append((None, None))
                        continue
                    self._insert(connection, rows)
                    try:
                        answers.append((operation(connection), None))
                    except Refusal as refusal:
                        answers.append((None, refusal))
                self._insert(connection, rows)
        return answers

    def _connect(self) -> Connection:
        self._connection = connection = self._engine.connect()
        if not self._patient:
            raw: Any = connection.connection.dbapi_connection
            connection.detach()  # it does not go back to where others get theirs
            raw.execute("PRAGMA busy_timeout = 0").fetchall()
        return connection

    def _insert(self, connection: Connection, rows: dict[sa.Table, list[Mapping[str, Any]]]) -> None:
        """Rows of a table have the same columns. The driver is given its words: for many small rows, building them anew each time
        costs more than the insert."""
        for table, many in rows.items():
            columns = tuple(many[0])
            insert = self._inserts.get((table, columns))
            if insert is None:
                compiled = table.insert().compile(dialect=connection.dialect, column_keys=columns)
                insert = self._inserts[table, columns] = (compiled.string, compiled.positiontup)
            words, order = insert
            if order is None:
                connection.exec_driver_sql(words, many)
            else:
                raw: Any = connection.connection.dbapi_connection
                raw.executemany(words, [tuple([row[name] for name in order]) for row in many])
        rows.clear()


class in_words:
    """Turns what the database drivers raise into StoreError, without the statement's parameters."""

    def __init__(self, where: str = "the store") -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (DBAPIError, SQLITE_ERROR)):
            raise _described(error, self._where) from None
        if isinstance(error, StoreError) and not error.where:
            raise StoreError(error.what, where=self._where, fix=error.fix, reason=error.reason) from None


def _described(error: BaseException, where: str) -> StoreError:
    orig, disconnected = (error.orig, error.connection_invalidated) if isinstance(error, DBAPIError) else (error, False)
    name = str(getattr(orig, "sqlite_errorname", ""))
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
    state = str(getattr(orig, "sqlstate", None) or "")
    if state.startswith("53"):  # insufficient resources, postgresql.org/docs: errcodes
        return StoreError("PostgreSQL has no room", where=where, fix="free space on its disk", reason="full")
    kind = type(orig).__name__
    # SQLITE_ERROR: a statement that is none, which the driver calls operational too
    if (kind in ("OperationalError", "InterfaceError") or disconnected) and name != "SQLITE_ERROR":
        return StoreError("the database does not answer", where=where, fix="is PostgreSQL up?", reason="unreachable")
    return StoreError(f"the database refused ({kind} {state or name})".rstrip(), where=where, reason="refused")
