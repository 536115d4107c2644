"""Rotary position embedding (Su et al., 2021) of cached keys: given, or measured, and undone.

A cached key is ``R(p) k``: each pair of its dimensions turned by position times a frequency.
Moving it by ``m`` positions is turning it by ``m`` times the frequency more; nothing else
in the key knows the position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from kvstore.errors import InputError

if TYPE_CHECKING:
    import torch


class Pairing(StrEnum):
    """Which dimensions are turned together."""

    INTERLEAVED = "interleaved"
    """2i and 2i + 1 (Llama as Meta published it, ExecuTorch's default)."""

    HALVES = "halves"
    """i and i + r / 2, of the first r dimensions (Hugging Face's ``rotate_half``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRope:
    """The rotation of one layer's keys.

    ``frequencies`` are in radians a position, one for each pair; dimensions behind the last pair
    are not turned (partial rotary).
    """

    frequencies: tuple[float, ...]
    pairing: Pairing = Pairing.INTERLEAVED

    @classmethod
    def standard(
        cls,
        *,
        n_rotary_dims: int,
        theta: float = 10000.0,
        pairing: Pairing = Pairing.INTERLEAVED,
        llama3_scaling: tuple[float, float, float, int] | None = None,
    ) -> LayerRope:
        """Frequencies ``theta ** (-2 i / n_rotary_dims)``.

        ``llama3_scaling`` is (factor, low frequency factor, high frequency factor, original
        context), as in Llama 3.1's configuration (``rope_scaling`` of type ``llama3``).

        Raises:
            InputError: ``n_rotary_dims`` is not an even number of at least 2.
        """
        if type(n_rotary_dims) is not int or n_rotary_dims < 2 or n_rotary_dims % 2:
            raise InputError(f"expected an even number of rotary dims, found {n_rotary_dims!r}")
        plain = [theta ** (-2 * i / n_rotary_dims) for i in range(n_rotary_dims // 2)]
        if llama3_scaling is not None:
            plain = [_llama3(frequency, *llama3_scaling) for frequency in plain]
        return cls(frequencies=tuple(plain), pairing=Pairing(pairing))

    def rotate(self, keys: torch.Tensor, by: torch.Tensor | int) -> torch.Tensor:
        """``keys`` ``[n, H_kv, D]`` moved by ``by`` positions (one number, or ``[n]``), float32."""
        import torch

        z = self.pairs(keys)
        shift = torch.as_tensor(by, dtype=torch.float64).reshape(-1, 1, 1)
        # float64: at 100,000 positions the angle's low bits would matter.
        angle = shift * torch.tensor(self.frequencies, dtype=torch.float64)
        turned = torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).float()
        result = keys.float().clone()
        n_pairs = len(self.frequencies)
        if self.pairing is Pairing.INTERLEAVED:
            result[..., : 2 * n_pairs] = turned.flatten(-2)
        else:
            result[..., :n_pairs] = turned[..., 0]
            result[..., n_pairs : 2 * n_pairs] = turned[..., 1]
        return result

    def pairs(self, keys: torch.Tensor) -> torch.Tensor:
        """The turned dimensions of ``keys`` as complex128 ``[n, H_kv, pairs]``."""
        import torch

        n_pairs = len(self.frequencies)
        turned = keys[..., : 2 * n_pairs].double()
        if self.pairing is Pairing.INTERLEAVED:
            halves = turned.reshape(*turned.shape[:-1], n_pairs, 2)
            return torch.view_as_complex(halves.contiguous())
        return torch.complex(turned[..., :n_pairs].contiguous(), turned[..., n_pairs:].contiguous())

    def error(self, keys: torch.Tensor) -> float:
        """How far ``keys`` of one token at positions 0, 1, ... are from this rotation.

        The largest difference of a number, as a part of the largest number.
        """
        import torch

        expected = self.rotate(keys[:1].expand_as(keys), torch.arange(len(keys)))
        largest = float(keys.abs().max())
        return float((keys.float() - expected).abs().max()) / largest if largest else 0.0


RopeSpec = Mapping[int, LayerRope]
"""The rotation of each layer's keys, by layer as in the cache's layout."""


def measure(samples: Sequence[torch.Tensor]) -> LayerRope:
    """The rotation that fits ``samples`` best: keys of one token each at positions 0, 1, ...

    Each is ``[n, H_kv, D]``. Frequencies come from the angle between positions that lie ever
    farther apart, each known well enough by the one before; all heads and samples
    count by their length. Below one turn in two positions, as every frequency in use.
    """
    n_dims = samples[0].shape[-1]
    candidates = [(Pairing.INTERLEAVED, n_dims // 2 * 2)]
    candidates += [
        (Pairing.HALVES, n_rotary_dims)
        for n_rotary_dims in (n_dims, n_dims // 4 * 3, n_dims // 2, n_dims // 4)
        if n_rotary_dims >= 2 and n_rotary_dims % 2 == 0
    ]
    found = [_fit(samples, pairing, n_rotary_dims) for pairing, n_rotary_dims in candidates]
    return min(found, key=lambda rope: max(rope.error(keys) for keys in samples))


def _fit(samples: Sequence[torch.Tensor], pairing: Pairing, n_rotary_dims: int) -> LayerRope:
    import torch

    blank = LayerRope(frequencies=(0.0,) * (n_rotary_dims // 2), pairing=pairing)
    # [positions, pairs]: how far each pair has turned since position 0.
    turned = torch.stack([(z * z[:1].conj()).sum(1) for z in map(blank.pairs, samples)]).sum(0)
    frequencies = torch.zeros(turned.shape[1], dtype=torch.float64)
    distance = 1
    while distance < len(turned):
        expected = frequencies * distance
        rest = torch.angle(turned[distance] * torch.polar(torch.ones_like(expected), -expected))
        frequencies = (expected + rest) / distance
        distance *= 2
    return LayerRope(frequencies=tuple(frequencies.tolist()), pairing=pairing)


def _llama3(
    frequency: float, factor: float, low_factor: float, high_factor: float, context: int
) -> float:
    wavelength = 2 * math.pi / frequency
    if wavelength < context / high_factor:
        return frequency
    if wavelength > context / low_factor:
        return frequency / factor
    smooth = (context / wavelength - low_factor) / (high_factor - low_factor)
    return (1 - smooth) * frequency / factor + smooth * frequency
