"""Saving: live buffer -> layout -> chunk -> codec -> rows.

What is already there is found by key and left alone, so the work grows with the
new tokens. Chunks are encoded outside of any transaction and written in short
ones; each is valid by itself. The last transaction publishes the session.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from kvstore import clock, codec, damage
from kvstore.blob import encode_blob
from kvstore.codec import Basis, block_of
from kvstore.db import bases, blobs, chunks, eviction, leases, models, sessions
from kvstore.db import engine as db
from kvstore.db.bases import BasisRow
from kvstore.db.blobs import NewBlob
from kvstore.db.chunks import ChunkRow
from kvstore.db.models import SpaceRow
from kvstore.db.schema import Database
from kvstore.db.sessions import Revision
from kvstore.db.writing import write_transaction
from kvstore.errors import (
    BudgetError,
    CorruptStoreError,
    SessionConflictError,
    StoreBusyError,
)
from kvstore.lineage import n_exact_tokens, pack_extras
from kvstore.match import blob_raw_nbytes
from kvstore.prefix import Key, full_chunk_keys
from kvstore.prune import keep_budget, make_room
from kvstore.save_plan import (
    FillIn,
    Link,
    NewChunk,
    Part,
    SaveRequest,
    Write,
    before_edits,
    has_last_chunk,
    lacking_parts,
    plan_save,
)
from kvstore.thinning import thin_checkpoints
from kvstore.training import BasesPlan, plan_bases

_BATCH_NBYTES = 16 << 20
_BATCH_N_CHUNKS = 8
_JOB_NBYTES = 1 << 20
_MAX_ATTEMPTS = 5
_ESTIMATE_MARGIN = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveResult:
    """What a save did.

    ``n_new_tokens`` were not in the file before, ``n_present_tokens`` were;
    together they are ``n_tokens``. The first ``n_exact_tokens`` are what the model computes,
    and answer every look-up for them; those behind an edit only one with the same edits.
    ``codec`` is ``"exact"``, or the lossy codec whose key space holds them: then only a look-up
    with that codec finds them, ``n_exact_tokens`` is 0, and of the blobs written
    ``n_fallback_blobs`` are exact after all: their numbers could not be held otherwise, or would
    have taken more, or the codec has to learn a basis first and was not given enough tokens yet.
    ``raw_nbytes`` and ``stored_nbytes`` are the K and V written now, before and after the codec
    (a tail that became a full chunk is written once more, as one).
    """

    name: str | None
    n_tokens: int
    n_exact_tokens: int
    n_new_tokens: int
    n_present_tokens: int
    codec: str
    n_fallback_blobs: int
    raw_nbytes: int
    stored_nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A save's result, and the named session as it is now."""

    result: SaveResult
    revision: Revision | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """A planned write with its blobs on the way."""

    write: Write
    jobs: Sequence[Future[list[NewBlob]]]

    def blobs(self) -> list[NewBlob]:
        """All of them, when they are there."""
        return [blob for job in self.jobs for blob in job.result()]


class _Stale(Exception):  # noqa: N818  # control flow, never leaves this module
    """Another process changed what a plan relied on; plan again."""


class _Damaged(Exception):  # noqa: N818  # control flow, never leaves this module
    """A chunk's row is not what its key stands for; drop it, then plan again."""

    def __init__(self, key: Key) -> None:
        self.key = key


def save(database: Database, request: SaveRequest, workers: Executor) -> Saved:
    """Store ``request.ids`` and publish the session; all of it or nothing of the name.

    Raises:
        SessionConflictError: the name belongs to another model's session, or another process
            changed it since it was seen.
        BudgetError, DiskFullError, StoreBusyError: see ``kvstore.errors``;
            chunks already written stay as cache, the session is unchanged.
    """
    began = time.perf_counter()
    before = _save_before_edits(database, request, workers)
    saved = _save(database, request, workers)
    if not before:
        return saved
    parts = [*before, saved.result]
    n_new_tokens = sum(part.n_new_tokens for part in parts)
    result = replace(
        saved.result,
        n_new_tokens=n_new_tokens,
        n_present_tokens=len(request.ids) - n_new_tokens,
        n_fallback_blobs=sum(part.n_fallback_blobs for part in parts),
        raw_nbytes=sum(part.raw_nbytes for part in parts),
        stored_nbytes=sum(part.stored_nbytes for part in parts),
        seconds=time.perf_counter() - began,
    )
    return replace(saved, result=result)


def _save_before_edits(
    database: Database, request: SaveRequest, workers: Executor
) -> list[SaveResult]:
    """Store what lies before the edits of a chunk in chunks without them, where it is not yet."""
    done = []
    for before in before_edits(request):
        with db.read_transaction(database.engine) as connection:
            is_there = has_last_chunk(connection, before)
        if not is_there:
            done.append(_save(database, before, workers).result)
    return done


def _save(database: Database, request: SaveRequest, workers: Executor) -> Saved:
    """One save, again and again until nobody is in its way."""
    began = time.perf_counter()
    saver = _Saver(database, request, workers)
    for _ in range(_MAX_ATTEMPTS):
        try:
            saver.run()
            break
        except _Stale:
            continue
        except _Damaged as damaged:
            saver.drop_lease()
            damage.drop(database.engine, damaged.key)
        finally:
            saver.drop_lease()
    else:
        raise StoreBusyError(
            f"{database.path}: other processes kept deleting, or building on, what this save "
            "is to write; try again"
        )
    result = SaveResult(
        name=request.name,
        n_tokens=len(request.ids),
        n_exact_tokens=(
            0 if request.codec_text else n_exact_tokens(request.lineage, len(request.ids))
        ),
        n_new_tokens=saver.n_new_tokens,
        n_present_tokens=len(request.ids) - saver.n_new_tokens,
        codec=request.codec_text or codec.EXACT,
        n_fallback_blobs=saver.n_fallback_blobs,
        raw_nbytes=saver.raw_nbytes,
        stored_nbytes=saver.stored_nbytes,
        seconds=time.perf_counter() - began,
    )
    return Saved(result=result, revision=saver.revision)


def _check_name(connection: sa.Connection, request: SaveRequest, name: str) -> int | None:
    """The row id of the session that may be written over, or None if the name is free.

    Raises:
        SessionConflictError: the name belongs to another model's session, or another process
            changed it since it was seen.
    """
    session_id = sessions.id_of(connection, namespace=request.namespace, name=name)
    if session_id is None or request.replace:
        return session_id
    owner, fingerprint = sessions.fingerprint_of(connection, session_id), request.cache.fingerprint
    if owner != fingerprint:
        raise SessionConflictError(
            f"the name {name!r} belongs to a session of model {str(owner)[:12]}, "
            f"this cache is of model {str(fingerprint)[:12]}; choose another name, or pass "
            "replace=True to write over it"
        )
    if request.seen is not None and request.seen != sessions.revision_of(connection, session_id):
        raise SessionConflictError(
            f"session {name!r} was saved by another process since it was loaded or saved here; "
            "load it again, save under another name, or pass replace=True to write over it"
        )
    return session_id


class _Saver:
    """One save, over as many transactions as it takes.

    Invariant: between transactions the lease holds the newest chunk of the
    chain that is being built, so nothing of the chain can be deleted.
    """

    def __init__(self, database: Database, request: SaveRequest, workers: Executor) -> None:
        self._engine = database.engine
        self._basis_cache = database.bases
        self._request = request
        self._workers = workers
        self._bases = BasesPlan()
        self._learned: dict[int, tuple[Basis, bytes]] = {}
        self._lease_id: int | None = None
        self._superseded: list[int] = []
        self.revision: Revision | None = None
        self.n_new_tokens = 0
        self.n_fallback_blobs = 0
        self.raw_nbytes = 0
        self.stored_nbytes = 0

    def run(self) -> None:
        """Write what is missing, then publish; raises ``_Stale`` to be run again."""
        with db.read_transaction(self._engine) as connection:
            plan = plan_save(connection, self._request)
            self._bases = plan_bases(connection, self._request, plan.writes, self._basis_cache)
        if not plan.writes and self._request.name is None:
            return
        self._learned = self._learn(self._bases.lessons)
        batches = list(self._batches(plan.writes)) or [[]]
        tip = plan.tip
        written: list[_Encoded] = []
        encoding = self._encode(batches[0])
        try:
            self._check_budget(encoding, plan.writes)
            for following in [*batches[1:], None]:
                # The workers encode the next batch while this one is written.
                written, encoding = encoding, self._encode(following or [])
                tip = self._write(written, tip, publish=following is None)
        finally:
            _settle([*written, *encoding])

    def _learn(self, lessons: Sequence[Part]) -> dict[int, tuple[Basis, bytes]]:
        """The bases that are to be learned, with what is stored of them, by tensor.

        Where nothing is learned the tensor's blobs will be exact.
        """
        request, learned = self._request, {}
        # One after the other: products of matrices take several threads each, and where several
        # threads ask for them at once each waits for all.
        for lesson in lessons:
            try:
                basis = _train(request, lesson)
            except StoreBusyError:
                # A snapshot without these tokens: a basis was in the file when it was taken.
                continue
            if basis is None:
                self._basis_cache.futile.add((request.root, lesson.tensor))
            else:
                learned[lesson.tensor] = basis, basis.to_bytes()
        return learned

    def drop_lease(self) -> None:
        """Let go of the chain; the published session (or the cache's age) holds it now."""
        if self._lease_id is None:
            return
        lease_id, self._lease_id = self._lease_id, None
        # Only after a failure, which is what the caller must hear of; a lease
        # that cannot be dropped now expires.
        with suppress(SQLAlchemyError), write_transaction(self._engine) as connection:
            leases.drop(connection, lease_id)

    def _check_budget(self, first: Sequence[_Encoded], writes: Sequence[Write]) -> None:
        """Refuse what is far too much before anything is evicted for it.

        Judged by how the first batch was compressed.

        Raises:
            BudgetError: see there; nothing was written.
        """
        max_nbytes = self._request.max_nbytes
        encoded = [blob for item in first for blob in item.blobs()]
        raw_nbytes = sum(blob.raw_nbytes for blob in encoded)
        if max_nbytes is None or not raw_nbytes:
            return
        stored_nbytes = sum(blob.stored.nbytes for blob in encoded)
        estimate_nbytes = sum(map(self._raw_nbytes_of, writes)) * stored_nbytes // raw_nbytes
        estimate_nbytes += sum(len(data) for _, data in self._learned.values())
        if estimate_nbytes > max_nbytes * _ESTIMATE_MARGIN:
            raise BudgetError(
                f"expected what a save writes to fit max_bytes ({max_nbytes}), but it would take "
                f"about {estimate_nbytes} bytes; raise max_bytes, or save fewer tokens"
            )

    def _raw_nbytes_of(self, write: Write) -> int:
        tensors = self._request.cache.layout.tensors
        return sum(
            blob_raw_nbytes(tensors[part.tensor], part.start, part.stop) for part in write.parts
        )

    def _batches(self, writes: Sequence[Write]) -> Iterator[list[Write]]:
        """Cut the plan into transactions: memory stays bounded, and few syncs are needed."""
        batch: list[Write] = []
        batch_nbytes = 0
        for write in writes:
            write_nbytes = self._raw_nbytes_of(write)
            if batch and (
                batch_nbytes + write_nbytes > _BATCH_NBYTES or len(batch) == _BATCH_N_CHUNKS
            ):
                yield batch
                batch, batch_nbytes = [], 0
            batch.append(write)
            batch_nbytes += write_nbytes
        if batch:
            yield batch

    def _encode(self, batch: Sequence[Write]) -> list[_Encoded]:
        """Start encoding every blob of the batch on the workers."""
        return [
            _Encoded(
                write=write,
                jobs=[
                    self._workers.submit(
                        _encode_parts, self._request, write, parts, self._known_bases()
                    )
                    for parts in self._in_jobs(write.parts)
                ],
            )
            for write in batch
        ]

    def _in_jobs(self, parts: Sequence[Part]) -> list[Sequence[Part]]:
        """Cut ``parts`` into as much as is worth handing over to another thread at once."""
        tensors = self._request.cache.layout.tensors
        jobs, first, nbytes = [], 0, 0
        for number, part in enumerate(parts, 1):
            nbytes += blob_raw_nbytes(tensors[part.tensor], part.start, part.stop)
            if nbytes >= _JOB_NBYTES or number == len(parts):
                jobs.append(parts[first:number])
                first, nbytes = number, 0
        return jobs

    def _known_bases(self) -> dict[int, Basis]:
        """What blobs are encoded with, by tensor."""
        learned = {tensor: basis for tensor, (basis, _) in self._learned.items()}
        return {**self._bases.known, **learned}

    def _write(self, batch: Sequence[_Encoded], tip: Link | None, *, publish: bool) -> Link | None:
        """One transaction: insert the batch, then hold it by a lease or publish it."""
        encoded = [(item.write, item.blobs()) for item in batch]
        request, now = self._request, clock.now_ms()
        need_nbytes = sum(blob.stored.nbytes for _, new in encoded for blob in new)
        need_nbytes += sum(len(data) for _, data in self._learned.values())
        counted = (self.n_new_tokens, self.n_fallback_blobs, self.raw_nbytes, self.stored_nbytes)
        try:
            with ExitStack() as committed, write_transaction(self._engine) as connection:

                def kept() -> Collection[int]:
                    """What is not deleted, and does not grow until all of this is in the file."""
                    return committed.enter_context(request.kept())

                session_id = None
                if request.name is not None:
                    session_id = _check_name(connection, request, request.name)
                needed = _needed(batch, tip)
                for chunk in needed:
                    _check_unchanged(connection, chunk)
                if request.max_nbytes is not None:
                    make_room(
                        connection,
                        max_nbytes=request.max_nbytes,
                        need_nbytes=need_nbytes,
                        held={*kept(), *(chunk.id for chunk in needed)},
                    )
                space = models.ensure_space(
                    connection,
                    request.cache.fingerprint,
                    request.cache.layout,
                    chunk_n_tokens=request.chunk_n_tokens,
                    namespace=request.namespace,
                    adapter=request.adapter,
                    now_ms=now,
                )
                self._put_bases(connection, space)
                for write, new_blobs in encoded:
                    if isinstance(write, FillIn):
                        self._fill_in(connection, write, new_blobs)
                    else:
                        tip = self._insert(connection, space, write, new_blobs, tip, now)
                lease_id = self._lease_id
                if publish and tip is not None:
                    if lease_id is not None:
                        leases.drop(connection, lease_id)
                        lease_id = None
                    self._publish(connection, space, session_id, tip.id, now, kept)
                elif tip is not None:
                    lease_id = leases.hold(connection, lease_id, tip.id, now_ms=now)
                if request.max_nbytes is not None:
                    held = {chunk.id for chunk in (*needed, tip) if chunk is not None}
                    held.update(kept())
                    keep_budget(connection, max_nbytes=request.max_nbytes, held=held)
        except BaseException:
            self.n_new_tokens, self.n_fallback_blobs, self.raw_nbytes, self.stored_nbytes = counted
            raise
        self._lease_id = lease_id  # only now is it so in the file
        self._bases = BasesPlan(known=self._known_bases())
        self._learned = {}
        return tip

    def _put_bases(self, connection: sa.Connection, space: SpaceRow) -> None:
        """See to it that all that blobs are encoded with is in the file.

        Raises:
            _Stale: another process was first, with other bases.
        """
        used = self._known_bases()
        there = bases.of_space(connection, space.id) if used else {}
        for tensor, basis in used.items():
            row = there.get(tensor)
            if row is not None and self._is_broken(connection, row):
                bases.delete(connection, row)
                row = None
            if row is None:
                _, data = self._learned.get(tensor) or (basis, basis.to_bytes())
                bases.insert(
                    connection, space_id=space.id, tensor=tensor, digest=basis.digest, data=data
                )
            elif row.digest != basis.digest:
                raise _Stale

    def _is_broken(self, connection: sa.Connection, row: BasisRow) -> bool:
        """Whether a basis that could not be read when this save was planned still cannot be."""
        if row.tensor not in self._bases.damaged:
            return False
        spec = self._request.cache.layout.tensors[row.tensor]
        try:
            of_space = self._basis_cache.of_space(row.space_id)
            of_space.read(db.driver_connection(connection), row.tensor, spec)
        except CorruptStoreError:
            return True
        return False

    def _insert(  # noqa: PLR0917  # all of a row's parts, once
        self,
        connection: sa.Connection,
        space: SpaceRow,
        new: NewChunk,
        new_blobs: Sequence[NewBlob],
        parent: Link | None,
        now: int,
    ) -> Link:
        """Insert one chunk, unless another process was first: then that one is used."""
        there = chunks.by_keys(connection, [new.key])
        if new.key in there:
            rival = there[new.key]
            if rival is None or rival.tokens != new.ids:
                raise _Damaged(new.key)
            return Link(id=rival.id, key=rival.key)
        raw_nbytes = sum(blob.raw_nbytes for blob in new_blobs)
        stored_nbytes = sum(blob.stored.nbytes for blob in new_blobs)
        chunk_id = chunks.insert(
            connection,
            space_id=space.id,
            parent_id=None if parent is None else parent.id,
            parent_key=new.parent_key,
            key=new.key,
            start=new.start,
            ids=new.ids,
            extras=new.extras,
            base_id=None if new.base is None else new.base.id,
            base_n_tokens=new.base_n_tokens,
            raw_nbytes=raw_nbytes,
            stored_nbytes=stored_nbytes,
            now_ms=now,
        )
        blobs.insert(connection, chunk_id, new_blobs)
        if new.superseded_id is not None:
            self._superseded.append(new.superseded_id)
        self.n_new_tokens += new.n_new_tokens
        self.n_fallback_blobs += sum(blob.is_fallback for blob in new_blobs)
        self.raw_nbytes += raw_nbytes
        self.stored_nbytes += stored_nbytes
        return Link(id=chunk_id, key=new.key)

    def _thin(
        self, connection: sa.Connection, space: SpaceRow, former_head_id: int, head_id: int
    ) -> None:
        """Drop the checkpoint where this session ended before, unless it is to be kept.

        A session that was written anew on another path, or cut back, has passed none.
        """
        former = chunks.by_id(connection, former_head_id)
        if former is None or sessions.ends_in(connection, former_head_id):
            return
        ids = self._request.ids[: former.stop]
        before = full_chunk_keys(
            space.root,
            ids[: former.start],
            self._request.lineage,
            chunk_n_tokens=space.chunk_n_tokens,
        )
        parent_key = before[-1] if before else space.root
        extras = pack_extras(self._request.lineage, former.start, former.stop)
        is_passed = (former.parent_key, former.extras) == (parent_key, extras)
        if not is_passed or former.tokens != ids[former.start :]:
            return
        thin_checkpoints(
            connection,
            self._request.cache.layout,
            head_id=head_id,
            former_n_tokens=former.stop,
            checkpoint_n_tokens=self._request.checkpoint_n_tokens,
        )

    def _fill_in(
        self, connection: sa.Connection, write: FillIn, new_blobs: Sequence[NewBlob]
    ) -> None:
        """Add what an existing chunk lacks, unless another process was first."""
        stored = [
            (row.tensor, row.start, row.stop) for row in blobs.of_chunk(connection, write.chunk.id)
        ]
        lacking = lacking_parts(stored, write.parts)
        added = [
            blob
            for blob in new_blobs
            if Part(tensor=blob.tensor, start=blob.start, stop=blob.stop) in lacking
        ]
        blobs.insert(connection, write.chunk.id, added)
        raw_nbytes = sum(blob.raw_nbytes for blob in added)
        stored_nbytes = sum(blob.stored.nbytes for blob in added)
        self.n_fallback_blobs += sum(blob.is_fallback for blob in added)
        chunks.add_nbytes(
            connection, write.chunk.id, raw_nbytes=raw_nbytes, stored_nbytes=stored_nbytes
        )
        self.raw_nbytes += raw_nbytes
        self.stored_nbytes += stored_nbytes

    def _publish(  # noqa: PLR0917  # as _insert
        self,
        connection: sa.Connection,
        space: SpaceRow,
        session_id: int | None,
        head_id: int,
        now: int,
        kept: Callable[[], Collection[int]],
    ) -> None:
        """Make the session visible, and let go of what it replaces."""
        request = self._request
        if request.name is not None:
            former_head_id = (
                None if session_id is None else sessions.head_of(connection, session_id)
            )
            session_id = sessions.put(
                connection,
                session_id=session_id,
                namespace=request.namespace,
                name=request.name,
                space_id=space.id,
                head_id=head_id,
                ids=request.ids,
                slice_n_tokens=request.chunk_n_tokens,
                metadata=request.metadata,
                now_ms=now,
            )
            self.revision = sessions.revision_of(connection, session_id)
            if former_head_id not in (None, head_id):
                self._thin(connection, space, former_head_id, head_id)
                eviction.release(connection, former_head_id, held=kept())
                models.delete_unused(connection)
        for chunk_id in self._superseded:
            if chunk_id != head_id:
                eviction.release(connection, chunk_id, held=kept())


def _train(request: SaveRequest, lesson: Part) -> Basis | None:
    """What is learned of a tensor's content at some positions."""
    spec = request.cache.layout.tensors[lesson.tensor]
    numbers = request.cache.read(lesson.tensor, lesson.start, lesson.stop)
    return Basis.train(numbers, block_of(spec, lesson.start, lesson.stop), role=spec.role)


def _encode_parts(
    request: SaveRequest, write: Write, parts: Sequence[Part], bases: Mapping[int, Basis]
) -> list[NewBlob]:
    return [_encode_part(request, write, part, bases.get(part.tensor)) for part in parts]


def _encode_part(request: SaveRequest, write: Write, part: Part, basis: Basis | None) -> NewBlob:
    """One blob; lossy only in a full chunk, which is written once and for all.

    A tail is exact, and written in haste: its tokens are encoded again, from the same numbers,
    when it is full.
    """
    cache, tensor = request.cache, part.tensor
    spec, name = cache.layout.tensors[tensor], request.codec_names[tensor]
    if write.n_tokens < request.chunk_n_tokens and name != codec.RAW:
        name = codec.QUICK
    decoded = cache.read(tensor, part.start, part.stop)
    return encode_blob(
        *(write.key, tensor, spec, part.start, part.stop),
        decoded=decoded,
        codec_name=name,
        basis=basis,
    )


def _needed(batch: Sequence[_Encoded], tip: Link | None) -> list[ChunkRow | Link]:
    """Existing chunks that the batch is going to refer to or to add to."""
    writes = [item.write for item in batch]
    named = [write.chunk if isinstance(write, FillIn) else write.base for write in writes]
    return [chunk for chunk in (tip, *named) if chunk is not None]


def _check_unchanged(connection: sa.Connection, chunk: ChunkRow | Link) -> None:
    row = chunks.by_id(connection, chunk.id)
    if row is None or row.key != chunk.key:
        raise _Stale


def _settle(encoding: Sequence[_Encoded]) -> None:
    """Wait until no worker reads the live cache any more."""
    for item in encoding:
        for job in item.jobs:
            if not job.cancel():
                job.exception()
