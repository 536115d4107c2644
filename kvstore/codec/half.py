"""Numbers of 32 bits as numbers of 16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvstore.codec.base import Codes, Head
from kvstore.codec.block import Block
from kvstore.codec.kernels import kernels
from kvstore.errors import DecodeError

_DTYPES = {1: "float16", 2: "bfloat16"}
_MAX_FLOAT16 = 65504.0
_MAX_BFLOAT16 = 3.38e38


@dataclass(frozen=True, slots=True)
class Half:
    """Tag 3: float32 as float16 (variant 1), or as bfloat16 (2) where that would overflow."""

    tag: ClassVar[int] = 3
    name: ClassVar[str] = "half"
    more_nbytes: ClassVar[int] = 0

    def encode(self, numbers: memoryview, block: Block) -> Codes | None:
        """All numbers as float16 if none is larger than 65504, else as bfloat16."""
        largest = kernels().largest(numbers, block.dtype)
        if block.dtype != "float32" or not largest <= _MAX_BFLOAT16:
            return None
        variant = 1 if largest <= _MAX_FLOAT16 else 2
        body = memoryview(bytearray(numbers.nbytes // 2))
        kernels().convert_into(numbers, block.dtype, body, _DTYPES[variant])
        return Codes(Head(variant), body)

    def codes_nbytes(self, head: Head, block: Block) -> int:
        """Two bytes a number."""
        if block.dtype != "float32" or head not in (Head(1), Head(2)):
            raise DecodeError(f"half codes: expected float32 as variant 1 or 2, found {head}")
        return 2 * block.n_tokens * block.n_channels

    def decode_into(self, codes: Codes, block: Block, destination: memoryview) -> None:
        """Widen them: exact."""
        dtype = _DTYPES[codes.head.variant]
        kernels().convert_into(codes.body, dtype, destination, block.dtype)
