"""Random work of two stores on one file whose codec learns bases, after very few tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import kvstore
from kvstore.codec import CodecChoice
from tests.fakes import SmoothCache, layout

CAPACITY = 96
NAMES = st.sampled_from("abc")
STORES = st.sampled_from([0, 1])
TOKENS = st.builds(
    lambda runs: [token for token, n_tokens in runs for _ in range(n_tokens)],
    st.lists(st.tuples(st.integers(0, 2), st.integers(4, 25)), min_size=1, max_size=3),
)
LAYOUT = layout(n_layers=1, capacity_n_tokens=CAPACITY, n_kv_heads=1, head_dim=16)


def numbers(cache, index, n_tokens):
    return np.frombuffer(cache.memory[index], "<f4").reshape(CAPACITY, -1)[:n_tokens]


class BasesMachine(RuleBasedStateMachine):
    """Two stores with a live cache each; whatever is loaded is near what the model computes."""

    @initialize(
        chunk_n_tokens=st.sampled_from([5, 8, 20]), codec=st.sampled_from(["pca", "k=pca,v=int8"])
    )
    def open(self, chunk_n_tokens, codec):
        self.few = mock.patch("kvstore.training.MIN_TRAINING_N_TOKENS", 20)
        self.few.start()
        self.folder = tempfile.TemporaryDirectory()
        self.options = {"chunk_n_tokens": chunk_n_tokens, "codec": codec}
        path = Path(self.folder.name) / "s.db"
        self.stores = [kvstore.open(path, **self.options) for _ in range(2)]
        self.caches = [SmoothCache(LAYOUT) for _ in range(2)]
        self.names = set()

    def teardown(self):
        if hasattr(self, "stores"):
            for store in self.stores:
                store.close()
            self.folder.cleanup()
            self.few.stop()

    @rule(which=STORES, tokens=TOKENS, name=st.none() | NAMES, background=st.booleans())
    def compute(self, which, tokens, name, background):
        cache = self.caches[which]
        cache.compute(tokens[: CAPACITY - len(cache.tokens)])
        self.save(which, name, background)

    @rule(which=STORES, data=st.data())
    def rewind(self, which, data):
        cache = self.caches[which]
        cache.truncate(data.draw(st.integers(0, len(cache.tokens))))

    @precondition(lambda self: any(cache.tokens for cache in self.caches))
    @rule(which=STORES, what=st.sampled_from("xy"), data=st.data())
    def edit(self, which, what, data):
        cache = self.caches[which]
        if cache.tokens and all(not edit.start for edit in cache.edits):
            start = data.draw(st.integers(0, len(cache.tokens) - 1))
            was = [numbers(cache, index, start).copy() for index in range(2)]
            cache.edit(start, what)
            for index in range(2):  # what lies before it stays as it is
                numbers(cache, index, start)[:] = was[index]

    def save(self, which, name, background):
        cache, store = self.caches[which], self.stores[which]
        if not cache.tokens:
            return
        options = {"name": name, "replace": True, "background": background}
        saved = store.save_session(cache, cache.tokens, **options)
        saved = saved.result(60) if background else saved
        assert saved.n_tokens == len(cache.tokens)
        if name is not None:
            self.names.add(name)

    @rule(which=STORES, tokens=TOKENS)
    def load(self, which, tokens):
        cache = self.caches[which]
        prompt = [*cache.tokens, *tokens]
        edits = cache.edits
        hit = self.stores[which].load_session(cache, prompt, edits=edits)
        assert hit.n_tokens >= min(hit.n_kept_tokens, CAPACITY)
        self.check(cache)

    @precondition(lambda self: self.names)
    @rule(which=STORES, data=st.data())
    def load_by_name(self, which, data):
        name = data.draw(st.sampled_from(sorted(self.names)))
        cache = self.caches[which] = SmoothCache(LAYOUT)
        hit = self.stores[which].load_session(cache, name=name)
        n_stored = {one.name: one.n_stored_tokens for one in self.stores[which].sessions()}[name]
        assert hit.n_tokens >= min(n_stored, hit.n_requested - 1)
        self.check(cache)

    @precondition(lambda self: self.names)
    @rule(which=STORES, data=st.data())
    def delete(self, which, data):
        name = data.draw(st.sampled_from(sorted(self.names)))
        self.names.remove(name)
        self.stores[which].delete_session(name)

    @rule(which=STORES, share=st.integers(0, 3))
    def prune(self, which, share):
        store = self.stores[which]
        store.prune(max_bytes=store.stats().file_nbytes * share // 4)

    @rule(which=STORES)
    def reopen(self, which):
        path = self.stores[which].path
        self.stores[which].close()
        self.stores[which] = kvstore.open(path, **self.options)
        self.caches[which] = SmoothCache(LAYOUT)

    def check(self, cache):
        """No row is further off than two passes through the codec take it."""
        n_tokens = len(cache.tokens)
        for index, spec in enumerate(LAYOUT.tensors):
            now = numbers(cache, index, n_tokens)
            was = [np.frombuffer(cache.truth(index, at), "<f4") for at in range(n_tokens)]
            assert np.isfinite(now).all()
            if n_tokens:
                off = np.sqrt(np.square(now - np.array(was)).mean(axis=1))
                assert (off < 1.5).all(), spec.name  # numbers are around 3

    @invariant()
    def the_file_is_sound(self):
        if not hasattr(self, "stores"):
            return
        for store in self.stores:
            assert store.verify().problems == ()
            rows = {row.name: row for row in store.sessions()}
            assert set(rows) == self.names
        stats = self.stores[0].stats()
        assert stats.n_chunks or not stats.bases_nbytes


def test_the_codecs_of_the_machine_are_as_they_are_given():
    for text in ("pca", "k=pca,v=int8"):
        assert "pca" in CodecChoice(text).names(LAYOUT)


TestBasesMachine = BasesMachine.TestCase
TestBasesMachine.settings = settings(
    max_examples=max(5, settings().max_examples // 5), stateful_step_count=20, deadline=None
)
