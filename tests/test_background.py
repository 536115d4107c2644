"""Saves in the background: what was saved is what the cache held when the save was begun."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import kvstore
from kvstore import background
from kvstore import save as saving
from kvstore.db import eviction
from kvstore.errors import (
    CacheMismatchError,
    ClosedStoreError,
    DiskFullError,
    ForkedStoreError,
    InputError,
    MetadataError,
    ReadOnlyStoreError,
    SaveTimeoutError,
    SessionConflictError,
    SessionNotFoundError,
    StoreBusyError,
)
from tests.fakes import BytesCache, layout
from tests.kinds_oracle import LAYOUTS, TracedCache
from tests.oracle import assert_exact, big_layout, computed, load_exact, raw, save

TOKENS = list(range(100, 130))
OTHERS = list(range(300, 330))
SMALL = layout(n_layers=1, n_kv_heads=1, dtype="float16", capacity_n_tokens=128)


class Gate:
    """Saves in the background wait before they begin to write, while it is shut."""

    def __init__(self, save):
        self._save = save
        self._open = threading.Event()
        self._open.set()
        self.arrived = threading.Event()

    def __call__(self, *arguments):
        if threading.current_thread().name.startswith("kvstore-save"):
            self.arrived.set()
            assert self._open.wait(60)
        return self._save(*arguments)

    def shut(self):
        self._open.clear()

    def open(self):
        self._open.set()

    def open_soon(self):
        """While the test waits for what only goes on behind it."""
        threading.Timer(0.2, self._open.set).start()


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(saving.save)
    monkeypatch.setattr(saving, "save", gate)
    yield gate
    gate.open()


def content(path):
    """Every row of the file that says what is stored, but for times and row numbers."""
    with raw(path) as connection:
        return [
            connection.execute(query).fetchall()
            for query in (
                """SELECT c.key, c.start, c.stop, c.base_n_tokens, b.tensor, b.start, b.stop,
                b.codec, b.checksum, p.data FROM chunks c JOIN blobs b ON b.chunk_id = c.id
                JOIN payloads p ON p.id = b.payload_id ORDER BY c.key, b.tensor, b.start""",
                """SELECT s.name, s.n_tokens, s.metadata, c.key FROM sessions s
                JOIN chunks c ON c.id = s.head_id ORDER BY s.name""",
            )
        ]


def begin(store, cache, tokens=None, **options):
    return store.save_session(
        cache, cache.tokens if tokens is None else tokens, background=True, **options
    )


# ------------------------------------------------------------ what is saved


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("n_pending", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_file_is_as_if_every_save_had_been_in_the_foreground(
    open_store, tmp_path, gate, name, n_pending
):
    one, other = open_store(chunk_n_tokens=8), open_store(tmp_path / "b.db", chunk_n_tokens=8)
    cache = TracedCache(LAYOUTS[name])
    for turn in range(9):
        if turn % n_pending == 0:
            one.flush()
            gate.shut()
        cache.compute(range(turn, turn + 7))
        metadata = {"turn": turn}
        begin(one, cache, name="chat", metadata=metadata)
        other.save_session(cache, cache.tokens, name="chat", metadata=metadata)
        metadata["turn"] = "changed"
        if turn % n_pending == n_pending - 1:
            gate.open()
    one.flush()
    assert content(one.path) == content(other.path)
    restored, theirs = TracedCache(LAYOUTS[name]), TracedCache(LAYOUTS[name])
    n_tokens = one.load_session(restored, name="chat").n_tokens
    assert n_tokens == other.load_session(theirs, name="chat").n_tokens
    assert restored.wrong() == []


def test_the_caller_may_change_the_cache_at_once(store, gate):
    gate.shut()
    cache = computed(TOKENS)
    pending = begin(store, cache, name="chat")
    for memory in cache.memory:
        memory[:] = bytes(len(memory))
    cache.truncate(0)
    cache.compute(OTHERS)
    assert not pending.done()
    gate.open()
    assert pending.result().n_new_tokens == 30
    assert pending.done()
    assert pending.exception() is None
    assert load_exact(store, name="chat").n_tokens == 29


def test_only_the_tokens_given_are_saved(store):
    assert begin(store, computed(TOKENS), TOKENS[:11], name="a").result().n_tokens == 11
    assert store.sessions()[0].n_tokens == 11


def test_content_behind_an_edit_is_saved_with_the_edit(store, gate):
    gate.shut()
    cache = computed(TOKENS)
    cache.edit(13, "by hand")
    edits, memory = cache.edits, [bytes(one) for one in cache.memory]
    begin(store, cache, name="chat")
    cache.edit(2, "and again")
    gate.open()
    restored = BytesCache()
    hit = store.load_session(restored, name="chat")
    assert (hit.n_tokens, hit.edits) == (29, edits)
    assert restored.wrong() == []
    assert [bytes(one) for one in cache.memory] != memory
    assert load_exact(store, TOKENS[:14]).n_tokens == 13  # what lies before it, for everybody


def test_later_saves_share_the_copies_of_earlier_ones(open_store, gate):
    gate.shut()
    store = open_store(chunk_n_tokens=8)
    cache, token_nbytes = computed(TOKENS), layout().token_nbytes
    begin(store, cache, name="a")
    first = store.pending_nbytes
    assert 30 * token_nbytes < first < 31 * token_nbytes + 1000
    cache.compute([1, 2])
    begin(store, cache, name="a")
    assert store.pending_nbytes - first < 3 * token_nbytes + 1000
    cache.truncate(20)  # from there on it is another conversation
    cache.compute(OTHERS[:10])
    second = store.pending_nbytes
    begin(store, cache, name="b")
    assert 10 * token_nbytes <= store.pending_nbytes - second < 11 * token_nbytes + 1000
    gate.open()
    store.flush()
    assert store.pending_nbytes == 0
    assert load_exact(store, name="a").n_tokens == 31
    assert load_exact(store, name="b").n_tokens == 29


def test_a_save_that_shares_copies_does_not_need_the_earlier_one_to_do_well(
    open_store, gate, store_path
):
    store = open_store(chunk_n_tokens=8)
    gate.shut()
    cache = computed(TOKENS)
    first = begin(store, cache, name="taken")
    cache.compute([1, 2])
    second = begin(store, cache, name="free")
    with kvstore.open(store_path, chunk_n_tokens=8) as other:
        other.save_session(computed(OTHERS, weights="others"), OTHERS, name="taken")
    gate.open()
    assert isinstance(first.exception(), SessionConflictError)
    assert second.result().n_tokens == 32
    assert load_exact(store, name="free").n_tokens == 31


def test_a_snapshot_takes_what_is_new_and_not_what_is_in_the_file(open_store, gate):
    store = open_store(chunk_n_tokens=64)
    one = big_layout()
    cache = computed([number % 50 for number in range(1000)], one)
    store.save_session(cache, cache.tokens, name="chat")
    gate.shut()
    cache.compute([1, 2, 3])
    begin(store, cache, name="chat")
    # A chunk that is not full yet is copied whole, and the ids take 8 bytes each.
    assert store.pending_nbytes <= 64 * one.token_nbytes + 1003 * 8 + 100
    gate.open()
    assert load_exact(store, name="chat", cache=BytesCache(one)).n_tokens == 1002


# ------------------------------------------------------------------ the bound


def test_copies_never_take_more_than_the_bound(open_store, gate):
    nbytes = 40 * layout().token_nbytes
    store = open_store(chunk_n_tokens=8, max_pending_bytes=nbytes)
    gate.shut()
    first = begin(store, computed(TOKENS), name="a")
    assert 0 < store.pending_nbytes <= nbytes
    gate.open_soon()
    second = begin(store, computed(OTHERS), name="b")  # has room when the first is done
    assert first.done()
    assert store.pending_nbytes <= nbytes
    assert second.result().n_new_tokens == 30
    assert store.pending_nbytes == 0


def test_what_is_counted_is_what_is_held(open_store, gate):
    store = open_store(chunk_n_tokens=8)
    gate.shut()
    cache = computed(TOKENS, SMALL)
    for turn in range(6):
        begin(store, cache, name=f"{turn % 2}")
        cache.truncate(25 - turn)
        cache.compute([turn, turn, turn])
    queue = store._queue
    assert gate.arrived.wait(60)
    waiting = [queue._running, *queue._waiting]
    memory = {id(one.memory): one.memory for w in waiting for one in w.snapshot.copies}
    held = [weakref.ref(w.snapshot) for w in waiting]
    own_nbytes = sum(8 * len(w.request.ids) + len(w.request.metadata) for w in waiting)
    assert store.pending_nbytes == own_nbytes + sum(one.nbytes for one in memory.values())
    del waiting, memory
    gate.open()
    store.flush()
    gc.collect()
    assert [one() for one in held] == [None] * 6


@pytest.mark.parametrize("max_pending_bytes", [0, 1000])
def test_what_has_no_room_by_itself_is_saved_before_the_call_returns(open_store, max_pending_bytes):
    store = open_store(chunk_n_tokens=8, max_pending_bytes=max_pending_bytes)
    pending = begin(store, computed(TOKENS), name="a")
    assert pending.done()
    assert pending.result().n_new_tokens == 30
    assert load_exact(store, name="a").n_tokens == 29


def test_what_has_no_room_by_itself_waits_for_its_turn(open_store, gate):
    store = open_store(chunk_n_tokens=8, max_pending_bytes=20 * layout().token_nbytes)
    gate.shut()
    begin(store, computed(TOKENS[:10]), name="a")
    gate.open_soon()
    assert begin(store, computed(TOKENS), name="a").done()
    assert store.sessions()[0].n_tokens == 30


@pytest.mark.parametrize("max_pending_bytes", [0, 1000])
def test_what_is_saved_before_the_call_returns_is_waited_for_as_well(
    open_store, monkeypatch, max_pending_bytes
):
    store = open_store(chunk_n_tokens=8, max_pending_bytes=max_pending_bytes)
    is_begun, may_end, write = threading.Event(), threading.Event(), saving.save

    def late(*arguments):
        is_begun.set()
        assert may_end.wait(60)
        return write(*arguments)

    monkeypatch.setattr(saving, "save", late)
    with ThreadPoolExecutor(1) as threads:
        saved = threads.submit(begin, store, computed(TOKENS), name="a")
        assert is_begun.wait(60)
        with pytest.raises(SaveTimeoutError):
            store.flush(timeout=0.01)
        threading.Timer(0.2, may_end.set).start()
        assert [row.name for row in store.sessions()] == ["a"]
        assert saved.result().done()
    store.flush()


@pytest.mark.parametrize("size", [-1, "lots", 1.5, None])
def test_a_bound_that_is_none_is_refused(store_path, size):
    with pytest.raises(InputError):
        kvstore.open(store_path, max_pending_bytes=size)
    assert not store_path.exists()


# -------------------------------------------------------------------- waiting


def test_a_wait_that_takes_too_long_is_an_error_and_the_save_goes_on(store, gate):
    gate.shut()
    pending = begin(store, computed(TOKENS), name="a")
    for wait in (store.flush, pending.result, pending.exception, store.close):
        with pytest.raises(SaveTimeoutError, match="seconds"):
            wait(timeout=0)
        with pytest.raises(SaveTimeoutError):
            wait(0.01)
    gate.open()
    store.flush(timeout=60)
    assert pending.result(timeout=60).n_new_tokens == 30
    assert load_exact(store, name="a").n_tokens == 29
    store.close(timeout=60)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1"])
def test_what_is_no_time_to_wait_is_refused(store, timeout):
    pending = begin(store, computed(TOKENS), name="a")
    for wait in (store.flush, pending.result, pending.exception, store.close):
        with pytest.raises(InputError, match="timeout"):
            wait(timeout)
    store.flush(timeout=float("inf"))


READS = {
    "sessions": lambda store: store.sessions()[0].name == "a",
    "models": lambda store: len(store.models()) == 1,
    "stats": lambda store: store.stats().n_sessions == 1,
    "load by name": lambda store: load_exact(store, name="a").n_tokens == 29,
    "load by tokens": lambda store: load_exact(store, TOKENS).n_tokens == 29,
    "save": lambda store: save(store, TOKENS[:20], name="a").n_new_tokens == 0,
    "delete": lambda store: store.delete_session("a") is None,
    "prune": lambda store: store.prune(max_bytes=0).n_chunks > 0,
    "verify": lambda store: store.verify().ok,
    "close": lambda store: store.close() is None,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_every_other_call_sees_what_was_begun_before_it(store, gate, read):
    gate.shut()
    pending = begin(store, computed(TOKENS), name="a")
    gate.open_soon()
    assert read(store)
    assert pending.done()


def test_saves_of_one_name_follow_each_other_without_a_conflict(store, gate):
    gate.shut()
    cache = computed(TOKENS[:10])
    pending = []
    for token in TOKENS[10:]:
        cache.compute([token])
        pending.append(begin(store, cache, name="chat", metadata={"last": token}))
    gate.open()
    save(store, TOKENS, name="chat", metadata={"last": "here"})
    assert [one.result().n_tokens for one in pending] == list(range(11, 31))
    assert store.sessions()[0].metadata == {"last": "here"}


def test_closing_a_store_finishes_its_saves(store_path, gate):
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        gate.shut()
        pending = begin(store, computed(TOKENS), name="a")
        gate.open_soon()
    assert pending.result().n_new_tokens == 30
    with pytest.raises(ClosedStoreError):
        begin(store, computed(TOKENS), name="a")
    with pytest.raises(ClosedStoreError):
        store.flush()
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        assert load_exact(store, name="a").n_tokens == 29
        assert store.verify().ok


def test_threads_begin_saves_of_one_store_at_once(open_store):
    store = open_store(chunk_n_tokens=8, max_pending_bytes=60 * SMALL.token_nbytes)

    def work(number):
        cache = BytesCache(SMALL)
        for turn in range(10):
            cache.compute([*range(3), number, turn])
            begin(store, cache, name=f"{number}")
            assert store.pending_nbytes <= 60 * SMALL.token_nbytes
        return list(cache.tokens)

    with ThreadPoolExecutor(5) as threads:
        tokens = list(threads.map(work, range(5)))
    store.flush()
    for number in range(5):
        other = BytesCache(SMALL)
        assert load_exact(store, name=f"{number}", cache=other).n_tokens == 49
        assert_exact(other, tokens[number][:49])


# ------------------------------------------------------------------- failures


def test_what_is_wrong_with_a_call_is_raised_by_the_call(store, store_path):
    cache = computed(TOKENS)
    with pytest.raises(CacheMismatchError):
        begin(store, cache, OTHERS)
    with pytest.raises(MetadataError):
        begin(store, cache, metadata={"a": object()})
    with pytest.raises(InputError):
        begin(store, cache, name="")
    with (
        kvstore.open(store_path, read_only=True) as reader,
        pytest.raises(ReadOnlyStoreError),
    ):
        begin(reader, cache)
    assert store.pending_nbytes == 0
    store.flush()


class FullDisk:
    """No page more than there are, for the connections of one store."""

    def __init__(self, store):
        import sqlalchemy as sa

        self._is_full = False
        self._more = []
        sa.event.listen(store._database.engine, "checkout", self._limit)

    def _limit(self, connection, *_):
        (n_pages,) = connection.execute("PRAGMA page_count").fetchone()
        limit = n_pages if self._is_full else 2**31
        connection.execute(f"PRAGMA max_page_count = {limit}").fetchone()

    def fill(self):
        self._is_full = True

    def free(self):
        self._is_full = False


@pytest.fixture
def failing(open_store):
    """A store whose disk is full after one session ``a`` of 10 tokens."""
    store = open_store(chunk_n_tokens=64)
    save(store, TOKENS[:10], name="a", metadata={"n": 10})
    disk = FullDisk(store)
    disk.fill()
    yield store, disk
    disk.free()


LONG = [number % 120 for number in range(1500)]


def begin_too_much(store, name="a"):
    one = big_layout(n_kv_heads=4, head_dim=32)
    return begin(store, computed(LONG, one), name=name, replace=True)


def test_a_full_disk_is_told_by_the_save_and_leaves_the_former_session(failing):
    store, disk = failing
    pending = begin_too_much(store)
    with pytest.raises(DiskFullError, match="no room left"):
        pending.result()
    assert isinstance(pending.exception(), DiskFullError)
    store.flush()  # it was told
    assert store.pending_nbytes == 0
    assert [row.metadata for row in store.sessions()] == [{"n": 10}]
    load_exact(store, name="a")
    disk.free()
    assert begin_too_much(store).result().n_tokens == 1500
    assert store.verify().ok


def test_a_failure_that_nobody_asked_for_is_raised_by_flush_one_a_call(failing):
    store, _ = failing
    told, *_ = [begin_too_much(store, name) for name in ("a", "b", "c")]
    told.exception()
    store.sessions()  # other calls do not mind
    for _ in range(2):
        with pytest.raises(DiskFullError):
            store.flush()
    store.flush()


def test_a_failure_that_nobody_asked_for_is_raised_by_close_which_closes(failing):
    store, _ = failing
    for name in ("a", "b", "c"):
        begin_too_much(store, name)
    with pytest.raises(DiskFullError) as caught:
        store.close()
    assert [note[:35] for note in caught.value.__notes__] == [
        "and another save in the background "
    ] * 2
    with pytest.raises(ClosedStoreError):
        store.sessions()
    store.close()


def test_the_error_of_a_with_block_stays_the_error_and_has_the_failure_as_a_note(failing):
    store, _ = failing

    def use():
        with store:
            begin_too_much(store)
            raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        use()
    assert "no room left" in caught.value.__notes__[0]
    with pytest.raises(ClosedStoreError):
        store.sessions()


def test_a_store_that_goes_without_being_closed_warns_of_its_failures(store_path):
    store = kvstore.open(store_path, chunk_n_tokens=64)
    disk = FullDisk(store)
    disk.fill()
    begin_too_much(store)
    store.sessions()
    disk.free()
    store._database.engine.dispose()
    del disk
    alive = [store]
    del store

    def forget():
        alive.clear()
        gc.collect()

    with pytest.warns(RuntimeWarning, match="DiskFullError"):
        forget()
    with kvstore.open(store_path) as store:
        assert store.verify().ok


def test_a_failure_that_is_not_ours_keeps_the_text_of_its_traceback(store, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(saving, "save", broken)
    pending = begin(store, computed(TOKENS), name="a")
    with pytest.raises(ZeroDivisionError) as caught:
        pending.result()
    assert "in broken" in caught.value.__notes__[0]


@pytest.mark.parametrize("in_background", [True, False])
def test_where_no_thread_can_be_started_work_is_done_once(store, monkeypatch, in_background):
    start, encode, done = threading.Thread.start, saving._encode_part, []

    def refuse(thread):
        if thread.name.startswith("kvstore"):
            raise RuntimeError("can't start new thread")
        start(thread)

    def counted(request, write, part, basis):
        done.append((write.key, part))
        return encode(request, write, part, basis)

    monkeypatch.setattr(saving, "_encode_part", counted)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        store.save_session(computed(TOKENS), TOKENS, name="a", background=in_background)
        store.flush()
    assert begin(store, computed(OTHERS), name="b").result(60).n_new_tokens == 30
    store.close()  # waits for all that the threads have to do
    assert len(done) == len(set(done)) > 0


@pytest.mark.parametrize("told_by", ["result", "flush"])
def test_a_failure_that_was_told_does_not_hold_who_asked_for_it(store, monkeypatch, told_by):
    def refused(*_):
        raise DiskFullError("no room left")

    def ask(pending):
        cache = BytesCache(SMALL)  # as the caller's, in a frame that the error is raised through
        with pytest.raises(DiskFullError, match="no room left"):
            pending.result() if told_by == "result" else store.flush()
        return weakref.ref(cache)

    monkeypatch.setattr(saving, "save", refused)
    pending = begin(store, computed(TOKENS), name="a")
    caches = [ask(pending) for _ in range(3 if told_by == "result" else 1)]
    gc.collect()
    assert [cache() for cache in caches] == [None] * len(caches)
    assert pending.exception().__traceback__ is None


def test_the_error_of_a_with_block_stays_the_error_whatever_the_failure_is(store_path, monkeypatch):
    def broken(*_):
        raise MemoryError("not enough")

    def use():
        with kvstore.open(store_path) as store:
            monkeypatch.setattr(saving, "save", broken)
            begin(store, computed(TOKENS), name="a")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        use()
    assert "MemoryError: not enough" in caught.value.__notes__[0]


def test_an_interrupted_snapshot_leaves_nothing_behind(store):
    class Interrupted(BytesCache):
        reads = 0

        def buffer(self, index):
            self.reads += 1
            if self.reads == 3:
                raise KeyboardInterrupt
            return super().buffer(index)

    cache = Interrupted()
    cache.compute(TOKENS)
    with pytest.raises(KeyboardInterrupt):
        begin(store, cache, name="a")
    assert store.pending_nbytes == 0
    assert store.sessions() == []
    assert begin(store, cache, name="a").result().n_new_tokens == 30


@pytest.mark.parametrize("max_pending_bytes", ["1 MiB", 40 * layout().token_nbytes])
def test_a_save_whose_beginning_was_interrupted_holds_nobody_up(
    open_store, monkeypatch, max_pending_bytes
):
    """Where the snapshot was taken already, it is saved."""
    store = open_store(chunk_n_tokens=8, max_pending_bytes=max_pending_bytes)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store._queue._thread, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            begin(store, computed(TOKENS), name="a")
    assert begin(store, computed(OTHERS), name="b").result(60).n_tokens == 30
    assert {row.name for row in store.sessions()} == {"a", "b"}
    assert store.pending_nbytes == 0


def test_an_interrupted_close_can_be_tried_again(store, gate, monkeypatch):
    gate.shut()
    begin(store, computed(TOKENS), name="a")
    with monkeypatch.context() as patch:
        patch.setattr(store._queue, "wait", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.close()
    gate.open()
    assert load_exact(store, name="a").n_tokens == 29
    store.close()


# ------------------------------------------------------------ other processes


def test_a_name_that_another_process_saved_meanwhile_is_not_written_over(open_store, gate):
    store, other = open_store(chunk_n_tokens=8), open_store(chunk_n_tokens=8)
    save(store, TOKENS[:5], name="a")
    gate.shut()
    pending = begin(store, computed(TOKENS), name="a")
    second = begin(store, computed(TOKENS), name="a", replace=True)
    save(other, OTHERS, name="a", replace=True)
    gate.open()
    with pytest.raises(SessionConflictError):
        pending.result()
    assert second.result().n_tokens == 30


def test_what_another_process_deletes_meanwhile_makes_the_save_fail_and_never_wrong(
    open_store, gate
):
    store, other = open_store(chunk_n_tokens=8), open_store(chunk_n_tokens=8)
    save(store, TOKENS[:20], name="base")
    gate.shut()
    cache = computed(TOKENS)
    pending = begin(store, cache, name="a")
    other.delete_session("base")
    gate.open()
    with pytest.raises(StoreBusyError, match="save again"):
        pending.result()
    with pytest.raises(SessionNotFoundError):
        store.load_session(BytesCache(), name="a")
    assert begin(store, cache, name="a").result().n_tokens == 30
    assert load_exact(store, name="a").n_tokens == 29


def test_what_another_process_adds_meanwhile_is_not_written_again(open_store, gate):
    store, other = open_store(chunk_n_tokens=8), open_store(chunk_n_tokens=8)
    gate.shut()
    pending = begin(store, computed(TOKENS), name="a")
    save(other, TOKENS, name="b")
    gate.open()
    assert pending.result().raw_nbytes == 0
    assert load_exact(store, name="a").n_tokens == 29


@pytest.mark.parametrize("max_bytes", [None, "10 MB"])
def test_a_save_keeps_what_a_later_one_is_going_to_build_on(open_store, gate, max_bytes):
    """Publishing ``a`` anew lets go of its former chunks; ``b`` found them in the file."""
    store = open_store(chunk_n_tokens=8, max_bytes=max_bytes)
    save(store, TOKENS, name="a")
    gate.shut()
    first = begin(store, computed(OTHERS), name="a")
    second = begin(store, computed([*TOKENS, 1]), name="b")
    assert store.pending_nbytes < (30 + 8 + 8) * layout().token_nbytes
    gate.open()
    assert first.result().n_new_tokens == 30
    assert second.result().n_tokens == 31
    assert load_exact(store, name="a").n_tokens == 29
    assert load_exact(store, name="b").n_tokens == 30


@pytest.mark.parametrize("deleter", ["background", "another thread"])
@pytest.mark.parametrize("max_bytes", [None, "10 MB"])
def test_a_save_that_is_begun_while_another_deletes_does_not_build_on_what_goes(
    open_store, monkeypatch, deleter, max_bytes
):
    store = open_store(chunk_n_tokens=8, max_bytes=max_bytes)
    cache = computed(TOKENS)
    save(store, TOKENS[:26], name="chat")
    deletes, is_begun, release = threading.Event(), threading.Event(), eviction.release

    def late(*arguments, **options):
        deletes.set()
        is_begun.wait(0.5)  # it is not before this one is in the file: then it waits in vain
        release(*arguments, **options)

    monkeypatch.setattr(eviction, "release", late)
    with ThreadPoolExecutor(1) as threads:
        if deleter == "background":
            first = begin(store, cache, TOKENS[:3], name="chat")
        else:
            first = threads.submit(store.save_session, computed(TOKENS), TOKENS[:3], name="chat")
        assert deletes.wait(60)
        second = begin(store, cache, name="chat", replace=True)
        is_begun.set()
        assert first.result().n_tokens == 3
    assert second.result().n_tokens == 30
    assert load_exact(store, name="chat").n_tokens == 29


def test_what_a_save_builds_on_is_kept_while_its_snapshot_is_taken(store, gate, monkeypatch):
    cache = computed(TOKENS)
    save(store, TOKENS[:26], name="chat")
    take = background.take

    def late(*arguments):
        gate.open()
        assert first.result(60).n_tokens == 3
        return take(*arguments)

    gate.shut()
    first = begin(store, cache, TOKENS[:3], name="chat")
    monkeypatch.setattr(background, "take", late)
    assert begin(store, cache, name="chat").result(60).n_tokens == 30
    assert load_exact(store, name="chat").n_tokens == 29


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_save_that_was_begun_before_fork_is_the_parents(store, gate):
    gate.shut()
    pending = begin(store, computed(TOKENS), name="a")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            refused = 0
            for use in (pending.result, pending.done, pending.exception, store.flush):
                try:
                    use()
                except ForkedStoreError:
                    refused += 1
            store.close()
            code = 0 if refused == 4 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    gate.open()
    assert pending.result().n_new_tokens == 30


# -------------------------------------------------------- any order of anything


class BackgroundMachine(RuleBasedStateMachine):
    """Two stores that are told the same, one of them in the background."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.gate = Gate(saving.save)
        self.patch = mock.patch.object(saving, "save", self.gate)
        self.patch.start()

    @initialize(
        name=st.sampled_from(sorted(LAYOUTS)),
        chunk_n_tokens=st.sampled_from([4, 8, 32]),
        n_pending_tokens=st.sampled_from([0, 20, 10_000]),
    )
    def open(self, name, chunk_n_tokens, n_pending_tokens):
        self.layout = LAYOUTS[name]
        options = {"chunk_n_tokens": chunk_n_tokens, "checkpoint_n_tokens": 1}
        self.bound = n_pending_tokens * max(1, self.layout.token_nbytes)
        folder = Path(self.folder.name)
        self.one = kvstore.open(folder / "a.db", max_pending_bytes=self.bound, **options)
        self.other = kvstore.open(folder / "b.db", **options)
        self.caches = [TracedCache(self.layout), TracedCache(self.layout)]
        self.sessions: dict[str, tuple[list[int], int]] = {}
        self.n_saves = 0
        self.has_more = False  # a chunk was kept that the other store let go of

    def teardown(self):
        self.gate.open()
        if hasattr(self, "one"):
            self.one.close()
            self.other.close()
            for path in (self.one.path, self.other.path):
                with kvstore.open(path, read_only=True) as store:
                    assert store.verify().problems == ()
        self.patch.stop()
        self.folder.cleanup()

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def compute(self, tokens):
        for cache in self.caches:
            cache.compute(tokens[: 48 - len(cache.tokens)])

    @rule(data=st.data())
    def rewind(self, data):
        n_tokens = data.draw(st.integers(0, len(self.caches[0].tokens)))
        if not all(cache.can_truncate(n_tokens) for cache in self.caches):
            n_tokens = 0
        for cache in self.caches:
            cache.truncate(n_tokens)

    @precondition(lambda self: len(self.caches[0].tokens) > 2)
    @rule(data=st.data())
    def edit(self, data):
        start = data.draw(st.integers(1, len(self.caches[0].tokens) - 1))
        self.n_saves += 1
        for cache in self.caches:
            cache.edit(start, f"edit {self.n_saves}")

    @precondition(lambda self: len(self.caches[0].tokens))
    @rule(
        name=st.none() | st.sampled_from("abc"),
        n_left_out=st.just(0) | st.integers(0, 10),
        background=st.sampled_from([True, True, True, False]),
        is_shut=st.booleans(),
    )
    def save(self, name, n_left_out, background, is_shut):
        tokens = list(self.caches[0].tokens)
        tokens = tokens[: max(1, len(tokens) - n_left_out)]
        self.n_saves += 1
        options = {"name": name, "metadata": {"n": self.n_saves}, "background": background}
        # With a narrow bound it waits for those before it.
        self.gate.shut() if background and is_shut and self.bound > 10**5 else self.gate.open()
        self.one.save_session(self.caches[0], tokens, **options)
        assert self.one.pending_nbytes <= self.bound
        self.other.save_session(self.caches[1], tokens, name=name, metadata={"n": self.n_saves})
        if name is not None:
            self.sessions[name] = (tokens, self.n_saves)

    @rule()
    def let_go(self):
        self.gate.open()

    @rule()
    def flush(self):
        self.gate.open()
        self.one.flush()
        assert self.one.pending_nbytes == 0

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), by_name=st.booleans())
    def load(self, data, by_name):
        name = data.draw(st.sampled_from(sorted(self.sessions)))
        tokens, n = self.sessions[name]
        self.gate.open()
        wanted = {"name": name} if by_name else {"tokens": tokens}
        hit = self.one.load_session(self.caches[0], **wanted)
        theirs = self.other.load_session(self.caches[1], **wanted)
        assert self.caches[0].wrong() == []
        if by_name:
            assert (list(hit.tokens), hit.metadata) == (tokens, {"n": n})
        self.has_more = self.has_more or hit.n_tokens > theirs.n_tokens
        if not self.has_more:
            assert hit.n_tokens == theirs.n_tokens
            assert hit.edits == theirs.edits
        if list(self.caches[0].tokens) != list(self.caches[1].tokens):
            self.caches = [TracedCache(self.layout), TracedCache(self.layout)]

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.sessions)))
        del self.sessions[name]
        self.gate.open()
        self.one.delete_session(name)
        self.other.delete_session(name)

    @rule()
    def look(self):
        self.gate.open()
        assert self.one.verify().problems == ()
        rows = {row.name: (row.n_tokens, row.metadata["n"]) for row in self.one.sessions()}
        assert rows == {name: (len(ids), n) for name, (ids, n) in self.sessions.items()}
        for row, theirs in zip(
            sorted(self.one.sessions(), key=lambda row: row.name),
            sorted(self.other.sessions(), key=lambda row: row.name),
            strict=True,
        ):
            assert row.n_stored_tokens == theirs.n_stored_tokens == row.n_tokens


TestBackgroundMachine = BackgroundMachine.TestCase
TestBackgroundMachine.settings = settings(
    max_examples=max(8, settings().max_examples // 3), stateful_step_count=25, deadline=None
)


# ------------------------------------------------------------- how it may end

SAVE_AND_END = """
import sys
import kvstore
from tests.fakes import BytesCache

store = kvstore.open(sys.argv[1], chunk_n_tokens=8)
cache = BytesCache()
cache.compute(range(100))
store.save_session(cache, range(5), name="first")
for stop in (20, 60, 100):
    pending = store.save_session(cache, range(stop), name="chat", background=True)
"""


@pytest.mark.parametrize(
    "end",
    [
        "",
        *(
            pytest.param(end, marks=pytest.mark.slow)
            for end in ("sys.exit(0)", "del store, pending", "store.close()")
        ),
    ],
)
def test_a_process_that_ends_finishes_its_saves_first(open_store, store_path, run_source, end):
    run_source(SAVE_AND_END + end, store_path)
    store = open_store(chunk_n_tokens=8)
    assert load_exact(store, name="chat").n_tokens == 99


BEGIN_WHILE_IT_ENDS = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
import kvstore
from kvstore import save as saving
from tests.fakes import BytesCache

save, said = saving.save, []
is_ending, is_overtaken = threading.Event(), threading.Event()

def slow(database, request, workers):
    said.append(f"begin {len(request.ids)}")
    if len(request.ids) == 16:
        is_ending.wait(60)
        is_overtaken.wait(0.5)
    else:
        is_overtaken.set()
    saved = save(database, request, workers)
    said.append(f"end {len(request.ids)}")
    return saved

def chat():
    while True:  # until the interpreter starts no more threads
        try:
            with ThreadPoolExecutor(1) as threads:
                threads.submit(int)
        except RuntimeError:
            break
    is_ending.set()
    store.save_session(cache, range(32), name="chat", background=True)
    store.flush()
    print(*said, sep=", ", flush=True)

store = kvstore.open(sys.argv[1], chunk_n_tokens=8)
cache = BytesCache()
cache.compute(range(32))
saving.save = slow
threading.Thread(target=chat).start()
store.save_session(cache, range(16), name="chat", background=True)
"""


def test_saves_are_written_in_order_also_where_no_thread_is_started_any_more(
    open_store, store_path, run_source
):
    assert run_source(BEGIN_WHILE_IT_ENDS, store_path) == "begin 16, end 16, begin 32, end 32\n"
    store = open_store(chunk_n_tokens=8)
    assert store.sessions()[0].n_tokens == 32
    assert load_exact(store, name="chat").n_tokens == 31


def test_a_process_that_ends_says_what_it_could_not_save(store_path, run_source):
    """Its warning is printed when the interpreter ends; ``atexit`` goes backwards."""
    listening = """
import atexit, io, sys, warnings
errors = sys.stderr = io.StringIO()
warnings.resetwarnings()
atexit.register(lambda: print(errors.getvalue()))
"""
    refusing = """
import sqlalchemy as sa
refuse = lambda connection, *_: connection.execute("PRAGMA query_only = ON")
sa.event.listen(store._database.engine, "checkout", refuse)
"""
    said = run_source(
        listening + SAVE_AND_END.replace("for stop", refusing + "for stop"), store_path
    )
    assert "ReadOnlyStoreError" in said
    assert "nobody asked" in said
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        assert [row.name for row in store.sessions()] == ["first"]
        assert store.verify().ok
