"""What every live cache must do, whatever holds its memory and whatever kinds of state it has.

Subclass ``CacheConformance``, say how to make an empty cache and how to compute, and
pytest does the rest. Nothing here knows a kind's arithmetic: what the next step can
read is worked out position by position (``tests.kinds_oracle.readable``) and compared
with a cache that never stopped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import pytest

import kvstore
from kvstore import Kind, LiveCache, MissReason
from kvstore.errors import (
    CacheMismatchError,
    CapacityError,
    InputError,
    RewindError,
    TokensError,
)
from tests.kinds_oracle import readable
from tests.oracle import raw


class CacheConformance(ABC):
    """The suite. A conversation is ``tokens``, computed in pieces that end at ``stops``."""

    tokens: Sequence[int] = [(7 * position * position + 3) % 50 for position in range(64)]
    others: Sequence[int] = [(5 * position + 1) % 50 for position in range(64)]
    stops: Sequence[int] = (1, 6, 9, 16, 17, 30, 44)
    chunk_n_tokens: int = 8

    @abstractmethod
    def new(self) -> LiveCache:
        """A cache of the same model as every other one, as freshly loaded."""

    @abstractmethod
    def compute(self, cache: LiveCache, tokens: Sequence[int]) -> None:
        """Let the model compute ``tokens`` behind what the cache holds, in one piece."""

    def go_on(self, cache: LiveCache, stop: int, tokens: Sequence[int] | None = None) -> None:
        """Compute up to ``stop`` in the pieces of the conversation: other cuts, other low bits."""
        tokens = self.tokens if tokens is None else tokens
        for following in self.stops:
            if len(cache.tokens) < following <= stop:
                self.compute(cache, tokens[len(cache.tokens) : following])
        assert list(cache.tokens) == list(tokens[:stop])

    def computed(self, stop: int, tokens: Sequence[int] | None = None) -> LiveCache:
        """A new cache with the conversation up to ``stop``."""
        cache = self.new()
        self.go_on(cache, stop, tokens)
        return cache

    def leaving(self, stop: int) -> list[int]:
        """A prompt that leaves the conversation at ``stop``."""
        return [*self.tokens[:stop], self.tokens[stop] ^ 1]

    def unstopped(self) -> dict[int, dict[tuple[str, int], bytes]]:
        """What can be read at each stop of a cache that computed all of it."""
        cache, found = self.new(), {}
        for stop in self.stops:
            self.go_on(cache, stop)
            found[stop] = readable(cache)
        return found

    @property
    def last(self) -> int:
        """The length of the whole conversation."""
        return self.stops[-1]

    @pytest.fixture
    def turns(self, open_store):
        """A store to which the conversation was saved at every stop."""
        store = open_store(chunk_n_tokens=self.chunk_n_tokens, checkpoint_n_tokens=1)
        cache = self.new()
        for stop in self.stops:
            self.go_on(cache, stop)
            store.save_session(cache, cache.tokens, name="chat")
        return store

    # ------------------------------------------------------------------ the protocol

    def test_a_new_cache_is_empty(self):
        cache = self.new()
        assert list(cache.tokens) == []
        assert (cache.held.n_tokens, cache.held.restored_n_tokens) == (0, 0)
        assert cache.edits == ()

    def test_the_fingerprint_is_the_models_and_names_the_layout(self):
        one, other = self.new(), self.computed(self.last)
        assert one.fingerprint == other.fingerprint
        assert one.layout == other.layout
        assert one.fingerprint.layout == one.layout.digest

    def test_a_buffer_is_the_tensors_own_writable_bytes(self):
        cache = self.new()
        for index, spec in enumerate(cache.layout.tensors):
            buffer = cache.buffer(index)
            assert (buffer.format, buffer.ndim, buffer.nbytes) == ("B", 1, spec.nbytes)
            assert buffer.c_contiguous
            assert not buffer.readonly
            before = buffer[-1]
            buffer[-1] = before ^ 1
            assert cache.buffer(index)[-1] == before ^ 1
            buffer[-1] = before

    def test_computed_tokens_are_held_and_adopted_ones_too(self):
        cache = self.computed(self.last)
        assert cache.held.n_tokens == cache.held.peak_n_tokens == self.last
        cache.truncate(0)
        cache.adopt(self.tokens[:5])
        assert list(cache.tokens) == list(self.tokens[:5])
        assert cache.held.n_tokens == cache.held.restored_n_tokens == 5
        cache.truncate(0)

    @pytest.mark.parametrize("beyond", [1, 1000])
    def test_a_length_that_it_does_not_have_is_refused(self, beyond):
        cache = self.computed(self.stops[2])
        for n_tokens in (self.stops[2] + beyond, -beyond):
            with pytest.raises((CapacityError, InputError)):
                cache.truncate(n_tokens)
        assert len(cache.tokens) == self.stops[2]

    def test_an_emptied_cache_computes_as_a_new_one(self):
        cache = self.computed(self.last, self.others)
        cache.truncate(0)
        assert list(cache.tokens) == []
        self.go_on(cache, self.last)
        assert readable(cache) == self.unstopped()[self.last]

    def test_going_back_gives_what_was_there_or_is_refused_and_changes_nothing(self):
        unstopped = self.unstopped()
        for stop in self.stops:
            cache = self.computed(self.last)
            try:
                cache.truncate(stop)
            except RewindError:
                assert readable(cache) == unstopped[self.last]
                assert len(cache.tokens) == self.last
                continue
            assert readable(cache) == unstopped[stop]
            self.go_on(cache, self.last)
            assert readable(cache) == unstopped[self.last]

    # ------------------------------------------------------------- saved and restored

    def test_what_is_restored_is_what_was_saved(self, turns):
        for stop, expected in self.unstopped().items():
            cache = self.new()
            result = turns.load_session(cache, self.leaving(stop))
            assert (result.n_tokens, result.reason) == (stop, None), result.detail
            assert readable(cache) == expected
            assert list(cache.tokens) == list(self.tokens[:stop])

    def test_going_on_after_a_restore_equals_never_having_stopped(self, turns):
        unstopped = self.unstopped()
        for stop in self.stops[:-1]:
            cache = self.new()
            turns.load_session(cache, self.leaving(stop))
            for following in self.stops:
                if following > stop:
                    self.go_on(cache, following)
                    assert readable(cache) == unstopped[following]

    def test_a_restore_does_not_depend_on_what_the_cache_held(self, turns):
        expected = self.unstopped()[self.last]
        cache = self.computed(self.stops[-2], self.others)
        assert turns.load_session(cache, self.leaving(self.last)).n_tokens == self.last
        assert readable(cache) == expected

    def test_one_cache_goes_to_and_fro_between_what_was_saved(self, turns):
        unstopped = self.unstopped()
        cache = self.computed(self.last)
        for stop in (*self.stops[::-1], *self.stops[::2], self.stops[0]):
            result = turns.load_session(cache, self.leaving(stop))
            assert (result.n_tokens, result.reason) == (stop, None), result.detail
            assert readable(cache) == unstopped[stop]

    def test_what_is_live_already_is_not_read(self, turns):
        cache = self.computed(self.last)
        result = turns.load_session(cache, self.leaving(self.last))
        assert (result.n_tokens, result.n_kept_tokens, result.raw_nbytes) == (
            self.last,
            self.last,
            0,
        )
        assert readable(cache) == self.unstopped()[self.last]

    def test_a_restored_cache_that_is_saved_again_adds_nothing(self, turns):
        cache = self.new()
        turns.load_session(cache, self.leaving(self.last))
        before = turns.stats().raw_nbytes
        result = turns.save_session(cache, cache.tokens, name="copy")
        assert (result.n_new_tokens, turns.stats().raw_nbytes) == (0, before)

    def test_loading_exactly_what_was_saved_gives_the_logits_if_the_layout_has_them(self, turns):
        cache = self.new()
        result = turns.load_session(cache, name="chat")
        if any(spec.role == "logits" for spec in cache.layout.tensors):
            assert (result.n_tokens, result.has_logits) == (self.last, True)
            assert readable(cache) == self.unstopped()[self.last]
        else:
            assert not result.has_logits
            assert result.n_tokens < self.last

    def test_ids_that_the_cache_does_not_hold_are_not_saved(self, turns):
        cache = self.computed(self.stops[2])
        with pytest.raises(CacheMismatchError):
            turns.save_session(cache, self.tokens[: self.stops[3]])
        with pytest.raises(CacheMismatchError):
            turns.save_session(cache, self.others[: self.stops[2]])
        with pytest.raises(TokensError):
            turns.save_session(cache, [])

    # --------------------------------------------------------------- misses, failures

    def test_a_miss_leaves_a_cache_that_computes_as_a_new_one(self, turns):
        cache = self.computed(self.last)
        result = turns.load_session(cache, [48, 49, 48])
        assert (result.n_tokens, result.reason) == (0, MissReason.NO_MATCH)
        assert list(cache.tokens) == []
        self.go_on(cache, self.last)
        assert readable(cache) == self.unstopped()[self.last]

    def test_a_restore_that_fails_leaves_a_cache_that_computes_as_a_new_one(self, tmp_path):
        path = tmp_path / "damaged.db"
        layout = self.new().layout
        stored = [
            index for index, spec in enumerate(layout.tensors) if spec.kind is not Kind.POSITIONS
        ]
        with kvstore.open(path, chunk_n_tokens=self.chunk_n_tokens) as store:
            store.save_session(cache := self.computed(self.last), cache.tokens)
            expected = self.unstopped()[self.last]
            for index in (stored[0], stored[-1]):
                cache = self.computed(self.stops[1], self.others)
                with damaged(path, index):
                    result = store.load_session(cache, self.leaving(self.last))
                assert result.reason is MissReason.CORRUPT
                assert result.n_tokens == len(cache.tokens) == 0
                self.go_on(cache, self.last)
                assert readable(cache) == expected


class damaged:  # noqa: N801  # reads like the context manager that it is
    """The payloads of one tensor with one bit flipped in each, until the end of the block."""

    def __init__(self, path, tensor: int) -> None:
        self._path, self._tensor = path, tensor

    def __enter__(self) -> None:
        self._flip()

    def __exit__(self, *_: object) -> None:
        self._flip()

    def _flip(self) -> None:
        with raw(self._path) as connection:
            rows = connection.execute(
                "SELECT p.id, p.data FROM payloads p JOIN blobs b ON b.payload_id = p.id "
                "WHERE b.tensor = ?",
                (self._tensor,),
            ).fetchall()
            for payload_id, data in rows:
                flipped = data[:-1] + bytes([data[-1] ^ 1])
                connection.execute(
                    "UPDATE payloads SET data = ? WHERE id = ?", (flipped, payload_id)
                )
