"""The naive side of the tests of kinds: layouts, a cache that traces its slots, a perfect store.

Everything here works token by token and knows nothing of ``kvstore.kinds``.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from kvstore import Kind, Layout, Lineage, LiveCache, MissReason, TensorSpec
from tests.fakes import (
    BytesCache,
    checkpoint_tensors,
    layout,
    logits_tensor,
    naive_is_visible,
    naive_slot,
    read_slot,
    ring_tensors,
)
from tests.oracle import raw

Row: TypeAlias = tuple[int, bytes]
"""A tensor and the token prefix (8 bytes an id) whose last token's content was stored."""


# --------------------------------------------------------------------- layouts


def full_tensor(
    role: str,
    *,
    layer: int,
    dtype: str = "float32",
    shape: tuple[int, ...] = (1, 128, 2, 4),
    token_axis: int = 1,
) -> TensorSpec:
    """One full tensor."""
    return TensorSpec(
        name=f"layers.{layer}.attention.kv_cache.{role}",
        role=role,
        layer=layer,
        kind=Kind.FULL,
        dtype=dtype,
        shape=shape,
        token_axis=token_axis,
    )


def ring_tensor(
    role: str,
    *,
    layer: int,
    window_n_tokens: int,
    shape: tuple[int, ...],
    dtype: str = "float32",
    sink_n_tokens: int = 0,
    token_axis: int = 1,
) -> TensorSpec:
    """One tensor of a ring."""
    return TensorSpec(
        name=f"layers.{layer}.attention.kv_cache.{role}",
        role=role,
        layer=layer,
        kind=Kind.WINDOW,
        dtype=dtype,
        shape=shape,
        token_axis=token_axis,
        window_n_tokens=window_n_tokens,
        sink_n_tokens=sink_n_tokens,
    )


def _quantized_ring(layer: int, *, window_n_tokens: int, sink_n_tokens: int = 0):
    """Int8 K and V with a scale and a zero point a token and head, and the positions."""
    n_slots = sink_n_tokens + 2 * window_n_tokens
    ring = {
        "layer": layer,
        "window_n_tokens": window_n_tokens,
        "sink_n_tokens": sink_n_tokens,
    }
    positions = ring_tensors(**ring)[-1]
    return (
        *(
            ring_tensor(role, dtype=dtype, shape=(1, n_slots, 2, width), **ring)
            for role, dtype, width in _QUANTIZED
        ),
        positions,
    )


_QUANTIZED = (
    ("k", "int8", 8),
    ("k_scale", "float32", 1),
    ("k_zero_point", "int8", 1),
    ("v", "int8", 8),
    ("v_scale", "float32", 1),
    ("v_zero_point", "int8", 1),
)

_FULL = layout(n_layers=1).tensors


def _of(*tensors: TensorSpec) -> Layout:
    return Layout(tensors=tensors)


LAYOUTS: dict[str, Layout] = {
    "full": _of(*_FULL),
    "ring": _of(*_FULL, *ring_tensors(layer=1, window_n_tokens=8)),
    "ring_head_major": _of(
        *layout(n_layers=1, head_major=True).tensors,
        *ring_tensors(layer=1, window_n_tokens=8, head_major=True),
    ),
    "ring_only": _of(*ring_tensors(layer=0, window_n_tokens=5)),
    "ring_as_long_as_its_window": _of(
        *_FULL, *ring_tensors(layer=1, window_n_tokens=6, ring_n_slots=6)
    ),
    "ring_before_full": _of(
        *ring_tensors(layer=0, window_n_tokens=7), full_tensor("k", layer=1, shape=(1, 96, 1, 8))
    ),
    "sink": _of(*ring_tensors(layer=0, window_n_tokens=8, sink_n_tokens=3)),
    "sink_head_major": _of(
        *_FULL, *ring_tensors(layer=1, window_n_tokens=4, sink_n_tokens=2, head_major=True)
    ),
    "two_rings": _of(
        *_FULL,
        *ring_tensors(layer=1, window_n_tokens=8),
        *ring_tensors(layer=2, window_n_tokens=20),
    ),
    "recurrent": _of(*_FULL, *checkpoint_tensors(layer=1), logits_tensor()),
    "recurrent_only": _of(*checkpoint_tensors(layer=0), logits_tensor()),
    "recurrent_without_logits": _of(*_FULL, *checkpoint_tensors(layer=1)),
    "mixed": _of(
        *_FULL,
        *ring_tensors(layer=1, window_n_tokens=8, sink_n_tokens=2),
        *checkpoint_tensors(layer=2),
        logits_tensor(),
    ),
    "quantized": _of(
        *(
            full_tensor(role, layer=0, dtype=dtype, shape=(1, 128, 2, width))
            for role, dtype, width in _QUANTIZED
        )
    ),
    "quantized_ring": _of(*_FULL, *_quantized_ring(1, window_n_tokens=8)),
    "quantized_sink": _of(*_quantized_ring(0, window_n_tokens=6, sink_n_tokens=4)),
    "k_and_v_of_different_head_dim": _of(
        full_tensor("k", layer=0, dtype="bfloat16", shape=(1, 128, 1, 12)),
        full_tensor("v", layer=0, dtype="bfloat16", shape=(1, 128, 1, 7)),
        ring_tensor("k", layer=1, window_n_tokens=8, shape=(1, 3, 16, 12), token_axis=2),
        ring_tensor("v", layer=1, window_n_tokens=8, shape=(1, 16, 3, 7)),
    ),
    "layers_of_different_shapes": _of(
        full_tensor("k", layer=0, dtype="float16", shape=(1, 100, 4, 4)),
        full_tensor("v", layer=0, dtype="float16", shape=(1, 4, 120, 4), token_axis=2),
        full_tensor("k", layer=1, dtype="float32", shape=(1, 110, 1, 6)),
        full_tensor("v", layer=1, dtype="float64", shape=(104, 3), token_axis=0),
    ),
}
"""One layout a kind of cache that ExecuTorch exports, and their mixtures."""

RINGS = [name for name, one in LAYOUTS.items() if any(t.kind is Kind.WINDOW for t in one.tensors)]
RECURRENT = [
    name for name, one in LAYOUTS.items() if any(t.kind is Kind.CHECKPOINT for t in one.tensors)
]


# ----------------------------------------------------------------- live caches


class TracedCache(BytesCache):
    """A fake that also traces, slot by slot, which position every ring slot holds."""

    def __init__(self, cache_layout: Layout, *, weights: str = "weights") -> None:
        self.position_in_slot: list[dict[int, int]] = [{} for _ in cache_layout.tensors]
        super().__init__(cache_layout, weights=weights)

    def compute(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            position = len(self.tokens)
            super().compute([token])
            for held, spec in zip(self.position_in_slot, self.layout.tensors, strict=True):
                held[naive_slot(spec, position)] = position

    def adopt(self, tokens: Sequence[int], edits: Lineage = ()) -> None:
        super().adopt(tokens, edits)
        for held, spec in zip(self.position_in_slot, self.layout.tensors, strict=True):
            held.clear()
            for position in range(len(tokens)):
                if naive_is_visible(spec, position, query=len(tokens)):
                    held[naive_slot(spec, position)] = position

    def truncate(self, n_tokens: int) -> None:
        super().truncate(n_tokens)
        if not n_tokens:
            for held in self.position_in_slot:
                held.clear()

    def resident(self, index: int) -> set[int]:
        """The positions that a save may read of tensor ``index``."""
        spec, n_tokens = self.layout.tensors[index], len(self.tokens)
        if spec.kind is Kind.POSITIONS:
            return set()
        if spec.kind is Kind.CHECKPOINT:
            return {n_tokens - 1} if n_tokens else set()
        held = self.position_in_slot[index]
        return {p for p in range(n_tokens) if held.get(naive_slot(spec, p)) == p}

    def can_truncate(self, n_tokens: int) -> bool:
        """Whether everything that the next step would read is still there."""
        for index, spec in enumerate(self.layout.tensors):
            if spec.kind is Kind.CHECKPOINT:
                if n_tokens not in (0, len(self.tokens)):
                    return False
            elif needed(spec, n_tokens) - self.resident(index):
                return False
        return True


def needed(spec: TensorSpec, n_tokens: int) -> set[int]:
    """The positions that must have been stored for a restore of ``n_tokens``."""
    if spec.kind is Kind.POSITIONS:
        return set()
    if spec.kind is Kind.CHECKPOINT:
        return {n_tokens - 1} if n_tokens else set()
    return {p for p in range(n_tokens) if naive_is_visible(spec, p, query=n_tokens)}


def readable(cache: LiveCache) -> dict[tuple[str, int], bytes]:
    """Everything in any live cache that its next step can read, by tensor and position."""
    n_tokens = len(cache.tokens)
    found: dict[tuple[str, int], bytes] = {}
    for index, spec in enumerate(cache.layout.tensors):
        memory = bytearray(cache.buffer(index))
        if spec.kind is Kind.CHECKPOINT:
            found[spec.name, n_tokens] = bytes(memory)
            continue
        for position in range(n_tokens):
            if naive_is_visible(spec, position, query=n_tokens):
                slot = naive_slot(spec, position)
                found[spec.name, position] = read_slot(spec, memory, slot)
    return found


def restored(n_tokens: int, cache_layout: Layout) -> int:
    """Bytes that a restore of ``n_tokens`` into an empty cache takes, counted one by one."""
    return sum(len(needed(spec, n_tokens)) * spec.slot_nbytes for spec in cache_layout.tensors)


def full_nbytes(cache_layout: Layout, n_tokens: int) -> int:
    """Bytes of ``n_tokens`` rows of every full tensor."""
    return n_tokens * sum(s.slot_nbytes for s in cache_layout.tensors if s.kind is Kind.FULL)


def ring_nbytes(cache_layout: Layout, n_tokens: int) -> int:
    """Bytes of ``n_tokens`` rows of every ring."""
    return n_tokens * sum(s.slot_nbytes for s in cache_layout.tensors if s.kind is Kind.WINDOW)


def naive_slots_content(spec: TensorSpec, n_tokens: int) -> bytes:
    """What the positions of a ring say after a restore of ``n_tokens``, slot by slot."""
    slots = array("q", [-1] * spec.capacity_n_tokens)
    for position in range(n_tokens):
        if naive_is_visible(spec, position, query=n_tokens):
            slots[naive_slot(spec, position)] = position
    return slots.tobytes()


# --------------------------------------------------------------- a perfect store


def prefix(tokens: Iterable[int]) -> bytes:
    """Hashable form of a token sequence."""
    return array("Q", tokens).tobytes()


class PerfectStore:
    """What was saved, one set entry a token and tensor, and what a load must make of it."""

    def __init__(self, cache_layout: Layout) -> None:
        self.layout = cache_layout
        self.rows: set[Row] = set()
        self.matched: set[bytes] = set()
        self.sessions: dict[str, list[int]] = {}
        self.has_pruned = False

    def save(self, cache: TracedCache, ids: Sequence[int], name: str | None) -> None:
        """Remember all that ``cache`` still has of ``ids``."""
        ids = list(ids)
        self.matched |= {prefix(ids[:stop]) for stop in range(1, len(ids) + 1)}
        for index in range(len(self.layout.tensors)):
            self.rows |= {
                (index, prefix(ids[: position + 1]))
                for position in cache.resident(index)
                if position < len(ids)
            }
        if name is not None:
            self.sessions[name] = ids

    def servable(self, ids: Sequence[int]) -> int:
        """The longest prefix of ``ids`` of which everything needed is stored; naive."""
        return self._longest(ids, live=set())

    def expected(
        self, cache: TracedCache, ids: Sequence[int]
    ) -> tuple[int, set[MissReason | None]]:
        """How many tokens a load of ``ids`` must leave in ``cache``, and the possible reasons."""
        ids = list(ids)
        limit = self.limit_n_tokens(ids)
        kept = self.kept_n_tokens(cache, ids)
        live: set[Row] = set()
        for index, spec in enumerate(self.layout.tensors):
            if spec.kind is Kind.CHECKPOINT and kept != len(cache.tokens):
                continue
            live |= {(index, prefix(ids[: p + 1])) for p in cache.resident(index) if p < kept}
        n_tokens = max(kept, self._longest(ids, live=live))
        matched = max([kept, *(n for n in range(1, limit + 1) if prefix(ids[:n]) in self.matched)])
        return n_tokens, self._reasons(n_tokens, matched, ids)

    def limit_n_tokens(self, ids: Sequence[int]) -> int:
        """How many tokens of ``ids`` a load may restore at all."""
        with_logits = any(spec.role == "logits" for spec in self.layout.tensors)
        return min(len(ids) - (not with_logits), self.layout.capacity_n_tokens)

    def kept_n_tokens(self, cache: TracedCache, ids: Sequence[int]) -> int:
        """How many tokens can stay where they are."""
        limit = self.limit_n_tokens(ids)
        common = 0
        while common < min(limit, len(cache.tokens)) and cache.tokens[common] == ids[common]:
            common += 1
        return common if cache.can_truncate(common) else 0

    def _longest(self, ids: Sequence[int], *, live: set[Row]) -> int:
        available = self.rows | live
        for n_tokens in range(self.limit_n_tokens(ids), 0, -1):
            if all(
                (index, prefix(ids[: position + 1])) in available
                for index, spec in enumerate(self.layout.tensors)
                for position in sorted(needed(spec, n_tokens), reverse=True)
            ):
                return n_tokens
        return 0

    def _reasons(self, n_tokens: int, matched: int, ids: Sequence[int]) -> set[MissReason | None]:
        limit = self.limit_n_tokens(ids)
        if n_tokens >= min(len(ids) - 1, limit):
            return {None if n_tokens >= len(ids) - 1 else MissReason.CAPACITY}
        if n_tokens < matched:
            kinds = {spec.kind for spec in self.layout.tensors}
            possible = {
                Kind.WINDOW: MissReason.WINDOW_GONE,
                Kind.CHECKPOINT: MissReason.NO_CHECKPOINT,
            }
            return {reason for kind, reason in possible.items() if kind in kinds}
        return {MissReason.NO_MATCH, *([MissReason.EVICTED] if self.has_pruned else [])}


def stored_rows(path: Path) -> tuple[set[Row], set[bytes]]:
    """What the file says it holds, read with plain SQL: rows, and all prefixes that match."""
    with raw(path) as connection:
        chunks = {
            chunk_id: (parent_id, start, tokens)
            for chunk_id, parent_id, start, tokens in connection.execute(
                "SELECT id, parent_id, start, tokens FROM chunks"
            )
        }
        blobs = connection.execute("SELECT chunk_id, tensor, start, stop FROM blobs").fetchall()
    ids: dict[int, list[int]] = {}

    def ids_of(chunk_id: int) -> list[int]:
        if chunk_id not in ids:
            parent_id, start, tokens = chunks[chunk_id]
            before = [] if parent_id is None else ids_of(parent_id)
            assert len(before) == start
            ids[chunk_id] = [*before, *struct.unpack(f">{len(tokens) // 8}Q", tokens)]
        return ids[chunk_id]

    rows = {
        (tensor, prefix(ids_of(chunk_id)[: position + 1]))
        for chunk_id, tensor, start, stop in blobs
        for position in range(start, stop)
    }
    matched = {
        prefix(ids_of(chunk_id)[:stop])
        for chunk_id in chunks
        for stop in range(1, len(ids_of(chunk_id)) + 1)
    }
    return rows, matched
