"""Rows of ``blobs`` and ``payloads``: one tensor of one chunk each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa

from kvstore.db.engine import MAX_VARIABLES
from kvstore.db.tables import blobs, payloads
from kvstore.errors import CorruptStoreError


class BlobRow(NamedTuple):
    """Where and how tokens ``[start, stop)`` of one tensor are stored.

    ``payload_nbytes`` is the length of the payload row, or None if it is
    missing; everything else is what the blob's row claims.
    """

    chunk_id: int
    tensor: int
    start: int
    stop: int
    codec: int
    raw_nbytes: int
    stored_nbytes: int
    checksum: bytes
    payload_id: int
    payload_nbytes: int | None


_COLUMNS = (
    blobs.c.chunk_id,
    blobs.c.tensor,
    blobs.c.start,
    blobs.c.stop,
    blobs.c.codec,
    blobs.c.raw_nbytes,
    blobs.c.stored_nbytes,
    blobs.c.checksum,
    blobs.c.payload_id,
    sa.func.length(payloads.c.data),
)
"""In the order of ``BlobRow``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBlob:
    """An encoded blob on its way into the file; a fallback is exact though it was to be lossy."""

    tensor: int
    start: int
    stop: int
    codec: int
    raw_nbytes: int
    checksum: bytes
    stored: memoryview
    is_fallback: bool = False


_LAST_PAYLOAD = sa.select(sa.func.max(payloads.c.id))
_INSERT_PAYLOAD = sa.insert(payloads)
_INSERT = sa.insert(blobs)


def insert(connection: sa.Connection, chunk_id: int, new_blobs: Sequence[NewBlob]) -> None:
    """Insert the blobs of one chunk, payloads in tensor order (so a load reads forward)."""
    if not new_blobs:
        return
    # Ids are given out here, under the write lock: one statement for all rows.
    last_id = connection.execute(_LAST_PAYLOAD).scalar_one() or 0
    payload_ids = range(last_id + 1, last_id + 1 + len(new_blobs))
    connection.execute(
        _INSERT_PAYLOAD,
        [
            {"id": payload_id, "data": blob.stored}
            for payload_id, blob in zip(payload_ids, new_blobs, strict=True)
        ],
    )
    connection.execute(
        _INSERT,
        [
            {
                "chunk_id": chunk_id,
                "tensor": blob.tensor,
                "start": blob.start,
                "stop": blob.stop,
                "codec": blob.codec,
                "raw_nbytes": blob.raw_nbytes,
                "stored_nbytes": blob.stored.nbytes,
                "checksum": blob.checksum,
                "payload_id": payload_id,
            }
            for payload_id, blob in zip(payload_ids, new_blobs, strict=True)
        ],
    )


_OF_CHUNKS = (
    sa.select(*_COLUMNS)
    .select_from(blobs.outerjoin(payloads, payloads.c.id == blobs.c.payload_id))
    .where(blobs.c.chunk_id.in_(sa.bindparam("chunk_ids", expanding=True)))
    .order_by(blobs.c.chunk_id, blobs.c.tensor, blobs.c.start)
)


def of_chunk(connection: sa.Connection, chunk_id: int) -> list[BlobRow]:
    """The chunk's blobs in tensor order; reads no payload.

    Raises:
        CorruptStoreError: a column has a type that it must not have.
    """
    rows = of_chunks(connection, [chunk_id])[chunk_id]
    if isinstance(rows, CorruptStoreError):
        raise rows
    return rows


def of_chunks(
    connection: sa.Connection, chunk_ids: Sequence[int]
) -> dict[int, list[BlobRow] | CorruptStoreError]:
    """Each chunk's blobs in tensor order, or what is wrong with them; reads no payload."""
    found: dict[int, list[BlobRow] | CorruptStoreError] = {chunk_id: [] for chunk_id in chunk_ids}
    for first in range(0, len(chunk_ids), MAX_VARIABLES):
        some = chunk_ids[first : first + MAX_VARIABLES]
        for row in connection.execute(_OF_CHUNKS, {"chunk_ids": some}).all():
            rows = found[row[0]]
            if isinstance(rows, CorruptStoreError):
                continue
            try:
                rows.append(_row(row))
            except CorruptStoreError as error:
                found[row[0]] = error
    return found


def _row(row: sa.Row[*tuple[Any, ...]]) -> BlobRow:
    """The row, if its columns have the types that they must have."""
    found = BlobRow(*row)
    numbers = (*found[1:7], found.payload_id)
    if {*map(type, numbers)} != {int}:
        raise CorruptStoreError(f"blob of chunk row {found.chunk_id}: a column is not an integer")
    return found


def delete(connection: sa.Connection, row: BlobRow) -> None:
    """Delete one blob, then its payload."""
    connection.execute(
        sa.delete(blobs).where(
            blobs.c.chunk_id == row.chunk_id,
            blobs.c.tensor == row.tensor,
            blobs.c.start == row.start,
        )
    )
    connection.execute(sa.delete(payloads).where(payloads.c.id == row.payload_id))


_PAYLOADS_OF_CHUNK = sa.select(blobs.c.payload_id).where(
    blobs.c.chunk_id == sa.bindparam("of_chunk")
)
_DELETE_OF_CHUNK = sa.delete(blobs).where(blobs.c.chunk_id == sa.bindparam("of_chunk"))
# In one statement: row by row, SQLite would log all the pages that become free.
_DELETE_PAYLOADS = sa.delete(payloads).where(
    payloads.c.id.in_(sa.bindparam("some", expanding=True))
)


def delete_of_chunk(connection: sa.Connection, chunk_id: int) -> None:
    """Delete the chunk's blobs, then their payloads."""
    values = {"of_chunk": chunk_id}
    payload_ids = connection.execute(_PAYLOADS_OF_CHUNK, values).scalars().all()
    connection.execute(_DELETE_OF_CHUNK, values)
    for first in range(0, len(payload_ids), MAX_VARIABLES):
        some = payload_ids[first : first + MAX_VARIABLES]
        connection.execute(_DELETE_PAYLOADS, {"some": some})
