"""Range sets against sets of integers."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from kvstore.ranges import clip, intersect, n_positions, subtract, union

POSITIONS = st.integers(0, 20)
RANGES = st.lists(st.tuples(POSITIONS, POSITIONS), max_size=6)


def positions(ranges):
    return {position for start, stop in ranges for position in range(start, stop)}


def assert_canonical(ranges):
    """Sorted, disjoint, not even touching, none empty."""
    assert all(start < stop for start, stop in ranges)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(ranges))


@given(RANGES)
def test_a_union_has_the_positions_of_all(ranges):
    joined = union(ranges)
    assert positions(joined) == positions(ranges)
    assert_canonical(joined)
    assert n_positions(joined) == len(positions(ranges))
    assert union(joined) == joined


@given(RANGES, RANGES)
def test_an_intersection_has_the_positions_of_both(left, right):
    both = intersect(left, right)
    assert positions(both) == positions(left) & positions(right)
    assert_canonical(both)


@given(RANGES, RANGES)
def test_a_difference_has_the_positions_of_the_left_only(left, right):
    right = [(start, stop) for start, stop in right if start < stop]
    rest = subtract(left, right)
    assert positions(rest) == positions(left) - positions(right)
    assert_canonical(rest)


@given(RANGES, POSITIONS, POSITIONS)
def test_clipping_keeps_the_positions_of_one_range(ranges, start, stop):
    assert positions(clip(ranges, start, stop)) == positions(ranges) & set(range(start, stop))


def test_nothing_has_no_positions():
    assert union([]) == intersect([], [(0, 3)]) == subtract([], [(0, 3)]) == []
    assert n_positions([]) == 0
