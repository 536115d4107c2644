"""Damage: what a load could not restore is looked at again before a save, and dropped if it is so.

Without this a damaged chunk would stay for ever: its key is there, so no save would
write it again, and every load would end before it.
"""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa

from kvstore.blob import check_blob
from kvstore.db import chunks, eviction
from kvstore.db import engine as db
from kvstore.db.chunks import ChunkRow
from kvstore.db.writing import write_transaction
from kvstore.errors import CorruptStoreError
from kvstore.layout import Layout
from kvstore.match import ChunkMatch, piece_blobs, pieces


def find_damaged(
    connection: sa.Connection, layout: Layout, chunk_ids: Iterable[int]
) -> ChunkRow | None:
    """The first of the chunks whose own blobs, or those that it borrows, do not decode."""
    for chunk_id in chunk_ids:
        chunk = chunks.by_id(connection, chunk_id)
        if chunk is None:
            continue
        try:
            found = pieces(connection, ChunkMatch(chunk=chunk, stop=chunk.stop))
        except CorruptStoreError:
            return chunk
        for piece in found:
            try:
                for row in piece_blobs(connection, piece, layout):
                    check_blob(connection, row, piece.owner.key)
            except CorruptStoreError:
                return piece.owner
    return None


def drop_damaged(engine: sa.Engine, layout: Layout, chunk_ids: Iterable[int]) -> None:
    """Delete the first damaged chunk of ``chunk_ids``, and all that continues or borrows from it.

    Sessions keep their tokens; they end before it now. Nothing is deleted while
    another save builds on it.
    """
    with db.read_transaction(engine) as connection:
        damaged = find_damaged(connection, layout, chunk_ids)
    if damaged is None:
        return
    with write_transaction(engine) as connection:
        now = chunks.by_id(connection, damaged.id)
        if now is not None and now.key == damaged.key:
            eviction.evict_subtree(connection, damaged.id)
            db.shrink(connection)
