"""Ctrl-C in the middle of a call: no lock is left behind, and no late write into the cache."""

from __future__ import annotations

import gc
import sqlite3
import threading

import pytest
from sqlalchemy.engine import cursor as sa_cursor

import kvstore
from kvstore import restore
from tests.fakes import BytesCache
from tests.oracle import computed, load_exact, save

TOKENS = list(range(100, 130))


def test_an_interrupt_with_an_open_cursor_leaves_no_lock(open_store, monkeypatch):
    store = open_store(chunk_n_tokens=8)
    save(store, TOKENS, name="chat")
    fetch = sa_cursor.CursorFetchStrategy.fetchall

    def interrupted(self, result, cursor):
        if cursor.description and cursor.description[0][0] == "payload_id":
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as error:
                self.handle_exception(result, cursor, error)
        return fetch(self, result, cursor)

    gc.disable()  # a traceback that somebody keeps, as a notebook does, keeps the cursor too
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sa_cursor.CursorFetchStrategy, "fetchall", interrupted)
            with pytest.raises(KeyboardInterrupt) as kept:
                store.delete_session("chat")
        other = open_store(chunk_n_tokens=8, busy_timeout_seconds=0)
        save(other, [1, 2, 3], name="other")
        assert load_exact(other, name="chat").reason is None
        del kept
    finally:
        gc.enable()


def test_after_an_interrupted_load_nothing_writes_into_the_cache(open_store, monkeypatch):
    store = open_store(chunk_n_tokens=8)
    save(store, TOKENS, name="chat")
    decoding, go_on = threading.Event(), threading.Event()
    read = restore.read_blob

    def held_up(*arguments):
        if threading.current_thread() is threading.main_thread():
            assert decoding.wait(60)
            threading.Timer(0.5, go_on.set).start()
            raise KeyboardInterrupt
        decoding.set()
        assert go_on.wait(60)
        read(*arguments)

    monkeypatch.setattr(restore, "_NBYTES_A_HELPER", 1)
    monkeypatch.setattr(restore, "read_blob", held_up)
    cache = BytesCache()
    with pytest.raises(KeyboardInterrupt):
        store.load_session(cache, TOKENS)
    assert go_on.is_set()  # the load waited for what was being decoded
    assert list(cache.tokens) == []
    cache.compute(TOKENS)
    assert cache.wrong() == []


def test_readers_of_a_new_file_do_not_wait_for_a_writer(open_store):
    """Also in the process that made it, on a connection made while another one writes."""
    store = open_store(chunk_n_tokens=8, busy_timeout_seconds=0)
    save(store, TOKENS, name="chat")
    writer = sqlite3.connect(store.path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    try:
        with store._database.engine.connect():  # the pooled connection is in another thread's hands
            assert load_exact(store, TOKENS).reason is None
            assert store.verify().ok
            assert [session.name for session in store.sessions()] == ["chat"]
    finally:
        writer.rollback()
        writer.close()


def test_looking_at_a_store_leaves_no_files_beside_it(open_store, store_path):
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        store.save_session(computed(TOKENS), TOKENS, name="chat")
    with kvstore.open(store_path, chunk_n_tokens=8, read_only=True) as store:
        assert store.read_only
        assert load_exact(store, TOKENS).reason is None
        with pytest.raises(kvstore.KVStoreError, match="read-only"):
            store.delete_session("chat")
    assert [path.name for path in store_path.parent.iterdir()] == [store_path.name]
