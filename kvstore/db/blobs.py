"""Rows of ``blobs`` and ``payloads``: one tensor of one chunk each."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from kvstore.db.engine import MAX_VARIABLES
from kvstore.db.tables import blobs, payloads
from kvstore.errors import CorruptStoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRow:
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


def insert(connection: sa.Connection, chunk_id: int, new_blobs: Sequence[NewBlob]) -> None:
    """Insert the blobs of one chunk, payloads in tensor order (so a load reads forward)."""
    if not new_blobs:
        return
    # Ids are given out here, under the write lock: one statement for all rows.
    last_id = connection.execute(sa.select(sa.func.max(payloads.c.id))).scalar_one() or 0
    payload_ids = range(last_id + 1, last_id + 1 + len(new_blobs))
    connection.execute(
        sa.insert(payloads),
        [
            {"id": payload_id, "data": blob.stored}
            for payload_id, blob in zip(payload_ids, new_blobs, strict=True)
        ],
    )
    connection.execute(
        sa.insert(blobs),
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
        for row in connection.execute(_OF_CHUNKS, {"chunk_ids": some}):
            rows = found[row[0]]
            if isinstance(rows, CorruptStoreError):
                continue
            try:
                rows.append(_row(row))
            except CorruptStoreError as error:
                found[row[0]] = error
    return found


def read_payload(driver: sqlite3.Connection, row: BlobRow) -> bytes:
    """The stored bytes of a blob, read on the driver's own connection.

    Through a blob handle: unlike with a query's rows, other threads run while the bytes are
    copied, and they are copied once less.

    Raises:
        CorruptStoreError: there is no such payload, or not one of ``row.stored_nbytes`` bytes.
    """
    try:
        with driver.blobopen("payloads", "data", row.payload_id, readonly=True) as blob:
            if len(blob) != row.stored_nbytes:
                raise CorruptStoreError(
                    f"payload {row.payload_id}: expected {row.stored_nbytes} bytes, "
                    f"found {len(blob)}"
                )
            return blob.read()
    except sqlite3.OperationalError as error:
        # What cannot be opened as a blob; anything that goes wrong below has a code of its own.
        if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
            raise
        raise CorruptStoreError(f"payload {row.payload_id} is missing ({error})") from error


def _row(row: sa.Row[*tuple[Any, ...]]) -> BlobRow:
    """The row, if its columns have the types that they must have."""
    chunk_id, tensor, start, stop, codec, raw_nbytes, stored_nbytes, checksum, payload_id, n = row
    numbers = (tensor, start, stop, codec, raw_nbytes, stored_nbytes, payload_id)
    if {*map(type, numbers)} != {int}:
        raise CorruptStoreError(f"blob of chunk row {chunk_id}: a column is not an integer")
    return BlobRow(
        chunk_id=chunk_id,
        tensor=tensor,
        start=start,
        stop=stop,
        codec=codec,
        raw_nbytes=raw_nbytes,
        stored_nbytes=stored_nbytes,
        checksum=checksum,
        payload_id=payload_id,
        payload_nbytes=n,
    )


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


def delete_of_chunk(connection: sa.Connection, chunk_id: int) -> None:
    """Delete the chunk's blobs, then their payloads."""
    payload_ids = connection.execute(
        sa.delete(blobs).where(blobs.c.chunk_id == chunk_id).returning(blobs.c.payload_id)
    ).scalars()
    connection.execute(sa.delete(payloads).where(payloads.c.id.in_(list(payload_ids))))
