"""Snapshots: copies of the parts of a cache that a later save needs, and nothing else of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore.errors import StoreBusyError
from kvstore.kinds import Held
from kvstore.layout import Fingerprint, Layout
from kvstore.lineage import Lineage, n_common_tokens
from kvstore.match import blob_raw_nbytes
from kvstore.ranges import Range, subtract
from kvstore.save_plan import CopyPlan, Part, SaveRequest
from kvstore.source import LiveSource
from kvstore.tokens import TokenIds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Copied:
    """Positions ``[start, stop)`` of one tensor, token-major.

    ``data`` is all of ``memory``, or a part of it: several snapshots may share one.
    """

    tensor: int
    start: int
    stop: int
    data: memoryview
    memory: memoryview


class Snapshot:
    """A cache as it was, as far as a save needs it (a ``Source``).

    Never changes, until it is cleared.
    """

    def __init__(
        self,
        *,
        fingerprint: Fingerprint,
        layout: Layout,
        held: Held,
        ids: TokenIds,
        lineage: Lineage,
        copies: Iterable[Copied],
    ) -> None:
        self._fingerprint = fingerprint
        self._layout = layout
        self._held = held
        self._ids = ids
        self._lineage = lineage
        self._copies = sorted(copies, key=_place)

    @property
    def fingerprint(self) -> Fingerprint:
        """Which model it belongs to."""
        return self._fingerprint

    @property
    def layout(self) -> Layout:
        """The tensors."""
        return self._layout

    @property
    def held(self) -> Held:
        """How the cache came to hold what it held."""
        return self._held

    @property
    def copies(self) -> Sequence[Copied]:
        """What was copied, by tensor and position."""
        return self._copies

    def clear(self) -> None:
        """Let go of the copies; nothing can be read any more."""
        self._copies = []

    def read(self, tensor: int, start: int, stop: int) -> memoryview:
        """The bytes of positions ``[start, stop)``, token-major.

        Raises:
            StoreBusyError: they were not copied, since the file had them.
        """
        found: list[memoryview] = []
        position = start
        for one in self._copies:
            if one.tensor == tensor and one.start <= position < one.stop:
                row_nbytes = one.data.nbytes // (one.stop - one.start)
                end = min(one.stop, stop)
                found.append(
                    one.data[(position - one.start) * row_nbytes : (end - one.start) * row_nbytes]
                )
                position = end
            if position == stop:
                break
        if position < stop:
            raise StoreBusyError(
                f"expected tokens [{start}, {stop}) of {self._layout.tensors[tensor].name} in the "
                "file, as when this save was begun, but they were deleted meanwhile; save again"
            )
        return found[0] if len(found) == 1 else memoryview(b"".join(found))

    def n_common_tokens(self, request: SaveRequest) -> int:
        """How many tokens ``request`` begins with of the same model and content.

        Equal tokens of equal lineage have equal content, as everywhere in a store: who
        was first wins.
        """
        if request.cache.fingerprint != self._fingerprint:
            return 0
        return n_common_tokens(self._ids, self._lineage, request.ids, request.lineage)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotPlan:
    """What a new snapshot takes over from others, and what it has to copy."""

    shared: tuple[Copied, ...]
    parts: tuple[Part, ...]
    nbytes: int


def plan_snapshot(
    request: SaveRequest, wanted: CopyPlan, others: Sequence[Snapshot]
) -> SnapshotPlan:
    """How to come by the ``wanted`` parts with the least copying; ``others`` come in order."""
    missing: dict[int, list[Range]] = {}
    for part in wanted.parts:
        missing.setdefault(part.tensor, []).append((part.start, part.stop))
    shared: list[Copied] = []
    for other in reversed(others):  # the last one shares what it can of those before it
        n_tokens = other.n_common_tokens(request)
        if not any(start < n_tokens for ranges in missing.values() for start, _ in ranges):
            continue
        for one in other.copies:
            if one.start >= n_tokens:
                continue
            before = missing.get(one.tensor, [])
            after = subtract(before, [(one.start, min(one.stop, n_tokens))])
            if after != before:
                shared.append(_up_to(one, n_tokens))
                missing[one.tensor] = after
    parts = tuple(
        Part(tensor=tensor, start=start, stop=stop)
        for tensor, ranges in missing.items()
        for start, stop in ranges
    )
    tensors = request.cache.layout.tensors
    nbytes = sum(blob_raw_nbytes(tensors[part.tensor], part.start, part.stop) for part in parts)
    return SnapshotPlan(shared=tuple(shared), parts=parts, nbytes=nbytes)


def take(request: SaveRequest, cache: LiveSource, plan: SnapshotPlan) -> Snapshot:
    """Copy what ``plan`` says; from now on the cache may go on without it."""
    copies = list(plan.shared)
    for part in plan.parts:
        data = cache.copy(part.tensor, part.start, part.stop)
        copies.append(
            Copied(tensor=part.tensor, start=part.start, stop=part.stop, data=data, memory=data)
        )
    return Snapshot(
        fingerprint=cache.fingerprint,
        layout=cache.layout,
        held=cache.held,
        ids=request.ids,
        lineage=request.lineage,
        copies=copies,
    )


def _up_to(one: Copied, n_tokens: int) -> Copied:
    """What of a copy lies before position ``n_tokens``."""
    if one.stop <= n_tokens:
        return one
    row_nbytes = one.data.nbytes // (one.stop - one.start)
    return Copied(
        tensor=one.tensor,
        start=one.start,
        stop=n_tokens,
        data=one.data[: (n_tokens - one.start) * row_nbytes],
        memory=one.memory,
    )


def _place(one: Copied) -> tuple[int, int]:
    return one.tensor, one.start
