"""A cache of a real model's shape without the model: memory, and nothing else.

Its content is normally distributed, or (``trained_values``) the demo model's own K and V, laid
out so that no number comes twice within a chunk: they compress as a trained model's do.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from functools import cache

import numpy as np
from measure import CACHE

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
    """A live cache whose slots hold numbers in the layout's dtype.

    They are normally distributed, or cut from ``values`` ``[layer, K or V, token, head, dim]``.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        fill: bool = True,
        seed: int = 0,
        values: np.ndarray | None = None,
    ) -> None:
        self.layout = layout
        self.fingerprint = Fingerprint(weights=bytes(32), program=bytes(32), layout=layout.digest)
        generator = np.random.default_rng(seed)
        self.memory = [
            _content(spec, generator, values) if fill else np.zeros(spec.nbytes, np.uint8)
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


def tiny_layout(*, capacity_n_tokens: int) -> Layout:
    """One layer of 16 bytes a token: what is left is everything that is not bytes."""
    return Layout(
        tensors=tuple(
            TensorSpec(
                name=f"layers.0.attention.kv_cache.{role}_cache",
                role=role,
                layer=0,
                kind=Kind.FULL,
                dtype="float16",
                shape=(1, capacity_n_tokens, 1, 4),
                token_axis=1,
            )
            for role in ("k", "v")
        )
    )


@cache
def trained_values() -> np.ndarray | None:
    """The demo model's K and V for its prompt, float32 ``[layer, K or V, token, head, dim]``.

    Computed once and kept; None where ExecuTorch is not installed.
    """
    kept = CACHE / "trained-kv.npy"
    if not kept.exists():
        if importlib.util.find_spec("executorch") is None:
            return None
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial.npy")
        np.save(partial, _compute_trained_values())
        partial.replace(kept)
    return np.load(kept)


def _compute_trained_values() -> np.ndarray:
    from importlib.resources import as_file, files

    from runtime_adapter import Model
    from runtime_adapter.commands import demo

    with (
        as_file(files("runtime_adapter") / "demo" / "tiny-llama.pte") as program,
        Model.open(program) as model,
    ):
        prompt = demo.builtin_prompt()
        model.forward(prompt, start=0)
        layers = range(max(spec.layer or 0 for spec in model.layout.tensors) + 1)
        return np.stack(
            [
                np.stack(
                    [
                        view.get(0, len(prompt)).numpy()
                        for view in (model.cache.layer(layer).k, model.cache.layer(layer).v)
                    ]
                )
                for layer in layers
            ]
        )


def _content(
    spec: TensorSpec, generator: np.random.Generator, values: np.ndarray | None
) -> np.ndarray:
    """The bytes of one tensor ``[1, S, head, dim]``."""
    if values is None:
        return _in_dtype(generator.standard_normal(spec.shape, dtype=np.float32), spec.dtype)
    source = values[(spec.layer or 0) % len(values), 0 if spec.role == "k" else 1]
    n_tokens, n_heads, _ = source.shape
    n_slots, n_groups = spec.shape[1], spec.shape[2] // n_heads
    # Each group of heads starts elsewhere in the prompt, and layers that share a source too.
    starts = [
        (group * n_tokens // n_groups + 61 * ((spec.layer or 0) // len(values)))
        for group in range(n_groups)
    ]
    groups = [source[(start + np.arange(n_slots)) % n_tokens] for start in starts]
    return _in_dtype(np.concatenate(groups, axis=1), spec.dtype)


def _in_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 ``values`` as bytes of ``dtype``, to the nearest."""
    values = np.ascontiguousarray(values)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return (rounded >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
    return values.astype(dtype).reshape(-1).view(np.uint8)
