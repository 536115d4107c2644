"""Numbers as integers of 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvstore.codec.base import Codes, Head
from kvstore.codec.block import Block
from kvstore.codec.integers import (
    BY_CHANNEL,
    BY_TOKEN,
    MAX_GROUP_SIZE,
    RUN_N_TOKENS,
    can_hold,
    grid_of,
    joined,
)
from kvstore.codec.kernels import Grid, kernels
from kvstore.errors import DecodeError


@dataclass(frozen=True, slots=True)
class Int8:
    """Tag 4: scales, then codes; a number is ``code * scale``.

    A scale for each head of each token (variant 1), or for each channel of a run of tokens (2).
    """

    tag: ClassVar[int] = 4
    name: ClassVar[str] = "int8"
    more_nbytes: ClassVar[int] = 0

    variant: int = BY_TOKEN

    def encode(self, numbers: memoryview, block: Block) -> Codes | None:
        """Two bytes a scale, one a number."""
        size = RUN_N_TOKENS if self.variant == BY_CHANNEL else block.head_dim
        if size > MAX_GROUP_SIZE or not can_hold(numbers, block):
            return None
        head = Head(self.variant, size)
        return Codes(head, joined(kernels().quantize8(numbers, block.dtype, _grid(head, block))))

    def codes_nbytes(self, head: Head, block: Block) -> int:
        """Two bytes a scale, one a number."""
        grid = _grid(head, block)
        return 2 * grid.n_groups + grid.n_tokens * grid.n_channels

    def decode_into(self, codes: Codes, block: Block, destination: memoryview) -> None:
        """``code * scale``."""
        grid = _grid(codes.head, block)
        at = 2 * grid.n_groups
        parts = (codes.body[:at], codes.body[at:])
        kernels().dequantize8_into(parts, grid, destination, block.dtype)


def _grid(head: Head, block: Block) -> Grid:
    if head.n_exact_tokens:
        raise DecodeError(f"int8 codes: expected no exact tokens, found {head.n_exact_tokens}")
    return grid_of(head, block)
