"""Damage inside rings and recurrent state: found, named, and never left in a live cache."""

from __future__ import annotations

import pytest

import kvstore
from kvstore import Kind, MissReason
from tests.conformance import damaged
from tests.kinds_oracle import LAYOUTS, TracedCache
from tests.oracle import raw

TOKENS = list(range(100, 160))
STORED = [
    (name, index)
    for name in ("ring_head_major", "quantized_sink", "mixed")
    for index, spec in enumerate(LAYOUTS[name].tensors)
    if spec.kind is not Kind.POSITIONS
]


@pytest.fixture
def path(tmp_path):
    """A file that is damaged on purpose, so that nobody verifies it in the end."""
    return tmp_path / "damaged.db"


def opened(path, **options):
    return kvstore.open(path, chunk_n_tokens=64, **options)


def assert_clean(cache):
    """Nothing in it, and what the first step reads is as freshly loaded."""
    fresh = TracedCache(cache.layout)
    assert list(cache.tokens) == []
    assert cache.held == fresh.held
    for index, spec in enumerate(cache.layout.tensors):
        if spec.kind in (Kind.POSITIONS, Kind.CHECKPOINT):
            assert cache.memory[index] == fresh.memory[index]


@pytest.mark.parametrize(("name", "index"), STORED)
def test_a_damaged_blob_of_any_tensor_leaves_an_empty_cache_and_is_named(path, name, index):
    cache_layout = LAYOUTS[name]
    with opened(path) as store:
        first = TracedCache(cache_layout)
        first.compute(TOKENS[:50])
        store.save_session(first, TOKENS[:50], name="chat")
        others = TracedCache(cache_layout)
        others.compute([1, 2, 3])
        cut_back = TracedCache(cache_layout)
        cut_back.compute(TOKENS[:40])
        for cache in (TracedCache(cache_layout), others, cut_back):
            with damaged(path, index):
                result = store.load_session(cache, [*TOKENS[:50], 1])
            assert (result.n_tokens, result.reason) == (0, MissReason.CORRUPT)
            assert cache_layout.tensors[index].name in result.detail
            assert_clean(cache)
            cache.compute(TOKENS[:9])
            assert cache.wrong() == []
        with damaged(path, index):
            problems = store.verify().problems
        assert problems
        assert all(cache_layout.tensors[index].name in problem for problem in problems)
        assert store.load_session(TracedCache(cache_layout), [*TOKENS[:50], 1]).n_tokens == 50


def test_damage_outside_the_window_is_not_met_by_a_load_but_by_verify(path):
    cache_layout = LAYOUTS["ring_only"]
    with opened(path) as store:
        cache = TracedCache(cache_layout)
        for stop in (10, 20, 30):
            cache.compute(TOKENS[len(cache.tokens) : stop])
            store.save_session(cache, TOKENS[:stop], name="chat")
    with raw(path) as connection:
        connection.execute("UPDATE blobs SET checksum = zeroblob(16) WHERE stop <= 10")
    with opened(path) as store:
        result = store.load_session(cache, [*TOKENS[:30], 1])
        assert (result.n_tokens, result.reason) == (30, None)
        assert len(store.verify().problems) == 2  # k and v
        assert store.load_session(cache, [*TOKENS[:10], 1]).reason is MissReason.CORRUPT
        assert_clean(cache)


CRAFTED = {
    "a state of several lengths": (
        "recurrent",
        "UPDATE blobs SET start = start - 3 WHERE tensor = 2",
        "conv_state: a checkpoint tensor never has tokens [16, 20) in one blob",
    ),
    "a ring longer than it is": (
        "ring_only",
        "UPDATE blobs SET start = 3, raw_nbytes = raw_nbytes * 17 / 10 WHERE tensor = 0",
        "k_cache: a window tensor never has tokens [3, 20) in one blob",
    ),
    "slot positions that are derived": (
        "ring_only",
        "UPDATE blobs SET tensor = 2 WHERE tensor = 1",
        "cache_positions: a positions tensor never has tokens [10, 20) in one blob",
    ),
    "a ring behind its chunk": (
        "ring_only",
        "UPDATE blobs SET start = start + 1, stop = stop + 1 WHERE tensor = 0",
        "k_cache: expected tokens within [0, 20), found [11, 21)",
    ),
    "a ring of other bytes": (
        "ring_only",
        "UPDATE blobs SET raw_nbytes = raw_nbytes + 1 WHERE tensor = 0",
        "k_cache: expected 320 bytes, the row says 321",
    ),
    "a state that is not there any more": (
        "recurrent",
        "DELETE FROM payloads WHERE id IN (SELECT payload_id FROM blobs WHERE tensor = 2)",
        "conv_state: expected a payload of",
    ),
    "a tensor that is none": (
        "mixed",
        "UPDATE blobs SET tensor = 9 WHERE tensor = 7",
        "a blob of tensor 9, which is none",
    ),
}


@pytest.mark.parametrize("crafted", CRAFTED)
def test_a_row_that_no_save_could_have_written_is_not_believed(path, crafted):
    name, statement, message = CRAFTED[crafted]
    cache_layout = LAYOUTS[name]
    with opened(path) as store:
        cache = TracedCache(cache_layout)
        cache.compute(TOKENS[:20])
        store.save_session(cache, TOKENS[:20], name="chat")
    with raw(path) as connection:
        assert connection.execute(statement).rowcount > 0
    with opened(path) as store:
        cache = TracedCache(cache_layout)
        cache.compute([4, 5])
        for n_tokens in (17, 20):
            result = store.load_session(cache, [*TOKENS[:n_tokens], 1])
            assert (result.n_tokens, result.reason) == (0, MissReason.CORRUPT)
            assert message in result.detail
            assert_clean(cache)
        assert any(message in problem for problem in store.verify().problems)


def test_a_state_of_another_length_fails_its_checksum(path):
    """The positions are part of what is summed, so a row cannot pass for another length."""
    cache_layout = LAYOUTS["recurrent"]
    with opened(path) as store:
        cache = TracedCache(cache_layout)
        cache.compute(TOKENS[:20])
        store.save_session(cache, TOKENS[:20], name="chat")
    with raw(path) as connection:
        connection.execute("UPDATE blobs SET start = start - 1, stop = stop - 1 WHERE tensor >= 2")
    with opened(path) as store:
        result = store.load_session(cache, TOKENS[:19])
        assert (result.n_tokens, result.reason) == (0, MissReason.CORRUPT)
        assert "the checksum does not match" in result.detail
        assert_clean(cache)
