"""Planning what bases a save encodes with, and which it has to learn first. Only reads and decides.

A basis is learned once for each tensor of a key space, from content that went through no lossy
codec: from the first tokens that the cache holds, whether they are stored already or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import sqlalchemy as sa

from kvstore.codec import MAX_TRAINING_N_TOKENS, MIN_TRAINING_N_TOKENS, Basis, needs_basis
from kvstore.db import bases, models
from kvstore.db.basis_cache import BasisCache
from kvstore.db.engine import driver_connection
from kvstore.db.models import SpaceRow
from kvstore.errors import CorruptStoreError
from kvstore.kinds import kind_of
from kvstore.ranges import Range, clip, union
from kvstore.save_plan import CopyPlan, Part, SaveRequest, Write


@dataclass(frozen=True, slots=True, kw_only=True)
class BasesPlan:
    """What bases there are for the tensors that a save needs them for, and what is to be learned.

    ``known`` are those in the file, by tensor; ``lessons`` the positions that each other one is
    learned from. Those of ``damaged`` tensors are in the file and cannot be read.
    """

    known: dict[int, Basis] = field(default_factory=dict)
    lessons: tuple[Part, ...] = ()
    damaged: frozenset[int] = frozenset()


def plan_bases(
    connection: sa.Connection,
    request: SaveRequest,
    writes: Sequence[Write],
    cache: BasisCache,
) -> BasesPlan:
    """The bases for what ``writes`` is going to encode."""
    is_needed = any(
        write.n_tokens == request.chunk_n_tokens and _needs(request, part.tensor)
        for write in writes
        for part in write.parts
    )
    if not is_needed:
        return BasesPlan()
    known, damaged = _known(connection, request, cache)
    lessons = _lessons(request, known, cache)
    return BasesPlan(known=known, lessons=lessons, damaged=damaged)


def with_lessons(
    connection: sa.Connection, request: SaveRequest, wanted: CopyPlan, cache: BasisCache
) -> CopyPlan:
    """``wanted``, and what a save that happens later is going to learn from."""
    size = request.chunk_n_tokens
    is_needed = any(
        part.stop // size * size > part.start and _needs(request, part.tensor)
        for part in wanted.parts
    )
    if not is_needed:
        return wanted
    known, _ = _known(connection, request, cache)
    found: dict[int, list[Range]] = {}
    for part in (*wanted.parts, *_lessons(request, known, cache)):
        found.setdefault(part.tensor, []).append((part.start, part.stop))
    parts = tuple(
        Part(tensor=tensor, start=start, stop=stop)
        for tensor, ranges in sorted(found.items())
        for start, stop in union(ranges)
    )
    return replace(wanted, parts=parts)


def _known(
    connection: sa.Connection, request: SaveRequest, cache: BasisCache
) -> tuple[dict[int, Basis], frozenset[int]]:
    """The bases in the file that a save may need, by tensor, and the tensors of damaged ones."""
    known: dict[int, Basis] = {}
    damaged = set()
    space = _space(connection, request)
    if space is not None:
        driver, of_space = driver_connection(connection), cache.of_space(space.id)
        for tensor, row in bases.of_space(connection, space.id).items():
            if not (0 <= tensor < len(request.codec_names) and _needs(request, tensor)):
                continue
            spec = request.cache.layout.tensors[tensor]
            try:
                known[tensor] = of_space.lookup(driver, tensor, spec)(row.digest)
            except CorruptStoreError:
                damaged.add(tensor)
    return known, frozenset(damaged)


def _lessons(request: SaveRequest, known: Iterable[int], cache: BasisCache) -> tuple[Part, ...]:
    """For each tensor that needs a basis and has none: what it is learned from, if that is enough.

    Of a ring that is what it still holds.
    """
    n_tokens, root = request.n_unmarked_tokens, request.root
    lessons = []
    for tensor, spec in enumerate(request.cache.layout.tensors):
        is_futile = (root, tensor) in cache.futile
        if tensor in known or is_futile or not _needs(request, tensor):
            continue
        resident = clip(kind_of(spec).resident(spec, request.cache.held), 0, n_tokens)
        start, stop = max(resident, key=_n_positions, default=(0, 0))
        if stop - start >= MIN_TRAINING_N_TOKENS:
            stop = min(stop, start + MAX_TRAINING_N_TOKENS)
            lessons.append(Part(tensor=tensor, start=start, stop=stop))
    return tuple(lessons)


def _needs(request: SaveRequest, tensor: int) -> bool:
    """Whether the tensor's codec needs a basis."""
    return needs_basis(request.codec_names[tensor])


def _space(connection: sa.Connection, request: SaveRequest) -> SpaceRow | None:
    return models.find_space(
        connection,
        request.cache.fingerprint,
        chunk_n_tokens=request.chunk_n_tokens,
        namespace=request.namespace,
        adapter=request.adapter,
    )


def _n_positions(one: Range) -> int:
    return one[1] - one[0]
