"""The arithmetic of kvstore's lossy codecs in torch: numpy's bytes, several times as fast.

Blobs are decoded on as many threads as there are cores already, so torch is kept from starting
threads of its own in each of them.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvstore import Expansion, Grid, Rotation

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
}
_SMALLEST_SCALE = 0x0080
_MAX_ZERO = 32767.0
_MAX_N_ROOMS = 4
_UNIT_BITS = 14


class TorchKernels:
    """``kvstore.Kernels`` says what each does."""

    def largest(self, numbers: memoryview, dtype: str) -> float:
        """The largest magnitude; infinite or NaN if one is."""
        with _one_thread():
            return float(_tensor(numbers, dtype).abs().max())

    def convert_into(
        self, numbers: memoryview, dtype: str, destination: memoryview, target: str
    ) -> None:
        """To nearest, half to even."""
        with _one_thread():
            _tensor(destination, target).copy_(_tensor(numbers, dtype))

    def quantize8(
        self, numbers: memoryview, dtype: str, grid: Grid
    ) -> tuple[memoryview, memoryview]:
        """Scales and codes."""
        stored = _tensor(numbers, dtype).view(grid.n_tokens, grid.n_channels)
        codes = torch.empty(stored.shape, dtype=torch.int8)
        scales = torch.empty(grid.n_groups, dtype=torch.bfloat16)
        with _one_thread():
            for part in grid.parts():
                floats = stored[part.start : part.stop].view(part.shape).float()
                scale = _scale_up(floats.abs().amax(part.axis, keepdim=True) / 127)
                scales[part.first : part.last] = scale.view(-1)
                codes[part.start : part.stop].view(part.shape).copy_((floats / scale).round_())
        return _bytes(scales), _bytes(codes)

    def dequantize8_into(
        self, parts: tuple[memoryview, memoryview], grid: Grid, destination: memoryview, dtype: str
    ) -> None:
        """``code * scale``."""
        scales, codes = _tensor(parts[0], "bfloat16"), _tensor(parts[1], "int8")
        room = _room(grid)
        with _one_thread():
            room.scales.copy_(scales)
            room.floats.copy_(codes)
            for floats, scale in room.scaled:
                floats.mul_(scale)
            _tensor(destination, dtype).copy_(room.floats)

    def quantize4(
        self, numbers: memoryview, dtype: str, grid: Grid
    ) -> tuple[memoryview, memoryview, memoryview]:
        """Scales, zeros and codes."""
        half = grid.n_channels // 2
        stored = _tensor(numbers, dtype).view(grid.n_tokens, grid.n_channels)
        codes = torch.empty(stored.shape, dtype=torch.uint8)
        scales = torch.empty(grid.n_groups, dtype=torch.bfloat16)
        zeros = torch.empty(grid.n_groups, dtype=torch.int16)
        with _one_thread():
            for part in grid.parts():
                floats = stored[part.start : part.stop].view(part.shape).float()
                least = floats.amin(part.axis, keepdim=True)
                most = floats.amax(part.axis, keepdim=True)
                reach = torch.maximum(least.abs(), most.abs()) / _MAX_ZERO
                scale = _scale_up(torch.maximum((most - least) / 15, reach))
                zero = (least / scale).round_()
                scales[part.first : part.last] = scale.view(-1)
                zeros[part.first : part.last] = zero.view(-1).to(torch.int16)
                code = (floats / scale).round_().sub_(zero).clamp_(0, 15)
                codes[part.start : part.stop].view(part.shape).copy_(code)
            packed = codes[:, :half] | codes[:, half:] << 4
        return _bytes(scales), _bytes(zeros), _bytes(packed)

    def dequantize4_into(
        self,
        parts: tuple[memoryview, memoryview, memoryview],
        grid: Grid,
        destination: memoryview,
        dtype: str,
    ) -> None:
        """``(code + zero) * scale``."""
        scales, zeros = _tensor(parts[0], "bfloat16"), _tensor(parts[1], "int16")
        packed = _tensor(parts[2], "uint8")
        room = _room(grid)
        with _one_thread():
            room.scales.copy_(scales)
            room.zeros.copy_(zeros)
            for half, code in zip(room.halves, (packed & 15, packed >> 4), strict=True):
                half.copy_(code.view(half.shape))
            for (floats, scale), (_, zero) in zip(room.scaled, room.shifted, strict=True):
                floats.add_(zero).mul_(scale)
            _tensor(destination, dtype).copy_(room.floats)

    def expand_into(
        self, codes: memoryview, expansion: Expansion, destination: memoryview, dtype: str
    ) -> None:
        """``(mean + codes @ axes) * 2**-exponent``, turned."""
        n_tokens, n_channels = expansion.n_tokens, expansion.n_channels
        is_single = expansion.is_small and _has_exact_products()
        exact = torch.float32 if is_single else torch.float64
        rows = _tensor(codes, "int16").view(-1, n_tokens)
        axes = _tensor(expansion.axes, "int16").view(-1, n_channels)
        mean = _tensor(expansion.mean, "int32")
        target = _tensor(destination, dtype).view(n_tokens, n_channels)
        unit, rotation = 2.0**-expansion.exponent, expansion.rotation
        with _one_thread():
            left = _held("rows", rows.shape, exact).copy_(rows)
            right = _held("axes", axes.shape, exact).copy_(axes)
            sums = _held("sums", target.shape, exact)
            torch.addmm(mean.to(exact), left.T, right, out=sums)
            if rotation is None:
                target.copy_(sums.mul_(unit).float())
                return
            heads = sums.view(n_tokens, -1, rotation.head_dim)
            target = target.view(heads.shape)
            n_turned = 2 * rotation.n_pairs
            shape = (*heads.shape[:2], rotation.n_pairs, 2)
            pairs = _held("pairs", shape, torch.float64)
            pairs.copy_(_in_pairs(heads[..., :n_turned], rotation))
            phasors = _phasors(rotation, expansion.start, n_tokens)
            torch.view_as_complex(pairs).mul_(phasors)
            turned = _held("turned", shape, torch.float32)
            turned.copy_(pairs.mul_(unit / (1 << _UNIT_BITS)).add_(0.0))  # no negative zero
            _in_pairs(target[..., :n_turned], rotation).copy_(turned)
            if n_turned < rotation.head_dim:
                target[..., n_turned:].copy_(heads[..., n_turned:].mul_(unit).float())


def _has_exact_products() -> bool:
    """Whether products of float32 are computed with all their bits, whatever the app asked for."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # asked for by settings that this function does not go together with
        return False


@functools.lru_cache(maxsize=8)
@torch.inference_mode(mode=False)
def _phasors(rotation: Rotation, start: int, n_tokens: int) -> torch.Tensor:
    """Complex ``[n_tokens, 1, n_pairs]``: the keys of all layers turn alike."""
    turns = _tensor(rotation.turns(start, n_tokens), "int16").view(n_tokens, 1, -1, 2)
    return torch.view_as_complex(turns[:, :, : rotation.n_pairs].double())


def _in_pairs(turned: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """A view ``[n_tokens, n_heads, n_pairs, 2]`` of the numbers of each head that turn."""
    n_tokens, n_heads, _ = turned.shape
    if rotation.is_interleaved:
        return turned.view(n_tokens, n_heads, -1, 2)
    return turned.view(n_tokens, n_heads, 2, -1).transpose(-1, -2)


def _held(use: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """This thread's memory for one use, which grows to what the largest blob needs."""
    held: dict[tuple[str, torch.dtype], torch.Tensor] = _per_thread.__dict__.setdefault("held", {})
    n = math.prod(shape)
    if (use, dtype) not in held or held[use, dtype].numel() < n:
        with torch.inference_mode(mode=False):  # else it could not be used outside of that mode
            held[use, dtype] = torch.empty(n, dtype=dtype)
    return held[use, dtype][:n].view(shape)


class _Room:
    """Memory of one thread for the blobs of one grid, seen in every way that decoding needs.

    Made once and used again and again: each view that torch makes, and each operation, lets go of
    the interpreter's lock and takes it back, which costs more than the arithmetic of a small blob.
    """

    def __init__(self, grid: Grid) -> None:
        n_channels = grid.n_channels
        numbers = torch.empty((grid.n_tokens, n_channels))
        self.grid = grid
        self.floats = numbers.view(-1)
        self.scales = torch.empty(grid.n_groups)
        self.zeros = torch.empty(grid.n_groups)
        self.halves = (numbers[:, : n_channels // 2], numbers[:, n_channels // 2 :])
        self.scaled = self._parts(numbers, self.scales)
        self.shifted = self._parts(numbers, self.zeros)

    def _parts(
        self, numbers: torch.Tensor, of_groups: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Numbers, and what their groups have, part by part in shapes that go together."""
        return [
            (
                numbers[part.start : part.stop].view(part.shape),
                of_groups[part.first : part.last].view(part.scales_shape),
            )
            for part in self.grid.parts()
        ]


_per_thread = threading.local()


def _room(grid: Grid) -> _Room:
    """This thread's memory for blobs of that grid; K and V, first chunk and others, take turns."""
    rooms: dict[Grid, _Room] = _per_thread.__dict__.setdefault("rooms", {})
    if grid not in rooms:
        if len(rooms) >= _MAX_N_ROOMS:
            rooms.clear()
        with torch.inference_mode(mode=False):  # as above
            rooms[grid] = _Room(grid)
    return rooms[grid]


def _tensor(data: memoryview, dtype: str) -> torch.Tensor:
    """A view of ``data``; torch warns of what may not be written, so it is not told."""
    if not data.nbytes:
        return torch.empty(0, dtype=_DTYPES[dtype])
    if not data.readonly:
        return torch.frombuffer(data, dtype=_DTYPES[dtype])
    address = np.frombuffer(data, np.uint8).ctypes.data
    memory = _array_type(data.nbytes).from_address(address)
    memory.owner = data
    return torch.frombuffer(memory, dtype=_DTYPES[dtype])


@functools.lru_cache(maxsize=1024)
def _array_type(nbytes: int) -> Any:
    """Memory of so many bytes as a type, which takes 30 us to make, kept alive."""
    return ctypes.c_char * nbytes


def _bytes(tensor: torch.Tensor) -> memoryview:
    array = tensor.reshape(-1).view(torch.uint8).numpy()
    return array.data


def _scale_up(floats: torch.Tensor) -> torch.Tensor:
    """The next bfloat16 that is not less, and normal; as float32, of the same shape."""
    bits = (floats.view(torch.int32) + 0xFFFF >> 16).clamp_(min=_SMALLEST_SCALE)
    return (bits << 16).view(torch.float32)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch's operations in the calling thread; no other thread's setting changes.

    ``torch.set_num_threads`` would be for the whole process.
    """
    openmp = _openmp()
    if openmp is None:
        yield
        return
    if not hasattr(_per_thread, "is_set_up"):
        torch.get_num_threads()  # torch sets its own number first, once in each thread
        _per_thread.is_set_up = True
    n_threads = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        openmp.omp_set_num_threads(n_threads)


@functools.cache
def _openmp() -> ctypes.PyDLL | None:
    """The OpenMP runtime that torch has loaded, if it is one that we know."""
    folder = Path(torch.__file__).parent / "lib"
    for path in sorted(folder.glob("lib*omp*")):
        with suppress(OSError, AttributeError):
            # Not CDLL: that lets go of the interpreter's lock for each of these short calls.
            library = ctypes.PyDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            library.omp_set_num_threads, library.omp_get_max_threads  # noqa: B018  # has them?
            return library
    return None
