"""Caches of Hugging Face's transformers: ``StaticCache`` in place, ``DynamicCache`` by a copy.

Layers with full attention, batch size 1, on the CPU. Sliding-window layers of transformers move
their content at every step, so they are refused. Tested with transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kvstore import Lineage, token_ids
from kvstore.errors import CacheMismatchError, InputError
from runtime_adapter.caches.identity import ModelFingerprint
from runtime_adapter.caches.tensors import TensorCache

if TYPE_CHECKING:
    import torch

_TOKEN_AXIS = 2  # [batch, kv_heads, tokens, head_dim]


class StaticHuggingFaceCache(TensorCache):
    """A ``transformers.StaticCache`` as a ``LiveCache``; its tensors are shared, not copied.

    Call ``extend(tokens)`` after each call of the model. A load or a ``truncate`` sets the
    length that the layers count, so the model can go on at once.
    """

    __slots__ = ("_cache",)

    def __init__(self, cache: Any, *, fingerprint: ModelFingerprint) -> None:
        """Take an empty cache whose memory exists: call its ``early_initialization`` first.

        Raises:
            InputError: it is another kind of cache, has sliding or recurrent layers, has no
                memory yet, holds tokens already, or has another batch size than 1.
        """
        layers = _layers(cache, kind="StaticLayer")
        if not all(layer.is_initialized for layer in layers):
            raise InputError(
                "StaticCache: expected layers that have their memory, found some without; call "
                "cache.early_initialization(batch_size=1, ...) before"
            )
        if any(int(layer.get_seq_length()) for layer in layers):
            raise InputError("StaticCache: expected an empty cache; call cache.reset() before")
        tensors = {name: getattr(layer, part) for name, layer, part in _parts(layers)}
        made = TensorCache.from_tensors(tensors, token_axis=_TOKEN_AXIS, fingerprint=fingerprint)
        super().__init__(tensors, specs=made.layout.tensors, fingerprint=fingerprint)
        self._cache = cache

    def truncate(self, n_tokens: int) -> None:
        """As ``LiveTensors.truncate``, and the layers count as many."""
        super().truncate(n_tokens)
        self._set_length()

    def adopt(self, tokens: Sequence[int], edits: Lineage = ()) -> None:
        """As ``LiveTensors.adopt``, and the layers count as many."""
        super().adopt(tokens, edits)
        self._set_length()

    def _set_length(self) -> None:
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self.n_tokens)


class DynamicHuggingFaceCache(TensorCache):
    """A ``transformers.DynamicCache`` as a ``LiveCache``.

    Such a cache makes new tensors at every step, by concatenation; there is no memory that a
    store could write into. So this keeps its own, with room for ``capacity_n_tokens``:
    ``extend(tokens)``, after each call of the model, copies the new keys and values
    into it, and a load or ``truncate`` gives the layers tensors of the right length.
    Pages that were never written cost no memory.
    """

    __slots__ = ("_cache",)

    def __init__(
        self,
        cache: Any,
        *,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        capacity_n_tokens: int,
        fingerprint: ModelFingerprint,
    ) -> None:
        """Take an empty cache of a model of that shape, which an empty cache does not know.

        ``capacity_n_tokens`` is part of the layout: processes that share sessions use the same.

        Raises:
            InputError: it is another kind of cache, has sliding or recurrent layers, or
                holds tokens already.
        """
        import torch

        make_layer = getattr(cache, "layer_class_to_replicate", None)
        while make_layer is not None and len(cache.layers) < n_layers:
            cache.layers.append(make_layer())  # as the model itself does at its first call
        layers = _layers(cache, kind="DynamicLayer")
        if len(layers) != n_layers or any(layer.get_seq_length() for layer in layers):
            raise InputError(
                f"DynamicCache: expected an empty cache of {n_layers} layers, found "
                f"{len(layers)} layers of {layers[0].get_seq_length()} tokens; pass a new one"
            )
        shape = (1, n_kv_heads, capacity_n_tokens, head_dim)
        tensors = {name: torch.zeros(shape, dtype=dtype) for name, _, _ in _parts(layers)}
        made = TensorCache.from_tensors(tensors, token_axis=_TOKEN_AXIS, fingerprint=fingerprint)
        super().__init__(tensors, specs=made.layout.tensors, fingerprint=fingerprint)
        self._cache = cache

    def extend(self, tokens: Sequence[int], *, logits: torch.Tensor | None = None) -> None:
        """Copy what the model computed for ``tokens``, which it has just been called with.

        Raises:
            CacheMismatchError: the layers hold another number of tokens.
            CapacityError, TokensError: as ``TensorCache.extend``.
        """
        ids, start = token_ids(tokens), self.n_tokens
        stop = start + len(ids)
        for name, layer, part in _parts(self._cache.layers):
            made, live = getattr(layer, part), self._views[name]
            expected = (*live.shape[:2], stop, live.shape[3])
            if made is None or tuple(made.shape) != expected or made.dtype != live.dtype:
                found = None if made is None else f"{made.dtype} {list(made.shape)}"
                raise CacheMismatchError(
                    f"{name}: expected {live.dtype} {list(expected)} after {stop} tokens, found "
                    f"{found}; call extend after each call of the model, with its tokens"
                )
        super().extend(ids, logits=logits)
        for name, layer, part in _parts(self._cache.layers):
            self._views[name][:, :, start:stop] = getattr(layer, part)[:, :, start:stop].detach()

    def truncate(self, n_tokens: int) -> None:
        """As ``LiveTensors.truncate``, and the layers hold as many."""
        super().truncate(n_tokens)
        self._hand_out()

    def adopt(self, tokens: Sequence[int], edits: Lineage = ()) -> None:
        """As ``LiveTensors.adopt``, and the layers hold as many."""
        super().adopt(tokens, edits)
        self._hand_out()

    def _hand_out(self) -> None:
        """Give the layers tensors of their own, as long as what is held."""
        for layer in self._cache.layers:
            layer.reset()
        if not self.n_tokens:
            return
        for name, layer, part in _parts(self._cache.layers):
            held = self._views[name][:, :, : self.n_tokens].clone()
            if not layer.is_initialized:
                layer.lazy_initialization(held, held)
            setattr(layer, part, held)


def _layers(cache: Any, *, kind: str) -> list[Any]:
    """The layers of ``cache``, all of class ``kind``."""
    layers = list(getattr(cache, "layers", ()))
    found = sorted({type(layer).__name__ for layer in layers} - {kind})
    if not layers or found:
        raise InputError(
            f"expected a transformers cache whose layers are {kind}, found "
            f"{', '.join(found) or type(cache).__name__}; models with sliding windows or "
            "recurrent layers are served through ExecuTorch programs"
        )
    return layers


def _parts(layers: Iterable[Any]) -> Iterable[tuple[str, Any, str]]:
    """``(tensor name, layer, attribute)`` of each key and value tensor, layer by layer."""
    for number, layer in enumerate(layers):
        yield f"layers.{number}.k", layer, "keys"
        yield f"layers.{number}.v", layer, "values"
