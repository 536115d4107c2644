"""Roles come from instructions: hand-written methods here, real exports in test_program."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.errors import CorruptProgramError
from runtime_adapter.program.naming import name_state
from runtime_adapter.state.roles import StateTensor
from tests.adapter.methods import CUSTOM, HEAD, N_HEADS, N_SLOTS, PLAIN, Method, record


def told(states: tuple[StateTensor, ...]) -> list[tuple[int, int | None, str | None, int | None]]:
    return [(state.value, state.layer, state.role, state.token_axis) for state in states]


def test_arguments_of_the_fused_attention_tell_k_from_v_whatever_the_order_of_values() -> None:
    method = Method()
    v, k = method.state(CUSTOM), method.state(CUSTOM)
    method.inputs()
    method.update_cache(v)
    method.update_cache(k)
    method.custom_sdpa(k, v)
    assert told(method.find()) == [(k, 0, "k", 1), (v, 0, "v", 1)]


def test_layers_count_in_the_order_of_their_attention_not_of_their_values() -> None:
    method = Method()
    late_k, late_v, k, v = (method.state(CUSTOM) for _ in range(4))
    method.inputs()
    for first, second in ((k, v), (late_k, late_v)):
        method.update_cache(first)
        method.update_cache(second)
        method.custom_sdpa(first, second)
    assert [state.value for state in method.find()] == [k, v, late_k, late_v]


def test_a_plain_cache_is_found_through_the_copy_at_the_end() -> None:
    method = Method()
    k, v = method.state(PLAIN), method.state(PLAIN)
    method.inputs()
    new_v, new_k = method.index_put(v), method.index_put(k)
    method.written_out_attention(new_k, new_v)
    method.copy_(k, new_k)
    method.copy_(v, new_v)
    assert told(method.find()) == [(k, 0, "k", 2), (v, 0, "v", 2)]


def test_an_in_place_index_put_is_an_update() -> None:
    method = Method()
    k, v = method.state(PLAIN), method.state(PLAIN)
    method.inputs()
    for cache in (k, v):
        where = method.optional_list(-1, -1, method.index)
        method.call("aten::index_put_", cache, where, method.new, method.flag(), out=cache)
    method.written_out_attention(k, v)
    assert told(method.find()) == [(k, 0, "k", 2), (v, 0, "v", 2)]


def test_index_copy_names_its_token_axis() -> None:
    method = Method()
    k, v = method.state(PLAIN), method.state(PLAIN)
    method.inputs()
    made = [
        method.call(
            "aten::index_copy.out", cache, method.int(-2), method.index, method.new,
            out=method.tensor(PLAIN),
        )
        for cache in (k, v)
    ]  # fmt: skip
    method.written_out_attention(*made)
    method.copy_(k, made[0])
    method.copy_(v, made[1])
    assert told(method.find()) == [(k, 0, "k", 2), (v, 0, "v", 2)]


def test_where_a_delegate_hides_the_attention_k_is_the_one_that_is_updated_first() -> None:
    method = Method()
    k, v = method.state(PLAIN), method.state(PLAIN)
    method.inputs()
    new_k, new_v = method.index_put(k), method.index_put(v)
    method.delegate("XnnpackBackend", method.new, new_k, new_v, method.tensor([1, 16, 2, 8]))
    method.copy_(k, new_k)
    method.copy_(v, new_v)
    assert told(method.find()) == [(k, 0, "k", 2), (v, 0, "v", 2)]


def test_scales_and_zero_points_of_a_quantized_cache_have_roles_of_their_own() -> None:
    method = Method()
    small = [1, N_SLOTS, N_HEADS, 1]
    k, k_scale, k_zero = (
        method.state(CUSTOM, dtype="CHAR"),
        method.state(small),
        method.state(small),
    )
    v, v_scale, v_zero = (
        method.state(CUSTOM, dtype="CHAR"),
        method.state(small),
        method.state(small),
    )
    method.inputs()
    for cache in (k, k_scale, k_zero, v, v_scale, v_zero):
        method.update_cache(cache)
    rest = [method.start, method.flag(), method.flag(), method.flag(), method.flag()]
    q = [method.new, method.new]
    method.call(
        "llama::custom_quantized_sdpa.out",
        *(method.new, k, v, *rest, *q, k_zero, k_scale, v_zero, v_scale),
        out=method.tensor([1, 16, 2, 8]),
    )
    assert [(state.value, state.role) for state in method.find()] == [
        (k, "k"),
        (k_scale, "k_scale"),
        (k_zero, "k_zero_point"),
        (v, "v"),
        (v_scale, "v_scale"),
        (v_zero, "v_zero_point"),
    ]


def test_a_scale_that_goes_through_dequantize_is_still_a_scale() -> None:
    method = Method()
    k, v = method.state(CUSTOM, dtype="CHAR"), method.state(CUSTOM)
    scale = method.state([1, N_SLOTS, N_HEADS, 1])
    method.inputs()
    for cache in (k, v, scale):
        method.update_cache(cache)
    whole = method.call(
        "quantized_decomposed::dequantize_per_token.out", k, scale, out=method.tensor(CUSTOM)
    )
    method.custom_sdpa(whole, v)
    assert [(state.value, state.role) for state in method.find()] == [
        (k, "k"),
        (scale, "k_scale"),
        (v, "v"),
    ]


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ([2, N_HEADS, N_SLOTS, HEAD], {}, "batch size 2"),
        (PLAIN, {"dtype": "COMPLEX32"}, "dtype complex32"),
        (PLAIN, {"dim_order": [0, 2, 1, 3]}, "memory order"),
    ],
)
def test_a_cache_that_cannot_be_cut_says_why(
    shape: list[int], options: dict[str, Any], reason: str
) -> None:
    method = Method()
    k = method.state(shape, **options)
    method.inputs()
    method.copy_(k, method.index_put(k))
    (state,) = method.find()
    assert reason in str(state.reason)


def test_values_that_a_step_wrote_before_they_are_read_are_no_state() -> None:
    method = Method()
    method.inputs()
    once = method.call("aten::add.out", method.new, out=method.tensor([1, 16, 2, 8]))
    method.call("aten::mul.out", once, once, out=method.tensor([1, 16, 2, 8]))
    assert method.find() == ()


def test_a_static_view_that_no_instruction_makes_is_an_alias_not_state() -> None:
    method = Method()
    method.inputs()
    base = method.call("aten::add.out", method.new, out=method.tensor([1, 16, 2, 8]))
    view = method.tensor([16, 16], offset=method.values[base].val.allocation_info.memory_offset)
    method.call("aten::mul.out", view, view, out=method.tensor([16, 16]))
    assert method.find() == ()


def test_outputs_of_a_delegate_are_no_state() -> None:
    method = Method()
    method.inputs()
    made = method.tensor([1, 16, 2, 8])
    method.delegate("XnnpackBackend", method.new, made)
    method.call("aten::add.out", made, out=method.tensor([1, 16, 2, 8]))
    assert method.find() == ()


def test_state_that_only_a_delegate_reads_is_found_by_its_update() -> None:
    method = Method()
    state = method.state([1, 8])
    method.inputs()
    made = method.tensor([1, 8])
    method.delegate("XnnpackBackend", method.new, state, made)
    method.copy_(state, made)
    assert [found.value for found in method.find()] == [state]


def test_names_are_made_of_layer_and_role_and_own_names_are_kept() -> None:
    method = Method()
    k = method.state(CUSTOM, name="blocks.0.k")
    v = method.state(CUSTOM)
    method.inputs()
    method.update_cache(k)
    method.update_cache(v)
    method.custom_sdpa(k, v)
    named = name_state(method.find())
    assert [(item.name, item.is_own_name) for item in named] == [
        ("blocks.0.k", True),
        ("layers.0.attention.kv_cache.v_cache", False),
    ]


def test_a_name_that_stands_twice_is_replaced_and_names_stay_unique() -> None:
    method = Method()
    k, v = (method.state(CUSTOM, name="layers.0.attention.kv_cache.k_cache") for _ in range(2))
    method.inputs()
    method.update_cache(k)
    method.update_cache(v)
    method.custom_sdpa(k, v)
    names = [item.name for item in name_state(method.find())]
    assert names == [
        "layers.0.attention.kv_cache.k_cache_2",
        "layers.0.attention.kv_cache.v_cache",
    ]


@pytest.mark.parametrize("broken", ["value", "operator", "delegate"])
def test_an_instruction_that_points_nowhere_is_corruption(broken: str) -> None:
    method = Method()
    method.inputs()
    if broken == "value":
        method.call("aten::add.out", 10_000, out=method.tensor([1]))
    elif broken == "operator":
        method._step(record("KernelCall", op_index=99, args=[0]))
    else:
        method._step(record("DelegateCall", delegate_index=99, args=[0]))
    with pytest.raises(CorruptProgramError, match="points at"):
        method.find()
