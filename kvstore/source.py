"""Where a save takes a cache's bytes from: the live cache, or a snapshot of it."""

from __future__ import annotations

from typing import Protocol

from kvstore import regions
from kvstore.kinds import Held
from kvstore.layout import Fingerprint, Layout, LiveCache


class Source(Protocol):
    """What a save asks of a cache."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Which model it belongs to."""
        ...

    @property
    def layout(self) -> Layout:
        """The tensors, in the order of ``read``'s index."""
        ...

    @property
    def held(self) -> Held:
        """How it came to hold what it holds."""
        ...

    def read(self, tensor: int, start: int, stop: int) -> memoryview:
        """The bytes of positions ``[start, stop)`` of a tensor, token-major; maybe in place."""
        ...


class LiveSource:
    """A live cache, read where it lies: nothing else may change it meanwhile."""

    def __init__(self, cache: LiveCache) -> None:
        self._cache = cache

    @property
    def fingerprint(self) -> Fingerprint:
        """Which model it belongs to."""
        return self._cache.fingerprint

    @property
    def layout(self) -> Layout:
        """The tensors."""
        return self._cache.layout

    @property
    def held(self) -> Held:
        """How it came to hold what it holds."""
        return self._cache.held

    def read(self, tensor: int, start: int, stop: int) -> memoryview:
        """The bytes of positions ``[start, stop)``; a view where that is one run."""
        spec = self._cache.layout.tensors[tensor]
        return regions.gather(spec, self._cache.buffer(tensor), start, stop)

    def copy(self, tensor: int, start: int, stop: int) -> memoryview:
        """The same in memory of its own."""
        spec = self._cache.layout.tensors[tensor]
        return regions.copy(spec, self._cache.buffer(tensor), start, stop)
