"""Several processes and threads on one file."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import kvstore
from kvstore.errors import ClosedStoreError, StoreBusyError
from tests.conftest import start_python
from tests.fakes import BytesCache, layout
from tests.oracle import assert_exact, computed, load_exact, raw, save

SMALL = layout(n_layers=1, n_kv_heads=1, dtype="float16", capacity_n_tokens=128)
TOKENS = list(range(100, 130))

WORKER = """
import random, sys
import kvstore
from kvstore.errors import SessionConflictError, SessionNotFoundError
from tests.fakes import BytesCache, layout
from tests.oracle import assert_exact

path, seed, n_rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
choose = random.Random(seed)
one = layout(n_layers=1, n_kv_heads=1, dtype="float16", capacity_n_tokens=128)
with kvstore.open(path, chunk_n_tokens=8) as store:
    for turn in range(n_rounds):
        shared = choose.randrange(3)
        tokens = [shared, *range(choose.randrange(40)), shared, *range(choose.randrange(20))]
        cache = BytesCache(one)
        action = choose.random()
        if action < 0.5:
            cache.compute(tokens)
            name = choose.choice([None, f"own-{seed}", f"shared-{choose.randrange(3)}"])
            try:
                store.save_session(cache, tokens, name=name, replace=choose.random() < 0.5)
            except SessionConflictError:
                assert name.startswith("shared-")
        elif action < 0.8:
            result = store.load_session(cache, tokens)
            assert_exact(cache, tokens[: result.n_tokens])
        elif action < 0.9:
            try:
                store.delete_session(f"shared-{choose.randrange(3)}")
            except SessionNotFoundError:
                pass
        elif action < 0.95:
            store.prune(max_bytes=choose.randrange(2) * 450_000)
        else:
            assert store.verify().problems == ()
print("done")
"""


def finish(processes):
    try:
        for process in processes:
            output, errors = process.communicate(timeout=200)
            assert (process.returncode, output) == (0, "done\n"), errors
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("n_processes", "n_rounds"), [(2, 20), pytest.param(4, 250, marks=pytest.mark.slow)]
)
def test_processes_save_load_delete_and_prune_the_same_file_at_once(
    open_store, store_path, n_processes, n_rounds
):
    # Nobody has made the file yet: they also create it at once.
    finish([start_python(WORKER, store_path, seed, n_rounds) for seed in range(n_processes)])
    store = open_store(chunk_n_tokens=8)
    assert store.verify().problems == ()
    for session in store.sessions():
        load_exact(store, name=session.name, cache=BytesCache(SMALL))


def test_processes_that_save_the_same_tokens_store_them_once(open_store, store_path):
    source = (
        "import sys, kvstore\n"
        "from tests.fakes import BytesCache\n"
        "cache = BytesCache()\n"
        "cache.compute(range(60))\n"
        "with kvstore.open(sys.argv[1], chunk_n_tokens=8) as store:\n"
        "    store.save_session(cache, cache.tokens, name=sys.argv[2])\n"
        "print('done')\n"
    )
    finish([start_python(source, store_path, number) for number in range(2)])
    store = open_store(chunk_n_tokens=8)
    assert len(store.sessions()) == 2
    assert store.stats().raw_nbytes == 60 * layout().token_nbytes
    assert load_exact(store, name="1").n_tokens == 59


def test_threads_share_one_store(store):
    def work(number):
        for turn in range(12):
            tokens = [*range(10), *range(number, number + turn)]
            cache = computed(tokens, SMALL)
            store.save_session(cache, tokens, name=str(number))
            other = BytesCache(SMALL)
            assert load_exact(store, tokens, cache=other).n_tokens == len(tokens) - 1
            if turn % 5 == 4:
                store.delete_session(str(number))
        return True

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(work, range(6)))
    assert len(store.sessions()) == 6


def test_more_threads_than_connections_wait_for_their_turn(store):
    save(store, TOKENS, name="a")
    with ThreadPoolExecutor(40) as threads:
        results = list(threads.map(lambda _: load_exact(store, name="a").n_tokens, range(80)))
    assert set(results) == {29}


def test_two_stores_on_one_path_in_one_process_see_each_other(open_store):
    one, two = open_store(chunk_n_tokens=8), open_store(chunk_n_tokens=8)
    save(one, TOKENS, name="a")
    assert load_exact(two, name="a").n_tokens == 29
    assert save(two, TOKENS, name="b").n_new_tokens == 0
    one.close()  # closing a second descriptor must not drop the other's locks
    save(two, [1, 2, 3], name="c")
    with kvstore.open(two.path, chunk_n_tokens=8) as three:
        assert {row.name for row in three.sessions()} == {"a", "b", "c"}


def test_readers_are_not_blocked_by_a_writer(store):
    save(store, TOKENS, name="a")
    with raw(store.path) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE sessions SET n_tokens = n_tokens")
        began = time.monotonic()
        assert load_exact(store, name="a").n_tokens == 29
        assert [row.name for row in store.sessions()] == ["a"]
        assert store.verify().ok
        assert kvstore.open(store.path, read_only=True).stats().n_sessions == 1
        assert time.monotonic() - began < 5
        writer.execute("ROLLBACK")


def test_a_writer_that_does_not_finish_in_time_is_an_error(open_store):
    store = open_store(chunk_n_tokens=8, busy_timeout_seconds=0.1)
    save(store, TOKENS, name="a")
    with raw(store.path) as writer:
        writer.execute("BEGIN IMMEDIATE")
        for use in (
            lambda: save(store, [1, 2, 3], name="b"),
            lambda: store.delete_session("a"),
            lambda: store.prune(max_bytes=0),
        ):
            with pytest.raises(StoreBusyError, match="did not finish in time"):
                use()
        writer.execute("ROLLBACK")
    save(store, [1, 2, 3], name="b")


def test_closing_never_waits_long_for_a_writer(open_store):
    store = open_store(chunk_n_tokens=8, busy_timeout_seconds=0.1)
    save(store, TOKENS, name="a")
    load_exact(store, name="a")  # leaves a mark to write
    with raw(store.path) as writer:
        writer.execute("BEGIN IMMEDIATE")
        store.close()
        writer.execute("ROLLBACK")


def test_a_delete_is_not_held_up_by_a_reader(open_store):
    store = open_store(chunk_n_tokens=8)
    save(store, TOKENS, name="a")
    with raw(store.path) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM chunks").fetchone()
        began = time.monotonic()
        store.delete_session("a")
        assert time.monotonic() - began < 5
        assert store.sessions() == []


def test_a_load_that_began_before_a_delete_still_restores_everything(open_store):
    store, other = open_store(chunk_n_tokens=8), open_store(chunk_n_tokens=8)
    save(store, TOKENS, name="a")

    class Slow(BytesCache):
        is_first = True

        def truncate(self, n_tokens):
            super().truncate(n_tokens)
            if self.is_first:
                self.is_first = False
                other.prune(max_bytes=0)
                other.delete_session("a")

    cache = Slow()
    result = store.load_session(cache, name="a")
    assert (result.n_tokens, result.reason) == (29, None)
    assert_exact(cache, TOKENS[:29])
    assert store.sessions() == []


def test_a_prune_between_the_transactions_of_a_save_takes_nothing_of_it(open_store):
    """A save holds what it has written by a lease until the session is published."""
    store, other = open_store(chunk_n_tokens=2), open_store(chunk_n_tokens=2)
    tokens = range(100)
    pruned = []

    class Pruning(BytesCache):
        def buffer(self, index):
            # While a later batch is encoded, what is in the file may not go.
            if other.stats().n_chunks:
                pruned.append(other.prune(max_bytes=0).n_chunks)
            return super().buffer(index)

    cache = Pruning(SMALL)
    cache.compute(tokens)
    store.save_session(cache, tokens, name="a")
    assert pruned
    assert sum(pruned) == 0
    assert load_exact(store, name="a", cache=BytesCache(SMALL)).n_tokens == 99


def test_a_save_whose_base_was_deleted_meanwhile_plans_again(open_store):
    store, other = open_store(chunk_n_tokens=64), open_store(chunk_n_tokens=64)
    save(store, range(40), name="base")

    class Deleting(BytesCache):
        is_first = True

        def buffer(self, index):
            if self.is_first:
                self.is_first = False
                other.delete_session("base")
            return super().buffer(index)

    cache = Deleting()
    cache.compute([*range(40), *range(500, 520)])
    result = store.save_session(cache, cache.tokens, name="a")
    assert result.n_new_tokens == 60
    assert load_exact(store, name="a").n_tokens == 59


def test_using_a_store_while_another_thread_closes_it_is_an_error_of_ours(store_path):
    for number in range(6):
        store = kvstore.open(store_path, chunk_n_tokens=8)
        save(store, TOKENS, name="a")
        problems = []
        started = threading.Event()

        def work(store=store, problems=problems, started=started):
            cache = BytesCache()
            while True:
                try:
                    cache.truncate(0)
                    store.load_session(cache, TOKENS)
                except ClosedStoreError:
                    return
                except Exception as error:  # noqa: BLE001  # any other is the failure
                    problems.append(error)
                    return
                finally:
                    started.set()

        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        time.sleep(0.002 * number)
        store.close()
        thread.join(20)
        assert not thread.is_alive()
        assert problems == []
