"""Which checkpoints a growing session keeps: one in so many tokens, and always the newest."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from kvstore.db import blobs, chunks
from kvstore.db.blobs import BlobRow
from kvstore.db.chunks import ChunkRow
from kvstore.kinds import kind_of
from kvstore.layout import Layout
from kvstore.match import ChunkMatch, pieces


def thin_checkpoints(
    connection: sa.Connection,
    layout: Layout,
    *,
    head_id: int,
    former_n_tokens: int,
    checkpoint_n_tokens: int,
) -> None:
    """Delete the checkpoint at ``former_n_tokens`` if its interval has an earlier one.

    Called when a session that ended there goes on to ``head_id`` and no other
    session ends there. The first checkpoint of each interval of
    ``checkpoint_n_tokens`` tokens stays, so a rewind never has to compute
    more than one interval again.
    """
    position = former_n_tokens - 1
    found = _interval(connection, layout, head_id, position, checkpoint_n_tokens)
    if all(row.start >= position for _, row in found):
        return
    for owner, row in found:
        if row.start == position:
            blobs.delete(connection, row)
            chunks.add_nbytes(
                connection, owner.id, raw_nbytes=-row.raw_nbytes, stored_nbytes=-row.stored_nbytes
            )


def keeps_checkpoint(
    connection: sa.Connection, layout: Layout, tail: ChunkRow, *, checkpoint_n_tokens: int
) -> bool:
    """Whether a tail has a checkpoint that stays when its session goes on."""
    newest = tail.stop - 1
    found = _interval(connection, layout, tail.id, newest, checkpoint_n_tokens)
    earlier = [row.start for _, row in found if row.start < newest]
    return any(start >= tail.start for start in earlier) or (bool(found) and not earlier)


def _interval(
    connection: sa.Connection,
    layout: Layout,
    head_id: int,
    position: int,
    checkpoint_n_tokens: int,
) -> list[tuple[ChunkRow, BlobRow]]:
    """The checkpoint blobs of the chain that ends in ``head_id``, up to ``position``.

    Goes back to the start of the interval that ``position`` lies in.
    """
    tensors = {tensor for tensor, spec in enumerate(layout.tensors) if kind_of(spec).is_thinned}
    if not tensors:
        return []
    start = position // checkpoint_n_tokens * checkpoint_n_tokens
    return [
        (owner, row)
        for owner, row in _chain_blobs(connection, head_id, start)
        if row.tensor in tensors and start <= row.start <= position
    ]


def _chain_blobs(
    connection: sa.Connection, head_id: int, start: int
) -> Iterator[tuple[ChunkRow, BlobRow]]:
    """The blobs of the chain that ends in ``head_id``, back to the chunk that has ``start``."""
    chunk = chunks.by_id(connection, head_id)
    while chunk is not None and chunk.stop > start:
        for piece in pieces(connection, ChunkMatch(chunk=chunk, stop=chunk.stop)):
            for row in blobs.of_chunk(connection, piece.owner.id):
                if row.start < piece.stop:
                    yield piece.owner, row
        chunk = None if chunk.parent_id is None else chunks.by_id(connection, chunk.parent_id)
