"""The operators of position arithmetic, on numpy arrays.

Arguments come in the operators' schema order. Every array is bounded before it
is made: the program is untrusted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from runtime_adapter.state.arithmetic.call import Array, Call, UnreadableError, Value, bounded

_END = 2**62


def _arange(call: Call) -> Value:
    has_start = call.step.overload.startswith("start")
    start = call.integer(0) if has_start else 0
    stop = call.integer(1 if has_start else 0)
    step = call.integer(2, 1) if has_start else 1
    bounded([len(range(start, stop, step))])
    return np.arange(start, stop, step, dtype=np.int64)


def _full(call: Call) -> Value:
    return np.full(bounded(call.integers(0)), call[1])


def _scaled(function: Callable[[Array, Array], Array]) -> Callable[[Call], Value]:
    """Addition and subtraction, whose last argument scales the second."""

    def apply(call: Call) -> Value:
        other = call[1]
        if len(call) > 2:
            other = other * call[2]
        return _broadcast(function, call[0], other)

    return apply


def _binary(function: Callable[[Array, Array], Array]) -> Callable[[Call], Value]:
    return lambda call: _broadcast(function, call[0], call[1])


def _broadcast(function: Callable[[Array, Array], Array], left: Array, right: Array) -> Array:
    bounded(np.broadcast_shapes(left.shape, right.shape))
    return function(left, right)


def _unary(function: Callable[[Array], Array]) -> Callable[[Call], Value]:
    return lambda call: function(call[0])


def _clamp(call: Call) -> Value:
    found = call[0]
    if len(call) > 1 and not call.is_none(1):
        found = np.maximum(found, call[1])
    if len(call) > 2 and not call.is_none(2):
        found = np.minimum(found, call[2])
    return found


def _where(call: Call) -> Value:
    condition, chosen, other = call[0], call[1], call[2]
    bounded(np.broadcast_shapes(condition.shape, chosen.shape, other.shape))
    found: Array = np.where(condition, chosen, other)
    return found


def _select(call: Call) -> Value:
    found: Array = np.take(call[0], call.integer(2), axis=call.integer(1))
    return found


def _slices(call: Call, *, shift: int, n_axes: int) -> tuple[slice, ...]:
    """The index that ``(dim, start, end, step)`` from argument ``shift`` on stand for."""
    axis = call.integer(shift, 0) % n_axes
    part = slice(
        call.integer(shift + 1, 0), call.integer(shift + 2, _END), call.integer(shift + 3, 1)
    )
    return (slice(None),) * axis + (part,)


def _slice(call: Call) -> Value:
    whole = call[0]
    return whole[_slices(call, shift=1, n_axes=whole.ndim)]


def _slice_scatter(call: Call) -> Value:
    whole = call[0].copy()
    whole[_slices(call, shift=2, n_axes=whole.ndim)] = call[1]
    return whole


def _select_scatter(call: Call) -> Value:
    whole = call[0].copy()
    axis = call.integer(2) % whole.ndim
    whole[(slice(None),) * axis + (call.integer(3),)] = call[1]
    return whole


def _unsqueeze(call: Call) -> Value:
    return np.expand_dims(call[0], call.integer(1))


def _squeeze(call: Call) -> Value:
    whole = call[0]
    axes = call.integers(1) if len(call) > 1 else list(range(whole.ndim))
    return whole.squeeze(tuple(axis for axis in axes if whole.shape[axis] == 1))


def _view(call: Call) -> Value:
    return call[0].reshape(call.integers(1))


def _expand(call: Call) -> Value:
    whole, shape = call[0], call.integers(1)
    padded = (1,) * (len(shape) - whole.ndim) + whole.shape
    sizes = [old if new == -1 else new for old, new in zip(padded, shape, strict=True)]
    return np.broadcast_to(whole, bounded(sizes))


def _repeat(call: Call) -> Value:
    whole, times = call[0], call.integers(1)
    bounded([whole.size, *times])
    return np.tile(whole, times)


def _index_put(call: Call) -> Value:
    if len(call) > 3 and call.integer(3):
        raise UnreadableError  # accumulates
    whole = call[0].copy()
    whole[_indices(call)] = call[2]
    return whole


def _index(call: Call) -> Value:
    whole, indices = call[0], _indices(call)
    bounded([whole.size, *(np.size(item) for item in indices if not isinstance(item, slice))])
    found: Array = whole[indices]
    return found


def _indices(call: Call) -> tuple[Any, ...]:
    return tuple(slice(None) if item is None else item for item in call.items(1))


def _index_copy(call: Call) -> Value:
    whole = call[0].copy()
    axis = call.integer(1) % whole.ndim
    whole[(slice(None),) * axis + (call[2],)] = call[3]
    return whole


def _index_select(call: Call) -> Value:
    whole, index = call[0], call[2]
    bounded([whole.size, index.size])
    return whole.take(index, axis=call.integer(1))


def _copy(call: Call) -> Value:
    # The target's content does not matter, only its shape, which is the result's.
    return np.broadcast_to(call[1], bounded(call.planned_shape()))


def _cat(call: Call) -> Value:
    parts = [part for part in call.items(0) if part is not None]
    bounded([sum(part.size for part in parts)])
    return np.concatenate(parts, axis=call.integer(1, 0))


def _divide(call: Call) -> Value:
    return _broadcast(np.floor_divide, call[0], call[1])


_same = _unary(lambda whole: whole)

OPERATORS: Mapping[str, Callable[[Call], Value]] = {
    "aten::arange": _arange,
    "aten::full": _full,
    "aten::full_like": lambda call: np.full(call[0].shape, call[1]),
    "aten::scalar_tensor": _same,
    "aten::_to_copy": _same,
    "aten::clone": _same,
    "aten::alias_copy": _same,
    "aten::detach_copy": _same,
    "aten::lift_fresh_copy": _same,
    "dim_order_ops::_to_dim_order_copy": _same,
    "dim_order_ops::_clone_dim_order": _same,
    "aten::_local_scalar_dense": _unary(lambda whole: whole.reshape(())),
    "aten::sym_size": lambda call: call.length(),
    "aten::add": _scaled(np.add),
    "aten::sub": _scaled(np.subtract),
    "aten::mul": _binary(np.multiply),
    "aten::remainder": _binary(np.mod),
    "aten::fmod": _binary(np.fmod),
    "aten::floor_divide": _divide,
    "aten::minimum": _binary(np.minimum),
    "aten::maximum": _binary(np.maximum),
    "aten::eq": _binary(np.equal),
    "aten::ne": _binary(np.not_equal),
    "aten::lt": _binary(np.less),
    "aten::le": _binary(np.less_equal),
    "aten::gt": _binary(np.greater),
    "aten::ge": _binary(np.greater_equal),
    "aten::bitwise_and": _binary(np.bitwise_and),
    "aten::bitwise_or": _binary(np.bitwise_or),
    "aten::bitwise_xor": _binary(np.bitwise_xor),
    "aten::logical_and": _binary(np.logical_and),
    "aten::logical_or": _binary(np.logical_or),
    "aten::logical_xor": _binary(np.logical_xor),
    "aten::bitwise_not": _unary(np.invert),
    "aten::logical_not": _unary(np.logical_not),
    "aten::neg": _unary(np.negative),
    "aten::abs": _unary(np.abs),
    "aten::clamp": _clamp,
    "aten::where": _where,
    "aten::select_copy": _select,
    "aten::slice_copy": _slice,
    "aten::slice_scatter": _slice_scatter,
    "aten::select_scatter": _select_scatter,
    "aten::unsqueeze_copy": _unsqueeze,
    "aten::squeeze_copy": _squeeze,
    "aten::view_copy": _view,
    "executorch_prim::et_view": _view,
    "aten::expand_copy": _expand,
    "aten::permute_copy": lambda call: call[0].transpose(call.integers(1)),
    "aten::repeat": _repeat,
    "aten::index": _index,
    "aten::index_select": _index_select,
    "aten::index_put": _index_put,
    "aten::index_copy": _index_copy,
    "aten::copy": _copy,
    "aten::cat": _cat,
    "executorch_prim::add": _binary(np.add),
    "executorch_prim::sub": _binary(np.subtract),
    "executorch_prim::mul": _binary(np.multiply),
    "executorch_prim::floordiv": _divide,
    "executorch_prim::mod": _binary(np.mod),
    "executorch_prim::neg": _unary(np.negative),
    "executorch_prim::eq": _binary(np.equal),
    "executorch_prim::lt": _binary(np.less),
    "executorch_prim::le": _binary(np.less_equal),
    "executorch_prim::gt": _binary(np.greater),
    "executorch_prim::ge": _binary(np.greater_equal),
}
"""What is carried out here, by operator; in-place kernels (``copy_``) as their namesakes."""
