"""Rows of small integers as bytes for an entropy coder: several to a byte where they are few.

A Huffman code spends at least one bit on a byte. So numbers out of -1, 0 and 1, which need less,
go five to a byte, and so on; each row is packed by its largest magnitude.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from kvstore.errors import DecodeError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]

LIMITS = (0, 1, 2, 7, 127, 32767)
"""The largest magnitude that each packing can hold; what it is called is its place here."""

N_PACKINGS = len(LIMITS) - 1
"""Of rows that are not all zero."""

_N_DIGITS = {1: 5, 2: 3, 3: 2}
"""Numbers in a byte: the first one counts units, the next one ``2 * limit + 1`` of them, ..."""

_BYTE, _TWO_BYTES = 4, 5


def packings_of(rows: Array) -> npt.NDArray[np.uint8]:
    """The narrowest packing of each row ``[n_rows, n]``, all of magnitude 32767 or less."""
    import numpy as np

    largest = np.abs(rows).max(axis=1, initial=0)
    found: npt.NDArray[np.uint8] = np.searchsorted(LIMITS, largest).astype(np.uint8)
    return found


def counts_of(packings: npt.NDArray[np.uint8]) -> list[int]:
    """How many rows each packing but 0 has."""
    import numpy as np

    return [int(count) for count in np.bincount(packings, minlength=len(LIMITS))[1:]]


def sizes_of(counts: Sequence[int], n: int) -> list[int]:
    """Bytes of each packing's section, of ``counts`` rows of ``n`` numbers, from packing 1 on."""
    return [
        2 * count * n if packing == _TWO_BYTES else -(-count * n // _N_DIGITS.get(packing, 1))
        for packing, count in enumerate(counts, start=1)
    ]


def pack(rows: Array, packings: npt.NDArray[np.uint8]) -> list[bytes]:
    """The sections of int16 ``rows`` ``[n_rows, n]``, in runs that are alike.

    A section holds the rows of one packing, one behind the other.
    """
    import numpy as np

    runs: list[bytes] = []
    for packing in range(1, len(LIMITS)):
        flat = rows[packings == packing].reshape(-1)
        if packing == _TWO_BYTES:
            both = flat.astype("<i2").view(np.uint8).reshape(-1, 2)
            runs += [both[:, place].tobytes() for place in (0, 1)]
        elif packing == _BYTE:
            runs.append(flat.astype(np.int8).tobytes())
        else:
            n_digits, limit = _N_DIGITS[packing], LIMITS[packing]
            padded = np.zeros(-(-flat.size // n_digits) * n_digits, np.int16)
            padded[: flat.size] = flat
            weights = _base(packing) ** np.arange(n_digits)
            digits = (padded + limit).reshape(-1, n_digits)
            runs.append((digits @ weights).astype(np.uint8).tobytes())
    return runs


def unpack_into(
    body: memoryview, packings: memoryview, counts: Sequence[int], target: Array
) -> npt.NDArray[np.intp]:
    """Fill ``target`` ``[sum(counts), n]`` with the rows of one section after the other.

    Returns which of all rows each is. ``body`` has the bytes that ``sizes_of`` says.

    Raises:
        DecodeError: there are other packings than ``counts`` says, or bytes that are none, or an
            integer that its packing is not for: what sums come to is known by these limits.
    """
    import numpy as np

    of_rows = np.frombuffer(packings, np.uint8)
    if of_rows.max(initial=0) >= len(LIMITS) or counts_of(of_rows) != list(counts):
        raise DecodeError(f"packed codes: expected {list(counts)} rows of each packing")
    n, at, first = target.shape[1], 0, 0
    sizes = sizes_of(counts, n)
    for packing, (count, nbytes) in enumerate(zip(counts, sizes, strict=True), start=1):
        if not count:
            continue
        section = np.frombuffer(body[at : at + nbytes], np.uint8)
        place = target[first : first + count]
        if packing == _TWO_BYTES:
            low, high = section.reshape(2, -1)
            place[...] = (high.view(np.int8).astype(np.int16) << 8 | low).reshape(place.shape)
        elif packing == _BYTE:
            place[...] = section.view(np.int8).reshape(place.shape)
        else:
            table = _table(packing)
            if section.max() >= len(table):
                raise DecodeError(f"packed codes: a byte of {section.max()} in packing {packing}")
            place[...] = table.take(section, axis=0).reshape(-1)[: place.size].reshape(place.shape)
        if packing >= _BYTE and place.min() < -LIMITS[packing]:
            raise DecodeError(f"packed codes: {place.min()} in packing {packing}")
        at += nbytes
        first += count
    return np.argsort(of_rows, kind="stable")[of_rows.size - first :]


def _base(packing: int) -> int:
    return 2 * LIMITS[packing] + 1


@functools.cache
def _table(packing: int) -> npt.NDArray[np.int8]:
    """The numbers of each byte, ``[base ** n_digits, n_digits]``."""
    import numpy as np

    base, n_digits = _base(packing), _N_DIGITS[packing]
    values = np.arange(base**n_digits)[:, None]
    digits = values // base ** np.arange(n_digits) % base
    table: npt.NDArray[np.int8] = (digits - LIMITS[packing]).astype(np.int8)
    return table
