"""Rows of ``bases``: what a transform codec learned of a tensor, once a key space."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from kvstore.db.engine import driver_connection, insert_row
from kvstore.db.tables import bases, chunks
from kvstore.errors import CorruptStoreError

_SINCE_VERSION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BasisRow:
    """A basis without its bytes, of which there are ``nbytes``."""

    id: int
    space_id: int
    tensor: int
    digest: bytes
    nbytes: int


_COLUMNS = (
    bases.c.id,
    bases.c.space_id,
    sa.case((sa.func.typeof(bases.c.tensor) == "integer", bases.c.tensor), else_=-1),
    sa.case((sa.func.typeof(bases.c.digest) == "blob", bases.c.digest), else_=b""),
    sa.func.coalesce(sa.func.length(bases.c.data), 0),
)
"""Of another type than it must have, a value may not even be readable: text that is not UTF-8."""

_READ = (
    "SELECT CASE typeof(digest) WHEN 'blob' THEN digest END, "
    "CASE typeof(data) WHEN 'blob' THEN data END FROM main.bases"
)


def all_of(connection: sa.Connection) -> list[BasisRow]:
    """Every basis in the file, none where it is of an older version; reads no bytes of them."""
    if not _has_table(driver_connection(connection)):
        return []
    rows = connection.execute(sa.select(*_COLUMNS).order_by(bases.c.id))
    return [BasisRow(id=a, space_id=b, tensor=c, digest=d, nbytes=e) for a, b, c, d, e in rows]


def of_space(connection: sa.Connection, space_id: int) -> dict[int, BasisRow]:
    """The bases of a key space by tensor, as ``all_of``."""
    if not _has_table(driver_connection(connection)):
        return {}
    rows = connection.execute(sa.select(*_COLUMNS).where(bases.c.space_id == space_id))
    return {
        tensor: BasisRow(id=row_id, space_id=space_id, tensor=tensor, digest=digest, nbytes=nbytes)
        for row_id, _, tensor, digest, nbytes in rows
    }


def read(driver: sqlite3.Connection, space_id: int, tensor: int) -> tuple[bytes, bytes]:
    """The digest that names the basis of a tensor, and its bytes, on the driver's own connection.

    Raises:
        CorruptStoreError: there is none, or a column has a type that it must not have.
    """
    row = None
    if _has_table(driver):
        row = driver.execute(
            f"{_READ} WHERE space_id = ? AND tensor = ?", (space_id, tensor)
        ).fetchone()
    if row is None:
        raise CorruptStoreError("its basis is missing")
    digest, data = row
    if digest is None or data is None:
        raise CorruptStoreError("its basis is damaged: a column is not a BLOB")
    return digest, data


def insert(
    connection: sa.Connection, *, space_id: int, tensor: int, digest: bytes, data: bytes
) -> None:
    """Insert the basis of a tensor that has none."""
    insert_row(connection, bases, space_id=space_id, tensor=tensor, digest=digest, data=data)


def delete(connection: sa.Connection, row: BasisRow) -> None:
    """Delete one basis; what names it cannot be read any more."""
    connection.execute(sa.delete(bases).where(bases.c.id == row.id))


def delete_unused(connection: sa.Connection) -> None:
    """Delete the bases of key spaces without chunks: nothing names them."""
    connection.execute(
        sa.delete(bases).where(bases.c.space_id.not_in(sa.select(chunks.c.space_id)))
    )


def freed_nbytes(connection: sa.Connection, chunk_ids: Collection[int]) -> int:
    """Bytes of the bases that go when these chunks do, as ``delete_unused`` has it."""
    rows = all_of(connection)
    if not rows:
        return 0
    gone = set(chunk_ids)
    owners = connection.execute(sa.select(chunks.c.id, chunks.c.space_id))
    kept = {space_id for chunk_id, space_id in owners if chunk_id not in gone}
    return sum(row.nbytes for row in rows if row.space_id not in kept)


def total_nbytes(connection: sa.Connection) -> int:
    """What all bases take, in bytes."""
    if not _has_table(driver_connection(connection)):
        return 0
    query = sa.select(sa.func.coalesce(sa.func.sum(sa.func.length(bases.c.data)), 0))
    nbytes: int = connection.execute(query).scalar_one()
    return nbytes


def _has_table(driver: sqlite3.Connection) -> bool:
    """Whether the file is of a version that has bases, as this transaction sees it."""
    (version,) = driver.execute("PRAGMA user_version").fetchone()
    return bool(version >= _SINCE_VERSION)
