"""The arguments of one instruction, as the operators of ``operators`` read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime_adapter.pte.instructions import MethodGraph, Step

Array = npt.NDArray[Any]
Value = Array | int | float | bool

MAX_N_ELEMENTS = 1 << 22
"""Larger arrays are no bookkeeping of positions."""


class UnreadableError(Exception):
    """An instruction needs what is not known here; never leaves this package."""


class Memory(Protocol):
    """What is known of the values of a call."""

    def read(self, value: int) -> Value:
        """The content of a tensor or scalar; raises UnreadableError if it is not known."""
        ...

    def is_known(self, value: int) -> bool:
        """Whether an instruction made ``value`` known."""
        ...

    def length(self, value: int, axis: int) -> int:
        """The size of ``value`` along ``axis``; raises UnreadableError if it is not known."""
        ...


def bounded(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape``, if an array of it may be made."""
    if any(size < 0 for size in shape) or math.prod(shape) > MAX_N_ELEMENTS:
        raise UnreadableError
    return tuple(shape)


class Call:
    """The arguments of one step, read when they are asked for."""

    def __init__(self, memory: Memory, graph: MethodGraph, step: Step) -> None:
        self._memory = memory
        self._graph = graph
        self.step = step

    def __len__(self) -> int:
        return len(self.step.args)

    def __getitem__(self, index: int) -> Array:
        return np.asarray(self._memory.read(self.step.args[index]))

    def integer(self, index: int, default: int | None = None) -> int:
        """A whole number; ``default`` where the argument is None or missing."""
        if index >= len(self.step.args) or self.is_none(index):
            if default is None:
                raise UnreadableError
            return default
        return int(self[index].item())

    def is_none(self, index: int) -> bool:
        """Whether the argument is an optional one that was left out."""
        value = self.step.args[index]
        scalars = self._graph.scalars
        return value in scalars and scalars[value] is None and not self._memory.is_known(value)

    def items(self, index: int) -> list[Array | None]:
        """The items of a list; None for those that were left out."""
        items = self._graph.lists.get(self.step.args[index])
        if items is None:
            return [self[index]]
        return [None if item < 0 else np.asarray(self._memory.read(item)) for item in items]

    def integers(self, index: int) -> list[int]:
        """A list of whole numbers."""
        found = [item for item in self.items(index) if item is not None]
        return [int(item.item()) for item in found]

    def planned_shape(self) -> tuple[int, ...]:
        """The shape of argument 0, which need not be known."""
        tensor = self._graph.tensors.get(self.step.args[0])
        if tensor is None or tensor.is_dynamic:
            raise UnreadableError
        return tensor.shape

    def length(self) -> int:
        """The size of argument 0 along the axis that argument 1 names."""
        return self._memory.length(self.step.args[0], self.integer(1))
