"""The engine: one way to reach the file, for the library and for the migrations."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.pool import QueuePool

APPLICATION_ID = 0x6B767331
"""``PRAGMA application_id`` of our files: ``kvs1`` in ASCII."""

PAGE_SIZE_NBYTES = 16384
INCREMENTAL = 2
"""``PRAGMA auto_vacuum`` of our files."""

MAX_MMAP_NBYTES = 0x7FFF0000
"""As much of a file as SQLite maps at most, unless it was built otherwise."""

MAX_VARIABLES = 500
"""Bound parameters in one statement; SQLite's own limit was once 999."""

BUSY_TIMEOUT_SECONDS = 10.0
_CHECKPOINT_WAIT_MS = 200
_WAL_RETRY_SECONDS = 0.01

Access = Literal["create", "write", "query", "read", "immutable"]


class _Connection(sqlite3.Connection):
    """A connection whose end is also the end of its transaction.

    Where a cursor is still open (after an interrupt in the middle of a statement), SQLite only
    closes when that is collected, and would hold the write lock till then.
    """

    def close(self) -> None:
        try:
            if self.in_transaction:
                self.rollback()
        finally:
            super().close()


def uri_of(path: Path, access: Access) -> str:
    """What SQLite opens the file by."""
    mode = {"create": "rwc", "read": "ro", "immutable": "ro&immutable=1"}.get(access, "rw")
    return f"{path.absolute().as_uri()}?mode={mode}"


def reading_pragmas(mmap_nbytes: int) -> tuple[str, ...]:
    """How every connection reads the file, which may be anybody's and damaged."""
    return (
        "trusted_schema = OFF",
        "cell_size_check = ON",
        # Said also when it is 0: SQLite may have been built with another default.
        f"mmap_size = {mmap_nbytes}",
    )


def connector(
    path: Path,
    *,
    access: Access,
    busy_timeout_seconds: float = BUSY_TIMEOUT_SECONDS,
    views: Sequence[str] = (),
    mmap_nbytes: int = 0,
) -> Callable[[], sqlite3.Connection]:
    """What opens one more connection to ``path``; the file is never opened in another way.

    ``create`` makes a missing file, and is for nothing else: its settings take the write
    lock. ``query`` may write the file but does not, so that its last connection tidies the
    WAL away; ``read`` may not, and needs a writable folder if there is a WAL;
    ``immutable`` promises that nobody changes the file meanwhile. ``views`` are statements that
    make temporary views, in each connection's own memory, in front of the file's tables.
    ``mmap_nbytes`` at the start of the file are mapped: an I/O error there ends the process.
    Transactions are explicit: the driver's own are off.
    """
    uri = uri_of(path, access)

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            uri,
            uri=True,
            isolation_level=None,
            check_same_thread=False,  # whoever lends a connection lends it to one thread at a time
            timeout=busy_timeout_seconds,
            factory=_Connection,
        )
        try:
            if access == "create":
                # Both are ignored once the file has a page; they must come before WAL.
                connection.execute(f"PRAGMA page_size = {PAGE_SIZE_NBYTES}")
                connection.execute(f"PRAGMA auto_vacuum = {INCREMENTAL}")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
            # Some builds of SQLite overwrite what they delete: a save that replaces a tail would
            # write it once more, and again at the checkpoint.
            connection.execute("PRAGMA secure_delete = FAST").fetchall()
            for pragma in reading_pragmas(mmap_nbytes):
                connection.execute(f"PRAGMA {pragma}")
            if views:
                connection.execute("PRAGMA temp_store = MEMORY")
            for view in views:
                connection.execute(view)
            if access == "query":
                connection.execute("PRAGMA query_only = ON")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    return connect


def make_engine(
    path: Path,
    *,
    access: Access,
    busy_timeout_seconds: float = BUSY_TIMEOUT_SECONDS,
    views: Sequence[str] = (),
    mmap_nbytes: int = 0,
) -> sa.Engine:
    """An engine on ``path``, with the connections of ``connector``.

    A ``begin`` listener emits ``BEGIN``, so that schema changes roll back like everything else.
    """
    connect = connector(
        path,
        access=access,
        busy_timeout_seconds=busy_timeout_seconds,
        views=views,
        mmap_nbytes=mmap_nbytes,
    )
    engine = sa.create_engine(
        "sqlite://", creator=connect, poolclass=QueuePool, pool_size=4, max_overflow=12
    )

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        mode = connection.get_execution_options().get("kvstore_begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {mode}")

    return engine


@contextmanager
def read_transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection that sees one unchanging snapshot; never blocks and is never blocked."""
    with engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def exclusive_transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    """The write lock, taken at once; commits at the end, rolls back on any exception.

    For migrations, and for ``kvstore.db.writing``, which everything else writes through.
    """
    immediate = engine.connect().execution_options(kvstore_begin="IMMEDIATE")
    with immediate as connection, connection.begin():
        yield connection


@contextmanager
def unmapped(connection: sa.Connection) -> Iterator[None]:
    """Read the file without its mapping meanwhile, so that what is damaged is an error."""
    mmap_nbytes = connection.exec_driver_sql("PRAGMA mmap_size").scalar() or 0
    connection.exec_driver_sql("PRAGMA mmap_size = 0")
    try:
        yield
    finally:
        connection.exec_driver_sql(f"PRAGMA mmap_size = {mmap_nbytes}")


@cache
def _insert_of(table: sa.Table) -> sa.Insert:
    return sa.insert(table)


def insert_row(connection: sa.Connection, table: sa.Table, **values: Any) -> int:
    """Insert one row; returns its id."""
    inserted = connection.execute(_insert_of(table), values).inserted_primary_key
    if inserted is None:
        raise TypeError(f"expected a table with a key that is given out, found {table}")
    return int(inserted[0])


def driver_connection(connection: sa.Connection) -> sqlite3.Connection:
    """The driver's own connection, in the same transaction."""
    driver = connection.connection.driver_connection
    if not isinstance(driver, sqlite3.Connection):
        raise TypeError(f"expected a sqlite3 connection, found {type(driver)}")
    return driver


def pragma(connection: sa.Connection, name: str) -> int:
    """The integer value of ``PRAGMA name``."""
    value: int = connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
    return value


def size_nbytes(connection: sa.Connection) -> int:
    """Bytes of the database file as this transaction sees it (without the WAL)."""
    return pragma(connection, "page_count") * pragma(connection, "page_size")


def used_nbytes(connection: sa.Connection) -> int:
    """``size_nbytes`` less the pages that are free."""
    pages = pragma(connection, "page_count") - pragma(connection, "freelist_count")
    return pages * pragma(connection, "page_size")


def shrink(connection: sa.Connection) -> None:
    """Give free pages up; the file gets shorter at the next checkpoint."""
    driver = driver_connection(connection)
    # The statement frees one page a step, and the driver takes only one step of
    # a statement that gives no columns (measured on Python 3.11).
    for _ in range(pragma(connection, "freelist_count")):
        driver.execute("PRAGMA incremental_vacuum")


def checkpoint(engine: sa.Engine) -> None:
    """Move the WAL into the file and give its space back, as far as readers let it.

    Readers are not waited for: what they still need stays in the WAL until a
    later checkpoint, at the latest until the last connection closes.
    """
    with engine.connect() as connection:
        driver = driver_connection(connection)
        (timeout_ms,) = driver.execute("PRAGMA busy_timeout").fetchone()
        driver.execute(f"PRAGMA busy_timeout = {min(timeout_ms, _CHECKPOINT_WAIT_MS)}")
        try:
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            driver.execute(f"PRAGMA busy_timeout = {timeout_ms}")


def use_wal(engine: sa.Engine) -> None:
    """Let readers and a writer work at the same time; remembered in the file.

    SQLite does not wait for the lock that the change takes, so the waiting is done here.
    """
    with engine.connect() as connection:
        driver = driver_connection(connection)
        (timeout_ms,) = driver.execute("PRAGMA busy_timeout").fetchone()
        deadline = time.monotonic() + timeout_ms / 1000
        while driver.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            try:
                driver.execute("PRAGMA journal_mode = WAL").fetchall()
            except sqlite3.OperationalError as error:
                is_locked = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not is_locked or time.monotonic() > deadline:
                    raise
                time.sleep(_WAL_RETRY_SECONDS)
