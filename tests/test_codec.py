from __future__ import annotations

import random
import struct
from contextlib import suppress

import numpy as np
import pytest
import zstandard
from fakes import BytesCache, layout
from hypothesis import given
from hypothesis import strategies as st

import kvstore
from kvstore import codec
from kvstore.codec import CODECS, Planes, Raw, Zstd
from kvstore.errors import CorruptStoreError, DecodeError, InputError

EVERY_CODEC = pytest.mark.parametrize("one", CODECS.values(), ids=lambda one: one.name)
COMPRESSIBLE = b"kv" * 5000


def decoded(one, stored, nbytes):
    destination = bytearray(nbytes)
    one.decode_into(memoryview(stored), memoryview(destination))
    return bytes(destination)


@EVERY_CODEC
@given(data=st.binary(min_size=1, max_size=300))
def test_a_codec_gives_back_every_byte(one, data):
    data *= 2  # planes are of whole numbers
    assert decoded(one, bytes(one.encode(memoryview(data))), len(data)) == data


@EVERY_CODEC
def test_a_destination_of_another_size_is_refused(one):
    stored = bytes(one.encode(memoryview(COMPRESSIBLE)))
    for nbytes in (len(COMPRESSIBLE) - 1, len(COMPRESSIBLE) + 1):
        with pytest.raises(DecodeError, match="expected"):
            decoded(one, stored, nbytes)


@EVERY_CODEC
def test_missing_and_left_over_bytes_are_refused(one):
    stored = bytes(one.encode(memoryview(COMPRESSIBLE)))
    for changed in (b"", stored[:-1], stored + b"\0", stored + stored):
        with pytest.raises(DecodeError):
            decoded(one, changed, len(COMPRESSIBLE))


@given(st.data())
def test_a_flipped_bit_in_a_frame_is_an_error_or_other_bytes_but_never_more_of_them(data):
    stored = bytearray(Zstd().encode(memoryview(COMPRESSIBLE)))
    bit = data.draw(st.integers(0, len(stored) * 8 - 1))
    stored[bit // 8] ^= 1 << bit % 8
    with suppress(DecodeError):
        assert len(decoded(Zstd(), stored, len(COMPRESSIBLE))) == len(COMPRESSIBLE)


def test_a_frame_that_promises_more_than_it_may_is_refused_before_it_is_decoded():
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(50_000_000))
    with pytest.raises(DecodeError, match="header says 50000000"):
        decoded(Zstd(), bomb, 1000)


def test_a_frame_without_its_size_is_refused():
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(COMPRESSIBLE)
    with pytest.raises(DecodeError):
        decoded(Zstd(), frame, len(COMPRESSIBLE))


def test_bytes_that_hardly_compress_are_stored_raw():
    incompressible = memoryview(random.Random(1).randbytes(4096))
    tag, stored = codec.encode_exact(incompressible, Zstd())
    assert (tag, bytes(stored)) == (Raw.tag, bytes(incompressible))


def test_bytes_that_compress_are_stored_as_one_frame():
    tag, stored = codec.encode_exact(memoryview(COMPRESSIBLE), Zstd())
    assert tag == Zstd.tag
    assert stored.nbytes < len(COMPRESSIBLE) // 10


@pytest.mark.parametrize("tag", [-1, 6, 255])
def test_an_unknown_codec_is_refused_by_its_tag(tag):
    with pytest.raises(DecodeError, match=f"unknown codec tag {tag}"):
        codec.decode_exact_into(tag, memoryview(b"1"), memoryview(bytearray(1)))


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@given(data=st.data())
def test_planes_are_the_bytes_of_the_numbers_one_after_another(itemsize, data):
    n_numbers = data.draw(st.integers(1, 400))
    columns = [
        data.draw(st.sampled_from([bytes(n_numbers), random.Random(place).randbytes(n_numbers)]))
        for place in range(itemsize)
    ]
    numbers = b"".join(map(bytes, zip(*columns, strict=True)))
    stored = bytes(Planes(itemsize).encode(memoryview(numbers)))
    assert stored[0] == itemsize
    position = 1 + 5 * itemsize
    for place, column in enumerate(columns):
        method, nbytes = struct.unpack_from("<BI", stored, 1 + 5 * place)
        body = stored[position : position + nbytes]
        assert (zstandard.decompress(body) if method else body) == column
        position += nbytes
    assert position == len(stored)
    assert decoded(Planes(), stored, len(numbers)) == numbers


def test_planes_of_random_bytes_are_never_much_longer():
    noise = random.Random(1).randbytes(1 << 16)
    for itemsize in (2, 4, 8):
        assert Planes(itemsize).encode(memoryview(noise)).nbytes <= len(noise) + 1 + 5 * itemsize
        assert codec.encode_exact(memoryview(noise), Planes(itemsize))[0] == Raw.tag


@given(st.data())
def test_a_flipped_bit_in_planes_is_an_error_or_other_bytes_but_never_more_of_them(data):
    stored = bytearray(Planes(4).encode(memoryview(COMPRESSIBLE)))
    bit = data.draw(st.integers(0, len(stored) * 8 - 1))
    stored[bit // 8] ^= 1 << bit % 8
    with suppress(DecodeError):
        assert len(decoded(Planes(), stored, len(COMPRESSIBLE))) == len(COMPRESSIBLE)


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (b"", "2, 4 or 8 planes, found 0"),
        (b"\x03" + bytes(30), "2, 4 or 8 planes, found 3"),
        (b"\x02" + bytes(5), "2, 4 or 8 planes"),
        (struct.pack("<BBIBI", 2, 0, 4, 2, 4) + bytes(8), "unknown way, 2"),
        (struct.pack("<BBIBI", 2, 0, 3, 0, 5) + bytes(8), "a plane of 4 bytes, found 3"),
        (struct.pack("<BBIBI", 2, 0, 4, 0, 2**32 - 1) + bytes(8), "as its header says"),
        (struct.pack("<BBIBI", 2, 0, 4, 1, 4) + bytes(8), "does not decode"),
    ],
)
def test_planes_that_are_none_are_refused(stored, told):
    with pytest.raises(DecodeError, match=told):
        decoded(Planes(), stored, 8)


@pytest.mark.parametrize(
    ("name", "itemsize", "expected"),
    [("raw", 2, Raw()), ("exact", 1, Zstd()), ("exact", 2, Planes(2)), ("exact", 4, Planes(4))],
)
def test_what_a_store_writes_with(name, itemsize, expected):
    assert codec.exact_codec(name, itemsize) == expected


def test_a_store_writes_as_it_is_told_and_reads_either(tmp_path):
    cache = BytesCache(layout(dtype="bfloat16"))
    tokens = [3] * 100
    cache.compute(tokens)
    for spec, memory in zip(cache.layout.tensors, cache.memory, strict=True):
        memory[:] = b"\x12\x34" * (spec.nbytes // 2)
    stored_nbytes = {}
    for name in codec.NAMES:
        path = tmp_path / f"{name}.db"
        with kvstore.open(path, codec=name) as store:
            stored_nbytes[name] = store.save_session(cache, tokens, name="a").stored_nbytes
            assert store.verify().ok
        for reader in codec.NAMES:
            restored = BytesCache(cache.layout)
            with kvstore.open(path, codec=reader) as store:
                assert store.load_session(restored, name="a").n_tokens == 99
            assert [slots[:99] for slots in cache.used()] == restored.used()
    assert stored_nbytes["raw"] == 100 * cache.layout.token_nbytes
    assert stored_nbytes["exact"] < stored_nbytes["raw"] / 2
    with pytest.raises(InputError, match="codec: expected one of exact, raw"):
        kvstore.open(tmp_path / "other.db", codec="zip")


def test_tags_are_a_promise():
    assert {tag: one.name for tag, one in CODECS.items()} == {0: "raw", 1: "zstd", 2: "planes"}


def test_an_undecodable_blob_is_a_kind_of_corruption():
    assert issubclass(DecodeError, CorruptStoreError)


def test_exponents_cost_what_their_entropy_is_and_what_comes_again_costs_nothing():
    numbers = np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32)
    once = np.ascontiguousarray(numbers.view(np.uint16)[1::2]).view(np.uint8)
    stored = Planes(2).encode(once.data)
    assert stored.nbytes < 0.675 * once.nbytes
    again = Planes(2).encode(np.concatenate([once, once]).data)
    assert again.nbytes < 1.01 * (stored.nbytes + once.nbytes / 2)  # only exponents are looked at
