"""A conversation with a model: what people who build a chat use."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from kvstore import Lineage, MissReason, PendingSave, SaveResult, Store, token_ids
from kvstore.errors import (
    CapacityError,
    InputError,
    SessionConflictError,
    SessionNotFoundError,
)
from runtime_adapter.caches.still import Still
from runtime_adapter.model import Model
from runtime_adapter.session.autosave import BackgroundSaver
from runtime_adapter.session.claim import Claim
from runtime_adapter.session.conversation import Conversation
from runtime_adapter.session.follower import Follower, SessionResult
from runtime_adapter.session.overflow import Overflow
from runtime_adapter.session.rope import RopeSpec
from runtime_adapter.session.sampler import Sampler
from runtime_adapter.session.state import STATE_KEY, pack_state, unpack_state

if TYPE_CHECKING:
    import torch

Stop = Callable[[int], bool]
_Saved = TypeVar("_Saved")


@dataclass(slots=True)
class _Behind:
    """A save in the background, and what of its tokens is what is said still."""

    pending: PendingSave
    n_tokens: int
    is_dirty: bool = False


class Session:
    """A conversation. ``tokens`` is what was said; the model's cache holds it, or part of it.

    Invariants: ``tokens`` is the truth, and the cache follows it: the tokens that it does not
    hold (``pending``) are computed when the logits after them are asked for. ``cuts`` are the
    positions where the pieces ended in which the tokens were computed. *Exact* means: bit for
    bit what a fresh model computes from the same tokens in the same pieces. What a store restores
    is bit for bit what was saved; where another conversation saved the same tokens first, in
    other pieces, that differs in low bits.

    Several sessions may share one model and take turns (see ``fork``); each brings its content
    back when it is used. Not thread-safe.
    """

    def __init__(
        self,
        model: Model,
        store: Store | None = None,
        name: str | None = None,
        *,
        autosave: bool = False,
        store_logits: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a conversation, or go on with the stored one of that ``name``.

        With ``autosave``, what is computed is stored behind it, by a thread, whenever a chunk is
        complete: a killed process loses the unfinished chunk, and the one before it only if that
        was completed by the very last piece. With ``store_logits``, the logits at the starts of
        the last turns and behind an unanswered prompt are saved too, so that ``regenerate`` or
        ``generate`` after a restart begin without a step. ``metadata`` is the application's own,
        saved with the session.

        A stored conversation of another model keeps its ids and gets new keys and values.

        Raises:
            CapacityError: the stored conversation is longer than this model's cache.
            InputError: ``name`` or ``autosave`` without a store, or the stored session holds no
                conversation that can be gone on with.
            StoreError: the file cannot be read.
            TokensError: the stored ids are beyond this model's vocabulary.
        """
        _check_parts(model, store, metadata)
        if store is None and (name is not None or autosave):
            raise InputError("Session: expected a store for name= and autosave=, found none")
        if store is not None and autosave and store.read_only:
            raise InputError("Session: expected a store that may be written for autosave=True")
        self._model = model
        self._store = store
        self._name = name
        self._store_logits = store_logits
        self._replaces = False
        self._claim: Claim | None = None
        self._saved_n_tokens = 0
        self._is_dirty = False
        self._is_appending = False
        self._is_closed = False
        self._is_stored = False
        self._behind: list[_Behind] = []
        self._overflow: Overflow | None = None
        self._saver = BackgroundSaver(store) if store is not None and autosave else None
        self._resumed: SessionResult | None = None
        self._follower = Follower(
            model,
            store,
            Conversation(),
            after_a_piece=self._autosave,
        )
        self.sampler = Sampler()
        self.metadata: dict[str, Any] = dict(metadata or {})
        if store is not None and name is not None:
            self._begin(Conversation(), name=name, sampler=Sampler())
            self._resume(store, name, has_metadata=metadata is not None)

    # ------------------------------------------------------------------ what it holds

    @property
    def model(self) -> Model:
        """The model."""
        return self._model

    @property
    def name(self) -> str | None:
        """The name that it is saved under."""
        return self._name

    @property
    def tokens(self) -> tuple[int, ...]:
        """All token ids, position 0 first."""
        return tuple(self._conversation.tokens)

    @property
    def n_tokens(self) -> int:
        """How many there are."""
        return len(self._conversation.tokens)

    @property
    def n_cached_tokens(self) -> int:
        """How many of them the live cache holds now; the others are ``pending``."""
        return self._follower.n_common_tokens

    @property
    def pending(self) -> tuple[int, ...]:
        """The token ids that the live cache does not hold: sampled and not fed, or not loaded."""
        return tuple(self._conversation.tokens[self.n_cached_tokens :])

    @property
    def cuts(self) -> tuple[int, ...]:
        """Where the pieces ended in which the tokens were computed, in ascending order."""
        return tuple(self._conversation.cuts.positions)

    @property
    def turns(self) -> tuple[tuple[int, int], ...]:
        """The generated stretches ``(start, stop)``, in order."""
        return tuple(self._conversation.turns)

    @property
    def edits(self) -> Lineage:
        """Where what the cache holds is not what the model computes for ``tokens``: see ``strike``.

        Empty while all of it is exact.
        """
        return self._conversation.edits

    @property
    def resumed(self) -> SessionResult | None:
        """What of a stored conversation was restored when this session began; None for a new one.

        Tokens of it that are neither live nor restored are pending.
        """
        return self._resumed

    @property
    def logits(self) -> torch.Tensor:
        """Logits of the next token, float32 ``[vocab]``; computes what is pending.

        Raises:
            InputError: there are no tokens yet.
            ProgramError: the runtime stopped.
        """
        self._check_open()
        return self._computed_logits().clone()

    # ------------------------------------------------------------------ going on

    def append(self, tokens: Iterable[Any]) -> SessionResult:
        """Add ``tokens``, and compute what is neither live nor stored.

        Where ``keep_sink`` has to make room first, that stays done if the rest fails.

        Raises:
            CapacityError: the cache has no room for so many; nothing was added.
            ProgramError: the runtime stopped; nothing was added.
            TokensError: the ids are not usable; nothing was added.
        """
        self._check_open()
        ids = self._model.check_tokens(tokens)
        self._make_room(len(ids))
        before = self.n_tokens
        self._check_room(before + len(ids))
        self._conversation.tokens += ids
        self._is_appending = True
        try:
            done = self._follower.compute(but_stored=True)
        except BaseException:
            self._conversation.forget_after(before)
            raise
        finally:
            self._is_appending = False
        self._autosave()
        return done

    def generate(
        self,
        max_new_tokens: int | None = None,
        *,
        sampler: Sampler | None = None,
        stop: Iterable[int] | Stop = (),
    ) -> Iterator[int]:
        """Yield new tokens, each added to the conversation as it is chosen.

        ``sampler`` stays the session's own from now on (the first is greedy), and its state is
        saved, so that a resumed generation goes on as if never interrupted. ``stop`` are
        token ids, or a function of one: the token that ends the turn is yielded, and
        part of the conversation. Without ``max_new_tokens`` it goes on until the cache is full.
        The last token that was yielded is pending: it is fed when the next one is needed.

        Raises:
            CapacityError: the cache is full before ``max_new_tokens``.
            InputError: an argument is not usable, or there are no tokens to go on from.
            ProgramError: the runtime stopped; what was yielded is in the conversation.
        """
        self._check_open()
        if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 0):
            raise InputError(
                f"generate: expected max_new_tokens of 0 or more, found {max_new_tokens!r}"
            )
        if sampler is not None and not isinstance(sampler, Sampler):
            raise InputError(f"generate: expected a Sampler, found {type(sampler).__name__}")
        if not self.n_tokens:
            raise InputError("generate: expected a conversation with tokens, found an empty one")
        self.sampler = sampler or self.sampler
        stops = stop if callable(stop) else _among(stop)
        return self._generate(max_new_tokens, stops)

    def _generate(self, max_new_tokens: int | None, stops: Stop) -> Iterator[int]:
        speaker = object()
        n_new = 0
        while max_new_tokens is None or n_new < max_new_tokens:
            self._check_open()
            is_full = self._overflow is None and self.n_tokens > self._model.capacity_n_tokens
            if max_new_tokens is None and is_full:
                return
            self._make_room(0)
            self._check_room(self.n_tokens)
            logits = self._computed_logits()
            if not n_new:
                self._conversation.keep_logits(logits)
                self._follower.remember()
            token = self.sampler.pick(logits)
            self._conversation.add_generated(token, speaker=speaker)
            n_new += 1
            yield token
            if stops(token):
                return

    # ------------------------------------------------------------------ going back

    def rewind(self, *, to: int) -> SessionResult:
        """Forget the tokens from position ``to`` on. Exact.

        The logits that follow are those of a fresh run that stopped there, in the same
        pieces: a piece that ``to`` cuts in two is computed again up to it.

        Raises:
            InputError: ``to`` is not a length from 0 to ``n_tokens``.
            ProgramError: the runtime stopped; tokens are pending.
        """
        self._check_open()
        _check_position("rewind", to, stop=self.n_tokens)
        self._conversation.forget_after(to)
        return self._recomputed(changed_from=to)

    def regenerate(self) -> SessionResult:
        """Go back to the start of the last generated turn, ready to generate another. Exact.

        A sampler goes on in its sequence of random numbers, so that the new turn differs.

        Raises:
            InputError: nothing was generated.
            ProgramError: the runtime stopped; tokens are pending.
        """
        if not self.turns:
            raise InputError("regenerate: expected a generated turn, found none; generate first")
        return self.rewind(to=self.turns[-1][0])

    def replace(self, start: int, stop: int, tokens: Iterable[Any]) -> SessionResult:
        """Put ``tokens`` in place of ``[start, stop)``; computes them and what followed. Exact.

        What lies before ``start`` stays, but for the piece that ``start`` cuts in two. No
        ``tokens`` at all cut the range out.

        Raises:
            CapacityError: the cache has no room for the result; nothing was changed.
            InputError: no such range; nothing was changed.
            ProgramError: the runtime stopped; tokens are pending.
            TokensError: the ids are not usable; nothing was changed.
        """
        self._check_open()
        _check_position("replace", stop, stop=self.n_tokens)
        _check_position("replace", start, stop=stop)
        new = _listed("replace", tokens)
        ids = self._model.check_tokens(new) if new else []
        self._check_room(self.n_tokens + len(ids) - (stop - start))
        self._conversation.replace(start, stop, ids)
        return self._recomputed(changed_from=start)

    def strike(self, start: int, stop: int, *, rope: RopeSpec | None = None) -> SessionResult:
        """Drop the tokens ``[start, stop)`` without computing what follows again. Approximate.

        What follows moves up, its keys turned back by the rotary embedding's difference in
        angle. Its values, and its keys above the first layer, still come from a
        computation that saw what is gone. Before ``start`` everything stays exact. From there on
        it is stored under keys that carry the edit: a resumed session has it again, and no
        look-up for the tokens alone ever finds it.

        ``rope`` is measured on the model unless it is given; either way it is checked first.

        Raises:
            InputError: no such range (the first token stays), or ``rope`` does not fit.
            ProgramError: the runtime stopped.
            RewindError: a ring no longer has what would move into its window.
            UnsupportedStateError: recurrent state, or keys that no rotation fits.
        """
        self._check_open()
        _check_position("strike", stop, stop=self.n_tokens)
        _check_position("strike", start, stop=stop)
        if not 1 <= start < stop:
            raise InputError(
                f"strike: expected a range behind the first token, found [{start}, {stop}); use "
                "replace to change the start"
            )
        self._follower.strike(start, stop, rope)
        self._note_change(start)
        self._autosave()
        return SessionResult(
            n_tokens=self.n_tokens,
            n_live_tokens=self.n_cached_tokens,
            n_restored_tokens=0,
            n_computed_tokens=0,
        )

    def shift(
        self, n_tokens: int, *, n_sink: int = 1, rope: RopeSpec | None = None
    ) -> SessionResult:
        """Strike out the ``n_tokens`` oldest tokens behind the first ``n_sink``; see ``strike``.

        Raises:
            As ``strike``.
        """
        if {type(n_tokens), type(n_sink)} != {int}:
            raise InputError(f"shift: expected whole numbers, found {n_tokens!r}, {n_sink!r}")
        return self.strike(n_sink, n_sink + n_tokens, rope=rope)

    def keep_sink(
        self,
        n_sink: int,
        window: int,
        *,
        told: Callable[[int, int], None] | None = None,
        rope: RopeSpec | None = None,
    ) -> None:
        """From now on, make room by itself: keep the first ``n_sink`` tokens and a ``window``.

        Where more than ``n_sink + window`` tokens would be needed, half of the window behind
        the sink is struck out (see ``strike``), after ``told`` heard which range. As
        llama.cpp's context shift.

        Raises:
            InputError: not at least 1 token and a window of 2 that fit into the cache.
            UnsupportedStateError: nothing can be struck out of this model's cache.
        """
        self._check_open()
        overflow = Overflow(n_sink=n_sink, window=window, told=told, rope=rope)
        self._check_room(n_sink + window)
        self._follower.check_strike()
        self._overflow = overflow

    def fork(self, name: str | None = None) -> Session:
        """Another conversation with the same past, on the same model. Costs a row in the store.

        The two take turns with the live cache; what the other does not have in common with
        the one before is restored from the store (or computed again without one).

        Raises:
            InputError: a name without a store.
            SessionConflictError: the name is taken.
            StoreError: the file cannot be written.
        """
        self._check_open()
        if name is not None:
            if self._store is None:
                raise InputError("fork: expected a store for a named fork, found none")
            if any(info.name == name for info in self._store.sessions()):
                raise SessionConflictError(
                    f"fork: expected a new name, found a session {name!r}; choose another, or "
                    "delete it first"
                )
            self._save(self._store, name=name)
        other = Session(
            self._model,
            self._store,
            autosave=self._saver is not None,
            store_logits=self._store_logits,
            metadata=copy.deepcopy(self.metadata),
        )
        other._overflow = self._overflow
        other._begin(self._conversation.copy(), name=name, sampler=self.sampler.copy())
        other._is_stored = name is not None
        if other._claim is not None:
            other._claim.renew()  # the row that was written above is the other's
        return other

    # ------------------------------------------------------------------ keeping it

    @overload
    def save(self, *, background: Literal[False] = False) -> SaveResult: ...

    @overload
    def save(self, *, background: Literal[True]) -> PendingSave: ...

    @overload
    def save(self, *, background: bool) -> SaveResult | PendingSave: ...

    def save(self, *, background: bool = False) -> SaveResult | PendingSave:
        """Store the conversation, under its name if it has one.

        With ``background`` it is stored as it is now, behind the caller, who may go on at once;
        see ``Store.save_session``. What fails then is told by the ``PendingSave``, or else by
        ``flush``, ``Store.flush`` or ``Store.close``.

        Raises:
            InputError: there is no store, or there are no tokens.
            SessionConflictError: another process, or another Session, saved it since.
            StoreError: the file cannot be written.
        """
        self._check_open()
        if self._store is None:
            raise InputError("save: expected a session with a store, found none")
        if not background:
            return self._save(self._store, name=self._name)
        pending = self._saved_by(self._store, self._name, self._store_behind)
        self._behind.append(_Behind(pending, self.n_tokens))
        return pending

    def flush(self, timeout: float | None = None) -> None:
        """Wait until what autosave and ``save(background=True)`` have begun is in the file.

        Raises:
            SaveTimeoutError: it is not, after ``timeout`` seconds; the saves go on.
            KVStoreError: one of this session's saves failed, and nobody was told: the first such
                failure. The next call goes on behind it.
        """
        began = time.monotonic()
        if self._saver is not None:
            self._saver.wait(timeout)
        for behind in self._behind:
            if not behind.pending.is_told:
                spent = time.monotonic() - began
                behind.pending.result(None if timeout is None else max(0.0, timeout - spent))
        self._settle_behind()

    def close(self) -> None:
        """End its use. With ``autosave``, all of it is stored first; the model stays open.

        If that fails it stays open: save it elsewhere (``fork``), or close it again.

        Raises:
            KVStoreError: it could not be saved.
        """
        if self._is_closed:
            return
        saver, store = self._saver, self._store
        if saver is not None and store is not None:
            saver.settle()
            saver.forget_error()  # what failed to be saved is saved now
            if self.n_tokens:
                self._save(store, name=self._name)
            elif self._name is not None and self._is_stored:
                if self._claim is not None:
                    self._claim.check()
                # All of it was taken back. A save in the background may have failed meanwhile.
                with contextlib.suppress(SessionNotFoundError):
                    store.delete_session(self._name)
            saver.close()
        self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Session {self._name!r} of {self.n_tokens} tokens>"

    # ------------------------------------------------------------------ the parts

    @property
    def _conversation(self) -> Conversation:
        return self._follower.conversation

    def _begin(self, conversation: Conversation, *, name: str | None, sampler: Sampler) -> None:
        """Go on with ``conversation``."""
        self._follower.conversation = conversation
        self._name, self.sampler = name, sampler
        if self._store is not None and name is not None:
            self._claim = Claim(self._store, name)

    def _resume(self, store: Store, name: str, *, has_metadata: bool) -> None:
        self._follower.take()
        try:
            hit = store.load_session(self._model.cache, name=name, whole=True)
        except SessionNotFoundError:
            return
        conversation, sampler, metadata = unpack_state(
            hit.metadata or {}, list(hit.tokens), hit.edits
        )
        self._model.check_tokens(conversation.tokens)
        # The last token may be pending in a cache that is full.
        self._check_room(len(conversation.tokens) - 1)
        conversation.logits = {
            at: logits
            for at, logits in conversation.logits.items()
            if at <= len(conversation.tokens) and logits.shape == (self._model.vocab_size,)
        }
        # Of another model only the words are left: it computed in its own pieces.
        self._replaces = hit.reason in (MissReason.OTHER_MODEL, MissReason.OTHER_LAYOUT)
        if self._replaces:
            conversation.cuts.forget_after(0)
            conversation.edits = ()
            conversation.logits.clear()
        if not has_metadata:
            self.metadata = metadata
        self._begin(conversation, name=name, sampler=sampler)
        self._saved_n_tokens, self._is_stored = hit.n_tokens, True
        self._resumed = SessionResult(
            n_tokens=self.n_tokens,
            n_live_tokens=hit.n_kept_tokens,
            n_restored_tokens=hit.n_tokens - hit.n_kept_tokens,
            n_computed_tokens=0,
            reason=hit.reason,
        )
        if self._replaces:
            return
        if hit.n_kept_tokens:
            # What was live already may have been computed in other pieces.
            self._follower.bring(len(hit.tokens))
        else:
            self._follower.adopt(hit)

    def _computed_logits(self) -> torch.Tensor:
        if not self.n_tokens:
            raise InputError("Session: expected tokens, found an empty conversation; append some")
        self._follower.compute()
        if self._follower.logits is None:
            raise InputError("Session: expected logits after computing, found none; report this")
        return self._follower.logits

    def _make_room(self, n_tokens: int) -> None:
        """Let ``keep_sink`` strike out what ``n_tokens`` more have no room beside."""
        overflow = self._overflow
        if overflow is None:
            return
        struck = overflow.plan(self.n_tokens, n_tokens)
        if struck is not None:
            if overflow.told is not None:
                overflow.told(*struck)
            self.strike(*struck, rope=overflow.rope)

    def _recomputed(self, *, changed_from: int) -> SessionResult:
        """The conversation was changed: the cache follows, and so does what is stored."""
        self._note_change(changed_from)
        done = self._follower.compute() if self.n_tokens else self._follower.bring(0)
        self._autosave()
        return done

    def _note_change(self, start: int) -> None:
        """What is stored of the tokens from ``start`` on is not what is said any more."""
        if self._saver is not None:
            self._saver.settle()
        self._settle_behind()
        for behind in self._behind:
            behind.is_dirty = behind.is_dirty or start < behind.n_tokens
            behind.n_tokens = min(behind.n_tokens, start)
        self._is_dirty = self._is_dirty or start < self._saved_n_tokens
        self._saved_n_tokens = min(self._saved_n_tokens, start)

    def _metadata(self, n_cached_tokens: int) -> dict[str, Any]:
        """What a save of the first ``n_cached_tokens`` says beside them."""
        conversation = self._conversation
        logits = dict(conversation.logits) if self._store_logits else {}
        last = self._follower.logits if self._store_logits else None
        # Behind a turn of the model's own nobody asks what comes next.
        is_prompt = not conversation.turns or conversation.turns[-1][1] < self.n_tokens
        if last is not None and is_prompt:
            logits[self.n_tokens] = last
        state = pack_state(
            conversation, self.sampler, n_stored_tokens=n_cached_tokens, logits=logits
        )
        return {**self.metadata, STATE_KEY: state}

    def _save(self, store: Store, *, name: str | None) -> SaveResult:
        return self._saved_by(store, name, self._store_now)

    def _saved_by(
        self, store: Store, name: str | None, save: Callable[[Store, str | None], _Saved]
    ) -> _Saved:
        if not self.n_tokens:
            raise InputError("save: expected a conversation with tokens, found an empty one")
        if not self._follower.is_in_step or not self._model.cache.n_tokens:
            n_computed = self._conversation.cuts.last or self.n_tokens
            self._follower.bring(n_computed)
            self._follower.feed(n_computed)
        if self._saver is not None:
            self._saver.settle()  # two saves of one name at once would be in conflict
        self._settle_behind()
        claim = self._claim if name == self._name else None
        if claim is not None:
            claim.check()
        saved = save(store, name)
        if name == self._name:
            self._is_stored = True
        if claim is not None:
            # In the background already now: whoever begins the name next waits for this save.
            claim.renew()
        if name == self._name and not isinstance(saved, PendingSave):
            self._saved(self.n_tokens)
        return saved

    def _store_now(self, store: Store, name: str | None) -> SaveResult:
        cache = self._model.cache
        return store.save_session(
            cache,
            cache.tokens,
            name=name,
            metadata=self._metadata(cache.n_tokens),
            replace=self._replaces and name == self._name,
        )

    def _store_behind(self, store: Store, name: str | None) -> PendingSave:
        cache = self._model.cache
        return store.save_session(
            cache,
            cache.tokens,
            name=name,
            metadata=self._metadata(cache.n_tokens),
            replace=self._replaces and name == self._name,
            background=True,
        )

    def _settle_behind(self) -> None:
        """Note what was saved in the background, as soon as it is in the file.

        What failed there leaves all as it was: the next save of the name may do what it might.
        """
        left = []
        for behind in self._behind:
            if behind.pending.did_well():
                self._replaces = False
                self._saved_n_tokens, self._is_dirty = behind.n_tokens, behind.is_dirty
            elif not behind.pending.is_told:
                left.append(behind)
        self._behind = left

    def _saved(self, n_tokens: int) -> None:
        self._settle_behind()  # those were begun before, and so have ended
        self._replaces, self._saved_n_tokens = False, n_tokens
        self._is_stored, self._is_dirty = True, False

    def _autosave(self) -> None:
        """Behind every chunk that became complete, and behind what was taken back.

        Never more than one piece behind. While tokens are appended they are saved without the
        name: the conversation has all of them, or none.
        """
        saver, store, cache = self._saver, self._store, self._model.cache
        if saver is None or store is None or not self._follower.is_in_step:
            return
        if self._is_appending and cache.n_tokens == self.n_tokens:
            return  # the last piece: now it can have its name
        saver.settle()
        self._settle_behind()
        n_tokens, chunk_n_tokens = cache.n_tokens, store.chunk_n_tokens
        is_full = n_tokens // chunk_n_tokens > self._saved_n_tokens // chunk_n_tokens
        if not (is_full or self._is_dirty):
            return
        if not n_tokens:
            return
        still = Still(cache)
        running = saver.submit(
            still,
            name=None if self._is_appending else self._name,
            metadata=None if self._is_appending else self._metadata(n_tokens),
            replace=self._replaces,
            claim=None if self._is_appending else self._claim,
            when_saved=_nothing if self._is_appending else functools.partial(self._saved, n_tokens),
        )
        if running is not None:
            cache.read_until(running)

    def _check_open(self) -> None:
        if self._is_closed:
            raise InputError("Session: expected an open one, found that it was closed")
        self._model.cache.check_open()
        if STATE_KEY in self.metadata:
            raise InputError(f"metadata: expected no key {STATE_KEY!r}: it is the session's own")
        if self._saver is not None:
            self._saver.check()

    def _check_room(self, n_tokens: int) -> None:
        if n_tokens > self._model.capacity_n_tokens:
            raise CapacityError(
                f"Session: the cache has room for {self._model.capacity_n_tokens} tokens, found "
                f"{n_tokens}; shorten the conversation, or export with a larger context"
            )


def _nothing() -> None:
    """Rows without a name change nothing of what is known of the session."""


def _check_parts(model: Any, store: Any, metadata: Any) -> None:
    for what, value, kind in (("model", model, Model), ("store", store, Store)):
        if not isinstance(value, kind) and (what == "model" or value is not None):
            raise InputError(
                f"Session: expected a {kind.__name__} as {what}, found {type(value).__name__}"
            )
    if metadata is not None and not isinstance(metadata, Mapping):
        raise InputError(
            f"Session: expected a mapping as metadata, found {type(metadata).__name__}"
        )


def _listed(what: str, tokens: Any) -> list[Any]:
    try:
        return list(tokens)
    except TypeError as error:
        raise InputError(
            f"{what}: expected token ids in a row, found {type(tokens).__name__}"
        ) from error


def _among(stop: Iterable[int]) -> Stop:
    ids = _listed("generate: stop", stop)
    return frozenset(token_ids(ids).tolist() if ids else ()).__contains__


def _check_position(what: str, position: int, *, stop: int) -> None:
    if type(position) is not int or not 0 <= position <= stop:
        raise InputError(f"{what}: expected a position from 0 to {stop}, found {position!r}")
