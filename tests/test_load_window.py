"""Rings: what of them is stored, shared, filled in later and read, and what if it is gone."""

from __future__ import annotations

import pytest

from kvstore import Kind, MissReason
from kvstore.errors import RewindError
from tests.kinds_oracle import (
    LAYOUTS,
    RINGS,
    TracedCache,
    full_nbytes,
    naive_slots_content,
    restored,
    ring_nbytes,
)
from tests.oracle import count

TOKENS = list(range(100, 190))
RING = LAYOUTS["ring"]  # a full layer; a ring of 16 slots of which a query sees 8

FEW = ["ring_head_major", "ring_only", "sink", "quantized_ring", "mixed"]


def each_ring(*, but=None):
    """Every layout with a ring; `make test` runs a few of them."""
    return [
        pytest.param(name, marks=[] if name in FEW else pytest.mark.slow)
        for name in RINGS
        if name != but
    ]


def computed(n_tokens, cache_layout=RING, tokens=TOKENS):
    cache = TracedCache(cache_layout)
    cache.compute(tokens[:n_tokens])
    return cache


def save_turn_by_turn(store, cache, turns, *, name="chat"):
    """Save after each turn; everything is resident once."""
    for stop in turns:
        cache.compute(TOKENS[len(cache.tokens) : stop])
        store.save_session(cache, TOKENS[:stop], name=name)


def load(store, cache, ids, n_tokens, reason=None):
    """Load, check how far it got, why, and every byte that the next step reads."""
    result = store.load_session(cache, ids)
    assert (result.n_tokens, result.reason) == (n_tokens, reason), result.detail
    assert list(cache.tokens) == ids[:n_tokens]
    assert cache.wrong() == []
    return result


# ------------------------------------------------------- before and after the wrap


@pytest.mark.parametrize("name", each_ring())
def test_a_ring_is_restored_before_at_and_long_after_its_wrap(store, name):
    for n_tokens in (1, 7, 8, 9, 15, 16, 17, 18, 33, 61):
        cache = computed(n_tokens, LAYOUTS[name])
        store.save_session(cache, cache.tokens)
        other = TracedCache(LAYOUTS[name])
        if any(spec.role == "logits" for spec in other.layout.tensors):
            load(store, other, TOKENS[:n_tokens], n_tokens)
            continue
        load(store, other, TOKENS[: n_tokens + 1], n_tokens)


@pytest.mark.parametrize("name", each_ring())
def test_going_on_after_a_restore_equals_never_having_stopped(store, name):
    for n_tokens in (5, 17, 50):
        first = computed(n_tokens, LAYOUTS[name])
        store.save_session(first, first.tokens, name="chat")
        second = TracedCache(LAYOUTS[name])
        load(store, second, TOKENS[: n_tokens + 1], n_tokens)
        for token in TOKENS[n_tokens : n_tokens + 20]:
            first.compute([token])
            second.compute([token])
            assert second.wrong() == first.wrong() == []
        store.save_session(second, second.tokens, name="chat")
        load(store, TracedCache(LAYOUTS[name]), [*second.tokens, 1], n_tokens + 20)


@pytest.mark.parametrize("name", ["ring", "sink", "two_rings", "quantized_sink"])
@pytest.mark.parametrize("n_tokens", [1, 7, 16, 17, 40])
def test_slot_positions_are_written_for_what_was_restored_and_nothing_else(store, name, n_tokens):
    cache = computed(n_tokens, LAYOUTS[name])
    store.save_session(cache, cache.tokens)
    other = computed(89, LAYOUTS[name], TOKENS[::-1])  # its slots say other positions
    load(store, other, [*TOKENS[:n_tokens], 1], n_tokens)
    for index, spec in enumerate(other.layout.tensors):
        if spec.kind is Kind.POSITIONS:
            assert naive_slots_content(spec, n_tokens) == bytes(other.buffer(index))


# --------------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", each_ring())
@pytest.mark.parametrize("n_tokens", [8, 40])
def test_only_what_lies_inside_the_window_is_read(store, name, n_tokens):
    cache = TracedCache(LAYOUTS[name])
    save_turn_by_turn(store, cache, [*range(5, n_tokens, 5), n_tokens])  # every row is stored
    result = load(store, TracedCache(LAYOUTS[name]), [*TOKENS[:n_tokens], 1], n_tokens)
    assert result.raw_nbytes == restored(n_tokens, LAYOUTS[name])


def test_what_is_live_already_is_not_read_again(store):
    cache = TracedCache(RING)
    save_turn_by_turn(store, cache, [10, 20, 30])
    live = computed(27)
    result = load(store, live, [*TOKENS[:30], 1], 30)
    assert result.n_kept_tokens == 27
    assert result.raw_nbytes == full_nbytes(RING, 3) + ring_nbytes(RING, 3)
    live = computed(30)
    live.truncate(28)
    assert load(store, live, [*TOKENS[:28], 1], 28).raw_nbytes == 0


def test_a_ring_that_cannot_go_back_far_enough_is_read_from_the_store(store):
    cache = TracedCache(RING)
    save_turn_by_turn(store, cache, range(10, 61, 10))
    with pytest.raises(RewindError):
        cache.truncate(30)
    result = load(store, cache, [*TOKENS[:30], 1], 30)
    assert result.n_kept_tokens == 0
    assert result.raw_nbytes == restored(30, RING)


# ----------------------------------------------------------------------- rewinding


@pytest.mark.parametrize("name", each_ring(but="mixed"))  # its state is good at saved lengths only
@pytest.mark.parametrize("chunk_n_tokens", [8, 64])
def test_rewinding_past_the_window_works_when_it_was_saved_while_resident(
    open_store, name, chunk_n_tokens
):
    store = open_store(chunk_n_tokens=chunk_n_tokens)
    cache = TracedCache(LAYOUTS[name])
    save_turn_by_turn(store, cache, range(5, 66, 5))  # rings are at least 6 long
    for n_tokens in (64, 31, 30, 16, 2, 47):
        load(store, cache, [*TOKENS[:n_tokens], 1], n_tokens)


def test_going_another_way_after_a_rewind_leaves_the_first_way_whole(store):
    cache = TracedCache(RING)
    save_turn_by_turn(store, cache, range(5, 61, 5), name="first")
    load(store, cache, [*TOKENS[:33], 1], 33)
    other = [*TOKENS[:33], *range(20)]
    cache.compute(other[33:])
    store.save_session(cache, other, name="second")
    load(store, cache, [*TOKENS[:60], 1], 60)
    load(store, cache, [*TOKENS[:33], 1], 33)
    load(store, cache, [*other, 1], 53)


def test_a_window_that_was_never_saved_is_gone_and_the_longest_prefix_is_served(store):
    cache = TracedCache(RING)
    save_turn_by_turn(store, cache, [20, 60])  # rows 4 to 19 and 44 to 59
    other = TracedCache(RING)
    for n_tokens in (21, 35, 50):
        result = load(store, other, [*TOKENS[:n_tokens], 1], 20, MissReason.WINDOW_GONE)
        assert f"{n_tokens} tokens match" in result.detail
        assert "layers.1.attention.kv_cache.k_cache was not saved there" in result.detail
    load(store, other, [*TOKENS[:51], 1], 51)  # it sees 44 to 50
    load(store, other, [*TOKENS[:13], 1], 13)
    load(store, other, [*TOKENS[:11], 1], 11)
    load(store, other, [*TOKENS[:10], 1], 0, MissReason.WINDOW_GONE)  # it sees 3 to 9


def test_a_length_is_served_when_every_ring_has_its_window(store):
    cache_layout = LAYOUTS["two_rings"]  # windows of 8 and 20 in rings of 16 and 40
    cache = TracedCache(cache_layout)
    save_turn_by_turn(store, cache, [45, 80])
    other = TracedCache(cache_layout)
    for n_tokens in (70, 65, 60, 59):  # the wider ring has these, 64 to 79 of the other are there
        result = load(store, other, [*TOKENS[:n_tokens], 1], 45, MissReason.WINDOW_GONE)
        assert "layers.1." in result.detail
    load(store, other, [*TOKENS[:71], 1], 71)
    load(store, other, [*TOKENS[:44], 1], 44)


def test_the_sink_is_stored_once_and_serves_every_length(store):
    cache_layout = LAYOUTS["sink"]  # 3 and a ring of 16, a window of 8
    cache = TracedCache(cache_layout)
    save_turn_by_turn(store, cache, range(8, 81, 8))
    n_rows = count(store.path, "SELECT sum(stop - start) FROM blobs WHERE tensor = 0")
    assert n_rows == 80
    for n_tokens in (80, 41, 12, 4, 3, 2):
        load(store, TracedCache(cache_layout), [*TOKENS[:n_tokens], 1], n_tokens)


# -------------------------------------------------------------- sharing, filling in


def test_full_rows_are_shared_though_one_session_no_longer_had_the_ring_rows(store):
    late = [*TOKENS[:24], *range(30)]
    store.save_session(computed(54, tokens=late), late, name="late")
    before = store.stats().raw_nbytes
    fresh = TracedCache(RING)
    load(store, fresh, [*TOKENS[:24], 1], 0, MissReason.WINDOW_GONE)

    result = store.save_session(computed(24), TOKENS[:24], name="early")
    assert (result.n_new_tokens, result.n_present_tokens) == (0, 24)
    assert result.raw_nbytes == ring_nbytes(RING, 16)  # 8 to 23, and no full row
    assert store.stats().raw_nbytes == before + result.raw_nbytes

    load(store, fresh, [*TOKENS[:24], 1], 24)
    load(store, fresh, [*late, 1], 54)
    store.delete_session("late")
    load(store, fresh, [*TOKENS[:24], 1], 24)


def test_filling_in_twice_writes_nothing(store):
    store.save_session(computed(50), TOKENS[:50], name="late")
    assert store.save_session(computed(24), TOKENS[:24]).raw_nbytes == ring_nbytes(RING, 16)
    before = store.stats()
    assert store.save_session(computed(24), TOKENS[:24]).raw_nbytes == 0
    assert store.stats() == before


def test_only_the_rows_that_are_missing_are_filled_in(store):
    store.save_session(computed(50), TOKENS[:50], name="late")  # 34 to 49
    store.save_session(computed(24), TOKENS[:24])  # 8 to 23
    result = store.save_session(computed(40), TOKENS[:40])  # 24 to 39, of which six are there
    assert (result.n_new_tokens, result.raw_nbytes) == (0, ring_nbytes(RING, 10))
    n_rows = count(store.path, "SELECT sum(stop - start) FROM blobs WHERE tensor = 2")
    assert n_rows == 50 - 8


def test_ten_sessions_over_a_shared_prefix_store_it_once(store):
    for number in range(10):
        tokens = [*TOKENS[:40], 1000 + number]
        cache = TracedCache(RING)
        for stop in (24, 40, 41):
            cache.compute(tokens[len(cache.tokens) : stop])
            store.save_session(cache, tokens[:stop], name=str(number))
    for tensor, n_shared_tokens in ((0, 40), (2, 40 - 8)):  # at 24 the ring had 8 to 23
        n_rows = count(store.path, f"SELECT sum(stop - start) FROM blobs WHERE tensor = {tensor}")
        assert n_rows == n_shared_tokens + 10


def test_bytes_written_grow_with_the_new_tokens(store):
    cache = TracedCache(RING)
    for stop in range(16, 81, 8):
        cache.compute(TOKENS[len(cache.tokens) : stop])
        result = store.save_session(cache, TOKENS[:stop], name="chat")
        if stop > 16:
            assert result.raw_nbytes == full_nbytes(RING, 8) + ring_nbytes(RING, 8)


def test_a_short_tail_keeps_its_ring_rows_when_it_grows(open_store):
    """Fewer tokens than are usually worth borrowing."""
    store = open_store(chunk_n_tokens=64)
    cache = TracedCache(LAYOUTS["ring_only"])
    save_turn_by_turn(store, cache, [3, 30])
    load(store, cache, [*TOKENS[:3], 1], 3)


# ----------------------------------------------------------------- other processes


def test_another_process_restores_a_ring(store, run_source):
    cache = TracedCache(RING)
    save_turn_by_turn(store, cache, [20, 45])
    output = run_source(
        "import sys, kvstore\n"
        "from tests.kinds_oracle import LAYOUTS, TracedCache\n"
        "cache = TracedCache(LAYOUTS['ring'])\n"
        "with kvstore.open(sys.argv[1], chunk_n_tokens=8) as store:\n"
        "    hit = store.load_session(cache, name='chat')\n"
        "    assert cache.wrong() == []\n"
        "    cache.compute([7])\n"
        "    assert cache.wrong() == []\n"
        "print(hit.n_tokens, hit.reason)",
        store.path,
    )
    assert output.split() == ["44", "None"]
