"""The naive side of the store's tests: caches computed slot by slot, and what must be in them."""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kvstore
from kvstore import Fingerprint, Layout, LoadResult
from tests.fakes import BytesCache, layout


def computed(
    tokens: Sequence[int], cache_layout: Layout | None = None, *, weights: str = "weights"
) -> BytesCache:
    """A cache that the model has just computed ``tokens`` in."""
    cache = BytesCache(cache_layout, weights=weights)
    cache.compute(tokens)
    return cache


def save(store: kvstore.Store, tokens: Sequence[int], **options: Any) -> kvstore.SaveResult:
    """Compute ``tokens`` in a new cache of the default layout and save them."""
    return store.save_session(computed(tokens), tokens, **options)


def assert_exact(cache: BytesCache, tokens: Sequence[int]) -> None:
    """The cache holds ``tokens``, and every used byte is what computing them gives."""
    assert list(cache.tokens) == list(tokens)
    assert cache.used() == _expected(cache.layout, cache.fingerprint, tuple(tokens))


@functools.lru_cache(maxsize=512)
def _expected(
    cache_layout: Layout, fingerprint: Fingerprint, tokens: tuple[int, ...]
) -> list[list[bytes]]:
    expected = BytesCache(cache_layout)
    expected.fingerprint = fingerprint
    expected.compute(tokens)
    return expected.used()


def load_exact(
    store: kvstore.Store,
    tokens: Sequence[int] | None = None,
    *,
    name: str | None = None,
    cache: BytesCache | None = None,
) -> LoadResult:
    """Load, and check that the cache holds exactly what the result says, byte for byte."""
    cache = cache or BytesCache()
    result = store.load_session(cache, tokens, name=name)
    assert_exact(cache, result.tokens[: result.n_tokens])
    assert result.n_tokens <= result.n_requested - 1
    assert (result.reason is None) == (result.n_tokens == result.n_requested - 1)
    return result


@contextmanager
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    """The file behind kvstore's back: no foreign keys, no checks."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        yield connection
    finally:
        connection.close()


def count(path: Path, query: str) -> int:
    """The single number that ``query`` gives."""
    with raw(path) as connection:
        return int(connection.execute(query).fetchone()[0])


def big_layout(**options: Any) -> Layout:
    """Room for 2,048 tokens."""
    return layout(**{"capacity_n_tokens": 2048, "n_layers": 1, "n_kv_heads": 1, **options})
