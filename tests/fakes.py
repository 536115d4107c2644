"""Live caches over plain memory: the same protocol as the ExecuTorch cache, no runtime."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore import Edit, Fingerprint, Held, Kind, Layout, Lineage, TensorSpec, TokenLog
from kvstore.lossy import unmarked


def digest(text: str) -> bytes:
    """32 bytes that stand for the content ``text``."""
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def layout(
    *,
    n_layers: int = 2,
    capacity_n_tokens: int = 128,
    n_kv_heads: int = 2,
    head_dim: int = 4,
    dtype: str = "float32",
    head_major: bool = False,
) -> Layout:
    """K and V of ``n_layers`` layers: ``[1, S, H_kv, D]``, or ``[1, H_kv, S, D]`` if head-major."""
    heads_and_tokens = (capacity_n_tokens, n_kv_heads)
    shape = (1, *(heads_and_tokens[::-1] if head_major else heads_and_tokens), head_dim)
    return Layout(
        tensors=tuple(
            TensorSpec(
                name=f"layers.{layer}.attention.kv_cache.{role}_cache",
                role=role,
                layer=layer,
                kind=Kind.FULL,
                dtype=dtype,
                shape=shape,
                token_axis=2 if head_major else 1,
            )
            for layer in range(n_layers)
            for role in ("k", "v")
        )
    )


def ring_tensors(
    *,
    layer: int,
    window_n_tokens: int,
    sink_n_tokens: int = 0,
    ring_n_slots: int | None = None,
    head_major: bool = False,
) -> tuple[TensorSpec, ...]:
    """K, V and slot positions of one ring layer; the ring has twice the window, as ExecuTorch's."""
    n_slots = sink_n_tokens + (ring_n_slots or 2 * window_n_tokens)
    shape = (1, 2, n_slots, 4) if head_major else (1, n_slots, 2, 4)
    ring = {
        "layer": layer,
        "window_n_tokens": window_n_tokens,
        "sink_n_tokens": sink_n_tokens,
    }
    return (
        *(
            TensorSpec(
                name=f"layers.{layer}.attention.kv_cache.{role}_cache",
                role=role,
                kind=Kind.WINDOW,
                dtype="float32",
                shape=shape,
                token_axis=2 if head_major else 1,
                **ring,
            )
            for role in ("k", "v")
        ),
        TensorSpec(
            name=f"layers.{layer}.attention.kv_cache.cache_positions",
            role="positions",
            kind=Kind.POSITIONS,
            dtype="int64",
            shape=(n_slots,),
            token_axis=0,
            **ring,
        ),
    )


def checkpoint_tensors(*, layer: int) -> tuple[TensorSpec, ...]:
    """The two states of one recurrent layer."""
    return tuple(
        TensorSpec(
            name=f"layers.{layer}.attention.{role}",
            role=role,
            layer=layer,
            kind=Kind.CHECKPOINT,
            dtype="float32",
            shape=(1, 6, 5),
            token_axis=None,
        )
        for role in ("conv_state", "recurrent_state")
    )


def logits_tensor() -> TensorSpec:
    """The last token's logits, as recurrent programs keep them."""
    return TensorSpec(
        name="logits",
        role="logits",
        layer=0,
        kind=Kind.CHECKPOINT,
        dtype="float32",
        shape=(7,),
        token_axis=None,
    )


class BytesCache:
    """A ``LiveCache`` over bytearrays, with a model that any test can compute by hand.

    The content of a slot is a function of the weights, the tensor and all
    tokens up to it, as in a real transformer; so a wrong restore shows. It
    computes slot by slot and knows nothing of ``kvstore.kinds``.
    """

    def __init__(self, cache_layout: Layout | None = None, *, weights: str = "weights") -> None:
        self.layout = cache_layout or layout()
        self.fingerprint = Fingerprint(
            weights=digest(weights), program=digest("program"), layout=self.layout.digest
        )
        self.memory = [bytearray(spec.nbytes) for spec in self.layout.tensors]
        self._log = TokenLog(self.layout)
        self._reset()

    @property
    def tokens(self) -> Sequence[int]:
        return self._log.tokens

    @property
    def held(self) -> Held:
        return self._log.held

    @property
    def edits(self) -> Lineage:
        return self._log.edits

    @property
    def capacity_n_tokens(self) -> int:
        return self.layout.capacity_n_tokens

    def buffer(self, index: int) -> memoryview:
        return memoryview(self.memory[index])

    def truncate(self, n_tokens: int) -> None:
        self._log.truncate(n_tokens)
        if n_tokens == 0:
            self._reset()

    def adopt(self, tokens: Sequence[int], edits: Lineage = ()) -> None:
        self._log.adopt(tokens, edits)

    def edit(self, start: int, what: str) -> None:
        """From ``start`` on, the content is what ``what`` says and not what the model computes."""
        self._log.edit(Edit(start, digest(what)))
        n_tokens = len(self.tokens)
        for index, spec in enumerate(self.layout.tensors):
            if spec.kind is Kind.CHECKPOINT:
                self.memory[index][:] = self.truth(index, n_tokens - 1)
            elif spec.kind is not Kind.POSITIONS:
                for position in range(start, n_tokens):  # the last one in a slot stays
                    slot = naive_slot(spec, position)
                    write_slot(spec, self.memory[index], slot, self.truth(index, position))

    def compute(self, tokens: Sequence[int]) -> None:
        """What ``forward`` does: append ``tokens`` and fill their slots."""
        for token in tokens:
            self._log.extend([token])
            position = len(self.tokens) - 1
            for index, spec in enumerate(self.layout.tensors):
                if spec.kind is Kind.POSITIONS:
                    slot = naive_slot(spec, position)
                    self.memory[index][8 * slot : 8 * slot + 8] = array("q", [position]).tobytes()
                elif spec.kind is Kind.CHECKPOINT:
                    self.memory[index][:] = self.truth(index, position)
                else:
                    slot = naive_slot(spec, position)
                    write_slot(spec, self.memory[index], slot, self.truth(index, position))

    def truth(self, index: int, position: int) -> bytes:
        """What tensor ``index`` holds of (or after) the token at ``position``."""
        prefix = array("Q", self.tokens[: position + 1]).tobytes()
        for edit in self.edits:
            if edit.start <= position:
                prefix += edit.start.to_bytes(8, "little") + edit.digest
        state = hashlib.blake2b(self.fingerprint.weights + prefix).digest()
        spec = self.layout.tensors[index]
        return hashlib.shake_128(state + bytes([index])).digest(spec.slot_nbytes)

    def wrong(self) -> list[str]:
        """Everything that the next step would read and that is not what it must be."""
        n_tokens = len(self.tokens)
        found = []
        for index, spec in enumerate(self.layout.tensors):
            if spec.kind is Kind.POSITIONS:
                found += self._wrong_positions(index)
                continue
            if spec.kind is Kind.CHECKPOINT:
                wanted = bytes(spec.nbytes) if not n_tokens else self.truth(index, n_tokens - 1)
                if self.memory[index] != wanted:
                    found.append(f"{spec.name} after {n_tokens}")
                continue
            for position in range(n_tokens):
                if naive_is_visible(spec, position, query=n_tokens):
                    slot = naive_slot(spec, position)
                    if read_slot(spec, self.memory[index], slot) != self.truth(index, position):
                        found.append(f"{spec.name} at {position}")
        return found

    def used(self) -> list[list[bytes]]:
        """The bytes of every used slot of every full tensor, token by token."""
        return [
            [read_slot(spec, memory, slot) for slot in range(len(self.tokens))]
            for spec, memory in zip(self.layout.tensors, self.memory, strict=True)
            if spec.kind is Kind.FULL
        ]

    def _wrong_positions(self, index: int) -> list[str]:
        spec = self.layout.tensors[index]
        held = array("q", bytes(self.memory[index]))
        n_tokens = len(self.tokens)
        found = []
        for position in range(n_tokens):
            is_visible = naive_is_visible(spec, position, query=n_tokens)
            if is_visible and held[naive_slot(spec, position)] != position:
                found.append(f"{spec.name}: {position} is not in its slot")
        return found

    def _reset(self) -> None:
        """As a freshly loaded program: states are zero, everything else may be anything."""
        for index, spec in enumerate(self.layout.tensors):
            if spec.kind is Kind.CHECKPOINT:
                self.memory[index][:] = bytes(spec.nbytes)
            elif spec.kind is Kind.POSITIONS:
                self.memory[index][:] = array("q", [-1] * spec.shape[0]).tobytes()
            else:
                self.memory[index][:] = b"\xee" * spec.nbytes


class SmoothCache(BytesCache):
    """Float32 numbers of few degrees of freedom, as real keys and values have; fast to compute.

    Token and position decide them alone, and edits by where they begin.
    """

    def compute(self, tokens: Sequence[int]) -> None:
        start = len(self.tokens)
        self._log.extend(tokens)
        for index, spec in enumerate(self.layout.tensors):
            positions = range(start, len(self.tokens))
            if spec.kind is Kind.POSITIONS:
                held = array("q", bytes(self.memory[index]))
                for position in positions:
                    held[naive_slot(spec, position)] = position
                self.memory[index][:] = held.tobytes()
                continue
            rows = self._rows(index, positions)
            slots = [naive_slot(spec, position) for position in positions]
            runs = [(first, at, last - first) for first, last, at in _runs(spec, 0)]
            memory = np.frombuffer(self.memory[index], np.uint8)
            for first, at, nbytes in runs:
                n_slots = spec.capacity_n_tokens
                room = memory[first : first + n_slots * nbytes].reshape(n_slots, nbytes)
                room[slots] = rows[:, at : at + nbytes]

    def truth(self, index: int, position: int) -> bytes:
        return self._rows(index, range(position, position + 1)).tobytes()

    def _rows(self, index: int, positions: range) -> npt.NDArray[np.uint8]:
        """Bytes of the slots of these positions, ``[n, slot_nbytes]``."""
        n_channels = self.layout.tensors[index].slot_nbytes // 4
        at = np.array(positions, np.float64)[:, None]
        tokens = np.array([self.tokens[position] % 1009 for position in positions])[:, None]
        for edit in unmarked(self.edits):
            tokens = tokens + (at >= edit.start) * (1 + edit.start)
        few = np.arange(1, 7)
        latent = np.sin(tokens * np.sqrt(few + index) + at * few * 0.01) / few
        channels = np.arange(n_channels)
        mixed = latent @ np.cos(np.outer(few * 1.7, channels + 1) + index) * 3 + np.sin(channels)
        noise = np.sin(tokens * 12.9898 + at * 78.233 + channels * 37.719) * 43758.5453 % 1
        return (mixed + 0.01 * noise).astype("<f4").view(np.uint8)


def naive_slot(spec: TensorSpec, position: int) -> int:
    """Where ExecuTorch puts a position: see ``CachePositionsManagerWithSink``."""
    if spec.kind is Kind.FULL or position < spec.sink_n_tokens:
        return position
    ring_n_slots = spec.capacity_n_tokens - spec.sink_n_tokens
    return spec.sink_n_tokens + (position - spec.sink_n_tokens) % ring_n_slots


def naive_is_visible(spec: TensorSpec, position: int, *, query: int) -> bool:
    """Whether a query sees a position: see ``_create_causal_mask_for_attention_sink``."""
    if spec.kind is Kind.FULL:
        return position < query
    delta = query - position
    return delta > 0 and (position < spec.sink_n_tokens or delta < spec.window_n_tokens)


def write_slot(spec: TensorSpec, memory: bytearray, slot: int, data: bytes) -> None:
    """Put one token's bytes in place, one run at a time."""
    for start, stop, run in _runs(spec, slot):
        memory[start:stop] = data[run : run + stop - start]


def read_slot(spec: TensorSpec, memory: bytearray, slot: int) -> bytes:
    """One token's bytes, token-major."""
    return b"".join(bytes(memory[start:stop]) for start, stop, _ in _runs(spec, slot))


def _runs(spec: TensorSpec, slot: int) -> list[tuple[int, int, int]]:
    """Where slot ``slot`` lies: ``(start, stop)`` in memory and the offset in its own bytes."""
    axis = spec.token_axis or 0
    outer, inner = 1, spec.itemsize_nbytes
    for size in spec.shape[:axis]:
        outer *= size
    for size in spec.shape[axis + 1 :]:
        inner *= size
    capacity = spec.capacity_n_tokens
    return [
        (
            (number * capacity + slot) * inner,
            (number * capacity + slot + 1) * inner,
            number * inner,
        )
        for number in range(outer)
    ]
