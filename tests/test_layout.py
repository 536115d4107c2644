from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest

from kvstore import Fingerprint, Kind, Layout, TensorSpec
from kvstore.errors import CorruptStoreError, InputError
from kvstore.layout import DTYPE_ITEMSIZE_NBYTES
from kvstore.manifest import pack_manifest, unpack_manifest
from tests.fakes import layout

SPEC = TensorSpec(
    name="k", role="k", layer=0, kind=Kind.FULL, dtype="float32", shape=(1, 8, 2, 4), token_axis=1
)


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "float31"},
        {"role": "a k"},
        {"role": "ké"},
        {"role": ""},
        {"shape": ()},
        {"shape": (1, 0, 2, 4)},
        {"shape": (1, -8, 2, 4)},
        {"token_axis": 4},
        {"token_axis": -1},
        {"shape": (2, 8, 2, 4)},
    ],
)
def test_an_impossible_tensor_is_refused_by_its_name(changed):
    with pytest.raises(InputError, match="tensor 'k'"):
        replace(SPEC, **changed)


def test_sizes_come_from_shape_and_dtype():
    assert SPEC.capacity_n_tokens == 8
    assert SPEC.nbytes == 256
    assert SPEC.slot_nbytes == 32
    assert replace(SPEC, dtype="bfloat16").slot_nbytes == 16


def test_the_smallest_tensor_limits_the_capacity():
    short = replace(SPEC, name="short", shape=(1, 3, 2, 4))
    assert Layout(tensors=(SPEC, short)).capacity_n_tokens == 3


def test_a_layout_needs_tensors_with_names_of_their_own():
    with pytest.raises(InputError, match="at least one tensor"):
        Layout(tensors=())
    with pytest.raises(InputError, match="found twice: k"):
        Layout(tensors=(SPEC, SPEC))


def test_names_do_not_change_a_layouts_digest():
    assert Layout(tensors=(SPEC,)).digest == Layout(tensors=(replace(SPEC, name="other"),)).digest


@pytest.mark.parametrize(
    "changed",
    [
        {"role": "v"},
        {"layer": 1},
        {"dtype": "int32"},
        {"shape": (1, 8, 4, 2)},
        {"shape": (1, 9, 2, 4)},
        {"shape": (1, 2, 8, 4), "token_axis": 2},
    ],
)
def test_everything_but_the_name_changes_a_layouts_digest(changed):
    assert Layout(tensors=(SPEC,)).digest != Layout(tensors=(replace(SPEC, **changed),)).digest


def test_a_fingerprint_covers_each_of_its_digests():
    base = Fingerprint(weights=bytes(32), program=bytes(32), layout=bytes(32))
    others = {
        replace(base, **{field: b"\1" * 32}).model for field in ("weights", "program", "layout")
    }
    assert len({base.model, *others}) == 4
    assert str(base) == base.model.hex()


@pytest.mark.parametrize("digest", [b"", bytes(31), bytes(33), "0" * 32, None])
def test_a_digest_is_32_bytes(digest):
    with pytest.raises(InputError, match="expected 32 bytes for weights"):
        Fingerprint(weights=digest, program=bytes(32), layout=bytes(32))


@pytest.mark.parametrize("dtype", DTYPE_ITEMSIZE_NBYTES)
@pytest.mark.parametrize("head_major", [False, True])
def test_a_manifest_gives_back_the_layout(dtype, head_major):
    one = layout(dtype=dtype, head_major=head_major)
    assert unpack_manifest(pack_manifest(one)) == one


def test_every_truncated_or_changed_manifest_is_refused_or_another_layout():
    packed = pack_manifest(layout(n_layers=1))
    for position in range(len(packed)):
        with pytest.raises(CorruptStoreError):
            unpack_manifest(packed[:position])
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(packed)
            changed[position] ^= flip
            with suppress(CorruptStoreError):
                assert isinstance(unpack_manifest(bytes(changed)), Layout)
    with pytest.raises(CorruptStoreError):
        unpack_manifest(packed + b"\0")
