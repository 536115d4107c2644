"""Conversations on real programs: whatever was done to one, it goes on like a fresh run."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("executorch")

import kvstore  # noqa: E402  after the check that they are there
from kvstore import MissReason  # noqa: E402
from kvstore.errors import (  # noqa: E402
    CapacityError,
    ClosedModelError,
    InputError,
    ProgramError,
    SessionConflictError,
    TokensError,
)
from runtime_adapter import Model, Sampler, Session  # noqa: E402
from runtime_adapter.runtime import method  # noqa: E402
from tests import programs  # noqa: E402
from tests.adapter import journey  # noqa: E402

pytestmark = pytest.mark.adapter

NAMES = ["stock_fp32", "quantized_ring", "lfm2"]
WORDS = journey.tokens_of([2000])
DRAWN = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": 7}


def available(names):
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(not programs.is_available(name), reason="not exported here"),
        )
        for name in names
    ]


@pytest.fixture(params=available(NAMES))
def model(request):
    with Model.open(programs.path(request.param)) as model:
        yield model


@pytest.fixture
def store(tmp_path):
    with kvstore.open(tmp_path / "sessions.db", chunk_n_tokens=16, checkpoint_n_tokens=1) as store:
        yield store
        assert store.verify().ok


@pytest.fixture(params=["alone", "with a store"])
def session(request, model, store):
    with Session(model, store if request.param == "with a store" else None) as session:
        yield session


def fresh(model, session, n_tokens=None):
    """Logits and readable bytes of another model, fed the same tokens in the same pieces."""
    n_tokens = session.n_tokens if n_tokens is None else n_tokens
    cuts = [cut for cut in session.cuts if cut < n_tokens]
    with Model.open(model.path) as other:
        for start, stop in itertools.pairwise([0, *cuts, n_tokens]):
            logits = other.forward(session.tokens[start:stop], start=start)
        return logits, journey.visible(other)


def same_as_fresh(model, session):
    logits = session.logits
    expected, visible = fresh(model, session)
    assert torch.equal(logits, expected)
    assert session.pending == ()
    assert journey.visible(model) == visible


# ------------------------------------------------------------------ going on


def test_tokens_are_cached_or_pending(session, model):
    added = session.append(WORDS[:20])
    assert (added.n_tokens, added.n_computed_tokens) == (20, 20)
    assert (session.n_cached_tokens, session.pending) == (20, ())
    generated = list(session.generate(3))
    assert session.tokens == (*WORDS[:20], *generated)
    assert (session.n_cached_tokens, session.pending) == (22, tuple(generated[2:]))
    assert session.turns == ((20, 23),)
    added = session.append(WORDS[50:55])
    assert (added.n_tokens, added.n_live_tokens, added.n_computed_tokens) == (28, 22, 6)
    same_as_fresh(model, session)


def test_greedy_takes_the_likeliest(session, model):
    session.append(WORDS[:20])
    expected = int(session.logits.argmax())
    assert next(session.generate(1)) == expected
    assert list(session.generate(0)) == []


def test_generation_that_is_broken_off_goes_on(session, model):
    session.append(WORDS[:20])
    whole = list(session.fork().generate(8, sampler=Sampler(**DRAWN)))
    begun = session.generate(8, sampler=Sampler(**DRAWN))
    assert list(itertools.islice(begun, 3)) == whole[:3]
    assert list(session.generate(5)) == whole[3:]


def test_a_stop_token_ends_the_turn_and_belongs_to_it(session):
    session.append(WORDS[:20])
    whole = list(session.fork().generate(8, sampler=Sampler(**DRAWN)))
    last = whole[3]
    until = whole[: whole.index(last) + 1]
    assert list(session.fork().generate(8, sampler=Sampler(**DRAWN), stop=[last])) == until
    heard = session.generate(8, sampler=Sampler(**DRAWN), stop=lambda token: token == last)
    assert list(heard) == until
    assert session.tokens[20:] == tuple(until)


def test_without_a_limit_it_ends_where_the_cache_is_full(store):
    with Model.open(programs.path("stock_fp32")) as model:
        session = Session(model)
        session.append(WORDS[:505])
        assert session.n_tokens + len(list(session.generate())) == 513
        with pytest.raises(CapacityError):
            session.append([1])
        with pytest.raises(CapacityError):
            list(session.generate(1))
        assert (session.n_tokens, session.n_cached_tokens) == (513, 512)


# ------------------------------------------------------------------ going back


@pytest.mark.parametrize("to", [1, 7, 29, 30, 31, 33, 90, 99])
def test_rewind_equals_a_run_that_stopped_there(session, model, to):
    session.append(WORDS[:30])
    list(session.generate(4, sampler=Sampler(**DRAWN)))
    session.append(WORDS[100:150])
    list(session.generate(16))
    before = session.tokens
    done = session.rewind(to=to)
    assert session.tokens == before[:to]
    assert done.n_tokens == to
    assert done.n_live_tokens + done.n_restored_tokens + done.n_computed_tokens == to
    same_as_fresh(model, session)


def test_rewind_of_full_layers_computes_one_piece_at_most():
    with Model.open(programs.path("stock_fp32")) as model:
        session = Session(model)
        session.append(WORDS[:400])
        assert session.cuts == (127, 254, 381, 400)
        list(session.generate(5))
        done = session.rewind(to=403)
        assert (done.n_live_tokens, done.n_computed_tokens) == (402, 1)
        done = session.rewind(to=300)
        assert (done.n_live_tokens, done.n_computed_tokens) == (254, 46)
        same_as_fresh(model, session)
        assert session.rewind(to=0).n_tokens == 0
        assert session.tokens == ()
        session.append(WORDS[5:25])
        same_as_fresh(model, session)


def test_rewind_takes_rings_and_states_from_the_store(store):
    with Model.open(programs.path("lfm2")) as model:
        session = Session(model, store, "chat")
        session.append(WORDS[:30])
        session.save()
        session.append(WORDS[30:60])
        done = session.rewind(to=30)
        assert (done.n_restored_tokens + done.n_live_tokens, done.n_computed_tokens) == (30, 0)
        same_as_fresh(model, session)
        session.append(WORDS[30:60])
        done = session.rewind(to=40)
        assert (done.n_live_tokens, done.n_restored_tokens, done.n_computed_tokens) == (0, 30, 10)
        same_as_fresh(model, session)


def test_regenerate_goes_back_to_the_last_turn_and_computes_nothing(session, model):
    session.append(WORDS[:30])
    turns = [list(session.generate(60, sampler=Sampler(**DRAWN)))]
    for _ in range(3):
        done = session.regenerate()
        assert (session.tokens, session.turns) == (tuple(WORDS[:30]), ())
        assert (done.n_live_tokens, done.n_computed_tokens) == (30, 0)
        turns.append(list(session.generate(60)))
        assert turns[-1] not in turns[:-1]
    same_as_fresh(model, session)
    session.rewind(to=29)
    session.append(WORDS[29:30])
    list(session.generate(60))
    session.regenerate()
    same_as_fresh(model, session)


def test_regenerate_greedily_gives_the_same_turn(session, model):
    session.append(WORDS[:30])
    first = list(session.generate(6))
    session.append(WORDS[40:44])
    second = list(session.generate(6))
    session.regenerate()
    assert list(session.generate(6)) == second
    session.rewind(to=36)
    session.regenerate()
    assert list(session.generate(6)) == first


@pytest.mark.parametrize(
    ("start", "stop", "n_new"), [(3, 9, 2), (40, 40, 7), (0, 30, 0), (70, 84, 1)]
)
def test_replace_equals_a_fresh_run_of_the_result(session, model, start, stop, n_new):
    session.append(WORDS[:60])
    list(session.generate(4))
    session.append(WORDS[100:120])
    before = session.tokens
    done = session.replace(start, stop, WORDS[300 : 300 + n_new])
    assert session.tokens == (*before[:start], *WORDS[300 : 300 + n_new], *before[stop:])
    assert done.n_live_tokens + done.n_restored_tokens <= start
    same_as_fresh(model, session)
    list(session.generate(3))
    same_as_fresh(model, session)


def test_turns_move_with_what_is_replaced_before_them(session):
    session.append(WORDS[:20])
    list(session.generate(4))
    session.append(WORDS[20:30])
    list(session.generate(3))
    assert session.turns == ((20, 24), (34, 37))
    session.replace(5, 10, WORDS[40:47])
    assert session.turns == ((22, 26), (36, 39))
    session.replace(25, 30, [])
    assert session.turns == ((22, 25), (31, 34))


# ------------------------------------------------------------------ forks and the store


def test_forks_take_turns_with_the_live_cache(model, store):
    session = Session(model, store, "one")
    session.append(WORDS[:40])
    session.save()
    n_bytes = store.stats().stored_nbytes
    other = session.fork("two")
    assert store.stats().stored_nbytes == n_bytes
    session.append(WORDS[100:120])
    other.append(WORDS[200:230])
    list(other.generate(4, sampler=Sampler(**DRAWN)))
    for each in (session, other, session, other):
        same_as_fresh(model, each)
    session.save()
    other.save()
    assert {info.name for info in store.sessions()} == {"one", "two"}
    with pytest.raises(SessionConflictError):
        session.fork("two")


def test_switching_restores_only_what_differs(store):
    with Model.open(programs.path("stock_fp32")) as model:
        session = Session(model, store, "one")
        session.append(WORDS[:64])
        other = session.fork("two")
        other.append(WORDS[200:232])
        done = session.append(WORDS[100:132])
        assert (done.n_live_tokens, done.n_restored_tokens, done.n_computed_tokens) == (64, 0, 32)
        done = other.append([1])
        assert (done.n_live_tokens, done.n_restored_tokens, done.n_computed_tokens) == (64, 32, 1)


def test_append_computes_what_is_neither_live_nor_stored(store):
    with Model.open(programs.path("stock_fp32")) as model:
        session = Session(model, store)
        session.append(WORDS[:100])
        session.save()
        again = Session(model, store)
        model.cache.truncate(0)
        done = again.append([*WORDS[:100], 5])
        assert (done.n_live_tokens, done.n_restored_tokens, done.n_computed_tokens) == (0, 100, 1)
        done = again.append(WORDS[:10])
        assert (done.n_live_tokens, done.n_computed_tokens) == (101, 10)


@pytest.mark.parametrize("store_logits", [False, True])
def test_a_resumed_session_goes_on_as_if_never_interrupted(model, store, store_logits):
    session = Session(model, store, "chat", store_logits=store_logits, metadata={"user": "Ada"})
    session.append(WORDS[:40])
    list(session.generate(5, sampler=Sampler(**DRAWN)))
    session.save()
    expected = list(session.generate(20))
    with Model.open(model.path) as other:
        resumed = Session(other, store, "chat", store_logits=store_logits)
        assert resumed.metadata == {"user": "Ada"}
        assert resumed.resumed.n_restored_tokens >= 43
        assert resumed.tokens == session.tokens[:45]
        assert (resumed.cuts, resumed.turns) == (session.cuts[: len(resumed.cuts)], ((40, 45),))
        assert (resumed.n_cached_tokens, len(resumed.pending)) == (44, 1)
        assert list(resumed.generate(20)) == expected
        assert resumed.tokens == session.tokens
        same_as_fresh(other, resumed)
        resumed.rewind(to=45)
        done = resumed.regenerate()
        assert resumed.tokens == tuple(WORDS[:40])
        if store_logits and other.layout.is_full:
            assert done.n_computed_tokens == 0
        same_as_fresh(other, resumed)


def test_a_session_that_another_saved_is_gone_on_with_too(store):
    with Model.open(programs.path("stock_fp32")) as model:
        model.forward(WORDS[:50], start=0)
        store.save_session(model.cache, WORDS[:50], name="plain", metadata={"a": 1})
        model.cache.truncate(0)
        session = Session(model, store, "plain")
        assert (session.tokens, session.metadata) == (tuple(WORDS[:50]), {"a": 1})
        assert session.n_cached_tokens == 50
        assert session.append([3]).n_computed_tokens == 1


@pytest.mark.slow
def test_another_model_keeps_the_words_and_computes_its_own(store):
    with Model.open(programs.path("stock_fp32")) as model:
        session = Session(model, store, "chat")
        session.append(WORDS[:50])
        list(session.generate(3))
        session.save()
        words = session.tokens
    with Model.open(programs.path("one_token")) as updated:
        session = Session(updated, store, "chat")
        assert session.tokens == words
        assert (session.n_cached_tokens, session.resumed.reason) == (0, MissReason.OTHER_MODEL)
        same_as_fresh(updated, session)
        session.save()
        updated.cache.truncate(0)
        assert Session(updated, store, "chat").resumed.reason is None


# ------------------------------------------------------------------ bad input and failures


def test_what_cannot_be_done_is_refused_and_changes_nothing(model, store, tmp_path):
    session = Session(model, store)
    for wrong in (lambda: session.logits, session.save, session.generate, session.regenerate):
        with pytest.raises(InputError):
            wrong()
    session.append(WORDS[:20])
    list(session.generate(2))
    tokens, turns, cuts = session.tokens, session.turns, session.cuts
    for wrong, error in (
        (lambda: session.append([]), TokensError),
        (lambda: session.append([1, 96]), TokensError),
        (lambda: session.append([-1]), TokensError),
        (lambda: session.rewind(to=23), InputError),
        (lambda: session.rewind(to=-1), InputError),
        (lambda: session.rewind(to=True), InputError),
        (lambda: session.replace(5, 3, [1]), InputError),
        (lambda: session.replace(0, 23, [1]), InputError),
        (lambda: session.replace(0, 3, [96]), TokensError),
        (lambda: session.generate(-1), InputError),
        (lambda: session.generate(1, sampler="greedy"), InputError),
        (lambda: session.generate(1, stop=[-3]), TokensError),
        (lambda: Session(model, name="x"), InputError),
        (lambda: Session(model, autosave=True), InputError),
        (lambda: Session(model).fork("x"), InputError),
        (lambda: Session(model).save(), InputError),
    ):
        with pytest.raises(error):
            wrong()
    assert (session.tokens, session.turns, session.cuts) == (tokens, turns, cuts)
    same_as_fresh(model, session)
    session.metadata["runtime_adapter.session"] = 1
    with pytest.raises(InputError, match="session's own"):
        session.save()
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.append([1])


def test_a_runtime_that_stops_loses_no_word(model, monkeypatch):
    session = Session(model)
    session.append(WORDS[:20])
    list(session.generate(2))
    tokens = session.tokens

    def fail(self, inputs):
        raise ProgramError("the runtime stopped")

    for change in (
        lambda: session.append(WORDS[:5]),
        lambda: next(session.generate(1)),
        lambda: session.logits,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(method.LoadedMethod, "execute", fail)
            with pytest.raises(ProgramError):
                change()
        assert session.tokens == tokens
    same_as_fresh(model, session)


def test_a_cache_that_was_changed_behind_its_back_is_noticed(model):
    session = Session(model)
    session.append(WORDS[:20])
    model.cache.truncate(0)
    model.forward(WORDS[500:530], start=0)
    assert session.n_cached_tokens == 0
    same_as_fresh(model, session)
    view = next(view for view in model.cache.values() if view.valid)
    view.set(view.valid[0][0], view.get(*view.valid[0]))
    session.append([3])
    assert model.cache.edits == ()
    same_as_fresh(model, session)


def test_a_session_of_a_closed_model_is_an_error():
    model = Model.open(programs.path("stock_fp32"))
    session = Session(model)
    session.append(WORDS[:20])
    model.close()
    with pytest.raises(ClosedModelError):
        session.append([1])


# ------------------------------------------------------------------ what reviews found


def test_turns_move_while_they_are_generated():
    with Model.open(programs.path("stock_fp32")) as model:
        session = Session(model)
        session.append(WORDS[:30])
        session.keep_sink(4, 40)
        assert len(list(session.generate(30))) == 30
        assert session.turns == ((10, 40),)
        session.regenerate()
        assert session.n_tokens == 10
        begun = session.generate(20)
        said = list(itertools.islice(begun, 5))
        session.rewind(to=12)
        said = said[:2] + list(itertools.islice(begun, 3))
        assert (session.turns, session.tokens[10:]) == (((10, 15),), tuple(said))
        session.rewind(to=7)
        next(begun)
        assert session.turns == ((7, 8),)
        session.append(WORDS[:2])
        next(begun)
        assert session.turns == ((7, 8), (10, 11))
        other = session.generate(3)
        next(other)
        next(begun)
        assert session.turns == ((7, 8), (10, 11), (11, 12), (12, 13))


def test_a_conversation_that_filled_the_cache_is_gone_on_with(store):
    with Model.open(programs.path("stock_fp32")) as model:
        with Session(model, store, "full", autosave=True) as session:
            session.append(WORDS[:507])
            list(session.generate())
            assert session.n_tokens == 513
        session = Session(model, store, "full")
        assert (session.n_tokens, len(session.pending)) == (513, 1)
        session.keep_sink(4, 500)
        other = Session(model, store)
        other.append(WORDS[900:910])
        assert next(session.generate(1)) < 96
        assert session.n_tokens < 300


def test_an_edited_conversation_comes_back_with_its_logits(store):
    with Model.open(programs.path("stock_fp32")) as model:
        session = Session(model, store, "chat", store_logits=True)
        session.append(WORDS[:60])
        list(session.generate(3))
        session.strike(4, 24)
        session.append(WORDS[70:73])
        turn_start, expected = session.n_tokens, session.logits
        list(session.generate(4))
        assert [(edit.start, bool(edit.digest)) for edit in session.edits] == [
            (4, True),
            (42, False),
        ]
        session.save()
        other = Session(model)
        other.append(WORDS[800:820])
        session.rewind(to=turn_start)
        assert torch.equal(session.logits, expected)
        model.cache.truncate(0)
        resumed = Session(model, store, "chat", store_logits=True)
        assert resumed.edits[0].start == 4
        assert resumed.regenerate().n_computed_tokens == 0
        assert torch.equal(resumed.logits, expected)


@pytest.mark.parametrize(
    "wrong", [{"model": "model.pte"}, {"store": "sessions.db"}, {"metadata": 5}]
)
def test_parts_of_another_kind_are_refused(model, store, wrong):
    with pytest.raises(InputError, match="expected a"):
        Session(**{"model": model, "store": store, **wrong})


def test_arguments_of_another_kind_are_refused(model):
    session = Session(model)
    session.append(WORDS[:20])
    for wrong in (
        lambda: session.generate(3, stop=5),
        lambda: session.replace(1, 2, 5),
        lambda: session.append(5),
    ):
        with pytest.raises((InputError, TokensError)):
            wrong()


def test_a_fork_changes_nothing_of_the_original(store):
    with Model.open(programs.path("stock_fp32")) as model:
        session = Session(model, store, metadata={"notes": [1]})
        session.append(WORDS[:20])
        session.keep_sink(4, 30)
        fork = session.fork("fork")
        fork.metadata["notes"].append(2)
        assert session.metadata == {"notes": [1]}
        list(fork.generate(40))
        assert fork.n_tokens <= 35


def test_stored_logits_of_another_shape_are_left_out(store):
    with Model.open(programs.path("stock_fp32")) as model:
        session = Session(model, store, "chat", store_logits=True)
        session.append(WORDS[:40])
        list(session.generate(3))
        session.save()
        hit = store.load_session(model.cache, name="chat")
        state = hit.metadata["runtime_adapter.session"]
        for raw in (b"\0\0\0\0", b""):
            state |= {"logits": {"40": raw}, "cuts": [[40, 1]], "pending": [], "turns": []}
            model.cache.truncate(0)
            model.forward(WORDS[:40], start=0)
            store.save_session(model.cache, WORDS[:40], name="chat", metadata=hit.metadata)
            resumed = Session(model, store, "chat")
            resumed.rewind(to=40)
            same_as_fresh(model, resumed)


def test_a_sampler_that_was_set_out_of_range_is_refused_when_it_is_saved(store):
    with Model.open(programs.path("stock_fp32")) as model:
        session = Session(model, store, "chat")
        session.append(WORDS[:20])
        session.sampler.temperature = -1
        with pytest.raises(InputError, match="temperature"):
            session.save()


@pytest.mark.slow
@pytest.mark.parametrize("name", available(NAMES))
def test_a_conversation_with_a_lossy_codec_goes_on_and_says_so(name, tmp_path, run_python):
    """Resumed in another process; what it computed there joins what was stored before."""
    path, program = tmp_path / "sessions.db", programs.path(name)
    options = {"chunk_n_tokens": 16, "checkpoint_n_tokens": 1, "codec": "int8"}
    with Model.open(program) as model, kvstore.open(path, **options) as store:
        with Session(model, store, name="chat") as session:
            session.append(WORDS[:50])
            tokens = (*session.tokens, *session.generate(6))
            session.save()
        is_lossy = store.sessions()[0].codec == "int8"
        assert is_lossy == (name != "quantized_ring")  # that one is quantized already
    done = run_python(
        "import sys, kvstore; from runtime_adapter import Model, Session\n"
        f"store = kvstore.open(sys.argv[1], **{options!r})\n"
        "session = Session(Model.open(sys.argv[2]), store, name='chat')\n"
        "print(session.resumed.n_restored_tokens, bool(session.edits), *session.tokens)\n"
        "session.append([7, 8]); list(session.generate(6)); session.regenerate()\n"
        "list(session.generate(3)); session.save(); session.close(); store.close()\n",
        str(path),
        str(program),
    )
    n_restored, is_marked, *ids = done.stdout.split()
    assert [int(token) for token in ids] == list(tokens)
    assert (int(n_restored) > 40, is_marked) == (True, str(is_lossy))
    with Model.open(program) as model, kvstore.open(path, **options) as store:
        (info,) = store.sessions()
        assert (info.codec == "int8", info.n_tokens) == (is_lossy, len(tokens) + 2 + 3 - 1)
        with Session(model, store, name="chat") as session:
            assert session.resumed.n_restored_tokens >= info.n_tokens - 1
        assert store.verify().ok


@pytest.mark.parametrize("store_logits", [False, True])
def test_behind_a_stored_prompt_the_first_token_takes_no_step(store, store_logits, monkeypatch):
    with Model.open(programs.path("stock_fp32")) as model:
        with Session(model, store, "chat", store_logits=store_logits) as session:
            session.append(WORDS[:40])
            expected = session.logits
            session.save()
        computed = []
        model.cache.truncate(0)
        with Session(model, store, "chat", store_logits=store_logits) as session:
            compute = Model._compute
            monkeypatch.setattr(
                Model,
                "_compute",
                lambda one, piece: computed.append(len(piece)) or compute(one, piece),
            )
            logits = session.logits
            next(session.generate(1))
        assert (sum(computed) == 0) == store_logits
        assert torch.equal(logits, expected)
