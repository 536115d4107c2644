"""Every kind of state in really exported programs: what the analysis says of each."""

from __future__ import annotations

import json

import pytest

from kvstore import Kind
from kvstore.layout import UNLIMITED_N_TOKENS, TensorSpec
from runtime_adapter.program.analysis import ProgramAnalysis
from runtime_adapter.program.naming import write_named_copy
from runtime_adapter.program.survey import analyze
from tests import programs

pytestmark = [pytest.mark.adapter, pytest.mark.slow]

FULL, WINDOW, POSITIONS, CHECKPOINT = Kind.FULL, Kind.WINDOW, Kind.POSITIONS, Kind.CHECKPOINT
QUANTIZED = ["k", "k_scale", "k_zero_point", "v", "v_scale", "v_zero_point"]


def analysed(name: str) -> ProgramAnalysis:
    if not programs.is_available(name):
        pytest.skip("this ExecuTorch cannot export it")
    return analyze(programs.path(name))


def layer(analysis: ProgramAnalysis, number: int) -> list[TensorSpec]:
    return [
        spec for spec in analysis.layout.tensors if spec.layer == number and spec.role != "logits"
    ]


@pytest.mark.parametrize(
    ("name", "number", "seen", "shape", "token_axis"),
    [
        ("ring", 1, (64, 0), (1, 128, 2, 16), 1),
        ("ring_only", 0, (16, 0), (1, 32, 2, 16), 1),
        ("ring_only", 1, (16, 0), (1, 32, 2, 16), 1),
        ("ring_xnnpack", 1, (16, 0), (1, 32, 2, 16), 1),
        ("plain_rings_xnnpack", 0, (16, 0), (1, 2, 32, 16), 2),
        ("plain_rings_xnnpack", 2, (16, 0), (1, 2, 32, 16), 2),
        ("ring_one_token", 1, (16, 0), (1, 32, 2, 16), 1),
        ("plain_ring", 1, (16, 0), (1, 2, 32, 16), 2),
        ("sink", 0, (64, 4), (1, 132, 2, 16), 1),
        ("sink", 1, (64, 4), (1, 132, 2, 16), 1),
        ("plain_sink", 0, (16, 4), (1, 2, 36, 16), 2),
    ],
)
def test_a_ring_layer_has_its_window_its_sink_and_its_bookkeeping(
    name: str, number: int, seen: tuple[int, int], shape: tuple[int, ...], token_axis: int
) -> None:
    k, v, positions = layer(analysed(name), number)
    for spec, role in ((k, "k"), (v, "v")):
        assert (spec.role, spec.kind, spec.shape, spec.token_axis) == (
            *(role, WINDOW, shape, token_axis),
        )
    assert (positions.role, positions.kind, positions.dtype) == ("positions", POSITIONS, "int64")
    assert positions.shape == (shape[token_axis],)
    for spec in (k, v, positions):
        assert (spec.window_n_tokens, spec.sink_n_tokens) == seen


def test_a_quantized_ring_is_one_unit_with_its_scales_and_zero_points() -> None:
    analysis = analysed("quantized_ring")
    assert [spec.role for spec in layer(analysis, 0)] == QUANTIZED
    assert {spec.kind for spec in layer(analysis, 0)} == {FULL}
    ring = layer(analysis, 1)
    assert [spec.role for spec in ring] == [*QUANTIZED, "positions"]
    assert [spec.kind for spec in ring] == [*[WINDOW] * 6, POSITIONS]
    assert {spec.window_n_tokens for spec in ring} == {16}


@pytest.mark.parametrize("name", ["qwen35", "qwen35_one_token"])
def test_delta_net_state_is_two_checkpoints_beside_ordinary_attention(name: str) -> None:
    analysis = analysed(name)
    assert [(spec.role, spec.kind, spec.shape) for spec in layer(analysis, 0)] == [
        ("conv_state", CHECKPOINT, (1, 160, 4)),
        ("recurrent_state", CHECKPOINT, (1, 4, 16, 24)),
    ]
    assert [(spec.role, spec.kind) for spec in layer(analysis, 1)] == [("k", FULL), ("v", FULL)]


@pytest.mark.parametrize(("name", "role"), [("lfm2", "conv_state"), ("lfm2_xnnpack", "state")])
def test_short_convolutions_keep_one_checkpoint_a_layer(name: str, role: str) -> None:
    analysis = analysed(name)
    for number in (0, 2):
        (state,) = layer(analysis, number)
        assert (state.role, state.kind, state.shape) == (role, CHECKPOINT, (1, 64, 2))
    assert [spec.role for spec in layer(analysis, 1)] == ["k", "v"]


@pytest.mark.parametrize("name", ["qwen35", "lfm2"])
def test_a_recurrent_layout_ends_with_the_logits_which_no_program_holds(name: str) -> None:
    analysis = analysed(name)
    last = analysis.layout.tensors[-1]
    assert (last.name, last.role, last.layer, last.kind) == ("logits", "logits", 0, CHECKPOINT)
    assert (last.dtype, last.shape) == ("float32", (96,))
    assert [spec.role for spec in analysis.layout.tensors].count("logits") == 1


def test_a_program_without_recurrent_state_has_no_logits_in_its_layout() -> None:
    assert "logits" not in {spec.role for spec in analysed("ring").layout.tensors}


def test_static_quantization_keeps_keys_and_values_only() -> None:
    analysis = analysed("static_quantized")
    assert [(spec.layer, spec.role, spec.dtype) for spec in analysis.layout.tensors] == [
        (0, "k", "int8"),
        (0, "v", "int8"),
        (1, "k", "int8"),
        (1, "v", "int8"),
    ]
    assert {spec.shape for spec in analysis.layout.tensors} == {(1, 512, 2, 16)}


def test_layers_that_share_keys_and_values_come_once() -> None:
    assert len(analysed("yoco_one_token").layout.tensors) == 4
    gemma = analysed("gemma4_one_token").layout.tensors
    assert [(spec.layer, spec.role, spec.shape) for spec in gemma] == [
        (0, "k", (1, 1, 512, 16)),
        (0, "v", (1, 1, 512, 16)),
        (1, "k", (1, 1, 512, 24)),
        (1, "v", (1, 1, 512, 24)),
    ]
    assert {(spec.kind, spec.token_axis) for spec in gemma} == {(FULL, 2)}


def test_keys_and_values_of_a_layer_and_layers_may_differ_in_shape() -> None:
    assert [
        (spec.layer, spec.role, spec.shape) for spec in analysed("two_shapes").layout.tensors
    ] == [
        (0, "k", (1, 1, 512, 12)),
        (0, "v", (1, 1, 512, 20)),
        (1, "k", (1, 2, 512, 16)),
        (1, "v", (1, 2, 512, 8)),
    ]


def test_packed_keys_have_their_norms_as_scales() -> None:
    tensors = analysed("turboquant").layout.tensors
    assert [(spec.role, spec.dtype, spec.shape) for spec in tensors] == [
        ("k", "uint8", (1, 2, 512, 8)),
        ("k_scale", "bfloat16", (1, 2, 512, 1)),
        ("v", "uint8", (1, 2, 512, 8)),
        ("v_scale", "bfloat16", (1, 2, 512, 1)),
    ]


def test_only_a_sink_goes_on_past_the_context() -> None:
    assert analysed("ring").capacity_n_tokens == 512
    # Nothing of it ends but the rotary table.
    ring_only = analysed("ring_only")
    assert ring_only.layout.capacity_n_tokens == UNLIMITED_N_TOKENS
    assert ring_only.capacity_n_tokens == 512
    sink = analysed("sink")
    assert sink.is_endless
    assert sink.capacity_n_tokens == UNLIMITED_N_TOKENS


@pytest.mark.parametrize("name", ["sink", "qwen35", "quantized_ring"])
def test_an_analysis_of_every_kind_survives_json(name: str) -> None:
    analysis = analysed(name)
    assert ProgramAnalysis.from_json(json.loads(json.dumps(analysis.to_json()))) == analysis


@pytest.mark.parametrize("name", ["sink", "qwen35", "quantized_ring"])
def test_a_named_copy_is_the_same_program_of_the_same_kinds(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = analysed(name)
    copy = tmp_path_factory.mktemp("copies") / "model.pte"
    write_named_copy(programs.path(name), copy)
    after = analyze(copy)
    assert after.is_named
    assert after.layout == before.layout
    assert after.fingerprint == before.fingerprint
