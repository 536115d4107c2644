"""Damage: chunks that are not what was stored are dropped before a save that has their tokens.

Without this a damaged chunk would stay for ever: its key is there, so no save would
write it again, and every load would end before it.
"""

from __future__ import annotations

from array import array

import sqlalchemy as sa

from kvstore.blob import check_blob
from kvstore.db import chunks, eviction
from kvstore.db import engine as db
from kvstore.db.basis_cache import BasisCache
from kvstore.db.chunks import ChunkRow
from kvstore.db.models import SpaceRow
from kvstore.db.writing import write_transaction
from kvstore.errors import CorruptStoreError
from kvstore.layout import Layout
from kvstore.lineage import Lineage, extras_up_to
from kvstore.match import ChunkMatch, is_base, is_genuine, piece_blobs, pieces
from kvstore.prefix import Key, full_chunk_keys
from kvstore.tokens import TokenIds


def find_damaged(
    connection: sa.Connection,
    space: SpaceRow,
    layout: Layout,
    ids: TokenIds,
    lineage: Lineage,
    *,
    start: int,
) -> Key | None:
    """The key of the first damaged chunk on the path of ``ids``, or beside its end.

    Looks at the chunk that has position ``start`` and those behind it, and decodes all
    that they hold or borrow.
    """
    size = space.chunk_n_tokens
    keys = full_chunk_keys(space.root, ids, lineage, chunk_n_tokens=size)
    stored = chunks.by_keys(connection, keys)
    parent_key, n_found = space.root, 0
    for number, key in enumerate(keys):
        if key not in stored:
            break
        chunk, first = stored[key], number * size
        if first + size > start:
            if chunk is None or chunk.tokens != ids[first : first + size]:
                return key
            damaged = _damaged_owner(connection, space, layout, chunk)
            if damaged is not None:
                return damaged
        parent_key, n_found = key, n_found + 1
    first = n_found * size
    rest = array("Q", ids[first : first + size])
    try:
        siblings = [
            sibling
            for extras, _ in extras_up_to(lineage, first, first + len(rest))
            for sibling in chunks.neighbours(connection, parent_key, rest, extras=extras)
        ]
    except CorruptStoreError:
        return None  # a save passes over such a row, or meets it by its key
    found = (_damaged_owner(connection, space, layout, sibling) for sibling in siblings)
    return next((key for key in found if key is not None), None)


def drop(engine: sa.Engine, key: Key) -> None:
    """Delete the chunk of that key, and all that continues or borrows from it.

    Sessions keep their tokens; they end before it now. Nothing is deleted while
    another save builds on it.
    """
    with write_transaction(engine) as connection:
        chunk_id = chunks.id_of(connection, key)
        if chunk_id is not None:
            eviction.evict_subtree(connection, chunk_id)
            db.shrink(connection)


def _damaged_owner(
    connection: sa.Connection, space: SpaceRow, layout: Layout, chunk: ChunkRow
) -> Key | None:
    """The chunk whose blobs or tokens are damaged: this one, or one that it borrows from."""
    if not is_genuine(chunk, chunk.start):
        return chunk.key
    try:
        found = pieces(connection, ChunkMatch(chunk=chunk, stop=chunk.stop))
    except CorruptStoreError:
        return _broken_base(connection, chunk)
    bases = BasisCache().of_space(space.id)  # as they are in the file now
    for piece in found:
        try:
            for row in piece_blobs(connection, piece, layout, is_lossy=space.is_lossy):
                check_blob(connection, row, piece.owner.key, layout.tensors[row.tensor], bases)
        except CorruptStoreError:
            return piece.owner.key
    return None


def _broken_base(connection: sa.Connection, chunk: ChunkRow) -> Key:
    """Who is wrong where a chain of bases breaks: a base of other tokens, else who borrows."""
    while chunk.base_id is not None:
        try:
            base = chunks.by_id(connection, chunk.base_id)
        except CorruptStoreError:
            break
        if base is None or not is_base(base, chunk):
            is_base_wrong = base is not None and not is_genuine(base, base.start)
            return base.key if base is not None and is_base_wrong else chunk.key
        chunk = base
    return chunk.key
