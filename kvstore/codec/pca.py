"""Numbers as integers along the principal axes of a model's own K and V, after KVTC.

One step for all components is what gives least error for the bits (reverse water-filling): small
ones become nought and take nothing.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from kvstore.codec import packing
from kvstore.codec.base import Codes, Head
from kvstore.codec.basis import N_SINK_TOKENS, Basis
from kvstore.codec.block import Block
from kvstore.codec.kernels import Expansion, kernels
from kvstore.codec.scratch import scratch
from kvstore.errors import DecodeError
from kvstore.layout import DTYPE_ITEMSIZE_NBYTES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]

_VARIANT = 1

_one_product = threading.Lock()
"""numpy's products take all cores by themselves; several at once take twice as long for each."""
_MORE = struct.Struct(f"<16s{packing.N_PACKINGS}H")

_MAX_MAGNITUDE = {"float32": 1e37, "float16": 4.4e4, "bfloat16": 1e37}
"""Of numbers before they are turned, which makes them larger by up to a factor of 1.42."""

_MAX_N_CORRECTIONS = 4
"""One is enough for all but numbers far larger than those that a basis was learned from."""

_MAX_ERROR = 0.6
"""In steps, the root of a token's mean square. It usually is 0.3, and more than this in axes only
that are far from right angles.
"""


@dataclass(frozen=True, slots=True)
class Pca:
    """Tag 6: exact tokens, then integer codes of each component that has any, packed.

    A number is ``(mean + codes @ axes) * 2**-exponent`` of a ``basis``, turned by its position.
    Without a basis nothing can be held.
    """

    tag: ClassVar[int] = 6
    name: ClassVar[str] = "pca"
    more_nbytes: ClassVar[int] = _MORE.size

    basis: Basis | None = None

    def encode(self, numbers: memoryview, block: Block) -> Codes | None:
        """Codes of all tokens behind the first 4 of a session."""
        import numpy as np

        basis, limit = self.basis, _MAX_MAGNITUDE.get(block.dtype, -1.0)
        n_exact = min(max(0, N_SINK_TOKENS - block.start), block.n_tokens)
        if basis is None or not _fits(basis, block) or n_exact == block.n_tokens:
            return None
        if not kernels().largest(numbers, block.dtype) <= limit:
            return None
        at = n_exact * block.n_channels * DTYPE_ITEMSIZE_NBYTES[block.dtype]
        floats = np.empty((block.n_tokens - n_exact, block.n_channels), "<f4")
        kernels().convert_into(
            numbers[at:], block.dtype, memoryview(floats.data).cast("B"), "float32"
        )
        with _one_product:
            codes = _codes(floats, basis, block.start + n_exact, limit)
        if codes is None:
            return None
        packings = packing.packings_of(codes)
        counts = packing.counts_of(packings)
        runs = [bytes(numbers[:at]), packings.tobytes(), *packing.pack(codes, packings)]
        head = Head(_VARIANT, 0, n_exact, _MORE.pack(basis.digest, *counts))
        return Codes(head, memoryview(b"".join(runs)), tuple(map(len, runs)))

    def codes_nbytes(self, head: Head, block: Block) -> int:
        """The exact tokens' bytes, one for each component, and the packed codes."""
        return sum(self._sizes(head, block))

    def decode_into(self, codes: Codes, block: Block, destination: memoryview) -> None:
        """Exact tokens, and behind them what the components add up to."""
        import numpy as np

        basis = self._known(block)
        exact_nbytes, packings_nbytes, *_ = self._sizes(codes.head, block)
        counts = _MORE.unpack(codes.head.more)[1:]
        n_tokens = block.n_tokens - codes.head.n_exact_tokens
        destination[:exact_nbytes] = codes.body[:exact_nbytes]
        if not n_tokens:
            return
        packings = codes.body[exact_nbytes : exact_nbytes + packings_nbytes]
        body = codes.body[exact_nbytes + packings_nbytes :]
        n_rows = sum(counts)
        room = scratch("components", 2 * n_rows * n_tokens)
        rows = np.frombuffer(room, np.int16).reshape(n_rows, n_tokens)
        order = packing.unpack_into(body, packings, counts, rows)
        axes = np.frombuffer(basis.axes, "<i2").reshape(-1, basis.n_channels)[order]
        expansion = Expansion(
            n_tokens=n_tokens,
            n_channels=basis.n_channels,
            axes=axes.reshape(-1).view(np.uint8).data,  # also of no row at all
            mean=memoryview(basis.mean),
            exponent=basis.exponent,
            is_small=_largest_sum(rows, order, basis, counts) < 1 << 24,
            rotation=basis.rotation,
            start=block.start + codes.head.n_exact_tokens,
        )
        kernels().expand_into(room, expansion, destination[exact_nbytes:], block.dtype)

    def _known(self, block: Block) -> Basis:
        if self.basis is None or not _fits(self.basis, block):
            raise DecodeError(f"pca codes: expected a basis that fits {block}")
        return self.basis

    def _sizes(self, head: Head, block: Block) -> list[int]:
        """Bytes of the exact tokens, of the packings, and of each packing's section.

        Raises:
            DecodeError: there are no such codes of that block.
        """
        basis = self._known(block)
        digest, *counts = _MORE.unpack(head.more)
        is_possible = (
            (head.variant, head.group_size) == (_VARIANT, 0)
            and head.n_exact_tokens <= block.n_tokens
            and digest == basis.digest
            and sum(counts) <= basis.n_components
        )
        if not is_possible:
            raise DecodeError(f"pca codes: {head} does not fit {block}")
        n_tokens = block.n_tokens - head.n_exact_tokens
        exact_nbytes = head.n_exact_tokens * block.n_channels * DTYPE_ITEMSIZE_NBYTES[block.dtype]
        return [exact_nbytes, basis.n_components, *packing.sizes_of(counts, n_tokens)]


def digest_in(more: bytes) -> bytes:
    """The digest of the basis that codes with such a head need."""
    digest: bytes = _MORE.unpack(more)[0]
    return digest


def _fits(basis: Basis, block: Block) -> bool:
    return (
        block.dtype in _MAX_MAGNITUDE
        and basis.n_channels == block.n_channels
        and (basis.rotation is None or basis.rotation.head_dim == block.head_dim)
    )


def _codes(
    tokens: npt.NDArray[np.float32], basis: Basis, start: int, limit: float
) -> npt.NDArray[np.int16] | None:
    """Codes ``[n_components, n_tokens]``; None if they cannot say what ``tokens`` are."""
    import numpy as np

    unit = np.float32(2.0**-basis.exponent)
    axes = np.frombuffer(basis.axes, "<i2").reshape(-1, basis.n_channels).astype(np.float32) * unit
    mean = np.frombuffer(basis.mean, "<i4") * np.ldexp(1.0, -basis.exponent)
    if basis.rotation is not None:
        tokens = basis.rotation.undone(tokens, start)
    centred = tokens - mean.astype(np.float32)
    squares = np.square(axes).sum(axis=1)
    back = (axes / squares[:, None]).T
    along = centred @ back
    for _ in range(_MAX_N_CORRECTIONS):
        # Axes are rounded, so not quite at right angles: what that leaves over is added.
        along += (centred - along @ axes) @ back
        codes = np.rint(along)
        if not np.abs(codes).max(initial=0) <= packing.LIMITS[-1]:  # nor is it NaN
            return None
        error = centred - codes @ axes
        worst = np.square(error).mean(axis=1).max()
        if worst <= _MAX_ERROR**2 * squares.max():
            is_held = np.abs(tokens - error).max() <= limit
            return np.ascontiguousarray(codes.T.astype(np.int16)) if is_held else None
    return None


def _largest_sum(rows: Array, order: Array, basis: Basis, counts: tuple[int, ...]) -> int:
    """No sum of codes times axes, or part of one, is larger."""
    import numpy as np

    limits = np.repeat(packing.LIMITS[1:], counts)
    if n_wide := counts[-1]:
        limits[-n_wide:] = np.abs(rows[-n_wide:].astype(np.int32)).max(axis=1)
    mean = np.abs(np.frombuffer(basis.mean, "<i4").astype(np.int64)).max()
    return int(limits @ np.frombuffer(basis.tops, np.int32)[order] + mean)
