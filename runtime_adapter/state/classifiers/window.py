"""Ring tensors: slots are used again, so only the last positions (and a sink) are there."""

from __future__ import annotations

from kvstore import Kind
from runtime_adapter.state.classifiers.base import Evidence, Verdict
from runtime_adapter.state.classifiers.full import WRAPS
from runtime_adapter.state.classifiers.positions import Bookkeeping
from runtime_adapter.state.rings import read_sink

WHOLE_RING = "its window cannot be read from the mask: the whole ring is kept"


def classify_window(evidence: Evidence, value: int) -> Verdict | None:
    """Every update writes slots along one axis, each at its token's place in the same ring."""
    writes = evidence.writes(value)
    tensor = evidence.tensor(value)
    if writes is None or len({write.axis for write in writes}) != 1:
        return None
    axis = writes[0].axis
    if not 0 <= axis < len(tensor.shape):
        return None
    capacity = tensor.shape[axis]
    sinks: set[int | None] = set()
    for write in writes:
        ops, _ = evidence.flow.depends_on(write.slot)
        if not ops & WRAPS:
            return None
        sinks.add(read_sink(evidence.arithmetic, write.slot, capacity=capacity))
    sink = sinks.pop()
    if sinks or sink is None:
        return None
    position = min(write.position for write in writes)
    window = evidence.once(Bookkeeping).window_before(position, capacity=capacity, sink=sink)
    return Verdict(
        kind=Kind.WINDOW,
        token_axis=axis,
        window_n_tokens=window or capacity - sink,
        sink_n_tokens=sink,
        note=None if window else WHOLE_RING,
        position=position,
    )
