"""Token ids: checked once at the edge, then an ``array('Q')`` of unsigned 64-bit integers."""

from __future__ import annotations

import contextlib
import operator
import sys
from array import array
from collections.abc import Iterable
from typing import Any, TypeAlias

from kvstore.errors import TokensError

TokenIds: TypeAlias = "array[int]"
"""Token ids as ``array('Q')``; native byte order in memory, explicit on disk."""

TOKEN_NBYTES = 8


def token_ids(tokens: Iterable[int] | Any) -> TokenIds:
    """The ids as ``array('Q')``, from any one-dimensional sequence of integers.

    Lists, tuples, ranges, NumPy arrays and torch tensors all do. The result is
    always a copy: a live cache's own ids change while a load works on it.

    Raises:
        TokensError: ``tokens`` is empty, not one-dimensional, or holds
            something that is not an integer in ``[0, 2**63)``.
    """
    if isinstance(tokens, array) and tokens.typecode == "Q":
        ids = array("Q", tokens)
        if ids and max(ids) >= 2**63:
            _check_ids(ids)
    else:
        ids = array("Q", _check_ids(_values(tokens)))
    if not ids:
        raise TokensError("expected at least one token id, found none")
    return ids


def _values(tokens: Any) -> Iterable[Any]:
    """The elements of ``tokens``, whatever they are."""
    if isinstance(tokens, str | bytes | bytearray):
        raise TokensError(
            f"expected a sequence of integer token ids, found {type(tokens).__name__}; "
            "run the text through the model's tokenizer first"
        )
    if hasattr(tokens, "tolist"):  # numpy, torch, array
        shape = list(getattr(tokens, "shape", (-1,)))
        if len(shape) != 1:
            raise TokensError(
                f"expected a one-dimensional sequence of integer token ids, found shape {shape}; "
                "pass one sequence, for example tokens[0]"
            )
        tokens = tokens.tolist()
    try:
        values: Iterable[Any] = iter(tokens)
        return values
    except TypeError:
        raise TokensError(
            f"expected a one-dimensional sequence of integer token ids, "
            f"found {type(tokens).__name__}"
        ) from None


def _check_ids(values: Iterable[Any]) -> list[int]:
    """``values`` as plain ints in ``[0, 2**63)``."""
    values = list(values)
    if {*map(type, values)} == {int} and min(values) >= 0 and max(values) < 2**63:
        return values
    ids = []
    for index, value in enumerate(values):
        number = value if type(value) is int else _integer(value, index)
        if not 0 <= number < 2**63:
            raise TokensError(
                f"expected token ids from 0 to 2**63-1, found {number} at index {index}"
            )
        ids.append(number)
    return ids


def _integer(value: Any, index: int) -> int:
    """``value`` as an int; truth values are refused, NumPy's and torch's too."""
    kind = type(value).__name__
    if "bool" not in kind and "bool" not in str(getattr(value, "dtype", "")):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TokensError(f"expected integer token ids, found {value!r} ({kind}) at index {index}")


def to_little_endian(ids: TokenIds) -> bytes:
    """The ids as unsigned 64-bit little-endian bytes (what keys are made of)."""
    return _in_order(ids, "little")


def to_big_endian(ids: TokenIds) -> bytes:
    """The ids as unsigned 64-bit big-endian bytes.

    Byte strings in this form sort like the token sequences they stand for, so
    an index over them finds neighbours.
    """
    return _in_order(ids, "big")


def from_big_endian(data: bytes) -> TokenIds:
    """The ids whose big-endian bytes are ``data``; its length is a multiple of 8."""
    ids = array("Q")
    ids.frombytes(data)
    if sys.byteorder == "little":
        ids.byteswap()
    return ids


def common_prefix_n_tokens(left: TokenIds, right: TokenIds) -> int:
    """How many ids ``left`` and ``right`` have in common from the start."""
    stop = min(len(left), len(right))
    if left[:stop] == right[:stop]:
        return stop
    low, high = 0, stop  # left[:low] == right[:low] always; left[:high] != right[:high]
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _in_order(ids: TokenIds, byteorder: str) -> bytes:
    if sys.byteorder == byteorder:
        return ids.tobytes()
    swapped = array("Q", ids)
    swapped.byteswap()
    return swapped.tobytes()
