"""Methods written by hand, instruction by instruction, as the exporter's emitter would."""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace
from typing import Any

from runtime_adapter.pte.instructions import MethodGraph, read_method
from runtime_adapter.state.dataflow import Dataflow
from runtime_adapter.state.roles import StateTensor, find_state

N_SLOTS, N_HEADS, HEAD = 32, 2, 8
CUSTOM = [1, N_SLOTS, N_HEADS, HEAD]
PLAIN = [1, N_HEADS, N_SLOTS, HEAD]


class ScalarType(IntEnum):
    BYTE = 0
    CHAR = 1
    LONG = 4
    FLOAT = 6
    COMPLEX32 = 8
    BOOL = 11


def record(kind: str, **fields: Any) -> Any:
    """An instance of a class called ``kind``, as the parsed schema has them."""
    return type(kind, (SimpleNamespace,), {})(**fields)


class Method:
    """Writes an execution plan instruction by instruction."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.calls: list[Any] = []
        self.operators: list[Any] = []
        self.delegates: list[Any] = []
        self._next_offset = 0

    def state(self, shape: list[int], **options: Any) -> int:
        return self.tensor(shape, **options)

    def inputs(self) -> tuple[int, int]:
        self.tokens = self.tensor([1, 16], dtype="LONG", planned=False, dynamic=True)
        self.position = self.tensor([1], dtype="LONG", planned=False)
        self.start = self.call("aten::_local_scalar_dense", self.position, out=self.int(0))
        self.index = self.call("aten::arange", self.start, out=self.tensor([16], dtype="LONG"))
        self.new = self.call("aten::embedding", self.tokens, out=self.tensor([1, 16, 2, 8]))
        return self.tokens, self.position

    def tensor(
        self,
        shape: list[int],
        *,
        dtype: str = "FLOAT",
        planned: bool = True,
        dynamic: bool = False,
        name: str | None = None,
        dim_order: list[int] | None = None,
        offset: int | None = None,
    ) -> int:
        if offset is None:
            offset, self._next_offset = self._next_offset, self._next_offset + 4096
        extra = SimpleNamespace(fully_qualified_name=name, location=0) if name else None
        where = SimpleNamespace(memory_id=1, memory_offset=offset) if planned else None
        return self.add(
            record(
                "Tensor",
                scalar_type=ScalarType[dtype],
                sizes=shape,
                dim_order=dim_order or list(range(len(shape))),
                shape_dynamism=int(dynamic),
                allocation_info=where,
                data_buffer_idx=0,
                extra_tensor_info=extra,
            )
        )

    def int(self, number: int) -> int:
        return self.add(record("Int", int_val=number))

    def flag(self, *, value: bool = False) -> int:
        return self.add(record("Bool", bool_val=value))

    def optional_list(self, *items: int) -> int:
        return self.add(record("OptionalTensorList", items=list(items)))

    def tensor_list(self, *items: int) -> int:
        return self.add(record("TensorList", items=list(items)))

    def add(self, value: Any) -> int:
        self.values.append(SimpleNamespace(val=value))
        return len(self.values) - 1

    def call(self, op: str, *args: int, out: int) -> int:
        """An out-of-place kernel: the output stands twice at the end, or once for a scalar."""
        name, _, overload = op.partition(".")
        self.operators.append(SimpleNamespace(name=name, overload=overload))
        is_tensor = type(self.values[out].val).__name__ == "Tensor"
        twice = is_tensor and "et_view" not in op and not name.endswith("_")
        full = [*args, out, out] if twice else [*args, out]
        self._step(record("KernelCall", op_index=len(self.operators) - 1, args=full))
        return out

    def delegate(self, backend: str, *args: int) -> None:
        self.delegates.append(SimpleNamespace(id=backend))
        index = len(self.delegates) - 1
        self._step(record("DelegateCall", delegate_index=index, args=list(args)))

    def _step(self, call: Any) -> None:
        self.calls.append(SimpleNamespace(instr_args=call))

    # What models are made of.

    def update_cache(self, cache: int, value: int | None = None) -> None:
        self.call(
            "llama::update_cache.out",
            self.new if value is None else value,
            cache,
            self.start,
            out=self.tensor([1]),
        )

    def custom_sdpa(self, k: int, v: int) -> int:
        return self.call(
            "llama::custom_sdpa.out", self.new, k, v, self.start, out=self.tensor([1, 16, 2, 8])
        )

    def index_put(self, cache: int, *, axis: int = 2, index: int | None = None) -> int:
        items = [-1] * axis + [self.index if index is None else index]
        shape = self.values[cache].val.sizes
        return self.call(
            "aten::index_put.out",
            cache,
            self.optional_list(*items),
            self.new,
            self.flag(),
            out=self.tensor(shape),
        )

    def copy_(self, target: int, source: int) -> None:
        self.call("aten::copy_", target, source, self.flag(), out=target)

    def written_out_attention(self, k: int, v: int) -> None:
        moved = self.call("aten::permute_copy.out", k, out=self.tensor([2, 8, 32]))
        scores = self.call("aten::bmm.out", self.new, moved, out=self.tensor([2, 16, 32]))
        scaled = self.call("aten::mul.out", scores, scores, out=self.tensor([2, 16, 32]))
        weights = self.call("aten::_softmax.out", scaled, out=self.tensor([2, 16, 32]))
        copied = self.call("aten::expand_copy.out", v, out=self.tensor([2, 32, 8]))
        self.call("aten::bmm.out", weights, copied, out=self.tensor([2, 16, 8]))

    def plan(self) -> Any:
        return SimpleNamespace(
            name="forward",
            values=self.values,
            inputs=[self.tokens, self.position],
            outputs=[self.new],
            chains=[SimpleNamespace(instructions=self.calls)],
            operators=self.operators,
            delegates=self.delegates,
        )

    # What rings are made of: positions, slots, bookkeeping and masks.

    def positions(self) -> int:
        """The position of each token of the call."""
        n_tokens = self.call("aten::sym_size.int", self.tokens, self.int(1), out=self.int(0))
        counted = self.call(
            "aten::arange.start_out",
            *(self.int(0), n_tokens, self.int(1)),
            out=self.tensor([16], dtype="LONG", dynamic=True),
        )
        start = self.call("aten::scalar_tensor.out", self.start, out=self.tensor([], dtype="LONG"))
        return self.add_to(counted, start)

    def add_to(self, left: int, right: int) -> int:
        out = self.tensor(self.values[left].val.sizes, dtype="LONG", dynamic=True)
        return self.call("aten::add.out", left, right, self.int(1), out=out)

    def ring_slots(self, positions: int, *, ring: int, sink: int = 0) -> int:
        """``sink + (p - sink) mod ring``, or ``p`` below the sink."""

        def out(dtype: str = "LONG") -> int:
            return self.tensor([16], dtype=dtype, dynamic=True)

        shifted = self.add_to(positions, self.int(-sink))
        wrapped = self.call("aten::remainder.Scalar_out", shifted, self.int(ring), out=out())
        slots = self.add_to(wrapped, self.int(sink))
        if not sink:
            return slots
        is_sink = self.call("aten::lt.Scalar_out", positions, self.int(sink), out=out("BOOL"))
        return self.call("aten::where.self_out", is_sink, positions, slots, out=out())

    def bookkeeping(self, book: int, slots: int, positions: int) -> int:
        """The new content of ``book``: ``positions`` at ``slots``."""
        return self.call(
            "aten::index_put.out",
            *(book, self.optional_list(slots), positions, self.flag()),
            out=self.tensor(self.values[book].val.sizes, dtype="LONG"),
        )

    def window_mask(self, held: int, positions: int, *, window: int, sink: int = 0) -> int:
        """``held >= 0 and 0 <= q - held and (q - held < window or held < sink)``, bool."""
        (n_slots,) = self.values[held].val.sizes

        def make(op: str, left: int, right: int, dtype: str = "BOOL") -> int:
            shape = [n_slots] if left == held else [16, n_slots]
            return self.call(op, left, right, out=self.tensor(shape, dtype=dtype, dynamic=True))

        column = self.call(
            "aten::unsqueeze_copy.out",
            *(positions, self.int(1)),
            out=self.tensor([16, 1], dtype="LONG", dynamic=True),
        )
        behind = make("aten::sub.out", column, held, "LONG")
        seen = make("aten::lt.Scalar_out", behind, self.int(window))
        if sink:
            is_sink = make("aten::lt.Scalar_out", held, self.int(sink))
            seen = make("aten::bitwise_or.Tensor_out", seen, is_sink)
        for value in (held, behind):
            there = make("aten::ge.Scalar_out", value, self.int(0))
            seen = make("aten::bitwise_and.Tensor_out", seen, there)
        return seen

    def update_with_indices(self, cache: int, slots: int) -> None:
        self.call(
            "llama::update_cache_with_indices.out",
            *(self.new, cache, self.start, slots),
            out=self.tensor([1]),
        )

    def graph(self) -> MethodGraph:
        return read_method(self.plan(), source="test.pte")

    def find(self) -> tuple[StateTensor, ...]:
        return find_state(Dataflow(self.graph()))
