from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvstore
from kvstore import MissReason
from kvstore.db.eviction import ChunkFacts
from kvstore.errors import BudgetError, CorruptStoreError, InputError
from kvstore.prune import PrunePolicy, plan_prune
from tests.fakes import BytesCache, layout
from tests.oracle import computed, load_exact, raw, save

WIDE = layout(n_layers=1, n_kv_heads=8, head_dim=64, capacity_n_tokens=512)  # 4 KiB a token
PAGE_NBYTES = 16384


def save_wide(store, tokens, **options):
    return store.save_session(computed(tokens, WIDE), tokens, **options)


def load_wide(store, tokens=None, **options):
    return load_exact(store, tokens, cache=BytesCache(WIDE), **options)


@pytest.fixture
def clock(monkeypatch):
    """Time that a test sets by hand, in milliseconds."""

    class Clock:
        now = 1_000_000

        def __call__(self):
            return self.now

    one = Clock()
    monkeypatch.setattr("kvstore.clock.now_ms", one)
    return one


# -------------------------------------------------------------------- planning


@st.composite
def chunk_trees(draw):
    """Chunks whose parents and bases come before them."""
    facts = []
    for number in range(1, draw(st.integers(1, 12)) + 1):
        earlier = st.none() if number == 1 else st.none() | st.integers(1, number - 1)
        facts.append(
            ChunkFacts(
                id=number,
                parent_id=draw(earlier),
                base_id=draw(earlier),
                model=draw(st.sampled_from([b"a", b"b"])),
                stored_nbytes=draw(st.integers(0, 100)),
                last_used_at_ms=draw(st.integers(0, 5)),
                is_held=draw(st.sampled_from([False, False, True])),
            )
        )
    return facts


def needs(facts):
    return {chunk.id: {chunk.parent_id, chunk.base_id} - {None} for chunk in facts}


@given(chunk_trees(), st.integers(0, 500) | st.none(), st.integers(0, 6) | st.none())
def test_a_plan_is_leaf_first_and_never_takes_what_is_held(facts, free_nbytes, since):
    policy = PrunePolicy(free_nbytes=free_nbytes, unused_since_ms=since)
    plan = plan_prune(facts, policy)
    left = needs(facts)
    by_id = {chunk.id: chunk for chunk in facts}
    for chunk_id in plan.chunk_ids:
        assert all(chunk_id not in needed for needed in left.values())
        assert not by_id[chunk_id].is_held
        del left[chunk_id]
    assert plan.freed_nbytes == sum(by_id[one].stored_nbytes for one in plan.chunk_ids)
    if free_nbytes is not None and since is None and plan.freed_nbytes < free_nbytes:
        # Everything left is held, or needed by what is held.
        kept, grown = {one for one in left if by_id[one].is_held}, True
        while grown:
            grown = {other for one in kept for other in left[one]} - kept
            kept |= grown
        assert kept == set(left)


@given(chunk_trees(), st.sampled_from([b"a", b"b"]))
def test_a_plan_for_one_model_takes_no_other_models_chunk(facts, model):
    plan = plan_prune(facts, PrunePolicy(model=model))
    assert {chunk.model for chunk in facts if chunk.id in plan.chunk_ids} <= {model}


@given(chunk_trees(), st.data())
def test_a_plan_takes_nothing_that_the_caller_holds(facts, data):
    held = data.draw(st.sets(st.sampled_from([chunk.id for chunk in facts])))
    plan = plan_prune(facts, PrunePolicy(), held=held)
    assert not held & set(plan.chunk_ids)


def test_a_plan_frees_no_more_chunks_than_it_must():
    facts = [
        ChunkFacts(
            id=one, parent_id=None, base_id=None, model=b"", stored_nbytes=10,
            last_used_at_ms=one, is_held=False,
        )
        for one in range(1, 6)
    ]  # fmt: skip
    assert plan_prune(facts, PrunePolicy(free_nbytes=15)).chunk_ids == (1, 2)
    assert plan_prune(facts, PrunePolicy(unused_since_ms=4)).chunk_ids == (1, 2, 3)
    assert plan_prune(facts, PrunePolicy(free_nbytes=0)).chunk_ids == ()


# --------------------------------------------------------------------- pruning


def test_a_prune_needs_to_know_what_may_go(store):
    with pytest.raises(InputError, match="max_bytes, unused_for_seconds or model"):
        store.prune()


@pytest.mark.parametrize(
    "limit",
    [
        {"max_bytes": "lots"},
        {"max_bytes": -1},
        {"unused_for_seconds": -1},
        {"unused_for_seconds": float("nan")},
        {"unused_for_seconds": float("inf")},
        {"unused_for_seconds": "7d"},
        {"model": "abc"},
        {"model": b"abc"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_limit_that_cannot_be_is_refused(store, limit, dry_run):
    with pytest.raises(InputError, match="expected"):
        store.prune(**limit, dry_run=dry_run)


def test_a_prune_brings_the_file_under_the_size_and_gives_the_space_back(open_store, clock):
    store = open_store(chunk_n_tokens=32)
    for number in range(4):
        clock.now += 1000
        save_wide(store, [number * 1000 + one for one in range(100)], name=str(number))
    before = store.path.stat().st_size + store.path.with_name("sessions.db-wal").stat().st_size
    assert before > 4 * 100 * WIDE.token_nbytes
    result = store.prune(max_bytes=1_200_000)
    assert result.n_chunks > 0
    assert result.file_nbytes_after <= 1_200_000 < result.file_nbytes_before
    assert store.path.stat().st_size == result.file_nbytes_after == store.stats().file_nbytes
    # The oldest went first, from their ends; the youngest is whole.
    stored = {one.name: one.n_stored_tokens for one in store.sessions()}
    assert stored["0"] == 0
    assert stored["3"] == 100
    assert load_wide(store, name="3").reason is None
    assert load_wide(store, name="0").reason is MissReason.EVICTED
    assert load_wide(store, name="0").n_tokens == 0


def test_a_session_survives_its_eviction_with_tokens_and_metadata(store):
    save(store, range(30), name="a", metadata={"turn": 1})
    result = store.prune(max_bytes=0)
    assert result.n_chunks == 4
    (session,) = store.sessions()
    assert (session.n_tokens, session.n_stored_tokens) == (30, 0)
    hit = load_exact(store, name="a")
    assert (hit.n_tokens, hit.reason) == (0, MissReason.EVICTED)
    assert (list(hit.tokens), hit.metadata) == (list(range(30)), {"turn": 1})
    save(store, range(30), name="a")
    assert load_exact(store, name="a").n_tokens == 29


@pytest.mark.parametrize("max_bytes", [0, 420_000, 600_000, 900_000, 1_500_000, 10_000_000])
def test_a_dry_run_says_what_the_prune_then_does(open_store, max_bytes):
    store = open_store(chunk_n_tokens=32)
    for number in range(3):
        save_wide(store, [number, *range(90 + number * 7)], name=str(number))
    with raw(store.path) as connection:
        before = connection.execute("PRAGMA data_version").fetchone()
        dry = store.prune(max_bytes=max_bytes, dry_run=True)
        assert connection.execute("PRAGMA data_version").fetchone() == before
    real = store.prune(max_bytes=max_bytes)
    assert (dry.dry_run, real.dry_run) == (True, False)
    assert (dry.n_chunks, dry.freed_nbytes) == (real.n_chunks, real.freed_nbytes)
    assert dry.file_nbytes_before == real.file_nbytes_before
    assert abs(dry.file_nbytes_after - real.file_nbytes_after) <= 8 * PAGE_NBYTES


def test_only_what_was_not_used_for_that_long_goes(store, clock):
    save(store, range(10), name="old")
    clock.now += 50_000
    save(store, range(100, 110), name="young")
    clock.now += 10_000
    assert store.prune(unused_for_seconds=61).n_chunks == 0
    assert store.prune(unused_for_seconds=30).n_chunks == 2
    assert {one.name: one.n_stored_tokens for one in store.sessions()} == {"old": 0, "young": 10}


def test_a_load_counts_as_use_of_the_whole_chain(open_store, clock):
    store = open_store(chunk_n_tokens=8)
    save(store, range(30), name="old")
    save(store, range(100, 110), name="other")
    clock.now += 50_000
    load_exact(store, range(30))
    store.close()  # writes the marks
    store = open_store(chunk_n_tokens=8)
    assert store.prune(unused_for_seconds=30).n_chunks == 2
    assert load_exact(store, range(30)).n_tokens == 29


def test_a_prune_of_one_model_leaves_the_others(store):
    save(store, range(20), name="a")
    store.save_session(computed(range(20), weights="other"), range(20), name="b")
    store.prune(model=BytesCache(weights="other").fingerprint.model)
    stored = {one.name: one.n_stored_tokens for one in store.sessions()}
    assert stored == {"a": 20, "b": 0}
    assert load_exact(store, range(20)).n_tokens == 19


def test_what_others_continue_or_borrow_from_goes_last(open_store, clock):
    store = open_store(chunk_n_tokens=64)
    save(store, range(40), name="base")
    clock.now += 1000
    save(store, [*range(40), *range(500, 520)], name="borrower")
    clock.now += 1000
    save(store, [*range(40), *range(600, 640)], name="continued")
    while store.prune(max_bytes=store.stats().file_nbytes, dry_run=True).n_chunks == 0:
        if store.stats().n_chunks == 0:
            break
        with raw(store.path) as connection:  # a file that is one byte too large
            (used,) = connection.execute(
                "SELECT (page_count - freelist_count) * 16384 "
                "FROM pragma_page_count, pragma_freelist_count"
            ).fetchone()
        store.prune(max_bytes=used - 1)
        assert store.verify().problems == ()
        for session in store.sessions():
            load_exact(store, name=session.name)
            load_exact(store, range(40))


# --------------------------------------------------------------------- budgets


@pytest.mark.parametrize("budget", [700_000, 1_000_000, 1_500_000])
def test_the_budget_holds_after_every_save(open_store, store_path, clock, budget):
    store = open_store(chunk_n_tokens=32, max_bytes=budget)
    for number in range(12):
        clock.now += 1000
        tokens = [number // 3, *range(20 + number * 3)]
        try:
            save_wide(store, tokens, name=str(number), metadata={"n": number})
        except BudgetError:
            assert 4096 * len(tokens) + 500_000 > budget
            continue
        assert store.stats().file_nbytes <= budget
        assert load_wide(store, name=str(number)).n_tokens == len(tokens) - 1
    assert store.verify().problems == ()
    names = {one.name for one in store.sessions()}
    store.close()
    assert store_path.stat().st_size <= budget
    assert len(names) >= 10


def test_a_long_save_over_several_transactions_stays_in_the_budget(open_store, clock):
    budget = 1_650_000
    store = open_store(chunk_n_tokens=8, max_bytes=budget)
    for number in range(3):
        clock.now += 1000
        save_wide(store, range(number * 1000, number * 1000 + 250), name=str(number))
        assert store.stats().file_nbytes <= budget
        assert load_wide(store, name=str(number)).reason is None
    assert load_wide(store, name="0").reason is MissReason.EVICTED


def test_what_does_not_fit_is_an_error_that_leaves_the_session_as_it_was(open_store):
    store = open_store(chunk_n_tokens=32, max_bytes=800_000)
    save_wide(store, range(40), name="a", metadata={"turn": 1})
    with pytest.raises(BudgetError, match="raise max_bytes"):
        save_wide(store, range(400), name="a", metadata={"turn": 2})
    (session,) = store.sessions()
    assert (session.n_tokens, session.metadata) == (40, {"turn": 1})
    assert store.stats().file_nbytes <= 800_000
    load_wide(store, name="a")
    assert store.verify().problems == ()
    save_wide(store, range(44), name="a")


def test_a_budget_smaller_than_an_empty_file_is_an_error_at_the_first_save(open_store):
    store = open_store(max_bytes=1000)
    with pytest.raises(BudgetError):
        save(store, range(10), name="a")
    assert store.sessions() == []


def test_opening_with_a_budget_prunes_down_to_it(open_store, store_path):
    with kvstore.open(store_path, chunk_n_tokens=32) as store:
        save_wide(store, range(300), name="a")
    store = open_store(chunk_n_tokens=32, max_bytes="900 KB")
    assert store_path.stat().st_size <= 900_000
    (session,) = store.sessions()
    assert 0 < session.n_stored_tokens < 300
    hit = load_wide(store, name="a")
    assert hit.n_tokens == session.n_stored_tokens
    assert hit.reason is MissReason.EVICTED


def test_a_leased_chunk_is_not_pruned_until_the_lease_ends(store, clock):
    save(store, range(16))
    with raw(store.path) as connection:
        connection.execute(
            "INSERT INTO leases (chunk_id, expires_at_ms) "
            "SELECT max(id), ? FROM chunks", (clock.now + 5000,),
        )  # fmt: skip
    for dry_run in (True, False):
        assert store.prune(max_bytes=0, dry_run=dry_run).n_chunks == 0
    clock.now += 6000
    assert store.prune(max_bytes=0, dry_run=True).n_chunks == 2
    assert store.prune(max_bytes=0).n_chunks == 2


def test_a_save_that_can_never_fit_evicts_nobody(open_store):
    store = open_store(chunk_n_tokens=32, max_bytes="900 KB")
    save_wide(store, range(100), name="a")
    before = store.stats()
    with pytest.raises(BudgetError, match="would take about"):
        save_wide(store, range(1000, 1500), name="too long")
    assert store.stats() == before


def test_a_lease_from_a_time_when_the_clock_was_wrong_ends(store):
    save(store, range(16))
    with raw(store.path) as connection:
        connection.execute(
            "INSERT INTO leases (chunk_id, expires_at_ms) SELECT max(id), 1 << 60 FROM chunks"
        )
    assert store.prune(max_bytes=0).n_chunks == 2


@pytest.mark.parametrize(
    "change",
    ["parent_id = 999", "base_id = 999", "stored_nbytes = 'x'", "last_used_at_ms = 'x'"],
)
def test_a_damaged_row_is_an_error_of_ours_for_a_prune_too(store_path, change):
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        save(store, range(30), name="chat")
        with raw(store_path) as connection:
            connection.execute(f"UPDATE chunks SET {change} WHERE id = 2")
        for dry_run in (True, False):
            with pytest.raises(CorruptStoreError, match="chunk row 2"):
                store.prune(max_bytes=0, dry_run=dry_run)


def test_the_lease_of_a_save_that_died_keeps_nothing_after_a_delete(store, clock):
    save(store, range(30), name="chat")
    with raw(store.path) as connection:
        connection.execute(
            "INSERT INTO leases (chunk_id, expires_at_ms) "
            "SELECT max(id), ? FROM chunks", (clock.now - 1,),
        )  # fmt: skip
    store.delete_session("chat")
    assert store.stats().n_chunks == 0
