"""Kinds come from what a program does with positions: hand-written methods, every kind."""

from __future__ import annotations

import pytest

from kvstore import Kind
from runtime_adapter.state.arithmetic import Arithmetic
from runtime_adapter.state.classifiers.checkpoint import UNKNOWN_SLOTS
from runtime_adapter.state.classifiers.window import WHOLE_RING
from runtime_adapter.state.dataflow import Dataflow
from runtime_adapter.state.endless import is_endless
from runtime_adapter.state.roles import StateTensor
from tests.adapter.methods import CUSTOM, HEAD, N_HEADS, N_SLOTS, PLAIN, Method


def ring_layer(
    method: Method,
    states: tuple[int, int, int],
    *,
    window: int | None = 8,
    sink: int = 0,
    is_plain: bool = False,
) -> None:
    """K, V and bookkeeping of one ring layer; without a window no mask is made."""
    k, v, book = states
    axis = 2 if is_plain else 1
    ring = method.values[k].val.sizes[axis] - sink
    positions = method.positions()
    slots = method.ring_slots(positions, ring=ring, sink=sink)
    held = method.bookkeeping(book, slots, positions)
    mask = None
    if window is not None:
        mask = method.window_mask(held, positions, window=window, sink=sink)
    if is_plain:
        new_k, new_v = (method.index_put(cache, index=slots) for cache in (k, v))
        method.written_out_attention(new_k, new_v)
        if mask is not None:
            scores = method.tensor([16, N_SLOTS])
            method.call("aten::where.self_out", mask, method.new, method.new, out=scores)
        method.copy_(k, new_k)
        method.copy_(v, new_v)
    else:
        method.update_with_indices(k, slots)
        method.update_with_indices(v, slots)
        arguments = [method.new, k, v, method.start, *([] if mask is None else [mask])]
        method.call("llama::custom_sdpa.out", *arguments, out=method.tensor([1, 16, 2, 8]))
    method.copy_(book, held)


def told(state: StateTensor) -> tuple[str | None, Kind | None, int | None, int, int]:
    return (
        state.role,
        state.kind,
        state.token_axis,
        state.window_n_tokens,
        state.sink_n_tokens,
    )


@pytest.mark.parametrize("sink", [0, 4])
@pytest.mark.parametrize("is_plain", [False, True])
def test_a_ring_its_window_and_its_sink_are_read_from_slots_and_mask(
    sink: int, is_plain: bool
) -> None:
    method = Method()
    shape = PLAIN if is_plain else CUSTOM
    states = method.state(shape), method.state(shape), method.state([N_SLOTS], dtype="LONG")
    method.inputs()
    ring_layer(method, states, sink=sink, is_plain=is_plain)
    axis = 2 if is_plain else 1
    assert [told(state) for state in method.find()] == [
        ("k", Kind.WINDOW, axis, 8, sink),
        ("v", Kind.WINDOW, axis, 8, sink),
        ("positions", Kind.POSITIONS, 0, 8, sink),
    ]
    assert all(state.note is None for state in method.find())


def test_each_layer_has_its_own_window_beside_a_full_one() -> None:
    method = Method()
    full = method.state(CUSTOM), method.state(CUSTOM)
    rings = [
        (method.state(CUSTOM), method.state(CUSTOM), method.state([N_SLOTS], dtype="LONG"))
        for _ in range(2)
    ]
    method.inputs()
    ring_layer(method, rings[0], window=8)
    for cache in full:
        method.update_cache(cache)
    method.custom_sdpa(*full)
    ring_layer(method, rings[1], window=16)
    found = {(state.layer, state.role): state.window_n_tokens for state in method.find()}
    assert found == {
        (0, "k"): 8, (0, "v"): 8, (0, "positions"): 8,
        (1, "k"): 0, (1, "v"): 0,
        (2, "k"): 16, (2, "v"): 16, (2, "positions"): 16,
    }  # fmt: skip


def test_without_a_mask_that_tells_it_the_whole_ring_is_kept_and_said_so() -> None:
    method = Method()
    states = method.state(CUSTOM), method.state(CUSTOM), method.state([N_SLOTS], dtype="LONG")
    method.inputs()
    ring_layer(method, states, window=None, sink=4)
    found = method.find()
    assert {state.window_n_tokens for state in found} == {N_SLOTS - 4}
    assert [state.note for state in found] == [WHOLE_RING, WHOLE_RING, None]


def test_a_mask_that_is_no_window_keeps_the_whole_ring() -> None:
    method = Method()
    k, v, book = method.state(CUSTOM), method.state(CUSTOM), method.state([N_SLOTS], dtype="LONG")
    method.inputs()
    positions = method.positions()
    slots = method.ring_slots(positions, ring=N_SLOTS)
    held = method.bookkeeping(book, slots, positions)
    # Every third position: neither a window nor a sink.
    rest = method.call(
        "aten::remainder.Scalar_out", held, method.int(3),
        out=method.tensor([N_SLOTS], dtype="LONG"),
    )  # fmt: skip
    mask = method.call(
        "aten::eq.Scalar_out", rest, method.int(0), out=method.tensor([N_SLOTS], dtype="BOOL")
    )
    method.update_with_indices(k, slots)
    method.update_with_indices(v, slots)
    method.call(
        "llama::custom_sdpa.out", method.new, k, v, method.start, mask,
        out=method.tensor([1, 16, 2, 8]),
    )  # fmt: skip
    method.copy_(book, held)
    assert {state.window_n_tokens for state in method.find()} == {N_SLOTS}


def test_indices_that_do_not_wrap_make_a_full_cache_whatever_operator_writes_it() -> None:
    method = Method()
    k, v = method.state(CUSTOM), method.state(CUSTOM)
    method.inputs()
    slots = method.ring_slots(method.positions(), ring=1 << 40)
    method.update_with_indices(k, slots)
    method.update_with_indices(v, slots)
    method.custom_sdpa(k, v)
    assert [state.kind for state in method.find()] == [Kind.FULL, Kind.FULL]


def test_slots_that_follow_no_rule_are_kept_whole_and_said_so() -> None:
    method = Method()
    k, counter = method.state(PLAIN), method.state([1, 1], dtype="LONG")
    method.inputs()
    slots = method.call(
        "aten::squeeze_copy.dims_out", counter, out=method.tensor([16], dtype="LONG")
    )
    method.copy_(k, method.index_put(k, index=slots))
    more = method.call("aten::add.out", counter, out=method.tensor([1, 1], dtype="LONG"))
    method.copy_(counter, more)
    found = {state.value: state for state in method.find()}
    assert {state.kind for state in found.values()} == {Kind.CHECKPOINT}
    assert {state.token_axis for state in found.values()} == {None}
    assert found[k].note == UNKNOWN_SLOTS
    assert found[counter].note is None


def test_a_batch_of_one_that_is_cut_out_and_put_back_does_not_hide_the_slots() -> None:
    method = Method()
    k = method.state(PLAIN)
    method.inputs()
    whole = [method.int(0), method.int(0), method.int(1), method.int(1)]
    part = method.call("aten::slice_copy.Tensor_out", k, *whole, out=method.tensor(PLAIN))
    written = method.index_put(part)
    back = method.call("aten::slice_scatter.out", k, written, *whole, out=method.tensor(PLAIN))
    method.copy_(k, back)
    (state,) = method.find()
    assert (state.kind, state.token_axis) == (Kind.FULL, 2)


def recurrent_layer(method: Method, conv: int, matrix: int) -> None:
    joined = method.call(
        "aten::cat.out", method.tensor_list(conv, method.new), out=method.tensor([1, 64, 19])
    )
    last = method.call("aten::slice_copy.Tensor_out", joined, out=method.tensor([1, 64, 3]))
    mixed = method.call("aten::convolution.out", joined, out=method.tensor([1, 64, 16]))
    result, after = method.tensor([1, 2, 16, 8]), method.tensor([1, 2, 8, 8])
    method.call("aten::mul.out", matrix, mixed, out=result)
    method.call("aten::add.out", matrix, mixed, out=after)
    method.call("aten::linear.out", result, out=method.tensor([1, 16, 64]))
    method.copy_(conv, last)
    method.copy_(matrix, after)


def test_recurrent_state_is_whole_named_by_its_use_and_numbered_between_attention_layers() -> None:
    method = Method()
    convs = [method.state([1, 64, 3]) for _ in range(3)]
    matrices = [method.state([1, 2, 8, 8]) for _ in range(3)]
    k, v = method.state(CUSTOM), method.state(CUSTOM)
    method.inputs()
    for index in (0, 1):
        recurrent_layer(method, convs[index], matrices[index])
    method.update_cache(k)
    method.update_cache(v)
    method.custom_sdpa(k, v)
    recurrent_layer(method, convs[2], matrices[2])
    assert [(state.value, state.layer, state.role) for state in method.find()] == [
        (convs[0], 0, "conv_state"),
        (matrices[0], 0, "recurrent_state"),
        (convs[1], 1, "conv_state"),
        (matrices[1], 1, "recurrent_state"),
        (k, 2, "k"),
        (v, 2, "v"),
        (convs[2], 3, "conv_state"),
        (matrices[2], 3, "recurrent_state"),
    ]


def test_state_of_a_form_that_says_nothing_is_numbered() -> None:
    method = Method()
    first, second = method.state([4, 3]), method.state([5])
    method.inputs()
    for state in (first, second):
        shape = method.values[state].val.sizes
        method.copy_(state, method.call("aten::exp.out", state, out=method.tensor(shape)))
    assert [(state.layer, state.role) for state in method.find()] == [
        (0, "state0"),
        (0, "state1"),
    ]


def test_what_is_read_and_never_changed_is_no_state() -> None:
    method = Method()
    table, k, v = method.state([64, 8]), method.state(CUSTOM), method.state(CUSTOM)
    method.inputs()
    method.call("aten::mul.out", table, method.new, out=method.tensor([64, 8]))
    method.update_cache(k)
    method.update_cache(v)
    method.custom_sdpa(k, v)
    assert [state.value for state in method.find()] == [k, v]


@pytest.mark.parametrize("op", ["aten::copy_", "aten::copy.out"])
def test_what_a_copy_replaces_whole_is_not_read_by_it(op: str) -> None:
    """Scratch memory that is written whole at every call outlives none."""
    method = Method()
    k, v = method.state(CUSTOM), method.state(CUSTOM)
    method.inputs()
    scratch = method.tensor([16], dtype="LONG")
    source = method.call("aten::arange", method.start, out=method.tensor([16], dtype="LONG"))
    out = scratch if op == "aten::copy_" else method.tensor([16], dtype="LONG")
    method.call(op, scratch, source, method.flag(), out=out)
    method.update_cache(k)
    method.update_cache(v)
    method.custom_sdpa(k, v)
    assert [state.value for state in method.find()] == [k, v]


def test_packed_content_and_its_norms_are_told_apart_by_width() -> None:
    method = Method()
    packed, norms = [1, N_HEADS, N_SLOTS, HEAD], [1, N_HEADS, N_SLOTS, 1]
    states = [method.state(shape) for shape in (norms, packed, norms, packed)]
    method.inputs()
    k_norms, k, v_norms, v = states
    new = {state: method.index_put(state) for state in states}
    whole_k = method.call("aten::mul.out", new[k], new[k_norms], out=method.tensor(PLAIN))
    whole_v = method.call("aten::mul.out", new[v], new[v_norms], out=method.tensor(PLAIN))
    method.written_out_attention(whole_k, whole_v)
    for state in states:
        method.copy_(state, new[state])
    assert [(state.value, state.layer, state.role) for state in method.find()] == [
        (k, 0, "k"),
        (k_norms, 0, "k_scale"),
        (v, 0, "v"),
        (v_norms, 0, "v_scale"),
    ]


@pytest.mark.parametrize(("ring", "expected"), [(64, True), (65, False), (1 << 40, False)])
def test_positions_that_wrap_before_every_table_make_a_method_endless(
    ring: int, expected: bool
) -> None:
    method = Method()
    table = method.tensor([64, 8], planned=False)
    method.inputs()
    rows = method.ring_slots(method.positions(), ring=ring)
    where = method.optional_list(rows)
    method.call("aten::index.Tensor_out", table, where, out=method.tensor([16, 8]))
    assert is_endless(Arithmetic(Dataflow(method.graph()))) is expected


def test_a_method_that_looks_nothing_up_is_not_called_endless() -> None:
    method = Method()
    method.inputs()
    assert not is_endless(Arithmetic(Dataflow(method.graph())))
