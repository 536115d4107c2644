"""How far a method's positions may go: whether it looks them up in tables that end.

A rotary table has a row a position, and its end is the model's context. An
attention sink wraps positions before it looks them up, so nothing ends.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from runtime_adapter.pte.instructions import Step
from runtime_adapter.state.arithmetic import Arithmetic, Value

# Far away, and at odd distances, so that no table is hit inside by chance.
_FAR = (1 << 20, (1 << 20) + 4099, (1 << 24) + 11)


def is_endless(arithmetic: Arithmetic) -> bool:
    """Whether the method looks positions up in tables, and stays inside them for ever."""
    graph = arithmetic.flow.graph
    position = set(graph.inputs[1:])
    lookups = [
        (step, index)
        for step in graph.steps
        if (index := _index_of(arithmetic, step)) is not None
        and any(arithmetic.flow.depends_on(value)[1] & position for value in index.values())
    ]
    if not lookups:
        return False
    for step, index in lookups:
        shape = graph.tensors[step.args[0]].shape
        # The position right behind a table's end is the first that has to wrap.
        ends = [shape[axis] + more for axis in index for more in (0, 1)]
        for probe in (*ends, *_FAR):
            if not _is_inside(shape, index, arithmetic.run(probe, 1)):
                return False
    return True


def _index_of(arithmetic: Arithmetic, step: Step) -> dict[int, int] | None:
    """The values that say which rows of a constant ``step`` reads, by axis."""
    graph, args = arithmetic.flow.graph, step.args
    table = graph.tensors.get(args[0]) if args else None
    if table is None or table.memory_id is not None or args[0] in graph.inputs:
        return None
    if step.op == "aten::index" and len(args) > 1:
        items = graph.lists.get(args[1], ())
        return {axis: item for axis, item in enumerate(items) if item >= 0}
    if step.op == "aten::embedding" and len(args) > 1:
        return {0: args[1]}
    axis = graph.scalars.get(args[1]) if len(args) > 2 else None
    if not isinstance(axis, int):
        return None
    if step.op in {"aten::index_select", "aten::select_copy", "aten::slice_copy"}:
        return {axis % len(table.shape): args[2]}
    return None


def _is_inside(
    shape: tuple[int, ...], index: Mapping[int, int], values: Mapping[int, Value]
) -> bool:
    for axis, value in index.items():
        rows = np.asarray(values[value]) if value in values else None
        if rows is None or rows.size == 0 or int(rows.max()) >= shape[axis]:
            return False
    return True
