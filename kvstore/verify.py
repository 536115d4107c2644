"""Verification: every claim that the file makes about itself, derived again. Only reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from kvstore.blob import check_blob
from kvstore.codec import may_lose
from kvstore.db import bases, chunks, sessions
from kvstore.db import engine as db
from kvstore.db.basis_cache import BasisCache, SpaceBases
from kvstore.db.chunks import ChunkRow
from kvstore.db.engine import driver_connection
from kvstore.db.schema import Database
from kvstore.db.stats import read_stats
from kvstore.db.tables import blobs as blob_table
from kvstore.db.tables import chunks as chunk_table
from kvstore.db.tables import models, payloads, session_tokens, spaces
from kvstore.db.tables import sessions as session_table
from kvstore.errors import CorruptStoreError, KVStoreError
from kvstore.layout import Fingerprint, Layout
from kvstore.lossy import codec_text_of
from kvstore.manifest import unpack_manifest, unpack_metadata
from kvstore.match import ChunkMatch, piece_blobs, pieces
from kvstore.prefix import Key, chunk_key, full_chunk_keys, root_key
from kvstore.tokens import TOKEN_NBYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a verification looked at, and the problems it found (SQLite's own: the first 20)."""

    problems: tuple[str, ...]
    n_models: int
    n_chunks: int
    n_blobs: int
    n_sessions: int
    raw_nbytes: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(database: Database) -> VerifyReport:
    """Check SQLite's own structures, references, keys, ranges and every blob's checksum."""
    with db.read_transaction(database.engine) as connection, db.unmapped(connection):
        problems = [*_sqlite_problems(connection)]
        layouts: dict[int, Layout] = {}
        problems += _model_problems(connection, layouts)
        known = BasisCache()  # as they are in the file now
        problems += _basis_problems(connection, layouts, known)
        checker = _ChunkChecker(connection, layouts, known)
        problems += checker.problems()
        problems += _session_problems(connection, layouts)
        stats = read_stats(connection)
        return VerifyReport(
            problems=tuple(problems),
            n_models=stats.n_models,
            n_chunks=stats.n_chunks,
            n_blobs=checker.n_blobs,
            n_sessions=stats.n_sessions,
            raw_nbytes=checker.raw_nbytes,
        )


def _sqlite_problems(connection: sa.Connection) -> Iterator[str]:
    for (line,) in connection.exec_driver_sql("PRAGMA integrity_check(20)"):
        if line != "ok":
            yield f"sqlite: {line}"
    for table, row_id, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        yield f"sqlite: {table} row {row_id} refers to a missing row of {parent}"
    orphans = connection.execute(
        sa.select(sa.func.count()).where(payloads.c.id.not_in(sa.select(blob_table.c.payload_id)))
    ).scalar_one()
    if orphans:
        yield f"payloads: {orphans} belong to no blob"


_MODEL_COLUMNS: dict[str, type] = {
    "models_fingerprint": bytes,
    "models_weights_digest": bytes,
    "models_program_digest": bytes,
    "models_layout_digest": bytes,
    "spaces_root_key": bytes,
    "spaces_chunk_n_tokens": int,
    "spaces_namespace": str,
    "spaces_adapter": bytes,
}


def _model_problems(connection: sa.Connection, layouts: dict[int, Layout]) -> Iterator[str]:
    """Check models and spaces; fills ``layouts`` by space id."""
    query = sa.select(spaces, models).join(models, models.c.id == spaces.c.model_id)
    for row in connection.execute(query.set_label_style(sa.LABEL_STYLE_TABLENAME_PLUS_COL)):
        where = f"model row {row.models_id}, space row {row.spaces_id}"
        wrong = [
            name for name, kind in _MODEL_COLUMNS.items() if type(row._mapping[name]) is not kind
        ]
        if wrong or not 0 < row.spaces_chunk_n_tokens < 1 << 32:
            yield f"{where}: impossible values in {', '.join(wrong) or 'spaces_chunk_n_tokens'}"
            continue
        where = f"model {row.models_fingerprint.hex()[:12]}"
        try:
            layout = unpack_manifest(row.models_manifest)
            codec_text_of(row.spaces_adapter)
            fingerprint = Fingerprint(
                weights=row.models_weights_digest,
                program=row.models_program_digest,
                layout=row.models_layout_digest,
            )
        except KVStoreError as error:
            yield f"{where}: {error}"
            continue
        if fingerprint.model != row.models_fingerprint:
            yield f"{where}: the fingerprint is not that of its three digests"
        if layout.digest != row.models_layout_digest:
            yield f"{where}: the manifest's layout has another digest"
        root = root_key(
            row.models_fingerprint,
            chunk_n_tokens=row.spaces_chunk_n_tokens,
            namespace=row.spaces_namespace,
            adapter=row.spaces_adapter,
        )
        if root != row.spaces_root_key:
            yield f"{where}: space {row.spaces_id} has another root key than its parameters give"
        layouts[row.spaces_id] = layout


def _basis_problems(
    connection: sa.Connection, layouts: dict[int, Layout], known: BasisCache
) -> Iterator[str]:
    """Check every basis, whether a blob names it or not."""
    query = sa.select(spaces.c.id).where(spaces.c.adapter != b"")
    lossy = set(connection.execute(query).scalars())
    for row in bases.all_of(connection):
        where = f"basis of tensor {row.tensor}, space row {row.space_id}"
        layout = layouts.get(row.space_id)
        if layout is None:
            continue  # a foreign key problem, or an impossible space: reported above
        if row.space_id not in lossy:
            yield f"{where}: a basis where all is exact"
        if type(row.tensor) is not int or not 0 <= row.tensor < len(layout.tensors):
            yield f"{where}: there is no such tensor"
            continue
        spec = layout.tensors[row.tensor]
        if not may_lose(spec):
            yield f"{where}: {spec.name} has no lossy blobs"
            continue
        try:
            known.of_space(row.space_id).read(driver_connection(connection), row.tensor, spec)
        except CorruptStoreError as error:
            yield f"{where}: {error}"


class _ChunkChecker:
    """Walks every chunk; counts blobs and their decoded bytes."""

    def __init__(
        self, connection: sa.Connection, layouts: dict[int, Layout], known: BasisCache
    ) -> None:
        self._connection = connection
        self._layouts = layouts
        self._known = known
        self.n_blobs = 0
        self.raw_nbytes = 0

    def problems(self) -> Iterator[str]:
        space_rows = self._connection.execute(sa.select(spaces)).all()
        by_space = {space.id: space for space in space_rows}
        rows = self._connection.execute(
            sa.select(
                chunk_table.c.id,
                chunk_table.c.space_id,
                chunk_table.c.raw_nbytes,
                chunk_table.c.stored_nbytes,
            ).order_by(chunk_table.c.id)
        ).all()
        for row in rows:
            try:
                chunk = chunks.by_id(self._connection, row.id)
            except CorruptStoreError as error:
                yield str(error)
                continue
            space = by_space.get(row.space_id)
            if chunk is None or space is None or space.id not in self._layouts:
                continue  # a foreign key problem, or an impossible space: reported above
            where = f"chunk {chunk.key.hex()[:12]} [{chunk.start}, {chunk.stop})"
            for problem in self._key_problems(chunk, Key(space.root_key), space.chunk_n_tokens):
                yield f"{where}: {problem}"
            layout, is_lossy = self._layouts[space.id], bool(space.adapter)
            bases = self._known.of_space(space.id)
            for problem in self._blob_problems(chunk, layout, bases, is_lossy=is_lossy):
                yield f"{where}: {problem}"
            for problem in self._size_problems(chunk.id, row.raw_nbytes, row.stored_nbytes):
                yield f"{where}: {problem}"

    def _key_problems(self, chunk: ChunkRow, root: Key, chunk_n_tokens: int) -> Iterator[str]:
        if chunk_key(chunk.parent_key, chunk.tokens, extras=chunk.extras) != chunk.key:
            yield "its key is not that of its parent, its tokens and its extras"
        if chunk.start % chunk_n_tokens or chunk.n_tokens > chunk_n_tokens:
            yield f"it does not lie within one slice of {chunk_n_tokens} tokens"
        if chunk.parent_id is None:
            if chunk.parent_key != root:
                yield "it has no parent, and its parent key is not its space's root"
            return
        try:
            parent = chunks.by_id(self._connection, chunk.parent_id)
        except CorruptStoreError:
            return  # reported where the walk meets the parent itself
        if parent is None or parent.key != chunk.parent_key or parent.stop != chunk.start:
            yield "its parent is not the full chunk before it"

    def _has_blobs(self, chunk_id: int) -> bool:
        query = sa.select(sa.exists().where(blob_table.c.chunk_id == chunk_id))
        return bool(self._connection.execute(query).scalar_one())

    def _size_problems(self, chunk_id: int, raw: int, stored: int) -> Iterator[str]:
        sums = self._connection.execute(
            sa.select(
                sa.func.coalesce(sa.func.sum(blob_table.c.raw_nbytes), 0),
                sa.func.coalesce(sa.func.sum(blob_table.c.stored_nbytes), 0),
            ).where(blob_table.c.chunk_id == chunk_id)
        ).one()
        if tuple(sums) != (raw, stored):
            yield f"its row says {raw} bytes, {stored} stored; its blobs say {sums[0]}, {sums[1]}"

    def _blob_problems(
        self, chunk: ChunkRow, layout: Layout, bases: SpaceBases, *, is_lossy: bool
    ) -> Iterator[str]:
        try:
            all_pieces = pieces(self._connection, ChunkMatch(chunk=chunk, stop=chunk.stop))
        except CorruptStoreError as error:
            yield str(error)
            return
        own = [piece for piece in all_pieces if piece.owner.id == chunk.id]
        if not own:
            if self._has_blobs(chunk.id):
                yield "it borrows all of its tokens and has blobs of its own"
            return
        try:
            rows = piece_blobs(self._connection, own[0], layout, is_lossy=is_lossy)
        except CorruptStoreError as error:
            yield str(error)
            return
        for row in rows:
            self.n_blobs += 1
            self.raw_nbytes += row.raw_nbytes
            try:
                check_blob(self._connection, row, chunk.key, layout.tensors[row.tensor], bases)
            except CorruptStoreError as error:
                yield f"{layout.tensors[row.tensor].name}: {error}"


def _session_problems(connection: sa.Connection, layouts: dict[int, Layout]) -> Iterator[str]:
    query = sa.select(
        session_table,
        spaces.c.root_key,
        spaces.c.chunk_n_tokens,
        spaces.c.namespace.label("space_namespace"),
    ).join(spaces, spaces.c.id == session_table.c.space_id)
    for row in connection.execute(query):
        where = f"session {row.name!r}"
        if row.namespace != row.space_namespace:
            yield f"{where}: its key space is of another namespace"
        try:
            unpack_metadata(row.metadata)
            ids = sessions.tokens_of(connection, row.id)
            head = None if row.head_id is None else chunks.by_id(connection, row.head_id)
        except CorruptStoreError as error:
            yield f"{where}: {error}"
            continue
        if len(ids) != row.n_tokens:
            yield f"{where}: expected {row.n_tokens} token ids, found {len(ids)}"
        yield from (f"{where}: {problem}" for problem in _slice_problems(connection, row.id))
        if head is None or row.space_id not in layouts:
            continue
        try:
            lineage = sessions.lineage_of(connection, row.id)
        except CorruptStoreError:
            continue  # reported where the walk meets the chunk
        before = full_chunk_keys(
            Key(row.root_key), ids[: head.start], lineage, chunk_n_tokens=row.chunk_n_tokens
        )
        if head.tokens != ids[head.start : head.stop]:
            yield f"{where}: its last chunk holds other tokens"
        elif head.parent_key != (before[-1] if before else row.root_key):
            yield f"{where}: its last chunk continues other tokens than the session's"


def _slice_problems(connection: sa.Connection, session_id: int) -> Iterator[str]:
    slices = connection.execute(
        sa.select(session_tokens.c.start, session_tokens.c.tokens)
        .where(session_tokens.c.session_id == session_id)
        .order_by(session_tokens.c.start)
    )
    position = 0
    for start, tokens in slices:
        if start != position:
            yield f"token ids are missing at {position}"
            return
        position += len(tokens) // TOKEN_NBYTES
