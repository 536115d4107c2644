"""Where a method's values come from and go to: aliases, live-in tensors, producers, consumers.

Pure: a ``MethodGraph`` in, values out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from runtime_adapter.pte.instructions import MethodGraph, Step, TensorValue

_ITEMSIZE = {"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "float16": 2, "bfloat16": 2}


class Dataflow:
    """The data flow of one method, walked once in instruction order.

    Invariants: ``root`` maps every tensor that shares another one's memory to the
    tensor that owns it, and nothing else; ``live_in`` is in value order;
    ``steps`` have aliases replaced by their roots and lists by their items.
    """

    def __init__(self, graph: MethodGraph) -> None:
        self.graph = graph
        self.root: dict[int, int] = {}
        self.producer: dict[int, Step] = {}
        """The step that wrote a value last; persistent tensors are here if a copy ends in them."""
        self.consumers: dict[int, list[Step]] = defaultdict(list)
        self.updates: dict[int, list[Step]] = defaultdict(list)
        """Steps that change a tensor in place or copy into it, by root."""
        self._written: set[int] = set(graph.inputs)
        self._occupant: dict[tuple[int, int], int] = {}
        self._candidates: dict[int, None] = {}
        for value in graph.inputs:
            self._occupy(value)
        for step in graph.steps:
            self._walk(step)
        self.live_in: tuple[int, ...] = tuple(
            sorted(value for value in self._candidates if self._is_state(value))
        )

    def resolve(self, value: int) -> int:
        """The value that owns the memory of ``value``."""
        while value in self.root:
            value = self.root[value]
        return value

    def resolved(self, values: Sequence[int]) -> list[int]:
        """Each of ``values`` with aliases replaced by their owners."""
        return [self.resolve(value) for value in values]

    def depends_on(self, value: int) -> tuple[frozenset[str], frozenset[int]]:
        """The operators that computed ``value``, and the values that they started from."""
        ops: set[str] = set()
        leaves: set[int] = set()
        seen: set[int] = set()
        pending = self.resolved(self.graph.expand([value]))
        while pending:
            current = pending.pop()
            if current in seen:
                continue
            seen.add(current)
            step = self.producer.get(current)
            if step is None or current in self.live_in or current in self.graph.inputs:
                leaves.add(current)
                continue
            ops.add(step.op)
            pending.extend(self.resolved(sorted(step.reads)))
        return frozenset(ops), frozenset(leaves)

    def _walk(self, step: Step) -> None:
        # What a copy replaces whole is not looked at.
        seen = step.reads if step.op == "aten::copy_" else step.reads | step.mutates
        for value in sorted(seen):
            self._meet(value, step)
        for value in {self.resolve(value) for value in step.reads}:
            self.consumers[value].append(step)
        for value in {self.resolve(value) for value in step.mutates}:
            self.updates[value].append(step)
        for value in sorted(step.writes):
            self._write(value, step)

    def _meet(self, value: int, step: Step) -> None:
        """First sight of a value that no step has written yet."""
        tensor = self.graph.tensors.get(value)
        if tensor is None or value in self._written or value in self.root:
            return
        if tensor.memory_id is None or value in self._candidates:
            return
        if step.delegate is not None and value > max(self.graph.inputs, default=-1):
            # Arguments of a delegate are its inputs, then its outputs; outputs are
            # made by the call, after every input of the method.
            self._write(value, step)
            return
        owner = self._occupant.get((tensor.memory_id, tensor.memory_offset))
        if owner is not None and owner != value and self._same_extent(owner, tensor):
            # A static view is left out of the instructions: two values, one place in memory.
            self.root[value] = owner
            return
        self._candidates[value] = None
        self._occupy(value)

    def _write(self, value: int, step: Step) -> None:
        if step.is_view and step.args:
            source = self.resolve(step.args[0])
            if source != value:
                self.root[value] = source
                return
        owner = self.resolve(value)
        if step.op == "aten::copy_":
            self.updates[owner].append(step)
        if owner not in step.mutates or step.op == "aten::copy_":
            self.producer[owner] = step
        self._written.add(value)
        self._occupy(value)

    def _occupy(self, value: int) -> None:
        tensor = self.graph.tensors.get(value)
        if tensor is not None and tensor.memory_id is not None:
            self._occupant[tensor.memory_id, tensor.memory_offset] = self.resolve(value)

    def _same_extent(self, owner: int, tensor: TensorValue) -> bool:
        other = self.graph.tensors[owner]
        return _nbytes(other) == _nbytes(tensor)

    def _is_state(self, value: int) -> bool:
        # What is read unwritten, never changed, and made after the inputs is no
        # state: states are inputs of the exported graph, before the user's.
        return bool(self.updates.get(value)) or value < max(self.graph.inputs, default=-1)


def _nbytes(tensor: TensorValue) -> int:
    itemsize = _ITEMSIZE.get(tensor.dtype, 8 if tensor.dtype.endswith("64") else 4)
    return math.prod(tensor.shape) * itemsize
