"""SQLite's and SQLAlchemy's exceptions, as ours."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from kvstore.errors import (
    CorruptStoreError,
    DiskFullError,
    NotAStoreError,
    ReadOnlyStoreError,
    StoreBusyError,
    StoreError,
    StorePathError,
)


@contextmanager
def vendor_errors(path: Path) -> Iterator[None]:
    """Raise SQLite's and SQLAlchemy's errors about ``path`` as ``StoreError`` subclasses."""
    try:
        yield
    except DBAPIError as error:
        raise as_store_error(error.orig, path) from error
    except (sqlite3.Error, SQLAlchemyError) as error:
        raise as_store_error(error, path) from error
    except UnicodeDecodeError as error:
        # The driver cannot read SQLite's own message where a damaged schema is quoted in it.
        raise CorruptStoreError(
            f"{path}: the database file is damaged (its schema is not UTF-8); restore a copy of it"
        ) from error


def as_store_error(error: BaseException | None, path: Path) -> StoreError:
    """The ``StoreError`` that says what ``error`` means for the user of ``path``."""
    if isinstance(error, StoreError):
        return error
    if isinstance(error, PoolTimeoutError):
        return StoreBusyError(
            f"{path}: too many threads use this store at once, and none of them ended its call in "
            "time; try again, or share the work out among fewer"
        )
    # The low byte is the primary result code: https://www.sqlite.org/rescode.html
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    match code:
        case sqlite3.SQLITE_FULL:
            return DiskFullError(
                f"{path}: no room left to write; the write was undone. "
                "Free some space, or prune the store"
            )
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return StoreBusyError(
                f"{path}: another process is writing and did not finish in time; try again"
            )
        case sqlite3.SQLITE_NOTADB:
            return NotAStoreError(
                f"{path}: expected a kvstore file, found something that is not SQLite; "
                "check the path"
            )
        case sqlite3.SQLITE_CORRUPT:
            return CorruptStoreError(
                f"{path}: the database file is damaged ({error}); restore a copy of it"
            )
        case sqlite3.SQLITE_READONLY:
            return ReadOnlyStoreError(
                f"{path}: expected a writable file, but it is read-only; change its permissions, "
                "or open it with read_only=True"
            )
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
            return StorePathError(
                f"{path}: cannot be opened ({error}); check that it and its folder "
                "may be read and written"
            )
        case sqlite3.SQLITE_IOERR:
            return StoreError(
                f"{path}: the file system failed ({error}); nothing was half-written. "
                "Check the disk, then try again"
            )
        case _:
            return StoreError(f"{path}: {error}")
