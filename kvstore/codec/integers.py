"""What int8 and int4 share: which numbers have a scale together, and which cannot be held."""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.codec.base import Head
from kvstore.codec.block import Block
from kvstore.codec.kernels import Grid, kernels
from kvstore.errors import DecodeError

BY_TOKEN, BY_CHANNEL = 1, 2
"""Variants: a group is neighbouring channels of one token, or one channel of tokens in a row."""

RUN_N_TOKENS = 64
"""Tokens that share a channel's scale (KIVI's residual length is of this order)."""

_MAX_MAGNITUDE = {"float32": 1.6e38, "float16": 6e4, "bfloat16": 1.6e38}
"""Larger numbers are not quantized: their difference, or half a step more, could be too large."""

MAX_GROUP_SIZE = 65535


def grid_of(head: Head, block: Block) -> Grid:
    """How the tokens behind the exact ones are grouped.

    Raises:
        DecodeError: that block cannot be grouped so.
    """
    is_possible = (
        head.variant in (BY_TOKEN, BY_CHANNEL)
        and head.group_size > 0
        and head.n_exact_tokens <= block.n_tokens
        and block.dtype in _MAX_MAGNITUDE
        and (head.variant == BY_CHANNEL or block.n_channels % head.group_size == 0)
    )
    if not is_possible:
        raise DecodeError(f"integer codes: {head} does not fit {block}")
    return Grid(
        n_tokens=block.n_tokens - head.n_exact_tokens,
        n_channels=block.n_channels,
        group_size=head.group_size,
        by_channel=head.variant == BY_CHANNEL,
    )


def can_hold(numbers: memoryview, block: Block) -> bool:
    """Whether all numbers are finite, and small enough to be rounded up."""
    limit = _MAX_MAGNITUDE.get(block.dtype, -1.0)
    return kernels().largest(numbers, block.dtype) <= limit if limit > 0 else False


def joined(parts: Iterable[memoryview]) -> memoryview:
    """The parts one behind the other."""
    return memoryview(b"".join(parts))
