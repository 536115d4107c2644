"""A still picture of a live cache: copies only of what computing on overwrites."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore import Held, Lineage, LiveCache
from kvstore.errors import InputError
from kvstore.layout import Fingerprint, Layout


class Still:
    """A cache as it is now: to go back to, or to save on another thread (a ``LiveCache``).

    Computing on leaves the slots of tokens that are held as they are in full tensors, so these
    are not copied; rings and recurrent state are. No longer true once the cache goes
    back to before it.
    """

    def __init__(self, cache: LiveCache) -> None:
        """Copy what the next step will overwrite."""
        self._layout = cache.layout
        self._fingerprint = cache.fingerprint
        self._tokens = tuple(cache.tokens)
        self._held = cache.held
        self._edits = cache.edits
        self._capacity_n_tokens = cache.capacity_n_tokens
        self._buffers = [
            cache.buffer(index)
            if spec.kind.rules.is_whole
            else memoryview(bytearray(cache.buffer(index)))
            for index, spec in enumerate(cache.layout.tensors)
        ]

    @property
    def fingerprint(self) -> Fingerprint:
        """Which model it belongs to."""
        return self._fingerprint

    @property
    def layout(self) -> Layout:
        """The tensors."""
        return self._layout

    @property
    def tokens(self) -> Sequence[int]:
        """The token ids that it holds."""
        return self._tokens

    @property
    def held(self) -> Held:
        """How the cache came to hold them."""
        return self._held

    @property
    def capacity_n_tokens(self) -> int:
        """Number of tokens that the cache has room for."""
        return self._capacity_n_tokens

    @property
    def edits(self) -> Lineage:
        """Where the content was not what the model computes."""
        return self._edits

    def buffer(self, index: int) -> memoryview:
        """Bytes of tensor ``index``."""
        return self._buffers[index]

    def truncate(self, n_tokens: int) -> None:
        """Never: it is there to be read.

        Raises:
            InputError: always.
        """
        raise InputError(f"expected a live cache to cut to {n_tokens} tokens, found a still one")

    def adopt(self, tokens: Sequence[int], edits: Lineage = ()) -> None:
        """Never: it is there to be read.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"expected a live cache for {len(tokens)} tokens with {len(edits)} edits, found a "
            "still one"
        )
