"""Bases: learned once, kept with their key space, and never a reason for wrong numbers."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zstandard

import kvstore
from kvstore import Layout, MissReason
from kvstore import save as saving
from kvstore.codec import MIN_TRAINING_N_TOKENS, Basis, Block
from kvstore.db.basis_cache import BasisCache
from kvstore.db.tables import FORMAT_VERSION
from kvstore.errors import BudgetError
from tests.conftest import ROOT, start_python
from tests.fakes import SmoothCache, layout, ring_tensors
from tests.independent_reader import Reader, Refused

SIZE = 128
ONE = layout(n_layers=1, capacity_n_tokens=4096, n_kv_heads=2, head_dim=8)
FEW, ENOUGH = 1000, MIN_TRAINING_N_TOKENS + 10
PCA_TAG = 6


def filled(n_tokens, *, one=ONE, first=0, weights="weights"):
    cache = SmoothCache(one, weights=weights)
    cache.compute([first + token % 97 for token in range(n_tokens)])
    return cache


def open_pca(path, **options):
    return kvstore.open(path, **{"chunk_n_tokens": SIZE, "codec": "pca", **options})


@pytest.fixture
def store(open_store):
    """A store that is verified when the test ends, as all that ``open_store`` opens."""
    return open_store(chunk_n_tokens=SIZE, codec="pca")


def rows(path, query="SELECT tensor, digest, data FROM bases ORDER BY space_id, tensor"):
    connection = sqlite3.connect(path)
    found = connection.execute(query).fetchall()
    connection.close()
    return found


def change(path, statement, *values):
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    connection.execute(statement, values)
    connection.close()


def tags(path, where="1"):
    """The codecs of all blobs, in token order by tensor."""
    return [
        tag
        for (tag,) in rows(path, f"SELECT codec FROM blobs WHERE {where} ORDER BY tensor, start")
    ]


def check_near(cache, target, n_tokens, *, exact_from=None):
    """The target holds what the cache holds, as near as the codec's step has it."""
    assert list(target.tokens) == list(cache.tokens[:n_tokens])
    for index, spec in enumerate(cache.layout.tensors):
        if spec.kind is not kvstore.Kind.FULL:
            continue
        was, now = (
            np.frombuffer(one.memory[index], "<f4")[: n_tokens * spec.slot_nbytes // 4]
            for one in (cache, target)
        )
        was, now = (one.reshape(n_tokens, -1) for one in (was, now))
        spread = np.sqrt(was.var(axis=0).mean())
        assert np.sqrt(np.square(was - now).mean()) < 0.2 * spread
        assert np.array_equal(was[:4], now[:4])
        if exact_from is not None:
            assert np.array_equal(was[exact_from:], now[exact_from:])


def loaded(store, cache, **options):
    target = SmoothCache(cache.layout)
    target.fingerprint = cache.fingerprint
    return store.load_session(target, [*cache.tokens, 5], **options), target


# ---------------------------------------------------------------- learning


def test_until_there_are_enough_tokens_all_is_exact_and_counted(store):
    cache = filled(FEW)
    saved = store.save_session(cache, cache.tokens, name="chat")
    assert (saved.codec, saved.n_fallback_blobs) == ("pca", 2 * (FEW // SIZE))
    assert rows(store.path) == []
    assert store.stats().bases_nbytes == 0
    hit, target = loaded(store, cache)
    assert (hit.n_tokens, target.used()) == (FEW, cache.used())


def test_the_first_save_with_enough_tokens_learns_once_and_what_follows_is_small(store):
    cache = filled(FEW)
    store.save_session(cache, cache.tokens, name="chat")
    cache.compute(range(ENOUGH - FEW))
    grown = store.save_session(cache, cache.tokens, name="chat")
    assert grown.n_fallback_blobs == 0
    assert grown.stored_nbytes < grown.raw_nbytes // 2
    first = rows(store.path)
    assert [tensor for tensor, _, _ in first] == [0, 1]
    assert store.stats().bases_nbytes == sum(len(data) for *_, data in first)
    n_full = ENOUGH // SIZE - FEW // SIZE
    assert tags(store.path).count(PCA_TAG) == 2 * n_full
    cache.compute([3] * 500)
    store.save_session(cache, cache.tokens, name="chat")
    other = filled(2000, first=500)
    store.save_session(other, other.tokens, name="other")
    assert rows(store.path) == first
    for one in (cache, other):
        hit, target = loaded(store, one)
        assert (hit.n_tokens, hit.codec, hit.reason) == (len(one.tokens), "pca", None)
        check_near(one, target, hit.n_tokens, exact_from=len(one.tokens) // SIZE * SIZE)


def test_another_process_reads_and_goes_on_with_what_was_learned(store_path, open_store):
    cache = filled(ENOUGH)
    with open_pca(store_path) as first:
        first.save_session(cache, cache.tokens, name="chat")
    before = rows(store_path)
    store = open_store(chunk_n_tokens=SIZE, codec="pca")
    hit, target = loaded(store, cache)
    check_near(cache, target, ENOUGH)
    assert hit.reason is None
    cache.compute([1] * 300)
    assert store.save_session(cache, cache.tokens, name="chat").n_fallback_blobs == 0
    assert rows(store_path) == before


def test_only_tensors_whose_codec_needs_one_have_a_basis(open_store):
    store = open_store(chunk_n_tokens=SIZE, codec="k=pca,v=int8")
    cache = filled(ENOUGH)
    assert store.save_session(cache, cache.tokens).n_fallback_blobs == 0
    assert [tensor for tensor, *_ in rows(store.path)] == [0]
    assert {*tags(store.path, "tensor = 1 AND stop % 128 = 0")} == {4}


def test_each_key_space_has_bases_of_its_own(open_store):
    cache = filled(ENOUGH)
    every = ({}, {"namespace": "other"}, {"codec": "k=pca"}, {"chunk_n_tokens": 64})
    for number, options in enumerate(every):
        store = open_store(**{"chunk_n_tokens": SIZE, "codec": "pca", **options})
        store.save_session(cache, cache.tokens, name=str(number))
    found = rows(store.path, "SELECT space_id, tensor FROM bases ORDER BY 1, 2")
    assert [tensor for _, tensor in found] == [0, 1, 0, 1, 0, 0, 1]


def test_the_same_text_of_another_model_learns_by_itself(store):
    for weights in ("weights", "others"):
        cache = filled(ENOUGH, weights=weights)
        store.save_session(cache, cache.tokens)
    assert len(rows(store.path)) == 4


def test_nothing_is_learned_from_what_went_through_a_lossy_codec(open_store):
    store = open_store(chunk_n_tokens=SIZE, codec="int8")
    cache = filled(ENOUGH)
    store.save_session(cache, cache.tokens, name="chat")
    _, target = loaded(store, cache)
    assert len(target.edits) == 1
    target.compute([9] * 1000)
    store = open_store(chunk_n_tokens=SIZE, codec="pca")
    saved = store.save_session(target, target.tokens, name="copy")
    assert saved.n_fallback_blobs == 2 * (len(target.tokens) // SIZE)
    assert rows(store.path) == []


def test_a_session_that_is_restarted_before_there_are_enough_tokens_learns(store_path):
    cache = filled(FEW)
    with open_pca(store_path) as store:
        store.save_session(cache, cache.tokens, name="chat")
    for _ in range(2):
        with open_pca(store_path) as store:
            target = SmoothCache(ONE)
            store.load_session(target, name="chat")
            target.compute([7] * 400)
            saved = store.save_session(target, target.tokens, name="chat")
    assert len(target.tokens) > MIN_TRAINING_N_TOKENS
    assert saved.n_fallback_blobs == 0
    assert len(rows(store_path)) == 2
    with open_pca(store_path) as store:
        hit, again = loaded(store, target)
        check_near(target, again, hit.n_tokens)
        again.compute([9] * 2000)
        other = open_pca(store_path.with_name("other.db"))
        other.save_session(again, again.tokens)
        assert other.stats().bases_nbytes == 0  # these went through the codec
        other.close()
        assert store.verify().problems == ()


def test_after_damage_what_is_left_of_exact_blobs_is_learned_from(store_path):
    cache = filled(FEW)
    with open_pca(store_path) as store:
        store.save_session(cache, cache.tokens, name="chat")
        cache.compute(range(1000))
        store.save_session(cache, cache.tokens, name="chat")
    change(store_path, "UPDATE bases SET data = zeroblob(length(data))")
    with open_pca(store_path) as store:
        target = SmoothCache(ONE)
        hit = store.load_session(target, name="chat")
        assert (hit.n_tokens, hit.reason) == (FEW // SIZE * SIZE, MissReason.CORRUPT)
        target.compute([7] * 1000)
        assert store.save_session(target, target.tokens, name="new").n_fallback_blobs == 0
        store.delete_session("chat")
        assert store.verify().problems == ()


def test_what_lost_something_before_a_codec_stored_it_exactly_is_not_taken_for_exact(open_store):
    lossy, cache = open_store(chunk_n_tokens=SIZE, codec="int8"), filled(300)
    lossy.save_session(cache, cache.tokens)
    _, target = loaded(lossy, cache)
    learning = open_store(chunk_n_tokens=SIZE, codec="pca")
    saved = learning.save_session(target, target.tokens, name="copy")
    assert saved.n_fallback_blobs == 4
    copy = SmoothCache(ONE)
    learning.load_session(copy, name="copy")
    exact = open_store(chunk_n_tokens=SIZE)
    assert exact.save_session(copy, copy.tokens).n_exact_tokens == 0
    assert exact.load_session(SmoothCache(ONE), cache.tokens).n_tokens == 0


def test_what_lies_behind_an_edit_may_be_learned_from(store):
    cache = filled(FEW)
    cache.edit(700, "struck")
    cache.compute(range(ENOUGH - FEW))
    assert store.save_session(cache, cache.tokens, name="chat").n_fallback_blobs == 0
    assert len(rows(store.path)) == 2
    target = SmoothCache(ONE)
    assert store.load_session(target, name="chat").n_tokens == ENOUGH - 1


def test_content_of_which_nothing_can_be_learned_is_tried_once(store, monkeypatch):
    tried, train = [], saving._train
    monkeypatch.setattr(saving, "_train", lambda *one: (tried.append(one), train(*one))[1])
    cache = filled(ENOUGH)
    cache.memory[1][:] = bytes(len(cache.memory[1]))
    n_full = ENOUGH // SIZE
    assert store.save_session(cache, cache.tokens, name="chat").n_fallback_blobs == n_full
    assert (len(tried), len(rows(store.path))) == (2, 1)
    cache.compute([1] * SIZE)
    assert store.save_session(cache, cache.tokens, name="chat").n_fallback_blobs == 1
    assert len(tried) == 2


def test_a_ring_that_holds_enough_learns_from_it_and_a_smaller_one_is_exact(open_store):
    one = Layout(
        tensors=(
            *layout(n_layers=1, capacity_n_tokens=4096, head_dim=8).tensors,
            *ring_tensors(layer=1, window_n_tokens=1600),
            *ring_tensors(layer=2, window_n_tokens=500),
        )
    )
    store = open_store(chunk_n_tokens=SIZE, codec="pca")
    cache = filled(3700, one=one)
    saved = store.save_session(cache, cache.tokens, name="chat")
    assert [tensor for tensor, *_ in rows(store.path)] == [0, 1, 2, 3]
    n_small = sum(1 for tag in tags(store.path, "tensor IN (5, 6)") if tag != PCA_TAG)
    assert n_small == len(tags(store.path, "tensor IN (5, 6)"))
    assert 0 < saved.n_fallback_blobs <= n_small
    target = SmoothCache(one)
    assert store.load_session(target, [*cache.tokens, 5]).n_tokens == 3700
    check_near(cache, target, 3700)
    with Reader(store.path) as reader:
        reader.verify()


# ---------------------------------------------------------------- several at once


def test_who_is_second_takes_the_bases_of_who_was_first(store, open_store, monkeypatch):
    rival = open_store(chunk_n_tokens=SIZE, codec="pca")
    train, first = saving._train, []

    def slow(*arguments):
        basis = train(*arguments)
        if not first:
            first.append(True)
            other = filled(ENOUGH, first=300)
            rival.save_session(other, other.tokens, name="rival")
            first.append(rows(store.path))
        return basis

    monkeypatch.setattr(saving, "_train", slow)
    cache = filled(ENOUGH)
    saved = store.save_session(cache, cache.tokens, name="chat")
    assert (saved.n_fallback_blobs, saved.n_new_tokens) == (0, ENOUGH)
    assert rows(store.path) == first[1]
    for one in (cache, filled(ENOUGH, first=300)):
        hit, target = loaded(rival, one)
        assert hit.n_tokens == ENOUGH
        check_near(one, target, ENOUGH)


RACER = """
import sys, time
from pathlib import Path
import kvstore
from tests.test_bases import filled, open_pca

path, seed = sys.argv[1], int(sys.argv[2])
with open_pca(path) as store:
    cache = filled(1600, first=100 * seed)
    print("ready", flush=True)
    while not Path(path + ".go").exists():
        time.sleep(0.001)
    saved = store.save_session(cache, cache.tokens, name=str(seed))
    assert saved.n_fallback_blobs == 0
    cache.compute([1] * 200)
    assert store.save_session(cache, cache.tokens, name=str(seed)).n_fallback_blobs == 0
print("done")
"""


@pytest.mark.parametrize("n_rounds", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_processes_that_learn_at_once_end_up_with_the_same(tmp_path, n_rounds):
    for number in range(n_rounds):
        path = tmp_path / f"{number}.db"
        processes = [start_python(RACER, path, seed) for seed in range(2)]
        try:
            for process in processes:
                assert process.stdout.readline() == "ready\n", process.stderr.read()
            Path(f"{path}.go").touch()
            for process in processes:
                output, errors = process.communicate(timeout=200)
                assert (process.returncode, output) == (0, "done\n"), errors
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        assert len(rows(path)) == 2
        with open_pca(path) as store:
            assert store.verify().problems == ()
            for seed in range(2):
                cache = filled(1600, first=100 * seed)
                hit, target = loaded(store, cache)
                assert hit.n_tokens == 1600
                check_near(cache, target, 1600)


def test_threads_load_at_once_from_bases_that_nobody_has_read(store_path, open_store):
    cache = filled(2000)
    with open_pca(store_path) as first:
        first.save_session(cache, cache.tokens, name="chat")
    store = open_store(chunk_n_tokens=SIZE, codec="pca", n_threads=4)
    begin = threading.Barrier(4)

    def load(_):
        begin.wait(60)
        hit, target = loaded(store, cache)
        assert hit.n_tokens == 2000
        return target.used()

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(load, range(4))
    assert all(other == first for other in others)


def test_the_memory_of_bases_is_bounded_and_the_last_used_stay():
    made = []
    for seed, n_channels in enumerate((8, 8, 8, 16)):
        block = Block(dtype="float32", start=4, n_tokens=64, n_channels=n_channels, head_dim=4)
        numbers = np.random.default_rng(seed).standard_normal((64, n_channels), dtype=np.float32)
        made.append(Basis.train(memoryview(numbers).cast("B"), block, role="v"))
    cache = BasisCache(max_nbytes=2 * 8 * (4 + 2 * 8 + 4))  # mean, axes and tops of two
    places = [(1, 0, 8, basis.digest) for basis in made]
    for place, basis in zip(places[:3], made, strict=False):
        cache.put(place, basis)
        cache.get(places[0])
    assert [cache.get(place) for place in places] == [made[0], None, made[2], None]
    cache.put(places[3], made[3])  # larger than all: kept alone, so that a load can end
    assert [cache.get(place) for place in places] == [None, None, None, made[3]]


def test_a_load_decodes_each_basis_once_however_small_the_memory_for_them(store, monkeypatch):
    cache, decoded, decode = filled(ENOUGH), [], Basis.from_bytes
    store.save_session(cache, cache.tokens, name="chat")
    monkeypatch.setattr(Basis, "from_bytes", lambda *one: (decoded.append(one), decode(*one))[1])
    with open_pca(store.path) as other:
        other._database.bases.max_nbytes = 1
        hit, target = loaded(other, cache)
    check_near(cache, target, hit.n_tokens)
    assert len(decoded) == 2


# ---------------------------------------------------------------- deleting, budgets


def test_bases_go_with_the_chunks_of_their_key_space(store):
    cache = filled(ENOUGH)
    store.save_session(cache, cache.tokens, name="a")
    store.save_session(cache, cache.tokens[:300], name="b")
    store.delete_session("a")
    assert len(rows(store.path)) == 2
    store.delete_session("b")
    assert rows(store.path) == rows(store.path, "SELECT * FROM spaces") == []


def test_a_basis_without_bytes_takes_none(store_path):
    """Its column says NOT NULL; a damaged file may have NULL in it all the same."""
    cache = filled(ENOUGH)
    with open_pca(store_path) as store:
        store.save_session(cache, cache.tokens, name="chat")
    connection = sqlite3.connect(store_path, isolation_level=None)
    query = "SELECT sql FROM sqlite_schema WHERE name = 'bases'"
    (was,) = connection.execute(query).fetchone()
    change_schema = "UPDATE sqlite_schema SET sql = ? WHERE name = 'bases'"
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute(change_schema, (was.replace("data BLOB NOT NULL", "data BLOB"),))
    connection.close()
    change(store_path, "UPDATE bases SET data = NULL")
    connection = sqlite3.connect(store_path, isolation_level=None)
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute(change_schema, (was,))
    connection.close()
    with open_pca(store_path) as store:
        stats = store.stats()
        dry = store.prune(max_bytes=0, dry_run=True)
        assert dry.file_nbytes_before - dry.file_nbytes_after == stats.stored_nbytes
        assert not store.verify().ok


def test_a_session_without_chunks_needs_no_bases(store):
    cache = filled(ENOUGH)
    store.save_session(cache, cache.tokens, name="a")
    stats = store.stats()
    dry = store.prune(max_bytes=0, dry_run=True)
    nbytes = stats.stored_nbytes + stats.bases_nbytes
    assert dry.file_nbytes_before - dry.file_nbytes_after == nbytes
    store.prune(max_bytes=0)
    assert rows(store.path) == []
    assert [session.n_stored_tokens for session in store.sessions()] == [0]
    assert store.save_session(cache, cache.tokens, name="a").n_fallback_blobs == 0
    assert len(rows(store.path)) == 2


def test_a_save_puts_back_what_was_deleted_while_it_encoded(store, open_store, monkeypatch):
    """The key space goes between the plan of a save and its first transaction."""
    rival = open_store(chunk_n_tokens=SIZE, codec="pca")
    cache = filled(ENOUGH)
    store.save_session(cache, cache.tokens, name="a")
    before, encode, done = rows(store.path), saving._encode_part, []

    def slow(*arguments):
        if not done:
            done.append(True)
            rival.delete_session("a")
            assert rows(store.path) == []
        return encode(*arguments)

    monkeypatch.setattr(saving, "_encode_part", slow)
    other = filled(400, first=300)
    assert store.save_session(other, other.tokens, name="b").n_fallback_blobs == 0
    assert rows(store.path) == before
    hit, _ = loaded(store, other)
    assert hit.n_tokens == 400


@pytest.mark.slow
def test_a_budget_counts_bases(open_store, store_path):
    wide = layout(n_layers=1, capacity_n_tokens=2048, n_kv_heads=4, head_dim=64)
    rng = np.random.default_rng(1)
    cache = filled(1600, one=wide)
    for index, memory in enumerate(cache.memory):
        numbers = np.frombuffer(memory, "<f4").reshape(2048, 256)
        numbers += rng.standard_normal(numbers.shape, dtype=np.float32) * (3 + index)
    with open_pca(store_path, namespace="unbounded") as store:
        store.save_session(cache, cache.tokens[:1600], name="a")
        whole = store.stats().file_nbytes
        learned = store.stats().bases_nbytes
        assert learned > 60_000
        store.delete_session("a")
    store = open_store(chunk_n_tokens=SIZE, codec="pca", max_bytes=whole - learned // 2)
    with pytest.raises(BudgetError):
        store.save_session(cache, cache.tokens, name="a")
    assert store.stats().file_nbytes <= whole - learned // 2
    store.close()
    store = open_store(chunk_n_tokens=SIZE, codec="pca", max_bytes=whole + 65536)
    store.save_session(cache, cache.tokens, name="a")
    other = filled(1600, one=wide, weights="others")
    store.save_session(other, other.tokens, name="b")  # the first one's chunks make room
    assert store.stats().file_nbytes <= whole + 65536
    assert store.load_session(SmoothCache(wide, weights="others"), name="b").n_tokens == 1599


# ---------------------------------------------------------------- background


def test_a_save_in_the_background_copies_what_it_learns_from(store):
    cache = filled(FEW)
    store.save_session(cache, cache.tokens, name="chat")
    cache.compute(range(ENOUGH - FEW))
    ids, was = list(cache.tokens), [bytes(memory) for memory in cache.memory]
    pending = store.save_session(cache, ids, name="chat", background=True)
    cache.truncate(0)
    for memory in cache.memory:
        memory[:] = b"\x7f" * len(memory)
    assert pending.result(60).n_fallback_blobs == 0
    assert store.pending_nbytes == 0
    found = rows(store.path)
    for (tensor, digest, _), memory in zip(found, was, strict=True):
        spec = ONE.tensors[tensor]
        block = Block(dtype="float32", start=0, n_tokens=ENOUGH, n_channels=16, head_dim=8)
        numbers = memoryview(memory)[: ENOUGH * spec.slot_nbytes]
        assert Basis.train(numbers, block, role=spec.role).digest == digest
    whole = filled(FEW)
    whole.compute(range(ENOUGH - FEW))
    _, target = loaded(store, whole)
    check_near(whole, target, ENOUGH)


def test_what_is_copied_to_learn_from_counts_as_pending(open_store, monkeypatch):
    gate = threading.Event()
    save = saving.save
    monkeypatch.setattr(saving, "save", lambda *one: (gate.wait(60), save(*one))[1])
    nbytes = ENOUGH * sum(spec.slot_nbytes for spec in ONE.tensors)
    store = open_store(chunk_n_tokens=SIZE, codec="pca", max_pending_bytes=2 * nbytes)
    cache = filled(FEW)
    gate.set()
    store.save_session(cache, cache.tokens, name="chat")
    gate.clear()
    cache.compute(range(ENOUGH - FEW))
    first = store.save_session(cache, cache.tokens, name="chat", background=True)
    assert nbytes <= store.pending_nbytes <= 2 * nbytes
    held = store.pending_nbytes
    cache.compute([1] * SIZE)
    second = store.save_session(cache, cache.tokens, name="chat", background=True)
    assert store.pending_nbytes < held + nbytes // 2  # it shares what the first one copied
    gate.set()
    assert first.result(60).n_fallback_blobs == second.result(60).n_fallback_blobs == 0
    assert len(rows(store.path)) == 2


def test_a_save_too_large_to_be_copied_learns_before_it_returns(open_store):
    store = open_store(chunk_n_tokens=SIZE, codec="pca", max_pending_bytes=0)
    cache = filled(ENOUGH)
    pending = store.save_session(cache, cache.tokens, name="chat", background=True)
    assert pending.done
    assert (pending.result().n_fallback_blobs, len(rows(store.path))) == (0, 2)


def test_a_save_whose_bases_go_meanwhile_is_exact(open_store, monkeypatch):
    store, rival = (open_store(chunk_n_tokens=SIZE, codec="pca") for _ in range(2))
    cache = filled(ENOUGH)
    store.save_session(cache, cache.tokens, name="chat")
    gate, save = threading.Event(), saving.save
    monkeypatch.setattr(saving, "save", lambda *one: (gate.wait(60), save(*one))[1])
    other = filled(1600, first=300)
    ids = list(other.tokens)[:1600]
    pending = store.save_session(other, ids[:600], name="other", background=True)
    change(store.path, "DELETE FROM bases")
    gate.set()
    assert pending.result(60).n_fallback_blobs == 2 * (600 // SIZE)
    hit, target = loaded(store, other)
    assert (hit.n_tokens, target.used()) == (600, [slots[:600] for slots in other.used()])
    # What named the deleted ones is damaged: it is met as such, and written again.
    fresh = open_store(chunk_n_tokens=SIZE, codec="pca")
    hit, _ = loaded(fresh, cache)
    assert (hit.n_tokens, hit.reason) == (0, MissReason.CORRUPT)
    assert fresh.save_session(cache, cache.tokens, name="chat").n_fallback_blobs == 0
    rival.close()


# ---------------------------------------------------------------- damage

SWAPPED = "UPDATE bases SET digest = (SELECT digest FROM bases o WHERE o.tensor <> bases.tensor)"
DAMAGE = {
    "missing": "DELETE FROM bases WHERE tensor = 0",
    "all missing": "DELETE FROM bases",
    "a byte of the data": "UPDATE bases SET data = "
    "CAST(substr(data, 1, 30) || x'5a' || substr(data, 32) AS BLOB)",
    "cut short": "UPDATE bases SET data = substr(data, 1, length(data) - 1)",
    "longer": "UPDATE bases SET data = CAST(data || x'00' AS BLOB)",
    "empty": "UPDATE bases SET data = x''",
    "text": "UPDATE bases SET data = 'basis'",
    "text that is none": "UPDATE bases SET data = CAST(x'ff' AS TEXT)",
    "a digest that is text": "UPDATE bases SET digest = CAST(x'ff' AS TEXT)",
    "a tensor that is text": "UPDATE bases SET tensor = CAST(x'ff' || tensor AS TEXT)",
    "another digest": "UPDATE bases SET digest = zeroblob(16) WHERE tensor = 1",
    "a digest that is a number": "UPDATE bases SET digest = 7 WHERE tensor = 1",
    "swapped data": "UPDATE bases SET data = "
    "(SELECT data FROM bases o WHERE o.tensor <> bases.tensor)",
    "of another tensor": "UPDATE bases SET tensor = tensor + 7",
}


FAST_DAMAGE = ("missing", "a byte of the data", "text that is none", "another digest")


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=() if how in FAST_DAMAGE else pytest.mark.slow) for how in DAMAGE],
)
def test_a_damaged_basis_is_a_miss_with_a_reason_until_it_is_learned_again(
    store_path, open_store, how
):
    cache = filled(FEW)
    with open_pca(store_path) as store:
        store.save_session(cache, cache.tokens, name="chat")
        cache.compute(range(ENOUGH - FEW))
        store.save_session(cache, cache.tokens, name="chat")
    change(store_path, DAMAGE[how])
    store = kvstore.open(store_path, chunk_n_tokens=SIZE, codec="pca")
    assert not store.verify().ok
    with Reader(store_path) as reader, pytest.raises(Refused):
        reader.verify()
    hit, target = loaded(store, cache)
    n_exact = FEW // SIZE * SIZE
    assert (hit.n_tokens, hit.reason) == (n_exact, MissReason.CORRUPT)
    assert "basis" in hit.detail
    assert target.used() == [slots[:n_exact] for slots in cache.used()]
    by_name = store.load_session(SmoothCache(ONE), name="chat")
    assert by_name.n_tokens == n_exact
    saved = store.save_session(cache, cache.tokens, name="chat")
    assert saved.n_fallback_blobs == 0
    if "tensor" in how:  # what no save looks at
        change(store_path, "DELETE FROM bases WHERE tensor > 1 OR typeof(tensor) = 'text'")
    store.close()
    store = open_store(chunk_n_tokens=SIZE, codec="pca")
    hit, target = loaded(store, cache)
    assert (hit.n_tokens, hit.reason) == (ENOUGH, None)
    check_near(cache, target, ENOUGH)


def test_bases_of_each_others_tensors_are_none(store_path):
    cache = filled(ENOUGH)
    with open_pca(store_path) as store:
        store.save_session(cache, cache.tokens, name="chat")
    for statement in ("tensor + 7", "8 - tensor"):
        change(store_path, f"UPDATE bases SET tensor = {statement}")
    with open_pca(store_path) as store:
        assert not store.verify().ok
        hit, _ = loaded(store, cache)
        assert (hit.n_tokens, hit.reason) == (0, MissReason.CORRUPT)
        assert "there is another one" in hit.detail
    with Reader(store_path) as reader, pytest.raises(Refused):
        reader.verify()


@pytest.mark.parametrize("background", [False, True])
def test_a_session_that_goes_on_replaces_a_damaged_basis(store_path, background):
    cache = filled(ENOUGH)
    with open_pca(store_path) as store:
        store.save_session(cache, cache.tokens, name="chat")
    change(store_path, DAMAGE["a byte of the data"])
    damaged = rows(store_path)
    cache.compute([7] * 300)
    with open_pca(store_path) as store:
        saved = store.save_session(cache, cache.tokens, name="chat", background=background)
        saved = saved.result(60) if background else saved
        assert saved.n_fallback_blobs == 0
    assert rows(store_path) != damaged


def test_a_save_of_other_tokens_replaces_a_damaged_basis(store_path):
    cache, other = filled(ENOUGH), filled(ENOUGH, first=300)
    with open_pca(store_path) as store:
        store.save_session(cache, cache.tokens, name="chat")
    change(store_path, DAMAGE["a byte of the data"])
    with open_pca(store_path) as store:
        assert store.save_session(other, other.tokens, name="other").n_fallback_blobs == 0
        hit, target = loaded(store, other)
        assert hit.n_tokens == ENOUGH
        check_near(other, target, ENOUGH)
        hit, _ = loaded(store, cache)
        assert (hit.n_tokens, hit.reason) == (0, MissReason.CORRUPT)
        store.save_session(cache, cache.tokens, name="chat")
        assert store.verify().problems == ()
        hit, target = loaded(store, cache)
        assert hit.n_tokens == ENOUGH


def test_a_short_save_leaves_a_damaged_basis_and_is_exact(store_path):
    cache, short = filled(ENOUGH), filled(300, first=300)
    with open_pca(store_path) as store:
        store.save_session(cache, cache.tokens, name="chat")
    change(store_path, DAMAGE["cut short"])
    damaged = rows(store_path)
    with open_pca(store_path) as store:
        assert store.save_session(short, short.tokens, name="short").n_fallback_blobs == 4
        assert rows(store_path) == damaged
        hit, target = loaded(store, short)
        assert (hit.n_tokens, target.used()) == (300, short.used())


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE bases SET tensor = 99 WHERE tensor = 0", "there is no such tensor"),
        ("UPDATE bases SET tensor = 'x' WHERE tensor = 0", "there is no such tensor"),
        ("INSERT INTO bases SELECT 9, 1, 0, digest, data FROM bases LIMIT 1", "all is exact"),
        ("INSERT INTO bases SELECT 9, 2, 2, digest, data FROM bases LIMIT 1", "no lossy blobs"),
        ("UPDATE bases SET space_id = 99 WHERE tensor = 0", "missing row of spaces"),
    ],
)
def test_verify_and_the_second_reader_find_bases_that_must_not_be(store_path, statement, problem):
    one = Layout(
        tensors=(
            *layout(n_layers=1, capacity_n_tokens=2048, head_dim=8).tensors,
            *layout(n_layers=2, capacity_n_tokens=2048, dtype="int8").tensors[2:],
        )
    )
    cache = filled(ENOUGH, one=one)
    with kvstore.open(store_path, chunk_n_tokens=SIZE) as store:
        store.save_session(cache, cache.tokens[:10], name="exact")
    with open_pca(store_path) as store:
        store.save_session(cache, cache.tokens, name="chat")
        assert store.verify().ok
    with Reader(store_path) as reader:
        reader.verify()
    change(store_path, statement)
    with open_pca(store_path) as store:
        assert any(problem in one for one in store.verify().problems)
    with Reader(store_path) as reader, pytest.raises(Refused):
        reader.verify()


# ---------------------------------------------------------------- older files


@pytest.fixture
def version_2_path(store_path):
    """A closed file of format version 2, with a session ``turns`` of 100 tokens."""
    golden = ROOT / "tests" / "golden" / "v2.db.zst"
    store_path.write_bytes(zstandard.ZstdDecompressor().decompress(golden.read_bytes()))
    return store_path


def test_a_file_without_bases_gets_them_when_it_is_opened_for_writing(version_2_path, open_store):
    cache = filled(ENOUGH)
    with kvstore.open(version_2_path, read_only=True, codec="pca") as reader:
        assert reader.verify().ok
        assert reader.stats().bases_nbytes == 0
        assert reader.load_session(SmoothCache(ONE), cache.tokens).n_tokens == 0
    assert rows(version_2_path, "PRAGMA user_version") == [(2,)]
    store = open_store(chunk_n_tokens=SIZE, codec="pca")
    assert store.save_session(cache, cache.tokens, name="chat").n_fallback_blobs == 0
    assert rows(version_2_path, "PRAGMA user_version") == [(FORMAT_VERSION,)]
    hit, _ = loaded(store, cache)
    assert hit.n_tokens == ENOUGH


def test_who_reads_an_older_file_finds_bases_that_come_meanwhile(version_2_path, open_store):
    cache = filled(ENOUGH)
    reader = kvstore.open(version_2_path, read_only=True, chunk_n_tokens=SIZE, codec="pca")
    assert reader.verify().ok
    store = open_store(chunk_n_tokens=SIZE, codec="pca")
    store.save_session(cache, cache.tokens, name="chat")
    hit, target = loaded(reader, cache)
    assert hit.n_tokens == ENOUGH
    check_near(cache, target, ENOUGH)
    assert reader.verify().ok
    reader.close()
