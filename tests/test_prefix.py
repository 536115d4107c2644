from __future__ import annotations

import hashlib
import struct
from array import array

from hypothesis import given
from hypothesis import strategies as st

from kvstore.prefix import chunk_key, full_chunk_keys, root_key

MODEL = bytes(range(32))
ROOT = root_key(MODEL, chunk_n_tokens=4)


def test_the_root_key_is_pinned():
    assert (
        root_key(MODEL, chunk_n_tokens=256, namespace="app").hex()
        == hashlib.blake2b(
            struct.pack("<I", 1)
            + MODEL
            + struct.pack("<II", 256, 3)
            + b"app"
            + struct.pack("<I", 0),
            digest_size=32,
            person=b"kvstore/root",
        ).hexdigest()
    )


def test_a_chunk_key_is_pinned():
    assert (
        chunk_key(ROOT, array("Q", [1, 2**40])).hex()
        == hashlib.blake2b(
            ROOT + struct.pack("<IQQI", 2, 1, 2**40, 0), digest_size=32, person=b"kvstore/chunk"
        ).hexdigest()
    )


def test_every_parameter_of_the_key_space_gives_another_root():
    roots = {
        root_key(MODEL, chunk_n_tokens=4),
        root_key(MODEL[::-1], chunk_n_tokens=4),
        root_key(MODEL, chunk_n_tokens=5),
        root_key(MODEL, chunk_n_tokens=4, namespace="a"),
        root_key(MODEL, chunk_n_tokens=4, adapter=b"a"),
        root_key(MODEL, chunk_n_tokens=4, namespace="a", adapter=b"b"),
        root_key(MODEL, chunk_n_tokens=4, namespace="ab"),
        root_key(MODEL, chunk_n_tokens=4, adapter=b"ab"),
    }
    assert len(roots) == 8


def test_tokens_and_extras_do_not_run_into_each_other():
    keys = {
        chunk_key(ROOT, array("Q", [1, 2])),
        chunk_key(ROOT, array("Q", [1]), extras=struct.pack("<Q", 2)),
        chunk_key(ROOT, array("Q", [1])),
        chunk_key(chunk_key(ROOT, array("Q", [1])), array("Q", [2])),
    }
    assert len(keys) == 4


@given(st.lists(st.integers(0, 2**63 - 1), max_size=20), st.integers(1, 8))
def test_only_full_chunks_have_keys_and_each_hashes_its_parent(ids, size):
    keys = full_chunk_keys(ROOT, array("Q", ids), chunk_n_tokens=size)
    assert len(keys) == len(ids) // size
    parent = ROOT
    for number, key in enumerate(keys):
        assert key == chunk_key(parent, array("Q", ids[number * size : (number + 1) * size]))
        parent = key


@given(st.lists(st.integers(0, 3), min_size=8, max_size=16), st.integers(0, 7))
def test_a_changed_token_changes_every_key_from_its_chunk_on(ids, position):
    changed = [*ids[:position], ids[position] + 1, *ids[position + 1 :]]
    keys = full_chunk_keys(ROOT, array("Q", ids), chunk_n_tokens=2)
    other = full_chunk_keys(ROOT, array("Q", changed), chunk_n_tokens=2)
    same = [key == other_key for key, other_key in zip(keys, other, strict=True)]
    assert same == [number < position // 2 for number in range(len(keys))]
