"""The book of a live cache: lengths, and what a rewind may do to rings and recurrent state."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import Held, TokenLog
from kvstore.errors import CapacityError, RewindError
from kvstore.kinds import kind_of
from tests.kinds_oracle import LAYOUTS, RECURRENT, RINGS, TracedCache
from tests.test_ranges import positions


def log_of(name, tokens=()):
    log = TokenLog(LAYOUTS[name])
    log.extend(list(tokens))
    return log


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_new_log_is_empty(name):
    log = log_of(name)
    assert list(log.tokens) == []
    assert log.held == Held(n_tokens=0, peak_n_tokens=0, restored_n_tokens=0)


def test_computed_tokens_are_appended_and_remembered_as_the_peak():
    log = log_of("ring", range(5))
    log.extend([7, 8])
    assert list(log.tokens) == [0, 1, 2, 3, 4, 7, 8]
    assert log.held == Held(n_tokens=7, peak_n_tokens=7)
    log.truncate(6)
    assert log.held == Held(n_tokens=6, peak_n_tokens=7)


def test_a_restore_starts_a_new_book():
    log = log_of("ring", range(30))
    log.adopt([4, 5, 6])
    assert list(log.tokens) == [4, 5, 6]
    assert log.held == Held(n_tokens=3, peak_n_tokens=3, restored_n_tokens=3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_is_left_after_a_truncate_to_nothing(name):
    log = log_of(name, range(40))
    log.adopt(range(40))
    log.truncate(0)
    assert list(log.tokens) == []
    assert log.held == Held(n_tokens=0, peak_n_tokens=0, restored_n_tokens=0)


@pytest.mark.parametrize("n_tokens", [-1, 6, 10**30])
def test_a_length_that_the_cache_does_not_have_is_refused(n_tokens):
    log = log_of("full", range(5))
    with pytest.raises(CapacityError, match="from 0 to 5"):
        log.truncate(n_tokens)
    assert len(log.tokens) == 5


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_state_goes_back_to_nothing_only(name):
    log = log_of(name, range(7))
    log.truncate(7)
    for n_tokens in range(1, 7):
        with pytest.raises(RewindError, match=r"checkpoint tensor and cannot go back from 7 to"):
            log.truncate(n_tokens)
    assert len(log.tokens) == 7
    log.truncate(0)


def test_a_ring_goes_back_as_far_as_it_has_the_shorter_window():
    log = log_of("ring", range(40))  # a window of 8 in 16 slots: 24 to 39 are there
    for n_tokens in range(1, 31):
        with pytest.raises(RewindError, match="cannot go back from 40 to"):
            log.check_truncate(n_tokens)
    for n_tokens in range(31, 41):
        log.check_truncate(n_tokens)  # 31 sees 24 to 30
    assert len(log.tokens) == 40


def test_a_cache_of_one_window_goes_anywhere():
    log = log_of("ring", range(16))
    for n_tokens in range(17):
        log.check_truncate(n_tokens)


def test_a_ring_that_was_cut_back_remembers_how_far_it_was_written():
    log = log_of("ring", range(40))
    log.truncate(33)
    log.extend([1])
    with pytest.raises(RewindError):
        log.truncate(30)
    log.truncate(31)


def test_after_a_restore_only_the_window_is_there():
    log = log_of("ring")
    log.adopt(range(40))
    with pytest.raises(RewindError):
        log.truncate(39)
    log.extend([1, 2])
    log.truncate(41)
    log.truncate(40)


def test_a_ring_that_goes_back_into_its_sink_starts_over():
    """Its ring part holds nothing any more, so nothing of the past can be missing from it."""
    log = log_of("sink", range(40))
    log.truncate(3)
    assert log.held == Held(n_tokens=3, peak_n_tokens=3, restored_n_tokens=0)
    log.extend(range(3, 12))
    log.truncate(9)


@given(
    name=st.sampled_from(RINGS),
    steps=st.lists(
        st.tuples(st.sampled_from(["compute", "truncate", "adopt"]), st.integers(0, 45)),
        max_size=12,
    ),
)
def test_what_is_resident_is_what_a_slot_by_slot_trace_says(name, steps):
    cache = TracedCache(LAYOUTS[name])
    for step, number in steps:
        n_tokens = len(cache.tokens)
        if step == "compute":
            cache.compute(range(n_tokens, min(n_tokens + number, 90)))
        elif step == "adopt":
            cache.truncate(0)
            cache.adopt(range(number))
        elif number <= n_tokens:
            possible = cache.can_truncate(number)
            try:
                cache.truncate(number)
                assert possible
            except RewindError:
                assert not possible
        for index, spec in enumerate(cache.layout.tensors):
            resident = kind_of(spec).resident(spec, cache.held)
            assert positions(resident) == cache.resident(index), (spec.name, step, number)
