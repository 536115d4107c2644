"""The codec pca: how close, how small, what it refuses, and how it finds out what keys turn by."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import codec
from kvstore.codec import Basis, Block, packing
from kvstore.errors import CorruptStoreError, DecodeError

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
N_LEARNED, HEAD_DIM, N_HEADS = 1536, 16, 2
WIDTH = HEAD_DIM * N_HEADS


def block(n_tokens, *, start=4, dtype="float32", head_dim=HEAD_DIM, n_heads=N_HEADS):
    return Block(
        dtype=dtype,
        start=start,
        n_tokens=n_tokens,
        n_channels=n_heads * head_dim,
        head_dim=head_dim,
    )


def turned(floats, start, frequencies, *, pairing):
    """``[n, heads, D]`` with the first ``2 * len(frequencies)`` dimensions turned, in float64."""
    n_pairs = len(frequencies)
    angles = (start + np.arange(len(floats)))[:, None, None] * frequencies
    first, second = {
        "neighbours": (slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2)),
        "halves": (slice(0, n_pairs), slice(n_pairs, 2 * n_pairs)),
    }[pairing]
    pairs = (floats[..., first] + 1j * floats[..., second]) * np.exp(1j * angles)
    found = floats.copy()
    found[..., first], found[..., second] = pairs.real, pairs.imag
    return found


def rope(theta, n_pairs):
    return theta ** (-np.arange(n_pairs) / n_pairs)


def spoken(one, seed, *, frequencies=(), pairing="neighbours", scale=1.0, mean=1.0):
    """Tokens of one tensor, whose channels go together; ``seed`` says which tokens."""
    own = np.random.default_rng(one.n_channels)
    means = mean * own.standard_normal(one.n_channels)
    ways = own.standard_normal((one.n_channels, one.n_channels)) * np.geomspace(
        1, 0.01, one.n_channels
    )
    amounts = np.random.default_rng(seed).standard_normal((one.n_tokens, one.n_channels))
    floats = (amounts @ ways.T + means).reshape(one.n_tokens, -1, one.head_dim)
    if len(frequencies):
        floats = turned(floats, one.start, np.asarray(frequencies), pairing=pairing)
    return (scale * floats).astype(np.float32).reshape(one.n_tokens, one.n_channels)


def as_bytes(floats, dtype):
    found = bytearray(floats.size * DTYPES[dtype])
    source = memoryview(np.ascontiguousarray(floats)).cast("B")
    codec.NumpyKernels().convert_into(source, "float32", memoryview(found), dtype)
    return memoryview(bytes(found))


def as_floats(data, dtype, shape):
    found = bytearray(4 * math.prod(shape))
    codec.NumpyKernels().convert_into(memoryview(data), dtype, memoryview(found), "float32")
    return np.frombuffer(found, "<f4").reshape(shape)


def learned(one=None, role="v", **how):
    one = block(N_LEARNED) if one is None else one
    return Basis.train(as_bytes(spoken(one, 1, **how), one.dtype), one, role=role)


def there_and_back(floats, one, basis):
    """The encoded blob, and what comes back: as bytes, and as float32."""
    encoded = codec.encode(as_bytes(floats, one.dtype), one, "pca", "v", basis)
    destination = memoryview(bytearray(floats.size * DTYPES[one.dtype]))
    codec.decode_into(encoded.tag, encoded.stored, one, destination, {basis.digest: basis}.get)
    return encoded, destination, as_floats(destination, one.dtype, floats.shape)


def step_of(basis):
    axes = np.frombuffer(basis.axes, "<i2").reshape(-1, basis.n_channels).astype(np.float64)
    return math.ldexp(float(np.sqrt(np.square(axes).sum(axis=1).max())), -basis.exponent)


LEARNED = learned()


# ------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("role", ["k", "v"])
def test_it_takes_a_fraction_of_the_room_and_comes_back_within_the_step(dtype, role):
    how = {"frequencies": rope(1e4, HEAD_DIM // 2)} if role == "k" else {}
    basis = learned(role=role, **how)
    assert (basis.rotation is not None) == (role == "k")
    one = block(256, start=1540, dtype=dtype)
    floats = spoken(one, 2, **how)
    encoded, _, back = there_and_back(floats, one, basis)
    assert not encoded.is_fallback
    assert encoded.stored.nbytes < 256 * WIDTH * 4 / 8  # 4 bits a number, and few channels
    step = step_of(basis)
    exact = as_floats(as_bytes(floats, dtype), dtype, floats.shape)
    rounding = np.abs(floats).max() * (0 if dtype == "float32" else 2**-8)
    assert np.sqrt(np.square(back - exact).mean(axis=1)).max() < 0.6 * step + rounding
    assert np.sqrt(np.square(back - exact).mean()) < 0.35 * step + rounding


@given(
    seed=st.integers(0, 2**32 - 1),
    n_tokens=st.integers(1, 40),
    start=st.integers(0, 2**40),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_whatever_the_numbers_each_token_is_near_or_all_are_exact(
    seed, n_tokens, start, scale, dtype
):
    one = block(n_tokens, start=start, dtype=dtype)
    data = as_bytes(spoken(one, seed, scale=scale), dtype)
    floats = as_floats(data, dtype, (n_tokens, WIDTH))
    encoded, destination, back = there_and_back(floats, one, LEARNED)
    assert encoded.stored.nbytes <= data.nbytes
    if encoded.is_fallback:
        assert bytes(destination) == bytes(data)
        return
    n_exact = max(0, 4 - start)
    assert bytes(destination[: n_exact * WIDTH * DTYPES[dtype]]) == bytes(
        data[: n_exact * WIDTH * DTYPES[dtype]]
    )
    rounding = np.abs(floats).max() * (1e-6 if dtype == "float32" else 2**-7)
    error = np.sqrt(np.square(back - floats).mean(axis=1))
    assert error.max() <= 0.601 * step_of(LEARNED) + rounding


@given(data=st.data())
@settings(max_examples=30)
def test_encoded_again_it_changes_no_more(data):
    one = block(32, start=data.draw(st.integers(4, 10**6)))
    _, _, back = there_and_back(spoken(one, data.draw(st.integers(0, 99))), one, LEARNED)
    encoded, _, again = there_and_back(back, one, LEARNED)
    assert not encoded.is_fallback
    assert np.array_equal(back, again)


def test_the_first_tokens_of_a_session_are_exact():
    one = block(32, start=0)
    floats = spoken(one, 3)
    encoded, _, back = there_and_back(floats, one, LEARNED)
    assert not encoded.is_fallback
    assert np.array_equal(back[:4], floats[:4])
    assert not np.array_equal(back[4:], floats[4:])


def test_what_a_basis_never_saw_is_held_too():
    still = spoken(block(N_LEARNED), 1)
    still[:, 5] = 0.25
    still[:, 9] = still[:, 3]
    basis = Basis.train(as_bytes(still, "float32"), block(N_LEARNED), role="v")
    one = block(64, start=2000)
    encoded, _, back = there_and_back(spoken(one, 4, scale=3.0), one, basis)
    assert not encoded.is_fallback
    assert np.sqrt(np.square(back - spoken(one, 4, scale=3.0)).mean(axis=1)).max() < step_of(basis)


@pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf, 3e38, 1e9])
def test_numbers_that_it_cannot_hold_are_stored_exactly(worst):
    one = block(16, start=256)
    floats = spoken(one, 5)
    floats[7, 3] = worst
    encoded, destination, _ = there_and_back(floats, one, LEARNED)
    assert encoded.is_fallback
    assert bytes(destination) == floats.tobytes()


def test_without_a_basis_or_with_one_of_another_shape_all_is_exact():
    one = block(16, start=256, n_heads=4)
    data = as_bytes(spoken(one, 5), "float32")
    for basis in (None, LEARNED):
        encoded = codec.encode(data, one, "pca", "v", basis)
        assert encoded.is_fallback
        assert encoded.tag in codec.CODECS


def test_only_first_tokens_are_stored_exactly():
    one = block(3, start=1)
    assert codec.encode(as_bytes(spoken(one, 5), "float32"), one, "pca", "v", LEARNED).is_fallback


# ------------------------------------------------------------------------- damage


@given(st.data())
def test_damaged_bytes_are_an_error_or_other_codes_but_never_a_crash(data):
    one = block(48, start=0)
    encoded = codec.encode(as_bytes(spoken(one, 6), "float32"), one, "pca", "v", LEARNED)
    stored = bytearray(encoded.stored)
    for _ in range(data.draw(st.integers(1, 3))):
        bit = data.draw(st.integers(0, 8 * len(stored) - 1))
        stored[bit // 8] ^= 1 << bit % 8
    if data.draw(st.booleans()):
        del stored[data.draw(st.integers(0, len(stored) - 1)) :]
    destination = memoryview(bytearray(48 * WIDTH * 4))

    def bases(digest):
        return LEARNED if digest == LEARNED.digest else codec.no_bases(digest)

    with suppress(CorruptStoreError):
        checked = codec.decode_into(6, memoryview(stored), one, destination, bases)
        if b"".join(checked) == b"".join(encoded.checked):
            first = memoryview(bytearray(destination.nbytes))
            codec.decode_into(6, encoded.stored, one, first, bases)
            assert bytes(first) == bytes(destination)


@given(st.data())
@settings(max_examples=60)
def test_a_damaged_basis_is_an_error_or_has_another_digest(data):
    stored = bytearray(LEARNED.to_bytes())
    bit = data.draw(st.integers(0, 8 * len(stored) - 1))
    stored[bit // 8] ^= 1 << bit % 8
    with suppress(DecodeError):
        found = Basis.from_bytes(memoryview(stored), WIDTH)
        assert found.digest != LEARNED.digest or found == LEARNED
    with pytest.raises(DecodeError):
        Basis.from_bytes(memoryview(stored)[: bit // 8], WIDTH)


def test_a_basis_that_is_not_known_is_corruption():
    one = block(16, start=256)
    encoded = codec.encode(as_bytes(spoken(one, 5), "float32"), one, "pca", "v", LEARNED)
    with pytest.raises(CorruptStoreError, match="basis"):
        codec.decode_into(6, encoded.stored, one, memoryview(bytearray(16 * WIDTH * 4)))


def test_codes_of_another_basis_are_refused():
    one = block(16, start=256)
    encoded = codec.encode(as_bytes(spoken(one, 5), "float32"), one, "pca", "v", LEARNED)
    other = learned(block(N_LEARNED, n_heads=4))
    with pytest.raises(DecodeError):
        codec.decode_into(
            6, encoded.stored, one, memoryview(bytearray(16 * WIDTH * 4)), lambda _: other
        )


# ------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize("pairing", ["neighbours", "halves"])
@pytest.mark.parametrize("part", [1, 0.5, 0.25])
@pytest.mark.parametrize(
    "theta", [1e4, *(pytest.param(theta, marks=pytest.mark.slow) for theta in (1e5, 5e5, 1e6))]
)
def test_what_keys_turn_by_is_found_in_them(pairing, part, theta):
    frequencies = rope(theta, int(64 * part) // 2)
    one = block(N_LEARNED, head_dim=64)
    basis = learned(one, role="k", frequencies=frequencies, pairing=pairing, mean=5.0)
    rotation = basis.rotation
    assert rotation.is_interleaved == (pairing == "neighbours")
    found = np.frombuffer(rotation.frequencies, "<u8") * (2 * math.pi / 2**64)
    known = np.zeros(max(len(found), len(frequencies)))
    known[: len(frequencies)] = frequencies
    strayed = np.abs(found - known[: len(found)]) * N_LEARNED
    assert strayed.max() < 0.5  # radians, at the end of what was learned from


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_stretched_frequencies_are_found(factor):
    frequencies = rope(5e5, 32)
    turns = 8192 * frequencies / (2 * math.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    frequencies = frequencies * (smooth + (1 - smooth) / factor)
    one = block(4096, head_dim=64)
    basis = learned(one, role="k", frequencies=frequencies, pairing="halves", mean=5.0)
    found = np.frombuffer(basis.rotation.frequencies, "<u8") * (2 * math.pi / 2**64)
    assert np.abs(found - frequencies).max() * 4096 < 0.5


def test_frequencies_of_no_known_family_are_found_pair_by_pair():
    frequencies = rope(1e4, 32) * np.linspace(1, 0.8, 32)
    one = block(N_LEARNED, head_dim=64)
    keys = {"frequencies": frequencies, "pairing": "halves", "mean": 5.0}
    basis = learned(one, role="k", **keys)
    found = np.frombuffer(basis.rotation.frequencies, "<u8") * (2 * math.pi / 2**64)
    assert np.mean(np.abs(found - frequencies) * N_LEARNED < 0.5) > 0.8


def test_turning_back_makes_keys_smaller_also_far_behind_what_was_learned():
    how = {"frequencies": rope(1e4, 32), "pairing": "halves", "mean": 5.0}
    one = block(N_LEARNED, head_dim=64)
    turning, still = learned(one, role="k", **how), learned(one, role="v", **how)
    later = block(256, start=30_000, head_dim=64)
    data = as_bytes(spoken(later, 7, **how), "float32")
    sizes = [
        codec.encode(data, later, "pca", "k", basis).stored.nbytes for basis in (turning, still)
    ]
    assert sizes[0] < 0.9 * sizes[1]


def test_values_and_keys_that_do_not_turn_have_no_rotation():
    assert learned(role="v", frequencies=rope(1e4, 8)).rotation is None
    assert learned(block(N_LEARNED, head_dim=64), role="k").rotation is None


def test_the_first_tokens_are_not_learned_from():
    one = block(N_LEARNED, start=0)
    floats = spoken(one, 1)
    odd = floats.copy()
    odd[:4] = 1e6
    found = [Basis.train(as_bytes(data, "float32"), one, role="v") for data in (floats, odd)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "floats",
    [
        np.zeros((64, WIDTH), np.float32),
        np.full((64, WIDTH), np.nan, np.float32),
        np.full((64, WIDTH), 3e38, np.float32),
        np.full((1, WIDTH), 1.0, np.float32),
        np.full((64, WIDTH), 1e-30, np.float32) * np.arange(64, dtype=np.float32)[:, None],
    ],
    ids=["zeros", "nan", "too large", "one token", "too small"],
)
def test_where_there_is_nothing_to_learn_there_is_no_basis(floats):
    one = block(len(floats))
    assert Basis.train(as_bytes(floats, "float32"), one, role="k") is None


@pytest.mark.parametrize(("n_heads", "head_dim"), [(1, 1), (1, 4096), (33, 64)])
def test_very_narrow_and_very_wide_tensors_have_none(n_heads, head_dim):
    one = block(8, n_heads=n_heads, head_dim=head_dim)
    assert Basis.train(as_bytes(spoken_flat(one), "float32"), one, role="k") is None


def spoken_flat(one):
    generator = np.random.default_rng(1)
    return generator.standard_normal((one.n_tokens, one.n_channels), dtype=np.float32)


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from(["float32", "float16"]))
@settings(max_examples=25)
def test_any_shape_is_learned_and_held(n_heads, head_dim, dtype):
    one = block(64, n_heads=n_heads, head_dim=head_dim, dtype=dtype)
    if one.n_channels < 2:
        return
    floats = spoken_flat(one)
    basis = Basis.train(as_bytes(floats, dtype), one, role="k")
    assert Basis.from_bytes(memoryview(basis.to_bytes()), one.n_channels) == basis
    later = block(64, start=68, n_heads=n_heads, head_dim=head_dim, dtype=dtype)
    encoded, _, _ = there_and_back(spoken_flat(later), later, basis)
    assert not encoded.is_fallback


# ------------------------------------------------------------------------- packing


@given(st.data())
def test_packed_rows_are_unpacked_again(data):
    n_rows, n = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 30))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    limits = generator.choice([0, 1, 2, 3, 7, 8, 127, 128, 32767], n_rows)
    rows = np.stack([generator.integers(-one, one + 1, n) for one in limits]).astype(np.int16)
    packings = packing.packings_of(rows)
    counts = packing.counts_of(packings)
    body = b"".join(packing.pack(rows, packings))
    assert len(body) == sum(packing.sizes_of(counts, n))
    found = np.empty((sum(counts), n), np.int16)
    order = packing.unpack_into(memoryview(body), memoryview(packings.tobytes()), counts, found)
    again = np.zeros_like(rows)
    again[order] = found
    assert np.array_equal(again, rows)


def test_threads_may_use_a_basis_at_once():
    one = block(64, start=256)
    datas = [as_bytes(spoken(one, seed), "float32") for seed in range(16)]

    def work(data):
        encoded = codec.encode(data, one, "pca", "v", LEARNED)
        destination = memoryview(bytearray(data.nbytes))
        codec.decode_into(6, encoded.stored, one, destination, lambda _: LEARNED)
        return bytes(destination)

    expected = [work(data) for data in datas]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, datas)) == expected


def test_tokens_that_all_are_the_mean_have_no_codes_and_come_back():
    one = block(256, start=4000)
    basis = learned()
    middle = np.frombuffer(basis.mean, "<i4") * np.ldexp(1.0, -basis.exponent)
    floats = np.tile(middle.astype(np.float32), (one.n_tokens, 1))
    encoded = codec.encode(as_bytes(floats, "float32"), one, "pca", "v", basis)
    assert not encoded.is_fallback
    found = bytearray(floats.nbytes)
    codec.decode_into(encoded.tag, encoded.stored, one, memoryview(found), lambda _: basis)
    assert np.array_equal(as_floats(found, "float32", floats.shape), floats)


@pytest.mark.parametrize("times", [10, 100, 1000])
@pytest.mark.parametrize("role", ["k", "v"])
def test_what_is_far_from_all_else_does_not_make_the_rest_coarse(role, times):
    one, other = block(N_LEARNED), block(256, start=9000)
    floats = spoken(one, 1)
    usual = Basis.train(as_bytes(floats, "float32"), one, role=role)
    floats[700] *= times
    basis = Basis.train(as_bytes(floats, "float32"), one, role=role)
    assert basis.exponent == usual.exponent
    tokens = spoken(other, 2)
    encoded = codec.encode(as_bytes(tokens, "float32"), other, "pca", role, basis)
    assert not encoded.is_fallback
    found = bytearray(tokens.nbytes)
    codec.decode_into(encoded.tag, encoded.stored, other, memoryview(found), lambda _: basis)
    error = as_floats(found, "float32", tokens.shape) - tokens
    assert np.square(error).mean() < 0.02 * tokens.var(axis=0).mean()


@pytest.mark.parametrize("spread", [1e-25, 1e-21, 1e-18])
def test_what_hardly_differs_is_not_learned_from(spread):
    one = block(N_LEARNED)
    assert Basis.train(as_bytes(spread * spoken(one, 1, mean=0), "float32"), one, role="v") is None
