"""How a load's bytes get in place: several threads, each on a connection of its own."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

import kvstore
from kvstore import MissReason, restore
from kvstore.codec import scratch
from kvstore.db import engine as db
from kvstore.db import native
from kvstore.db.readers import Readers
from kvstore.errors import CorruptStoreError, InputError
from tests.fakes import BytesCache, layout
from tests.oracle import assert_exact, computed, load_exact, raw, save

TOKENS = list(range(100, 130))
HELPERS_RESTORE = pytest.mark.usefixtures("eager_helpers")


@pytest.fixture
def eager_helpers(monkeypatch):
    """Let helpers work on loads that are too small to be worth it."""
    monkeypatch.setattr(restore, "_NBYTES_A_HELPER", 1)


@pytest.fixture
def after_helpers(monkeypatch):
    """Let the caller's own thread wait until a helper is done; counts what helpers gave back."""
    done, given_back = threading.Event(), []
    help_, read = restore.Restore._help, restore.read_blob

    def helped(self, readers):
        try:
            help_(self, readers)
        finally:
            if threading.current_thread() is not threading.main_thread():
                given_back.extend(self._given_back)
                done.set()

    def waiting(*arguments):
        if threading.current_thread() is threading.main_thread():
            assert done.wait(60)
        read(*arguments)

    monkeypatch.setattr(restore.Restore, "_help", helped)
    monkeypatch.setattr(restore, "read_blob", waiting)
    return given_back


class Disturbed(BytesCache):
    """Lets ``meanwhile`` happen once, when a load has made its plan and read nothing yet."""

    meanwhile = None

    def truncate(self, n_tokens):
        super().truncate(n_tokens)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()


@HELPERS_RESTORE
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("head_major", [False, True])
def test_any_number_of_threads_restores_the_same_bytes(open_store, head_major, n_threads, mmap):
    store = open_store(chunk_n_tokens=8, n_threads=n_threads, mmap=mmap)
    one = layout(head_major=head_major, dtype="bfloat16")
    store.save_session(computed(TOKENS, one), TOKENS, name="chat")
    for length in (2, 9, 17, 30):
        result = load_exact(store, TOKENS[:length], cache=BytesCache(one))
        assert (result.n_tokens, result.reason) == (length - 1, None)


@HELPERS_RESTORE
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("saved_meanwhile", [0, 30, 60])
def test_what_a_prune_took_meanwhile_is_read_where_it_still_is(
    open_store, after_helpers, saved_meanwhile, mmap
):
    """The helpers see the file as it is now: without the rows, or with others of their numbers."""
    store = open_store(chunk_n_tokens=8, n_threads=2, mmap=mmap)
    other = open_store(chunk_n_tokens=8)
    save(store, TOKENS, name="chat")
    cache = Disturbed()

    def meanwhile():
        other.prune(max_bytes=0)
        other.delete_session("chat")
        if saved_meanwhile:
            save(other, range(1000, 1000 + saved_meanwhile))

    cache.meanwhile = meanwhile
    result = store.load_session(cache, TOKENS)
    assert (result.n_tokens, result.reason) == (29, None)
    assert_exact(cache, TOKENS[:29])
    assert len(after_helpers) == 1


@HELPERS_RESTORE
def test_a_vacuum_meanwhile_moves_nothing_out_of_reach(open_store, after_helpers):
    store = open_store(chunk_n_tokens=8, n_threads=2)
    save(store, range(500, 560))
    save(store, TOKENS, name="chat")
    cache = Disturbed()

    def meanwhile():
        with raw(store.path) as driver:
            driver.execute("VACUUM")

    cache.meanwhile = meanwhile
    assert store.load_session(cache, TOKENS).n_tokens == 29
    assert_exact(cache, TOKENS[:29])


@HELPERS_RESTORE
def test_without_a_connection_for_a_helper_the_load_goes_on(open_store, after_helpers, monkeypatch):
    store = open_store(chunk_n_tokens=8, n_threads=3)
    save(store, TOKENS, name="chat")

    @contextmanager
    def none_left():
        raise sqlite3.OperationalError("unable to open database file")
        yield

    monkeypatch.setattr(store._database.readers, "lend", none_left)
    assert load_exact(store, TOKENS).n_tokens == 29


@HELPERS_RESTORE
@pytest.mark.parametrize("n_threads", [1, 4])
def test_whoever_meets_a_damaged_row_what_lies_before_it_is_restored(store_path, n_threads):
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        save(store, TOKENS, name="chat")
    with raw(store_path) as driver:
        ids = [row[0] for row in driver.execute("SELECT id FROM payloads ORDER BY id")]
    per_chunk = len(BytesCache().layout.tensors)
    read = "SELECT data FROM payloads WHERE id = ?"
    write = "UPDATE payloads SET data = ? WHERE id = ?"
    for number, payload_id in enumerate(ids):
        with raw(store_path) as driver:
            (data,) = driver.execute(read, (payload_id,)).fetchone()
            driver.execute(write, (bytes([*data[:-1], data[-1] ^ 1]), payload_id))
        with kvstore.open(store_path, chunk_n_tokens=8, n_threads=n_threads) as store:
            result = load_exact(store, TOKENS)
        assert result.reason is MissReason.CORRUPT
        assert result.n_tokens == number // per_chunk * 8
        with raw(store_path) as driver:
            driver.execute(write, (data, payload_id))


def test_what_is_not_one_run_of_memory_passes_through_one_scratch(open_store, monkeypatch):
    store = open_store(chunk_n_tokens=8, n_threads=1)
    one = layout(head_major=True)
    store.save_session(computed(TOKENS, one), TOKENS, name="chat")
    rooms = []

    def seen(use, nbytes):
        view = scratch(use, nbytes)
        rooms.append(view.obj)
        return view

    monkeypatch.setattr(restore, "scratch", seen)
    assert load_exact(store, TOKENS, cache=BytesCache(one)).n_tokens == 29
    assert len(rooms) == 4 * len(one.tensors)
    assert len({id(room) for room in rooms}) <= 2  # it grew at most once


def test_what_is_one_run_of_memory_needs_no_scratch(store, monkeypatch):
    save(store, TOKENS, name="chat")
    monkeypatch.setattr(restore, "scratch", None)
    assert load_exact(store, TOKENS[:25]).n_tokens == 24


@HELPERS_RESTORE
def test_a_store_that_only_reads_has_helpers_too_and_leaves_no_files(store_path, after_helpers):
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        save(store, TOKENS, name="chat")
    with kvstore.open(store_path, chunk_n_tokens=8, read_only=True, n_threads=2) as store:
        assert load_exact(store, TOKENS).n_tokens == 29
        assert 1 <= len(store._database.readers._idle) <= 2
    assert [path.name for path in store_path.parent.iterdir()] == [store_path.name]


@pytest.mark.parametrize(("mmap", "expected"), [(False, 0), (True, db.MAX_MMAP_NBYTES)])
def test_the_file_is_mapped_only_if_asked_for_and_never_while_it_is_verified(
    open_store, mmap, expected, monkeypatch
):
    store = open_store(mmap=mmap)
    save(store, TOKENS, name="chat")
    readers = store._database.readers
    driver = readers._connect()
    assert driver.execute("PRAGMA mmap_size").fetchone() == (expected,)
    driver.close()
    assert f"mmap_size = {expected}" in readers._pragmas

    def mapped_nbytes():
        with db.read_transaction(store._database.engine) as connection:
            return db.pragma(connection, "mmap_size")

    assert mapped_nbytes() == expected
    with db.read_transaction(store._database.engine) as connection, db.unmapped(connection):
        assert db.pragma(connection, "mmap_size") == 0
    assert store.verify().ok
    assert mapped_nbytes() == expected


@pytest.mark.parametrize("n_threads", [0, -1, 65, 1.5, True, "2"])
def test_a_number_of_threads_that_is_none_is_refused(store_path, n_threads):
    with pytest.raises(InputError, match="n_threads"):
        kvstore.open(store_path, n_threads=n_threads)


@pytest.fixture(params=["native", "driver"])
def way_to_read(request, monkeypatch):
    """Both ways to read payloads: by SQLite's own functions, and where those cannot be reached."""
    if request.param == "driver":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("SQLite's own functions cannot be reached in this Python")
    return request.param


@HELPERS_RESTORE
@pytest.mark.parametrize("codec", ["raw", "exact", "int8"])
def test_both_ways_to_read_payloads_restore_the_same(open_store, way_to_read, codec):
    store = open_store(chunk_n_tokens=8, n_threads=3, codec=codec)
    one = layout(dtype="float32")
    written = computed(TOKENS, one)
    store.save_session(written, TOKENS, name="chat")
    cache = BytesCache(one)
    assert store.load_session(cache, TOKENS).n_tokens == 29
    if codec != "int8":
        assert_exact(cache, TOKENS[:29])
    idle = store._database.readers._idle
    assert idle
    assert {type(reader).__name__ == "NativeReader" for reader in idle} == {way_to_read == "native"}
    assert store.verify().ok


def test_a_reader_says_what_is_wrong_with_a_payload(store, way_to_read):
    save(store, TOKENS, name="chat")
    with raw(store.path) as driver:
        (payload_id, nbytes), *_ = driver.execute("SELECT id, length(data) FROM payloads")
    readers = store._database.readers
    room = bytearray(nbytes)
    with readers.lend() as reader:
        reader.read_into(payload_id, memoryview(room))
    other_length = pytest.raises(CorruptStoreError, match=f"{nbytes - 1} bytes, found {nbytes}")
    with other_length, readers.lend() as reader:
        reader.read_into(payload_id, memoryview(room)[1:])
    missing = pytest.raises((CorruptStoreError, sqlite3.Error), match=r"no such rowid|missing")
    with missing, readers.lend() as reader:
        reader.read_into(10_000, memoryview(room))
    assert store.verify().ok


def test_a_reader_of_a_file_that_is_not_there_is_an_error(tmp_path, way_to_read):
    path = tmp_path / "none.db"
    readers = Readers(
        db.connector(path, access="write"), uri=db.uri_of(path, "write"), pragmas=["mmap_size = 0"]
    )
    with pytest.raises(sqlite3.OperationalError, match="unable to open"), readers.lend():
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_reader_does_not_keep_the_file_s_locks_from_other_connections(store_path, way_to_read):
    """Its connection is the same library's: closing it does not break the store's own locks."""
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        save(store, TOKENS, name="chat")
        with store._database.readers.lend():
            pass
        store._database.readers.close()
        # A process that closes the last connection it knows of takes the WAL away.
        script = f"import kvstore; kvstore.open({str(store_path)!r}, chunk_n_tokens=8).close()"
        subprocess.run([sys.executable, "-c", script], check=True)
        save(store, range(900, 930), name="other")
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        assert {one.name for one in store.sessions()} == {"chat", "other"}
        assert store.verify().ok


@pytest.mark.parametrize("name", ["sqlite3_blob_close", "sqlite3_close_v2"])
def test_an_interrupt_right_behind_a_call_frees_nothing_twice(store, monkeypatch, name):
    library = native.library()
    if library is None:
        pytest.skip("SQLite's own functions cannot be reached in this Python")
    save(store, TOKENS, name="chat")
    function, closed = getattr(library, name), []

    def interrupted(handle):
        assert handle.value not in closed
        closed.append(handle.value)
        function(handle)
        if len(closed) == 1:
            raise KeyboardInterrupt

    def load_and_close():
        store.load_session(BytesCache(), TOKENS)
        store._database.readers.close()

    with monkeypatch.context() as patch:
        patch.setattr(library, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_and_close()
        store._database.readers.close()
    assert closed
    assert load_exact(store, TOKENS).n_tokens == 29
    assert store.verify().ok
