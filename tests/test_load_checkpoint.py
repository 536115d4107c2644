"""Recurrent state: good at exactly the lengths that it was saved at, thinned, never a mixture."""

from __future__ import annotations

import math

import pytest

from kvstore import MissReason
from kvstore.errors import InputError, RewindError
from tests.kinds_oracle import LAYOUTS, RECURRENT, TracedCache, restored
from tests.oracle import raw

TOKENS = list(range(100, 190))
HYBRID = LAYOUTS["recurrent"]  # an attention layer, a recurrent one, and the last logits
WITH_LOGITS = [name for name in RECURRENT if name != "recurrent_without_logits"]


def computed(n_tokens, cache_layout=HYBRID, tokens=TOKENS):
    cache = TracedCache(cache_layout)
    cache.compute(tokens[:n_tokens])
    return cache


def save_turn_by_turn(store, turns, *, name="chat", cache=None, tokens=TOKENS):
    cache = cache or TracedCache(HYBRID)
    for stop in turns:
        cache.compute(tokens[len(cache.tokens) : stop])
        store.save_session(cache, tokens[:stop], name=name)
    return cache


def load(store, cache, ids, n_tokens, reason=None):
    """Load, check how far it got, why, and every byte that the next step reads."""
    result = store.load_session(cache, ids)
    assert (result.n_tokens, result.reason) == (n_tokens, reason), result.detail
    assert list(cache.tokens) == ids[:n_tokens]
    assert result.has_logits == (n_tokens == len(ids))
    assert cache.wrong() == []
    return result


def checkpoints(store):
    """The lengths that a state is stored at, as ``(length, token before it)``, any chunk's."""
    with raw(store.path) as connection:
        rows = connection.execute(
            "SELECT b.stop, c.tokens, c.start FROM blobs b JOIN chunks c ON c.id = b.chunk_id "
            "WHERE b.tensor = 2 ORDER BY b.stop"
        ).fetchall()
    return [
        (stop, int.from_bytes(tokens[8 * (stop - 1 - start) :][:8], "big"))
        for stop, tokens, start in rows
    ]


def lengths(store):
    return [length for length, _ in checkpoints(store)]


# ------------------------------------------------------------------- exact lengths


@pytest.mark.parametrize("name", WITH_LOGITS)
@pytest.mark.parametrize("n_tokens", [1, 8, 13, 50])
def test_loading_exactly_what_was_saved_needs_no_recompute(store, name, n_tokens):
    cache = computed(n_tokens, LAYOUTS[name])
    store.save_session(cache, cache.tokens, name="chat")
    other = TracedCache(LAYOUTS[name])
    result = load(store, other, TOKENS[:n_tokens], n_tokens)
    assert result.has_logits
    assert result.raw_nbytes == restored(n_tokens, LAYOUTS[name])
    logits = [spec.role for spec in other.layout.tensors].index("logits")
    assert other.memory[logits] == cache.memory[logits]
    other.truncate(0)
    assert store.load_session(other, name="chat").has_logits


def test_without_stored_logits_the_last_token_is_left_to_compute(store):
    cache_layout = LAYOUTS["recurrent_without_logits"]
    cache = computed(20, cache_layout)
    store.save_session(cache, TOKENS[:20], name="chat")
    other = TracedCache(cache_layout)
    # 19 tokens may be restored, but the state of 19 was never saved.
    load(store, other, TOKENS[:20], 0, MissReason.NO_CHECKPOINT)
    load(store, other, TOKENS[:21], 20)


def test_a_prompt_that_goes_on_is_served_from_the_checkpoint_without_logits(store):
    save_turn_by_turn(store, [20])
    assert not load(store, TracedCache(HYBRID), TOKENS[:21], 20).has_logits
    result = load(store, TracedCache(HYBRID), TOKENS[:50], 20, MissReason.NO_MATCH)
    assert not result.has_logits


def test_full_layouts_never_have_logits(store):
    cache = computed(20, LAYOUTS["full"])
    store.save_session(cache, TOKENS[:20], name="chat")
    result = store.load_session(TracedCache(LAYOUTS["full"]), TOKENS[:20])
    assert (result.n_tokens, result.has_logits) == (19, False)


# -------------------------------------------------------------- between the lengths


def test_the_longest_saved_length_is_served_and_the_reason_says_why_not_more(open_store):
    store = open_store(chunk_n_tokens=8, checkpoint_n_tokens=1)
    save_turn_by_turn(store, [10, 25, 40])
    for n_tokens, expected in ((39, 25), (26, 25), (24, 10), (11, 10), (9, 0)):
        result = load(
            store, TracedCache(HYBRID), TOKENS[:n_tokens], expected,
            None if n_tokens == expected + 1 else MissReason.NO_CHECKPOINT,
        )  # fmt: skip
        if result.reason:
            assert f"{n_tokens} tokens match" in result.detail
            assert "state was not saved there" in result.detail
    for n_tokens in (10, 25, 40):
        load(store, TracedCache(HYBRID), TOKENS[:n_tokens], n_tokens)


def test_saving_less_than_the_cache_holds_saves_no_state(store):
    store.save_session(computed(30), TOKENS[:20], name="chat")
    assert checkpoints(store) == []
    load(store, TracedCache(HYBRID), TOKENS[:20], 0, MissReason.NO_CHECKPOINT)
    store.save_session(computed(20), TOKENS[:20])  # fills it in
    load(store, TracedCache(HYBRID), TOKENS[:20], 20)


def test_a_prompt_that_leaves_the_session_goes_back_to_a_checkpoint(open_store):
    store = open_store(chunk_n_tokens=8, checkpoint_n_tokens=1)
    save_turn_by_turn(store, [10, 25, 40])
    load(store, TracedCache(HYBRID), [*TOKENS[:30], 1, 2], 25, MissReason.NO_CHECKPOINT)


def test_a_hybrid_with_rings_is_served_where_every_layer_can(open_store):
    store = open_store(chunk_n_tokens=8, checkpoint_n_tokens=1)
    mixed = LAYOUTS["mixed"]
    save_turn_by_turn(store, [10, 25, 60], cache=TracedCache(mixed))
    other = TracedCache(mixed)
    load(store, other, TOKENS[:60], 60)
    load(store, other, TOKENS[:50], 25, MissReason.WINDOW_GONE)  # 44 to 59 are there
    load(store, other, TOKENS[:60], 60)
    result = load(store, other, TOKENS[:58], 25, MissReason.NO_CHECKPOINT)
    assert result.raw_nbytes == restored(25, mixed)


# ------------------------------------------------------------------------ live state


def test_a_live_state_is_kept_where_it_is_and_never_used_elsewhere(store):
    cache = save_turn_by_turn(store, [20])
    result = load(store, cache, [*TOKENS[:20], 1], 20)
    assert (result.n_kept_tokens, result.raw_nbytes) == (20, 0)
    cache.compute([1])
    result = load(store, cache, TOKENS[:21], 20)
    assert result.n_kept_tokens == 0  # the recurrence cannot be undone: all of it is read
    assert result.raw_nbytes == restored(20, HYBRID)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_miss_leaves_a_clean_state(store, name):
    cache = computed(17, LAYOUTS[name])
    load(store, cache, [1, 2, 3], 0, MissReason.NO_MATCH)
    assert cache.memory[-1] == bytes(len(cache.memory[-1]))
    cache.compute([1, 2])
    assert cache.wrong() == []


def test_a_recurrent_cache_goes_back_by_a_load_only(open_store):
    store = open_store(chunk_n_tokens=8, checkpoint_n_tokens=1)
    cache = save_turn_by_turn(store, [10, 25, 40])
    with pytest.raises(RewindError):
        cache.truncate(25)
    load(store, cache, TOKENS[:25], 25)
    cache.compute([5, 6])
    assert cache.wrong() == []


# -------------------------------------------------------------------------- thinning


@pytest.mark.parametrize("interval", [1, 5, 20, 2048])
@pytest.mark.parametrize(("step", "chunk_n_tokens"), [(1, 8), (3, 8), (3, 64), (7, 8), (7, 256)])
def test_a_growing_session_keeps_one_state_an_interval_and_the_newest(
    open_store, interval, step, chunk_n_tokens
):
    store = open_store(chunk_n_tokens=chunk_n_tokens, checkpoint_n_tokens=interval)
    cache = TracedCache(HYBRID)
    last = min(20 * step, 60)
    for stop in range(step, last + 1, step):
        save_turn_by_turn(store, [stop], cache=cache)
        if stop % 9 and stop + step <= last:
            continue
        kept = lengths(store)
        assert kept[-1] == stop
        saved = range(step, stop + 1, step)
        first_of_each = {min(n for n in saved if (n - 1) // interval == number)
                         for number in {(n - 1) // interval for n in saved}}  # fmt: skip
        assert set(kept) == first_of_each | {stop}
        assert len(kept) <= math.ceil(stop / interval) + 1
    for n_tokens in kept[::5]:
        load(store, TracedCache(HYBRID), TOKENS[:n_tokens], n_tokens)


def test_a_rewind_never_has_to_compute_more_than_one_interval_again(open_store):
    store = open_store(chunk_n_tokens=8, checkpoint_n_tokens=10)
    save_turn_by_turn(store, range(2, 61, 2))
    for n_tokens in range(12, 61, 5):
        result = store.load_session(TracedCache(HYBRID), TOKENS[:n_tokens])
        assert n_tokens - result.n_tokens <= 10


def test_another_sessions_state_at_a_shared_position_survives(open_store):
    store = open_store(chunk_n_tokens=16, checkpoint_n_tokens=2048)
    save_turn_by_turn(store, [5, 20], name="one")
    save_turn_by_turn(store, [20], name="two")
    save_turn_by_turn(store, [20, 30, 50], name="one")
    assert lengths(store) == [5, 20, 50]
    load(store, TracedCache(HYBRID), TOKENS[:20], 20)
    store.delete_session("one")
    load(store, TracedCache(HYBRID), TOKENS[:20], 20)
    assert store.load_session(TracedCache(HYBRID), name="two").has_logits


def test_the_newest_state_survives_when_a_session_was_written_anew_at_the_same_length(open_store):
    """Regenerating an answer of the same length: the former end is not on the new path."""
    store = open_store(chunk_n_tokens=16, checkpoint_n_tokens=2048)
    save_turn_by_turn(store, [20, 30])
    cache = TracedCache(HYBRID)
    load(store, cache, TOKENS[:20], 20)
    again = [*TOKENS[:20], *range(10)]
    cache.compute(again[20:])
    store.save_session(cache, again, name="chat")
    load(store, TracedCache(HYBRID), again, 30)
    assert store.load_session(TracedCache(HYBRID), name="chat").has_logits


def test_a_state_on_the_new_path_survives_when_a_session_was_written_anew(open_store):
    """It was another session's end, as long as this one's was, but this one never ended there."""
    store = open_store(chunk_n_tokens=64, checkpoint_n_tokens=2048)
    other = [*TOKENS[:10], *range(40)]
    save_turn_by_turn(store, [10, 40], name="other", tokens=other)
    store.save_session(computed(30, tokens=other), other[:30], name="third")
    save_turn_by_turn(store, [10, 30], name="chat")
    save_turn_by_turn(store, [45], name="chat", tokens=other)
    load(store, TracedCache(HYBRID), other[:30], 30)


def test_a_session_that_is_cut_back_keeps_the_state_of_its_new_end(open_store):
    store = open_store(chunk_n_tokens=16, checkpoint_n_tokens=2048)
    save_turn_by_turn(store, [5, 20, 40])
    cache = TracedCache(HYBRID)
    cache.compute(TOKENS[:25])
    store.save_session(cache, TOKENS[:25], name="chat")
    assert 25 in lengths(store)
    assert store.load_session(TracedCache(HYBRID), name="chat").has_logits
    save_turn_by_turn(store, [31], cache=cache)
    assert store.load_session(TracedCache(HYBRID), name="chat").has_logits


def test_thinned_bytes_are_not_counted_any_more(open_store):
    store = open_store(chunk_n_tokens=64, checkpoint_n_tokens=2048)
    save_turn_by_turn(store, range(20, 61, 4))
    state_nbytes = restored(1, HYBRID) - restored(1, LAYOUTS["full"])
    assert store.stats().raw_nbytes == restored(60, LAYOUTS["full"]) + 2 * state_nbytes


@pytest.mark.parametrize("interval", [0, -1, 1.5, True, "10"])
def test_an_interval_that_is_no_positive_number_is_refused(open_store, interval):
    with pytest.raises(InputError, match="checkpoint_n_tokens: expected"):
        open_store(checkpoint_n_tokens=interval)


@pytest.mark.parametrize("n_shared", [1, 2, 7])
@pytest.mark.parametrize("long_first", [False, True])
def test_a_state_after_few_shared_tokens_serves_every_prompt_with_them(store, n_shared, long_first):
    """However short: it lies on the path of both sessions, whichever was saved first."""
    long, short = computed(50), computed(n_shared)
    for cache in (long, short) if long_first else (short, long):
        store.save_session(cache, cache.tokens)
    load(
        store,
        TracedCache(HYBRID),
        [*TOKENS[: n_shared + 1], 1],
        n_shared,
        MissReason.NO_CHECKPOINT,
    )
