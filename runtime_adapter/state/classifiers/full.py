"""Full tensors: one slot a token for ever, at the position that the caller passes."""

from __future__ import annotations

from kvstore import Kind
from runtime_adapter.state.classifiers.base import Evidence, Verdict
from runtime_adapter.state.rings import is_position

WRAPS = frozenset(
    {"aten::remainder", "aten::fmod", "aten::bitwise_and", "aten::where", "executorch_prim::mod"}
)
"""Operators that can make another slot of a position; without them a slot is a position."""


def classify_full(evidence: Evidence, value: int) -> Verdict | None:
    """Every update writes slots along one axis, each at its token's position."""
    writes = evidence.writes(value)
    if writes is None:
        return None
    axes = {write.axis for write in writes}
    if len(axes) != 1:
        return None
    for write in writes:
        ops, leaves = evidence.flow.depends_on(write.slot)
        if ops & WRAPS and not is_position(evidence.arithmetic, write.slot):
            return None
        if not leaves & set(evidence.flow.graph.inputs):
            return None
    return Verdict(
        kind=Kind.FULL,
        token_axis=axes.pop(),
        position=min(write.position for write in writes),
    )
