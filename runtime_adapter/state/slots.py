"""Which instructions write slots of a cache tensor: along which axis, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime_adapter.pte.instructions import Step
from runtime_adapter.state.dataflow import Dataflow

_MAX_CHAIN_N_STEPS = 64

_FUSED: Mapping[str, int] = {
    "llama::update_cache": 2,
    "llama::update_cache_with_indices": 3,
    "llama::sdpa_with_kv_cache": 5,
}
"""Argument that says where a fused operator writes, along axis 1: a first slot, or one a token."""

_BASE_UPDATES = frozenset(
    {"aten::index_put", "aten::index_copy", "aten::slice_scatter", "aten::select_scatter"}
)

_COPIES = frozenset({"aten::clone", "aten::alias_copy", "aten::detach_copy"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotWrite:
    """One write: ``slot`` is the value that says where, ``content`` the value written if known."""

    axis: int
    slot: int
    position: int
    content: int | None = None


def slot_writes(flow: Dataflow, value: int) -> tuple[SlotWrite, ...] | None:
    """The slot write of every update of ``value``; None if there is none, or one is no such."""
    found: list[SlotWrite] = []
    for step in flow.updates.get(value, ()):
        write = _slot_write(flow, value, step)
        if write is None:
            return None
        found.append(write)
    return tuple(found) or None


def _slot_write(flow: Dataflow, value: int, step: Step) -> SlotWrite | None:
    argument = _FUSED.get(step.op)
    if argument is not None and len(step.args) > argument:
        return SlotWrite(axis=1, slot=step.args[argument], position=step.position)
    if step.op.removesuffix("_") in _BASE_UPDATES and step.args:
        return _indexed_write(flow, step)
    if step.op == "aten::copy_" and len(step.args) > 1:
        return _copied_write(flow, value, step)
    return None


def _copied_write(flow: Dataflow, value: int, step: Step) -> SlotWrite | None:
    """A copy at the end of the method of what an update out of place made of the old content."""
    found: set[SlotWrite] = set()
    current = flow.resolve(step.args[1])
    for _ in range(_MAX_CHAIN_N_STEPS):
        if current == value:
            # Several writes in a row: the last one stands for all if their axes agree.
            axes = {write.axis for write in found}
            return min(found, key=lambda write: write.position) if len(axes) == 1 else None
        maker = flow.producer.get(current)
        if maker is None or not maker.args:
            return None
        same = _same_content(flow, maker)
        if same is not None:
            current = flow.resolve(same)
            continue
        if maker.op not in _BASE_UPDATES:
            return None
        write = _indexed_write(flow, maker)
        if write is None:
            return None
        found.add(write)
        current = flow.resolve(maker.args[0])
    return None


def _same_content(flow: Dataflow, step: Step) -> int | None:
    """The argument that ``step`` gives on unchanged, as ``x[:1]`` does of a batch of one."""
    graph, args = flow.graph, step.args
    if step.op in _COPIES:
        return args[0]
    is_scatter = step.op == "aten::slice_scatter"
    if not is_scatter and step.op != "aten::slice_copy":
        return None
    base = graph.tensors.get(args[0])
    first = 2 if is_scatter else 1
    if base is None or base.is_dynamic or len(args) < first + 4:
        return None
    if any(arg in flow.producer for arg in args[first : first + 4]):
        return None  # computed at every call; the file holds a 0 in its place
    axis, start, stop, stride = (graph.scalars.get(arg) for arg in args[first : first + 4])
    if not isinstance(axis, int) or stride != 1 or (start or 0) != 0:
        return None
    size = base.shape[axis % len(base.shape)]
    if stop is None or (isinstance(stop, int) and stop >= size):
        return args[1] if is_scatter else args[0]
    return None


def last_indexed_write(flow: Dataflow, step: Step) -> SlotWrite | None:
    """The slot write that an update ends with, whatever it did to the old content before."""
    if step.op == "aten::copy_" and len(step.args) > 1:
        maker = flow.producer.get(flow.resolve(step.args[1]))
        return _indexed_write(flow, maker) if maker is not None else None
    return _indexed_write(flow, step)


def _indexed_write(flow: Dataflow, step: Step) -> SlotWrite | None:
    graph, args = flow.graph, step.args
    op = step.op.removesuffix("_")
    if op not in _BASE_UPDATES or len(args) < 4:
        return None
    base = graph.tensors.get(args[0])
    if base is None:
        return None
    if op == "aten::index_put":
        items = graph.lists.get(args[1], ())
        used = [axis for axis, item in enumerate(items) if item >= 0]
        if len(used) != 1 or graph.scalars.get(args[3]) is True:
            return None
        index = graph.tensors.get(items[used[0]])
        if index is None or len(index.shape) != 1 or index.dtype not in {"int64", "int32"}:
            return None
        return SlotWrite(axis=used[0], slot=items[used[0]], position=step.position, content=args[2])
    # index_copy(self, dim, index, source); the scatters are (self, src, dim, start or index, ...).
    dim_argument, slot_argument = (1, 2) if op == "aten::index_copy" else (2, 3)
    axis = graph.scalars.get(args[dim_argument])
    if not isinstance(axis, int):
        return None
    return SlotWrite(
        axis=axis % len(base.shape),
        slot=args[slot_argument],
        position=step.position,
        content=args[3] if op == "aten::index_copy" else args[1],
    )
