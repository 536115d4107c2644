"""Bases in memory: decoded once, found by digest again; what is found so is never stale."""

from __future__ import annotations

import sqlite3
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TypeAlias

from kvstore.codec import Basis, BasisLookup, block_of
from kvstore.db import bases
from kvstore.errors import CorruptStoreError, DecodeError
from kvstore.layout import TensorSpec

_MAX_NBYTES = 256 << 20

_Place: TypeAlias = tuple[int, int, int, bytes]
"""Key space, tensor, numbers a token, digest: row numbers may be given out again."""


@dataclass(slots=True, eq=False)
class BasisCache:
    """Decoded bases, at most ``max_nbytes`` of them in memory; the least recently used go.

    Safe to share between threads. ``futile`` names tensors, by root key, of whose content nothing
    could be learned: one attempt is enough.
    """

    max_nbytes: int = _MAX_NBYTES
    futile: set[tuple[bytes, int]] = field(default_factory=set)
    _found: OrderedDict[_Place, Basis] = field(default_factory=OrderedDict)
    _nbytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of_space(self, space_id: int) -> SpaceBases:
        """The bases of one key space."""
        return SpaceBases(cache=self, space_id=space_id)

    def get(self, place: _Place) -> Basis | None:
        """The basis of that digest there, if it is in memory."""
        with self._lock:
            if place not in self._found:
                return None
            self._found.move_to_end(place)
            return self._found[place]

    def put(self, place: _Place, basis: Basis) -> None:
        """Keep a basis; one that is larger than the limit is kept alone."""
        with self._lock:
            if place not in self._found:
                self._found[place] = basis
                self._nbytes += _nbytes(basis)
            while self._nbytes > self.max_nbytes and len(self._found) > 1:
                _, gone = self._found.popitem(last=False)
                self._nbytes -= _nbytes(gone)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceBases:
    """The bases of one key space, by tensor.

    It keeps what was asked for as long as it lives, whatever the cache lets go: who uses
    it for one load decodes each once.
    """

    cache: BasisCache
    space_id: int
    _used: dict[_Place, Basis] = field(default_factory=dict)

    def lookup(self, driver: sqlite3.Connection, tensor: int, spec: TensorSpec) -> BasisLookup:
        """What finds the basis that a blob of that tensor names, reading on ``driver`` if it must.

        It raises ``CorruptStoreError`` where that one is missing or damaged.
        """

        def find(digest: bytes) -> Basis:
            place = self.space_id, tensor, _n_channels(spec), digest
            basis = self._used.get(place) or self.cache.get(place)
            if basis is None:
                basis = self.read(driver, tensor, spec)
            if basis.digest != digest:
                raise CorruptStoreError(
                    f"its basis {digest.hex()[:12]} is missing, there is another one"
                )
            self._used[place] = basis
            return basis

        return find

    def read(self, driver: sqlite3.Connection, tensor: int, spec: TensorSpec) -> Basis:
        """The tensor's basis, from the file.

        Raises:
            CorruptStoreError: it is missing or damaged.
        """
        n_channels = _n_channels(spec)
        digest, data = bases.read(driver, self.space_id, tensor)
        try:
            basis = Basis.from_bytes(memoryview(data), n_channels)
        except DecodeError as error:
            raise CorruptStoreError(f"its basis is damaged: {error}") from error
        if basis.digest != digest:
            raise CorruptStoreError("its basis is damaged: the digest is not that of its bytes")
        self.cache.put((self.space_id, tensor, n_channels, digest), basis)
        return basis


def _nbytes(basis: Basis) -> int:
    """What it takes in memory: compressed it may be a small part of that."""
    return len(basis.axes) + len(basis.mean) + len(basis.tops)


def _n_channels(spec: TensorSpec) -> int:
    return block_of(spec, 0, 1).n_channels
