"""Rows of ``sessions`` and ``session_tokens``: names, their tokens and the app's metadata."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sqlalchemy as sa

from kvstore.db.engine import MAX_VARIABLES, insert_row
from kvstore.db.tables import chunks, models, session_tokens, sessions, spaces
from kvstore.errors import CorruptStoreError, InputError
from kvstore.layout import Fingerprint
from kvstore.lineage import Lineage, unpack_extras
from kvstore.lineage import lineage_of as lineage_of_edits
from kvstore.lossy import codec_text_of
from kvstore.manifest import unpack_metadata
from kvstore.prefix import Key
from kvstore.tokens import TOKEN_NBYTES, TokenIds, from_big_endian, to_big_endian

_MAX_TIME_MS = 1 << 47
"""Some 4,000 years: what a date can show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """One named session.

    ``n_tokens`` is what was saved; ``n_stored_tokens`` is how many of them the
    session still holds K and V for (fewer after an eviction). ``codec`` is what it was
    stored with: ``"exact"``, or a lossy codec.
    """

    id: int
    name: str
    namespace: str
    fingerprint: Fingerprint
    codec: str
    n_tokens: int
    n_stored_tokens: int
    metadata: dict[str, Any]
    created_at_ms: int
    updated_at_ms: int


_INFO = (
    sa.select(
        sessions,
        chunks.c.stop.label("n_stored_tokens"),
        spaces.c.adapter,
        models.c.weights_digest,
        models.c.program_digest,
        models.c.layout_digest,
    )
    .select_from(
        sessions.join(spaces, spaces.c.id == sessions.c.space_id)
        .join(models, models.c.id == spaces.c.model_id)
        .outerjoin(chunks, chunks.c.id == sessions.c.head_id)
    )
    .order_by(sessions.c.updated_at_ms.desc(), sessions.c.id.desc())
)


def _info(row: sa.Row[*tuple[Any, ...]]) -> SessionInfo:
    """The session, if its columns are what they must be."""
    texts, numbers = ("name", "namespace"), ("n_tokens", "created_at_ms", "updated_at_ms")
    if not (
        all(type(row._mapping[text]) is str for text in texts)
        and all(type(row._mapping[number]) is int for number in numbers)
        and all(abs(row._mapping[number]) < _MAX_TIME_MS for number in numbers[1:])
    ):
        raise CorruptStoreError(
            f"session row {row.id}: its columns are not possible; run `kvstore verify`"
        )
    try:
        metadata = unpack_metadata(row.metadata)
        codec_text = codec_text_of(row.adapter)
    except CorruptStoreError as error:
        raise CorruptStoreError(
            f"session {row.name!r}: {error}; `kvstore rm` deletes it, and a save replaces it"
        ) from error
    return SessionInfo(
        id=row.id,
        name=row.name,
        namespace=row.namespace,
        fingerprint=_fingerprint(row),
        codec=codec_text or "exact",
        n_tokens=row.n_tokens,
        n_stored_tokens=row.n_stored_tokens or 0,
        metadata=metadata,
        created_at_ms=row.created_at_ms,
        updated_at_ms=row.updated_at_ms,
    )


def _fingerprint(row: sa.Row[*tuple[Any, ...]]) -> Fingerprint:
    try:
        return Fingerprint(
            weights=row.weights_digest, program=row.program_digest, layout=row.layout_digest
        )
    except InputError as error:
        raise CorruptStoreError(f"session {row.name!r}: {error}") from error


_BY_NAME = (
    sessions.c.namespace == sa.bindparam("namespace"),
    sessions.c.name == sa.bindparam("name"),
)
_BY_ID = sessions.c.id == sa.bindparam("session_id")
_INFO_BY_NAME, _INFO_BY_ID = _INFO.where(*_BY_NAME), _INFO.where(_BY_ID)


def info(connection: sa.Connection, *, namespace: str, name: str) -> SessionInfo | None:
    """The session of that name."""
    row = connection.execute(_INFO_BY_NAME, {"namespace": namespace, "name": name}).one_or_none()
    return None if row is None else _info(row)


_ID_BY_NAME = sa.select(sessions.c.id).where(*_BY_NAME)


def id_of(connection: sa.Connection, *, namespace: str, name: str) -> int | None:
    """The row id of the session of that name, whatever else its row says."""
    values = {"namespace": namespace, "name": name}
    session_id: int | None = connection.execute(_ID_BY_NAME, values).scalar_one_or_none()
    return session_id


Revision: TypeAlias = tuple[int, int, int]
"""What changes with every save of a session: its row id, time of update and length."""

ABSENT: Revision = (-1, -1, -1)
"""What is remembered of a session that was looked for and was not there."""


_REVISION = sa.select(sessions.c.id, sessions.c.updated_at_ms, sessions.c.n_tokens).where(_BY_ID)


def revision_of(connection: sa.Connection, session_id: int) -> Revision:
    """The session's revision now."""
    found: Revision = tuple(connection.execute(_REVISION, {"session_id": session_id}).one())
    return found


def fingerprint_of(connection: sa.Connection, session_id: int) -> Fingerprint:
    """The fingerprint of the model whose session it is."""
    return _fingerprint(connection.execute(_INFO_BY_ID, {"session_id": session_id}).one())


def all_in(connection: sa.Connection, *, namespace: str | None) -> list[SessionInfo]:
    """Every session of ``namespace`` (of all, if None), the last saved first."""
    query = _INFO if namespace is None else _INFO.where(sessions.c.namespace == namespace)
    return [_info(row) for row in connection.execute(query)]


_LESS_THAN_SAVED = (
    sa.select(sessions.c.id, sessions.c.name)
    .order_by(sessions.c.updated_at_ms.desc())
    .limit(sa.bindparam("at_most"))
)
_ENDING_EARLY = _LESS_THAN_SAVED.join(chunks, chunks.c.id == sessions.c.head_id).where(
    chunks.c.key.in_(sa.bindparam("keys", expanding=True)), chunks.c.stop < sessions.c.n_tokens
)
_WITH_NOTHING = _LESS_THAN_SAVED.where(
    sessions.c.head_id.is_(None), sessions.c.space_id == sa.bindparam("of_space")
)


def with_less_than_saved(
    connection: sa.Connection, *, space_id: int, keys: Sequence[Key], limit: int
) -> list[tuple[int, str]]:
    """``(row id, name)`` of sessions that an eviction took K and V from, the last saved first.

    At most ``limit`` of those that have nothing left, and as many for each some hundred ``keys``
    of those that end in one of these chunks now.
    """
    found = [*connection.execute(_WITH_NOTHING, {"of_space": space_id, "at_most": limit})]
    for first in range(0, len(keys), MAX_VARIABLES):
        values = {"keys": keys[first : first + MAX_VARIABLES], "at_most": limit}
        found += connection.execute(_ENDING_EARLY, values)
    return [(row.id, row.name) for row in found]


def tokens_of(connection: sa.Connection, session_id: int) -> TokenIds:
    """All token ids of a session."""
    rows = connection.execute(_TOKEN_SLICES, {"session_id": session_id})
    slices = [row.tokens for row in rows]
    if any(type(ids) is not bytes or len(ids) % TOKEN_NBYTES for ids in slices):
        raise CorruptStoreError(f"session row {session_id}: its token ids are not 64-bit integers")
    return from_big_endian(b"".join(slices))


def _extras_on_the_way() -> sa.Select[Any]:
    way = (
        sa.select(chunks.c.id, chunks.c.parent_id)
        .join(sessions, sessions.c.head_id == chunks.c.id)
        .where(_BY_ID)
        .cte("way", recursive=True)
    )
    # Not UNION ALL: a damaged file may lead in a circle.
    way = way.union(
        sa.select(chunks.c.id, chunks.c.parent_id).join(way, way.c.parent_id == chunks.c.id)
    )
    return (
        sa.select(chunks.c.start, chunks.c.stop, chunks.c.extras)
        .join(way, way.c.id == chunks.c.id)
        .where(chunks.c.extras != sa.literal(b"", sa.LargeBinary))
        .order_by(chunks.c.start)
    )


_EXTRAS_ON_THE_WAY = _extras_on_the_way()


def lineage_of(connection: sa.Connection, session_id: int) -> Lineage:
    """The edits on the way to the session's last stored chunk.

    Raises:
        CorruptStoreError: what a chunk on the way says of its edits is not possible.
    """
    rows = connection.execute(_EXTRAS_ON_THE_WAY, {"session_id": session_id})
    try:
        return lineage_of_edits(
            edit for start, stop, extras in rows for edit in unpack_extras(extras, start, stop)
        )
    except (InputError, TypeError) as error:
        raise CorruptStoreError(f"session row {session_id}: its edits: {error}") from error


_HEAD = sa.select(sessions.c.head_id).where(_BY_ID)


def head_of(connection: sa.Connection, session_id: int) -> int | None:
    """The row id of the chunk that holds the session's last token."""
    head: int | None = connection.execute(_HEAD, {"session_id": session_id}).scalar_one_or_none()
    return head


_ENDS_IN = sa.select(
    sa.exists().where(sessions.c.head_id == sa.bindparam("chunk_id", type_=sa.Integer))
)


def ends_in(connection: sa.Connection, chunk_id: int) -> bool:
    """Whether any session's last token lies in this chunk."""
    return bool(connection.execute(_ENDS_IN, {"chunk_id": chunk_id}).scalar_one())


def _through_chunk() -> sa.Select[Any]:
    below = sa.select(sa.bindparam("chunk_id", type_=sa.Integer).label("id"))
    way = below.cte("below", recursive=True)
    way = way.union(
        sa.select(chunks.c.id).where(
            sa.or_(chunks.c.parent_id == way.c.id, chunks.c.base_id == way.c.id)
        )
    )
    return sa.select(sessions.c.name).join(way, way.c.id == sessions.c.head_id).limit(1)


_THROUGH_CHUNK = _through_chunk()


def through_chunk(connection: sa.Connection, chunk_id: int) -> str | None:
    """The name of a session whose tokens run through this chunk, if there is one."""
    name: str | None = connection.execute(
        _THROUGH_CHUNK, {"chunk_id": chunk_id}
    ).scalar_one_or_none()
    return name


_UPDATE = (
    sa.update(sessions)
    .where(_BY_ID)
    .values(
        space_id=sa.bindparam("space_id"),
        head_id=sa.bindparam("head_id"),
        n_tokens=sa.bindparam("n_tokens"),
        metadata=sa.bindparam("metadata"),
        # Later than before, also within a millisecond: it is what tells two saves apart.
        updated_at_ms=sa.func.max(sa.bindparam("now_ms"), sessions.c.updated_at_ms + 1),
    )
)


def put(
    connection: sa.Connection,
    *,
    session_id: int | None,
    namespace: str,
    name: str,
    space_id: int,
    head_id: int,
    ids: TokenIds,
    slice_n_tokens: int,
    metadata: bytes,
    now_ms: int,
) -> int:
    """Write a session, new or over ``session_id``; only token slices that differ are written."""
    values = {
        "space_id": space_id,
        "head_id": head_id,
        "n_tokens": len(ids),
        "metadata": metadata,
    }
    if session_id is None:
        times = {"created_at_ms": now_ms, "updated_at_ms": now_ms}
        session_id = insert_row(
            connection, sessions, namespace=namespace, name=name, **times, **values
        )
    else:
        of_session = {"session_id": session_id, "now_ms": now_ms}
        connection.execute(_UPDATE, {**values, **of_session})
    _put_tokens(connection, session_id, ids, slice_n_tokens=slice_n_tokens)
    return session_id


def move_heads(connection: sa.Connection, chunk_ids: Sequence[int]) -> None:
    """Let sessions that end in one of these chunks hold only the chunk's parent."""
    parent = sa.select(chunks.c.parent_id).where(chunks.c.id == sessions.c.head_id)
    connection.execute(
        sa.update(sessions)
        .where(sessions.c.head_id.in_(chunk_ids))
        .values(head_id=parent.scalar_subquery())
    )


def delete(connection: sa.Connection, session_id: int) -> None:
    """Delete a session's rows; its chunks stay."""
    connection.execute(sa.delete(session_tokens).where(session_tokens.c.session_id == session_id))
    connection.execute(sa.delete(sessions).where(sessions.c.id == session_id))


_TOKEN_SLICES = (
    sa.select(session_tokens.c.start, session_tokens.c.tokens)
    .where(session_tokens.c.session_id == sa.bindparam("session_id"))
    .order_by(session_tokens.c.start)
)


def _put_tokens(
    connection: sa.Connection, session_id: int, ids: TokenIds, *, slice_n_tokens: int
) -> None:
    """Make the session's token rows spell ``ids``; unchanged rows are left alone."""
    stored = {
        row.start: row.tokens
        for row in connection.execute(_TOKEN_SLICES, {"session_id": session_id})
    }
    wanted = {
        start: to_big_endian(array("Q", ids[start : start + slice_n_tokens]))
        for start in range(0, len(ids), slice_n_tokens)
    }
    stale = [start for start in stored if stored[start] != wanted.get(start)]
    if stale:
        connection.execute(
            sa.delete(session_tokens).where(
                session_tokens.c.session_id == session_id, session_tokens.c.start.in_(stale)
            )
        )
    fresh = [
        {"session_id": session_id, "start": start, "tokens": tokens}
        for start, tokens in wanted.items()
        if stored.get(start) != tokens
    ]
    if fresh:
        connection.execute(sa.insert(session_tokens), fresh)
