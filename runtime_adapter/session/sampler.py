"""The next token from its logits: greedy, or drawn with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.errors import InputError

if TYPE_CHECKING:
    import torch

_MAX_SEED = 2**63 - 1
_MANTISSA_N_BITS = 53


@dataclass(slots=True, kw_only=True)
class Sampler:
    """How tokens are chosen; equal samplers choose equally, also in another process.

    ``temperature`` 0 takes the likeliest token (the lowest id among equals). Above, a token is
    drawn from the softmax of logits / temperature, among the ``top_k`` likeliest, and
    of those among the fewest that have probability ``top_p`` together (Holtzman et al.,
    2020). ``n_drawn`` is the sampler's whole state: number ``n_drawn`` of the sequence that
    ``seed`` gives (Philox 4x64, Salmon et al., 2011) decides next.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    n_drawn: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: one is out of range.
        """
        for name, is_right, expected in (
            ("temperature", _is_number(self.temperature, 0, float("inf")), "0 or more"),
            ("top_p", _is_number(self.top_p, 0, 1) and self.top_p > 0, "more than 0, at most 1"),
            ("top_k", self.top_k is None or _is_integer(self.top_k, 1), "1 or more, or None"),
            ("seed", _is_integer(self.seed, 0), "a whole number of 0 or more, of 63 bits"),
            ("n_drawn", _is_integer(self.n_drawn, 0), "0 or more"),
        ):
            if not is_right:
                raise InputError(
                    f"Sampler: expected {name} {expected}, found {getattr(self, name)!r}"
                )

    def pick(self, logits: torch.Tensor) -> int:
        """The token id chosen by ``logits`` ``[vocab]``.

        Raises:
            InputError: they hold no number to go by (NaN, or nothing but -inf).
        """
        scores = np.asarray(logits.detach().to("cpu").double().numpy())
        best = int(np.argmax(scores))
        if not np.isfinite(scores[best]):
            raise InputError(
                f"Sampler: expected finite logits, found {scores[best]} at token {best}; the "
                "model's output is no use: check its weights and dtype"
            )
        if self.temperature == 0:
            return best
        ids = self._candidates(scores)
        weights = np.exp((scores[ids] - scores[best]) / self.temperature)
        sums = np.cumsum(weights)
        # The fewest whose sum reaches top_p; at least one.
        n_kept = min(int(np.searchsorted(sums, self.top_p * sums[-1])) + 1, len(ids))
        drawn = self._draw() * sums[n_kept - 1]
        index = min(int(np.searchsorted(sums[:n_kept], drawn, side="right")), n_kept - 1)
        return int(ids[index])

    def copy(self) -> Sampler:
        """One that goes on by itself."""
        return replace(self)

    def to_metadata(self) -> dict[str, Any]:
        """As plain types; ``from_metadata`` reads it back.

        Raises:
            InputError: a number was set out of range.
        """
        return asdict(replace(self))  # checks them again

    @classmethod
    def from_metadata(cls, data: Mapping[str, Any]) -> Sampler:
        """What ``to_metadata`` gave.

        Raises:
            InputError: it is something else.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise InputError(f"Sampler: expected what to_metadata gave, found {error}") from error

    def _candidates(self, scores: np.ndarray) -> np.ndarray:
        """The ids that may be drawn, the likeliest first, the lower id first among equals."""
        ids = np.arange(len(scores))
        if self.top_k is not None and self.top_k < len(scores):
            border = np.partition(scores, -self.top_k)[-self.top_k]
            ids = np.flatnonzero(scores >= border)
        ids = ids[np.lexsort((ids, -scores[ids]))]
        return ids if self.top_k is None else ids[: self.top_k]

    def _draw(self) -> float:
        """A number in [0, 1) from the seed's sequence."""
        raw = int(np.random.Philox(key=self.seed, counter=self.n_drawn).random_raw())
        self.n_drawn += 1
        return float(raw >> (64 - _MANTISSA_N_BITS)) * 2.0**-_MANTISSA_N_BITS


def _is_number(value: Any, lowest: float, highest: float) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and lowest <= value <= highest and value != float("inf")


def _is_integer(value: Any, lowest: int) -> bool:
    return type(value) is int and lowest <= value <= _MAX_SEED
