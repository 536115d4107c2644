"""Random work on a store, against a perfect model of it in memory.

The model knows every sequence that was saved and every session. After each
step: what is loaded is exactly right, so is the reason, and the file verifies.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

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
from kvstore import MissReason
from tests.fakes import BytesCache, layout
from tests.oracle import assert_exact

CAPACITY = 48
NAMES = st.sampled_from(["a", "b", "c"])
FEW_TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
SMALL = layout(n_layers=1, n_kv_heads=1, dtype="float16", capacity_n_tokens=CAPACITY)


def common(left, right):
    n_tokens = 0
    while n_tokens < min(len(left), len(right)) and left[n_tokens] == right[n_tokens]:
        n_tokens += 1
    return n_tokens


class StoreMachine(RuleBasedStateMachine):
    """One live cache, one file, and what must be in them."""

    @initialize(chunk_n_tokens=st.sampled_from([1, 2, 5, 8, 20, 64]), head_major=st.booleans())
    def open(self, chunk_n_tokens, head_major):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "sessions.db"
        self.chunk_n_tokens = chunk_n_tokens
        self.store = kvstore.open(self.path, chunk_n_tokens=chunk_n_tokens)
        self.layout = layout(
            n_layers=1,
            n_kv_heads=2 if head_major else 1,
            dtype="float16",
            capacity_n_tokens=CAPACITY,
            head_major=head_major,
        )
        self.cache = BytesCache(self.layout)
        self.sessions: dict[str, tuple[list[int], int]] = {}
        self.unnamed: list[list[int]] = []
        self.pruned = False  # from then on, how much is left is not known exactly
        self.n_turns = 0

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()

    def at_least(self, tokens):
        """How many of ``tokens`` named sessions must still serve."""
        if self.pruned:
            return 0
        return max([0, *(common(tokens, saved) for saved, _ in self.sessions.values())])

    def at_most(self, tokens):
        """How many of ``tokens`` were ever saved."""
        return max([0, *(common(tokens, saved) for saved in self.unnamed)])

    @rule(tokens=FEW_TOKENS)
    def compute(self, tokens):
        self.cache.compute(tokens[: CAPACITY - len(self.cache.tokens)])

    @rule(data=st.data())
    def rewind(self, data):
        self.cache.truncate(data.draw(st.integers(0, len(self.cache.tokens))))

    @precondition(lambda self: len(self.cache.tokens))
    @rule(name=st.none() | NAMES, data=st.data())
    def save(self, name, data):
        live = list(self.cache.tokens)
        tokens = live[: data.draw(st.integers(1, len(live)))]
        self.n_turns += 1
        result = self.store.save_session(
            self.cache, tokens, name=name, metadata={"turn": self.n_turns}
        )
        assert result.n_tokens == len(tokens)
        assert result.n_present_tokens + result.n_new_tokens == len(tokens)
        assert self.at_least(tokens) <= result.n_present_tokens <= self.at_most(tokens)
        self.unnamed.append(tokens)
        if name is not None:
            self.sessions[name] = (tokens, self.n_turns)
        assert self.store.save_session(self.cache, tokens).n_new_tokens == 0

    @rule(tokens=FEW_TOKENS, data=st.data())
    def load(self, tokens, data):
        known = [list(self.cache.tokens), *self.unnamed]
        start = data.draw(st.sampled_from(known))
        prompt = [*start[: data.draw(st.integers(0, len(start)))], *tokens]
        self.check_load(prompt, self.store.load_session, prompt)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def load_by_name(self, data):
        name = data.draw(st.sampled_from(sorted(self.sessions)))
        tokens, turn = self.sessions[name]
        result = self.check_load(tokens, self.store.load_session, name=name)
        assert list(result.tokens) == tokens
        assert result.metadata == {"turn": turn}
        assert result.session == name

    def check_load(self, prompt, load, *arguments, **options):
        live = list(self.cache.tokens)
        result = load(self.cache, *arguments, **options)
        assert_exact(self.cache, prompt[: result.n_tokens])
        limit = min(len(prompt) - 1, CAPACITY)
        kept = common(live, prompt[:limit])
        assert result.n_kept_tokens == kept
        assert max(kept, self.at_least(prompt[:limit])) <= result.n_tokens
        assert result.n_tokens <= max(kept, self.at_most(prompt[:limit]))
        if result.n_tokens == len(prompt) - 1:
            assert result.reason is None
        elif result.n_tokens == CAPACITY:
            assert result.reason is MissReason.CAPACITY
        elif any(
            common(saved, prompt[:-1]) > result.n_tokens for saved, _ in self.sessions.values()
        ):
            assert result.reason is MissReason.EVICTED
        else:
            assert result.reason is MissReason.NO_MATCH
        return result

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.sessions)))
        del self.sessions[name]
        self.store.delete_session(name)

    @rule(unused=st.booleans(), share=st.integers(0, 4))
    def prune(self, unused, share):
        stats = self.store.stats()
        limits = {"max_bytes": stats.file_nbytes * share // 4}
        if unused:
            limits = {"unused_for_seconds": 0 if share else 1000}
        dry = self.store.prune(**limits, dry_run=True)
        assert self.store.stats() == stats
        real = self.store.prune(**limits)
        if not unused:
            assert (dry.n_chunks, dry.freed_nbytes) == (real.n_chunks, real.freed_nbytes)
        assert self.store.stats().n_chunks == stats.n_chunks - real.n_chunks
        self.pruned = self.pruned or real.n_chunks > 0

    @rule()
    def reopen(self):
        self.store.close()
        self.store = kvstore.open(self.path, chunk_n_tokens=self.chunk_n_tokens)

    @rule()
    def another_process_starts_with_an_empty_cache(self):
        self.cache = BytesCache(self.layout)

    @invariant()
    def the_file_says_what_the_model_says(self):
        if not hasattr(self, "store"):
            return
        assert self.store.verify().problems == ()
        rows = {row.name: row for row in self.store.sessions()}
        assert set(rows) == set(self.sessions)
        for name, (tokens, turn) in self.sessions.items():
            assert rows[name].n_tokens == len(tokens)
            assert rows[name].metadata == {"turn": turn}
            if not self.pruned:
                assert rows[name].n_stored_tokens == len(tokens)
        if not self.sessions and not self.unnamed:
            assert self.store.stats().n_chunks == 0


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=max(5, settings().max_examples // 3), stateful_step_count=20, deadline=None
)
