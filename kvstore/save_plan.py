"""Planning a save: what is there already, what is missing, and who is going to hold it.

Only reads and decides; ``kvstore.save`` acts.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace

import sqlalchemy as sa

from kvstore.db import blobs, chunks, sessions
from kvstore.db.chunks import ChunkRow
from kvstore.db.sessions import Revision
from kvstore.errors import CorruptStoreError
from kvstore.kinds import kind_of
from kvstore.lineage import Lineage, pack_extras
from kvstore.lossy import adapter_of
from kvstore.match import ChunkMatch, is_genuine, pieces, siblings
from kvstore.prefix import Key, chunk_key, full_chunk_keys, root_key
from kvstore.ranges import Range, clip, subtract, union
from kvstore.source import Source
from kvstore.thinning import keeps_checkpoint
from kvstore.tokens import TokenIds

MIN_BORROWED_N_TOKENS = 16
"""Fewer common tokens than this are stored again rather than borrowed from a sibling.

Not where there are rings or checkpoints: what one save has of them must lie on the path
of every prompt that shares the tokens.
"""


_NO_BASE: tuple[ChunkRow | None, int] = (None, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequest:
    """A checked call of ``save_session``: what the cache holds of ``ids`` and ``lineage``.

    ``codec_names`` has each tensor's codec, ``codec_text`` the lossy ones of them (empty if none
    is), for which ``lineage`` is without their marks: the first ``n_unmarked_tokens`` of the cache
    came out of no lossy blob (there may be more of them than ``ids``). ``seen`` is the named
    session as its caller last saw it, or None. ``kept`` gives the rows of chunks that saves in the
    background are going to build on: they are not deleted. None are added before it is left: after
    the commit.
    """

    cache: Source
    ids: TokenIds
    lineage: Lineage
    n_unmarked_tokens: int
    name: str | None
    metadata: bytes
    replace: bool
    namespace: str
    chunk_n_tokens: int
    max_nbytes: int | None
    checkpoint_n_tokens: int
    codec_text: str
    codec_names: tuple[str, ...]
    seen: Revision | None
    kept: Callable[[], AbstractContextManager[Collection[int]]]

    @property
    def adapter(self) -> bytes:
        """What the key space is for, besides model, chunk size and namespace."""
        return adapter_of(self.codec_text)

    @property
    def root(self) -> Key:
        """The root key of the key space that it is saved in."""
        return root_key(
            self.cache.fingerprint.model,
            chunk_n_tokens=self.chunk_n_tokens,
            namespace=self.namespace,
            adapter=self.adapter,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A chunk in the file that something else is going to refer to."""

    id: int
    key: Key


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Positions ``[start, stop)`` of one tensor that a blob is made of."""

    tensor: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewChunk:
    """A chunk that is missing, and the blobs that it gets."""

    key: Key
    parent_key: Key
    start: int
    ids: TokenIds
    extras: bytes
    base: ChunkRow | None
    base_n_tokens: int
    present_n_tokens: int
    superseded_id: int | None
    parts: tuple[Part, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens that it covers, borrowed ones included."""
        return len(self.ids)

    @property
    def n_new_tokens(self) -> int:
        """Tokens that nothing in the file had."""
        return len(self.ids) - self.present_n_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class FillIn:
    """A chunk that exists, and blobs that it still lacks."""

    chunk: ChunkRow
    parts: tuple[Part, ...]

    @property
    def key(self) -> Key:
        """The existing chunk's key."""
        return self.chunk.key

    @property
    def n_tokens(self) -> int:
        """Tokens that the chunk covers."""
        return self.chunk.n_tokens


Write = NewChunk | FillIn


@dataclass(frozen=True, slots=True, kw_only=True)
class SavePlan:
    """Everything that is to be written, in order, and the last chunk that exists already."""

    tip: Link | None
    writes: tuple[Write, ...]


def plan_save(connection: sa.Connection, request: SaveRequest) -> SavePlan:
    """What a save of ``request`` has to write now."""
    return _Planner(connection, request).plan()


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPlan:
    """What a save that happens later needs: parts of the cache, and chunks of the file."""

    parts: tuple[Part, ...]
    chunk_ids: frozenset[int]


def plan_copy(connection: sa.Connection, request: SaveRequest) -> CopyPlan:
    """What a save of ``request`` is going to need of the cache if the file stays as it is.

    Also if saves that were begun earlier, or other processes, add to the file first: of a
    chunk that is missing all is taken, since whom it borrows from is decided anew by then; and
    states that a growing session thins out are taken even where they are stored now.
    """
    layout = request.cache.layout
    found: list[list[Range]] = [[] for _ in layout.tensors]
    chunk_ids = set()
    for one in (*before_edits(request), request):
        if one is not request and has_last_chunk(connection, one):
            continue
        planner = _Planner(connection, one)
        plan = planner.plan()
        if plan.tip is not None:
            chunk_ids.add(plan.tip.id)
        for part in planner.parts_of(plan):
            found[part.tensor].append((part.start, part.stop))
    parts = tuple(
        Part(tensor=tensor, start=start, stop=stop)
        for tensor, ranges in enumerate(found)
        for start, stop in union(ranges)
    )
    return CopyPlan(parts=parts, chunk_ids=frozenset(chunk_ids))


def before_edits(request: SaveRequest) -> list[SaveRequest]:
    """What lies before the edits of a chunk, each to be stored in chunks without them.

    The edited chunk borrows from these. Otherwise no look-up without the edit would find it.
    Of many edits in one chunk only the first and the last count.
    """
    size = request.chunk_n_tokens
    by_chunk: dict[int, list[int]] = {}
    for number, edit in enumerate(request.lineage):
        if edit.start % size:
            by_chunk.setdefault(edit.start // size, []).append(number)
    return [
        replace(
            request,
            ids=request.ids[: request.lineage[number].start],
            lineage=request.lineage[:number],
            name=None,
        )
        for numbers in by_chunk.values()
        for number in sorted({numbers[0], numbers[-1]})
    ]


def has_last_chunk(connection: sa.Connection, request: SaveRequest) -> bool:
    """Whether the tokens of ``request`` behind its full chunks lie in a chunk already.

    Or begin one, with the same edits. True if there are none.
    """
    size = request.chunk_n_tokens
    start = len(request.ids) // size * size
    ids = request.ids[start:]
    root = request.root
    keys = full_chunk_keys(root, request.ids[:start], request.lineage, chunk_n_tokens=size)
    parent_key = keys[-1] if keys else root
    if not ids:
        return True
    extras = pack_extras(request.lineage, start, start + len(ids))
    try:
        found = chunks.neighbours(connection, parent_key, ids, extras=extras)
        return any(one.tokens[: len(ids)] == ids and is_genuine(one, start) for one in found)
    except CorruptStoreError:
        return False


class _Planner:
    def __init__(self, connection: sa.Connection, request: SaveRequest) -> None:
        self._connection = connection
        self._request = request
        self._layout = request.cache.layout
        self._resident = [
            clip(kind_of(spec).resident(spec, request.cache.held), 0, len(request.ids))
            for spec in self._layout.tensors
        ]

    def plan(self) -> SavePlan:
        request = self._request
        size = request.chunk_n_tokens
        slices = [
            (start, array("Q", request.ids[start : start + size]))
            for start in range(0, len(request.ids), size)
        ]
        keys = [request.root]
        extras = [pack_extras(request.lineage, start, start + len(ids)) for start, ids in slices]
        for (_, ids), more in zip(slices, extras, strict=True):
            keys.append(chunk_key(keys[-1], ids, extras=more))
        existing = chunks.by_keys(self._connection, keys[1:])
        tip: Link | None = None
        writes: list[Write] = []
        missing = False
        for number, (start, ids) in enumerate(slices):
            row = existing.get(keys[number + 1])
            missing = missing or row is None or row.tokens != ids
            if row is not None and not missing:
                tip = Link(id=row.id, key=row.key)
                writes += self._fill_ins(ChunkMatch(chunk=row, stop=row.stop))
            else:
                key, parent_key = keys[number + 1], keys[number]
                writes += self._new_chunk(key, parent_key, start, ids, extras[number])
        return SavePlan(tip=tip, writes=tuple(writes))

    def parts_of(self, plan: SavePlan) -> list[Part]:
        """All that the cache has of the plan's chunks, and of what is thinned out."""
        found: list[Part] = []
        for write in plan.writes:
            if isinstance(write, NewChunk):
                found += self._parts(write.start, write.start + len(write.ids))
            else:
                found += write.parts
        return found + [
            Part(tensor=tensor, start=start, stop=stop)
            for tensor, spec in enumerate(self._layout.tensors)
            if kind_of(spec).is_thinned
            for start, stop in self._resident[tensor]
        ]

    def _new_chunk(
        self, key: Key, parent_key: Key, start: int, ids: TokenIds, extras: bytes
    ) -> list[Write]:
        """Store all of the chunk, or only what no sibling holds."""
        found = self._siblings(parent_key, ids, start)
        base, base_n_tokens = max(found, key=_by_n_shared, default=_NO_BASE)
        # What lies before an edit is never a part of the edited chunk: nobody who looks for it
        # without the edit would find it there.
        unedited = [one for one in found if one[0].extras != extras]
        before_edit = max(unedited, key=_by_n_shared, default=_NO_BASE)
        present_n_tokens = base_n_tokens
        superseded_id = None
        must_borrow = base is not None and self._has_gone(base, start + base_n_tokens)
        if base is not None and base_n_tokens == base.n_tokens and self._is_mine(base):
            superseded_id = base.id
            must_borrow = self._has_gone(base, base.stop, but_thinned=True) or keeps_checkpoint(
                self._connection,
                self._layout,
                base,
                checkpoint_n_tokens=self._request.checkpoint_n_tokens,
            )
            if len(ids) == self._request.chunk_n_tokens and not must_borrow:
                # The tail is full: one blob a tensor instead of the tail's many,
                # which nothing else needs and which go when this save is published.
                former = self._lossy_base(base)
                base, base_n_tokens = max([before_edit, former], key=_by_n_shared)
        is_worth_it = base_n_tokens >= MIN_BORROWED_N_TOKENS or not self._layout.is_full
        # What a full chunk holds with loss is not encoded again, from numbers that have lost.
        is_worth_it = is_worth_it or (base is not None and self._is_lossy(base))
        if not (is_worth_it or must_borrow):
            base, base_n_tokens = before_edit
        while base is not None and base_n_tokens <= base.base_n_tokens and base.base_id is not None:
            base = chunks.by_id(self._connection, base.base_id)  # what we share is not base's own
        if base is None:
            base_n_tokens = 0
        new = NewChunk(
            key=key,
            parent_key=parent_key,
            start=start,
            ids=ids,
            extras=extras,
            base=base,
            base_n_tokens=base_n_tokens,
            present_n_tokens=present_n_tokens,
            superseded_id=superseded_id,
            parts=self._parts(start + base_n_tokens, start + len(ids)),
        )
        if base is None:
            return [new]
        return [*self._fill_ins(ChunkMatch(chunk=base, stop=start + base_n_tokens)), new]

    def _lossy_base(self, tail: ChunkRow) -> tuple[ChunkRow | None, int]:
        """The full chunk that a tail of a lossy key space borrows from, and how much of it."""
        owner, n_tokens = tail, tail.n_tokens
        while owner.base_id is not None:
            n_tokens = min(n_tokens, owner.base_n_tokens)
            base = chunks.by_id(self._connection, owner.base_id)
            if base is None:
                break
            if self._is_lossy(base):
                return base, n_tokens
            owner = base
        return _NO_BASE

    def _is_lossy(self, chunk: ChunkRow) -> bool:
        """Whether its own blobs went through a lossy codec."""
        return bool(self._request.codec_text) and chunk.n_tokens == self._request.chunk_n_tokens

    def _siblings(self, parent_key: Key, ids: TokenIds, start: int) -> list[tuple[ChunkRow, int]]:
        """The chunks under the parent that share a start with ``ids``, and how much of it."""
        with suppress(CorruptStoreError):  # nothing is borrowed from, or near, a damaged row
            lineage = self._request.lineage
            return list(siblings(self._connection, parent_key, ids, lineage, start=start))
        return []

    def _has_gone(self, base: ChunkRow, stop: int, *, but_thinned: bool = False) -> bool:
        """Whether ``base`` has, before ``stop``, what a ring or state of the cache lost since.

        With ``but_thinned``, what a growing session thins out anyway does not count.
        """
        if self._layout.is_full:
            return False
        return any(
            subtract([(row.start, min(row.stop, piece.stop))], self._resident[row.tensor])
            for piece in pieces(self._connection, ChunkMatch(chunk=base, stop=stop))
            for row in blobs.of_chunk(self._connection, piece.owner.id)
            if row.start < piece.stop
            and not (but_thinned and kind_of(self._layout.tensors[row.tensor]).is_thinned)
        )

    def _fill_ins(self, match: ChunkMatch) -> list[Write]:
        """What existing chunks lack of rings and checkpoints that the cache still has."""
        if self._layout.is_full:
            return []  # a full tensor's blobs were written with their chunk
        found: list[Write] = []
        for piece in pieces(self._connection, match):
            wanted = self._parts(piece.start, piece.stop, but_whole=True)
            if not wanted:
                continue
            stored: dict[int, list[Range]] = {}
            for row in blobs.of_chunk(self._connection, piece.owner.id):
                stored.setdefault(row.tensor, []).append((row.start, row.stop))
            lacking = tuple(
                Part(tensor=part.tensor, start=start, stop=stop)
                for part in wanted
                for start, stop in subtract([(part.start, part.stop)], stored.get(part.tensor, []))
            )
            if lacking:
                found.append(FillIn(chunk=piece.owner, parts=lacking))
        return found

    def _parts(self, start: int, stop: int, *, but_whole: bool = False) -> tuple[Part, ...]:
        """The blobs that the live cache can give for ``[start, stop)``."""
        if start >= stop:
            return ()
        return tuple(
            Part(tensor=tensor, start=first, stop=last)
            for tensor, spec in enumerate(self._layout.tensors)
            if not (but_whole and kind_of(spec).is_whole)
            for first, last in clip(self._resident[tensor], start, stop)
        )

    def _is_mine(self, chunk: ChunkRow) -> bool:
        """Whether nothing but the session that is being saved needs this tail."""
        session_id = None
        if self._request.name is not None:
            session_id = sessions.id_of(
                self._connection, namespace=self._request.namespace, name=self._request.name
            )
        return not chunks.is_needed(self._connection, chunk.id, but_session_id=session_id)


def _by_n_shared(one: tuple[ChunkRow | None, int]) -> int:
    return one[1]


def lacking_parts(
    stored: Sequence[tuple[int, int, int]], parts: Sequence[Part]
) -> tuple[Part, ...]:
    """The parts that do not overlap any stored ``(tensor, start, stop)``."""
    return tuple(
        part
        for part in parts
        if not any(
            tensor == part.tensor and start < part.stop and part.start < stop
            for tensor, start, stop in stored
        )
    )
