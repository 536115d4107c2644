"""Planning a load: how far the stored tokens match, how far every tensor can serve, what to read.

Only reads rows and decides; no payload, no buffer. ``kvstore.load`` acts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sqlalchemy as sa

from kvstore.codec import QUANTIZERS
from kvstore.db import blobs
from kvstore.db.blobs import BlobRow
from kvstore.db.models import SpaceRow
from kvstore.errors import CorruptStoreError
from kvstore.kinds import kind_of
from kvstore.layout import Layout, LiveCache
from kvstore.lineage import Lineage, before, n_common_tokens
from kvstore.lossy import mark_of, marked, unmarked
from kvstore.match import ChunkMatch, Piece, checked_blobs, longest_prefix, pieces, way_keys
from kvstore.prefix import Key
from kvstore.ranges import Range, clip, subtract, union
from kvstore.tokens import TokenIds

_Found: TypeAlias = tuple[ChunkMatch, Piece, Sequence[BlobRow]]
"""A piece of a match, and the blobs of its owner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadItem:
    """Positions ``[start, stop)`` of one tensor, to be taken from one blob."""

    row: BlobRow
    key: Key
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        """Whether that is all that the blob holds."""
        return self.start == self.row.start and self.stop == self.row.stop


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStep:
    """What one chunk gives; after it, full tensors are in place up to ``stop``."""

    stop: int
    items: tuple[LoadItem, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What a load is going to do.

    ``ids`` of ``lineage`` are wanted, and looked for in ``space``. The cache keeps its first
    ``kept_n_tokens`` and will hold ``n_tokens``, at most ``limit_n_tokens``. The
    stored tokens match ``matched_n_tokens`` of the prompt; ``limited_by`` is the
    tensor that cannot serve as many, if there is one.
    ``damage`` says what was found wrong on the way. ``codec_text`` is the lossy codec whose key
    space it is, or empty; ``lineage`` is then without that codec's marks.
    """

    ids: TokenIds
    lineage: Lineage
    live_edits: Lineage
    codec_text: str
    space: SpaceRow | None
    limit_n_tokens: int
    kept_n_tokens: int
    n_tokens: int
    matched_n_tokens: int
    limited_by: int | None
    matches: tuple[ChunkMatch, ...]
    steps: tuple[LoadStep, ...]
    damage: str | None

    def keys(self) -> list[Key]:
        """The keys of all chunks that the wanted tokens may end in, up to where the match does."""
        return (
            [] if self.space is None else way_keys(self.space, self.ids, self.lineage, self.matches)
        )

    def edits(self, n_tokens: int) -> Lineage:
        """The lineage of the cache when it holds ``n_tokens`` after the load."""
        start = self.kept_n_tokens
        if start >= n_tokens:
            return before(self.live_edits, n_tokens)
        if not self.codec_text:
            return before(self.lineage, n_tokens)
        last = [match.chunk.key for match in self.matches if match.chunk.start < n_tokens][-1]
        is_exact = not any(
            item.row.codec in QUANTIZERS and item.start < n_tokens
            for step in self.steps
            for item in step.items
        )
        mark = mark_of(self.codec_text, last, is_exact=is_exact)
        return marked(self.live_edits, self.lineage, mark, start=start, stop=n_tokens)


def plan_load(
    connection: sa.Connection,
    cache: LiveCache,
    space: SpaceRow | None,
    ids: TokenIds,
    lineage: Lineage,
    *,
    is_whole: bool,
    codec_text: str,
) -> LoadPlan:
    """The longest prefix of ``ids`` that every tensor can serve, and the blobs that it takes.

    Without the last token, unless ``is_whole`` or its logits are stored.
    """
    is_lossy = bool(codec_text)
    layout = cache.layout
    limit = len(ids) if is_whole or layout.has_logits else len(ids) - 1
    limit = min(limit, cache.capacity_n_tokens)
    kept = _kept(cache, ids, lineage, limit, is_lossy=is_lossy)
    matches: list[ChunkMatch] = []
    places: list[tuple[ChunkMatch, Piece]] = []
    damage: str | None = None
    try:
        stored = () if space is None else longest_prefix(connection, space, ids[:limit], lineage)
        for match in stored:
            matches.append(match)
            if layout.is_full and match.stop <= kept:
                continue  # live already; not even its rows are needed
            places += [(match, piece) for piece in pieces(connection, match)]
    except CorruptStoreError as error:
        damage = str(error)  # what came before it can still serve
    found: list[_Found] = []
    try:
        for one in _with_blobs(connection, places, layout, is_lossy=is_lossy):
            found.append(one)  # noqa: PERF402  # what was found before an error counts
    except CorruptStoreError as error:
        damage = str(error)
    live = [clip(kind_of(spec).resident(spec, cache.held), 0, kept) for spec in layout.tensors]
    available = [
        union([*live[tensor], *ranges]) for tensor, ranges in enumerate(_stored(found, layout))
    ]
    n_tokens, limited_by = _servable(layout, available, limit)
    matched = max([kept, *(match.stop for match in matches)])
    n_tokens = max(kept, n_tokens)
    if n_tokens >= matched:
        limited_by = None
    return LoadPlan(
        ids=ids,
        lineage=lineage,
        live_edits=cache.edits,
        codec_text=codec_text,
        space=space,
        limit_n_tokens=limit,
        kept_n_tokens=kept,
        n_tokens=n_tokens,
        matched_n_tokens=matched,
        limited_by=limited_by,
        matches=tuple(matches),
        steps=_steps(layout, found, live, n_tokens) if n_tokens > kept else (),
        damage=damage,
    )


def _kept(
    cache: LiveCache, ids: TokenIds, lineage: Lineage, limit_n_tokens: int, *, is_lossy: bool
) -> int:
    """How many tokens at the start of the live cache can stay."""
    live = unmarked(cache.edits) if is_lossy else cache.edits
    common = n_common_tokens(array("Q", cache.tokens), live, ids, lineage)
    kept = min(common, limit_n_tokens)
    held = cache.held
    if all(kind_of(spec).can_truncate(spec, held, kept) for spec in cache.layout.tensors):
        return kept
    return 0


def _with_blobs(
    connection: sa.Connection,
    places: Sequence[tuple[ChunkMatch, Piece]],
    layout: Layout,
    *,
    is_lossy: bool,
) -> Iterator[_Found]:
    """Each piece with its blobs, which are all read at once and checked one piece at a time.

    Raises:
        CorruptStoreError: a blob is missing, or a row is not what it must be.
    """
    rows_of = blobs.of_chunks(connection, [*{piece.owner.id: None for _, piece in places}])
    for match, piece in places:
        rows = rows_of[piece.owner.id]
        if isinstance(rows, CorruptStoreError):
            raise rows
        yield match, piece, checked_blobs(rows, piece, layout, is_lossy=is_lossy)


def _stored(found: Sequence[_Found], layout: Layout) -> list[list[Range]]:
    """The positions of each tensor that the matched pieces have blobs for."""
    stored: list[list[Range]] = [[] for _ in layout.tensors]
    for _, piece, rows in found:
        for row in rows:
            if row.start < piece.stop:
                stored[row.tensor].append((row.start, min(row.stop, piece.stop)))
    return stored


def _servable(
    layout: Layout, available: Sequence[list[Range]], limit_n_tokens: int
) -> tuple[int, int | None]:
    """The longest length that every tensor can serve, and the ring or checkpoint that limits it."""
    n_tokens, limited_by = limit_n_tokens, None
    settled = False
    while n_tokens and not settled:
        settled = True
        for tensor, spec in enumerate(layout.tensors):
            servable = kind_of(spec).servable(spec, available[tensor], n_tokens)
            if servable < n_tokens:
                n_tokens, settled = servable, False
                if kind_of(spec).miss_reason is not None:
                    limited_by = tensor
    return n_tokens, limited_by


def _steps(
    layout: Layout,
    found: Sequence[_Found],
    live: Sequence[list[Range]],
    n_tokens: int,
) -> tuple[LoadStep, ...]:
    """The blobs that hold what ``n_tokens`` require and the cache does not have, by chunk."""
    wanted = [
        subtract(kind_of(spec).required(spec, n_tokens), live[tensor])
        for tensor, spec in enumerate(layout.tensors)
    ]
    by_chunk: dict[int, list[LoadItem]] = {}
    stops: dict[int, int] = {}
    for match, piece, rows in found:
        stops[match.chunk.id] = min(match.stop, n_tokens)
        items = by_chunk.setdefault(match.chunk.id, [])
        for row in rows:
            for first, last in wanted[row.tensor]:
                start, stop = max(row.start, first), min(row.stop, piece.stop, last)
                if start < stop:
                    items.append(LoadItem(row=row, key=piece.owner.key, start=start, stop=stop))
    return tuple(
        LoadStep(stop=stops[chunk_id], items=tuple(items))
        for chunk_id, items in by_chunk.items()
        if items
    )
