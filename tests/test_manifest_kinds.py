"""Manifests and digests of layouts with rings and recurrent state."""

from __future__ import annotations

import dataclasses

import msgpack
import pytest

from kvstore import Layout, TensorSpec
from kvstore.errors import CorruptStoreError, InputError
from kvstore.manifest import pack_manifest, unpack_manifest
from tests.kinds_oracle import LAYOUTS

RING, STATE, FULL = (LAYOUTS["mixed"].tensors[index] for index in (2, 5, 0))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_of_any_kind_survives_its_manifest(name):
    packed = pack_manifest(LAYOUTS[name])
    assert unpack_manifest(packed) == LAYOUTS[name]
    assert pack_manifest(unpack_manifest(packed)) == packed


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_manifests_keys_are_in_order_and_only_rings_have_a_window(name):
    for entry, spec in zip(
        msgpack.unpackb(pack_manifest(LAYOUTS[name]))["tensors"], LAYOUTS[name].tensors, strict=True
    ):
        assert list(entry) == sorted(entry)
        assert (
            ("window_n_tokens" in entry) == ("sink_n_tokens" in entry) == bool(spec.window_n_tokens)
        )
        assert (entry["token_axis"] is None) == (spec.kind == "checkpoint")


def test_every_layout_has_its_own_digest():
    assert len({layout.digest for layout in LAYOUTS.values()}) == len(LAYOUTS)


@pytest.mark.parametrize(
    "change", [{"window_n_tokens": 7}, {"sink_n_tokens": 1}, {"sink_n_tokens": 0}, {"role": "v"}]
)
def test_window_and_sink_are_part_of_the_digest_and_names_are_not(change):
    digest = Layout(tensors=(RING,)).digest
    assert Layout(tensors=(dataclasses.replace(RING, name="other"),)).digest == digest
    assert Layout(tensors=(dataclasses.replace(RING, **change),)).digest != digest


BAD_FIELDS = [
    (RING, {"window_n_tokens": 0}),
    (RING, {"window_n_tokens": -1}),
    (RING, {"window_n_tokens": 17}),  # more than the 16 slots behind the sink
    (RING, {"sink_n_tokens": 11}),  # leaves 7 slots for a window of 8
    (RING, {"sink_n_tokens": -1}),
    (RING, {"token_axis": None}),
    (RING, {"shape": [2, 18, 2, 4]}),
    (RING, {"kind": "full"}),
    (RING, {"kind": "checkpoint"}),
    (STATE, {"token_axis": 1}),
    (STATE, {"kind": "full"}),
    (STATE, {"kind": "window"}),
    (FULL, {"kind": "window"}),
    (FULL, {"kind": "positions"}),
    (FULL, {"token_axis": None}),
]


@pytest.mark.parametrize(("spec", "change"), BAD_FIELDS)
def test_an_impossible_tensor_is_refused_by_its_type_and_in_a_manifest(spec, change):
    entry = {**spec.to_manifest(), **change}
    with pytest.raises(CorruptStoreError, match="manifest"):
        unpack_manifest(msgpack.packb({"format": 1, "tensors": [entry]}))
    if "kind" not in change:
        change = {**change, **({"shape": (2, 18, 2, 4)} if "shape" in change else {})}
        with pytest.raises(InputError, match=spec.name):
            dataclasses.replace(spec, **change)


BAD_ENTRIES = [
    lambda entry: entry.pop("window_n_tokens"),
    lambda entry: entry.pop("sink_n_tokens"),
    lambda entry: entry.pop("token_axis"),
    lambda entry: entry.update(window_n_tokens=8.0),
    lambda entry: entry.update(window_n_tokens=True),
    lambda entry: entry.update(sink_n_tokens=None),
    lambda entry: entry.update(sink_n_tokens="2"),
    lambda entry: entry.update(kind="ring"),
    lambda entry: entry.update(kind=None),
    lambda entry: entry.update(policy="newest"),
]


@pytest.mark.parametrize("number", range(len(BAD_ENTRIES)))
def test_a_malformed_ring_is_refused(number):
    entry = RING.to_manifest()
    BAD_ENTRIES[number](entry)
    with pytest.raises(CorruptStoreError, match="manifest"):
        unpack_manifest(msgpack.packb({"format": 1, "tensors": [entry]}))


@pytest.mark.parametrize("field", ["sink_n_tokens", "window_n_tokens"])
def test_only_rings_have_ring_fields(field):
    for spec in (FULL, STATE):
        for value in (0, 1):
            entry = {**spec.to_manifest(), field: value}
            with pytest.raises(CorruptStoreError):
                unpack_manifest(msgpack.packb({"format": 1, "tensors": [entry]}))
        both = {**spec.to_manifest(), "sink_n_tokens": 0, "window_n_tokens": 0}
        with pytest.raises(CorruptStoreError):
            unpack_manifest(msgpack.packb({"format": 1, "tensors": [both]}))


def test_a_checkpoint_may_have_any_first_size():
    state = TensorSpec(
        name="state",
        role="state",
        layer=0,
        kind=STATE.kind,
        dtype="float32",
        shape=(3, 4),
        token_axis=None,
    )
    assert (state.capacity_n_tokens, state.slot_nbytes) == (1, 48)
