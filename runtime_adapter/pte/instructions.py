"""A method's instructions in a normal form: what each step reads, writes and aliases.

ExecuTorch's conventions, as the emitter writes them: arguments come in schema
order; an ``.out`` kernel lists its output twice at the end; an in-place kernel
(``copy_``) lists argument 0 again at the end; several outputs are followed by a
list of them; ``et_view`` gives a second shape to the same memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.errors import CorruptProgramError
from kvstore.layout import DTYPE_ITEMSIZE_NBYTES
from runtime_adapter.pte.arguments import LIST_ITEMS, SchemaOf, find_mismatch, no_schemas

_DTYPES = {
    "BOOL": "bool",
    "BYTE": "uint8",
    "CHAR": "int8",
    "SHORT": "int16",
    "INT": "int32",
    "LONG": "int64",
    "HALF": "float16",
    "BFLOAT16": "bfloat16",
    "FLOAT": "float32",
    "DOUBLE": "float64",
}

_LARGEST_ITEM_NBYTES = 16
_SPARE_NBYTES = 1 << 20
"""Exporters plan up to some hundred bytes more than what is used."""

_LISTS = frozenset({"TensorList", "OptionalTensorList", "IntList"})
# Lists of numbers that stand in the program itself, unlike IntList, whose items are values.
_VIEW = "executorch_prim::et_view"
_COPY_INDEX = "executorch_prim::et_copy_index"

MUTATED_ARGUMENTS: Mapping[str, tuple[int, ...]] = {
    "llama::update_cache": (1,),
    "llama::update_cache_with_indices": (1,),
    "llama::sdpa_with_kv_cache": (3, 4),
}
"""Arguments that an operator updates in place although its name does not end in ``_``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorValue:
    """One tensor of a method. ``shape`` holds upper bounds where the shape is dynamic."""

    index: int
    dtype: str
    shape: tuple[int, ...]
    dim_order: tuple[int, ...]
    is_dynamic: bool
    memory_id: int | None
    """The planned arena, or None if the tensor is not memory-planned."""
    memory_offset: int
    data_buffer: int
    """Index of constant or initial data; 0 is none."""
    name: str | None
    is_external: bool
    """The data lies in a ``.ptd`` file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One instruction. ``args`` are value indices in schema order, lists unopened, outputs cut."""

    position: int
    op: str
    overload: str
    args: tuple[int, ...]
    reads: frozenset[int]
    writes: frozenset[int]
    mutates: frozenset[int]
    delegate: str | None = None

    @property
    def is_view(self) -> bool:
        """The output is another shape over the memory of argument 0."""
        return self.op == _VIEW


ReadConstant = Callable[[int, int], bytes | None]
"""``(data buffer, number of bytes) -> content`` of a constant, or None where it is not at hand."""


def no_constants(data_buffer: int, nbytes: int) -> bytes | None:  # noqa: ARG001
    """For a plan without its file."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodGraph:
    """One method: its tensors, scalars and lists by value index, and its steps in order."""

    name: str
    tensors: Mapping[int, TensorValue]
    scalars: Mapping[int, int | float | bool | str | None]
    lists: Mapping[int, tuple[int, ...]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: tuple[Step, ...]
    operators: tuple[str, ...]
    delegates: tuple[str, ...]
    read_constant: ReadConstant = no_constants

    def expand(self, values: Sequence[int]) -> list[int]:
        """``values`` with every list replaced by its items; absent optional items dropped."""
        flat: list[int] = []
        for value in values:
            flat.extend(item for item in self.lists.get(value, (value,)) if item >= 0)
        return flat


def read_method(
    plan: Any,
    *,
    source: str,
    read_constant: ReadConstant = no_constants,
    schema_of: SchemaOf = no_schemas,
) -> MethodGraph:
    """The normal form of an ``ExecutionPlan``.

    Raises:
        CorruptProgramError: an instruction points at a value, operator or delegate that
            does not exist, or calls an operator with arguments that its schema, where
            ``schema_of`` knows it, does not have.
    """
    values = [value.val for value in plan.values]
    kinds = [type(value).__name__ for value in values]
    reader = _Reader(plan, kinds, source=source, schema_of=schema_of)
    tensors = {
        index: _tensor(index, value)
        for index, (kind, value) in enumerate(zip(kinds, values, strict=True))
        if kind == "Tensor"
    }
    lists = {
        index: reader.items(kind, value.items)
        for index, (kind, value) in enumerate(zip(kinds, values, strict=True))
        if kind in _LISTS
    }
    scalars = {
        index: _scalar(kind, value)
        for index, (kind, value) in enumerate(zip(kinds, values, strict=True))
        if kind not in _LISTS and kind != "Tensor"
    }
    steps: list[Step] = []
    for chain in plan.chains or ():
        for instruction in chain.instructions or ():
            step = reader.step(len(steps), instruction.instr_args, lists)
            if step is not None:
                steps.append(step)
    return MethodGraph(
        name=plan.name,
        tensors=tensors,
        scalars=scalars,
        lists=lists,
        inputs=reader.checked(plan.inputs or ()),
        outputs=reader.checked(plan.outputs or ()),
        steps=tuple(steps),
        operators=tuple(sorted({_operator(entry) for entry in plan.operators or ()})),
        delegates=tuple(entry.id for entry in plan.delegates or ()),
        read_constant=read_constant,
    )


def check_planned_memory(methods: Sequence[tuple[Any, MethodGraph]], *, source: str) -> None:
    """Refuse memory far beyond what lies in it: the runtime would allocate all of it first.

    ``methods`` are all plans of the program with their normal forms: memory that one shares
    with another is planned in both, also where only one of them uses it.

    Raises:
        CorruptProgramError: far more memory is planned than used.
    """
    used: dict[int, int] = {}
    for _, graph in methods:
        for tensor in graph.tensors.values():
            if tensor.memory_id is not None:
                itemsize = DTYPE_ITEMSIZE_NBYTES.get(tensor.dtype, _LARGEST_ITEM_NBYTES)
                stop = tensor.memory_offset + math.prod(tensor.shape) * itemsize
                used[tensor.memory_id] = max(used.get(tensor.memory_id, 0), stop)
    for plan, graph in methods:
        for memory_id, size in enumerate(plan.non_const_buffer_sizes or ()):
            if size > 2 * used.get(memory_id, 0) + _SPARE_NBYTES:
                raise CorruptProgramError(
                    f"{source}, method {graph.name!r}: expected a whole program, found {size} "
                    f"bytes planned as memory {memory_id}, of which tensors use "
                    f"{used.get(memory_id, 0)}; copy or export the file again"
                )


class _Reader:
    """Turns one plan's instructions into steps, checking every index it follows."""

    def __init__(self, plan: Any, kinds: list[str], *, source: str, schema_of: SchemaOf) -> None:
        self._operators = list(plan.operators or ())
        self._schema_of = functools.cache(schema_of)
        self._delegates = list(plan.delegates or ())
        self._kinds = kinds
        self._where = f"{source}, method {plan.name!r}"

    def checked(self, indices: Sequence[int]) -> tuple[int, ...]:
        for index in indices:
            if not 0 <= index < len(self._kinds):
                raise self._damaged(f"an instruction that points at value {index}")
        return tuple(indices)

    def items(self, kind: str, indices: Sequence[int]) -> tuple[int, ...]:
        """The items of a list of values; -1 is an optional item that is absent."""
        is_optional = kind == "OptionalTensorList"
        present = self.checked([index for index in indices if index >= 0 or not is_optional])
        for index in present:
            if self._kinds[index] not in LIST_ITEMS[kind]:
                raise self._damaged(f"an {kind} with an item of kind {self._kinds[index]}")
        return tuple(indices)

    def step(self, position: int, call: Any, lists: Mapping[int, tuple[int, ...]]) -> Step | None:
        kind = type(call).__name__
        if kind == "KernelCall":
            entry = self._entry(self._operators, call.op_index, "operator")
            args = self.checked(call.args)
            self._check_kinds(_operator(entry), args)
            return self._kernel(position, entry, args, lists)
        if kind == "DelegateCall":
            entry = self._entry(self._delegates, call.delegate_index, "delegate")
            args = self.checked(call.args)
            # Which arguments are outputs is not in the file: roles decides by order.
            return _step(position, "delegate", "", args, reads=args, delegate=entry.id)
        if kind == "MoveCall":
            source, target = self.checked((call.move_from, call.move_to))
            return _step(position, "move", "", (source,), reads=(source,), writes=(target,))
        if kind == "JumpFalseCall":
            self.checked((call.cond_value_index,))
        if kind == "FreeCall":
            self.checked((call.value_index,))
        return None

    def _entry(self, table: list[Any], index: int, what: str) -> Any:
        if not 0 <= index < len(table):
            raise self._damaged(f"an instruction that points at {what} {index} of {len(table)}")
        return table[index]

    def _check_kinds(self, operator: str, args: Sequence[int]) -> None:
        kinds = [self._kinds[arg] for arg in args]
        mismatch = find_mismatch(operator, kinds, self._schema_of)
        if mismatch is not None:
            raise self._damaged(f"a call of {operator} with {mismatch}")

    def _kernel(
        self, position: int, entry: Any, args: tuple[int, ...], lists: Mapping[int, tuple[int, ...]]
    ) -> Step:
        op, overload = entry.name, entry.overload or ""
        inputs, outputs = _split_outputs(args, self._kinds, lists)
        reads = [item for arg in inputs for item in lists.get(arg, (arg,)) if item >= 0]
        mutated = MUTATED_ARGUMENTS.get(op, (0,) if op.endswith("_") else ())
        mutates = [inputs[index] for index in mutated if index < len(inputs)]
        if op == _COPY_INDEX and inputs:
            # Fills its argument 0 row by row from nothing (the output of a loop).
            outputs, reads = (inputs[0],), reads[1:]
        if op in {"aten::copy_", "aten::copy"} and len(inputs) > 1:
            # Writes argument 0 whole; what was in it before does not matter.
            reads = [value for value in reads if value != inputs[0] or inputs[0] == inputs[1]]
        return _step(position, op, overload, inputs, reads=reads, writes=outputs, mutates=mutates)

    def _damaged(self, found: str) -> CorruptProgramError:
        return CorruptProgramError(
            f"{self._where}: expected a whole program, found {found}; copy or export the file again"
        )


def _split_outputs(
    args: tuple[int, ...], kinds: list[str], lists: Mapping[int, tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``(inputs, outputs)`` of a kernel call."""
    if not args:
        return (), ()
    last = args[-1]
    items = lists.get(last, ())
    if kinds[last] == "TensorList" and items and args[-1 - len(items) : -1] == items:
        return args[: -1 - len(items)], items
    if len(args) > 1 and args[-2] == last:
        return args[:-2], (last,)
    return args[:-1], (last,)


def _step(
    position: int,
    op: str,
    overload: str,
    args: Sequence[int],
    *,
    reads: Sequence[int],
    writes: Sequence[int] = (),
    mutates: Sequence[int] = (),
    delegate: str | None = None,
) -> Step:
    return Step(
        position=position,
        op=op,
        overload=overload,
        args=tuple(args),
        reads=frozenset(reads),
        writes=frozenset(writes),
        mutates=frozenset(mutates),
        delegate=delegate,
    )


def _operator(entry: Any) -> str:
    return f"{entry.name}.{entry.overload}" if entry.overload else str(entry.name)


def _scalar(kind: str, value: Any) -> int | float | bool | str | None:
    if kind == "Int":
        return int(value.int_val)
    if kind == "Bool":
        return bool(value.bool_val)
    if kind == "Double":
        return float(value.double_val)
    if kind == "String":
        return str(value.string_val)
    return None


def _tensor(index: int, value: Any) -> TensorValue:
    plan = value.allocation_info
    extra = value.extra_tensor_info
    return TensorValue(
        index=index,
        dtype=_DTYPES.get(value.scalar_type.name, value.scalar_type.name.lower()),
        shape=tuple(value.sizes),
        dim_order=tuple(value.dim_order),
        is_dynamic=int(value.shape_dynamism) != 0,
        memory_id=plan.memory_id if plan is not None else None,
        memory_offset=plan.memory_offset if plan is not None else 0,
        data_buffer=value.data_buffer_idx,
        name=(extra.fully_qualified_name or None) if extra is not None else None,
        is_external=extra is not None and int(extra.location) == 1,
    )
