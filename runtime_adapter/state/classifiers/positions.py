"""A ring's bookkeeping: which position each slot holds. Derived from the length, never stored."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore import Kind
from runtime_adapter.state.classifiers.base import Evidence, Verdict
from runtime_adapter.state.rings import is_position, read_sink, read_windows
from runtime_adapter.state.slots import last_indexed_write

_INTEGERS = frozenset({"int64", "int32"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    """One bookkeeping tensor, int ``[capacity]``; ``window`` is None where no mask tells it."""

    value: int
    capacity: int
    sink: int
    window: int | None
    position: int
    """The step that writes the new positions into it."""


class Bookkeeping:
    """All bookkeeping tensors of a method."""

    def __init__(self, evidence: Evidence) -> None:
        found: dict[int, tuple[int, int, int]] = {}
        for value in evidence.flow.live_in:
            book = _read(evidence, value)
            if book is not None:
                found[value] = book
        rings = {value: (capacity, sink) for value, (capacity, sink, _) in found.items()}
        windows = read_windows(evidence.arithmetic, rings) if rings else {}
        self.books: dict[int, Book] = {
            value: Book(
                value=value,
                capacity=capacity,
                sink=sink,
                window=windows[value],
                position=position,
            )
            for value, (capacity, sink, position) in found.items()
        }

    def window_before(self, position: int, *, capacity: int, sink: int) -> int | None:
        """The window of the ring that is written at step ``position``.

        Each layer writes its bookkeeping right before its keys and values.
        """
        same = [
            book for book in self.books.values() if (book.capacity, book.sink) == (capacity, sink)
        ]
        before = [book for book in same if book.position <= position]
        if before:
            return max(before, key=lambda book: book.position).window
        return min(same, key=lambda book: book.position).window if same else None


def _read(evidence: Evidence, value: int) -> tuple[int, int, int] | None:
    """``(capacity, sink, step)`` if ``value`` is bookkeeping."""
    tensor = evidence.tensor(value)
    if len(tensor.shape) != 1 or tensor.dtype not in _INTEGERS:
        return None
    writes = [
        write
        for step in evidence.flow.updates.get(value, ())
        if (write := last_indexed_write(evidence.flow, step)) is not None
    ]
    for write in writes:
        if write.content is None or not is_position(evidence.arithmetic, write.content):
            continue
        sink = read_sink(evidence.arithmetic, write.slot, capacity=tensor.shape[0])
        if sink is not None:
            return tensor.shape[0], sink, write.position
    return None


def classify_positions(evidence: Evidence, value: int) -> Verdict | None:
    """An int tensor ``[capacity]`` into whose ring slots the tokens' positions are written."""
    book = evidence.once(Bookkeeping).books.get(value)
    if book is None:
        return None
    return Verdict(
        kind=Kind.POSITIONS,
        token_axis=0,
        window_n_tokens=book.window or book.capacity - book.sink,
        sink_n_tokens=book.sink,
        position=book.position,
    )
