"""Rows of ``chunks``: token prefixes as a tree, every row findable by key and by tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from kvstore.db import leases
from kvstore.db.engine import MAX_VARIABLES, insert_row
from kvstore.db.tables import chunks, sessions
from kvstore.errors import CorruptStoreError, InputError
from kvstore.lineage import Lineage, unpack_extras
from kvstore.prefix import KEY_NBYTES, Key
from kvstore.tokens import TOKEN_NBYTES, TokenIds, from_big_endian, to_big_endian


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRow:
    """Tokens ``[start, stop)`` behind ``parent_key``.

    The chunk's own blobs cover ``[start + base_n_tokens, stop)``; the tokens
    before that are the first ``base_n_tokens`` of the chunk ``base_id``, which
    has the same parent and the same tokens and edits there. ``edits`` is what
    ``extras`` says.
    """

    id: int
    parent_id: int | None
    base_id: int | None
    base_n_tokens: int
    key: Key
    parent_key: Key
    start: int
    stop: int
    tokens: TokenIds
    extras: bytes
    edits: Lineage

    @property
    def n_tokens(self) -> int:
        """Tokens in the chunk, borrowed ones included."""
        return self.stop - self.start


_COLUMNS = (
    chunks.c.id,
    chunks.c.parent_id,
    chunks.c.base_id,
    chunks.c.base_n_tokens,
    chunks.c.key,
    chunks.c.parent_key,
    chunks.c.start,
    chunks.c.stop,
    chunks.c.tokens,
    chunks.c.extras,
)


def _row(row: sa.Row[*tuple[Any, ...]]) -> ChunkRow:
    """The row, with everything checked that it says of itself.

    SQLite holds types and CHECK constraints when it writes, not when it reads a
    file that something else wrote.
    """
    is_sound = (
        all(type(number) is int for number in (row.id, row.start, row.stop, row.base_n_tokens))
        and all(type(number) in (int, type(None)) for number in (row.parent_id, row.base_id))
        and all(type(data) is bytes for data in (row.key, row.parent_key, row.tokens, row.extras))
        and len(row.key) == len(row.parent_key) == KEY_NBYTES
        and 0 <= row.start < row.stop
        and len(row.tokens) == TOKEN_NBYTES * (row.stop - row.start)
        and 0 <= row.base_n_tokens <= row.stop - row.start
        and (row.base_id is None) == (row.base_n_tokens == 0)
    )
    edits: Lineage | None = None
    if is_sound:
        with suppress(InputError):
            edits = unpack_extras(row.extras, row.start, row.stop)
    if edits is None:
        raise CorruptStoreError(
            f"chunk row {row.id}: its columns are not possible together; "
            "run `kvstore verify`, and restore a copy of the file"
        )
    return ChunkRow(
        id=row.id,
        parent_id=row.parent_id,
        base_id=row.base_id,
        base_n_tokens=row.base_n_tokens,
        key=Key(row.key),
        parent_key=Key(row.parent_key),
        start=row.start,
        stop=row.stop,
        tokens=from_big_endian(row.tokens),
        extras=row.extras,
        edits=edits,
    )


# Statements are built once: building one takes longer than SQLite does with it.
_BY_KEYS = sa.select(*_COLUMNS).where(chunks.c.key.in_(sa.bindparam("keys", expanding=True)))


def by_keys(connection: sa.Connection, keys: Sequence[Key]) -> dict[Key, ChunkRow | None]:
    """The chunks that exist among ``keys``; None for one whose row is damaged."""
    found: dict[Key, ChunkRow | None] = {}
    for first in range(0, len(keys), MAX_VARIABLES):
        some = keys[first : first + MAX_VARIABLES]
        for row in connection.execute(_BY_KEYS, {"keys": some}):
            try:
                found[Key(row.key)] = _row(row)
            except CorruptStoreError:
                found[Key(row.key)] = None
    return found


def id_of(connection: sa.Connection, key: Key) -> int | None:
    """The row id of the chunk with this key, whatever else its row says."""
    query = sa.select(chunks.c.id).where(chunks.c.key == key)
    chunk_id: int | None = connection.execute(query).scalar_one_or_none()
    return chunk_id


_NEEDED_BY = sa.select(chunks.c.parent_id, chunks.c.base_id).where(
    chunks.c.id == sa.bindparam("chunk_id")
)


def needed_by(connection: sa.Connection, chunk_id: int) -> list[int]:
    """The row ids of the chunks that this one continues and borrows from."""
    row = connection.execute(_NEEDED_BY, {"chunk_id": chunk_id}).one_or_none()
    return [] if row is None else [needed_id for needed_id in row if needed_id is not None]


_BY_ID = sa.select(*_COLUMNS).where(chunks.c.id == sa.bindparam("chunk_id"))


def by_id(connection: sa.Connection, chunk_id: int) -> ChunkRow | None:
    """The chunk with this row id."""
    row = connection.execute(_BY_ID, {"chunk_id": chunk_id}).one_or_none()
    return None if row is None else _row(row)


_SIBLINGS = sa.select(*_COLUMNS).where(
    chunks.c.parent_key == sa.bindparam("parent_key"), chunks.c.extras == sa.bindparam("extras")
)
_NEIGHBOURS = (
    _SIBLINGS.where(chunks.c.tokens <= sa.bindparam("ids"))
    .order_by(chunks.c.tokens.desc())
    .limit(1),
    _SIBLINGS.where(chunks.c.tokens > sa.bindparam("ids")).order_by(chunks.c.tokens).limit(1),
)


def neighbours(
    connection: sa.Connection, parent_key: Key, ids: TokenIds, *, extras: bytes = b""
) -> list[ChunkRow]:
    """The chunks directly before and behind ``ids`` in token order under one parent.

    Among those with the same ``extras``. The longest common prefix with ``ids`` among all of
    these belongs to one of the two: two index seeks, however many siblings there are.
    """
    values = {"parent_key": parent_key, "extras": extras, "ids": to_big_endian(ids)}
    rows = [connection.execute(query, values).one_or_none() for query in _NEIGHBOURS]
    return [_row(row) for row in rows if row is not None]


def insert(
    connection: sa.Connection,
    *,
    space_id: int,
    parent_id: int | None,
    parent_key: Key,
    key: Key,
    start: int,
    ids: TokenIds,
    extras: bytes,
    base_id: int | None,
    base_n_tokens: int,
    raw_nbytes: int,
    stored_nbytes: int,
    now_ms: int,
) -> int:
    """Insert one chunk; returns its row id."""
    return insert_row(
        connection,
        chunks,
        space_id=space_id,
        parent_id=parent_id,
        base_id=base_id,
        base_n_tokens=base_n_tokens,
        key=key,
        parent_key=parent_key,
        start=start,
        stop=start + len(ids),
        tokens=to_big_endian(ids),
        extras=extras,
        raw_nbytes=raw_nbytes,
        stored_nbytes=stored_nbytes,
        created_at_ms=now_ms,
        last_used_at_ms=now_ms,
    )


_CHUNK_ID = sa.bindparam("chunk_id", type_=sa.Integer)
_IS_NEEDED = sa.select(
    sa.or_(
        sa.exists().where(chunks.c.parent_id == _CHUNK_ID),
        sa.exists().where(chunks.c.base_id == _CHUNK_ID),
        leases.holding(_CHUNK_ID),
        sa.exists().where(
            sessions.c.head_id == _CHUNK_ID,
            sessions.c.id.is_distinct_from(sa.bindparam("but_session_id", type_=sa.Integer)),
        ),
    )
)


def is_needed(connection: sa.Connection, chunk_id: int, *, but_session_id: int | None) -> bool:
    """Whether a child, a borrower, a lease or a session (but one) holds this chunk."""
    values = {"chunk_id": chunk_id, "but_session_id": but_session_id, **leases.now()}
    return bool(connection.execute(_IS_NEEDED, values).scalar_one())


def touch(connection: sa.Connection, chunk_ids: Iterable[int], *, now_ms: int) -> None:
    """Mark chunks as used now."""
    some = list(chunk_ids)
    for first in range(0, len(some), MAX_VARIABLES):
        connection.execute(
            sa.update(chunks)
            .where(chunks.c.id.in_(some[first : first + MAX_VARIABLES]))
            .values(last_used_at_ms=now_ms)
        )


def add_nbytes(
    connection: sa.Connection, chunk_id: int, *, raw_nbytes: int, stored_nbytes: int
) -> None:
    """Count bytes that were added to the chunk's blobs, or taken (negative)."""
    connection.execute(
        sa.update(chunks)
        .where(chunks.c.id == chunk_id)
        .values(
            raw_nbytes=chunks.c.raw_nbytes + raw_nbytes,
            stored_nbytes=chunks.c.stored_nbytes + stored_nbytes,
        )
    )


def pass_use_on(connection: sa.Connection, chunk_id: int) -> None:
    """Let what this chunk continues and borrows from count as used when it was.

    Only the last chunk of a chain is touched when the chain is used.
    """
    leaving = connection.execute(
        sa.select(chunks.c.parent_id, chunks.c.base_id, chunks.c.last_used_at_ms).where(
            chunks.c.id == chunk_id
        )
    ).one()
    connection.execute(
        sa.update(chunks)
        .where(
            chunks.c.id.in_([leaving.parent_id, leaving.base_id]),
            chunks.c.last_used_at_ms < leaving.last_used_at_ms,
        )
        .values(last_used_at_ms=leaving.last_used_at_ms)
    )
