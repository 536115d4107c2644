"""Where the pieces ended in which a conversation's tokens were computed.

The low bits of keys and values depend on how many tokens are computed at once (other matrix
shapes), so "the same as a fresh run" means: of the same tokens in the same pieces.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

from kvstore.errors import InputError


class Cuts:
    """Ascending positions; 0 is always a cut and is not kept."""

    __slots__ = ("_positions",)

    def __init__(self, positions: Iterable[int] = ()) -> None:
        """Cuts at ``positions``, ascending."""
        self._positions = array("Q", positions)

    @property
    def positions(self) -> Sequence[int]:
        """All of them, without 0."""
        return self._positions

    @property
    def last(self) -> int:
        """The last one: everything before it was computed once."""
        return self._positions[-1] if self._positions else 0

    def at_or_before(self, position: int) -> int:
        """The last cut that is not behind ``position``."""
        index = bisect_right(self._positions, position)
        return self._positions[index - 1] if index else 0

    def after(self, position: int) -> int | None:
        """The first cut behind ``position``."""
        index = bisect_right(self._positions, position)
        return self._positions[index] if index < len(self._positions) else None

    def add(self, position: int) -> None:
        """A piece ended at ``position``."""
        index = bisect_left(self._positions, position)
        if position and (index == len(self._positions) or self._positions[index] != position):
            self._positions.insert(index, position)

    def forget_after(self, position: int) -> None:
        """The tokens from ``position`` on are others now."""
        del self._positions[bisect_right(self._positions, position) :]

    def copy(self) -> Cuts:
        """Cuts that change by themselves."""
        return Cuts(self._positions)

    def to_runs(self) -> list[list[int]]:
        """``[piece length, how many in a row]``, in order: small, for storing."""
        lengths = [stop - start for start, stop in pairwise([0, *self._positions])]
        return [[length, len(list(same))] for length, same in groupby(lengths)]

    @classmethod
    def from_runs(cls, runs: Iterable[Sequence[int]], *, n_tokens: int) -> Cuts:
        """What ``to_runs`` gave.

        Raises:
            InputError: no lengths, or more than ``n_tokens`` of them.
        """
        positions = array("Q")
        position = 0
        for length, count in runs:
            if {type(length), type(count)} != {int} or length < 1 or count < 1:
                raise InputError(f"expected pieces of 1 token or more, found {length!r}, {count!r}")
            if position + length * count > n_tokens:
                raise InputError(f"expected pieces of {n_tokens} tokens, found more")
            for _ in range(count):
                position += length
                positions.append(position)
        return cls(positions)
