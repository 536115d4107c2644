from __future__ import annotations

import random
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvstore import codec
from kvstore.codec import CODECS, Raw, Zstd
from kvstore.errors import CorruptStoreError, DecodeError

EVERY_CODEC = pytest.mark.parametrize("one", CODECS.values(), ids=lambda one: one.name)
COMPRESSIBLE = b"kv" * 5000


def decoded(one, stored, nbytes):
    destination = bytearray(nbytes)
    one.decode_into(memoryview(stored), memoryview(destination))
    return bytes(destination)


@EVERY_CODEC
@given(data=st.binary(min_size=1, max_size=300))
def test_a_codec_gives_back_every_byte(one, data):
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
    tag, stored = codec.encode(incompressible, Zstd())
    assert (tag, bytes(stored)) == (Raw.tag, bytes(incompressible))


def test_bytes_that_compress_are_stored_as_one_frame():
    tag, stored = codec.encode(memoryview(COMPRESSIBLE), Zstd())
    assert tag == Zstd.tag
    assert stored.nbytes < len(COMPRESSIBLE) // 10


@pytest.mark.parametrize("tag", [-1, 2, 255])
def test_an_unknown_codec_is_refused_by_its_tag(tag):
    with pytest.raises(DecodeError, match=f"unknown codec tag {tag}"):
        codec.decode_into(tag, memoryview(b"1"), memoryview(bytearray(1)))


def test_tags_are_a_promise():
    assert {tag: one.name for tag, one in CODECS.items()} == {0: "raw", 1: "zstd"}


def test_an_undecodable_blob_is_a_kind_of_corruption():
    assert issubclass(DecodeError, CorruptStoreError)
