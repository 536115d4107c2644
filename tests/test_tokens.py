from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvstore
from kvstore.errors import TokensError
from kvstore.tokens import (
    common_prefix_n_tokens,
    from_big_endian,
    to_big_endian,
    to_little_endian,
    token_ids,
)

IDS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20)
FEW_IDS = st.lists(st.integers(0, 2), max_size=12)


@pytest.mark.parametrize(
    "tokens",
    [
        [3, 1, 2],
        (3, 1, 2),
        iter([3, 1, 2]),
        array("Q", [3, 1, 2]),
        array("i", [3, 1, 2]),
        np.array([3, 1, 2]),
        np.array([3, 1, 2], dtype=np.uint8),
        [np.int64(3), 1, 2],
    ],
)
def test_any_one_dimensional_sequence_of_integers_is_accepted(tokens):
    assert token_ids(tokens) == array("Q", [3, 1, 2])


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        array("Q"),
        np.array([], dtype=np.int64),
        [-1],
        [0, -5],
        [1.0],
        [1.5],
        np.array([1.0, 2.0]),
        ["1"],
        "123",
        b"123",
        bytearray(b"123"),
        [None],
        None,
        7,
        {"a": 1},
        np.int64(7),
        np.array(7),
        [True],
        np.array([True, False]),
        [[1, 2]],
        np.array([[1, 2]]),
        [2**63],
        [2**64],
        array("Q", [2**63]),
        np.array([2**63], dtype=np.uint64),
    ],
    ids=str,
)
def test_what_is_not_token_ids_is_refused_with_what_was_found(tokens):
    with pytest.raises(TokensError, match=r"expected .* found"):
        token_ids(tokens)


def test_the_largest_token_id_is_accepted():
    assert list(token_ids([2**63 - 1])) == [2**63 - 1]


def test_the_ids_are_a_copy_that_the_caller_cannot_change():
    mine = array("Q", [1, 2, 3])
    ids = token_ids(mine)
    mine.append(4)
    assert list(ids) == [1, 2, 3]


def test_byte_orders_are_explicit():
    assert to_little_endian(array("Q", [1])) == b"\1" + bytes(7)
    assert to_big_endian(array("Q", [1])) == bytes(7) + b"\1"


@given(IDS)
def test_big_endian_bytes_come_back_as_the_same_ids(ids):
    assert list(from_big_endian(to_big_endian(array("Q", ids)))) == ids


@given(IDS, IDS)
def test_big_endian_bytes_sort_like_the_sequences(left, right):
    left_bytes, right_bytes = to_big_endian(array("Q", left)), to_big_endian(array("Q", right))
    assert (left_bytes < right_bytes) == (left < right)


@given(FEW_IDS, FEW_IDS)
def test_the_common_prefix_is_what_a_loop_finds(left, right):
    expected = 0
    while expected < min(len(left), len(right)) and left[expected] == right[expected]:
        expected += 1
    assert common_prefix_n_tokens(array("Q", left), array("Q", right)) == expected


def test_token_ids_is_public():
    assert kvstore.token_ids is token_ids
