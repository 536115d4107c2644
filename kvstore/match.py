"""Matching: the longest stored prefix of a prompt, and where its blobs lie. Only reads."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from kvstore.codec import QUANTIZERS, may_lose
from kvstore.db import blobs, chunks
from kvstore.db.blobs import BlobRow
from kvstore.db.chunks import ChunkRow
from kvstore.db.models import SpaceRow
from kvstore.errors import CorruptStoreError
from kvstore.kinds import kind_of
from kvstore.layout import Layout, TensorSpec
from kvstore.lineage import Lineage, extras_up_to, n_common_tokens, pack_extras
from kvstore.prefix import Key, chunk_key, full_chunk_keys
from kvstore.ranges import Range, n_positions, union
from kvstore.tokens import TokenIds


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMatch:
    """A stored chunk of which the prompt has tokens ``[chunk.start, stop)``."""

    chunk: ChunkRow
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens ``[start, stop)`` of a matched chunk, held by ``owner``'s own blobs.

    The blobs may go on behind ``stop``. ``owner`` is the matched chunk, or one
    that it borrows from.
    """

    owner: ChunkRow
    start: int
    stop: int


def longest_prefix(
    connection: sa.Connection, space: SpaceRow, ids: TokenIds, lineage: Lineage
) -> Iterator[ChunkMatch]:
    """The chunks that hold the longest stored prefix of ``ids`` of that lineage, in token order.

    A key finds a chunk; the stored token ids decide whether it is a match. The
    last match may cover only the first part of its chunk.

    Raises:
        CorruptStoreError: a row is damaged; what came before it is a prefix.
    """
    size = space.chunk_n_tokens
    keys = full_chunk_keys(space.root, ids, lineage, chunk_n_tokens=size)
    stored = chunks.by_keys(connection, keys)
    n_matches = 0
    parent_key = space.root
    for number, key in enumerate(keys):
        if key not in stored:
            break
        chunk = stored[key]
        start = number * size
        if chunk is None or chunk.start != start or chunk.tokens != ids[start : start + size]:
            raise CorruptStoreError(
                f"chunk {key.hex()[:12]}: its row is not what its key stands for"
            )
        yield ChunkMatch(chunk=chunk, stop=chunk.stop)
        n_matches += 1
        parent_key = key
    start = n_matches * size
    rest = array("Q", ids[start : start + size])
    if not rest:
        return
    matches = (
        ChunkMatch(chunk=sibling, stop=start + n_shared)
        for sibling, n_shared in siblings(connection, parent_key, rest, lineage, start=start)
    )
    best = max(matches, key=lambda match: match.stop, default=None)
    if best is not None:
        yield best


def way_keys(
    space: SpaceRow, ids: TokenIds, lineage: Lineage, matches: Sequence[ChunkMatch]
) -> list[Key]:
    """The keys of the full chunks among ``matches``, and of every tail that may follow them."""
    size = space.chunk_n_tokens
    keys = [match.chunk.key for match in matches if match.stop - match.chunk.start == size]
    start, parent_key = len(keys) * size, keys[-1] if keys else space.root
    for stop in range(start + 1, min(start + size, len(ids)) + 1):
        extras = pack_extras(lineage, start, stop)
        keys.append(chunk_key(parent_key, ids[start:stop], extras=extras))
    return keys


def siblings(
    connection: sa.Connection, parent_key: Key, ids: TokenIds, lineage: Lineage, *, start: int
) -> Iterator[tuple[ChunkRow, int]]:
    """Chunks under one parent that begin as ``ids`` do, and how many tokens each shares.

    ``ids`` begin at position ``start``. The one that shares most of all is among them.

    Raises:
        CorruptStoreError: a row is damaged.
    """
    for extras, stop in extras_up_to(lineage, start, start + len(ids)):
        for sibling in chunks.neighbours(
            connection, parent_key, ids[: stop - start], extras=extras
        ):
            n_shared = n_common_tokens(sibling.tokens, sibling.edits, ids, lineage, start=start)
            if n_shared and is_genuine(sibling, start):
                yield sibling, n_shared


def is_genuine(chunk: ChunkRow, start: int) -> bool:
    """Whether a chunk that was not found by its key is what its key stands for, from ``start``."""
    key = chunk_key(chunk.parent_key, chunk.tokens, extras=chunk.extras)
    return chunk.start == start and chunk.key == key


def is_base(base: ChunkRow, borrower: ChunkRow) -> bool:
    """Whether ``base`` has what ``borrower`` says that it borrows from it."""
    return (
        base.parent_key == borrower.parent_key
        and is_genuine(base, borrower.start)
        and borrower.base_n_tokens
        <= n_common_tokens(
            base.tokens, base.edits, borrower.tokens, borrower.edits, start=borrower.start
        )
        and (base.base_id is None or base.base_n_tokens < borrower.base_n_tokens)
    )


def pieces(connection: sa.Connection, match: ChunkMatch) -> list[Piece]:
    """Whose blobs hold the match, in token order.

    Raises:
        CorruptStoreError: a chunk borrows from one that is missing or that has
            other tokens.
    """
    found: list[Piece] = []
    owner, stop = match.chunk, match.stop
    while True:
        own_start = owner.start + owner.base_n_tokens
        if stop > own_start:
            found.append(Piece(owner=owner, start=own_start, stop=stop))
            stop = own_start
        if owner.base_id is None:
            break
        base = chunks.by_id(connection, owner.base_id)
        if base is None or not is_base(base, owner):
            raise CorruptStoreError(
                f"chunk {owner.key.hex()[:12]} borrows from a chunk that is missing or differs"
            )
        owner = base
    return found[::-1]


def blob_raw_nbytes(spec: TensorSpec, start: int, stop: int) -> int:
    """Decoded bytes of a blob of positions ``[start, stop)``."""
    runs = kind_of(spec).runs(spec, start, stop)
    return sum(run.n_slots for run in runs) * spec.slot_nbytes


def piece_blobs(
    connection: sa.Connection, piece: Piece, layout: Layout, *, is_lossy: bool
) -> Sequence[BlobRow]:
    """The blobs of a piece's owner in tensor order, each checked as ``checked_blobs`` does.

    Raises:
        CorruptStoreError: a blob is missing, or a row is not what it must be.
    """
    rows = blobs.of_chunk(connection, piece.owner.id)
    return checked_blobs(rows, piece, layout, is_lossy=is_lossy)


def checked_blobs(
    rows: Sequence[BlobRow], piece: Piece, layout: Layout, *, is_lossy: bool
) -> Sequence[BlobRow]:
    """The blobs of a piece's owner, each row checked against the layout.

    Only in a lossy key space, and only of tensors that may lose, is a lossy codec believed.

    Every number that later decides an allocation is checked here. A full tensor has
    exactly one blob over the owner's own tokens; a window has what was resident when
    it was saved; a checkpoint has the lengths that it was saved at.

    Raises:
        CorruptStoreError: a blob is missing, or a row is not what it must be.
    """
    start, stop = piece.owner.start + piece.owner.base_n_tokens, piece.owner.stop
    where = f"chunk {piece.owner.key.hex()[:12]}"
    seen: dict[int, list[Range]] = {tensor: [] for tensor in range(len(layout.tensors))}
    for row in rows:
        if row.tensor not in seen:
            raise CorruptStoreError(f"{where}: a blob of tensor {row.tensor}, which is none")
        spec = layout.tensors[row.tensor]
        if not start <= row.start < row.stop <= stop:
            raise CorruptStoreError(
                f"{where}, {spec.name}: expected tokens within [{start}, {stop}), "
                f"found [{row.start}, {row.stop})"
            )
        if not kind_of(spec).is_storable(spec, row.start, row.stop):
            raise CorruptStoreError(
                f"{where}, {spec.name}: a {spec.kind} tensor never has tokens "
                f"[{row.start}, {row.stop}) in one blob"
            )
        if row.codec in QUANTIZERS and not (is_lossy and may_lose(spec)):
            raise CorruptStoreError(f"{where}, {spec.name}: a lossy blob where all is exact")
        raw_nbytes = blob_raw_nbytes(spec, row.start, row.stop)
        if row.raw_nbytes != raw_nbytes:
            raise CorruptStoreError(
                f"{where}, {spec.name}: expected {raw_nbytes} bytes, the row says {row.raw_nbytes}"
            )
        if row.payload_nbytes != row.stored_nbytes or not 0 < row.stored_nbytes <= raw_nbytes:
            raise CorruptStoreError(
                f"{where}, {spec.name}: expected a payload of {row.stored_nbytes} bytes "
                f"(1 to {raw_nbytes}), found {row.payload_nbytes}"
            )
        seen[row.tensor].append((row.start, row.stop))
    for tensor, ranges in seen.items():
        if ranges == [(start, stop)]:
            continue
        spec = layout.tensors[tensor]
        if kind_of(spec).is_whole:
            raise CorruptStoreError(
                f"{where}, {spec.name}: expected one blob of tokens [{start}, {stop}), "
                f"found {ranges}"
            )
        if n_positions(union(ranges)) != n_positions(ranges):
            raise CorruptStoreError(f"{where}, {spec.name}: its blobs overlap: {ranges}")
    return rows
