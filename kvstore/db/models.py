"""Rows of ``models`` and ``spaces``: which programs and key spaces the file knows."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from kvstore.db import bases
from kvstore.db.engine import insert_row
from kvstore.db.tables import chunks, models, sessions, spaces
from kvstore.errors import CorruptStoreError, InputError
from kvstore.layout import Fingerprint, Layout
from kvstore.manifest import pack_manifest
from kvstore.prefix import Key, root_key


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceRow:
    """One key space: the chains under one root."""

    id: int
    model_id: int
    root: Key
    chunk_n_tokens: int
    adapter: bytes

    @property
    def is_lossy(self) -> bool:
        """Whether its blobs may be of a lossy codec."""
        return bool(self.adapter)


def fingerprints(connection: sa.Connection) -> list[Fingerprint]:
    """Every model's fingerprint, oldest first.

    Raises:
        CorruptStoreError: a digest is not one.
    """
    columns = (models.c.weights_digest, models.c.program_digest, models.c.layout_digest)
    try:
        return [
            Fingerprint(
                weights=row.weights_digest, program=row.program_digest, layout=row.layout_digest
            )
            for row in connection.execute(sa.select(*columns).order_by(models.c.id))
        ]
    except InputError as error:
        raise CorruptStoreError(f"models: {error}") from error


_BY_ROOT = sa.select(spaces.c.id, spaces.c.model_id).where(
    spaces.c.root_key == sa.bindparam("root")
)


def find_space(
    connection: sa.Connection,
    fingerprint: Fingerprint,
    *,
    chunk_n_tokens: int,
    namespace: str,
    adapter: bytes,
) -> SpaceRow | None:
    """The key space of these parameters, if anything was ever saved in it."""
    root = root_key(
        fingerprint.model, chunk_n_tokens=chunk_n_tokens, namespace=namespace, adapter=adapter
    )
    row = connection.execute(_BY_ROOT, {"root": root}).one_or_none()
    if row is None:
        return None
    return SpaceRow(
        id=row.id,
        model_id=row.model_id,
        root=root,
        chunk_n_tokens=chunk_n_tokens,
        adapter=adapter,
    )


def ensure_space(
    connection: sa.Connection,
    fingerprint: Fingerprint,
    layout: Layout,
    *,
    chunk_n_tokens: int,
    namespace: str,
    adapter: bytes,
    now_ms: int,
) -> SpaceRow:
    """The key space of these parameters, made with its model if it is new."""
    space = find_space(
        connection,
        fingerprint,
        chunk_n_tokens=chunk_n_tokens,
        namespace=namespace,
        adapter=adapter,
    )
    if space is not None:
        return space
    model_id = connection.execute(
        sa.select(models.c.id).where(models.c.fingerprint == fingerprint.model)
    ).scalar_one_or_none()
    if model_id is None:
        model_id = insert_row(
            connection,
            models,
            fingerprint=fingerprint.model,
            weights_digest=fingerprint.weights,
            program_digest=fingerprint.program,
            layout_digest=fingerprint.layout,
            manifest=pack_manifest(layout),
            created_at_ms=now_ms,
        )
    root = root_key(
        fingerprint.model, chunk_n_tokens=chunk_n_tokens, namespace=namespace, adapter=adapter
    )
    space_id = insert_row(
        connection,
        spaces,
        model_id=model_id,
        root_key=root,
        chunk_n_tokens=chunk_n_tokens,
        namespace=namespace,
        adapter=adapter,
    )
    return SpaceRow(
        id=space_id,
        model_id=model_id,
        root=root,
        chunk_n_tokens=chunk_n_tokens,
        adapter=adapter,
    )


# Looked for space by space: there are few, and very many chunks.
_DELETE_SPACES = sa.delete(spaces).where(
    ~sa.exists().where(chunks.c.space_id == spaces.c.id),
    ~sa.exists().where(sessions.c.space_id == spaces.c.id),
)
_DELETE_MODELS = sa.delete(models).where(~sa.exists().where(spaces.c.model_id == models.c.id))


def delete_unused(connection: sa.Connection) -> None:
    """Delete bases of spaces without chunks, spaces without sessions too, models without spaces."""
    bases.delete_unused(connection)
    connection.execute(_DELETE_SPACES)
    connection.execute(_DELETE_MODELS)
