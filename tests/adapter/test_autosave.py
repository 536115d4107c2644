"""Conversations saved behind the generation, by a process that is killed at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("executorch")

import kvstore  # noqa: E402  after the check that they are there
from kvstore.errors import BudgetError, InputError  # noqa: E402
from runtime_adapter import Model, Session  # noqa: E402
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
    [("stock_fp32", 2), pytest.param("lfm2", 6, marks=pytest.mark.slow)],
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
