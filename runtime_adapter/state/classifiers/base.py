"""What every classifier gets and gives: one method's facts in, a verdict on one tensor out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from kvstore import Kind
from runtime_adapter.pte.instructions import TensorValue
from runtime_adapter.state.arithmetic import Arithmetic
from runtime_adapter.state.dataflow import Dataflow
from runtime_adapter.state.slots import SlotWrite, slot_writes

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a classifier found: a kind and what belongs to it, or the reason for a refusal.

    ``window_n_tokens`` and ``sink_n_tokens`` are a ring's. ``note`` says what a
    person should know about how the tensor is kept.
    """

    kind: Kind | None = None
    token_axis: int | None = None
    window_n_tokens: int = 0
    sink_n_tokens: int = 0
    reason: str | None = None
    note: str | None = None
    position: int = 0
    """The step that updates the tensor first."""


class Evidence:
    """The method that a tensor belongs to, and what several classifiers need of it."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self._writes: dict[int, tuple[SlotWrite, ...] | None] = {}
        self._made: dict[Any, Any] = {}

    def once(self, make: Callable[[Evidence], T]) -> T:
        """``make(self)``, made at the first call only."""
        if make not in self._made:
            self._made[make] = make(self)
        made: T = self._made[make]
        return made

    @cached_property
    def arithmetic(self) -> Arithmetic:
        """What the method computes from positions."""
        return Arithmetic(self.flow)

    def tensor(self, value: int) -> TensorValue:
        """The tensor of ``value``."""
        return self.flow.graph.tensors[value]

    def writes(self, value: int) -> tuple[SlotWrite, ...] | None:
        """How each update of ``value`` writes slots of it; None if one rewrites it as a whole."""
        if value not in self._writes:
            self._writes[value] = slot_writes(self.flow, value)
        return self._writes[value]

    def update_position(self, value: int) -> int:
        """The step that updates ``value`` first."""
        writes = self.writes(value)
        if writes:
            return min(write.position for write in writes)
        return min((step.position for step in self.flow.updates.get(value, ())), default=0)


Classifier = Callable[[Evidence, int], Verdict | None]
"""A verdict on one persistent tensor, or None if it is of another kind."""
