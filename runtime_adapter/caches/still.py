"""A still picture of a live cache: copies only of what computing on overwrites."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore import Held, LiveCache
from kvstore.errors import InputError
from kvstore.layout import UNLIMITED_N_TOKENS, Fingerprint, Layout


class Still:
    """A cache as it is now: to go back to, or to save on another thread (a ``LiveCache``).

    Computing on leaves the slots of tokens that are held as they are in full tensors, so these
    are not copied; rings and recurrent state are. No longer true once the cache goes
    back to before it.
    """

    def __init__(self, cache: LiveCache, *, n_tokens: int | None = None) -> None:
        """Copy what the next step will overwrite.

        With ``n_tokens``, it is a picture of the first ones of a cache that is exact that far;
        of rings and recurrent state it then has nothing.
        """
        self._layout = cache.layout
        self._fingerprint = cache.fingerprint
        self._tokens = tuple(cache.tokens[:n_tokens])
        self._held = cache.held
        self._taint = cache.taint
        if n_tokens is not None:
            gone = UNLIMITED_N_TOKENS  # whatever a ring held of these was overwritten since
            self._held = Held(n_tokens=n_tokens, peak_n_tokens=gone)
            self._taint = None
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
    def taint(self) -> str | None:
        """Why the content was no longer exact, or None."""
        return self._taint

    def buffer(self, index: int) -> memoryview:
        """Bytes of tensor ``index``."""
        return self._buffers[index]

    def truncate(self, n_tokens: int) -> None:
        """Never: it is there to be read.

        Raises:
            InputError: always.
        """
        raise InputError(f"expected a live cache to cut to {n_tokens} tokens, found a still one")

    def adopt(self, tokens: Sequence[int]) -> None:
        """Never: it is there to be read.

        Raises:
            InputError: always.
        """
        raise InputError(f"expected a live cache for {len(tokens)} tokens, found a still one")
