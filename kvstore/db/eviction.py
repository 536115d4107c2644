"""Deleting chunks: always leaf-first, which the foreign keys enforce."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from kvstore.db import blobs, chunks, leases, models, sessions
from kvstore.db.tables import chunks as chunk_table
from kvstore.db.tables import models as model_table
from kvstore.db.tables import spaces
from kvstore.errors import CorruptStoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFacts:
    """What a plan needs to know of one chunk; no payload is touched to learn it."""

    id: int
    parent_id: int | None
    base_id: int | None
    model: bytes
    stored_nbytes: int
    last_used_at_ms: int
    is_held: bool


_FACTS = sa.select(
    chunk_table.c.id,
    chunk_table.c.parent_id,
    chunk_table.c.base_id,
    model_table.c.fingerprint.label("model"),
    chunk_table.c.stored_nbytes,
    chunk_table.c.last_used_at_ms,
    leases.holding(chunk_table.c.id).label("is_held"),
).select_from(
    chunk_table.join(spaces, spaces.c.id == chunk_table.c.space_id).join(
        model_table, model_table.c.id == spaces.c.model_id
    )
)


def read_facts(connection: sa.Connection) -> list[ChunkFacts]:
    """The facts of every chunk in the file.

    Raises:
        CorruptStoreError: a row is damaged, or refers to one that is not there.
    """
    facts = [ChunkFacts(**row._mapping) for row in connection.execute(_FACTS, leases.now())]
    ids = {chunk.id for chunk in facts}
    for chunk in facts:
        if (
            type(chunk.stored_nbytes) is not int
            or type(chunk.last_used_at_ms) is not int
            or not {chunk.parent_id, chunk.base_id} <= {*ids, None}
        ):
            raise CorruptStoreError(
                f"chunk row {chunk.id}: its columns are not possible; run `kvstore verify`, and "
                "restore a copy of the file"
            )
    return facts


def evict(connection: sa.Connection, chunk_ids: Iterable[int]) -> None:
    """Delete these chunks in this order; sessions that ended in one keep what is before it."""
    for chunk_id in chunk_ids:
        sessions.move_heads(connection, [chunk_id])
        chunks.pass_use_on(connection, chunk_id)
        _delete(connection, chunk_id)
    models.delete_unused(connection)


def evict_subtree(connection: sa.Connection, chunk_id: int) -> None:
    """Delete a chunk and all that continues or borrows from it, unless a lease holds any of it.

    Sessions keep their tokens, and end before it now.
    """
    subtree = sa.select(chunk_table.c.id).where(chunk_table.c.id == chunk_id).cte(recursive=True)
    subtree = subtree.union(
        sa.select(chunk_table.c.id).where(
            sa.or_(chunk_table.c.parent_id == subtree.c.id, chunk_table.c.base_id == subtree.c.id)
        )
    )
    is_held = sa.select(subtree.c.id).where(leases.holding(subtree.c.id)).limit(1)
    if connection.execute(is_held, leases.now()).one_or_none():
        return
    # What continues starts later; what borrows borrows more than its base does.
    leaf_first = (chunk_table.c.start.desc(), chunk_table.c.base_n_tokens.desc())
    query = sa.select(chunk_table.c.id).where(chunk_table.c.id.in_(sa.select(subtree.c.id)))
    evict(connection, connection.execute(query.order_by(*leaf_first)).scalars().all())


def release(connection: sa.Connection, chunk_id: int | None, *, held: Collection[int] = ()) -> None:
    """Delete a chunk that nothing needs any more, then what only it needed; never one ``held``."""
    waiting = [] if chunk_id is None else [chunk_id]
    while waiting:
        candidate = waiting.pop()
        if candidate in held or chunks.is_needed(connection, candidate, but_session_id=None):
            continue
        waiting += chunks.needed_by(connection, candidate)
        _delete(connection, candidate)


_DELETE = sa.delete(chunk_table).where(chunk_table.c.id == sa.bindparam("chunk_id"))


def _delete(connection: sa.Connection, chunk_id: int) -> None:
    blobs.delete_of_chunk(connection, chunk_id)
    connection.execute(_DELETE, {"chunk_id": chunk_id})
