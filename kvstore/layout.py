"""What a cache looks like: its tensors, their token axis, and the live-cache protocol.

This is the seam between ``kvstore`` (bytes, layouts, rows) and whatever holds
the live memory: an ExecuTorch method, a dict of arrays, a fake over bytearrays.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvstore.errors import InputError
from kvstore.kinds import Held, Kind
from kvstore.lineage import Lineage

DTYPE_ITEMSIZE_NBYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}
"""Element size in bytes per dtype name (the names PyTorch uses)."""

MAX_N_AXES = 16
"""Axes of a tensor (ExecuTorch's own limit)."""

MAX_TENSOR_NBYTES = 2**63 - 1
"""Bytes of a tensor, so that every size and offset fits 64 bits with a sign."""


LOGITS_ROLE = "logits"
"""A checkpoint tensor of this role holds the logits after the last token."""

UNLIMITED_N_TOKENS = 2**63 - 1
"""Capacity of a layout without any full tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One persistent tensor of a cache.

    ``shape`` is the planned shape, for example ``[1, S, H_kv, D]`` (ExecuTorch's
    custom cache, ``token_axis`` 1) or ``[1, H_kv, S, D]`` (the plain
    ``KVCache``, ``token_axis`` 2). A checkpoint has no token axis (None). Elements
    are little-endian, C-contiguous. A ring's query sees the last
    ``window_n_tokens`` positions, itself included, and the first
    ``sink_n_tokens``; both are 0 for other kinds.
    """

    name: str
    role: str
    layer: int
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    token_axis: int | None
    window_n_tokens: int = 0
    sink_n_tokens: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_ITEMSIZE_NBYTES:
            raise InputError(
                f"tensor {self.name!r}: expected a dtype among "
                f"{', '.join(DTYPE_ITEMSIZE_NBYTES)}, found {self.dtype!r}"
            )
        if not self.role.isascii() or not self.role.isidentifier():
            raise InputError(f"tensor {self.name!r}: expected a role like 'k', found {self.role!r}")
        if self.layer < 0:
            raise InputError(f"tensor {self.name!r}: expected layer 0 or more, found {self.layer}")
        if not 1 <= len(self.shape) <= MAX_N_AXES or any(size < 1 for size in self.shape):
            raise InputError(
                f"tensor {self.name!r}: expected 1 to {MAX_N_AXES} positive sizes, "
                f"found {self.shape}"
            )
        if self.nbytes > MAX_TENSOR_NBYTES:
            raise InputError(
                f"tensor {self.name!r}: expected at most {MAX_TENSOR_NBYTES} bytes, "
                f"found {self.nbytes} for {self.shape}"
            )
        rules = self.kind.rules
        if (self.token_axis is not None) != rules.has_token_axis:
            expected = "an axis" if rules.has_token_axis else "none"
            raise InputError(
                f"tensor {self.name!r}: a {self.kind} tensor with token axis {self.token_axis}; "
                f"expected {expected}"
            )
        if self.token_axis is not None and not 0 <= self.token_axis < len(self.shape):
            raise InputError(
                f"tensor {self.name!r}: token axis {self.token_axis} is not an axis of {self.shape}"
            )
        if self.token_axis is not None and self.token_axis > 0 and self.shape[0] != 1:
            raise InputError(
                f"tensor {self.name!r}: expected batch size 1, found {self.shape[0]}; "
                "export the program with batch size 1"
            )
        ring_n_slots = self.capacity_n_tokens - self.sink_n_tokens if rules.is_ring else 0
        if self.sink_n_tokens < 0 or not (
            0 < self.window_n_tokens <= ring_n_slots
            if rules.is_ring
            else self.window_n_tokens == self.sink_n_tokens == 0
        ):
            raise InputError(
                f"tensor {self.name!r}: a {self.kind} tensor of {self.capacity_n_tokens} slots "
                f"cannot have a window of {self.window_n_tokens} behind a sink of "
                f"{self.sink_n_tokens} tokens"
            )

    @property
    def itemsize_nbytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_ITEMSIZE_NBYTES[self.dtype]

    @property
    def capacity_n_tokens(self) -> int:
        """Number of token slots; 1 for a checkpoint."""
        return 1 if self.token_axis is None else self.shape[self.token_axis]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole planned tensor."""
        return math.prod(self.shape) * self.itemsize_nbytes

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one token's slot; of the whole tensor for a checkpoint."""
        return self.nbytes // self.capacity_n_tokens

    def to_manifest(self) -> dict[str, Any]:
        """The tensor as plain msgpack types, keys in ascending order.

        Only a ring has ``sink_n_tokens`` and ``window_n_tokens``.
        """
        manifest: dict[str, Any] = {
            "dtype": self.dtype,
            "kind": str(self.kind),
            "layer": self.layer,
            "name": self.name,
            "role": self.role,
            "shape": list(self.shape),
        }
        if self.window_n_tokens:
            manifest["sink_n_tokens"] = self.sink_n_tokens
        manifest["token_axis"] = self.token_axis
        if self.window_n_tokens:
            manifest["window_n_tokens"] = self.window_n_tokens
        return manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The tensors of one cache, in an order that their names do not influence."""

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        if not self.tensors:
            raise InputError("a layout needs at least one tensor, found none")
        names = [tensor.name for tensor in self.tensors]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InputError(f"tensor names must be unique, found twice: {', '.join(twice)}")

    @property
    def capacity_n_tokens(self) -> int:
        """Number of tokens that every tensor has room for; rings and checkpoints have for any."""
        full = (tensor for tensor in self.tensors if tensor.kind.rules.is_whole)
        return min((tensor.capacity_n_tokens for tensor in full), default=UNLIMITED_N_TOKENS)

    @property
    def is_full(self) -> bool:
        """Whether any token range can be cut out of every tensor."""
        return all(tensor.kind.rules.is_whole for tensor in self.tensors)

    @property
    def has_logits(self) -> bool:
        """Whether the logits after the last token are one of the tensors."""
        return any(
            tensor.role == LOGITS_ROLE and tensor.token_axis is None for tensor in self.tensors
        )

    @property
    def token_nbytes(self) -> int:
        """Bytes that one token takes over all tensors that have token slots."""
        return sum(
            tensor.slot_nbytes for tensor in self.tensors if tensor.kind.rules.has_token_content
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all planned tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def digest(self) -> bytes:
        """BLAKE2b-256 over everything but the names (a name is not identity).

        The text hashed is one ASCII line a tensor, for example
        ``k 0 full float32 [1,4096,2,64] 1`` and a line feed; a ring's line goes on
        with its window and sink, as in ``k 1 window float32 [1,256,2,64] 1 128 4``; a
        checkpoint's ends in ``-`` for the token axis that it does not have.
        """
        lines = "".join(f"{_digest_line(tensor)}\n" for tensor in self.tensors)
        return hashlib.blake2b(
            lines.encode("ascii"), digest_size=32, person=b"kvstore/layout"
        ).digest()


def _digest_line(tensor: TensorSpec) -> str:
    parts = [
        tensor.role,
        str(tensor.layer),
        str(tensor.kind),
        tensor.dtype,
        f"[{','.join(map(str, tensor.shape))}]",
        "-" if tensor.token_axis is None else str(tensor.token_axis),
    ]
    if tensor.window_n_tokens:
        parts += [str(tensor.window_n_tokens), str(tensor.sink_n_tokens)]
    return " ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Which model a cache belongs to: three digests of 32 bytes, and one over them.

    They are kept apart so that a miss can say which of them differs.
    """

    weights: bytes
    program: bytes
    layout: bytes

    def __post_init__(self) -> None:
        for field in ("weights", "program", "layout"):
            digest = getattr(self, field)
            if not isinstance(digest, bytes) or len(digest) != 32:
                raise InputError(f"fingerprint: expected 32 bytes for {field}, found {digest!r}")

    @property
    def model(self) -> bytes:
        """BLAKE2b-256 over weights, program and layout digests, in that order."""
        joined = self.weights + self.program + self.layout
        return hashlib.blake2b(joined, digest_size=32, person=b"kvstore/model").digest()

    def __str__(self) -> str:
        return self.model.hex()


class LiveCache(Protocol):
    """A cache in memory that the store can read from and write into.

    What lies in which slot is the tensor's kind's to say (``kvstore.kinds``): slot
    ``i`` of a full tensor holds token ``i``. Slots that no token of ``tokens``
    lies in mean nothing and are never read. ``kvstore.TokenLog`` keeps
    ``tokens``, ``held`` and ``edits`` for whoever implements this.
    """

    @property
    def fingerprint(self) -> Fingerprint:
        """Which model this cache belongs to."""
        ...

    @property
    def layout(self) -> Layout:
        """The tensors, in the order of ``buffer``'s index."""
        ...

    @property
    def tokens(self) -> Sequence[int]:
        """The token ids that the cache holds now, position 0 first."""
        ...

    @property
    def held(self) -> Held:
        """How it came to hold them."""
        ...

    @property
    def capacity_n_tokens(self) -> int:
        """Number of tokens that it has room for; at most the layout's."""
        ...

    @property
    def edits(self) -> Lineage:
        """Where the content is not what the model computes for ``tokens``; empty if it is."""
        ...

    def buffer(self, index: int) -> memoryview:
        """Writable bytes of tensor ``index``: C-contiguous, ``nbytes`` long, format ``B``."""
        ...

    def truncate(self, n_tokens: int) -> None:
        """Forget every token from position ``n_tokens`` on; 0 gives a clean, empty cache.

        Clean means as a freshly loaded program has it, in every tensor that the
        first step reads.

        Raises:
            RewindError: a ring no longer has the window that this length needs,
                or a recurrent state would have to be undone.
        """
        ...

    def adopt(self, tokens: Sequence[int], edits: Lineage = ()) -> None:
        """Record that the buffers now hold what ``tokens`` require, put there by a load."""
        ...
