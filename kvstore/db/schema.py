"""Opening a file: made by the migrations alone, checked object for object before it is used."""

from __future__ import annotations

import os
import re
import sqlite3
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import sqlalchemy as sa

from kvstore._bundle import schemas_dir
from kvstore.db import engine as db
from kvstore.db.basis_cache import BasisCache
from kvstore.db.readers import Readers
from kvstore.db.tables import FORMAT_VERSION
from kvstore.db.vendor import vendor_errors
from kvstore.errors import (
    NewerFormatError,
    NotAStoreError,
    SchemaMismatchError,
    StorePathError,
)

VIEWS_OF_OLDER: dict[int, tuple[str, ...]] = {
    1: ("CREATE TEMP VIEW chunks AS SELECT *, x'' AS extras FROM main.chunks",),
    2: (),
}
"""What makes a file of an older version look like one of this version, for reading only.

A table that it lacks has no view, which would hide the table if another process upgrades the file
meanwhile: ``kvstore.db.bases`` asks whether there is one.
"""

SchemaObjects = frozenset[tuple[str, str, str, str]]
"""``sqlite_schema`` as ``(type, name, tbl_name, normalised sql)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Database:
    """An engine on a checked file of the current format, readers of its payloads, known bases."""

    path: Path
    engine: sa.Engine
    readers: Readers
    bases: BasisCache
    read_only: bool

    def close(self) -> None:
        """Close all connections that are not in use."""
        self.readers.close()
        self.engine.dispose()


def open_database(
    path: Path, *, read_only: bool, busy_timeout_seconds: float, mmap_nbytes: int = 0
) -> Database:
    """The database at ``path``: created if missing, upgraded if older, else only checked.

    An older one that may not be written is read as it is. ``mmap_nbytes`` of the file are mapped
    once it is checked.

    Raises:
        StorePathError: a directory, a missing folder, no permission, or a
            read-only folder that holds an unfinished WAL.
        NotAStoreError: not SQLite, or SQLite of somebody else.
        SchemaMismatchError: ours, with objects that its version does not have.
        NewerFormatError: made by a newer version that this one cannot read.
    """
    try:
        access = _choose_access(path, read_only=read_only)
    except (OSError, ValueError) as error:  # ValueError: a NUL, or text that is no file name
        raise StorePathError(
            f"{path}: cannot be reached ({error}); check the path and its folders' permissions"
        ) from error
    engine = db.make_engine(path, access=access, busy_timeout_seconds=busy_timeout_seconds)
    try:
        with vendor_errors(path):
            # Blank: its creation was cut off. It begins again, with what must come before page 1.
            if access == "create" or (access == "write" and _is_blank(engine, path)):
                engine.dispose()
                _create(path, busy_timeout_seconds=busy_timeout_seconds)
                access = "write"
                engine = db.make_engine(
                    path, access=access, busy_timeout_seconds=busy_timeout_seconds
                )
            with db.read_transaction(engine) as connection:
                version, newer = _check_identity(connection, path)
                _check_schema(connection, path, newer=newer)
            if version < FORMAT_VERSION and access == "write":
                _migrate(engine, path)
                with db.read_transaction(engine) as connection:
                    _check_schema(connection, path, newer=False)
            elif version < FORMAT_VERSION:
                engine.dispose()
                engine = db.make_engine(
                    path,
                    access=access,
                    busy_timeout_seconds=busy_timeout_seconds,
                    views=_views(version, access),
                )
            if access == "write" and not newer:
                db.use_wal(engine)
            if mmap_nbytes:
                engine.dispose()
                engine = db.make_engine(
                    path,
                    access=access,
                    busy_timeout_seconds=busy_timeout_seconds,
                    views=_views(version, access),
                    mmap_nbytes=mmap_nbytes,
                )
    except BaseException:
        engine.dispose()
        raise
    # A helper that would have to wait gives up: its load goes on without it.
    readers = Readers(
        db.connector(path, access=access, busy_timeout_seconds=0, mmap_nbytes=mmap_nbytes),
        uri=db.uri_of(path, access),
        pragmas=db.reading_pragmas(mmap_nbytes),
    )
    return Database(
        path=path,
        engine=engine,
        readers=readers,
        bases=BasisCache(),
        read_only=newer or access != "write",
    )


def _views(version: int, access: db.Access) -> tuple[str, ...]:
    """What a file of that version needs in front of it; one that may be written was upgraded."""
    return () if access == "write" else VIEWS_OF_OLDER.get(version, ())


def _create(path: Path, *, busy_timeout_seconds: float) -> None:
    """Make the file, unless another process was first."""
    engine = db.make_engine(path, access="create", busy_timeout_seconds=busy_timeout_seconds)
    try:
        _migrate(engine, path)
    finally:
        engine.dispose()


def _choose_access(path: Path, *, read_only: bool) -> db.Access:
    """How to open ``path``, from what the file system says; opens nothing."""
    if b"\0" in os.fsencode(path):
        raise ValueError("embedded null byte")
    folder = path.absolute().parent
    if path.is_dir():
        raise StorePathError(f"{path}: expected a file, found a directory; name a file inside it")
    if not folder.is_dir():
        raise StorePathError(f"{path}: its folder {folder} does not exist; create it first")
    folder_writable = os.access(folder, os.W_OK | os.X_OK)
    if not path.exists():
        if read_only:
            raise StorePathError(
                f"{path}: expected an existing store to read, found no file; check the path"
            )
        if not folder_writable:
            raise StorePathError(
                f"{path}: its folder may not be written, so no store can be made; choose another "
                "place, or change the folder's permissions"
            )
        return "create"
    if not path.is_file():
        raise StorePathError(
            f"{path}: expected a regular file, found another kind of thing; name another path"
        )
    if not os.access(path, os.R_OK):
        raise StorePathError(f"{path}: may not be read; check its permissions")
    return _access_to_file(path, read_only=read_only, folder_writable=folder_writable)


def _access_to_file(path: Path, *, read_only: bool, folder_writable: bool) -> db.Access:
    if folder_writable:
        if not os.access(path, os.W_OK):
            return "read"
        if read_only:
            return "query"
        return "create" if path.stat().st_size == 0 else "write"
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size:
        raise StorePathError(
            f"{path}: its folder is read-only but holds a -wal with changes that are not in the "
            "file yet; copy all of them to a folder that may be written, or open it there once"
        )
    return "immutable"


def _is_blank(engine: sa.Engine, path: Path) -> bool:
    """Whether a creation was cut off here: an empty file, or our settings and no more.

    Setting auto-vacuum writes the first page at once, before the migrations' transaction.
    """
    with db.read_transaction(engine) as connection:
        n_pages = db.pragma(connection, "page_count")
        if n_pages == 0:
            return path.stat().st_size == 0  # SQLite takes a file of one byte for empty
        return (
            n_pages == 1
            and db.pragma(connection, "page_size") == db.PAGE_SIZE_NBYTES
            and db.pragma(connection, "auto_vacuum") == db.INCREMENTAL
            and db.pragma(connection, "application_id") == 0
            and db.pragma(connection, "user_version") == 0
            and not _read_objects(connection)
        )


def _check_identity(connection: sa.Connection, path: Path) -> tuple[int, bool]:
    """The file's format version, and whether it is newer than ours but readable."""
    application_id = db.pragma(connection, "application_id")
    if application_id != db.APPLICATION_ID:
        raise NotAStoreError(
            f"{path}: expected a kvstore file (application_id {db.APPLICATION_ID:#x}), "
            f"found another program's SQLite database ({application_id:#x})"
        )
    version = db.pragma(connection, "user_version")
    if version <= FORMAT_VERSION:
        return version, False
    min_reader = version
    # A view of that name could be anything, also without an end.
    if ("table", "format") in {(kind, name) for kind, name, _, _ in _read_objects(connection)}:
        row = connection.exec_driver_sql("SELECT version, min_reader FROM format").one_or_none()
        # A row that disagrees with the header is no statement to rely on.
        if row is not None and row[0] == version and isinstance(row[1], int):
            min_reader = row[1]
    if min_reader > FORMAT_VERSION:
        raise NewerFormatError(
            f"{path}: format version {version} needs a newer kvstore (this one reads up to "
            f"{FORMAT_VERSION}); update kvstore. The file was not touched"
        )
    return version, True


def _check_schema(connection: sa.Connection, path: Path, *, newer: bool) -> None:
    version = db.pragma(connection, "user_version")
    if version < FORMAT_VERSION and version not in VIEWS_OF_OLDER:
        raise SchemaMismatchError(
            f"{path}: expected a format version from {min(VIEWS_OF_OLDER)} to {FORMAT_VERSION} in "
            f"the file's header, found {version}; it was tampered with or damaged: restore a copy"
        )
    found, expected = _read_objects(connection), _expected_objects(min(version, FORMAT_VERSION))
    missing, extra = expected - found, found - expected
    if newer:  # additions are what a newer version may have, but nothing that runs code
        extra = frozenset(row for row in extra if row[0] in ("trigger", "view"))
    if missing or extra:
        names = sorted({f"{kind} {name}" for kind, name, _, _ in missing | extra})
        raise SchemaMismatchError(
            f"{path}: expected the schema of format version {version}, found it changed at "
            f"{', '.join(names)}; the file was tampered with or damaged: restore a copy"
        )
    rows = connection.exec_driver_sql("SELECT version FROM format").scalars().all()
    if rows != [version]:
        raise SchemaMismatchError(
            f"{path}: expected one row of version {version} in the table format, as the file's "
            f"header says, found {rows!r:.80}; the file was tampered with: restore a copy"
        )


def _check_revision(connection: sa.Connection, path: Path, version: int) -> None:
    """Refuse an older file that does not say of its migrations what its version says.

    Alembic would run others than those that are missing, or none; compared in SQL, since it
    need not be text.
    """
    revision = f"{version:04}"
    rows = connection.exec_driver_sql("SELECT version_num = ? FROM alembic_version", (revision,))
    if rows.scalars().all() != [1]:
        raise SchemaMismatchError(
            f"{path}: expected {revision} in the table alembic_version of a file of format version "
            f"{version}, found something else; the file was tampered with or damaged: restore a "
            "copy"
        )


def _migrate(engine: sa.Engine, path: Path) -> None:
    """Bring an empty or older file to the current format, in one transaction."""
    # Not at the top: Alembic takes longer to import than all the rest.
    from kvstore.db.migrate import upgrade

    with db.exclusive_transaction(engine) as connection:
        if db.pragma(connection, "application_id") != db.APPLICATION_ID:
            if _read_objects(connection):  # somebody else's file came between
                raise NotAStoreError(f"{path}: expected an empty file, found a database")
        else:
            version = db.pragma(connection, "user_version")
            if version >= FORMAT_VERSION:
                return  # another process did it meanwhile
            _check_revision(connection, path, version)
        upgrade(connection)


def _read_objects(connection: sa.Connection) -> SchemaObjects:
    rows = connection.exec_driver_sql("SELECT type, name, tbl_name, sql FROM sqlite_schema")
    return frozenset((kind, name, table, _normalise(sql)) for kind, name, table, sql in rows)


@cache
def _expected_objects(version: int) -> SchemaObjects:
    """The objects that ``schemas/schema.sql`` makes, or for an older version ``schema_v*.sql``."""
    name = "schema.sql" if version == FORMAT_VERSION else f"schema_v{version}.sql"
    with sqlite3.connect(":memory:") as connection:
        connection.executescript((schemas_dir() / name).read_text(encoding="utf-8"))
        rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema").fetchall()
    connection.close()
    return frozenset((kind, name, table, _normalise(sql)) for kind, name, table, sql in rows)


def _normalise(sql: object) -> str:
    """``sql`` with its white space folded: layout is no difference, anything else is."""
    text = sql if isinstance(sql, str) else "" if sql is None else repr(sql)
    folded = re.sub(r"\s+", " ", text).strip()
    return re.sub(r" ?([(),]) ?", r"\1", folded)
