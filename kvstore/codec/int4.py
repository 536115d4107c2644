"""Numbers as integers of 4 bits, after KIVI (Liu et al., 2024): K by channel, V by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from kvstore.codec.base import Codes, Head
from kvstore.codec.block import Block
from kvstore.codec.integers import BY_CHANNEL, BY_TOKEN, RUN_N_TOKENS, can_hold, grid_of, joined
from kvstore.codec.kernels import Grid, kernels
from kvstore.errors import DecodeError
from kvstore.layout import DTYPE_ITEMSIZE_NBYTES

N_EXACT_TOKENS = 4
"""The first tokens of a session draw much attention, whatever they are (StreamingLLM)."""

GROUP_N_CHANNELS = 32


@dataclass(frozen=True, slots=True)
class Int4:
    """Tag 5: exact tokens, scales, zeros, codes; a number is ``(code + zero) * scale``.

    One scale and zero for 32 channels of a token or fewer (variant 1), or for a channel of a run of
    tokens (2). A byte has two codes: those of channels ``i`` and ``n_channels / 2 + i``.
    """

    tag: ClassVar[int] = 5
    name: ClassVar[str] = "int4"
    more_nbytes: ClassVar[int] = 0

    variant: int = BY_TOKEN

    def encode(self, numbers: memoryview, block: Block) -> Codes | None:
        """Four bytes a group, half a byte a number."""
        n_exact = min(max(0, N_EXACT_TOKENS - block.start), block.n_tokens)
        by_token = math.gcd(GROUP_N_CHANNELS, block.n_channels // 2)
        size = RUN_N_TOKENS if self.variant == BY_CHANNEL else by_token
        head = Head(self.variant, size, n_exact)
        if not _fits(head, block) or not can_hold(numbers, block):
            return None
        grid, at = grid_of(head, block), n_exact * _token_nbytes(block)
        if not grid.n_tokens:
            return None
        parts = kernels().quantize4(numbers[at:], block.dtype, grid)
        return Codes(head, joined([numbers[:at], *parts]))

    def codes_nbytes(self, head: Head, block: Block) -> int:
        """The exact tokens' bytes, four a group, half a byte a number."""
        if not _fits(head, block):
            raise DecodeError(f"int4 codes: {head} does not fit {block}")
        return sum(_sizes(head, block, grid_of(head, block)))

    def decode_into(self, codes: Codes, block: Block, destination: memoryview) -> None:
        """``(code + zero) * scale`` behind the exact tokens."""
        grid = grid_of(codes.head, block)
        rest, parts = codes.body, []
        for nbytes in _sizes(codes.head, block, grid):
            parts.append(rest[:nbytes])
            rest = rest[nbytes:]
        exact, scales, zeros, integers = parts
        destination[: exact.nbytes] = exact
        behind = destination[exact.nbytes :]
        if behind:
            kernels().dequantize4_into((scales, zeros, integers), grid, behind, block.dtype)


def _fits(head: Head, block: Block) -> bool:
    """Whether two halves of a token's channels have whole groups each."""
    n_channels = block.n_channels // 2
    return block.n_channels % 2 == 0 and (
        head.variant == BY_CHANNEL or (head.group_size > 0 and n_channels % head.group_size == 0)
    )


def _sizes(head: Head, block: Block, grid: Grid) -> tuple[int, int, int, int]:
    """Bytes of the four parts."""
    n_numbers = grid.n_tokens * grid.n_channels
    exact_nbytes = head.n_exact_tokens * _token_nbytes(block)
    return exact_nbytes, 2 * grid.n_groups, 2 * grid.n_groups, n_numbers // 2


def _token_nbytes(block: Block) -> int:
    return block.n_channels * DTYPE_ITEMSIZE_NBYTES[block.dtype]
