"""The arithmetic of every kind, against oracles that go position by position."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import Held, Kind, TensorSpec
from kvstore.kinds import Run, kind_of
from kvstore.kinds.positions import EMPTY, slot_positions
from kvstore.ranges import intersect, union
from tests.fakes import naive_is_visible, naive_slot
from tests.kinds_oracle import LAYOUTS, TracedCache, needed
from tests.test_ranges import RANGES, assert_canonical, positions


@st.composite
def rings(draw, kind=Kind.WINDOW, min_window=1):
    window = draw(st.integers(min_window, 9), label="window")
    sink = draw(st.integers(0, 5), label="sink")
    n_slots = sink + window + draw(st.integers(0, 9), label="more slots")
    return TensorSpec(
        name="k" if kind is Kind.WINDOW else "cache_positions",
        role="k" if kind is Kind.WINDOW else "positions",
        layer=0,
        kind=kind,
        dtype="int8" if kind is Kind.WINDOW else "int64",
        shape=(1, n_slots, 2, 1) if kind is Kind.WINDOW else (n_slots,),
        token_axis=1 if kind is Kind.WINDOW else 0,
        window_n_tokens=window,
        sink_n_tokens=sink,
    )


def simple(kind):
    """A tensor of a kind without a ring."""
    is_full = kind is Kind.FULL
    return TensorSpec(
        name="t",
        role="k" if is_full else "state",
        layer=0,
        kind=kind,
        dtype="int8",
        shape=(1, 60, 2),
        token_axis=1 if is_full else None,
    )


SPECS = st.one_of(
    st.just(simple(Kind.FULL)),
    st.just(simple(Kind.CHECKPOINT)),
    rings(),
    rings(kind=Kind.POSITIONS),
)
LENGTHS = st.integers(0, 60)


def test_every_kind_is_registered():
    for kind in Kind:
        assert type(kind.rules).__name__.lower() == kind


# -------------------------------------------------------------------- required


@given(spec=SPECS, n_tokens=LENGTHS)
def test_required_is_what_the_next_token_sees(spec, n_tokens):
    required = kind_of(spec).required(spec, n_tokens)
    assert_canonical(required)
    assert positions(required) == needed(spec, n_tokens)


# -------------------------------------------------------------------- servable


@given(spec=SPECS, stored=RANGES, limit=st.integers(0, 25))
def test_servable_is_the_longest_length_of_which_all_is_stored(spec, stored, limit):
    stored = union(stored)
    held = positions(stored)
    longest = next(n for n in range(limit, -1, -1) if needed(spec, n) <= held)
    assert kind_of(spec).servable(spec, stored, limit) == longest


@given(spec=SPECS, n_tokens=LENGTHS)
def test_what_is_required_serves(spec, n_tokens):
    kind = kind_of(spec)
    assert kind.servable(spec, kind.required(spec, n_tokens), n_tokens) == n_tokens


# ------------------------------------------------------------------------ runs


@given(spec=rings(), start=LENGTHS, length=st.integers(1, 40))
def test_runs_are_the_slots_of_the_positions_in_order(spec, start, length):
    runs = kind_of(spec).runs(spec, start, start + length)
    slots = [slot for run in runs for slot in range(run.slot, run.slot + run.n_slots)]
    assert slots == [naive_slot(spec, position) for position in range(start, start + length)]
    assert all(run.n_slots > 0 for run in runs)


@given(spec=rings(), n_tokens=st.integers(1, 60))
def test_what_is_required_lies_in_at_most_three_runs(spec, n_tokens):
    kind = kind_of(spec)
    required = kind.required(spec, n_tokens)
    assert sum(len(kind.runs(spec, start, stop)) for start, stop in required) <= 3


def test_full_tensors_and_checkpoints_have_one_run():
    assert kind_of(simple(Kind.FULL)).runs(simple(Kind.FULL), 3, 9) == [Run(slot=3, n_slots=6)]
    spec = simple(Kind.CHECKPOINT)
    assert kind_of(spec).runs(spec, 8, 9) == [Run(slot=0, n_slots=1)]


# -------------------------------------------------- resident and can_truncate


@given(
    # A window of 1 can be cut back behind what is resident; then resident says less.
    spec=st.one_of(rings(min_window=2), SPECS.filter(lambda spec: spec.kind is not Kind.WINDOW)),
    restored=st.integers(0, 40),
    computed=st.integers(0, 40),
    cut=st.integers(0, 40),
    again=st.integers(0, 12),
)
def test_resident_is_what_the_slots_hold(spec, restored, computed, cut, again):
    """Restore, compute, cut back, compute again; each step traced slot by slot."""
    held_by_slot = {}
    if spec.kind in (Kind.WINDOW, Kind.FULL):
        for position in needed(spec, restored):
            held_by_slot[naive_slot(spec, position)] = position
        for position in range(restored, restored + computed):
            held_by_slot[naive_slot(spec, position)] = position
    peak = restored + computed
    held = Held(n_tokens=peak, peak_n_tokens=peak, restored_n_tokens=restored)
    kind = kind_of(spec)
    length = peak - min(cut, peak)
    if not kind.can_truncate(spec, held, length) or length <= spec.sink_n_tokens:
        length = peak  # into the sink is the token log's to book: see test_token_log
    if spec.kind in (Kind.WINDOW, Kind.FULL):
        for position in range(length, length + again):
            held_by_slot[naive_slot(spec, position)] = position
    length += again
    held = Held(n_tokens=length, peak_n_tokens=max(peak, length), restored_n_tokens=restored)
    resident = kind.resident(spec, held)
    assert_canonical(resident)
    if spec.kind is Kind.CHECKPOINT:
        assert positions(resident) == ({length - 1} if length else set())
    elif spec.kind is Kind.POSITIONS:
        assert resident == []
    else:
        assert positions(resident) == {
            p for p in range(length) if held_by_slot.get(naive_slot(spec, p)) == p
        }


@given(spec=rings(), restored=st.integers(0, 40), computed=st.integers(0, 40))
def test_a_ring_can_go_back_exactly_where_its_window_is_resident(spec, restored, computed):
    kind = kind_of(spec)
    n_tokens = restored + computed
    held = Held(n_tokens=n_tokens, peak_n_tokens=n_tokens, restored_n_tokens=restored)
    resident = positions(kind.resident(spec, held))
    for shorter in range(n_tokens + 1):
        possible = needed(spec, shorter) <= resident
        assert kind.can_truncate(spec, held, shorter) == possible
    assert kind.can_truncate(spec, held, n_tokens)
    assert kind.can_truncate(spec, held, 0)


@given(spec=rings(kind=Kind.POSITIONS), restored=LENGTHS, computed=st.integers(0, 40))
def test_slot_positions_go_back_where_their_ring_does(spec, restored, computed):
    n_tokens = restored + computed
    held = Held(n_tokens=n_tokens, peak_n_tokens=n_tokens, restored_n_tokens=restored)
    ring = Kind.WINDOW.rules
    for shorter in range(n_tokens + 1):
        assert kind_of(spec).can_truncate(spec, held, shorter) == ring.can_truncate(
            spec, held, shorter
        )


@given(n_tokens=LENGTHS, shorter=LENGTHS)
def test_full_tensors_go_back_anywhere_and_checkpoints_nowhere(n_tokens, shorter):
    held = Held(n_tokens=n_tokens, peak_n_tokens=n_tokens)
    full, checkpoint = simple(Kind.FULL), simple(Kind.CHECKPOINT)
    assert kind_of(full).can_truncate(full, held, shorter)
    possible = kind_of(checkpoint).can_truncate(checkpoint, held, shorter)
    assert possible == (shorter in (0, n_tokens))


# --------------------------------------------------------------- what is stored


@given(spec=SPECS, n_tokens=LENGTHS, start=LENGTHS, length=st.integers(1, 20))
def test_what_is_resident_may_be_stored_in_any_pieces(spec, n_tokens, start, length):
    kind = kind_of(spec)
    held = Held(n_tokens=n_tokens, peak_n_tokens=n_tokens)
    for first, last in intersect(kind.resident(spec, held), [(start, start + length)]):
        assert kind.is_storable(spec, first, last)


def test_a_range_that_no_save_could_have_stored_is_known():
    checkpoint = simple(Kind.CHECKPOINT)
    assert kind_of(checkpoint).is_storable(checkpoint, 4, 5)
    assert not kind_of(checkpoint).is_storable(checkpoint, 4, 6)
    ring = LAYOUTS["sink"].tensors[0]  # 3 and 16 slots
    assert kind_of(ring).is_storable(ring, 0, 19)
    assert not kind_of(ring).is_storable(ring, 0, 20)
    assert kind_of(ring).is_storable(ring, 100, 116)
    assert not kind_of(ring).is_storable(ring, 100, 117)
    slots = LAYOUTS["sink"].tensors[2]
    assert not kind_of(slots).is_storable(slots, 0, 1)
    full = simple(Kind.FULL)
    assert kind_of(full).is_storable(full, 0, 60)
    assert not kind_of(full).is_storable(full, 0, 61)


# ------------------------------------------------------------- slot positions


@given(spec=rings(kind=Kind.POSITIONS), n_tokens=LENGTHS)
def test_slot_positions_say_what_a_restored_ring_holds(spec, n_tokens):
    expected = [EMPTY] * spec.capacity_n_tokens
    for position in range(n_tokens):
        if naive_is_visible(spec, position, query=n_tokens):
            expected[naive_slot(spec, position)] = position
    assert slot_positions(spec, n_tokens) == expected


@pytest.mark.parametrize("n_tokens", [1, 7, 15, 16, 17, 40])
def test_the_slots_that_a_query_sees_are_those_that_the_model_itself_writes(n_tokens):
    cache = TracedCache(LAYOUTS["ring"])
    cache.compute(range(n_tokens))
    spec = cache.layout.tensors[-1]
    computed = array("q", bytes(cache.buffer(len(cache.layout.tensors) - 1)))
    for slot, position in enumerate(slot_positions(spec, n_tokens)):
        assert position in (EMPTY, computed[slot])
