from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import Kind, TensorSpec
from kvstore.regions import gather, in_place, scatter
from tests.fakes import read_slot

SHAPES = [((1, 9, 3, 2), 1), ((1, 3, 9, 2), 2), ((9, 4), 0), ((1, 2, 3, 9), 3), ((1, 1, 9, 5), 2)]


def spec_of(shape, token_axis, dtype="float16"):
    return TensorSpec(
        name="t", role="k", layer=0, kind=Kind.FULL, dtype=dtype, shape=shape, token_axis=token_axis
    )


def memory_of(spec):
    return bytearray(number * 7 % 251 for number in range(spec.nbytes))


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@given(data=st.data())
def test_a_gathered_range_is_its_slots_token_by_token(shape, axis, data):
    spec = spec_of(shape, axis)
    memory = memory_of(spec)
    start = data.draw(st.integers(0, 8))
    stop = data.draw(st.integers(start + 1, 9))
    gathered = gather(spec, memoryview(memory), start, stop)
    expected = b"".join(read_slot(spec, memory, slot) for slot in range(start, stop))
    assert bytes(gathered) == expected


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@given(data=st.data())
def test_a_scattered_range_changes_its_slots_and_no_other(shape, axis, data):
    spec = spec_of(shape, axis)
    start = data.draw(st.integers(0, 8))
    stop = data.draw(st.integers(start + 1, 9))
    before, after = memory_of(spec), memory_of(spec)
    new = bytes(255 - number % 251 for number in range((stop - start) * spec.slot_nbytes))
    scatter(spec, memoryview(after), start, stop, memoryview(new))
    for slot in range(9):
        if start <= slot < stop:
            first = (slot - start) * spec.slot_nbytes
            assert read_slot(spec, after, slot) == new[first : first + spec.slot_nbytes]
        else:
            assert read_slot(spec, after, slot) == read_slot(spec, before, slot)


def test_a_token_range_is_one_run_only_where_nothing_lies_before_the_token_axis():
    views = [
        in_place(spec, memoryview(memory_of(spec)), 2, 4)
        for spec in (spec_of(shape, axis) for shape, axis in SHAPES)
    ]
    assert [view is not None for view in views] == [True, False, True, False, True]


def test_a_contiguous_range_is_gathered_without_a_copy():
    spec = spec_of((1, 9, 3, 2), 1)
    memory = memory_of(spec)
    gathered = gather(spec, memoryview(memory), 2, 4)
    memory[2 * spec.slot_nbytes] ^= 0xFF
    assert gathered[0] == memory[2 * spec.slot_nbytes]
