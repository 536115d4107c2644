"""Saves in the background: a queue of snapshots, one thread that writes them, and a bound."""

from __future__ import annotations

import os
import threading
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kvstore.db import engine as db
from kvstore.db.schema import Database
from kvstore.errors import ForkedStoreError, InputError, KVStoreError, SaveTimeoutError
from kvstore.save import SaveResult
from kvstore.save_plan import SaveRequest, plan_copy
from kvstore.snapshot import Copied, Snapshot, SnapshotPlan, plan_snapshot, take
from kvstore.source import LiveSource
from kvstore.tokens import TOKEN_NBYTES
from kvstore.training import with_lessons

_T = TypeVar("_T")

Execute = Callable[[SaveRequest], SaveResult]
"""Carries out one save; the caller of ``SaveQueue.begin`` says how."""


@dataclass(slots=True, eq=False)
class _Ticket:
    """One save, between the queue and whoever waits for it."""

    future: Future[SaveResult]
    is_told: bool = False


class PendingSave:
    """A save that goes on behind its caller; see ``Store.save_session``.

    A failure that is asked for here, by ``result`` or ``exception``, is not raised again by
    ``Store.flush`` and ``Store.close``.
    """

    def __init__(self, path: Path, name: str | None, ticket: _Ticket) -> None:
        self._path = path
        self._name = name
        self._ticket = ticket
        self._pid = os.getpid()

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        self._check_process()
        return self._ticket.future.done()

    def did_well(self) -> bool:
        """Whether it has ended, and well; asking so tells nobody of a failure."""
        return self.done() and self._ticket.future.exception() is None

    @property
    def is_told(self) -> bool:
        """Whether somebody was told how it ended: here, or by a flush or close."""
        return self._ticket.is_told

    def result(self, timeout: float | None = None) -> SaveResult:
        """What the save did; waits for it, for ``timeout`` seconds at most.

        Raises:
            SaveTimeoutError: it has not ended by then; it goes on.
            KVStoreError: it failed; see ``Store.save_session``.
        """
        error = self.exception(timeout)
        if error is not None:
            raise _to_raise(error)
        return self._ticket.future.result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error that the save ended with, or None if it did well; waits as ``result`` does.

        Raises:
            SaveTimeoutError: it has not ended by then; it goes on.
        """
        self._check_process()
        check_timeout(timeout)
        try:
            error = self._ticket.future.exception(_bounded(timeout))
        except TimeoutError:
            raise SaveTimeoutError(
                f"{self._path}: expected the save of {self._name!r} to end within {timeout} "
                "seconds, but it goes on; wait longer, or ask again later"
            ) from None
        self._ticket.is_told = True
        return error

    def __repr__(self) -> str:
        state = "done" if self._ticket.future.done() else "pending"
        return f"<kvstore.PendingSave {self._name!r} {state}>"

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedStoreError(
                f"{self._path}: this save was begun in another process (before fork()), which "
                "ends it; open the store again in this one"
            )


class Workers(ThreadPoolExecutor):
    """Threads; where none can be started (the interpreter is ending), work is done at once."""

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        """As in ``Executor``."""
        future: Future[_T] = Future()
        # Who takes it does it: what could not get a new thread stays in the queue of the others.
        work = [partial(fn, *args, **kwargs)]
        try:
            super().submit(_do, work, future)
        except RuntimeError:
            _do(work, future)
        return future


def _do(work: list[partial[_T]], future: Future[_T]) -> None:
    """Do the work, unless it is done already or nobody wants it any more."""
    try:
        call = work.pop()
    except IndexError:
        return
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001  # whoever asks the future gets it
        future.set_exception(error)
        del future  # the error has this frame, and would keep itself


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Waiting:
    """A snapshot on its way into the file."""

    request: SaveRequest
    execute: Execute
    snapshot: Snapshot
    own_nbytes: int
    ticket: _Ticket


class SaveQueue:
    """The saves of one store that were begun and are not in the file yet.

    Invariants: they are written one at a time, in the order in which they were begun; what
    is held for them never takes more than ``max_nbytes``, token ids and metadata included.
    Memory that snapshots share counts once, until the last of them is written.
    """

    def __init__(self, database: Database, *, max_nbytes: int) -> None:
        self._database = database
        self._max_nbytes = max_nbytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvstore-save")
        self._turn = threading.Lock()  # who holds it begins a save
        self._keeping = threading.RLock()  # no save is planned while another one deletes
        self._changed = threading.Condition()  # guards what follows; notified when a save ends
        self._waiting: deque[_Waiting] = deque()
        self._running: _Waiting | None = None
        self._is_saving_here = False  # without a snapshot, on the thread of who began it
        self._n_done = 0
        self._nbytes = 0
        self._n_users: Counter[int] = Counter()  # snapshots by the id of memory that they hold
        self._failed: list[_Ticket] = []
        self._kept: dict[_Ticket, frozenset[int]] = {}  # what each is going to build on

    @property
    def nbytes(self) -> int:
        """Bytes that are held for saves that are not in the file yet."""
        return self._nbytes

    @contextmanager
    def kept_chunk_ids(self) -> Iterator[frozenset[int]]:
        """Rows of the chunks that saves are going to build on; meanwhile none are added.

        Whoever deletes others stays in here until that is in the file: a save that is planned
        then does not find them. May be entered again. Comes after the file's write lock.
        """
        with self._keeping:
            with self._changed:
                kept = frozenset().union(*self._kept.values())
            yield kept

    def begin(self, request: SaveRequest, cache: LiveSource, execute: Execute) -> PendingSave:
        """Take a snapshot of what ``request`` needs of ``cache``, and save it behind the caller.

        Waits for earlier saves while there is no room for the snapshot. One that has no room
        even by itself is not taken: then the save is done when this returns.
        """
        ticket = _Ticket(Future())
        pending = PendingSave(self._database.path, request.name, ticket)
        own_nbytes = len(request.ids) * TOKEN_NBYTES + len(request.metadata)
        with self._turn:
            plan = self._reserve(request, own_nbytes, ticket)
            if plan is None:
                self._save_here(request, execute, ticket)
                return pending
            try:
                snapshot = take(request, cache, plan)
            except BaseException:
                with self._changed:
                    self._nbytes -= own_nbytes + plan.nbytes
                    self._let_go(plan.shared)
                    del self._kept[ticket]
                raise
            with self._changed:
                self._hold(set(snapshot.copies) - set(plan.shared))
                self._waiting.append(
                    _Waiting(
                        request=replace(request, cache=snapshot),
                        execute=execute,
                        snapshot=snapshot,
                        own_nbytes=own_nbytes,
                        ticket=ticket,
                    )
                )
            self._go_on()
        return pending

    def wait(self, timeout: float | None = None) -> None:
        """Wait until every save that was begun before now has ended.

        Raises:
            SaveTimeoutError: they have not, after ``timeout`` seconds; they go on.
        """
        self._go_on()
        with self._changed:
            last = self._n_begun
            if not self._changed.wait_for(lambda: self._n_done >= last, _bounded(timeout)):
                raise SaveTimeoutError(
                    f"{self._database.path}: expected the saves in the background to end within "
                    f"{timeout} seconds, but {last - self._n_done} of them go on; wait longer"
                )

    def take_failure(self) -> BaseException | None:
        """The first failure that nobody was told, told herewith; None if there is none."""
        with self._changed:
            self._failed = [one for one in self._failed if not one.is_told]
            if not self._failed:
                return None
            first = self._failed.pop(0)
            first.is_told = True
            error = first.future.exception()
            return None if error is None else _to_raise(error)

    def close(self) -> None:
        """End the thread, after what waits for it."""
        self._thread.shutdown(wait=True)

    @property
    def _n_begun(self) -> int:
        n_running = (self._running is not None) + self._is_saving_here
        return self._n_done + n_running + len(self._waiting)

    def _save_here(self, request: SaveRequest, execute: Execute, ticket: _Ticket) -> None:
        """Save what has no room as a snapshot; others wait for it as for any save."""
        try:
            with self._changed:
                self._is_saving_here = True
            result, error = _outcome(execute, request)
            with self._changed:
                self._settle(ticket, result, error)
        finally:
            with self._changed:
                self._is_saving_here = False
                self._n_done += 1
                self._changed.notify_all()

    def _reserve(
        self, request: SaveRequest, own_nbytes: int, ticket: _Ticket
    ) -> SnapshotPlan | None:
        """Room for a snapshot, as soon as there is; None if it has none even by itself.

        What it builds on is kept from now on.
        """
        while True:
            with self._changed:
                n_done = self._n_done
            # The transaction sees the file as it is at its first query: behind whoever deletes.
            with db.read_transaction(self._database.engine) as connection, self._keeping:
                wanted = plan_copy(connection, request)
                wanted = with_lessons(connection, request, wanted, self._database.bases)
                with self._changed:
                    running = [] if self._running is None else [self._running]
                    others = [one.snapshot for one in (*running, *self._waiting)]
                    plan = plan_snapshot(request, wanted, others)
                    if self._nbytes + own_nbytes + plan.nbytes <= self._max_nbytes:
                        self._nbytes += own_nbytes + plan.nbytes
                        self._hold(plan.shared)
                        self._kept[ticket] = wanted.chunk_ids
                        return plan
                    if n_done == self._n_begun:
                        return None
            self._go_on()
            with self._changed:
                # What ends meanwhile need not be copied any more, so it is planned again.
                while self._n_done == n_done:
                    self._changed.wait()

    def _go_on(self) -> None:
        """See to it that what waits is written, also where its beginning was interrupted.

        By the thread; where it cannot be started (the interpreter is ending), by the caller.
        """
        if not self._waiting:
            return
        try:
            self._thread.submit(self._run_waiting)
        except RuntimeError:
            self._run_waiting()

    def _run_waiting(self) -> None:
        """Write all saves that wait, the one that has waited longest first."""
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        with self._changed:
            while self._waiting and self._running is not None:  # on another thread
                self._changed.wait()
            if not self._waiting:
                return False
            running = self._running = self._waiting.popleft()
        try:
            result, error = _outcome(running.execute, running.request)
        except BaseException:  # a caller's thread was interrupted: the next call does it
            with self._changed:
                self._waiting.appendleft(running)
                self._running = None
                self._changed.notify_all()
            raise
        with self._changed:
            self._running = None
            self._nbytes -= running.own_nbytes
            self._let_go(running.snapshot.copies)
            running.snapshot.clear()
            del self._kept[running.ticket]
            self._settle(running.ticket, result, error)
            self._n_done += 1
            self._changed.notify_all()
        return True

    def _settle(
        self, ticket: _Ticket, result: SaveResult | None, error: BaseException | None
    ) -> None:
        if error is not None:
            self._failed = [one for one in self._failed if not one.is_told]
            self._failed.append(ticket)
            ticket.future.set_exception(error)
        elif result is not None:
            ticket.future.set_result(result)

    def _hold(self, copies: Iterable[Copied]) -> None:
        """One more snapshot needs these."""
        self._n_users.update({id(one.memory) for one in copies})

    def _let_go(self, copies: Iterable[Copied]) -> None:
        """One snapshot less needs these; what none needs any more does not count."""
        for key, memory in {id(one.memory): one.memory for one in copies}.items():
            self._n_users[key] -= 1
            if not self._n_users[key]:
                del self._n_users[key]
                self._nbytes -= memory.nbytes


def report_failures(queue: SaveQueue, path: Path, pid: int) -> None:
    """Warn of failures that nobody was told, when a store goes without having been closed."""
    while os.getpid() == pid and (error := queue.take_failure()) is not None:
        warnings.warn(
            f"{path}: a save in the background failed, and nobody asked for it: "
            f"{type(error).__name__}: {error}; close the store, or flush it",
            RuntimeWarning,
            stacklevel=2,
        )


def check_timeout(seconds: Any) -> None:
    """Refuse what is no time to wait.

    Raises:
        InputError: it is neither None nor a number of seconds of at least 0.
    """
    if seconds is not None and not (isinstance(seconds, int | float) and seconds >= 0):
        raise InputError(f"timeout: expected None or 0 seconds or more, found {seconds!r:.80}")


def _bounded(timeout: float | None) -> float | None:
    """No more than the platform can wait."""
    return None if timeout is None else min(timeout, threading.TIMEOUT_MAX)


def _outcome(
    execute: Execute, request: SaveRequest
) -> tuple[SaveResult | None, BaseException | None]:
    """What a save gave, or the error it ended with."""
    try:
        return execute(request), None
    except KeyboardInterrupt:  # of a save on a caller's thread: others get none
        raise
    except BaseException as error:  # noqa: BLE001  # whoever waits for it is told
        if not isinstance(error, KVStoreError):
            error.add_note("".join(traceback.format_exception(error)))
        _forget_frames(error)
        return None, error


def _to_raise(error: BaseException) -> BaseException:
    """A copy, if it can be copied: what is raised holds its callers' frames, and their caches."""
    try:
        other = copy(error)
    except Exception:  # noqa: BLE001  # an error of somebody else's, made in its own way
        return error.with_traceback(None)
    if hasattr(error, "__notes__"):
        other.__notes__ = list(error.__notes__)
    other.__cause__, other.__context__ = error.__cause__, error.__context__
    other.__suppress_context__ = error.__suppress_context__
    return other


def _forget_frames(error: BaseException) -> None:
    """Take the tracebacks away: their frames hold the snapshot, for as long as the error is kept.

    One of ours says by itself what is wrong; others have the text of theirs as a note.
    """
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is not None and link.__traceback__ is not None:
            link.__traceback__ = None
            links += [link.__cause__, link.__context__]
