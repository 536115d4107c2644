"""Carries out a method's position arithmetic, call by call."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from runtime_adapter.pte.instructions import Step, TensorValue
from runtime_adapter.state.arithmetic.call import (
    MAX_N_ELEMENTS,
    Array,
    Call,
    UnreadableError,
    Value,
)
from runtime_adapter.state.arithmetic.operators import OPERATORS
from runtime_adapter.state.dataflow import Dataflow

_MAX_CONSTANT_NBYTES = 1 << 18
_NUMPY_DTYPES: Mapping[str, str] = {
    "bool": "?",
    "uint8": "<u1",
    "int8": "<i1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "float16": "<f2",
    "bfloat16": "<f4",  # numpy has none; only compared with zero here
    "float32": "<f4",
    "float64": "<f8",
}


class Arithmetic:
    """Carries out the position arithmetic of one method.

    ``Dataflow``'s graph must have its token ids first among the inputs and the
    position second, as ``signature`` demands.
    """

    def __init__(self, flow: Dataflow) -> None:
        self._flow = flow
        self._graph = flow.graph
        self._steps: tuple[Step, ...] | None = None
        self._runs: dict[tuple[int, int], Mapping[int, Value]] = {}
        self._constants: dict[int, Array | None] = {}

    @property
    def max_n_tokens(self) -> int:
        """The longest call: tokens that the method takes at once."""
        tokens = self._graph.tensors.get(self._graph.inputs[0]) if self._graph.inputs else None
        return tokens.shape[-1] if tokens is not None and tokens.shape else 1

    def run(
        self, start: int, n_tokens: int, *, state: Mapping[int, Array] | None = None
    ) -> Mapping[int, Value]:
        """Every value that follows from a call of ``n_tokens`` at position ``start``.

        ``state`` gives the content of persistent tensors before the call; those
        that are missing are unknown.
        """
        if state is None and (start, n_tokens) in self._runs:
            return self._runs[start, n_tokens]
        machine = _Machine(self, start=start, n_tokens=n_tokens, state=state or {})
        steps = self._graph.steps if state or self._steps is None else self._steps
        done = [step for step in steps if machine.carry_out(step)]
        if not state:
            # What could be computed once can be computed for every position.
            self._steps = self._steps if self._steps is not None else tuple(done)
            self._runs[start, n_tokens] = machine.values
        return machine.values

    def input_value(self, value: int, *, start: int, n_tokens: int) -> Array | None:
        """The content of a method's input, or None if it does not follow from the position."""
        inputs = self._graph.inputs
        if len(inputs) != 2 or value != inputs[1]:
            return None
        tensor = self._graph.tensors[value]
        if tensor.shape in {(1,), ()} and not (tensor.is_dynamic and n_tokens > 1):
            return np.full(tensor.shape, start, dtype=np.int64)
        return np.arange(start, start + n_tokens, dtype=np.int64)

    def is_tokens(self, value: int) -> bool:
        """Whether ``value`` is the input that holds the token ids."""
        return bool(self._graph.inputs) and value == self._graph.inputs[0]

    def constant(self, value: int) -> Array | None:
        """The content of a small constant, or None."""
        if value not in self._constants:
            self._constants[value] = self._read_constant(self._graph.tensors.get(value))
        return self._constants[value]

    def _read_constant(self, tensor: TensorValue | None) -> Array | None:
        if tensor is None or tensor.memory_id is not None or tensor.data_buffer <= 0:
            return None
        dtype = "<u2" if tensor.dtype == "bfloat16" else _NUMPY_DTYPES.get(tensor.dtype)
        if dtype is None or tensor.is_external:
            return None
        nbytes = math.prod(tensor.shape) * np.dtype(dtype).itemsize
        if not 0 < nbytes <= _MAX_CONSTANT_NBYTES:
            return None
        data = self._graph.read_constant(tensor.data_buffer, nbytes)
        if data is None or len(data) != nbytes:
            return None
        content = np.frombuffer(data, dtype=dtype).reshape(tensor.shape)
        if tensor.dtype == "bfloat16":
            content = (content.astype("<u4") << 16).view("<f4")
        return content

    def source(self, value: int) -> int | None:
        """The value whose memory ``value`` shows in another shape without an instruction."""
        return self._flow.root.get(value)

    @property
    def flow(self) -> Dataflow:
        """The method."""
        return self._flow


class _Machine:
    """One call. ``values`` has what is known so far, by value index."""

    def __init__(
        self, arithmetic: Arithmetic, *, start: int, n_tokens: int, state: Mapping[int, Array]
    ) -> None:
        self._arithmetic = arithmetic
        self._graph = arithmetic.flow.graph
        self._start = start
        self._n_tokens = n_tokens
        self.values: dict[int, Value] = dict(state)
        self._made: set[int] = set()

    def carry_out(self, step: Step) -> bool:
        """Carry out ``step``; False if it needs or makes what is not known here."""
        function = OPERATORS.get(step.op.removesuffix("_"))
        outputs = sorted(step.writes | step.mutates)
        try:
            if function is None or len(outputs) != 1:
                raise UnreadableError
            with np.errstate(all="ignore"):
                result = function(Call(self, self._graph, step))
            self._keep(outputs[0], result)
        except (UnreadableError, ArithmeticError, IndexError, TypeError, ValueError):
            for value in outputs:
                self.values.pop(value, None)
            self._made.update(outputs)
            return False
        self._made.update(outputs)
        return True

    def _keep(self, value: int, result: Value) -> None:
        tensor = self._graph.tensors.get(value)
        if tensor is None:
            self.values[value] = result if isinstance(result, int | float) else result.item()
            return
        if np.size(result) > MAX_N_ELEMENTS or tensor.dtype not in _NUMPY_DTYPES:
            raise UnreadableError
        self.values[value] = np.asarray(result).astype(_NUMPY_DTYPES[tensor.dtype])

    def read(self, value: int) -> Value:
        """The content of a tensor or scalar."""
        if value in self.values:
            return self.values[value]
        if value in self._graph.scalars and value not in self._made:
            scalar = self._graph.scalars[value]
            if isinstance(scalar, int | float):
                return scalar
            raise UnreadableError
        known = self._unmade(value)
        if known is None:
            raise UnreadableError
        return known

    def _unmade(self, value: int) -> Value | None:
        """The content of what no step has made: an input, a constant, or a silent view."""
        arithmetic = self._arithmetic
        if value in self._made:
            return None
        given = arithmetic.input_value(value, start=self._start, n_tokens=self._n_tokens)
        if given is not None:
            return given
        source = arithmetic.source(value)
        if source is not None:
            whole = np.asarray(self.read(source))
            shape = self._graph.tensors[value].shape
            return whole.reshape(shape) if whole.size == math.prod(shape) else None
        return arithmetic.constant(value)

    def is_known(self, value: int) -> bool:
        """Whether a step made ``value``, and it could be computed."""
        return value in self.values

    def length(self, value: int, axis: int) -> int:
        """The size of ``value`` along ``axis`` in this call."""
        tensor = self._graph.tensors.get(value)
        if tensor is None:
            raise UnreadableError
        if self._arithmetic.is_tokens(value) and axis % len(tensor.shape) == 1:
            return self._n_tokens
        if not tensor.is_dynamic:
            return tensor.shape[axis]
        shape: tuple[int, ...] = np.asarray(self.read(value)).shape
        return shape[axis]
