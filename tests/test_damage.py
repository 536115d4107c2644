"""A damaged chunk does not stay for ever: the next save of its tokens writes it again."""

from __future__ import annotations

import pytest

import kvstore
from kvstore import Kind, MissReason, clock
from kvstore.db.tables import FORMAT_VERSION
from kvstore.errors import NewerFormatError
from tests.conformance import damaged
from tests.fakes import BytesCache, layout
from tests.kinds_oracle import LAYOUTS, TracedCache
from tests.oracle import computed, load_exact, raw, save
from tests.test_load import BLOB_DAMAGE

TOKENS = list(range(100, 130))
# Where a blob's row lost its payload, or the payload its row, the payload stays behind.
ORPHANING = {"a missing blob", "a payload of a row that does not exist"}
HEALED = [name for name in BLOB_DAMAGE if name not in ORPHANING]


def damage(path, name, *, payload=1):
    with raw(path) as connection:
        assert connection.execute(BLOB_DAMAGE[name], {"payload": payload}).rowcount == 1


@pytest.mark.parametrize("name", HEALED)
def test_saving_again_what_a_load_found_damaged_makes_it_whole(store, name):
    save(store, TOKENS, name="chat", metadata={"turn": 1})
    damage(store.path, name, payload=5)
    cache = BytesCache()
    hit = load_exact(store, TOKENS, cache=cache)
    assert (hit.n_tokens, hit.reason) == (8, MissReason.CORRUPT)
    cache.compute(TOKENS[hit.n_tokens :])
    saved = store.save_session(cache, TOKENS, name="chat", metadata={"turn": 2})
    assert saved.n_new_tokens == len(TOKENS) - 8
    assert load_exact(store, TOKENS).reason is None
    assert load_exact(store, name="chat").metadata == {"turn": 2}


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_it_is_so_for_every_tensor_of_every_kind(layout_name, open_store):
    store = open_store(chunk_n_tokens=8, checkpoint_n_tokens=1)
    one = LAYOUTS[layout_name]
    for index, spec in enumerate(one.tensors):
        if spec.kind is Kind.POSITIONS:
            continue
        tokens = [index, *TOKENS]  # a session of its own
        first = TracedCache(one)
        first.compute(tokens)
        store.save_session(first, tokens, name="chat")
        with raw(store.path) as connection:
            (payload,) = connection.execute(
                "SELECT max(payload_id) FROM blobs WHERE tensor = ?", (index,)
            ).fetchone()
        damage(store.path, "a flipped payload byte", payload=payload)
        second = TracedCache(one)
        hit = store.load_session(second, [*tokens, 1])
        assert hit.reason is MissReason.CORRUPT
        second.compute(tokens[hit.n_tokens :])
        store.save_session(second, tokens, name="chat")
        third = TracedCache(one)
        hit = store.load_session(third, [*tokens, 1])
        assert (hit.n_tokens, hit.reason) == (len(tokens), None)
        assert third.wrong() == []


def test_what_continues_or_borrows_from_it_goes_with_it_and_sessions_keep_their_tokens(store):
    shared = list(range(22))
    for number in range(4):  # all borrow the shared part of the third chunk from the first
        save(store, [*shared, *range(1000 * number, 1000 * number + 20)], name=str(number))
    save(store, [*range(8), 7, 7], name="beside")
    damage(store.path, "a flipped payload byte", payload=5)  # tokens [8, 16)
    cache = BytesCache()
    assert load_exact(store, [*shared, 1], cache=cache).n_tokens == 8
    cache.compute([*shared[8:], 1])
    store.save_session(cache, cache.tokens)
    stored = {session.name: session.n_stored_tokens for session in store.sessions()}
    assert stored == {"0": 8, "1": 8, "2": 8, "3": 8, "beside": 10}
    hit = load_exact(store, name="2")
    assert (hit.n_requested, hit.reason) == (42, MissReason.EVICTED)
    assert hit.n_tokens == 22


def test_a_chunk_that_is_whole_after_all_stays(open_store):
    """Reading failed once: what the file holds is looked at again before anything goes."""
    store = open_store(chunk_n_tokens=8)
    first = TracedCache(LAYOUTS["full"])
    first.compute(TOKENS)
    store.save_session(first, TOKENS, name="chat")
    cache = TracedCache(LAYOUTS["full"])
    with damaged(store.path, 0):
        assert store.load_session(cache, TOKENS).reason is MissReason.CORRUPT
    cache.compute(TOKENS[len(cache.tokens) :])
    assert store.save_session(cache, TOKENS, name="chat").n_new_tokens == 0


def test_nothing_is_dropped_while_another_save_builds_on_it(store_path):
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        save(store, TOKENS, name="chat")
        damage(store_path, "a flipped payload byte")
        cache = BytesCache()
        assert store.load_session(cache, TOKENS).n_tokens == 0
        with raw(store_path) as connection:
            connection.execute(
                "INSERT INTO leases (chunk_id, expires_at_ms) SELECT max(id), ? FROM chunks",
                (clock.now_ms() + 60_000,),
            )
        before = store.stats()
        store.save_session(computed(TOKENS), TOKENS, name="chat")
        assert store.stats() == before


def test_a_save_that_died_does_not_keep_it_from_being_written_again(store):
    save(store, TOKENS, name="chat")
    damage(store.path, "a flipped payload byte")
    cache = BytesCache()
    assert store.load_session(cache, TOKENS).n_tokens == 0
    with raw(store.path) as connection:
        connection.execute(
            "INSERT INTO leases (chunk_id, expires_at_ms) SELECT max(id), 1 FROM chunks"
        )
    store.save_session(computed(TOKENS), TOKENS, name="chat")
    assert load_exact(store, TOKENS).reason is None


def test_a_file_that_was_upgraded_meanwhile_loses_nothing(store_path):
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        save(store, TOKENS, name="chat")
        damage(store_path, "a flipped payload byte")
        assert store.load_session(BytesCache(), TOKENS).n_tokens == 0
        before = store.stats()
        with raw(store_path) as connection:
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION + 1}")
        with pytest.raises(NewerFormatError):
            store.save_session(computed(TOKENS), TOKENS, name="chat")
        assert store.stats() == before


def test_another_models_save_drops_nothing(store_path):
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        save(store, TOKENS, name="chat")
        damage(store_path, "a flipped payload byte")
        assert store.load_session(BytesCache(), TOKENS).n_tokens == 0
        store.save_session(computed(TOKENS, weights="other"), TOKENS, name="other")
        stored = {session.name: session.n_stored_tokens for session in store.sessions()}
        assert stored == {"chat": 30, "other": 30}


def flip_last_token(path, row_id):
    with raw(path) as connection:
        (tokens,) = connection.execute(
            "SELECT tokens FROM chunks WHERE id = ?", (row_id,)
        ).fetchone()
        changed = tokens[:-1] + bytes([tokens[-1] ^ 1])
        connection.execute("UPDATE chunks SET tokens = ? WHERE id = ?", (changed, row_id))


@pytest.mark.parametrize("row_id", [1, 2, 3, 4])
def test_a_flipped_token_id_of_any_chunk_is_healed_by_the_next_save(store, row_id):
    save(store, TOKENS, name="chat")
    flip_last_token(store.path, row_id)
    cache = BytesCache()
    hit = load_exact(store, TOKENS, cache=cache)
    assert hit.n_tokens == 8 * (row_id - 1)
    assert hit.reason is (MissReason.CORRUPT if row_id < 4 else MissReason.NO_MATCH)
    cache.compute(TOKENS[hit.n_tokens :])
    store.save_session(cache, TOKENS, name="chat")
    assert load_exact(store, name="chat").reason is None


def test_nothing_is_borrowed_from_a_tail_of_other_tokens(store_path):
    with kvstore.open(store_path, chunk_n_tokens=64) as store:
        save(store, range(40), name="one")
        flip_last_token(store.path, 1)
        other = [*range(39), *range(200, 210)]
        save(store, other, name="two")
        assert load_exact(store, name="two").reason is None


@pytest.mark.parametrize("row_id", [1, 2, 3, 4])
def test_a_row_of_impossible_columns_is_healed_too_and_costs_only_what_follows_it(store, row_id):
    save(store, TOKENS, name="chat")
    with raw(store.path) as connection:
        connection.execute("UPDATE chunks SET tokens = x'00' WHERE id = ?", (row_id,))
    cache = BytesCache()
    hit = load_exact(store, TOKENS, cache=cache)
    assert hit.n_tokens == 8 * (row_id - 1)
    cache.compute(TOKENS[hit.n_tokens :])
    store.save_session(cache, TOKENS, name="chat")
    assert load_exact(store, name="chat").reason is None


def test_a_session_on_a_damaged_row_can_be_deleted(store):
    save(store, TOKENS, name="chat")
    with raw(store.path) as connection:
        connection.execute("UPDATE chunks SET tokens = x'00'")
    store.delete_session("chat")
    assert store.stats().n_chunks == 0


def test_what_has_the_damaged_chunks_row_id_now_is_left_alone(store_path):
    other_layout = layout(n_layers=3)
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        save(store, TOKENS, name="chat")
        damage(store_path, "a flipped payload byte")
        assert store.load_session(BytesCache(), TOKENS).n_tokens == 0
        with kvstore.open(store_path, chunk_n_tokens=8) as other:
            other.delete_session("chat")
            other.save_session(computed(TOKENS, other_layout), TOKENS, name="other")
        store.save_session(computed(TOKENS), TOKENS, name="chat")
        stored = {session.name: session.n_stored_tokens for session in store.sessions()}
        assert stored == {"chat": 30, "other": 30}
        assert store.verify().ok
