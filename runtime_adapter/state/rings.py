"""Rings of a method: their slots, their sink and their window, asked of its own arithmetic.

A ring of ``capacity`` slots keeps the first ``sink`` positions for ever;
position ``p`` above lies in slot ``sink + (p - sink) mod (capacity - sink)``. All
that is believed here was computed from the method's instructions at many
positions and compared with that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from runtime_adapter.state.arithmetic import Arithmetic, Array, Value

_FAR = (1 << 20) + 3
# A mask is 0 where a query sees a slot, and minus infinity or a large number elsewhere.
_MASKED_BELOW = -1.0


def ring_slot(position: int, *, capacity: int, sink: int) -> int:
    """The slot of ``position``."""
    return position if position < sink else sink + (position - sink) % (capacity - sink)


def held_positions(n_tokens: int, *, capacity: int, sink: int) -> list[int]:
    """What each slot holds after ``n_tokens``: a position, or -1."""
    slots = [-1] * capacity
    for position in (*range(min(sink, n_tokens)), *range(max(sink, n_tokens - capacity), n_tokens)):
        slots[ring_slot(position, capacity=capacity, sink=sink)] = position
    return slots


def is_position(arithmetic: Arithmetic, value: int) -> bool:
    """Whether ``value`` is the position of each token of a call, or of the first."""
    return all(_ask(arithmetic, value, start, 1) == [start] for start in (0, 1, 7, _FAR))


def read_sink(arithmetic: Arithmetic, slot: int, *, capacity: int) -> int | None:
    """The sink (0 for a plain ring) of the ring whose slots ``slot`` says; None if it is no ring.

    The position after the last slot is the first that goes back behind the sink.
    """
    first = _ask(arithmetic, slot, capacity, 1)
    if first is None or len(first) != 1 or not 0 <= first[0] < capacity:
        return None
    sink = first[0]
    ring = capacity - sink
    starts = {0, 1, sink, sink + 1, ring, capacity - 1, capacity, capacity + ring, _FAR}
    calls = [(start, 1) for start in starts]
    n_tokens = min(arithmetic.max_n_tokens, ring)
    if n_tokens > 1:
        calls += [(start, n_tokens) for start in (0, capacity - 1, capacity + ring - 1, _FAR)]
    for start, length in calls:
        expected = [
            ring_slot(start + index, capacity=capacity, sink=sink) for index in range(length)
        ]
        if _ask(arithmetic, slot, start, length) != expected:
            return None
    return sink


def read_windows(
    arithmetic: Arithmetic, rings: Mapping[int, tuple[int, int]]
) -> dict[int, int | None]:
    """How many positions a query sees, itself included, by the ring's bookkeeping tensor.

    ``rings`` has ``(capacity, sink)`` of each bookkeeping tensor (int ``[capacity]``).
    None where no mask was found, or one that is not a window behind a sink.
    """
    seen: dict[int, dict[int, set[int] | None]] = {value: {} for value in rings}
    for n_tokens in sorted(_lengths(rings.values())):
        state = {
            value: np.array(held_positions(n_tokens, capacity=capacity, sink=sink), dtype=np.int64)
            for value, (capacity, sink) in rings.items()
        }
        values = arithmetic.run(n_tokens, 1, state=state)
        masks = _masks(arithmetic, values, rings)
        for value in rings:
            seen[value][n_tokens] = _visible(values, value, masks[value])
    return {
        value: _window(seen[value], capacity=capacity, sink=sink)
        for value, (capacity, sink) in rings.items()
    }


def _lengths(rings: Iterable[tuple[int, int]]) -> set[int]:
    lengths = {0, 1}
    for capacity, sink in rings:
        ring = capacity - sink
        lengths |= {sink, sink + 1, ring // 2, ring // 2 + 1, capacity, capacity + ring // 2 + 3}
        lengths.add(3 * capacity + 7)
    return lengths


def _ask(arithmetic: Arithmetic, value: int, start: int, n_tokens: int) -> list[int] | None:
    flow = arithmetic.flow
    values = arithmetic.run(start, n_tokens)
    found: Value | None = values.get(value)
    if found is None:
        found = arithmetic.input_value(flow.resolve(value), start=start, n_tokens=n_tokens)
    if found is None:
        found = arithmetic.constant(value)
    return None if found is None else [int(item) for item in np.asarray(found).reshape(-1)]


def _masks(
    arithmetic: Arithmetic, values: Mapping[int, Value], rings: Mapping[int, tuple[int, int]]
) -> dict[int, list[int]]:
    """Per ring the masks made of its bookkeeping: the last values before content comes in."""
    flow = arithmetic.flow
    graph = flow.graph
    found: dict[int, list[int]] = {value: [] for value in rings}
    for step in graph.steps:
        if all(value in values for value in step.writes) and step.writes:
            continue
        for value in graph.expand(step.args):
            tensor = graph.tensors.get(value)
            if value not in values or tensor is None or value in flow.live_in:
                continue
            if tensor.dtype.startswith(("int", "uint")):
                continue
            owners = flow.depends_on(value)[1] & rings.keys()
            for owner in owners:
                array = np.asarray(values[value])
                if array.shape[-1:] == (rings[owner][0],) and array.size == rings[owner][0]:
                    found[owner].append(value)
    return found


def _visible(values: Mapping[int, Value], ring: int, masks: Sequence[int]) -> set[int] | None:
    """The positions that a query sees."""
    if not masks or ring not in values:
        return None
    held = np.asarray(values[ring])
    seen = np.zeros(held.shape, dtype=bool)
    for mask in masks:
        content: Array = np.asarray(values[mask]).reshape(-1)
        seen |= content if content.dtype == np.bool_ else content > _MASKED_BELOW
    return {int(position) for position in held[seen]}


def _window(seen: Mapping[int, set[int] | None], *, capacity: int, sink: int) -> int | None:
    """The window that explains all that was seen, or None."""
    longest = max(seen)
    last = seen[longest]
    behind = {position for position in last or () if position >= sink}
    if not behind:
        return None
    window = min(longest - min(behind) + 1, capacity - sink)
    for n_tokens, positions in seen.items():
        expected = {
            position
            for position in range(n_tokens + 1)
            if position < sink or position > n_tokens - window
        }
        if positions != expected:
            return None
    return window
