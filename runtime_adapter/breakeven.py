"""From which length on restoring beats computing, for one model on one disk."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import kvstore
from runtime_adapter.model import Model

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """Seconds to the first token behind ``n_tokens``, three ways; medians.

    ``cold_restore_s`` reads the file from the disk, None where the system cannot be asked to drop
    what it has of it. ``decode_s`` is the part of every way that no store can save.
    """

    n_tokens: int
    prefill_s: float
    restore_s: float
    cold_restore_s: float | None
    decode_s: float


def measure_first_token(
    model: Model, ids: Sequence[int], path: Path, *, codec: str, repeats: int = 3
) -> list[FirstToken]:
    """Computed against restored, for each length that ``ids`` and the cache have room for.

    Makes a store at ``path``, on the disk that is asked about. The cache's content is given up.

    Raises:
        KVStoreError: whatever the model or the store raises.
    """
    most = min(len(ids), model.capacity_n_tokens) - 1
    return [
        _first_token(
            model, list(ids[: n_tokens + 1]), path.with_suffix(f".{n_tokens}"), codec, repeats
        )
        for n_tokens in LENGTHS
        if n_tokens <= most
    ]


def break_even_n_tokens(measured: Sequence[FirstToken], *, is_cold: bool) -> int | None:
    """The least measured length from which on restoring is always faster; None if never."""
    found = None
    for one in reversed(measured):
        restore_s = one.cold_restore_s if is_cold else one.restore_s
        if restore_s is None or restore_s >= one.prefill_s:
            break
        found = one.n_tokens
    return found


def _first_token(model: Model, ids: list[int], path: Path, codec: str, repeats: int) -> FirstToken:
    prefills: list[float] = []
    for _ in range(repeats):
        model.cache.truncate(0)
        began = time.perf_counter()
        model.forward(ids, start=0)
        prefills.append(time.perf_counter() - began)
    model.cache.truncate(0)
    model.forward(ids[:-1], start=0)
    with kvstore.open(path, codec=codec) as store:
        store.save_session(model.cache, ids[:-1])
    restores: list[float] = []
    colds: list[float] = []
    decodes: list[float] = []
    for is_cold in [False, True] * repeats:
        if is_cold and not _forget(path):
            continue
        with kvstore.open(path, codec=codec) as store:
            model.cache.truncate(0)
            began = time.perf_counter()
            hit = store.load_session(model.cache, ids)
            loaded = time.perf_counter()
            model.forward(ids[hit.n_tokens :], start=hit.n_tokens)
            ended = time.perf_counter()
        decodes.append(ended - loaded)
        (colds if is_cold else restores).append(ended - began)
    return FirstToken(
        n_tokens=len(ids) - 1,
        prefill_s=statistics.median(prefills),
        restore_s=statistics.median(restores),
        cold_restore_s=statistics.median(colds) if colds else None,
        decode_s=statistics.median(decodes),
    )


def _forget(path: Path) -> bool:
    """Let the system drop what it has of the file in memory; nobody has it open."""
    if not hasattr(os, "posix_fadvise"):
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return True
