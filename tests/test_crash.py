"""Processes that die in the middle: whatever is left opens, verifies and is all or none."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvstore
from kvstore import restore
from kvstore.db.tables import FORMAT_VERSION
from tests.conftest import start_python
from tests.fakes import BytesCache, SmoothCache, layout
from tests.oracle import load_exact, raw

SMALL = layout(n_layers=1, n_kv_heads=1, dtype="float16", capacity_n_tokens=128)

# Each turn saves session "a" with 9 more tokens, and its metadata says how many it has.
WRITER = """
import os, sys
import sqlalchemy as sa
import kvstore
from tests.fakes import BytesCache, layout

path, n_turns, action, limit = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
store = kvstore.open(path, chunk_n_tokens=8)
cache = BytesCache(layout(n_layers=1, n_kv_heads=1, dtype="float16", capacity_n_tokens=128))
cache.compute(range(9))
print("ready", flush=True)

n_statements = 0

@sa.event.listens_for(store._database.engine, "before_cursor_execute")
def count(*_):
    global n_statements
    n_statements += 1
    if n_statements == limit:
        os._exit(7)

for turn in range(1, n_turns + 1):
    cache.truncate(len(cache.tokens) - 4)
    cache.compute(range(turn, turn + 13))
    store.save_session(cache, cache.tokens, name="a", metadata={"n": len(cache.tokens)})
    if action == "mixed":
        store.save_session(cache, cache.tokens[:11], name=f"b{turn % 3}")
        if turn % 2:
            store.delete_session(f"b{turn % 3}")
        if turn % 4 == 3:
            store.prune(max_bytes=0)
    if len(cache.tokens) > 100:
        cache.truncate(9)
print(n_statements)
os._exit(0)
"""


def check(path):
    """Open what the dead process left; every session is whole, and new work goes on."""
    with kvstore.open(path, chunk_n_tokens=8) as store:
        assert store.verify().problems == ()
        for session in store.sessions():
            result = load_exact(store, name=session.name, cache=BytesCache(SMALL))
            if session.name == "a":
                assert session.metadata == {"n": session.n_tokens}
            assert result.n_requested == session.n_tokens
            assert result.n_tokens >= min(session.n_stored_tokens, session.n_tokens - 1)
        cache = BytesCache(SMALL)
        cache.compute([77, 78, 79])
        store.save_session(cache, cache.tokens, name="after")
        assert load_exact(store, name="after", cache=BytesCache(SMALL)).n_tokens == 2
        store.delete_session("after")
        assert store.verify().problems == ()
        return [session for session in store.sessions() if session.name == "a"]


def in_child(action):
    """The exit code of a forked child that runs ``action`` and dies without cleaning up."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying_writer(path, mode, n_turns, limit):
    """Run the writer in a forked child that ends at its ``limit``-th statement."""

    def action():
        sys.argv[1:] = [str(path), str(n_turns), mode, str(limit)]
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # the child dies with it
        exec(compile(WRITER, "writer", "exec"), {"__name__": "writer"})

    return in_child(action)


def check_every_limit(folder, mode, *, n_turns, step):
    limit, code, former_n_tokens = 1, 7, 0
    while code == 7:
        path = folder / f"{limit}.db"
        code = dying_writer(path, mode, n_turns, limit)
        assert code in (0, 7)
        sessions = check(path)
        if mode == "save":
            n_tokens = sessions[0].n_tokens if sessions else 0
            assert n_tokens in (0, 18, 27)
            assert n_tokens >= former_n_tokens
            former_n_tokens = n_tokens
        path.unlink()
        limit += step
    assert limit > 20


@pytest.mark.parametrize(("mode", "n_turns", "step"), [("save", 2, 13), ("mixed", 4, 71)])
def test_a_process_that_ends_at_some_statement_leaves_a_sound_store(tmp_path, mode, n_turns, step):
    check_every_limit(tmp_path, mode, n_turns=n_turns, step=step)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "n_turns", "step"), [("save", 2, 1), ("mixed", 4, 3)])
def test_a_process_that_ends_at_any_statement_leaves_a_sound_store(tmp_path, mode, n_turns, step):
    check_every_limit(tmp_path, mode, n_turns=n_turns, step=step)


CREATOR = """
import os, sys
import sqlalchemy as sa
from kvstore.db import schema
import kvstore

limit = int(sys.argv[2])
make_engine, n_statements = schema.db.make_engine, 0

def counted(*arguments, **options):
    engine = make_engine(*arguments, **options)

    @sa.event.listens_for(engine, "before_cursor_execute")
    def count(*_):
        global n_statements
        n_statements += 1
        if n_statements == limit:
            os._exit(7)

    return engine

schema.db.make_engine = counted
kvstore.open(sys.argv[1])
os._exit(0)
"""


def dying_creator(path, limit):
    """Open a store in a forked child that ends at its ``limit``-th statement."""

    def action():
        sys.argv[1:] = [str(path), str(limit)]
        exec(compile(CREATOR, "creator", "exec"), {"__name__": "creator"})

    code = in_child(action)
    assert code in (0, 7)
    return code


def check_every_creation(folder, *, step):
    limit, code = 1, 7
    while code == 7:
        path = folder / f"{limit}.db"
        code = dying_creator(path, limit)
        check(path)
        limit += step
    assert limit > 20


def test_a_creation_that_ends_at_some_statement_is_begun_again(tmp_path):
    check_every_creation(tmp_path, step=9)


@pytest.mark.slow
def test_a_creation_that_ends_at_any_statement_is_begun_again(tmp_path):
    check_every_creation(tmp_path, step=1)


def check_every_upgrade(path, *, step):
    older, limit, code, versions = path.read_bytes(), 1, 7, []
    while code == 7:
        path.write_bytes(older)
        code = dying_creator(path, limit)
        with raw(path) as connection:
            versions += connection.execute("PRAGMA user_version").fetchone()
            columns = [row[1] for row in connection.execute("PRAGMA table_info(chunks)")]
        assert ("extras" in columns) == (versions[-1] == FORMAT_VERSION)
        with kvstore.open(path, chunk_n_tokens=32) as store:  # goes on where the other one ended
            assert store.verify().problems == ()
            assert store.load_session(BytesCache(), name="turns").n_tokens == 99
        limit += step
    assert limit > 20
    assert versions == sorted(versions)
    assert {*versions} == {1, FORMAT_VERSION}


def test_an_upgrade_that_ends_at_some_statement_is_begun_again(older_path):
    check_every_upgrade(older_path, step=3)


@pytest.mark.slow
def test_an_upgrade_that_ends_at_any_statement_is_begun_again(older_path):
    check_every_upgrade(older_path, step=1)


def kill_at_random(path, seconds):
    process = start_python(WRITER, path, 100_000, "mixed", -1)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_a_killed_process_leaves_a_sound_store(tmp_path):
    """Forked writers, killed at random moments, one after the other on the same file."""
    path = tmp_path / "sessions.db"
    kvstore.open(path).close()
    delays = random.Random(5)
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            try:
                sys.argv[1:] = [str(path), "100000", "mixed", "-1"]
                sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # the child dies with it
                exec(compile(WRITER, "writer", "exec"), {"__name__": "writer"})
            finally:
                os._exit(3)
        time.sleep(0.02 + delays.random() * 0.25)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        check(path)


@pytest.mark.slow
def test_a_killed_fresh_process_leaves_a_sound_store(tmp_path):
    delays = random.Random(6)
    path = tmp_path / "sessions.db"
    for _ in range(40):
        kill_at_random(path, delays.random())
        check(path)


def test_a_save_that_is_interrupted_by_an_exception_changes_nothing(store):
    class Interrupted(BytesCache):
        reads = 0

        def buffer(self, index):
            self.reads += 1
            if self.reads == 5:
                raise KeyboardInterrupt
            return super().buffer(index)

    cache = Interrupted(SMALL)
    cache.compute(range(30))
    with pytest.raises(KeyboardInterrupt):
        store.save_session(cache, cache.tokens, name="a")
    assert store.sessions() == []
    store.save_session(cache, cache.tokens, name="a")
    assert load_exact(store, name="a", cache=BytesCache(SMALL)).n_tokens == 29


def test_a_load_that_is_interrupted_leaves_a_shorter_exact_cache(store, monkeypatch):
    read, n_reads = restore.read_blob, itertools.count(1)

    def interrupted(*arguments):
        if next(n_reads) == 5:
            raise KeyboardInterrupt
        read(*arguments)

    whole = BytesCache(SMALL)
    whole.compute(range(30))
    store.save_session(whole, whole.tokens, name="a")
    cache = BytesCache(SMALL)
    monkeypatch.setattr(restore, "read_blob", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.load_session(cache, name="a")
    n_tokens = len(cache.tokens)
    assert n_tokens < 29
    assert cache.used() == [slots[:n_tokens] for slots in whole.used()]
    assert load_exact(store, name="a", cache=cache).n_tokens == 29


# Each turn begins saves in the background, and the process dies in the middle of them.
BACKGROUND_WRITER = """
import os, sys
import kvstore
from tests.fakes import BytesCache, layout

store = kvstore.open(sys.argv[1], chunk_n_tokens=8)
cache = BytesCache(layout(n_layers=1, n_kv_heads=1, dtype="float16", capacity_n_tokens=128))
cache.compute(range(9))
store.save_session(cache, cache.tokens, name="a", metadata={"n": 9}, replace=True)
os.write(int(sys.argv[2]), b"!")
turn = 0
while True:
    turn += 1
    cache.truncate(len(cache.tokens) - 4)
    cache.compute(range(turn, turn + 13))
    options = {"metadata": {"n": len(cache.tokens)}, "background": True}
    store.save_session(cache, cache.tokens, name="a", **options)
    store.save_session(cache, cache.tokens[:11], name=f"b{turn % 3}", background=True)
    if len(cache.tokens) > 100:
        cache.truncate(9)
    if turn % 16 == 0:
        store.flush()
"""


# Learns bases at some save, deletes all that needs them, and learns anew.
LEARNER = """
import os, sys
import sqlalchemy as sa
import kvstore
import kvstore.training
from tests.fakes import SmoothCache, layout

kvstore.training.MIN_TRAINING_N_TOKENS = 20
store = kvstore.open(sys.argv[1], chunk_n_tokens=8, codec="pca")
limit, n_statements = int(sys.argv[2]), 0

@sa.event.listens_for(store._database.engine, "before_cursor_execute")
def count(*_):
    global n_statements
    n_statements += 1
    if n_statements == limit:
        os._exit(7)

cache = SmoothCache(layout(n_layers=1, n_kv_heads=1, head_dim=16, capacity_n_tokens=128))
for turn in range(3):
    cache.truncate(0)
    cache.compute(range(turn, turn + 12))
    store.save_session(cache, cache.tokens, name="a", replace=True)
    cache.compute(range(turn, turn + 30))
    store.save_session(cache, cache.tokens, name="a", background=turn == 1)
    store.flush()
    if turn == 1:
        store.prune(max_bytes=0)
os._exit(0)
"""
LEARNED = layout(n_layers=1, n_kv_heads=1, head_dim=16, capacity_n_tokens=128)


@pytest.mark.slow
def test_a_process_that_ends_while_it_learns_leaves_bases_and_all_that_needs_them(tmp_path):
    limit, code, n_bases = 1, 7, set()
    while code == 7:
        path = tmp_path / f"{limit}.db"

        def action(path=path, limit=limit):
            sys.argv[1:] = [str(path), str(limit)]
            exec(compile(LEARNER, "learner", "exec"), {"__name__": "learner"})

        code = in_child(action)
        assert code in (0, 7)
        with kvstore.open(path, chunk_n_tokens=8, codec="pca") as store:
            assert store.verify().problems == ()
            for session in store.sessions():
                hit = store.load_session(SmoothCache(LEARNED), name=session.name)
                assert hit.n_tokens >= min(session.n_stored_tokens, session.n_tokens - 1)
        with raw(path) as connection:
            n_bases |= {*connection.execute("SELECT count(*) FROM bases").fetchone()}
        path.unlink()
        limit += 1
    assert limit > 20
    assert n_bases == {0, 2}


def kill_forked(source, path, seconds):
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sys.argv[1:] = [str(path), str(tell)]
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # the child dies with it
            exec(compile(source, "writer", "exec"), {"__name__": "writer"})
        finally:
            os._exit(3)
    os.close(tell)
    assert os.read(ready, 1) == b"!"
    os.close(ready)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("n_kills", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_process_killed_while_it_saves_in_the_background_leaves_a_sound_store(tmp_path, n_kills):
    path = tmp_path / "sessions.db"
    kvstore.open(path).close()
    delays = random.Random(7)
    for _ in range(n_kills):
        kill_forked(BACKGROUND_WRITER, path, delays.random() * 0.25)
        assert len(check(path)) == 1
