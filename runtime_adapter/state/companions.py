"""Several methods of one program: which of them work on the same cache.

Methods that are loaded from one program object of the Python runtime
(``_load_program(path).load_method(name)``, twice) lie in the same memory, whatever
their plans say. An exporter that plans the state of all methods alike
(``share_mutable_buffers``) makes that one cache; without it they overwrite each other.
A second program object, and the ``Module`` interface, have memory of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvstore.errors import UnsupportedStateError
from runtime_adapter.pte.instructions import TensorValue
from runtime_adapter.state.dataflow import Dataflow
from runtime_adapter.state.roles import constants_of


def find_foreign_state(
    flow: Dataflow, others: Sequence[Dataflow], *, path: Path
) -> UnsupportedStateError | None:
    """Whether the method reads what only another method writes, such as an encoder's result."""
    for tensor in constants_of(flow):
        if tensor.data_buffer:
            continue  # initial data that nothing changes: a constant
        for other in others:
            writers = [other.graph.tensors[value] for value in other.updates]
            if any(_same_place(tensor, written) for written in writers):
                return UnsupportedStateError(
                    f"{path}, method {flow.graph.name!r}: expected a cache that this method itself "
                    f"writes, found {tensor.dtype} {list(tensor.shape)}, which only method "
                    f"{other.graph.name!r} writes; open that method, or export one method that "
                    "does both"
                )
    return None


def shares_cache(flow: Dataflow, other: Dataflow) -> bool:
    """Whether method ``other`` keeps the same state at the same places, and nothing else there.

    Exporters do that with ``share_mutable_buffers``. Without it, two methods use the
    same memory for different things.
    """
    mine = {value: flow.graph.tensors[value] for value in flow.live_in if flow.updates.get(value)}
    arenas = {tensor.memory_id for tensor in mine.values()}
    theirs = [
        other.graph.tensors[value] for value in other.live_in if other.graph.tensors[value].shape
    ]
    for tensor in mine.values():
        if not any(_same_place(tensor, found) for found in theirs):
            return False
    return bool(mine) and not any(
        tensor.memory_id in arenas
        and not any(_same_place(tensor, state) for state in mine.values())
        for graph in (flow.graph, other.graph)
        for tensor in graph.tensors.values()
    )


def _same_place(one: TensorValue, other: TensorValue) -> bool:
    return (one.memory_id, one.memory_offset, one.dtype, one.shape) == (
        other.memory_id,
        other.memory_offset,
        other.dtype,
        other.shape,
    )
