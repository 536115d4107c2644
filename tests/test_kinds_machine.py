"""Saving, restoring, going on and going back, in any order, over every layout.

The store is compared with a perfect one, which keeps one set entry for each
token and tensor, and the file with both.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import kvstore
from kvstore import Kind
from kvstore.errors import RewindError
from kvstore.kinds import kind_of
from tests.kinds_oracle import LAYOUTS, PerfectStore, TracedCache, stored_rows
from tests.test_ranges import positions

STORY = [(7 * position * position + 3) % 50 for position in range(140)]
"""What most conversations here begin with, so that they share prefixes."""

MAX_N_TOKENS = 96
CACHES = st.integers(0, 1)
NAMES = st.sampled_from(["a", "b", "c"])


class KindsMachine(RuleBasedStateMachine):
    """Two live caches over one file."""

    layouts: tuple[str, ...] = tuple(LAYOUTS)

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kinds-"))
        self.store = None

    @initialize(data=st.data())
    def begin(self, data):
        name = data.draw(st.sampled_from(self.layouts), label="layout")
        self.layout = LAYOUTS[name]
        self.options = {
            "chunk_n_tokens": data.draw(st.sampled_from([4, 8, 16, 32]), label="chunk"),
            "checkpoint_n_tokens": data.draw(st.sampled_from([1, 1, 10]), label="checkpoint"),
        }
        self.perfect = PerfectStore(self.layout)
        self.caches = [TracedCache(self.layout), TracedCache(self.layout)]
        self.reopen()

    @rule()
    def reopen(self):
        if self.store is not None:
            self.store.close()
        self.store = kvstore.open(self.folder / "sessions.db", **self.options)

    @rule(which=CACHES)
    def restart(self, which):
        self.caches[which] = TracedCache(self.layout)

    @rule(which=CACHES, n_tokens=st.integers(1, 24), stray=st.none() | st.integers(0, 2))
    def compute(self, which, n_tokens, stray):
        """Go on with the story, or leave it with a token of one's own."""
        cache = self.caches[which]
        start = len(cache.tokens)
        stop = min(start + n_tokens, MAX_N_TOKENS)
        tokens = STORY[start:stop]
        if tokens and stray is not None:
            tokens[len(tokens) // 2] = 60 + stray
        cache.compute(tokens)

    @rule(which=CACHES, n_tokens=st.integers(0, MAX_N_TOKENS))
    def rewind(self, which, n_tokens):
        cache = self.caches[which]
        n_tokens = min(n_tokens, len(cache.tokens))
        possible = cache.can_truncate(n_tokens)
        before = (list(cache.tokens), [bytes(one) for one in cache.memory])
        try:
            cache.truncate(n_tokens)
        except RewindError:
            assert not possible
            assert (list(cache.tokens), [bytes(one) for one in cache.memory]) == before
        else:
            assert possible

    @rule(
        which=CACHES,
        name=st.none() | NAMES,
        n_left_out=st.just(0) | st.integers(0, 40),
    )
    def save(self, which, name, n_left_out):
        cache = self.caches[which]
        ids = list(cache.tokens)[: max(1, len(cache.tokens) - n_left_out)]
        if not ids:
            return
        result = self.store.save_session(cache, ids, name=name)
        assert (result.n_tokens, result.n_new_tokens + result.n_present_tokens) == (len(ids),) * 2
        before = set(self.perfect.rows)
        former = self.perfect.sessions.get(name, [])
        self.perfect.save(cache, ids, name)
        stored, matched = stored_rows(self.store.path)
        assert not stored - self.perfect.rows, "what nobody saved is there"
        lost = self.perfect.rows - stored
        assert not lost - before, "what was just saved is not there"
        if former == ids[: len(former)]:  # else what only the former session needed may go
            assert matched == self.perfect.matched
            if self.options["checkpoint_n_tokens"] == 1:
                assert not lost, "what was saved before is gone"
            assert all(self.layout.tensors[index].kind is Kind.CHECKPOINT for index, _ in lost)
        self.perfect.rows, self.perfect.matched = stored, matched

    @rule(
        which=CACHES,
        n_tokens=st.integers(1, MAX_N_TOKENS),
        n_strays=st.integers(0, 3),
        source=st.none() | NAMES,
    )
    def load(self, which, n_tokens, n_strays, source):
        """By tokens: of the story or of a session, with others behind it."""
        ids = self.perfect.sessions.get(source, STORY)[:n_tokens] + [70, 71, 72][:n_strays]
        self._check_load(which, ids)

    @rule(which=CACHES, other=CACHES)
    def load_what_a_cache_holds(self, which, other):
        if self.caches[other].tokens:
            self._check_load(which, list(self.caches[other].tokens))

    @precondition(lambda self: self.perfect.sessions)
    @rule(which=CACHES, data=st.data())
    def load_by_name(self, which, data):
        name = data.draw(st.sampled_from(sorted(self.perfect.sessions)), label="name")
        self._check_load(which, self.perfect.sessions[name], name=name)

    def _check_load(self, which, ids, *, name=None):
        cache = self.caches[which]
        n_tokens, reasons = self.perfect.expected(cache, ids)
        kept = self.perfect.kept_n_tokens(cache, ids)
        if name is None:
            result = self.store.load_session(cache, ids)
        else:
            result = self.store.load_session(cache, name=name)
            assert list(result.tokens) == ids
        note(f"{result.n_tokens} of {len(ids)}: {result.reason} {result.detail}")
        assert result.n_tokens == n_tokens
        assert result.reason in reasons
        assert result.n_kept_tokens == min(kept, n_tokens)
        assert result.has_logits == (n_tokens == len(ids))
        assert list(cache.tokens) == ids[:n_tokens]

    @precondition(lambda self: self.perfect.sessions)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.perfect.sessions)), label="name")
        others = {
            other: self.perfect.servable([*ids, 99])
            for other, ids in self.perfect.sessions.items()
            # What was pruned and saved again by another name is that one's alone.
            if other != name and not self.perfect.has_pruned
        }
        self.store.delete_session(name)
        del self.perfect.sessions[name]
        self._compare_after_deletion()
        for other, n_tokens in others.items():
            assert self.perfect.servable([*self.perfect.sessions[other], 99]) == n_tokens, other

    @precondition(lambda self: self.perfect.rows)
    @rule(n_pages=st.integers(1, 4), all_of_it=st.sampled_from([False, False, True]))
    def prune(self, n_pages, all_of_it):
        if all_of_it:
            self.store.prune(model=self.caches[0].fingerprint.model)
        else:
            page_nbytes = 16384
            self.store.prune(
                max_bytes=max(1, self.store.stats().file_nbytes - n_pages * page_nbytes)
            )
        self.perfect.has_pruned = True
        self._compare_after_deletion()
        assert {one.name for one in self.store.sessions()} == set(self.perfect.sessions)

    def _compare_after_deletion(self):
        stored, matched = stored_rows(self.store.path)
        assert stored <= self.perfect.rows
        self.perfect.rows, self.perfect.matched = stored, matched

    @invariant()
    def every_cache_holds_what_the_model_computes(self):
        for cache in self.caches if self.store else []:
            assert cache.wrong() == []
            for index, spec in enumerate(self.layout.tensors):
                resident = kind_of(spec).resident(spec, cache.held)
                assert positions(resident) == cache.resident(index)

    @invariant()
    def the_file_is_sound(self):
        if self.store is not None:
            assert self.store.verify().problems == ()

    def teardown(self):
        if self.store is not None:
            self.store.close()
        shutil.rmtree(self.folder)


def run(names, **options):
    class Machine(KindsMachine):
        layouts = tuple(names)

    run_state_machine_as_test(Machine, settings=settings(**options))


def test_a_few_steps_over_all_layouts():
    run(LAYOUTS, max_examples=12, stateful_step_count=20)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_many_steps_over_each_layout(name):
    run([name], stateful_step_count=30)
