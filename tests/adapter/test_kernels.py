"""The kernels in torch give the same bytes as the definition in numpy."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import as_file, files

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("executorch")

import torch

from kvstore import Expansion, Grid, Rotation, use_kernels
from kvstore.codec import NumpyKernels, kernels
from runtime_adapter import Model
from runtime_adapter.runtime.kernels import TorchKernels

pytestmark = pytest.mark.adapter

DEFINITION, TORCH = NumpyKernels(), TorchKernels()
DTYPES = ("float32", "float16", "bfloat16")
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


def numbers(dtype, n_tokens, n_channels, *, seed, scale=1.0, spread=0.0):
    """Finite numbers of that dtype; ``spread`` is how many powers of two apart they may be."""
    generator = np.random.default_rng(seed)
    floats = generator.standard_normal((n_tokens, n_channels)) * scale
    floats = floats * 2.0 ** generator.uniform(-spread, 0, floats.shape)
    floats = np.clip(floats, -6e4, 6e4).astype(np.float32)
    destination = bytearray(floats.nbytes // (1 if dtype == "float32" else 2))
    DEFINITION.convert_into(memoryview(floats.tobytes()), "float32", memoryview(destination), dtype)
    return memoryview(bytes(destination))


def grids():
    return st.one_of(
        st.builds(
            lambda n_tokens, n_groups, size: Grid(
                n_tokens=n_tokens, n_channels=2 * n_groups * size, group_size=size, by_channel=False
            ),
            *(st.integers(1, 20), st.integers(1, 4), st.sampled_from([1, 4, 32, 64])),
        ),
        st.builds(
            lambda n_tokens, half, size: Grid(
                n_tokens=n_tokens, n_channels=2 * half, group_size=size, by_channel=True
            ),
            *(st.integers(1, 150), st.integers(1, 40), st.sampled_from([1, 7, 64])),
        ),
    )


CASES = {
    "grid": grids(),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 2**32 - 1),
    "scale": st.sampled_from([0.0, 1e-44, 1e-38, 1e-8, 1e-3, 1.0, 100.0, 6e4]),
    "spread": st.sampled_from([0.0, 3.0, 30.0]),
}


@given(**CASES)
def test_int8_is_the_same_there_and_back(grid, dtype, seed, scale, spread):
    data = numbers(dtype, grid.n_tokens, grid.n_channels, seed=seed, scale=scale, spread=spread)
    codes = [tuple(map(bytes, one.quantize8(data, dtype, grid))) for one in (DEFINITION, TORCH)]
    assert codes[0] == codes[1]
    restored = []
    for one in (DEFINITION, TORCH):
        destination = memoryview(bytearray(data.nbytes))
        one.dequantize8_into(tuple(map(memoryview, codes[0])), grid, destination, dtype)
        restored.append(bytes(destination))
    assert restored[0] == restored[1]


@given(**CASES)
def test_int4_is_the_same_there_and_back(grid, dtype, seed, scale, spread):
    data = numbers(dtype, grid.n_tokens, grid.n_channels, seed=seed, scale=scale, spread=spread)
    codes = [tuple(map(bytes, one.quantize4(data, dtype, grid))) for one in (DEFINITION, TORCH)]
    assert codes[0] == codes[1]
    restored = []
    for one in (DEFINITION, TORCH):
        destination = memoryview(bytearray(data.nbytes))
        one.dequantize4_into(tuple(map(memoryview, codes[0])), grid, destination, dtype)
        restored.append(bytes(destination))
    assert restored[0] == restored[1]


@given(st.data())
def test_any_codes_are_decoded_alike(data):
    """Also those that no writer makes, but for scales that are not numbers."""
    grid, dtype = data.draw(grids()), data.draw(st.sampled_from(DTYPES))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    scales = generator.integers(0x3000, 0x4300, grid.n_groups, dtype=np.uint16).tobytes()
    zeros = generator.integers(-(2**15), 2**15, grid.n_groups, dtype=np.int16).tobytes()
    n_numbers = grid.n_tokens * grid.n_channels
    codes = generator.bytes(n_numbers)
    nbytes = n_numbers * (4 if dtype == "float32" else 2)
    eight, four = [], []
    for one in (DEFINITION, TORCH):
        destination = memoryview(bytearray(nbytes))
        one.dequantize8_into((memoryview(scales), memoryview(codes)), grid, destination, dtype)
        eight.append(bytes(destination))
        parts = (memoryview(scales), memoryview(zeros), memoryview(codes[: n_numbers // 2]))
        one.dequantize4_into(parts, grid, destination, dtype)
        four.append(bytes(destination))
    assert eight[0] == eight[1]
    assert four[0] == four[1]


@given(st.data())
def test_components_become_the_same_numbers(data):
    """Whatever they are: small sums, sums that only a float64 holds, turned or not."""
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    n_components, n_tokens = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 40))
    n_heads, head_dim = data.draw(st.integers(1, 3)), 2 * data.draw(st.integers(1, 12))
    rotation = None
    if data.draw(st.booleans()):
        n_pairs = data.draw(st.integers(1, head_dim // 2))
        frequencies = generator.integers(0, 2**64, n_pairs, dtype=np.uint64).tobytes()
        pairing = data.draw(st.sampled_from([1, 2]))
        rotation = Rotation(pairing=pairing, head_dim=head_dim, frequencies=frequencies)
    is_small, n_channels = data.draw(st.booleans()), n_heads * head_dim
    largest = 300 if is_small else 32767
    axes = generator.integers(-largest, largest + 1, (n_components, n_channels)).astype(np.int16)
    mean_limit = 1000 if is_small else 2**31 - 1
    mean = generator.integers(-mean_limit, mean_limit + 1, n_channels).astype(np.int32)
    limit = 4000 if is_small else 32767
    codes = generator.integers(-limit, limit + 1, (n_components, n_tokens)).astype(np.int16)
    dtype = data.draw(st.sampled_from(DTYPES))
    expansion = Expansion(
        n_tokens=n_tokens,
        n_channels=n_channels,
        axes=memoryview(axes.tobytes()),
        mean=memoryview(mean.tobytes()),
        exponent=data.draw(st.integers(20, 40)),
        is_small=is_small,
        rotation=rotation,
        start=data.draw(st.integers(0, 2**40)),
    )
    restored = []
    for one in (DEFINITION, TORCH):
        nbytes = n_tokens * n_channels * (4 if dtype == "float32" else 2)
        destination = memoryview(bytearray(nbytes))
        one.expand_into(memoryview(codes.tobytes()), expansion, destination, dtype)
        restored.append(bytes(destination))
    assert restored[0] == restored[1]
    if is_small:  # the same sums in the wider floats
        destination = memoryview(bytearray(len(restored[0])))
        wide = replace(expansion, is_small=False)
        DEFINITION.expand_into(memoryview(codes.tobytes()), wide, destination, dtype)
        assert bytes(destination) == restored[0]


@pytest.mark.parametrize(
    "ask",
    [
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
        pytest.param("torch.set_float32_matmul_precision('medium')", marks=pytest.mark.slow),
        pytest.param("torch.backends.fp32_precision = 'tf32'", marks=pytest.mark.slow),
    ],
)
def test_no_setting_of_the_app_changes_what_is_restored(run_source, ask):
    """In a process of its own: not all of them can be taken back."""
    output = run_source(
        "import numpy as np, torch\n"
        "from kvstore import Expansion\n"
        "from kvstore.codec import NumpyKernels\n"
        "from runtime_adapter.runtime.kernels import TorchKernels\n"
        f"{ask}\n"
        "generator = np.random.default_rng(0)\n"
        "axes = generator.integers(-300, 301, (64, 128)).astype(np.int16)\n"
        "codes = generator.integers(-800, 801, (64, 256)).astype(np.int16)\n"
        "expansion = Expansion(n_tokens=256, n_channels=128, axes=memoryview(axes.tobytes()),\n"
        "    mean=memoryview(bytes(512)), exponent=24, is_small=True, rotation=None, start=0)\n"
        "found = []\n"
        "for one in (NumpyKernels(), TorchKernels()):\n"
        "    destination = bytearray(256 * 128 * 4)\n"
        "    one.expand_into(memoryview(codes.tobytes()), expansion, memoryview(destination),\n"
        "        'float32')\n"
        "    found.append(bytes(destination))\n"
        "print(found[0] == found[1])\n"
    )
    assert output.split() == ["True"]


def test_what_was_first_decoded_in_inference_mode_is_decoded_outside_of_it_too():
    grid = Grid(n_tokens=7, n_channels=48, group_size=16, by_channel=False)
    parts = (memoryview(bytes(2 * grid.n_groups)), memoryview(bytes(7 * 48)))
    for mode in (True, False):
        with torch.inference_mode(mode=mode):
            TORCH.dequantize8_into(parts, grid, memoryview(bytearray(7 * 48 * 4)), "float32")


@EVERY_DTYPE
@pytest.mark.parametrize("worst", [0.0, 1.5, 32768.0, np.inf, -np.inf, np.nan])
def test_the_largest_magnitude_is_found(dtype, worst):
    floats = np.linspace(-1, 1, 70_000, dtype=np.float32)
    floats[69_000] = worst
    data = memoryview(bytearray(floats.nbytes // (1 if dtype == "float32" else 2)))
    TORCH.convert_into(memoryview(floats.tobytes()), "float32", data, dtype)
    found = [one.largest(data, dtype) for one in (DEFINITION, TORCH)]
    assert np.array_equal(
        found, [np.nan if np.isnan(worst) else max(abs(worst), 1.0)] * 2, equal_nan=True
    )


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_every_number_of_16_bits_and_what_lies_between_is_converted_alike(source, target):
    if source == "float32":
        bits = np.random.default_rng(1).integers(0, 2**32, 1 << 18, dtype=np.uint32)
        ties = np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000
        floats = np.concatenate([bits, ties, ties + 1, ties - 1]).view(np.float32)
        limit = {"float16": 65504.0, "bfloat16": 3.38e38}.get(target, np.inf)
        data = floats[np.abs(floats) <= limit].tobytes()
    else:
        every = np.arange(1 << 16, dtype=np.uint16)
        exponent = 0x7C00 if source == "float16" else 0x7F80
        finite = every[every & exponent != exponent]
        if target == "float16" and source == "bfloat16":
            floats = (finite.astype(np.uint32) << 16).view(np.float32)
            finite = finite[np.abs(floats) <= 65504.0]
        data = finite.tobytes()
    nbytes = len(data) // (4 if source == "float32" else 2) * (4 if target == "float32" else 2)
    results = []
    for one in (DEFINITION, TORCH):
        destination = memoryview(bytearray(nbytes))
        one.convert_into(memoryview(data), source, destination, target)
        results.append(bytes(destination))
    assert results[0] == results[1]


def test_opening_a_model_puts_them_in_place():
    former = kernels()
    try:
        use_kernels(DEFINITION)
        with as_file(files("runtime_adapter") / "demo" / "tiny-llama.pte") as program:
            Model.open(program).close()
        assert isinstance(kernels(), TorchKernels)
    finally:
        use_kernels(former)
