"""One conversation over many turns, and its continuation from any of them, also in a new process.

A journey forwards the same tokens in the same pieces, turn by turn; the length after
each turn is a stop. What the next step can read at a stop is compared byte for byte, the
logits of every later turn number for number.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvstore
from kvstore import Kind
from runtime_adapter import Model
from tests.fakes import naive_is_visible, naive_slot, read_slot

CHUNK_N_TOKENS = 16


@dataclass
class Record:
    """What was seen: logits by the length after them, visible bytes by the length."""

    logits: dict[int, Any] = field(default_factory=dict)
    visible: dict[int, dict[str, Any]] = field(default_factory=dict)


def stops_of(model: Model) -> list[int]:
    """Lengths before, at and long after the wrap of every ring; the last turns are single steps."""
    stops = {5, 40, 41, 75, 90}
    for spec in model.layout.tensors:
        if spec.kind is Kind.WINDOW:
            window, sink = spec.window_n_tokens, spec.sink_n_tokens
            ring = spec.capacity_n_tokens - sink
            stops |= {sink + window // 2, window, sink + window, sink + ring - 1, sink + ring}
            stops |= {sink + ring + 1, 2 * ring + 3, sink + 3 * ring + window // 2}
    last = max(stops)
    return sorted({*stops, last + 1, last + 2, last + 3})


def tokens_of(stops: Sequence[int], *, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 96, stops[-1] + 1)]


def go_on(model: Model, tokens: Sequence[int], stops: Sequence[int], record: Record) -> None:
    """Forward from where the cache is, which is 0 or a stop, to the last stop."""
    turns = [
        (start, stop) for start, stop in pairwise([0, *stops]) if start >= model.cache.n_tokens
    ]
    for start, stop in turns:
        record.logits[stop] = model.forward(tokens[start:stop], start=start)
        record.visible[stop] = visible(model)


def visible(model: Model) -> dict[str, Any]:
    """Every byte that the next step can read, by tensor; computed position by position."""
    n_tokens = model.cache.n_tokens
    found: dict[str, Any] = {}
    for index, spec in enumerate(model.layout.tensors):
        memory = bytearray(model.cache.buffer(index))
        positions = [
            position
            for position in range(n_tokens)
            if spec.kind is Kind.FULL or naive_is_visible(spec, position, query=n_tokens)
        ]
        if spec.kind is Kind.CHECKPOINT:
            found[spec.name] = bytes(memory)
        elif spec.kind is Kind.POSITIONS:
            held = array("q", bytes(memory))
            found[spec.name] = [held[naive_slot(spec, position)] for position in positions]
            assert found[spec.name] == positions
        else:
            found[spec.name] = [
                read_slot(spec, memory, naive_slot(spec, position)) for position in positions
            ]
    return found


def resume(path: Path, db: Path, orders: Sequence[int], *, data_path: Path | None = None) -> Any:
    """Per stop in ``orders``: what loading up to it restored, and the rest of the journey.

    The model is never emptied between two stops: a load goes back and forth by itself.
    """
    found = []
    with (
        Model.open(path, data_path=data_path) as model,
        kvstore.open(db, chunk_n_tokens=CHUNK_N_TOKENS) as store,
    ):
        stops = stops_of(model)
        tokens = tokens_of(stops)
        for stop in orders:
            # One more token, which nothing stored goes on with: the load ends at the stop.
            other = (tokens[stop] + 1) % 96
            hit = store.load_session(model.cache, [*tokens[:stop], other])
            record = Record()
            if hit.n_tokens == stop:
                record.visible[stop] = visible(model)
                go_on(model, tokens, stops, record)
            found.append((stop, hit.n_tokens, hit.reason and str(hit.reason), record))
    return found


def main() -> None:
    """In the new process: program, its data or nothing, store, file for what was found, stops."""
    path, data, db, result, *orders = sys.argv[1:]
    data_path = Path(data) if data else None
    stops = [int(stop) for stop in orders]
    torch.save(resume(Path(path), Path(db), stops, data_path=data_path), result)
