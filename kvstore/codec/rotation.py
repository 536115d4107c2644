"""Rotary position embedding as exact integers: pairs of numbers that turn with the position."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]

INTERLEAVED, HALVES = 1, 2
"""Pairings: numbers ``2 i`` and ``2 i + 1`` of a head, or ``i`` and ``i + n_pairs``."""

TABLE_BITS = 16
UNIT_BITS = 14
"""Cosines and sines are integers in units of ``2**-14``, of 65,536 angles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """The first ``2 * n_pairs`` numbers of each head, turned by ``position * frequency``.

    ``frequencies``: a u64 (little-endian) for each pair, in turns / 2**64 a token.
    """

    pairing: int
    head_dim: int
    frequencies: bytes

    @property
    def n_pairs(self) -> int:
        """Pairs in a head."""
        return len(self.frequencies) // 8

    @property
    def is_interleaved(self) -> bool:
        """Whether a pair's numbers are neighbours."""
        return self.pairing == INTERLEAVED

    def order(self) -> list[int]:
        """The numbers of a head pair by pair: those that turn, then the others."""
        n_turned = 2 * self.n_pairs
        if self.is_interleaved:
            return list(range(self.head_dim))
        pairs = zip(range(self.n_pairs), range(self.n_pairs, n_turned), strict=True)
        return [*(place for pair in pairs for place in pair), *range(n_turned, self.head_dim)]

    def turns(self, start: int, n_tokens: int) -> memoryview:
        """Cosine and sine of each pair of a head, int16 ``[n_tokens, head_dim / 2, 2]``.

        The first token is at position ``start``. Pairs that do not turn have 2**14 and 0.
        """
        return _turns(self.frequencies, self.head_dim // 2, start, n_tokens)

    def undone(self, numbers: npt.NDArray[np.float32], start: int) -> npt.NDArray[np.float32]:
        """``numbers`` ``[n_tokens, n_channels]`` as they were before they were turned."""
        import numpy as np

        n_tokens = len(numbers)
        turns = np.frombuffer(self.turns(start, n_tokens), "<i2").astype(np.float32)
        turns /= 1 << UNIT_BITS
        order = self.order()
        heads = numbers.reshape(n_tokens, -1, self.head_dim)
        pairs = heads.take(order, axis=-1).view(np.complex64)
        back = np.empty_like(heads)
        back[..., order] = (pairs / turns.view(np.complex64).reshape(n_tokens, 1, -1)).view("f4")
        return back.reshape(numbers.shape)


@functools.lru_cache(maxsize=32)
def _turns(frequencies: bytes, n_pairs: int, start: int, n_tokens: int) -> memoryview:
    """All layers of a chunk ask for the same ones."""
    import numpy as np

    turning = np.zeros(n_pairs, np.uint64)
    turning[: len(frequencies) // 8] = np.frombuffer(frequencies, "<u8")
    positions = np.uint64(start) + np.arange(n_tokens, dtype=np.uint64)
    half = np.uint64(1 << 63 - TABLE_BITS)
    phases = positions[:, None] * turning + half  # modulo 2**64
    places = phases >> np.uint64(64 - TABLE_BITS)
    return memoryview(table()[places.astype(np.int64)].tobytes())


@functools.cache
def table() -> npt.NDArray[np.int16]:
    """Cosine and sine of ``k / 65536`` turns in units of ``2**-14``: int16 ``[65536, 2]``.

    No value lies nearer to a tie than 8e-7 of a unit, so every library rounds alike.
    """
    import numpy as np

    quarter = 1 << TABLE_BITS - 2
    angles = np.arange(quarter + 1) * (2 * np.pi / (1 << TABLE_BITS))
    rising = np.rint(np.sin(angles) * (1 << UNIT_BITS)).astype(np.int16)
    half_wave = np.concatenate([rising, rising[-2:0:-1]])  # sines of [0, 1/2)
    sines = np.concatenate([half_wave, -half_wave])
    found = np.stack([np.roll(sines, -quarter), sines], axis=1)
    found.setflags(write=False)
    return found
