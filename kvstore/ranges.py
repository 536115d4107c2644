"""Sets of token positions as sorted, disjoint ``(start, stop)`` ranges, end-exclusive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

Range: TypeAlias = tuple[int, int]
"""``(start, stop)``, end-exclusive, never empty."""


def union(ranges: Iterable[Range]) -> list[Range]:
    """All positions of ``ranges``, touching ranges joined, empty ones dropped."""
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined


def intersect(left: Sequence[Range], right: Sequence[Range]) -> list[Range]:
    """The positions that are in both."""
    return union((max(one[0], other[0]), min(one[1], other[1])) for one in left for other in right)


def subtract(left: Sequence[Range], right: Sequence[Range]) -> list[Range]:
    """The positions of ``left`` that are not in ``right``."""
    remaining = union(left)
    for start, stop in right:
        remaining = [
            part
            for first, last in remaining
            for part in ((first, min(last, start)), (max(first, stop), last))
            if part[0] < part[1]
        ]
    return remaining


def clip(ranges: Sequence[Range], start: int, stop: int) -> list[Range]:
    """The positions of ``ranges`` in ``[start, stop)``."""
    return intersect(ranges, [(start, stop)])


def n_positions(ranges: Iterable[Range]) -> int:
    """How many positions the (disjoint) ranges have."""
    return sum(stop - start for start, stop in ranges)
