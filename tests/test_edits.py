"""Content behind an edit: stored under keys that carry it, and never an answer without it."""

from __future__ import annotations

import struct
import tempfile
from array import array
from pathlib import Path

import pytest
from fakes import BytesCache, checkpoint_tensors, digest, layout, logits_tensor, ring_tensors
from hypothesis import given
from hypothesis import strategies as st

import kvstore
from kvstore import Edit, Layout
from kvstore.errors import InputError
from kvstore.lineage import (
    edited,
    extras_up_to,
    lineage_of,
    n_common_tokens,
    pack_extras,
    unpack_extras,
)

TOKENS = list(range(100, 130))
CHUNK_N_TOKENS = 8

LAYOUTS = {
    "full": layout(),
    "head_major": layout(dtype="float16", head_major=True),
    "ring": Layout(
        tensors=(*layout(n_layers=1).tensors, *ring_tensors(layer=1, window_n_tokens=6))
    ),
    "sink": Layout(tensors=ring_tensors(layer=0, window_n_tokens=5, sink_n_tokens=3)),
    "recurrent": Layout(
        tensors=(*layout(n_layers=1).tensors, *checkpoint_tensors(layer=1), logits_tensor())
    ),
}


def computed(tokens, *edits, one=None):
    """A cache of ``tokens``; each edit ``(start, n_tokens, what)`` is made at that length."""
    cache = BytesCache(one)
    for start, n_tokens, what in edits:
        cache.compute(tokens[len(cache.tokens) : n_tokens])
        cache.edit(start, what)
    cache.compute(tokens[len(cache.tokens) :])
    return cache


# ---------------------------------------------------------------- the lineage itself


LINEAGES = st.dictionaries(st.integers(0, 40), st.sampled_from("ab"), max_size=4).map(
    lambda edits: tuple(Edit(start, digest(what)) for start, what in sorted(edits.items()))
)


@given(LINEAGES, st.integers(0, 40), st.integers(1, 20))
def test_extras_come_back_as_the_edits_of_their_range(lineage, start, n_tokens):
    stop = start + n_tokens
    inside = tuple(edit for edit in lineage if start <= edit.start < stop)
    assert unpack_extras(pack_extras(lineage, start, stop), start, stop) == inside


@given(st.binary(max_size=100), st.integers(0, 5), st.integers(1, 9))
def test_extras_of_any_bytes_are_refused_or_say_the_same_again(extras, start, n_tokens):
    try:
        lineage = unpack_extras(extras, start, start + n_tokens)
    except InputError:
        return
    assert pack_extras(lineage, start, start + n_tokens) == extras


@given(LINEAGES, LINEAGES, st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_common_tokens_are_those_with_equal_pasts(one, other, ids, other_ids):
    def past(lineage, tokens, position):
        return tokens[: position + 1], [edit for edit in lineage if edit.start <= position]

    expected = 0
    while expected < min(len(ids), len(other_ids)) and (
        past(one, ids, expected) == past(other, other_ids, expected)
    ):
        expected += 1
    assert n_common_tokens(array("Q", ids), one, array("Q", other_ids), other) == expected


@given(LINEAGES, st.integers(0, 40), st.integers(1, 20))
def test_extras_up_to_the_next_edit(lineage, start, n_tokens):
    stop = start + n_tokens
    found = extras_up_to(lineage, start, stop)
    assert [end for _, end in found] == sorted({end for _, end in found})
    assert found[-1] == (pack_extras(lineage, start, stop), stop)
    for extras, end in found:
        # Up to there, these are all edits that there are.
        assert extras == pack_extras(lineage, start, end)


def test_an_edit_stands_for_all_that_lies_behind_it():
    lineage = (Edit(3, digest("a")), Edit(7, digest("b")), Edit(9, digest("c")))
    assert edited(lineage, Edit(7, digest("d"))) == (lineage[0], Edit(7, digest("d")))


@pytest.mark.parametrize(
    "edits",
    [
        [(3, digest("a"))],
        3,
        [Edit(3, digest("a")), Edit(3, digest("b"))],
        [Edit(4, digest("a")), Edit(3, digest("b"))],
    ],
    ids=["a tuple", "a number", "twice at one place", "out of order"],
)
def test_what_is_no_lineage_is_refused(store, edits):
    with pytest.raises(InputError, match="edits"):
        lineage_of(edits)
    with pytest.raises(InputError, match="edits"):
        store.load_session(BytesCache(), TOKENS, edits=edits)


@pytest.mark.parametrize(
    ("start", "content"),
    [(-1, bytes(32)), (2**63, bytes(32)), (True, bytes(32)), (1, b"short"), (1, "")],
)
def test_what_is_no_edit_is_refused(start, content):
    with pytest.raises(InputError, match="edit"):
        Edit(start, content)


# ---------------------------------------------------------------- in a store


def test_what_lies_behind_an_edit_comes_back_by_name_and_by_its_edits(store):
    cache = computed(TOKENS, (13, 20, "struck"))
    saved = store.save_session(cache, TOKENS, name="a")
    assert (saved.n_tokens, saved.n_exact_tokens, saved.n_new_tokens) == (30, 13, 30)
    for wanted in ({"name": "a"}, {"tokens": TOKENS, "edits": cache.edits}):
        restored = BytesCache()
        hit = store.load_session(restored, **wanted)
        assert (hit.n_tokens, hit.reason) == (29, None)
        assert hit.edits == restored.edits == cache.edits
        assert restored.wrong() == []
        assert restored.used() == [slots[:29] for slots in cache.used()]


def test_what_lies_behind_an_edit_never_answers_for_the_tokens_alone(store):
    store.save_session(computed(TOKENS, (13, 20, "struck")), TOKENS, name="a")
    restored = BytesCache()
    hit = store.load_session(restored, TOKENS)
    assert (hit.n_tokens, hit.edits, hit.reason) == (13, (), kvstore.MissReason.NO_MATCH)
    assert restored.wrong() == []


def test_nor_does_it_answer_for_another_edit(store):
    store.save_session(computed(TOKENS, (13, 20, "struck")), TOKENS)
    for other in ((13, 20, "otherwise"), (14, 20, "struck"), (11, 20, "struck")):
        edits = computed(TOKENS, other).edits
        restored = BytesCache()
        assert store.load_session(restored, TOKENS, edits=edits).n_tokens == min(13, other[0])
        assert restored.wrong() == []


def test_exact_tokens_stay_shared_before_and_behind_an_edit(store):
    store.save_session(computed(TOKENS), TOKENS, name="exact")
    saved = store.save_session(computed(TOKENS, (13, 20, "struck")), TOKENS, name="edited")
    assert (saved.n_present_tokens, saved.n_new_tokens) == (13, 17)
    assert saved.raw_nbytes == 17 * layout().token_nbytes
    again = store.save_session(computed(TOKENS), TOKENS, name="exact")
    assert again.n_new_tokens == 0


def test_an_edited_session_that_goes_on_writes_new_tokens_only(store):
    cache = computed(TOKENS[:20], (13, 20, "struck"))
    store.save_session(cache, cache.tokens, name="a")
    cache.compute(TOKENS[20:23])
    saved = store.save_session(cache, cache.tokens, name="a")
    assert (saved.n_new_tokens, saved.raw_nbytes) == (3, 3 * layout().token_nbytes)
    again = store.save_session(cache, cache.tokens, name="a")
    assert (again.n_new_tokens, again.raw_nbytes) == (0, 0)


def test_what_is_computed_again_behind_an_edit_is_not_what_was_edited(store):
    """The same tokens behind the same edit: once edited themselves, once computed on top."""
    cache = computed(TOKENS, (13, 30, "struck"))
    store.save_session(cache, TOKENS, name="edited")
    assert cache.edits == (Edit(13, digest("struck")),)
    cache.truncate(20)
    cache.compute(TOKENS[20:])
    assert cache.edits == (Edit(13, digest("struck")), Edit(20, b""))
    assert store.save_session(cache, TOKENS, name="computed").n_present_tokens == 20
    for name in ("edited", "computed"):
        restored = BytesCache()
        assert store.load_session(restored, name=name).n_tokens == 29
        assert restored.wrong() == []
    restored.compute(TOKENS[29:])
    assert restored.edits == cache.edits


def test_a_session_that_is_edited_again_lets_go_of_what_it_was(store):
    for number in range(10):
        cache = computed(TOKENS, (4, 30, f"edit {number}"))
        store.save_session(cache, TOKENS, name="a")
        restored = BytesCache()
        assert store.load_session(restored, name="a").edits == cache.edits
        assert restored.wrong() == []
    stats = store.stats()
    assert stats.n_chunks <= 5  # the exact start, and one chain
    store.delete_session("a")
    assert store.stats().n_chunks <= 1  # the exact start is cache like any other


def test_an_eviction_takes_the_edit_with_it(store):
    cache = computed(TOKENS, (13, 20, "struck"))
    store.save_session(cache, TOKENS, name="a")
    store.prune(max_bytes=0)
    restored = BytesCache()
    hit = store.load_session(restored, name="a")
    assert (hit.n_tokens, hit.edits, list(hit.tokens)) == (0, (), TOKENS)
    restored.compute(TOKENS)
    store.save_session(restored, TOKENS, name="a")
    again = BytesCache()
    assert store.load_session(again, TOKENS).n_tokens == 29
    assert again.wrong() == []


def test_edits_with_a_name_are_refused(store):
    with pytest.raises(InputError, match="its own"):
        store.load_session(BytesCache(), name="a", edits=[Edit(3, digest("a"))])


@pytest.mark.parametrize("start", [0, 8, 16])
def test_an_edit_at_the_border_of_a_chunk_needs_no_chunk_of_its_own(store, start):
    cache = computed(TOKENS, (start, 30, "set"))
    store.save_session(cache, TOKENS, name="a")
    assert store.stats().n_chunks == 4
    restored = BytesCache()
    assert store.load_session(restored, name="a").n_tokens == 29
    assert restored.wrong() == []


@pytest.mark.parametrize(
    "edits",
    [
        [(5, 12, "struck")],
        [(5, 16, "struck")],
        [(5, 12, "struck"), (16, 20, "set")],
        [(5, 30, "struck"), (6, 30, "set"), (16, 30, "set"), (24, 30, "set")],
        [(5, 8, "struck"), (10, 12, "set"), (11, 13, "set"), (12, 14, "set")],
    ],
)
def test_whatever_is_edited_later_the_exact_start_is_found(store, edits):
    cache = computed(TOKENS, *edits)
    store.save_session(cache, TOKENS, name="a")
    restored = BytesCache()
    assert store.load_session(restored, TOKENS).n_tokens == 5
    assert restored.wrong() == []
    restored = BytesCache()
    assert store.load_session(restored, name="a").n_tokens == 29
    assert restored.wrong() == []


def test_an_edit_for_every_token_is_stored_in_few_chunks(open_store):
    tokens = list(range(120))
    cache = BytesCache(layout(n_layers=1))
    for token in tokens:
        cache.compute([token])
        cache.edit(len(cache.tokens) - 1, f"set {token}")
    store = open_store(chunk_n_tokens=64)
    store.save_session(cache, tokens, name="a")
    assert store.stats().n_chunks <= 6
    restored = BytesCache(layout(n_layers=1))
    assert store.load_session(restored, name="a").n_tokens == 119
    assert restored.wrong() == []


def test_extras_that_go_on_and_on_are_refused_where_they_go_wrong():
    item = struct.pack("<BII", 1, 0, 0)
    with pytest.raises(InputError, match="at 0"):
        unpack_extras(item * 4_000_000, 0, 1 << 16)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("compute"), st.integers(0, 2), st.integers(1, 12)),
        st.tuples(st.just("edit"), st.integers(0, 40), st.sampled_from("xy")),
        st.tuples(st.just("cut"), st.integers(0, 40), st.none()),
        st.tuples(st.just("save"), st.sampled_from(["a", "b", None]), st.none()),
        st.tuples(st.just("load"), st.sampled_from(["a", "b"]), st.none()),
        st.tuples(st.just("look up"), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("prune"), st.integers(0, 3), st.none()),
    ),
    max_size=25,
)


class Walk:
    """Random steps on one live cache and a store; what is restored is never wrong."""

    def __init__(self, store, one):
        self.store = store
        self.one = one
        self.cache = BytesCache(one)
        self.sessions = {}

    def step(self, what, number, more):
        store, cache = self.store, self.cache
        n_tokens = len(cache.tokens)
        if what == "compute" and n_tokens + more <= cache.capacity_n_tokens:
            cache.compute([number + position % 2 for position in range(more)])
        elif what == "edit" and n_tokens:
            cache.edit(min(number, n_tokens - 1) if cache.layout.is_full else 0, more)
        elif what == "cut":
            cache.truncate(min(number, n_tokens) if cache.layout.is_full else 0)
        elif what == "save" and n_tokens:
            store.save_session(cache, cache.tokens, name=number)
            if number is not None:
                self.sessions[number] = (list(cache.tokens), cache.edits)
        elif what == "load" and number in self.sessions:
            ids, edits = self.sessions[number]
            hit = store.load_session(cache, name=number)
            assert list(hit.tokens) == ids
            # Fewer edits only if what lay behind them is not stored any more.
            assert hit.edits == cache.edits == edits[: len(hit.edits)]
        elif what == "look up":
            ids = [*cache.tokens, number]
            store.load_session(cache, ids, edits=cache.edits if more else ())
        elif what == "prune":
            store.prune(max_bytes=store.stats().file_nbytes - number * 16384)
        assert cache.wrong() == []


@pytest.mark.parametrize("kind", LAYOUTS)
@given(steps=STEPS)
def test_any_walk_restores_only_what_was_there(kind, steps):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.db"
        with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS) as store:
            walk = Walk(store, LAYOUTS[kind])
            for step in steps:
                walk.step(*step)
            assert store.verify().problems == ()
            for name, (ids, edits) in walk.sessions.items():
                cache = BytesCache(LAYOUTS[kind])
                hit = store.load_session(cache, name=name)
                assert list(hit.tokens) == ids
                assert hit.edits == edits[: len(hit.edits)]
                assert cache.wrong() == []
