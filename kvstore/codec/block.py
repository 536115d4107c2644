"""What a blob's decoded bytes are: numbers of one dtype, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvstore.kinds import kind_of
from kvstore.layout import TensorSpec

_LOSSY_ROLES = ("k", "v")
_LOSSY_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """``[n_tokens, n_channels]`` numbers of ``dtype``, in heads of ``head_dim`` channels.

    ``start`` is the first token's position.
    """

    dtype: str
    start: int
    n_tokens: int
    n_channels: int
    head_dim: int


def may_lose(spec: TensorSpec) -> bool:
    """Whether a lossy codec may touch the tensor: keys or values in floating point, by token.

    What is quantized in the program already (and its scales), recurrent state and logits are not
    its business.
    """
    return (
        spec.role in _LOSSY_ROLES
        and spec.dtype in _LOSSY_DTYPES
        and kind_of(spec).has_token_content
        and len(spec.shape) > 1
    )


def block_of(spec: TensorSpec, start: int, stop: int) -> Block:
    """The numbers of positions ``[start, stop)`` of a tensor, in their token-major form."""
    axes = [size for axis, size in enumerate(spec.shape) if axis != spec.token_axis]
    return Block(
        dtype=spec.dtype,
        start=start,
        n_tokens=stop - start,
        n_channels=math.prod(axes),
        head_dim=axes[-1] if axes else 1,
    )
