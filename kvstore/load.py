"""Loading: what is wanted, a plan, its bytes in place, and why they were not more.

Never leaves doubt: the cache's length drops before the first byte is written,
and grows again only over chunks that arrived whole and verified.
"""

from __future__ import annotations

import time
from array import array
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from kvstore.codec import EXACT
from kvstore.db import engine as db
from kvstore.db import models, sessions
from kvstore.db.schema import Database
from kvstore.db.sessions import Revision
from kvstore.db.vendor import vendor_errors
from kvstore.errors import CorruptStoreError, SessionNotFoundError, StoreError
from kvstore.kinds import kind_of
from kvstore.layout import LiveCache
from kvstore.lineage import Lineage, before
from kvstore.load_plan import LoadPlan, plan_load
from kvstore.lossy import adapter_of, unmarked
from kvstore.restore import Crew, Restore
from kvstore.tokens import TokenIds, common_prefix_n_tokens

_INTEGER_TYPECODES = {"int64": "q", "int32": "i"}

_MAX_N_ASKED_SESSIONS = 100
"""How many shortened sessions are looked at for the reason of a miss: bounds the time."""


class MissReason(StrEnum):
    """Why a load restored fewer tokens than it could have."""

    NO_MATCH = "no_match"
    """Nothing stored for this model goes on as the prompt does."""

    OTHER_MODEL = "other_model"
    """The layout fits, but what is stored is of other weights or another program."""

    OTHER_LAYOUT = "other_layout"
    """What is stored is of models with another cache layout."""

    CORRUPT = "corrupt"
    """A stored row is damaged; what lies before it was restored."""

    EVICTED = "evicted"
    """It was saved, and pruned since."""

    CAPACITY = "capacity"
    """The cache has no room for more."""

    WINDOW_GONE = "window_gone"
    """The tokens match further, but a ring's window there was never saved."""

    NO_CHECKPOINT = "no_checkpoint"
    """The tokens match further, but no recurrent state was saved there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What a load did; the live cache now holds exactly ``tokens[:n_tokens]``.

    ``n_tokens`` is at most ``n_requested - 1``: the last token is left for
    ``forward``, which gives the next token's logits. With ``whole``, or a layout that stores the
    last logits (recurrent models), it may be ``n_requested``; ``has_logits`` says
    that the cache's logits are those of the last token. ``reason`` is None when
    no more could have been restored, else ``detail`` says more. ``n_kept_tokens`` of them
    were live already; only the others were read. ``tokens`` and ``metadata``
    are the session's own after a load by name. ``session`` names a session
    whose chunks served (None for unnamed saves), ``chunks`` their keys in hex.
    ``codec`` is ``"exact"``, or the lossy codec of the key space that served; then ``edits`` has a
    mark where what came from there begins (and keeps it where such a cache is saved exactly).
    ``raw_nbytes`` were restored from ``stored_nbytes`` read. ``edits`` says where
    what the cache holds now is not what the model computes.
    """

    n_tokens: int
    n_requested: int
    n_kept_tokens: int
    has_logits: bool
    reason: MissReason | None
    detail: str
    tokens: TokenIds
    edits: Lineage
    codec: str
    metadata: dict[str, Any] | None
    session: str | None
    chunks: tuple[str, ...]
    raw_nbytes: int
    stored_nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """A checked call of ``load_session``: token ids with their lineage, or a session's name.

    ``is_whole`` restores the last token too, whether or not its logits are stored.
    With token ids, ``codec_text`` is the lossy codec whose key space may serve too, or empty.
    """

    cache: LiveCache
    ids: TokenIds | None
    lineage: Lineage
    is_whole: bool
    codec_text: str
    name: str | None
    namespace: str
    chunk_n_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """Damage was met in the key space of that adapter, ``n_tokens`` behind its start."""

    adapter: bytes
    n_tokens: int
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A load's result, the chunk row to mark as used, and the named session as it was."""

    result: LoadResult
    used_chunk_id: int | None
    revision: Revision | None
    damaged: tuple[Damaged, ...]


def load(database: Database, request: LoadRequest, *, workers: Executor, n_threads: int) -> Loaded:
    """Restore the longest prefix that can be served; a miss is a result, not an error.

    Raises:
        SessionNotFoundError: no session has that name.
        StoreError: the file cannot be read at all; the cache is unchanged.
    """
    began = time.perf_counter()
    with db.read_transaction(database.engine) as connection:
        wanted = _wanted(connection, request, database)
        ids = wanted.ids
        crew = Crew(
            workers=workers,
            readers=database.readers,
            bases=database.bases,
            n_threads=n_threads,
        )
        restored = _restore(connection, request, wanted, crew, database.path)
        plan, outcome = restored.plan, restored.outcome

        n_tokens = outcome.n_tokens
        has_logits = n_tokens == len(ids) and request.cache.layout.has_logits
        wanted_n_tokens = len(ids) if request.is_whole else len(ids) - 1
        reason, detail = None, ""
        if n_tokens < min(wanted_n_tokens, plan.limit_n_tokens):
            reason, detail = _explain(connection, request, restored)
        elif n_tokens < wanted_n_tokens:
            reason = MissReason.CAPACITY
            detail = f"the cache has room for {n_tokens} tokens"
        used = [match for match in plan.matches if match.chunk.start < n_tokens]
        serving = used[-1].chunk if used else None
        session = request.name
        if session is None and serving is not None:
            session = sessions.through_chunk(connection, serving.id)
        edits, codec_text = plan.edits(n_tokens), plan.codec_text
        is_lossy = bool(codec_text) and edits != before(plan.lineage, n_tokens)
        result = LoadResult(
            n_tokens=n_tokens,
            n_requested=len(ids),
            n_kept_tokens=min(plan.kept_n_tokens, n_tokens),
            has_logits=has_logits,
            reason=reason,
            detail=detail,
            tokens=ids,
            edits=edits,
            codec=codec_text if is_lossy else EXACT,
            metadata=wanted.metadata,
            session=session,
            chunks=tuple(match.chunk.key.hex() for match in used),
            raw_nbytes=outcome.raw_nbytes,
            stored_nbytes=outcome.stored_nbytes,
            seconds=time.perf_counter() - began,
        )
    return Loaded(
        result=result,
        used_chunk_id=None if serving is None else serving.id,
        revision=wanted.revision,
        damaged=restored.damaged,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What to restore, and which lossy codec may serve; what else comes with a name."""

    ids: TokenIds
    lineage: Lineage
    codec_text: str
    metadata: dict[str, Any] | None = None
    revision: Revision | None = None


def _restore(
    connection: sa.Connection, request: LoadRequest, wanted: _Wanted, crew: Crew, path: Path
) -> _Restored:
    """Carry out the plan that gives most tokens: of exact content, or of what a lossy codec wrote.

    If damage ends it, the other one goes on where it reaches further.
    """
    cache = request.cache
    texts = [*dict.fromkeys(("", wanted.codec_text))]
    with vendor_errors(path):
        plans = {text: _plan(connection, request, wanted, text) for text in texts}
    plan = max(plans.values(), key=_n_planned)  # the exact one, if both give as many
    outcome = _carry_out(connection, cache, plan, crew, path)
    failed = [
        (one, one.n_tokens, one.damage) for one in plans.values() if one.damage and one is not plan
    ]
    if outcome.failure is not None:
        failed.insert(0, (plan, outcome.n_tokens, outcome.failure))
        for text in texts:
            if text != plan.codec_text:
                with vendor_errors(path):
                    other = _plan(connection, request, wanted, text)
                if other.n_tokens > outcome.n_tokens:
                    plan, outcome = other, _carry_out(connection, cache, other, crew, path)
    return _Restored(
        plan=plan,
        outcome=outcome,
        plans=tuple(plans.values()),
        damaged=tuple(
            Damaged(adapter=adapter_of(one.codec_text), n_tokens=n_tokens, detail=detail)
            for one, n_tokens, detail in failed
        ),
    )


def _plan(
    connection: sa.Connection, request: LoadRequest, wanted: _Wanted, codec_text: str
) -> LoadPlan:
    """What one key space gives."""
    space = models.find_space(
        connection,
        request.cache.fingerprint,
        chunk_n_tokens=request.chunk_n_tokens,
        namespace=request.namespace,
        adapter=adapter_of(codec_text),
    )
    lineage = unmarked(wanted.lineage) if wanted.codec_text else wanted.lineage
    return plan_load(
        connection,
        request.cache,
        space,
        wanted.ids,
        lineage,
        is_whole=request.is_whole,
        codec_text=codec_text,
    )


def _n_planned(plan: LoadPlan) -> int:
    return plan.n_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """How far the bytes got."""

    n_tokens: int
    raw_nbytes: int = 0
    stored_nbytes: int = 0
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Restored:
    """What was carried out, all plans that were made, and the damage that was met."""

    plan: LoadPlan
    outcome: _Outcome
    plans: tuple[LoadPlan, ...]
    damaged: tuple[Damaged, ...]


def _carry_out(
    connection: sa.Connection, cache: LiveCache, plan: LoadPlan, crew: Crew, path: Path
) -> _Outcome:
    """Put the planned blobs in place; the cache's length is never more than what arrived.

    A cache of full tensors keeps the chunks that arrived before a failure; rings
    and recurrent state are worth nothing in part, so such a cache is emptied.
    """
    failure = plan.damage
    n_tokens = plan.kept_n_tokens
    cache.truncate(n_tokens)
    if plan.codec_text:
        # Codes become numbers in many short operations, each of which hands over the interpreter's
        # lock: on two threads they take a fifth to a third longer than on one.
        crew = replace(crew, n_threads=1)
    space_id = -1 if plan.space is None else plan.space.id
    restore = Restore(
        cache,
        plan.steps,
        driver=db.driver_connection(connection),
        bases=crew.bases.of_space(space_id),
        path=path,
    )
    try:
        restore.run(crew)
        if plan.n_tokens > plan.kept_n_tokens:
            _derive(cache, plan.n_tokens)
            n_tokens = plan.n_tokens
    except StoreError as error:
        failure = str(error)
    finally:
        if n_tokens < plan.n_tokens:
            n_tokens = _n_tokens_in_place(cache, plan, restore.n_steps)
        if n_tokens > plan.kept_n_tokens:
            cache.adopt(plan.ids[:n_tokens], plan.edits(n_tokens))
    return _Outcome(
        n_tokens=n_tokens,
        raw_nbytes=restore.raw_nbytes,
        stored_nbytes=restore.stored_nbytes,
        failure=failure,
    )


def _n_tokens_in_place(cache: LiveCache, plan: LoadPlan, n_steps: int) -> int:
    """How many tokens the cache holds after ``n_steps``; one that needs all of them is emptied."""
    if not cache.layout.is_full:
        cache.truncate(0)
        return 0
    return plan.steps[n_steps - 1].stop if n_steps else plan.kept_n_tokens


def _derive(cache: LiveCache, n_tokens: int) -> None:
    """Write what follows from the length alone, such as the position in each slot of a ring."""
    for tensor, spec in enumerate(cache.layout.tensors):
        elements = kind_of(spec).derived(spec, n_tokens)
        if elements is not None:
            content = array(_INTEGER_TYPECODES[spec.dtype], elements)
            cache.buffer(tensor)[:] = memoryview(content).cast("B")


def _wanted(connection: sa.Connection, request: LoadRequest, database: Database) -> _Wanted:
    """What to restore: the tokens that were given, or those of the named session."""
    if request.name is None:
        if request.ids is None:
            raise TypeError("a load needs token ids or a name")
        return _Wanted(ids=request.ids, lineage=request.lineage, codec_text=request.codec_text)
    session = sessions.info(connection, namespace=request.namespace, name=request.name)
    if session is None:
        raise SessionNotFoundError(
            f"{database.path}: no session is named {request.name!r}; `kvstore ls` lists them"
        )
    ids = sessions.tokens_of(connection, session.id)
    if not ids or len(ids) != session.n_tokens:
        raise CorruptStoreError(
            f"{database.path}: session {request.name!r} should have {session.n_tokens} token ids, "
            f"found {len(ids)}; run `kvstore verify`, and restore a copy of the file"
        )
    try:
        lineage = sessions.lineage_of(connection, session.id)
    except CorruptStoreError:  # the row is met again on the way, where it is a reason to stop
        lineage = ()
    return _Wanted(
        ids=ids,
        lineage=lineage,
        codec_text="" if session.codec == EXACT else session.codec,
        metadata=session.metadata,
        revision=sessions.revision_of(connection, session.id),
    )


def _explain(
    connection: sa.Connection, request: LoadRequest, restored: _Restored
) -> tuple[MissReason, str]:
    """Why the cache does not hold more."""
    plan, n_tokens = restored.plan, restored.outcome.n_tokens
    if restored.damaged:
        return MissReason.CORRUPT, restored.damaged[0].detail
    if plan.limited_by is not None:
        spec = request.cache.layout.tensors[plan.limited_by]
        detail = f"{plan.matched_n_tokens} tokens match, but {spec.name} was not saved there"
        return MissReason(kind_of(spec).miss_reason or MissReason.NO_MATCH), detail
    if not any(one.space for one in restored.plans):
        return _explain_model(connection, request)
    if request.name is not None:
        own = sessions.info(connection, namespace=request.namespace, name=request.name)
        if own is not None and own.n_stored_tokens < own.n_tokens:
            return _evicted(request.name)
    for one in restored.plans:
        if one.space is None:
            continue
        shortened = sessions.with_less_than_saved(
            connection, space_id=one.space.id, keys=one.keys(), limit=_MAX_N_ASKED_SESSIONS
        )
        for session_id, name in shortened:
            with suppress(CorruptStoreError):  # the load itself is done
                saved = sessions.tokens_of(connection, session_id)
                if common_prefix_n_tokens(saved, plan.ids[: plan.limit_n_tokens]) > n_tokens:
                    return _evicted(name)
    return MissReason.NO_MATCH, f"nothing stored goes on as the prompt does at {n_tokens}"


def _evicted(name: str) -> tuple[MissReason, str]:
    return MissReason.EVICTED, f"session {name!r} had more, but its K and V were pruned"


def _explain_model(connection: sa.Connection, request: LoadRequest) -> tuple[MissReason, str]:
    """Why nothing at all is stored for this model."""
    fingerprint = request.cache.fingerprint
    known = models.fingerprints(connection)
    if fingerprint in known:
        return MissReason.NO_MATCH, "nothing is stored with this chunk size in this namespace"
    if not known:
        return MissReason.NO_MATCH, "the store is empty"
    same_layout = [other for other in known if other.layout == fingerprint.layout]
    if not same_layout:
        return MissReason.OTHER_LAYOUT, "what is stored has another cache layout"
    if any(other.program == fingerprint.program for other in same_layout):
        return MissReason.OTHER_MODEL, "the same program is stored with other weights"
    if any(other.weights == fingerprint.weights for other in same_layout):
        return MissReason.OTHER_MODEL, "the same weights are stored with another program"
    return MissReason.OTHER_MODEL, "what is stored has other weights and another program"
