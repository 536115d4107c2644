"""Pruning: a plan that only decides, and an execution that only acts."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from kvstore.db import bases
from kvstore.db import engine as db
from kvstore.db.eviction import ChunkFacts, evict, read_facts
from kvstore.errors import BudgetError


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePolicy:
    """What may go, and how much of it.

    ``model`` (a fingerprint) limits everything else to one model's chunks.
    Chunks not used since ``unused_since_ms`` go; beyond that, the least recently
    used go until ``free_nbytes`` bytes are freed. With neither, all go.
    """

    free_nbytes: int | None = None
    unused_since_ms: int | None = None
    model: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """Chunks to delete, in an order in which each is a leaf when its turn comes."""

    chunk_ids: tuple[int, ...] = ()
    freed_nbytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneResult:
    """What a prune did, or with ``dry_run`` would do.

    ``freed_nbytes`` counts stored payload bytes; the file's sizes are as SQLite
    reports them, in bytes.
    """

    n_chunks: int
    freed_nbytes: int
    file_nbytes_before: int
    file_nbytes_after: int
    dry_run: bool


def plan_prune(
    facts: Collection[ChunkFacts], policy: PrunePolicy, *, held: Iterable[int] = ()
) -> PrunePlan:
    """The chunks that ``policy`` lets go, leaf-first, the least recently used first.

    A chunk that others continue or borrow from goes only after them, and counts
    as used when they were; a chunk that is ``held`` (or leased) never goes, and
    so nothing before it.
    """
    by_id = {chunk.id: chunk for chunk in facts}
    used_at_ms = {chunk.id: chunk.last_used_at_ms for chunk in facts}
    n_dependents = Counter(
        needed_id
        for chunk in facts
        for needed_id in (chunk.parent_id, chunk.base_id)
        if needed_id is not None
    )
    n_dependents.update(held)
    n_dependents.update(chunk.id for chunk in facts if chunk.is_held)

    leaves = [(chunk.last_used_at_ms, chunk.id) for chunk in facts if not n_dependents[chunk.id]]
    heapq.heapify(leaves)
    chosen: list[int] = []
    freed_nbytes = 0
    while leaves:
        last_used_at_ms, chunk_id = heapq.heappop(leaves)
        chunk = by_id[chunk_id]
        if policy.model is not None and chunk.model != policy.model:
            continue
        if not _may_go(policy, last_used_at_ms, freed_nbytes):
            break  # leaves come in order of age: no later one is older
        chosen.append(chunk_id)
        freed_nbytes += chunk.stored_nbytes
        for needed_id in (chunk.parent_id, chunk.base_id):
            if needed_id is None:
                continue
            n_dependents[needed_id] -= 1
            used_at_ms[needed_id] = max(used_at_ms[needed_id], last_used_at_ms)
            if not n_dependents[needed_id]:
                heapq.heappush(leaves, (used_at_ms[needed_id], needed_id))
    return PrunePlan(chunk_ids=tuple(chosen), freed_nbytes=freed_nbytes)


def _may_go(policy: PrunePolicy, last_used_at_ms: int, freed_nbytes: int) -> bool:
    if policy.free_nbytes is None and policy.unused_since_ms is None:
        return True
    too_old = policy.unused_since_ms is not None and last_used_at_ms < policy.unused_since_ms
    return too_old or (policy.free_nbytes is not None and freed_nbytes < policy.free_nbytes)


def prune(
    connection: sa.Connection,
    *,
    max_nbytes: int | None,
    unused_since_ms: int | None,
    model: bytes | None,
) -> PruneResult:
    """Prune inside the caller's write transaction, and give the freed pages up."""
    before = db.size_nbytes(connection)
    n_chunks, freed_nbytes = 0, 0
    while True:
        policy = _policy(connection, max_nbytes, unused_since_ms, model)
        if policy is None:
            break
        plan = plan_prune(read_facts(connection), policy)
        if not plan.chunk_ids:
            break
        evict(connection, plan.chunk_ids)
        n_chunks += len(plan.chunk_ids)
        freed_nbytes += plan.freed_nbytes
        if max_nbytes is None:
            break
    db.shrink(connection)
    return PruneResult(
        n_chunks=n_chunks,
        freed_nbytes=freed_nbytes,
        file_nbytes_before=before,
        file_nbytes_after=db.size_nbytes(connection),
        dry_run=False,
    )


def preview(
    connection: sa.Connection,
    *,
    max_nbytes: int | None,
    unused_since_ms: int | None,
    model: bytes | None,
) -> PruneResult:
    """What ``prune`` would do now, from the same plan; writes nothing."""
    policy = _policy(connection, max_nbytes, unused_since_ms, model)
    plan = PrunePlan() if policy is None else plan_prune(read_facts(connection), policy)
    before = db.size_nbytes(connection)
    gone_nbytes = plan.freed_nbytes + bases.freed_nbytes(connection, plan.chunk_ids)
    return PruneResult(
        n_chunks=len(plan.chunk_ids),
        freed_nbytes=plan.freed_nbytes,
        file_nbytes_before=before,
        file_nbytes_after=max(0, db.used_nbytes(connection) - gone_nbytes),
        dry_run=True,
    )


def make_room(
    connection: sa.Connection, *, max_nbytes: int, need_nbytes: int, held: Collection[int]
) -> None:
    """Evict until ``need_nbytes`` more fit under ``max_nbytes``, or nothing may go any more."""
    while (excess := db.used_nbytes(connection) + need_nbytes - max_nbytes) > 0:
        plan = plan_prune(read_facts(connection), PrunePolicy(free_nbytes=excess), held=held)
        if not plan.chunk_ids:
            return
        evict(connection, plan.chunk_ids)


def keep_budget(connection: sa.Connection, *, max_nbytes: int, held: Collection[int]) -> None:
    """Bring the file under ``max_nbytes`` before the caller commits.

    Raises:
        BudgetError: even without everything that may go it would be larger.
    """
    if db.size_nbytes(connection) <= max_nbytes:
        return
    make_room(connection, max_nbytes=max_nbytes, need_nbytes=0, held=held)
    db.shrink(connection)
    if db.size_nbytes(connection) > max_nbytes:
        raise BudgetError(
            f"expected the file to stay within max_bytes ({max_nbytes}), but it would take "
            f"{db.size_nbytes(connection)} bytes with nothing left to evict; raise max_bytes"
        )


def _policy(
    connection: sa.Connection,
    max_nbytes: int | None,
    unused_since_ms: int | None,
    model: bytes | None,
) -> PrunePolicy | None:
    """The policy that brings the file where it should be, or None if it is there."""
    if max_nbytes is None:
        return PrunePolicy(unused_since_ms=unused_since_ms, model=model)
    excess = db.used_nbytes(connection) - max_nbytes
    if excess <= 0 and unused_since_ms is None:
        return None
    return PrunePolicy(free_nbytes=max(0, excess), unused_since_ms=unused_since_ms, model=model)
