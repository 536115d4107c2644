"""The store: one SQLite file that several processes share."""

from __future__ import annotations

import os
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace as with_fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

from kvstore import clock, damage
from kvstore import load as loading
from kvstore import prune as pruning
from kvstore import save as saving
from kvstore import verify as verifying
from kvstore.background import PendingSave, SaveQueue, Workers, check_timeout, report_failures
from kvstore.codec import EXACT, CodecChoice, lossy_text
from kvstore.db import chunks, eviction, models, sessions
from kvstore.db import engine as db
from kvstore.db.schema import Database, open_database
from kvstore.db.sessions import Revision, SessionInfo
from kvstore.db.stats import StoreStats, read_stats
from kvstore.db.vendor import vendor_errors
from kvstore.db.writing import write_transaction
from kvstore.errors import (
    CacheMismatchError,
    CapacityError,
    ClosedStoreError,
    ForkedStoreError,
    InputError,
    ReadOnlyStoreError,
    SaveTimeoutError,
    SessionNotFoundError,
)
from kvstore.layout import Fingerprint, LiveCache
from kvstore.lineage import Edit, before, lineage_of
from kvstore.load import LoadResult
from kvstore.lossy import n_unmarked_tokens, unmarked
from kvstore.manifest import pack_metadata
from kvstore.prefix import DEFAULT_CHUNK_N_TOKENS, KEY_NBYTES, Key
from kvstore.prune import PruneResult
from kvstore.quantity import parse_nbytes
from kvstore.save import SaveResult
from kvstore.save_plan import SaveRequest
from kvstore.source import LiveSource
from kvstore.tokens import TokenIds, common_prefix_n_tokens, token_ids
from kvstore.verify import VerifyReport

DEFAULT_CHECKPOINT_N_TOKENS = 2048
DEFAULT_MAX_PENDING_BYTES = "256 MiB"
_MAX_NAME_N_CHARACTERS = 1024
_MAX_CHUNK_N_TOKENS = 65536
_MAX_BUSY_TIMEOUT_SECONDS = 86_400
_MAX_AGE_SECONDS = 1e12
_CACHE_MEMBERS = (
    *("fingerprint", "layout", "tokens", "held", "capacity_n_tokens", "edits"),
    *("buffer", "truncate", "adopt"),
)
_DEFAULT_MAX_N_THREADS = 8
_MAX_N_THREADS = 64

_T = TypeVar("_T")


class Store:
    """An open store; make one with ``kvstore.open``.

    Safe to share between threads: each call takes its own connection, writes
    take turns. A *cache* is not: while a call works on it, nothing else may run
    the model or use that cache. A store cannot be used after ``fork()``; open
    one in the child. As a context manager it closes itself.

    Saves in the background are written in the order in which they were begun, and every other
    call on the store waits for those that were begun before it.
    """

    def __init__(
        self,
        database: Database,
        *,
        max_nbytes: int | None,
        chunk_n_tokens: int,
        checkpoint_n_tokens: int,
        codec: CodecChoice,
        namespace: str,
        n_threads: int,
        max_pending_nbytes: int,
    ) -> None:
        self._database = database
        self._n_threads = n_threads
        self._max_nbytes = max_nbytes
        self._chunk_n_tokens = chunk_n_tokens
        self._checkpoint_n_tokens = checkpoint_n_tokens
        self._codec = codec
        self._namespace = namespace
        self._pid = os.getpid()
        self._closed = False
        self._workers = Workers(n_threads, thread_name_prefix="kvstore")
        self._queue = SaveQueue(database, max_nbytes=max_pending_nbytes)
        weakref.finalize(self, report_failures, self._queue, database.path, self._pid)
        self._used_chunk_ids: set[int] = set()
        self._damaged: dict[Fingerprint, dict[bytes, int]] = {}  # by adapter: from where on
        self._seen: dict[str, Revision] = {}
        self._calls: set[object] = set()  # in progress
        self._lock = threading.Lock()  # guards the four above and _closed
        self._idle = threading.Condition(self._lock)  # notified when a call ends

    @property
    def path(self) -> Path:
        """The file."""
        return self._database.path

    @property
    def read_only(self) -> bool:
        """Whether the store was opened, or could only be opened, for reading."""
        return self._database.read_only

    @property
    def chunk_n_tokens(self) -> int:
        """Tokens in a full chunk."""
        return self._chunk_n_tokens

    @property
    def namespace(self) -> str:
        """The namespace of names and keys that this store works in."""
        return self._namespace

    @property
    def pending_nbytes(self) -> int:
        """Bytes held in memory for saves in the background; at most ``max_pending_bytes``."""
        return self._queue.nbytes

    @overload
    def save_session(
        self,
        cache: LiveCache,
        tokens: Iterable[int],
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        replace: bool = False,
        background: Literal[False] = False,
    ) -> SaveResult: ...

    @overload
    def save_session(
        self,
        cache: LiveCache,
        tokens: Iterable[int],
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        replace: bool = False,
        background: Literal[True],
    ) -> PendingSave: ...

    @overload
    def save_session(
        self,
        cache: LiveCache,
        tokens: Iterable[int],
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        replace: bool = False,
        background: bool,
    ) -> SaveResult | PendingSave: ...

    def save_session(
        self,
        cache: LiveCache,
        tokens: Iterable[int],
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        replace: bool = False,
        background: bool = False,
    ) -> SaveResult | PendingSave:
        """Store the cache's content for ``tokens``; returns what was new and what was there.

        ``tokens`` must be what the cache holds, or the start of it. With a
        ``name``, the session with its ``metadata`` is published in the last
        transaction: another process sees all of it or none. Without a name the
        tokens are cache that a prune may take. What lies behind an edit of the
        cache (``cache.edits``) is stored under keys that carry the edit, and
        comes back to whoever asks for these edits, or loads the session by name.

        With ``background``, what the file does not have yet is copied, and compressed and
        written behind the caller, who may go on with the cache at once: computing, truncating,
        loading. What is wrong with the arguments is raised here; everything else is told by the
        ``PendingSave``, or else by ``flush`` and ``close``. While the copies would take more than
        ``max_pending_bytes``, the call waits for earlier saves; where they would by themselves,
        it saves before it returns. A process that ends by itself finishes its saves first, one
        that is killed leaves the former session.

        Raises:
            TokensError: ``tokens`` is empty or not integer ids.
            MetadataError: ``metadata`` cannot be stored.
            CapacityError: more tokens than the cache has room for.
            CacheMismatchError: the cache holds fewer tokens, or other ones.
            SessionConflictError: ``name`` belongs to another model's session, or another
                process saved it since this store loaded or saved it, or looked for it in
                vain; and ``replace`` is False.
            BudgetError: ``max_bytes`` cannot hold it; in the background, beside what saves begun
                meanwhile are going to build on, which is not evicted.
            StoreBusyError: in the background only: another process, or a delete or prune on
                another thread, deleted what the file
                had when the save was begun, and nothing was copied of; save again.
            StoreError: the file cannot be written (full disk, read-only, busy).
        """
        self._check_writable()
        ids = token_ids(tokens)
        _check_cache(cache)
        _check_held(cache, ids)
        names = self._codec.names(cache.layout)
        codec_text = lossy_text(names, cache.layout)
        lineage = before(lineage_of(cache.edits), len(ids))
        source = LiveSource(cache)
        request = SaveRequest(
            cache=source,
            ids=ids,
            lineage=unmarked(lineage) if codec_text else lineage,
            n_unmarked_tokens=n_unmarked_tokens(lineage, len(ids)),
            name=None if name is None else _check_name(name),
            metadata=pack_metadata(metadata),
            replace=replace,
            namespace=self._namespace,
            chunk_n_tokens=self._chunk_n_tokens,
            max_nbytes=self._max_nbytes,
            checkpoint_n_tokens=self._checkpoint_n_tokens,
            codec_text=codec_text,
            codec_names=names,
            seen=None,  # known when its turn has come
            kept=self._queue.kept_chunk_ids,
        )
        if not background:
            with self._call():
                self._drop_damaged(request)
                return self._save(request)
        with self._call(waits=False):
            self._drop_damaged(request)
            return self._queue.begin(request, source, self._save)

    def flush(self, timeout: float | None = None) -> None:
        """Wait until all that was saved in the background before now is in the file.

        Raises:
            SaveTimeoutError: it is not, after ``timeout`` seconds; the saves go on.
            KVStoreError: one of the saves failed, and nobody was told by its ``PendingSave``: the
                first such failure. The next call raises the next.
        """
        self._check_usable()
        check_timeout(timeout)
        self._queue.wait(timeout)
        failure = self._queue.take_failure()
        if failure is not None:
            raise failure

    def load_session(
        self,
        cache: LiveCache,
        tokens: Iterable[int] | None = None,
        *,
        name: str | None = None,
        edits: Iterable[Edit] = (),
        whole: bool = False,
    ) -> LoadResult:
        """Put the longest stored prefix into the live cache; returns how far it got and why.

        Either ``tokens`` (the longest prefix over all sessions of this model) or
        ``name`` (that session's own tokens). At most all but the last token are
        restored, so that ``forward`` on the rest gives the next logits; with ``whole`` the last
        one too, for who has its logits or goes on with other tokens. What the cache holds already
        and ``tokens`` share is kept. Afterwards the cache
        holds exactly ``result.tokens[:result.n_tokens]``, also after a failure.
        Content that came about by an edit is restored only with the session's
        name, or if ``edits`` has that edit; ``result.edits`` says so.

        Raises:
            TokensError: ``tokens`` is empty or not integer ids.
            InputError: both or neither of ``tokens`` and ``name``; ``edits`` with a name, or
                not in order.
            SessionNotFoundError: no session has that name.
            StoreError: the file cannot be read at all.
        """
        self._check_usable()
        if (tokens is None) == (name is None):
            found = "neither" if tokens is None else "both"
            raise InputError(f"load_session: expected either tokens or name=, found {found}")
        lineage = lineage_of(edits)
        if name is not None and lineage:
            raise InputError("load_session: expected edits= with tokens; a session has its own")
        _check_cache(cache)
        request = loading.LoadRequest(
            cache=cache,
            ids=None if tokens is None else token_ids(tokens),
            lineage=lineage,
            is_whole=whole,
            codec_text=lossy_text(self._codec.names(cache.layout), cache.layout),
            name=None if name is None else _check_name(name),
            namespace=self._namespace,
            chunk_n_tokens=self._chunk_n_tokens,
        )
        with self._call():
            try:
                loaded = loading.load(
                    self._database, request, workers=self._workers, n_threads=self._n_threads
                )
            except SessionNotFoundError:
                self._remember(name, sessions.ABSENT)
                raise
            self._remember(name, loaded.revision)
        with self._lock:
            if loaded.used_chunk_id is not None:
                self._used_chunk_ids.add(loaded.used_chunk_id)
            for one in loaded.damaged:
                self._damaged.setdefault(cache.fingerprint, {})[one.adapter] = one.n_tokens
        return loaded.result

    def sessions(self, *, all_namespaces: bool = False) -> list[SessionInfo]:
        """The named sessions of this namespace (or of all), the last saved first."""
        namespace = None if all_namespaces else self._namespace
        return self._read(lambda connection: sessions.all_in(connection, namespace=namespace))

    def models(self) -> list[Fingerprint]:
        """The models that anything is stored for, oldest first."""
        return self._read(models.fingerprints)

    def stats(self) -> StoreStats:
        """Sizes and counts; touches no payload."""
        return self._read(read_stats)

    def delete_session(self, name: str) -> None:
        """Delete a session, and in the same transaction what only it needed.

        Raises:
            SessionNotFoundError: no session has that name.
        """
        self._check_writable()
        with self._call():
            with write_transaction(self._database.engine) as connection:
                session_id = sessions.id_of(
                    connection, namespace=self._namespace, name=_check_name(name)
                )
                if session_id is None:
                    raise SessionNotFoundError(
                        f"{self.path}: no session is named {name!r}{_where(self._namespace)}; "
                        "`kvstore ls` lists them"
                    )
                head_id = sessions.head_of(connection, session_id)
                sessions.delete(connection, session_id)
                eviction.release(connection, head_id)
                models.delete_unused(connection)
                db.shrink(connection)
            db.checkpoint(self._database.engine)

    def prune(
        self,
        *,
        max_bytes: int | str | None = None,
        unused_for_seconds: float | None = None,
        model: bytes | None = None,
        dry_run: bool = False,
    ) -> PruneResult:
        """Delete chunks, the least recently used first, and give the space back.

        Chunks not used for ``unused_for_seconds`` go, then as many as it takes
        to bring the file under ``max_bytes``; ``model`` (a fingerprint, 32
        bytes) limits both to one model, and alone lets all of its chunks go.
        Sessions keep their tokens and metadata. With ``dry_run`` nothing is
        written.

        Raises:
            InputError: none of the three was given, or one is not possible.
        """
        if max_bytes is None and unused_for_seconds is None and model is None:
            raise InputError("prune: expected max_bytes, unused_for_seconds or model, found none")
        if unused_for_seconds is not None:
            _check_age(unused_for_seconds)
        if model is not None and (type(model) is not bytes or len(model) != KEY_NBYTES):
            raise InputError(
                f"model: expected a fingerprint's {KEY_NBYTES} bytes (Fingerprint.model), "
                f"found {model!r:.80}"
            )
        unused_since_ms = None
        if unused_for_seconds is not None:
            unused_since_ms = clock.now_ms() - int(unused_for_seconds * 1000)
        limits = {
            "max_nbytes": None if max_bytes is None else parse_nbytes(max_bytes),
            "unused_since_ms": unused_since_ms,
        }
        if dry_run:
            return self._read(lambda connection: pruning.preview(connection, model=model, **limits))
        self._check_writable()
        with self._call():
            self._flush_used()
            with write_transaction(self._database.engine) as connection:
                result = pruning.prune(connection, model=model, **limits)
            db.checkpoint(self._database.engine)
        return result

    def verify(self) -> VerifyReport:
        """Check everything that the file says of itself, each blob's checksum included."""
        self._check_usable()
        with self._call():
            return verifying.verify(self._database)

    def close(self, timeout: float | None = None) -> None:
        """Wait for calls and saves in progress, write the last-used marks, let go of the file.

        Closing twice is fine. While it waits, calls of other threads are refused already
        (``ClosedStoreError``), also if it then raises and the store stays open.

        Raises:
            SaveTimeoutError: they were not done after ``timeout`` seconds; the store stays open.
            KVStoreError: a save in the background failed, and nobody was told: the first such
                failure, with the others as notes. The store is closed.
        """
        if os.getpid() != self._pid:
            self._closed = True
            return  # the parent's connections, and its locks, are not ours to close
        check_timeout(timeout)
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self._wait_until_idle(timeout)
        except BaseException:
            self._closed = False  # interrupted, or not in time: it can be closed again
            raise
        self._queue.close()
        self._workers.shutdown(wait=True)
        self._flush_used()
        self._database.close()
        first = self._queue.take_failure()
        if first is not None:
            while (other := self._queue.take_failure()) is not None:
                first.add_note(f"and another save in the background failed: {other}")
            raise first

    def _wait_until_idle(self, timeout: float | None) -> None:
        began = time.monotonic()
        with self._idle:
            wait = None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
            if not self._idle.wait_for(lambda: not self._calls, wait):
                raise SaveTimeoutError(
                    f"{self.path}: expected the calls in progress to end within {timeout} seconds, "
                    f"but {len(self._calls)} of them go on; close again"
                )
        rest = None if timeout is None else max(0.0, timeout - (time.monotonic() - began))
        self._queue.wait(rest)

    def __enter__(self) -> Self:
        self._check_usable()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if exc is None:
                raise
            kind = type(failure).__name__
            exc.add_note(f"and a save in the background, or closing, failed: {kind}: {failure}")

    def __repr__(self) -> str:
        return f"<kvstore.Store {str(self.path)!r}{' read-only' if self.read_only else ''}>"

    @contextmanager
    def _call(self, *, waits: bool = True) -> Iterator[None]:
        """What every call on the file runs in: ``close`` waits for it, errors are ours.

        It ``waits`` for the saves that were begun before it.
        """
        if waits:
            self._queue.wait()
        call = object()
        try:
            with self._lock:
                if self._closed:
                    raise self._closed_error()
                self._calls.add(call)
            with vendor_errors(self.path):
                yield
        finally:
            # Not counted up and down: an interrupt between would leave a call that never ends.
            self._calls.discard(call)
            with self._idle:
                self._idle.notify_all()

    def _closed_error(self) -> ClosedStoreError:
        return ClosedStoreError(f"{self.path}: this store is closed; open it again")

    def _read(self, query: Callable[[Any], _T]) -> _T:
        self._check_usable()
        with self._call(), db.read_transaction(self._database.engine) as connection:
            return query(connection)

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedStoreError(
                f"{self.path}: this store was opened in another process (before fork()); "
                "open it again in this one"
            )
        if self._closed:
            raise self._closed_error()

    def _check_writable(self) -> None:
        self._check_usable()
        if self.read_only:
            raise ReadOnlyStoreError(
                f"{self.path}: the store is open read-only; open it where it may be written"
            )

    def _save(self, request: SaveRequest) -> SaveResult:
        """What a save does when its turn has come; in the background on the queue's thread."""
        with vendor_errors(self.path):
            seen = None if request.name is None else self._seen.get(request.name)
            request = with_fields(request, seen=seen)
            saved = saving.save(self._database, request, self._workers)
            self._remember(request.name, saved.revision)
            self._flush_used()
        return saved.result

    def _remember(self, name: str | None, revision: Revision | None) -> None:
        """What this store last saw of a session: a save goes on from there, or is refused."""
        if name is not None and revision is not None:
            with self._lock:
                self._seen[name] = revision

    def _drop_damaged(self, request: SaveRequest) -> None:
        """Make room for what a load of this model found damaged to be written again."""
        fingerprint = request.cache.fingerprint
        with self._lock:
            found = self._damaged.get(fingerprint, {}).copy()
        if not found:
            return
        self._queue.wait()
        for adapter, start in found.items():
            key = self._find_damaged(request, adapter, start)
            if key is not None:
                damage.drop(self._database.engine, key)
        with self._lock:
            self._damaged.pop(fingerprint, None)

    def _find_damaged(self, request: SaveRequest, adapter: bytes, start: int) -> Key | None:
        """The damaged chunk on the path of ``request`` in the key space of that adapter."""
        with db.read_transaction(self._database.engine) as connection:
            space = models.find_space(
                connection,
                request.cache.fingerprint,
                chunk_n_tokens=self._chunk_n_tokens,
                namespace=self._namespace,
                adapter=adapter,
            )
            if space is None:
                return None
            layout, ids, lineage = request.cache.layout, request.ids, request.lineage
            return damage.find_damaged(connection, space, layout, ids, lineage, start=start)

    def _flush_used(self) -> None:
        """Write the last-used marks; best effort, nobody waits or fails for them."""
        with self._lock:
            used, self._used_chunk_ids = self._used_chunk_ids, set()
        if not used or self.read_only:
            return
        try:
            with write_transaction(self._database.engine) as connection:
                chunks.touch(connection, used, now_ms=clock.now_ms())
        except Exception:  # noqa: BLE001  # losing a mark costs a worse eviction, no more
            return


def open_store(
    path: str | os.PathLike[str],
    *,
    max_bytes: int | str | None = None,
    read_only: bool = False,
    chunk_n_tokens: int = DEFAULT_CHUNK_N_TOKENS,
    checkpoint_n_tokens: int = DEFAULT_CHECKPOINT_N_TOKENS,
    codec: str = EXACT,
    namespace: str = "",
    busy_timeout_seconds: float = db.BUSY_TIMEOUT_SECONDS,
    n_threads: int | None = None,
    mmap: bool = False,
    max_pending_bytes: int | str = DEFAULT_MAX_PENDING_BYTES,
) -> Store:
    """An open store at ``path``; a new file is made, an older one upgraded.

    Args:
        path: The SQLite file. Its folder must exist.
        max_bytes: Bound of the file's size at every commit, as a number of
            bytes or text like ``"2 GiB"``. Opening prunes down to it.
        read_only: Never write. A file or folder that may not be written is
            opened so by itself.
        chunk_n_tokens: Tokens in a chunk; sessions are only found by stores
            with the same number.
        checkpoint_n_tokens: How often a session keeps a checkpoint of recurrent
            state: one in that many tokens, and always the newest.
        codec: How new content is written: ``"exact"`` compresses what gets
            shorter, ``"raw"`` writes it as it is; both give every byte back. The
            lossy ones are ``"half"``, ``"int8"``, ``"int8-channel"``, ``"int4"`` and ``"pca"``, or
            a mix such as ``"k=int8,v=int4"`` or ``"0-1=exact,k=int8"`` (layers). What they wrote
            is only found by a store with the same codec (which finds exact content too), or by
            a session's name. ``"pca"`` learns from the first save of 1,536 tokens that nothing
            lossy touched, and is exact until then.
        namespace: Separates names and keys of several applications in one file.
        busy_timeout_seconds: How long a write waits for another process.
        n_threads: How many threads decode a load's bytes and compress a save's;
            as many as there are cores (8 at most), if None.
        mmap: Read the file through a memory mapping: about a third faster where it
            is in the page cache. An I/O error, or another program that cuts the file
            short, then ends the process (SIGBUS) instead of raising: only for files
            on storage that stays.
        max_pending_bytes: Bound of the memory that saves in the background hold, as
            ``max_bytes``. With 0 they are done before they return.

    Raises:
        InputError: an argument is out of range.
        StoreError: see ``kvstore.errors``: a path that is no usable file, a file
            that is not ours, tampered with, or newer than this version.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"expected a path as text or os.PathLike, found {path!r:.80}")
    if isinstance(chunk_n_tokens, bool) or not isinstance(chunk_n_tokens, int):
        raise InputError(f"chunk_n_tokens: expected an integer, found {chunk_n_tokens!r}")
    if not 1 <= chunk_n_tokens <= _MAX_CHUNK_N_TOKENS:
        raise InputError(
            f"chunk_n_tokens: expected 1 to {_MAX_CHUNK_N_TOKENS}, found {chunk_n_tokens}"
        )
    if isinstance(checkpoint_n_tokens, bool) or not isinstance(checkpoint_n_tokens, int):
        raise InputError(f"checkpoint_n_tokens: expected an integer, found {checkpoint_n_tokens!r}")
    if checkpoint_n_tokens < 1:
        raise InputError(f"checkpoint_n_tokens: expected 1 or more, found {checkpoint_n_tokens}")
    choice = CodecChoice(codec)
    _check_text(namespace, what="namespace")
    _check_timeout(busy_timeout_seconds)
    n_threads = _check_n_threads(n_threads)
    max_nbytes = None if max_bytes is None else parse_nbytes(max_bytes)
    max_pending_nbytes = parse_nbytes(max_pending_bytes)
    database = open_database(
        Path(path),
        read_only=read_only,
        busy_timeout_seconds=busy_timeout_seconds,
        mmap_nbytes=db.MAX_MMAP_NBYTES if mmap else 0,
    )
    store = Store(
        database,
        max_nbytes=max_nbytes,
        chunk_n_tokens=chunk_n_tokens,
        checkpoint_n_tokens=checkpoint_n_tokens,
        codec=choice,
        namespace=namespace,
        n_threads=n_threads,
        max_pending_nbytes=max_pending_nbytes,
    )
    if max_nbytes is not None and not store.read_only:
        try:
            store.prune(max_bytes=max_nbytes)
        except BaseException:
            store.close()
            raise
    return store


def _where(namespace: str) -> str:
    return f" in namespace {namespace!r}" if namespace else ""


def _check_timeout(seconds: Any) -> None:
    if not isinstance(seconds, int | float) or not 0 <= seconds <= _MAX_BUSY_TIMEOUT_SECONDS:
        raise InputError(
            f"busy_timeout_seconds: expected 0 to {_MAX_BUSY_TIMEOUT_SECONDS} seconds, "
            f"found {seconds!r:.80}"
        )


def _check_n_threads(n_threads: Any) -> int:
    if n_threads is None:
        return max(1, min(_DEFAULT_MAX_N_THREADS, _n_cores()))
    is_integer = isinstance(n_threads, int) and not isinstance(n_threads, bool)
    if not is_integer or not 1 <= n_threads <= _MAX_N_THREADS:
        raise InputError(f"n_threads: expected 1 to {_MAX_N_THREADS}, found {n_threads!r:.80}")
    return int(n_threads)


def _n_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_age(seconds: Any) -> None:
    if not isinstance(seconds, int | float) or not 0 <= seconds < _MAX_AGE_SECONDS:
        raise InputError(f"unused_for_seconds: expected 0 seconds or more, found {seconds!r:.80}")


def _check_name(name: Any) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME_N_CHARACTERS:
        raise InputError(
            f"expected a session name of 1 to {_MAX_NAME_N_CHARACTERS} characters, "
            f"found {name!r:.80}"
        )
    return _check_text(name, what="session name")


def _check_text(text: Any, *, what: str) -> str:
    """Refuse what has no UTF-8 form, and NUL, where SQLite's own functions end a text."""
    if not isinstance(text, str):
        raise InputError(f"{what}: expected text, found {type(text).__name__}")
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"{what}: expected text that UTF-8 can write, found {text!r:.80}"
        ) from None
    if b"\0" in encoded:
        raise InputError(f"{what}: expected text without NUL characters, found {text!r:.80}")
    return text


def _check_cache(cache: LiveCache) -> None:
    lacking = [name for name in _CACHE_MEMBERS if not hasattr(cache, name)]
    if lacking:
        raise InputError(
            f"expected a live cache such as model.cache, found {type(cache).__name__} without "
            f"{', '.join(lacking)}; see kvstore.LiveCache"
        )
    if cache.fingerprint.layout != cache.layout.digest:
        raise CacheMismatchError(
            "the cache's layout is not the one in its fingerprint; make the fingerprint from it"
        )


def _check_held(cache: LiveCache, ids: TokenIds) -> None:
    """Refuse ids that the cache does not hold from position 0 on."""
    capacity = cache.capacity_n_tokens
    if len(ids) > capacity:
        raise CapacityError(
            f"expected at most {capacity} tokens (the cache's capacity), found {len(ids)}"
        )
    held = array("Q", cache.tokens)
    common = common_prefix_n_tokens(held, ids)
    if common == len(ids):
        return
    if common == len(held):
        raise CacheMismatchError(
            f"expected a cache that holds the {len(ids)} tokens given, but it holds {common}; "
            "run forward on the rest first, or save only those"
        )
    raise CacheMismatchError(
        f"the cache holds token {held[common]} at position {common}, the tokens given say "
        f"{ids[common]}; save what the cache holds (cache.tokens)"
    )
