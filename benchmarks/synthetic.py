"""A cache of a real model's shape without the model: memory, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from kvstore import Fingerprint, Held, Kind, Layout, Lineage, TensorSpec, TokenLog


def llama_1b_layout(*, capacity_n_tokens: int, dtype: str = "bfloat16") -> Layout:
    """K and V of Llama-3.2-1B's 16 layers, ``[1, S, 8, 64]``: 32 KiB a token in 16 bit."""
    return Layout(
        tensors=tuple(
            TensorSpec(
                name=f"layers.{layer}.attention.kv_cache.{role}_cache",
                role=role,
                layer=layer,
                kind=Kind.FULL,
                dtype=dtype,
                shape=(1, capacity_n_tokens, 8, 64),
                token_axis=1,
            )
            for layer in range(16)
            for role in ("k", "v")
        )
    )


class SyntheticCache:
    """A live cache whose slots hold normally distributed numbers in the layout's dtype."""

    def __init__(self, layout: Layout, *, fill: bool = True, seed: int = 0) -> None:
        self.layout = layout
        self.fingerprint = Fingerprint(weights=bytes(32), program=bytes(32), layout=layout.digest)
        generator = np.random.default_rng(seed)
        self.memory = [
            _values(generator, spec) if fill else np.zeros(spec.nbytes, np.uint8)
            for spec in layout.tensors
        ]
        self._log = TokenLog(layout)

    @property
    def tokens(self) -> Sequence[int]:
        """The ids that the slots stand for."""
        return self._log.tokens

    @property
    def capacity_n_tokens(self) -> int:
        """Room for as many tokens as the layout has slots for."""
        return self.layout.capacity_n_tokens

    @property
    def held(self) -> Held:
        """How the cache came to hold them."""
        return self._log.held

    @property
    def edits(self) -> Lineage:
        """None: all of it is as computed."""
        return self._log.edits

    def buffer(self, index: int) -> memoryview:
        """The bytes of one tensor."""
        return self.memory[index].data

    def truncate(self, n_tokens: int) -> None:
        """Forget the tokens behind ``n_tokens``."""
        self._log.truncate(n_tokens)

    def adopt(self, tokens: Sequence[int], edits: Lineage = ()) -> None:
        """The slots hold what ``tokens`` need: a load put it there."""
        self._log.adopt(tokens, edits)

    def extend(self, tokens: Sequence[int]) -> None:
        """Let the next slots stand for ``tokens``, as ``forward`` does."""
        self._log.extend(tokens)


def random_ids(n_tokens: int, *, seed: int = 0) -> list[int]:
    """Token ids of a vocabulary of 128k."""
    generator = random.Random(seed)  # not for security
    return [generator.randrange(128_000) for _ in range(n_tokens)]


def _values(generator: np.random.Generator, spec: TensorSpec) -> np.ndarray:
    values = generator.standard_normal(spec.nbytes // spec.itemsize_nbytes, dtype=np.float32)
    if spec.dtype == "bfloat16":
        return np.ascontiguousarray(values.view(np.uint16)[1::2]).view(np.uint8)
    return values.astype(spec.dtype).view(np.uint8)
