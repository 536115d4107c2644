"""A tensor's basis: its mean, its principal axes and how its keys turn, learned once and kept.

All of it is integers, so that what codes become is the same to the bit everywhere:
``schemas/FORMAT.md``, "Bases".
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

from kvstore.codec import packing, rope
from kvstore.codec.block import Block
from kvstore.codec.kernels import kernels
from kvstore.codec.raw import Raw
from kvstore.codec.rotation import HALVES, INTERLEAVED, Rotation
from kvstore.codec.zstd import Zstd
from kvstore.errors import DecodeError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]

MAX_N_CHANNELS = 2048
"""Of a token. More would take minutes to learn, and more to decode than is saved."""

N_SINK_TOKENS = 4
"""The first tokens of a session are unlike all others, and are no part of what is learned."""

_STEP = 0.3
"""In units of a tensor's spread; what it costs a model's answers is in ``docs/codecs.md``."""

_AXIS_UNITS = 14.0
"""A step is ``14 * sqrt(n_channels)`` units or more: an axis is then known to 2 % or better.

More precise axes take more room and gain next to nothing: together they span all there is.
"""

_MIN_ROPE_GAIN = 0.02
"""How much smaller, as a part, codes have to become for a rotation to be undone."""

_FAR = 8.0
"""A token so many times as far from the middle as usual has no say in what is learned.

One that is 300 times as far would make the step, and so the error of all others, as large as they
are themselves.
"""

_MAX_ROTARY_HEAD_DIM = 512
"""Wider heads do not turn (what they hold is compressed), and looking for it would take long."""

_MIN_STEP = 1e-18
"""Below it squares are no normal float32 numbers."""

_MAX_MAGNITUDE = 1e15
"""Of what a basis is learned from: its squares have to fit a float32."""

_EXPONENTS = range(-64, 113)
"""So that no sum leaves the range of a float32, or its normal numbers."""

_MAX_AXES_SUM = 1 << 21
"""Largest sum of magnitudes in one place of all axes: sums with 16 bit codes are below 2**37."""

_PERSON = b"kvstore/basis"
_HEAD = struct.Struct("<BBhHHHH5H")
_VERSION, _NO_PAIRING = 1, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """How codes of one tensor become numbers, up to the dtype's rounding.

    ``(mean + codes @ axes) * 2**-exponent``, then turned. ``mean``: int32 ``[n_channels]``,
    ``axes``: int16 ``[n_components, n_channels]``, the largest components first; ``tops``: int32
    ``[n_components]``, the largest magnitude in each. ``digest`` names the basis: a hash of all
    that it says.
    """

    digest: bytes
    n_channels: int
    exponent: int
    mean: bytes
    axes: bytes
    tops: bytes
    rotation: Rotation | None

    DIGEST_NBYTES: ClassVar[int] = 16

    @property
    def n_components(self) -> int:
        """Number of axes."""
        return len(self.axes) // (2 * self.n_channels)

    @classmethod
    def train(cls, numbers: memoryview, block: Block, *, role: str) -> Basis | None:
        """The basis of these tokens; None if none would be of use, or they are not finite.

        The first 4 tokens of a session are passed over.
        """
        import numpy as np

        width = block.n_channels
        if not 2 <= width <= MAX_N_CHANNELS:
            return None
        n_passed = min(max(0, N_SINK_TOKENS - block.start), block.n_tokens)
        floats = np.empty((block.n_tokens, width), "<f4")
        kernels().convert_into(numbers, block.dtype, memoryview(floats.data).cast("B"), "float32")
        tokens = floats[n_passed:]
        start = block.start + n_passed
        if len(tokens) < 2 or not np.abs(tokens).max() <= _MAX_MAGNITUDE:  # nor is it NaN
            return None
        tokens, is_usual = _without_far_ones(tokens)
        best = _moments(tokens[is_usual])
        rotation = None
        if not best.step > _MIN_STEP:
            return None
        can_turn = role == "k" and block.head_dim <= _MAX_ROTARY_HEAD_DIM
        for one in rope.candidates(tokens, block.head_dim) if can_turn else ():
            other = _moments(one.undone(tokens, start)[is_usual])
            step = min(best.step, other.step)
            if step > _MIN_STEP and other.cost(step) < (1 - _MIN_ROPE_GAIN) * best.cost(step):
                best, rotation = other, one
        return _quantized(best, width, rotation)

    def to_bytes(self) -> bytes:
        """As it is stored; ``from_bytes`` takes it back."""
        head, runs = _content(self.n_channels, self.exponent, self.mean, self.axes, self.rotation)
        body = b"".join(runs)
        frame = Zstd(long_matches_only=True).encode_runs(memoryview(body), map(len, runs))
        is_shorter = len(frame) < len(body)
        tag, payload = (Zstd.tag, frame) if is_shorter else (Raw.tag, body)
        return b"".join([head, bytes([tag]), payload])

    @classmethod
    def from_bytes(cls, data: memoryview, n_channels: int) -> Self:
        """The basis that ``data`` holds, of a tensor with so many numbers a token.

        Raises:
            DecodeError: it is none, or of another tensor.
        """
        import numpy as np

        if data.nbytes <= _HEAD.size:
            raise DecodeError(f"basis: expected more than {_HEAD.size} bytes, found {data.nbytes}")
        version, pairing, exponent, width, n_components, head_dim, n_pairs, *counts = _HEAD.unpack(
            data[: _HEAD.size]
        )
        is_possible = (
            version == _VERSION
            and width == n_channels <= MAX_N_CHANNELS
            and 0 < sum(counts) == n_components <= width
            and exponent in _EXPONENTS
            and _can_turn(pairing, head_dim, n_pairs, width)
        )
        if not is_possible:
            raise DecodeError(
                f"basis: expected one of version {_VERSION} for {n_channels} numbers a token, "
                f"found {bytes(data[: _HEAD.size]).hex()}"
            )
        sizes = [4 * width, 8 * n_pairs, n_components, *packing.sizes_of(counts, width)]
        body = memoryview(bytearray(sum(sizes)))
        stored_with = {one.tag: one for one in (Raw(), Zstd())}.get(data[_HEAD.size])
        if stored_with is None:
            raise DecodeError(f"basis: stored with an unknown codec, {data[_HEAD.size]}")
        stored_with.decode_into(data[_HEAD.size + 1 :], body)
        at, parts = 0, []
        for nbytes in sizes[:3]:
            parts.append(body[at : at + nbytes])
            at += nbytes
        rows = np.empty((n_components, width), "<i2")
        order = packing.unpack_into(body[at:], parts[2], counts, rows)
        axes = np.empty_like(rows)
        axes[order] = rows
        sums = np.abs(axes.astype(np.int64)).sum(axis=0)
        if sums.max() > _MAX_AXES_SUM:
            raise DecodeError(
                f"basis: expected sums of at most {_MAX_AXES_SUM}, found {sums.max()}"
            )
        frequencies = bytes(parts[1])
        return cls(
            digest=_digest(bytes(data[: _HEAD.size]), [bytes(body)]),
            n_channels=width,
            exponent=exponent,
            mean=bytes(parts[0]),
            axes=axes.tobytes(),
            tops=_tops(axes),
            rotation=None
            if pairing == _NO_PAIRING
            else Rotation(pairing=pairing, head_dim=head_dim, frequencies=frequencies),
        )


def _can_turn(pairing: int, head_dim: int, n_pairs: int, width: int) -> bool:
    if pairing == _NO_PAIRING:
        return head_dim == n_pairs == 0
    return (
        pairing in (INTERLEAVED, HALVES)
        and 0 < 2 * n_pairs <= head_dim
        and head_dim % 2 == width % head_dim == 0
    )


def _content(
    width: int, exponent: int, mean: bytes, axes: bytes, rotation: Rotation | None
) -> tuple[bytes, list[bytes]]:
    """Head and body, the latter in runs that are coded apart."""
    import numpy as np

    rows = np.frombuffer(axes, "<i2").reshape(-1, width)
    packings = packing.packings_of(rows)
    counts = packing.counts_of(packings)
    turning = (_NO_PAIRING, 0, 0)
    frequencies = b""
    if rotation is not None:
        turning = (rotation.pairing, rotation.head_dim, rotation.n_pairs)
        frequencies = rotation.frequencies
    pairing, head_dim, n_pairs = turning
    head = _HEAD.pack(_VERSION, pairing, exponent, width, len(rows), head_dim, n_pairs, *counts)
    return head, [mean, frequencies, packings.tobytes(), *packing.pack(rows, packings)]


def _digest(head: bytes, runs: Sequence[bytes]) -> bytes:
    made = hashlib.blake2b(head, digest_size=Basis.DIGEST_NBYTES, person=_PERSON)
    for run in runs:
        made.update(run)
    return made.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moments:
    """What tokens are like: their mean ``[width]`` and covariance ``[width, width]``."""

    mean: Array
    covariance: Array

    @property
    def step(self) -> float:
        return _STEP * math.sqrt(float(self.covariance.trace()) / len(self.mean))

    def cost(self, step: float) -> float:
        """About how many bits a token takes: ``log2(1 + 16 (deviation / step)**2) / 2`` each."""
        import numpy as np

        relative = self.covariance * np.float32(16 / step**2)
        np.fill_diagonal(relative, relative.diagonal() + 1)
        return float(np.linalg.slogdet(relative)[1]) / (2 * math.log(2))


def _without_far_ones(tokens: Array) -> tuple[Array, Array]:
    """``tokens`` with the middle in the place of those far from it, and which are not."""
    import numpy as np

    middle = np.median(tokens, axis=0)
    distance = np.square(tokens - middle).sum(axis=1)
    usual = np.median(distance)
    is_usual = (distance <= _FAR**2 * usual) | (usual == 0)
    return np.where(is_usual[:, None], tokens, middle), is_usual


def _moments(tokens: npt.NDArray[np.float32]) -> _Moments:
    import numpy as np

    mean = tokens.mean(axis=0, dtype=np.float64)
    centred = tokens - mean.astype(np.float32)
    return _Moments(mean=mean, covariance=centred.T @ centred / np.float32(len(tokens)))


def _quantized(found: _Moments, width: int, rotation: Rotation | None) -> Basis | None:
    import numpy as np

    exponent = math.ceil(math.log2(_AXIS_UNITS * math.sqrt(width) / found.step))
    if exponent not in _EXPONENTS:
        return None
    try:
        principal = np.linalg.eigh(found.covariance)[1].T[::-1].astype(np.float64)
    except np.linalg.LinAlgError:
        return None
    # All axes are kept: in what a text shows for the first time, any of them can be large.
    axes = np.rint(np.ldexp(principal * found.step, exponent)).astype("<i2")
    mean = np.rint(np.ldexp(found.mean, exponent))
    if np.abs(mean).max() > (1 << 31) - 1:
        return None
    return _basis(width, exponent, mean.astype("<i4").tobytes(), axes.tobytes(), rotation)


def _basis(width: int, exponent: int, mean: bytes, axes: bytes, rotation: Rotation | None) -> Basis:
    import numpy as np

    head, runs = _content(width, exponent, mean, axes, rotation)
    return Basis(
        digest=_digest(head, runs),
        n_channels=width,
        exponent=exponent,
        mean=mean,
        axes=axes,
        tops=_tops(np.frombuffer(axes, "<i2").reshape(-1, width)),
        rotation=rotation,
    )


def _tops(axes: Array) -> bytes:
    import numpy as np

    tops: bytes = np.abs(axes.astype(np.int32)).max(axis=1).tobytes()
    return tops
