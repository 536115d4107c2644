"""The arithmetic of lossy codecs: the definition in numpy, and a place for a faster one.

``schemas/FORMAT.md`` ("Lossy codecs") says to the bit how codes become numbers. Numbers and codes
are passed as bytes, so that no library's arrays are part of the protocol.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from kvstore.codec.rotation import UNIT_BITS, Rotation

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]

_SMALLEST_SCALE = 0x0080
"""The smallest normal bfloat16: some machines count what is below it as zero."""

_MAX_ZERO = 32767


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tokens ``[start, stop)`` with groups ``[first, last)``, seen so that a group is one axis.

    ``shape`` is that of the numbers, ``scales_shape`` that of the scales: the same, with 1 along
    ``axis``.
    """

    start: int
    stop: int
    first: int
    last: int
    shape: tuple[int, int, int]
    scales_shape: tuple[int, int, int]
    axis: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """How ``[n_tokens, n_channels]`` numbers are grouped: each group has a scale of its own.

    ``by_channel``: a group is one channel of up to ``group_size`` tokens in a row. Otherwise it is
    ``group_size`` neighbouring channels of one token, which divides ``n_channels``.
    """

    n_tokens: int
    n_channels: int
    group_size: int
    by_channel: bool

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        if self.by_channel:
            return -(-self.n_tokens // self.group_size) * self.n_channels
        return self.n_tokens * (self.n_channels // self.group_size)

    def parts(self) -> Iterator[Part]:
        """The groups of the same size, all at once: one part, or by channel two."""
        size, width = self.group_size, self.n_channels
        if not self.by_channel:
            yield self._part(0, self.n_tokens, (self.n_tokens, width // size, size), axis=2)
            return
        border = self.n_tokens // size * size
        if border:
            yield self._part(0, border, (border // size, size, width), axis=1)
        if border < self.n_tokens:
            yield self._part(border, self.n_tokens, (1, self.n_tokens - border, width), axis=1)

    def _part(self, start: int, stop: int, shape: tuple[int, int, int], *, axis: int) -> Part:
        n_rows, n_columns, n_last = shape
        scales_shape = (n_rows, 1, n_last) if axis == 1 else (n_rows, n_columns, 1)
        first = start // self.group_size * self.n_channels if self.by_channel else 0
        return Part(
            start=start,
            stop=stop,
            first=first,
            last=first + math.prod(scales_shape),
            shape=shape,
            scales_shape=scales_shape,
            axis=axis,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Expansion:
    """How codes ``[n_components, n_tokens]`` become ``[n_tokens, n_channels]`` numbers.

    ``axes``: int16 ``[n_components, n_channels]``, ``mean``: int32 ``[n_channels]``, both in units
    of ``2**-exponent``. ``is_small``: no sum, nor part of one, reaches 2**24; else 2**37.
    ``rotation``: how the numbers are turned at last, the first token at position ``start``.
    """

    n_tokens: int
    n_channels: int
    axes: memoryview
    mean: memoryview
    exponent: int
    is_small: bool
    rotation: Rotation | None
    start: int


class Kernels(Protocol):
    """What lossy codecs do with numbers; every implementation gives the same bytes.

    Called from worker threads, several at a time. ``dtype`` is float32, float16 or bfloat16.
    """

    def largest(self, numbers: memoryview, dtype: str) -> float:
        """The largest magnitude among ``numbers``; infinite or NaN if one of them is."""
        ...

    def convert_into(
        self, numbers: memoryview, dtype: str, destination: memoryview, target: str
    ) -> None:
        """``numbers`` rounded to ``target`` dtype, to nearest, half to even; all are in range."""
        ...

    def quantize8(
        self, numbers: memoryview, dtype: str, grid: Grid
    ) -> tuple[memoryview, memoryview]:
        """Scales (bfloat16) and codes (int8) of ``numbers``, all finite."""
        ...

    def dequantize8_into(
        self, parts: tuple[memoryview, memoryview], grid: Grid, destination: memoryview, dtype: str
    ) -> None:
        """From scales and codes: ``code * scale``, rounded to ``dtype`` once."""
        ...

    def quantize4(
        self, numbers: memoryview, dtype: str, grid: Grid
    ) -> tuple[memoryview, memoryview, memoryview]:
        """Scales (bfloat16), zeros (int16) and codes (two in a byte) of ``numbers``, all finite."""
        ...

    def dequantize4_into(
        self,
        parts: tuple[memoryview, memoryview, memoryview],
        grid: Grid,
        destination: memoryview,
        dtype: str,
    ) -> None:
        """From scales, zeros and codes: ``(code + zero) * scale``, rounded to ``dtype`` once."""
        ...

    def expand_into(
        self, codes: memoryview, expansion: Expansion, destination: memoryview, dtype: str
    ) -> None:
        """``(mean + codes @ axes) * 2**-exponent``, turned, from int16 codes.

        Exact up to the end, then rounded to float32 and that to ``dtype``.
        """
        ...


class NumpyKernels:
    """The definition. ``Kernels`` says what each does."""

    def largest(self, numbers: memoryview, dtype: str) -> float:
        """See ``Kernels``."""
        import numpy as np

        return float(np.abs(_floats(_stored(numbers, dtype), dtype)).max())

    def convert_into(
        self, numbers: memoryview, dtype: str, destination: memoryview, target: str
    ) -> None:
        """See ``Kernels``."""
        _round_into(_floats(_stored(numbers, dtype), dtype), _stored(destination, target), target)

    def quantize8(
        self, numbers: memoryview, dtype: str, grid: Grid
    ) -> tuple[memoryview, memoryview]:
        """``scale`` is the largest magnitude / 127 rounded up, ``code`` is number / scale."""
        import numpy as np

        stored = _stored(numbers, dtype).reshape(grid.n_tokens, grid.n_channels)
        codes = np.empty(stored.shape, np.int8)
        scales = np.empty(grid.n_groups, np.uint16)
        for part in grid.parts():
            floats = _floats(stored[part.start : part.stop], dtype).reshape(part.shape)
            largest = np.abs(floats).max(axis=part.axis, keepdims=True)
            scale = _scale_up(largest / np.float32(127))
            scales[part.first : part.last] = scale.reshape(-1)
            codes[part.start : part.stop].reshape(part.shape)[...] = np.rint(floats / _widen(scale))
        return _bytes(scales), _bytes(codes)

    def dequantize8_into(
        self, parts: tuple[memoryview, memoryview], grid: Grid, destination: memoryview, dtype: str
    ) -> None:
        """8 bits times 8 bits is exact in a float32: only the last step rounds."""
        import numpy as np

        scales, codes = np.frombuffer(parts[0], "<u2"), np.frombuffer(parts[1], np.int8)
        codes = codes.reshape(grid.n_tokens, grid.n_channels)
        target = _stored(destination, dtype).reshape(codes.shape)
        for part in grid.parts():
            scale = _widen(scales[part.first : part.last]).reshape(part.scales_shape)
            with np.errstate(all="ignore"):  # of a damaged blob; its checksum says so
                floats = codes[part.start : part.stop].reshape(part.shape) * scale
            _round_into(floats, target[part.start : part.stop].reshape(part.shape), dtype)

    def quantize4(
        self, numbers: memoryview, dtype: str, grid: Grid
    ) -> tuple[memoryview, memoryview, memoryview]:
        """``scale`` is (largest - smallest) / 15 rounded up, ``zero`` is smallest / scale."""
        import numpy as np

        stored = _stored(numbers, dtype).reshape(grid.n_tokens, grid.n_channels)
        codes = np.empty(stored.shape, np.uint8)
        scales, zeros = np.empty(grid.n_groups, np.uint16), np.empty(grid.n_groups, np.int16)
        for part in grid.parts():
            floats = _floats(stored[part.start : part.stop], dtype).reshape(part.shape)
            least = floats.min(axis=part.axis, keepdims=True)
            most = floats.max(axis=part.axis, keepdims=True)
            step = (most - least) / np.float32(15)
            # Else a zero far away from nought would not fit its 16 bits.
            reach = np.maximum(np.abs(least), np.abs(most))
            step = np.maximum(step, reach / np.float32(_MAX_ZERO))
            scale = _scale_up(step)
            zero = np.rint(least / _widen(scale))
            scales[part.first : part.last] = scale.reshape(-1)
            zeros[part.first : part.last] = zero.reshape(-1)
            code = np.clip(np.rint(floats / _widen(scale)) - zero, 0, 15)
            codes[part.start : part.stop].reshape(part.shape)[...] = code
        half = grid.n_channels // 2
        return _bytes(scales), _bytes(zeros), _bytes(codes[:, :half] | codes[:, half:] << 4)

    def dequantize4_into(
        self,
        parts: tuple[memoryview, memoryview, memoryview],
        grid: Grid,
        destination: memoryview,
        dtype: str,
    ) -> None:
        """16 bits times 8 bits is exact in a float32: only the last step rounds."""
        import numpy as np

        scales, zeros = np.frombuffer(parts[0], "<u2"), np.frombuffer(parts[1], "<i2")
        packed = np.frombuffer(parts[2], np.uint8).reshape(grid.n_tokens, -1)
        codes = np.concatenate([packed & 15, packed >> 4], axis=1)
        target = _stored(destination, dtype).reshape(codes.shape)
        for part in grid.parts():
            scale = _widen(scales[part.first : part.last]).reshape(part.scales_shape)
            zero = zeros[part.first : part.last].astype(np.float32).reshape(part.scales_shape)
            with np.errstate(all="ignore"):  # of a damaged blob; its checksum says so
                floats = (codes[part.start : part.stop].reshape(part.shape) + zero) * scale
            _round_into(floats, target[part.start : part.stop].reshape(part.shape), dtype)

    def expand_into(
        self, codes: memoryview, expansion: Expansion, destination: memoryview, dtype: str
    ) -> None:
        """Sums of integers are exact in any order as long as the floats can hold them."""
        import numpy as np

        n_tokens, n_channels = expansion.n_tokens, expansion.n_channels
        floating: type[np.floating[Any]] = np.float32 if expansion.is_small else np.float64
        axes = np.frombuffer(expansion.axes, np.int16).reshape(-1, n_channels).astype(floating)
        rows = np.frombuffer(codes, np.int16).reshape(-1, n_tokens).astype(floating)
        mean = np.frombuffer(expansion.mean, "<i4").astype(floating)
        sums: Array = rows.T @ axes + mean
        exponent, rotation = expansion.exponent, expansion.rotation
        if rotation is not None:
            exponent += UNIT_BITS
            order = rotation.order()
            turns = np.frombuffer(rotation.turns(expansion.start, n_tokens), np.int16)
            phasors = turns.astype(np.float64).view(np.complex128).reshape(n_tokens, 1, -1)
            heads = sums.reshape(n_tokens, -1, rotation.head_dim)
            pairs = heads.astype(np.float64).take(order, axis=-1).view(np.complex128)
            sums = np.empty(heads.shape)
            sums[..., order] = (pairs * phasors).view(np.float64) + 0.0  # no negative zero
        floats: Array = (sums * sums.dtype.type(2.0**-exponent)).astype(np.float32, copy=False)
        _round_into(floats.reshape(-1), _stored(destination, dtype), dtype)


_in_use: list[Kernels] = [NumpyKernels()]


def kernels() -> Kernels:
    """What lossy codecs compute with now."""
    return _in_use[-1]


def use_kernels(faster: Kernels) -> None:
    """Let lossy codecs of this process compute with ``faster``, which gives the same bytes."""
    _in_use[:] = [faster]


def _stored(numbers: memoryview, dtype: str) -> Array:
    """Numbers as they are stored; a bfloat16, which numpy does not have, as its 16 bits."""
    import numpy as np

    return np.frombuffer(numbers, {"float32": "<f4", "float16": "<f2"}.get(dtype, "<u2"))


def _floats(stored: Array, dtype: str) -> npt.NDArray[np.float32]:
    import numpy as np

    return _widen(stored) if dtype == "bfloat16" else stored.astype(np.float32, copy=False)


def _widen(bfloat16s: Array) -> npt.NDArray[np.float32]:
    import numpy as np

    return (bfloat16s.astype(np.uint32) << 16).view(np.float32)


def _round_into(floats: npt.NDArray[np.float32], target: Array, dtype: str) -> None:
    """To nearest, half to even."""
    import numpy as np

    if dtype != "bfloat16":
        with np.errstate(all="ignore"):  # as above
            target[...] = floats
        return
    bits = np.ascontiguousarray(floats).view(np.uint32)
    target[...] = bits + 0x7FFF + (bits >> 16 & 1) >> 16


def _scale_up(floats: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The next bfloat16 that is not less, and normal."""
    import numpy as np

    bits = np.ascontiguousarray(floats).view(np.uint32)
    rounded: npt.NDArray[np.uint32] = np.maximum(bits + 0xFFFF >> 16, _SMALLEST_SCALE)
    return rounded.astype(np.uint16)


def _bytes(array: Array) -> memoryview:
    import numpy as np

    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
