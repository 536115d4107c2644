"""The arithmetic of kvstore's lossy codecs in torch: numpy's bytes, several times as fast.

Blobs are decoded on as many threads as there are cores already, so torch is kept from starting
threads of its own in each of them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from kvstore import Grid

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
}
_SMALLEST_SCALE = 0x0080
_MAX_ZERO = 32767.0


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
        scales = _tensor(parts[0], "bfloat16")
        codes = _tensor(parts[1], "int8").view(grid.n_tokens, grid.n_channels)
        target = _tensor(destination, dtype).view(codes.shape)
        with _one_thread():
            scales = scales.float()
            floats = target if dtype == "float32" else torch.empty(codes.shape)
            floats.copy_(codes)
            for part in grid.parts():
                scale = scales[part.first : part.last].view(part.scales_shape)
                floats[part.start : part.stop].view(part.shape).mul_(scale)
            if floats is not target:
                target.copy_(floats)

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
        half = grid.n_channels // 2
        scales, zeros = _tensor(parts[0], "bfloat16"), _tensor(parts[1], "int16")
        packed = _tensor(parts[2], "uint8").view(grid.n_tokens, half)
        target = _tensor(destination, dtype).view(grid.n_tokens, grid.n_channels)
        with _one_thread():
            scales, zeros = scales.float(), zeros.float()
            floats = target if dtype == "float32" else torch.empty(target.shape)
            floats[:, :half].copy_(packed & 15)
            floats[:, half:].copy_(packed >> 4)
            for part in grid.parts():
                zero = zeros[part.first : part.last].view(part.scales_shape)
                scale = scales[part.first : part.last].view(part.scales_shape)
                floats[part.start : part.stop].view(part.shape).add_(zero).mul_(scale)
            if floats is not target:
                target.copy_(floats)


def _tensor(data: memoryview, dtype: str) -> torch.Tensor:
    """A view of ``data``; torch warns of what may not be written, so it is not told."""
    if not data.nbytes:
        return torch.empty(0, dtype=_DTYPES[dtype])
    address = np.frombuffer(data, np.uint8).ctypes.data
    memory = (ctypes.c_char * data.nbytes).from_address(address)
    memory.owner = data  # type: ignore[attr-defined]  # keeps it alive as long as the tensor
    return torch.frombuffer(memory, dtype=_DTYPES[dtype])


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
    n_threads = torch.get_num_threads()  # also lets torch set its own number first
    openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        openmp.omp_set_num_threads(n_threads)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded, if it is one that we know."""
    folder = Path(torch.__file__).parent / "lib"
    for path in sorted(folder.glob("lib*omp*")):
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            library.omp_set_num_threads  # noqa: B018  # AttributeError if it has none
            return library
    return None
