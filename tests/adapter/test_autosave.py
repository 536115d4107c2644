"""Conversations saved behind the generation, by a process that is killed at any moment."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("executorch")

import kvstore  # noqa: E402  after the check that they are there
from kvstore import save as saving  # noqa: E402
from kvstore.errors import (  # noqa: E402
    BudgetError,
    DiskFullError,
    InputError,
    MetadataError,
    ProgramError,
    SaveTimeoutError,
    SessionConflictError,
)
from runtime_adapter import Model, Session  # noqa: E402
from runtime_adapter.runtime import method  # noqa: E402
from tests import programs  # noqa: E402
from tests.adapter import journey  # noqa: E402

pytestmark = pytest.mark.adapter

CHUNK = 16
PROMPT = journey.tokens_of([40])[:40]
TALK = """
import sys, kvstore
from runtime_adapter import Model, Session
program, db, *prompt = sys.argv[1:]
with Model.open(program) as model, kvstore.open(db, chunk_n_tokens=16) as store:
    session = Session(model, store, "chat", autosave=True)
    session.append([int(token) for token in prompt])
    for token in session.generate(400):
        print(session.n_tokens, flush=True)
"""


def uninterrupted(path, n_tokens):
    with Model.open(path) as model:
        session = Session(model)
        session.append(PROMPT)
        list(session.generate(n_tokens - len(PROMPT)))
        return session.tokens


@pytest.mark.parametrize(
    ("name", "n_kills"),
    [
        pytest.param("stock_fp32", 4, marks=pytest.mark.slow),
        pytest.param("lfm2", 6, marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_loses_the_last_chunk_at_most(name, n_kills, tmp_path):
    path = programs.path(name)
    expected = uninterrupted(path, 500)
    dice = random.Random(name)
    for number in range(n_kills):
        db = tmp_path / f"{number}.db"
        with subprocess.Popen(
            [sys.executable, "-c", TALK, str(path), str(db), *map(str, PROMPT)],
            cwd=programs.ROOT,
            env={**os.environ, "PYTHONPATH": str(programs.ROOT)},
            stdout=subprocess.PIPE,
        ) as talk:
            n_seen = 0
            for _ in range(dice.randrange(20, 250)):
                n_seen = int(talk.stdout.readline())
            talk.send_signal(signal.SIGKILL)
        assert talk.returncode == -signal.SIGKILL
        # One token is pending, and the piece before it may have completed a chunk.
        n_safe = (n_seen - 2) // CHUNK * CHUNK
        with Model.open(path) as model, kvstore.open(db, chunk_n_tokens=CHUNK) as store:
            assert store.verify().ok
            session = Session(model, store, "chat", autosave=True)
            assert session.n_tokens >= n_safe
            assert session.tokens == expected[: session.n_tokens]
            list(session.generate(20))
            assert session.tokens == expected[: session.n_tokens]
            session.close()
            assert store.verify().ok


def test_closing_saves_what_is_left(tmp_path):
    path = programs.path("stock_fp32")
    with Model.open(path) as model, kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store:
        with Session(model, store, "chat", autosave=True) as session:
            session.append(PROMPT)
            session.flush()
            assert store.sessions()[0].n_tokens == 40
            list(session.generate(5))
        assert store.sessions()[0].n_tokens == 44
        again = Session(model, store, "chat")
        assert (again.tokens, len(again.pending)) == (session.tokens, 1)
        assert store.verify().ok


def test_a_conversation_that_was_taken_back_whole_is_gone(tmp_path):
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store,
    ):
        with Session(model, store, "chat", autosave=True) as session:
            session.append(PROMPT)
            session.flush()
            session.rewind(to=0)
        assert store.sessions() == []
        with Session(model, store, "never said a word", autosave=True):
            pass
        assert store.sessions() == []
        assert store.verify().ok


@pytest.mark.slow
def test_a_still_shows_what_the_cache_held_then(tmp_path):
    """What is computed meanwhile changes nothing of a save under way: rings and states neither."""
    from runtime_adapter.caches.still import Still

    for name in ("quantized_ring", "lfm2"):
        if not programs.is_available(name):
            continue
        with (
            Model.open(programs.path(name)) as model,
            kvstore.open(tmp_path / f"{name}.db", chunk_n_tokens=CHUNK) as store,
        ):
            session = Session(model)
            session.append(PROMPT)
            still, before = Still(model.cache), journey.visible(model)
            list(session.generate(60))
            store.save_session(still, still.tokens, name="then")
            for change in (lambda s=still: s.truncate(0), lambda s=still: s.adopt([])):
                with pytest.raises(InputError, match="still"):
                    change()
            hit = store.load_session(model.cache, [*PROMPT, 1])
            assert hit.n_tokens == 40
            assert journey.visible(model) == before
            assert store.verify().ok


def test_an_error_of_the_thread_surfaces_at_the_next_call_and_loses_nothing(tmp_path):
    db = tmp_path / "s.db"
    with kvstore.open(db) as store:
        nbytes = store.stats().file_nbytes
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(db, chunk_n_tokens=CHUNK, max_bytes=nbytes + 4096) as store,
    ):
        session = Session(model, store, "chat", autosave=True)
        done = session.append(PROMPT)  # there is no room for what is saved behind it
        assert done.n_computed_tokens == 40
        with pytest.raises(BudgetError):
            session.flush()
        turn = session.generate(30)
        with pytest.raises(BudgetError):
            list(turn)
        n_tokens = session.n_tokens
        assert 40 < n_tokens < 70
        list(session.generate(2))
        assert session.n_tokens == n_tokens + 2
        with pytest.raises(BudgetError):
            session.close()
        assert session.n_tokens == n_tokens + 2
        assert store.verify().ok


@pytest.fixture
def slow_saves(monkeypatch):
    """Saves that wait for a sign before they read the cache."""
    sign, begun = threading.Event(), threading.Event()
    save = saving.save

    def late(*arguments):
        begun.set()
        assert sign.wait(60)
        return save(*arguments)

    monkeypatch.setattr(saving, "save", late)
    yield begun, sign
    sign.set()


@pytest.mark.parametrize("change", ["set", "direct", "dropped", "loaded"])
def test_nothing_changes_the_cache_under_a_save(change, slow_saves, tmp_path):
    """Whoever does it waits: what is stored is what was computed."""
    begun, sign = slow_saves
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store,
    ):
        session = Session(model, store, "chat", autosave=True)
        session.append(PROMPT)
        assert begun.wait(60)
        threading.Timer(0.5, sign.set).start()
        if change == "set":
            k = model.cache.layer(0).k
            k.set(0, torch.full_like(k.get(0, 40), 7.0))
        elif change == "direct":
            model.cache.truncate(0)
            model.forward(PROMPT[::-1], start=0)
        elif change == "dropped":
            del session
            gc.collect()
            Session(model).append(PROMPT[::-1])
        else:
            store.load_session(model.cache, PROMPT[::-1])
        model.cache.truncate(0)
        hit = store.load_session(model.cache, [*PROMPT, 1])
        assert hit.n_tokens == 40
        restored = journey.visible(model)
        model.cache.truncate(0)
        Session(model).append(PROMPT)
        assert journey.visible(model) == restored
        assert store.verify().ok


def test_an_append_is_published_whole_or_not_at_all(tmp_path, monkeypatch):
    words = journey.tokens_of([600])
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store,
    ):
        session = Session(model, store, "chat", autosave=True)
        session.append(PROMPT)
        execute, calls = method.LoadedMethod.execute, []

        def fail_at_the_third(self, inputs):
            calls.append(1)
            if len(calls) == 3:
                raise ProgramError("the runtime stopped")
            return execute(self, inputs)

        with monkeypatch.context() as patch:
            patch.setattr(method.LoadedMethod, "execute", fail_at_the_third)
            with pytest.raises(ProgramError):
                session.append(words[:400])
        session.flush()
        assert store.sessions()[0].n_tokens == 40
        list(session.generate(20))
        session.flush()
        assert Session(model, store, "chat").tokens == session.tokens[:48]
        assert store.verify().ok


def test_what_was_taken_back_does_not_come_back_after_a_kill(tmp_path):
    """Also behind a strike, where only the ids are stored."""
    words = journey.tokens_of([600])
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store,
    ):
        session = Session(model, store, "chat", autosave=True)
        session.append(words[:100])
        session.rewind(to=5)
        session.flush()
        assert Session(model, store, "chat").tokens == tuple(words[:5])
        session.append(words[200:260])
        session.strike(4, 24)
        session.flush()
        assert Session(model, store, "chat").tokens == session.tokens
        list(session.generate(100))
        session.flush()
        stored = Session(model, store, "chat").tokens
        assert stored == session.tokens[: len(stored)]
        assert len(stored) > 130
        assert store.verify().ok


def test_a_close_that_fails_can_be_tried_again(tmp_path):
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=256) as store,
    ):
        session = Session(model, store, "chat", autosave=True)
        session.append(PROMPT)
        session.flush()
        session.metadata["what"] = object()
        for _ in range(2):
            with pytest.raises(MetadataError):
                session.close()
        del session.metadata["what"]
        session.close()
        session.close()
        assert store.sessions()[0].n_tokens == 40


def test_another_models_conversation_is_saved_without_a_conflict(tmp_path):
    with kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store:
        with (
            Model.open(programs.path("stock_fp32")) as model,
            Session(model, store, "chat", autosave=True) as session,
        ):
            session.append(PROMPT)
        with Model.open(programs.path("plain")) as model:
            with Session(model, store, "chat", autosave=True) as session:
                pass
            assert Session(model, store, "chat").n_cached_tokens == 40
        assert store.verify().ok


def test_two_who_begin_one_name_do_not_write_over_each_other(tmp_path):
    db = tmp_path / "s.db"
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(db, chunk_n_tokens=CHUNK) as store,
        kvstore.open(db, chunk_n_tokens=CHUNK) as other,
    ):
        mine, theirs = Session(model, store, "chat"), Session(model, other, "chat")
        theirs.append(PROMPT)
        theirs.save()
        mine.append(PROMPT[:10])
        with pytest.raises(SessionConflictError):
            mine.save()
        assert store.sessions()[0].n_tokens == 40


@pytest.mark.parametrize("autosave", [True, False])
def test_two_sessions_of_one_name_do_not_write_over_each_other(tmp_path, autosave):
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store,
    ):
        older = Session(model, store, "chat", autosave=autosave)
        older.append(PROMPT)
        older.flush() if autosave else older.save()
        newer = Session(model, store, "chat")
        newer.append([1, 2, 3])
        newer.save()
        older.append([4])
        with pytest.raises(SessionConflictError, match="another Session"):
            older.close() if autosave else older.save()
        kept = older.fork("mine")
        assert kept.tokens == (*PROMPT, 4)
        newer.append([5])
        newer.save()
        assert Session(model, store, "chat").tokens == newer.tokens
        assert Session(model, store, "mine").tokens == kept.tokens
        assert store.verify().ok


def test_a_session_that_took_all_back_does_not_delete_what_another_saved(tmp_path):
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store,
    ):
        older = Session(model, store, "chat", autosave=True)
        older.append(PROMPT)
        older.save()
        newer = Session(model, store, "chat")
        newer.append([1, 2, 3])
        newer.save()
        older.rewind(to=0)
        with pytest.raises(SessionConflictError):
            older.close()
        assert Session(model, store, "chat").tokens == newer.tokens


def test_a_named_fork_is_not_written_over_by_who_began_the_name_before(tmp_path):
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store,
    ):
        session, other = Session(model, store, "chat"), Session(model, store, "mine")
        session.append(PROMPT)
        fork = session.fork("mine")
        other.append([1, 2, 3])
        with pytest.raises(SessionConflictError):
            other.save()
        fork.append([4])
        fork.save()
        assert Session(model, store, "mine").tokens == (*PROMPT, 4)


def test_a_save_in_the_background_is_of_the_moment_of_the_call(slow_saves, tmp_path):
    begun, sign = slow_saves
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store,
    ):
        session = Session(model, store, "chat")
        session.append(PROMPT)
        before = journey.visible(model)
        session.metadata["title"] = "then"
        pending = session.save(background=True)
        session.metadata["title"] = "now"
        list(session.generate(3))
        model.cache.truncate(5)
        model.forward(PROMPT[::-1], start=5)
        assert begun.wait(60)
        assert not pending.done()
        with pytest.raises(SaveTimeoutError):
            session.flush(timeout=0)
        sign.set()
        session.flush(timeout=60)
        assert pending.result().n_tokens == 40
        resumed = Session(model, store, "chat")
        assert resumed.tokens == tuple(PROMPT)
        assert resumed.metadata["title"] == "then"
        model.cache.truncate(0)
        assert store.load_session(model.cache, [*PROMPT, 1]).n_tokens == 40
        assert journey.visible(model) == before
        assert store.verify().ok


def test_saves_in_the_background_and_autosave_follow_each_other(tmp_path):
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store,
    ):
        with Session(model, store, "chat", autosave=True) as session:
            session.append(PROMPT)
            for _ in session.generate(30):
                session.save(background=True)
            session.flush()
            tokens = session.tokens
            assert store.sessions()[0].n_tokens in (len(tokens) - 1, len(tokens))
        assert Session(model, store, "chat").tokens == tokens
        assert store.verify().ok


def test_a_name_that_is_being_saved_in_the_background_is_claimed(slow_saves, tmp_path):
    _, sign = slow_saves
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store,
    ):
        older, newer = Session(model, store, "chat"), Session(model, store, "chat")
        newer.append(PROMPT)
        threading.Timer(0.5, sign.set).start()
        newer.save(background=True)
        older.append([1, 2, 3])
        with pytest.raises(SessionConflictError, match="another Session"):
            older.save()
        last = Session(model, store, "chat")
        assert last.tokens == tuple(PROMPT)
        last.append([4])
        last.save(background=True).result()
        assert Session(model, store, "chat").tokens == (*PROMPT, 4)
        assert store.verify().ok


def test_a_failure_in_the_background_is_told_by_flush_and_saved_later(tmp_path):
    db = tmp_path / "s.db"
    with kvstore.open(db) as store:
        nbytes = store.stats().file_nbytes
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(db, chunk_n_tokens=CHUNK, max_bytes=nbytes + 4096) as store,
    ):
        session = Session(model, store, "chat")
        session.append(PROMPT)
        session.save(background=True)
        with pytest.raises(BudgetError):
            session.flush()
        session.flush()
        with pytest.raises(BudgetError):
            session.save(background=True).result()
        assert store.sessions() == []
        assert store.verify().ok


@pytest.fixture
def refusing(monkeypatch):
    """Names whose saves find a full disk."""
    names, save = set(), saving.save

    def refuse(database, request, workers):
        if request.name in names:
            raise DiskFullError(f"no room left for {request.name}")
        return save(database, request, workers)

    monkeypatch.setattr(saving, "save", refuse)
    return names


def test_a_save_that_fails_behind_does_not_lose_the_right_to_the_name(refusing, tmp_path):
    with kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store:
        with Model.open(programs.path("stock_fp32")) as model:
            session = Session(model, store, "chat")
            session.append(PROMPT)
            session.save()
        with Model.open(programs.path("plain")) as model:
            session = Session(model, store, "chat")
            session.append([1, 2, 3])
            refusing.add("chat")
            with pytest.raises(DiskFullError):
                session.save(background=True).result()
            refusing.clear()
            assert session.save(background=True).result().n_tokens == 43
            assert Session(model, store, "chat").tokens == session.tokens


def test_a_save_that_fails_behind_leaves_an_autosave_to_be_done(refusing, tmp_path):
    """What was taken back is stored by the next autosave, though no chunk becomes complete."""
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store,
    ):
        session = Session(model, store, "chat", autosave=True)
        session.append(PROMPT)
        session.flush()
        refusing.add("chat")
        session.rewind(to=20)
        with pytest.raises(DiskFullError):
            session.flush()
        with pytest.raises(DiskFullError):
            session.save(background=True).result()
        refusing.clear()
        session.append([1])
        session.flush()
        assert store.sessions()[0].n_tokens == 21
        session.close()


def test_flush_tells_of_this_sessions_failures_only(refusing, tmp_path):
    with (
        Model.open(programs.path("stock_fp32")) as model,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=CHUNK) as store,
    ):
        one, other = Session(model, store, "one"), Session(model, store, "other")
        one.append(PROMPT)
        other.append(PROMPT)
        refusing.add("other")
        one.save(background=True)
        pending = [other.save(background=True) for _ in range(3)]
        assert isinstance(pending[0].exception(), DiskFullError)  # told, so not again
        one.flush()
        for _ in range(2):
            with pytest.raises(DiskFullError, match="for other"):
                other.flush()
        other.flush()
        store.flush()
        assert [row.name for row in store.sessions()] == ["one"]
