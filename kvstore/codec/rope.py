"""Finding a model's rotary position embedding in its keys, so that no one has to say it.

The mean of a key before it is turned becomes a tone: pair ``i`` of all heads turns at one
frequency. What is found need not be true: turning back and on again is exact whatever
the frequencies are, and a bad guess costs bytes only.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from kvstore.codec.rotation import HALVES, INTERLEAVED, Rotation

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]

_N_BINS = 1 << 14
_MAX_N_HEADS = 4
_ROTARY_PARTS = (1.0, 0.75, 0.5, 0.25)
_MIN_N_PAIRS = 4

_KNOWN_THETAS = (1e4, 1e5, 5e5, 1e6, 1e7, 1.5e5, 2.5e5, 5e6)
_THETA_RANGE = (1e3, 1e8)
_GRID_STEP = 3e-3
"""In ln(theta): over 4,096 tokens no pair then strays by more than half a radian."""

_KNOWN_IS_AS_GOOD = 0.995
"""A well-known family that explains so much of what the best one does is taken for it."""

_MIN_PEAK, _CLEARLY = 0.02, 4.0
"""A pair's own peak replaces the family's frequency if it has this part of the pair's energy, and
so many times what is found there.
"""

_N_CANDIDATES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """Frequencies ``[n_pairs]`` in turns a token; what a mean that turns so explains, in nats."""

    turns: Array
    gain: float
    is_known: bool


def candidates(keys: npt.NDArray[np.float32], head_dim: int) -> list[Rotation]:
    """What ``keys`` ``[n_tokens, n_channels]``, of positions in a row, may be turned by.

    A few of them, the likeliest first; none where heads are too small.
    """
    import numpy as np

    heads = keys.reshape(len(keys), -1, head_dim)
    heads = heads[:, :: -(-heads.shape[1] // _MAX_N_HEADS)]
    found: list[tuple[_Family, Rotation]] = []
    for rotary_part in _ROTARY_PARTS:
        n_pairs = int(head_dim * rotary_part) // 2
        if head_dim % 2 or n_pairs < _MIN_N_PAIRS:
            continue
        for pairing in (INTERLEAVED, HALVES):
            still = Rotation(pairing=pairing, head_dim=head_dim, frequencies=bytes(8 * n_pairs))
            turned = heads.take(still.order()[: 2 * n_pairs], axis=-1)
            family = _best_family(turned.view(np.complex64))
            found.append((family, replace(still, frequencies=_as_integers(family.turns))))
    best = max((family.gain for family, _ in found), default=0.0)

    def likeliest(one: tuple[_Family, Rotation]) -> tuple[bool, int, float]:
        family, rotation = one
        is_as_good = family.is_known and family.gain >= _KNOWN_IS_AS_GOOD * best
        # What few pairs explain, more of them do too, which then turn very slowly.
        return is_as_good, -rotation.n_pairs if is_as_good else 0, family.gain

    found.sort(key=likeliest, reverse=True)
    return [rotation for family, rotation in found[:_N_CANDIDATES] if family.gain > 0]


def _as_integers(turns: Array) -> bytes:
    """Turns a token in units of 2**-64, u64 each."""
    return b"".join(
        (round(math.ldexp(one % 1.0, 64)) % (1 << 64)).to_bytes(8, "little") for one in turns
    )


def _best_family(pairs: Array) -> _Family:
    """The family that explains most of complex ``pairs`` ``[n_tokens, n_heads, n_pairs]``.

    With peaks of single pairs in place of its frequencies where those are clearly other ones.
    """
    import numpy as np

    n_tokens, n_heads, n_pairs = pairs.shape
    energy = np.square(np.abs(pairs)).sum(axis=(0, 1)) + 1e-30
    power = np.zeros((_N_BINS, n_pairs))
    for head in range(n_heads):
        power += np.square(np.abs(np.fft.fft(pairs[:, head], _N_BINS, axis=0)))
    share = np.minimum(power / (n_tokens * energy), 0.999)  # of a pair's energy
    gains = -np.log1p(-share)  # [bins, pairs]
    every = np.arange(n_pairs)
    families, n_known = _families(n_pairs)
    places = np.rint(families * _N_BINS).astype(np.int64) % _N_BINS
    scores = gains[places, every].sum(axis=1) - gains[0].sum()
    chosen = int(scores[:n_known].argmax())
    if scores[chosen] < _KNOWN_IS_AS_GOOD * scores.max():
        chosen = int(scores.argmax())
    turns = families[chosen].copy()
    peaks = gains.argmax(axis=0)
    at_peak, at_family = share[peaks, every], share[places[chosen], every]
    for pair in np.flatnonzero((at_peak > _MIN_PEAK) & (at_peak > _CLEARLY * at_family)):
        turns[pair] = _refined(pairs[:, :, pair], peaks[pair] / _N_BINS)
    return _Family(turns=turns, gain=float(scores[chosen]), is_known=chosen < n_known)


def _refined(numbers: Array, turns: float) -> float:
    """The frequency near ``turns`` at which one pair's mean is largest, to a fraction of a bin."""
    import numpy as np

    n_tokens = len(numbers)
    reach = 1 / _N_BINS
    times = np.arange(n_tokens) - n_tokens / 2
    while reach > 1e-3 / n_tokens:
        near = turns + np.linspace(-reach, reach, 9)
        waves = np.exp(-2j * np.pi * np.outer(near, times))
        turns = float(near[np.square(np.abs(waves @ numbers)).sum(axis=1).argmax()])
        reach /= 4
    return turns


@functools.lru_cache(maxsize=16)
def _families(n_pairs: int) -> tuple[Array, int]:
    """Frequencies ``[n, n_pairs]`` in turns a token, and how many of the first are well-known."""
    import numpy as np

    low, high = map(math.log, _THETA_RANGE)
    grid = np.exp(np.arange(low, high, _GRID_STEP))
    exponents = -np.arange(n_pairs) / n_pairs
    plain = np.asarray(_KNOWN_THETAS)[:, None] ** exponents / (2 * np.pi)
    known = np.concatenate([plain, _llama3(plain, 8), _llama3(plain, 32), plain / 4, plain / 8])
    return np.concatenate([known, grid[:, None] ** exponents / (2 * np.pi)]), len(known)


def _llama3(turns: Array, factor: float) -> Array:
    """As Llama 3.1 does: waves longer than 8,192 tokens stretched, those below 2,048 not."""
    import numpy as np

    smooth = np.clip((8192 * turns - 1) / 3, 0, 1)
    found: Array = turns * (smooth + (1 - smooth) / factor)
    return found
