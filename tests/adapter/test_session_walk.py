"""Random walks through conversations: after every step it is as a fresh run of the same pieces.

Bit for bit without a store. With one, what is restored is what the first session that saved
those tokens computed, perhaps in other pieces: then to a tolerance.
"""

from __future__ import annotations

import itertools
import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("executorch")

import kvstore  # noqa: E402  after the check that they are there
from runtime_adapter import Model, Sampler, Session  # noqa: E402
from tests import programs  # noqa: E402
from tests.adapter import journey  # noqa: E402

pytestmark = pytest.mark.adapter
slow = pytest.mark.slow

N_STEPS = 25
LONGEST = 400


def steps(session, dice):
    """One random change; a session to go on with."""
    words = [dice.randrange(96) for _ in range(dice.choice([1, 3, 20, 60]))]
    n_tokens = session.n_tokens
    place = dice.randrange(n_tokens + 1)
    change = dice.choice(["append", "generate", "rewind", "regenerate", "replace", "save", "fork"])
    if n_tokens > LONGEST:
        session.rewind(to=place)
    elif change == "append" or not n_tokens:
        session.append(words)
    elif change == "generate":
        sampler = Sampler(temperature=1.0, seed=dice.randrange(100))
        list(itertools.islice(session.generate(40, sampler=sampler), dice.randrange(20)))
    elif change == "rewind":
        session.rewind(to=place)
    elif change == "regenerate" and session.turns:
        session.regenerate()
    elif change == "replace":
        stop = min(n_tokens, place + dice.randrange(30))
        session.replace(place, stop, words if dice.random() < 0.8 else [])
    elif change == "save":
        session.save()
    elif change == "fork":
        return session.fork(f"fork {dice.random()}")
    return session


@pytest.mark.parametrize("is_stored", [True, False], ids=["stored", "alone"])
@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("stock_fp32", 0),
        ("lfm2", 0),
        ("quantized_ring", 0),
        *(
            pytest.param(name, seed, marks=slow)
            for seed in range(1, 5)
            for name in ("stock_fp32", "lfm2", "quantized_ring", "plain_sink", "qwen35", "ring")
        ),
    ],
)
def test_every_step_of_a_walk_is_exact(name, seed, is_stored, tmp_path):
    if not programs.is_available(name):
        pytest.skip("this ExecuTorch does not export it")
    dice = random.Random(f"{name} {seed} {is_stored}")
    path = programs.path(name)
    with (
        Model.open(path) as model,
        Model.open(path) as fresh,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=16, checkpoint_n_tokens=32) as store,
    ):
        sessions = [Session(model, store if is_stored else None)]
        if is_stored:
            sessions = [Session(model, store, "first", autosave=dice.random() < 0.5)]
        for _ in range(N_STEPS):
            session = dice.choice(sessions)
            after = steps(session, dice) if is_stored else plain(session, dice)
            if after is not session:
                sessions.append(after)
                session = after
            if not session.n_tokens:
                continue
            logits = session.logits
            assert session.pending == ()
            fresh.cache.truncate(0)
            for start, stop in itertools.pairwise([0, *session.cuts]):
                expected = fresh.forward(session.tokens[start:stop], start=start)
            assert session.cuts[-1] == session.n_tokens
            if is_stored:
                # int8 rounds what the pieces' low bits move over an edge.
                tolerance = 0.1 if "quantized" in name else 1e-3
                torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
            else:
                assert torch.equal(logits, expected)
                assert journey.visible(model) == journey.visible(fresh)
        for session in sessions:
            session.close()
        assert store.verify().ok


def plain(session, dice):
    """A change that needs no store."""
    if session.n_tokens and dice.random() < 0.1:
        return session.fork()
    return steps(session, _NoStore(dice))


class _NoStore:
    """Dice that never fall on a change that needs a store."""

    def __init__(self, dice):
        self._dice = dice

    def __getattr__(self, name):
        return getattr(self._dice, name)

    def choice(self, options):
        return self._dice.choice([option for option in options if option not in ("save", "fork")])


def edited(session, dice):
    """One random change, strikes among them."""
    words = [dice.randrange(96) for _ in range(dice.choice([1, 3, 20, 60]))]
    n_tokens = session.n_tokens
    place = dice.randrange(1, n_tokens + 1) if n_tokens else 0
    stop = min(n_tokens, place + dice.randrange(1, 30))
    change = dice.choice(["append", "generate", "rewind", "replace", "strike", "strike"])
    if n_tokens > LONGEST:
        return lambda one: one.strike(1, n_tokens // 2)
    if change == "append" or not n_tokens or not place < stop:
        return lambda one: one.append(words)
    if change == "generate":
        seed, n_new = dice.randrange(100), dice.randrange(20)
        return lambda one: list(one.generate(n_new, sampler=Sampler(temperature=1.0, seed=seed)))
    if change == "rewind":
        return lambda one: one.rewind(to=place)
    if change == "replace":
        return lambda one: one.replace(place, stop, words)
    return lambda one: one.strike(place, stop)


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("stock_fp32", 0),
        *(
            pytest.param(name, seed, marks=slow)
            for seed in range(1, 4)
            for name in ("stock_fp32", "plain", "quantized_cache")
        ),
    ],
)
def test_edited_conversations_that_take_turns_are_as_each_alone(name, seed, tmp_path):
    """Two share a model and a store, go on by name now and then; each has a twin without either.

    Full tensors only: a twin can go back to wherever the store can.
    """
    dice = random.Random(f"{name} {seed}")
    path = programs.path(name)
    tolerance = 0.1 if "quantized" in name else 1e-3
    with (
        Model.open(path) as model,
        Model.open(path) as one,
        Model.open(path) as other,
        kvstore.open(tmp_path / "s.db", chunk_n_tokens=16) as store,
    ):
        chats = [Session(model, store, f"chat {number}", autosave=number == 0) for number in (0, 1)]
        twins = [Session(one), Session(other)]
        for _ in range(N_STEPS):
            number = dice.randrange(2)
            change = edited(twins[number], dice)
            for session in (chats[number], twins[number]):
                change(session)
                if not session.n_tokens:
                    session.append([5])
            assert chats[number].tokens == twins[number].tokens
            if dice.random() < 0.3:
                chats[number].save()
                chats[number].close()
                if dice.random() < 0.5:
                    model.cache.truncate(0)
                chats[number] = Session(model, store, f"chat {number}", autosave=number == 0)
            assert chats[number].edits == twins[number].edits
            found, expected = chats[number].logits, twins[number].logits
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
            assert chats[number].edits == twins[number].edits == model.cache.edits
        for session in chats:
            session.close()
        assert store.verify().ok
