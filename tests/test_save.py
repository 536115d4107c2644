from __future__ import annotations

import itertools

import pytest

import kvstore
from kvstore.errors import (
    CacheMismatchError,
    CapacityError,
    CorruptStoreError,
    InputError,
    MetadataError,
    SessionConflictError,
    SessionNotFoundError,
    TokensError,
)
from kvstore.save_plan import MIN_BORROWED_N_TOKENS
from tests.fakes import BytesCache, layout
from tests.oracle import assert_exact, big_layout, computed, count, load_exact, raw, save

TOKENS = list(range(100, 130))


def stored_n_tokens(store):
    """Tokens that have bytes of their own in the file."""
    return count(store.path, "SELECT coalesce(sum(stop - start - base_n_tokens), 0) FROM chunks")


def test_a_save_says_what_was_new(store):
    result = save(store, TOKENS, name="a")
    assert (result.n_tokens, result.n_new_tokens, result.n_present_tokens) == (30, 30, 0)
    assert result.raw_nbytes == 30 * layout().token_nbytes
    assert result.name == "a"


def test_only_the_tokens_given_are_saved(store):
    store.save_session(computed(TOKENS), TOKENS[:11], name="a")
    assert store.sessions()[0].n_tokens == 11
    assert stored_n_tokens(store) == 11


def test_saving_the_same_twice_writes_no_k_and_v(store):
    save(store, TOKENS, name="a")
    before = store.stats()
    result = save(store, TOKENS, name="a")
    assert (result.n_new_tokens, result.n_present_tokens) == (0, 30)
    assert (result.raw_nbytes, result.stored_nbytes) == (0, 0)
    assert store.stats() == before


def test_an_unnamed_save_that_is_already_there_writes_nothing_at_all(store):
    save(store, TOKENS)
    with raw(store.path) as connection:
        before = connection.execute("PRAGMA data_version").fetchone()
        save(store, TOKENS)
        assert connection.execute("PRAGMA data_version").fetchone() == before


def test_a_prefix_of_what_is_there_is_found_to_be_there(store):
    save(store, TOKENS, name="a")
    result = save(store, TOKENS[:13], name="b")
    assert (result.n_new_tokens, result.n_present_tokens) == (0, 13)


def test_an_unnamed_save_is_loaded_by_its_tokens_and_has_no_name(store):
    result = save(store, TOKENS)
    assert result.name is None
    assert store.sessions() == []
    hit = load_exact(store, [*TOKENS, 1])
    assert hit.n_tokens == 30
    assert hit.session is None


def test_the_second_name_of_the_same_tokens_costs_no_k_and_v(store):
    save(store, TOKENS, name="a")
    assert save(store, TOKENS, name="b").raw_nbytes == 0
    assert {one.name for one in store.sessions()} == {"a", "b"}


@pytest.mark.parametrize("system_first", [True, False])
def test_ten_sessions_over_a_shared_1000_token_prefix_store_it_once(open_store, system_first):
    store = open_store()  # chunks of 256: the shared prefix ends 232 tokens into the fourth
    shared = [number * 7 % 1000 for number in range(1000)]
    one = big_layout()
    if system_first:
        store.save_session(computed(shared, one), shared, name="system")
    base = computed(shared, one)
    raw_nbytes = 1000 * one.token_nbytes if system_first else 0
    for number in range(10):
        base.truncate(1000)
        suffix = [2000 + number, *range(number, number + 20 + number)]
        base.compute(suffix)
        result = store.save_session(base, base.tokens, name=f"chat-{number}")
        raw_nbytes += result.raw_nbytes
        if number or system_first:
            assert result.n_new_tokens == len(suffix)
            assert result.n_present_tokens == 1000
    own = sum(21 + number for number in range(10))
    assert stored_n_tokens(store) == 1000 + own
    assert raw_nbytes == (1000 + own) * one.token_nbytes
    assert store.stats().raw_nbytes == raw_nbytes
    for session in store.sessions():
        load_exact(store, name=session.name, cache=BytesCache(one))


def test_saving_turn_by_turn_writes_in_proportion_to_the_new_tokens(open_store):
    store = open_store(chunk_n_tokens=64)
    one = big_layout()
    cache = BytesCache(one)
    token_nbytes = one.token_nbytes
    written, merged = 0, 0
    for turn in range(30):
        cache.compute(range(turn, turn + 17))
        result = store.save_session(cache, cache.tokens, name="chat")
        assert result.n_new_tokens == 17
        assert result.n_present_tokens == turn * 17
        full_before, full_now = turn * 17 // 64, (turn + 1) * 17 // 64
        merged += 64 * (full_now > full_before)
        # At most: the new tokens, one merged chunk, and a tail too short to borrow from.
        limit = 17 + 64 * (full_now > full_before) + MIN_BORROWED_N_TOKENS
        assert result.raw_nbytes <= limit * token_nbytes
        written += result.raw_nbytes
    n_tokens = 30 * 17
    assert written <= (2 * n_tokens + 30 * MIN_BORROWED_N_TOKENS) * token_nbytes
    assert store.stats().raw_nbytes == n_tokens * token_nbytes
    load_exact(store, name="chat", cache=BytesCache(one))


def test_saving_token_by_token_writes_each_token_a_bounded_number_of_times(open_store):
    store = open_store(chunk_n_tokens=64)
    cache = BytesCache(big_layout())
    written = 0
    for token in range(70):
        cache.compute([token])
        written += store.save_session(cache, cache.tokens, name="chat").raw_nbytes
    token_nbytes = cache.layout.token_nbytes
    short_tails = MIN_BORROWED_N_TOKENS * (MIN_BORROWED_N_TOKENS + 1) // 2
    assert written <= 2 * (70 + short_tails) * token_nbytes
    assert store.stats().raw_nbytes == 70 * token_nbytes


def test_rows_written_by_a_late_turn_do_not_grow_with_the_conversation(open_store):
    store = open_store(chunk_n_tokens=16)
    cache = BytesCache(big_layout())
    changes = []
    with raw(store.path) as connection:
        for turn in range(40):
            before = connection.execute("SELECT max(id) FROM payloads").fetchone()[0] or 0
            cache.compute(range(turn, turn + 16))
            store.save_session(cache, cache.tokens, name="chat")
            changes.append(
                connection.execute("SELECT max(id) FROM payloads").fetchone()[0] - before
            )
        slices = connection.execute("SELECT count(*) FROM session_tokens").fetchone()[0]
    assert set(changes) == {2}
    assert slices == 40


def test_a_full_tail_is_merged_and_the_superseded_tails_are_gone(open_store):
    store = open_store(chunk_n_tokens=64)
    cache = BytesCache()
    for _ in range(3):
        cache.compute(range(20))
        store.save_session(cache, cache.tokens, name="chat")
    assert count(store.path, "SELECT count(*) FROM chunks") == 3  # borrowing from one another
    cache.compute(range(10))
    result = store.save_session(cache, cache.tokens, name="chat")
    assert result.n_new_tokens == 10
    with raw(store.path) as connection:
        rows = connection.execute("SELECT start, stop, base_n_tokens FROM chunks ORDER BY start")
        assert rows.fetchall() == [(0, 64, 0), (64, 70, 0)]
    load_exact(store, name="chat")


def test_a_tail_that_another_session_needs_is_not_merged_away(open_store):
    store = open_store(chunk_n_tokens=64)
    save(store, range(40), name="other")
    save(store, range(64), name="chat")
    assert stored_n_tokens(store) == 64
    store.delete_session("chat")
    assert stored_n_tokens(store) == 40
    load_exact(store, name="other")


def test_sessions_that_part_inside_a_chunk_share_what_they_have_in_common(open_store):
    store = open_store(chunk_n_tokens=64)
    suffixes = [[1], [1, 2], [3] * 20, [1, 2, 3], [3] * 21]
    for number, suffix in enumerate(suffixes):
        tokens = [*range(100, 140), *suffix]
        save(store, tokens, name=str(number))
    for number, suffix in enumerate(suffixes):
        assert load_exact(store, name=str(number)).n_tokens == 39 + len(suffix)
    assert stored_n_tokens(store) <= 40 + sum(map(len, suffixes))


def test_a_shorter_save_under_the_same_name_frees_what_nothing_reaches(store):
    save(store, TOKENS, name="a")
    save(store, TOKENS[:16], name="a")
    assert store.sessions()[0].n_tokens == 16
    assert stored_n_tokens(store) == 16


def test_other_tokens_under_the_same_name_replace_the_session(store):
    save(store, TOKENS, name="a")
    other = TOKENS[::-1]
    save(store, other, name="a")
    assert load_exact(store, name="a").tokens.tolist() == other
    assert stored_n_tokens(store) == 30


def test_metadata_comes_back_with_the_session(store):
    metadata = {"z": 1, "a": [None, True, -1.5, "text", b"\0\xff", {"n": 2**63}], "": {}}
    save(store, TOKENS, name="a", metadata=metadata)
    assert store.sessions()[0].metadata == metadata
    assert load_exact(store, name="a").metadata == metadata


def test_a_save_without_metadata_has_none_left_of_the_former(store):
    save(store, TOKENS, name="a", metadata={"turn": 1})
    save(store, TOKENS, name="a")
    assert load_exact(store, name="a").metadata == {}


def deep(levels):
    value = {}
    for _ in range(levels):
        value = {"next": value}
    return value


def cyclic():
    value = {}
    value["self"] = value
    return value


@pytest.mark.parametrize(
    "metadata",
    [
        {1: "a"},
        {"a": {2: 3}},
        {"a": object},
        {"a": {1, 2}},
        {"a": 2**64},
        {"a": -(2**63) - 1},
        {"a": "\ud800"},
        {"\ud800": 1},
        {"a": bytes(1 << 20)},
        [1],
        "text",
        deep(40),
        cyclic(),
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_metadata_that_cannot_be_stored_is_refused_and_nothing_is_written(store, metadata):
    with pytest.raises(MetadataError):
        save(store, TOKENS, name="a", metadata=metadata)
    assert store.sessions() == []
    assert store.stats().n_chunks == 0


@pytest.mark.parametrize(
    "metadata", [{"a": [0] * 200_000}, {"a": {str(i): 0 for i in range(110_000)}}, deep(30)]
)
def test_metadata_that_is_accepted_can_always_be_read_again(store, metadata):
    try:
        save(store, TOKENS, name="a", metadata=metadata)
    except MetadataError:
        assert store.sessions() == []
        return
    assert store.sessions()[0].metadata == metadata


@pytest.mark.parametrize("name", ["", "n" * 1025, 5, b"name", "a\0b", "\0", "\ud800"], ids=ascii)
def test_an_impossible_name_is_refused(store, name):
    for use in (
        lambda: save(store, TOKENS, name=name),
        lambda: store.load_session(BytesCache(), name=name),
        lambda: store.delete_session(name),
    ):
        with pytest.raises(InputError, match="session name"):
            use()
    assert store.sessions() == []


@pytest.mark.parametrize("name", ["a", "n" * 1024, "Ünïcödé 🎉", "a/b", "..", " ", "'; DROP", "%"])
def test_any_other_name_comes_back_as_it_was_given(store, name):
    save(store, TOKENS, name=name)
    assert [one.name for one in store.sessions()] == [name]
    assert load_exact(store, name=name).session == name
    store.delete_session(name)
    assert store.sessions() == []


@pytest.mark.parametrize("tokens", [[], [-1], [1.5], ["a"], None, [[1]], [2**63]], ids=str)
def test_tokens_that_are_no_token_ids_are_refused(store, tokens):
    with pytest.raises(TokensError):
        store.save_session(computed(TOKENS), tokens, name="a")
    with pytest.raises((TokensError, InputError)):
        store.load_session(BytesCache(), tokens)
    assert store.stats().n_chunks == 0


def test_more_tokens_than_the_capacity_are_refused(store):
    with pytest.raises(CapacityError, match=r"at most 128 tokens .* found 129"):
        store.save_session(computed(range(128)), range(129), name="a")
    assert store.sessions() == []


def test_a_cache_that_holds_fewer_tokens_than_claimed_is_refused(store):
    with pytest.raises(CacheMismatchError, match="holds the 30 tokens given, but it holds 29"):
        store.save_session(computed(TOKENS[:29]), TOKENS, name="a")
    with pytest.raises(CacheMismatchError, match="it holds 0"):
        store.save_session(BytesCache(), TOKENS, name="a")
    assert store.stats().n_chunks == 0


def test_a_cache_that_holds_other_tokens_is_refused_with_the_position(store):
    with pytest.raises(CacheMismatchError, match=r"token 105 at position 5, .* say 7"):
        store.save_session(computed(TOKENS), [*TOKENS[:5], 7, *TOKENS[6:]], name="a")
    assert store.stats().n_chunks == 0


def test_a_cache_whose_fingerprint_is_of_another_layout_is_refused(store):
    cache = computed(TOKENS)
    cache.fingerprint = BytesCache(layout(n_layers=1)).fingerprint
    with pytest.raises(CacheMismatchError, match="layout"):
        store.save_session(cache, TOKENS)
    with pytest.raises(CacheMismatchError, match="layout"):
        store.load_session(cache, TOKENS)


def test_a_name_of_another_models_session_is_refused_and_left_alone(store):
    save(store, TOKENS, name="a", metadata={"mine": True})
    other = computed(TOKENS, weights="other")
    with pytest.raises(SessionConflictError, match="replace=True"):
        store.save_session(other, TOKENS, name="a")
    assert load_exact(store, name="a").metadata == {"mine": True}
    assert [model.weights for model in store.models()] == [BytesCache().fingerprint.weights]


def test_with_replace_the_name_goes_to_the_other_model_and_the_former_rows_go(store):
    save(store, TOKENS, name="a")
    other = computed(TOKENS, weights="other")
    store.save_session(other, TOKENS, name="a", replace=True)
    assert [one.fingerprint for one in store.sessions()] == [other.fingerprint]
    assert store.models() == [other.fingerprint]
    assert stored_n_tokens(store) == 30
    load_exact(store, name="a", cache=BytesCache(weights="other"))


def test_equal_shapes_with_other_weights_share_no_row(store):
    save(store, TOKENS, name="a")
    result = store.save_session(computed(TOKENS, weights="other"), TOKENS, name="b")
    assert result.n_new_tokens == 30
    load_exact(store, name="a")
    load_exact(store, name="b", cache=BytesCache(weights="other"))


def test_a_namespace_has_its_own_names_and_its_own_chunks(open_store):
    one = open_store(chunk_n_tokens=8, namespace="one")
    two = open_store(chunk_n_tokens=8, namespace="two")
    save(one, TOKENS, name="a")
    assert two.sessions() == []
    assert load_exact(two, TOKENS).n_tokens == 0
    assert save(two, TOKENS, name="a").n_new_tokens == 30
    assert [session.namespace for session in one.sessions()] == ["one"]
    assert {session.namespace for session in one.sessions(all_namespaces=True)} == {"one", "two"}


def test_the_same_name_with_another_chunk_size_moves_the_session(open_store):
    small, large = open_store(chunk_n_tokens=8), open_store(chunk_n_tokens=32)
    save(small, TOKENS, name="a")
    save(large, TOKENS, name="a")
    assert [one.name for one in large.sessions()] == ["a"]
    assert load_exact(large, name="a").n_tokens == 29
    assert stored_n_tokens(large) == 30


def test_delete_frees_exactly_what_nothing_else_reaches(store):
    shared = list(range(20))
    for name in "abc":
        save(store, [*shared, ord(name), 1, 2, 3, 4, 5, 6, 7], name=name)
    total = stored_n_tokens(store)
    store.delete_session("b")
    assert [one.name for one in store.sessions()] == ["c", "a"]
    assert total - stored_n_tokens(store) >= 4
    for name in "ac":
        assert load_exact(store, name=name).n_tokens == 27
    store.delete_session("a")
    load_exact(store, name="c")
    assert stored_n_tokens(store) == 28
    store.delete_session("c")
    assert store.stats().n_chunks == store.stats().n_models == 0


def test_a_session_that_others_borrow_from_can_be_deleted_in_any_order(open_store, tmp_path):
    for number, order in enumerate(itertools.permutations("abc")):
        store = open_store(tmp_path / f"{number}.db", chunk_n_tokens=64)
        for length, name in ((30, "a"), (40, "b"), (50, "c")):
            save(store, range(length), name=name)
        for name in order:
            store.delete_session(name)
            for session in store.sessions():
                load_exact(store, name=session.name)
            assert store.verify().ok
        assert store.stats().n_chunks == 0


def test_a_deleted_session_gives_its_space_back_to_the_file_system(open_store):
    store = open_store()
    one = big_layout(n_kv_heads=8, head_dim=64)
    tokens = range(512)
    empty = store.path.stat().st_size
    store.save_session(computed(tokens, one), tokens, name="large")
    assert store.stats().file_nbytes > 512 * one.token_nbytes
    store.delete_session("large")
    assert store.path.stat().st_size <= max(empty, 40 * 16384)
    assert store.stats().file_nbytes == store.path.stat().st_size
    wal = store.path.with_name(store.path.name + "-wal")
    assert not wal.exists() or wal.stat().st_size == 0


def test_a_name_that_was_free_when_it_was_looked_for_is_not_written_over(store, open_store):
    other = open_store(chunk_n_tokens=8)
    mine = computed(TOKENS[:10])
    with pytest.raises(SessionNotFoundError):
        store.load_session(computed([]), name="chat")
    other.save_session(mine, mine.tokens, name="chat", metadata={"by": "other"})
    with pytest.raises(SessionConflictError, match="saved by another process"):
        store.save_session(mine, mine.tokens, name="chat")
    assert load_exact(store, name="chat").metadata == {"by": "other"}
    store.save_session(mine, mine.tokens, name="chat")


def test_a_session_that_another_process_saved_meanwhile_is_not_written_over(store, open_store):
    other = open_store(chunk_n_tokens=8)
    mine, theirs = computed(TOKENS[:10]), computed(TOKENS[:10])
    store.save_session(mine, mine.tokens, name="chat")
    other.load_session(theirs, name="chat")
    theirs.compute(TOKENS[len(theirs.tokens) : 20])
    other.save_session(theirs, theirs.tokens, name="chat", metadata={"by": "other"})
    mine.compute([1, 2, 3])
    for _ in range(2):
        with pytest.raises(SessionConflictError, match="saved by another process"):
            store.save_session(mine, mine.tokens, name="chat")
    assert load_exact(store, name="chat").metadata == {"by": "other"}  # seen now
    store.save_session(mine, mine.tokens, name="chat", metadata={"by": "me"})
    with pytest.raises(SessionConflictError):
        other.save_session(theirs, theirs.tokens, name="chat")
    other.save_session(theirs, theirs.tokens, name="chat", replace=True)
    other.save_session(theirs, theirs.tokens, name="chat")
    assert load_exact(other, name="chat").n_requested == 20


def test_eviction_is_no_change_of_a_session(store, open_store):
    save(store, TOKENS, name="chat")
    open_store(chunk_n_tokens=8).prune(max_bytes=0)
    save(store, TOKENS, name="chat")
    assert load_exact(store, name="chat").reason is None


@pytest.mark.parametrize("column", ["metadata", "created_at_ms", "updated_at_ms"])
def test_a_session_row_that_is_damaged_does_not_stand_in_the_way(store, column):
    save(store, TOKENS, name="bad")
    save(store, [*TOKENS[:9], 7], name="good")
    with raw(store.path) as connection:
        connection.execute(f"UPDATE sessions SET {column} = x'ff' WHERE name = 'bad'")
    with pytest.raises(CorruptStoreError, match="session"):
        store.sessions()
    assert load_exact(store, name="good").reason is None
    assert load_exact(store, [*TOKENS[:12], 7]).n_tokens == 12
    save(store, TOKENS, name="bad", replace=True)
    store.delete_session("bad")
    assert [session.name for session in store.sessions()] == ["good"]


def test_a_session_that_is_not_there_cannot_be_deleted(store):
    with pytest.raises(SessionNotFoundError, match="no session is named 'a'"):
        store.delete_session("a")


def test_sessions_come_with_the_last_saved_first(store, monkeypatch):
    times = itertools.count(1_000)
    monkeypatch.setattr("kvstore.clock.now_ms", lambda: next(times))
    for name in ("a", "b", "c", "a"):
        save(store, TOKENS, name=name)
    assert [one.name for one in store.sessions()] == ["a", "c", "b"]
    first = store.sessions()[0]
    assert first.created_at_ms < first.updated_at_ms
    assert (first.n_tokens, first.n_stored_tokens) == (30, 30)


def test_a_save_leaves_the_live_cache_alone(store):
    cache = computed(TOKENS)
    store.save_session(cache, TOKENS, name="a")
    assert_exact(cache, TOKENS)


def test_the_caches_own_token_sequence_may_be_given(store):
    cache = computed(TOKENS)
    store.save_session(cache, cache.tokens, name="a")
    result = store.load_session(cache, cache.tokens)
    assert (result.n_tokens, result.n_requested, result.reason) == (29, 30, None)
    assert_exact(cache, TOKENS[:29])


def test_results_are_plain_frozen_values(store):
    result = save(store, TOKENS)
    with pytest.raises(AttributeError):
        result.n_tokens = 5
    assert isinstance(result, kvstore.SaveResult)
