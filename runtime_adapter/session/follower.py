"""The live cache follows a conversation: from what is live, then the store, then by computing."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore import LoadResult, MissReason, Store
from kvstore.errors import KVStoreError, RewindError
from kvstore.layout import LOGITS_ROLE, UNLIMITED_N_TOKENS
from runtime_adapter.caches.live import LiveTensors
from runtime_adapter.caches.still import Still
from runtime_adapter.model import Model
from runtime_adapter.session.conversation import Conversation
from runtime_adapter.session.rope import RopeSpec
from runtime_adapter.session.strike import check_kinds, rope_of, strike

if TYPE_CHECKING:
    import torch

PIECE_N_TOKENS = 256
"""Prompts are computed in pieces that end at multiples of this: equal prompts are then
computed in equal pieces, and going back computes at most one piece again."""

_holders: weakref.WeakKeyDictionary[LiveTensors, weakref.ref[Follower]] = (
    weakref.WeakKeyDictionary()
)
"""Whose tokens each live cache holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionResult:
    """What a change of a conversation took.

    Of its ``n_tokens``, ``n_live_tokens`` were in the live cache already, ``n_restored_tokens``
    came from the store, ``n_computed_tokens`` were computed now. ``reason`` says why a
    store that was asked did not have more.
    """

    n_tokens: int
    n_live_tokens: int
    n_restored_tokens: int
    n_computed_tokens: int
    reason: MissReason | None = None


class Follower:
    """Brings one model's cache to one conversation.

    ``after_a_piece`` is called after each piece that was computed.
    """

    def __init__(
        self,
        model: Model,
        store: Store | None,
        conversation: Conversation,
        *,
        after_a_piece: Callable[[], None],
    ) -> None:
        """Nothing is brought yet."""
        self._model = model
        self._store = store
        self.conversation = conversation
        self._after_a_piece = after_a_piece
        self._seen: int | None = None
        self._still: Still | None = None
        self.logits: torch.Tensor | None = None
        """Those after all tokens, if the cache is there."""

    @property
    def n_common_tokens(self) -> int:
        """How many tokens at the start the live cache has of the conversation."""
        cache, conversation = self._model.cache, self.conversation
        if self._seen == cache.revision:
            return min(cache.n_tokens, conversation.unchanged_n_tokens)
        differing = {*conversation.edits} ^ {*cache.edits}
        limit = min((edit.start for edit in differing), default=None)
        common = 0
        for mine, live in zip(conversation.tokens, cache.tokens[:limit], strict=False):
            if mine != live:
                break
            common += 1
        return common

    @property
    def is_in_step(self) -> bool:
        """Whether all that the cache holds is known to be the conversation's."""
        cache = self._model.cache
        return (
            self._seen == cache.revision and cache.n_tokens <= self.conversation.unchanged_n_tokens
        )

    def compute(self, *, but_stored: bool = False) -> SessionResult:
        """Bring the cache to all tokens, with the logits after them.

        ``but_stored`` takes what the store has behind the last cut, in whatever pieces that was
        computed.
        """
        conversation, cache = self.conversation, self._model.cache
        n_tokens = len(conversation.tokens)
        if self.is_in_step and cache.n_tokens == n_tokens and self.logits is not None:
            return SessionResult(
                n_tokens=n_tokens, n_live_tokens=n_tokens, n_restored_tokens=0, n_computed_tokens=0
            )
        has_logits = n_tokens in conversation.logits or self._keeps_logits
        is_cut = conversation.cuts.at_or_before(n_tokens) == n_tokens
        limit = n_tokens if has_logits and is_cut else n_tokens - 1
        brought = self.bring(limit if but_stored else min(limit, conversation.cuts.last))
        begun = cache.n_tokens
        if begun == n_tokens:
            self.logits = conversation.logits.get(n_tokens, self._model.logits)
        self.feed(n_tokens)
        return SessionResult(
            n_tokens=n_tokens,
            n_live_tokens=brought.n_live_tokens,
            n_restored_tokens=brought.n_restored_tokens,
            n_computed_tokens=n_tokens - begun,
            reason=brought.reason,
        )

    def bring(self, limit: int) -> SessionResult:
        """Bring the cache to a cut, ``limit`` at most: from what is live, or from the store.

        With a ``limit`` behind the last cut, what the store has there is taken as it is.
        """
        self.take()
        cache, cuts = self._model.cache, self.conversation.cuts
        is_known = self._seen == cache.revision
        if not is_known:
            self._still = None  # somebody else moved the cache
        live = cuts.at_or_before(min(self.n_common_tokens, limit))
        if not is_known:
            live = min(live, self._n_agreed())
        wanted = limit if limit > cuts.last else cuts.at_or_before(limit)
        n_live = n_restored = 0
        reason = None
        if live == wanted and self._cut_back(live):
            n_live = live
        elif self._store is None or not wanted:
            n_live = live if self._cut_back(live) else 0
        else:
            if not self._cut_back(live):  # or the load would keep a piece that is cut in two
                self._cut_back(0)
            hit = self._load(self._store, wanted)
            reached = self._settle(hit)
            n_live = min(hit.n_kept_tokens, reached)
            n_restored, reason = reached - n_live, hit.reason
            # What went through a lossy codec is marked, and its logits are of another day.
            self.conversation.note_edits(cache.edits, reached)
        if cache.n_tokens != n_live + n_restored:
            self._cut_back(0)
        self._note()
        return SessionResult(
            n_tokens=len(self.conversation.tokens),
            n_live_tokens=n_live,
            n_restored_tokens=n_restored,
            n_computed_tokens=0,
            reason=reason,
        )

    def adopt(self, hit: LoadResult) -> None:
        """Go on from what ``hit`` restored of the conversation into a cache that was empty."""
        cache = self._model.cache
        self._still = None
        reached = self._settle(hit)
        self.conversation.note_edits(cache.edits, reached)
        if cache.n_tokens != reached:
            self._cut_back(0)
        self._note()

    def _n_agreed(self) -> int:
        """The last cut up to which what is live was computed in the conversation's pieces."""
        agreed = 0
        for mine, live in zip(
            self.conversation.cuts.positions, self._model.cache.cuts, strict=False
        ):
            if mine != live:
                break
            agreed = mine
        return agreed

    def _settle(self, hit: LoadResult) -> int:
        """Go back from where a load got to the cut before it; the length after that.

        Where nothing was computed yet there is no cut: the load's end becomes one.
        """
        reached, cuts = hit.n_tokens, self.conversation.cuts
        if reached >= cuts.last:
            first = (cuts.last // PIECE_N_TOKENS + 1) * PIECE_N_TOKENS
            for position in (*range(first, reached, PIECE_N_TOKENS), reached):
                cuts.add(position)  # as a prompt is computed
            return reached
        cut = cuts.at_or_before(reached)
        if cut != reached and not self._cut_back(cut):
            # A ring, or recurrent state: only the store can go back.
            again = self._load(self._store, cut) if self._store is not None and cut else None
            if again is None or again.n_tokens != cut:
                cut = 0
                self._cut_back(0)
        return cut

    def feed(self, stop: int) -> None:
        """Compute from where the cache is up to ``stop``, in the pieces of before, or new ones."""
        model, cache, cuts = self._model, self._model.cache, self.conversation.cuts
        piece_n_tokens = min(PIECE_N_TOKENS, model.piece_n_tokens)
        while (start := cache.n_tokens) < stop:
            border = (start // piece_n_tokens + 1) * piece_n_tokens
            end = min(cuts.after(start) or border, border, stop)
            self.logits = None
            logits = model.forward(self.conversation.tokens[start:end], start=start)
            cuts.add(end)
            self.conversation.note_edits(cache.edits, end)
            self._note()
            self.logits = logits
            self._after_a_piece()

    def remember(self) -> None:
        """Keep what it takes to come back here: rings and recurrent state, of one place."""
        if not self._model.layout.is_full:
            self._still = Still(self._model.cache)

    def check_strike(self) -> None:
        """Raise UnsupportedStateError if nothing can be struck out of this cache."""
        check_kinds(self._model.cache)

    def strike(self, start: int, stop: int, given: RopeSpec | None) -> None:
        """Take ``[start, stop)`` out of the conversation and out of the live cache.

        Raises:
            InputError, RewindError, UnsupportedStateError: it cannot be done; nothing was changed.
        """
        cache, conversation = self._model.cache, self.conversation
        check_kinds(cache)
        if not self.is_in_step:
            n_computed = conversation.cuts.last
            self.bring(n_computed)
            self.feed(n_computed)
        self._still = None
        try:
            rope = rope_of(self._model, given, distance=stop - start)
        finally:  # it puts back what it found
            self._note()
        n_cached = cache.n_tokens
        if start < n_cached:
            strike(cache, rope, start, min(stop, n_cached))
        conversation.strike(start, stop)
        conversation.edits = cache.edits
        self._note()

    @property
    def _keeps_logits(self) -> bool:
        return self._model.layout.tensors[-1].role == LOGITS_ROLE

    def _cut_back(self, n_tokens: int) -> bool:
        """Make the cache forget what is behind ``n_tokens``; False if it cannot."""
        cache = self._model.cache
        if n_tokens == cache.n_tokens:
            return True
        still = self._still
        if still is not None and n_tokens == len(still.tokens):
            with contextlib.suppress(RewindError):
                cache.go_back(still)
                return True
        try:
            cache.truncate(n_tokens)
        except RewindError:
            return False
        self._forget_still(n_tokens)
        return True

    def _forget_still(self, n_tokens: int) -> None:
        """The cache went back to ``n_tokens``: what comes behind may be computed otherwise."""
        if self._still is not None and n_tokens < len(self._still.tokens):
            self._still = None

    def _load(self, store: Store, n_tokens: int) -> LoadResult:
        """What the store has of the first ``n_tokens``."""
        self._still = None
        tokens = self.conversation.tokens[:n_tokens]
        return store.load_session(
            self._model.cache, tokens, edits=self.conversation.edits, whole=True
        )

    def _note(self) -> None:
        """What the cache holds now is the conversation's; logits are not at hand."""
        cache, cuts = self._model.cache, self.conversation.cuts
        self._seen = cache.revision
        if cuts.at_or_before(cache.n_tokens) == cache.n_tokens and not cache.cuts:
            cache.note_cuts([at for at in cuts.positions if at <= cache.n_tokens])
        self.conversation.unchanged_n_tokens = UNLIMITED_N_TOKENS
        self.logits = None

    def take(self) -> None:
        """Become the one that the live cache follows."""
        cache = self._model.cache
        cache.check_open()
        holder = _holders.get(cache)
        other = holder() if holder is not None else None
        if other is not None and other is not self:
            other.give()
        _holders[cache] = weakref.ref(self)

    def give(self) -> None:
        """Store what only the live cache has, before another conversation takes it.

        Best effort: what cannot be saved is computed again.
        """
        self._still = None
        cache, store = self._model.cache, self._store
        if store is None or store.read_only or not self.is_in_step:
            return
        if cache.n_tokens:
            with contextlib.suppress(KVStoreError):
                store.save_session(cache, cache.tokens)
