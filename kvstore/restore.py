"""Restoring: planned blobs -> rows -> codec -> live buffers, on several threads.

Each thread reads a row on a connection of its own, decodes it straight into the live buffer and
checks it there, then takes the next: nobody waits for a reader, and no thread holds more than one
row. The caller's thread is one of them, on the connection that the plan was made on.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore import regions
from kvstore.blob import decode_blob
from kvstore.db import blobs
from kvstore.db.readers import Readers
from kvstore.db.vendor import as_store_error
from kvstore.errors import CorruptStoreError
from kvstore.layout import LiveCache
from kvstore.load_plan import LoadItem, LoadStep
from kvstore.match import blob_raw_nbytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_NBYTES_A_HELPER = 1 << 20
"""Stored bytes that are worth waking one more thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Who restores: ``n_threads`` with the caller's own; the others are ``workers``."""

    workers: Executor
    readers: Readers
    n_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One blob; ``number`` is its place in the plan."""

    number: int
    item: LoadItem


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """A blob that could not be put in place, and why."""

    task: _Task
    error: CorruptStoreError | sqlite3.Error


class Restore:
    """The blobs of a plan on their way into a live cache.

    Helpers read on connections that may see a newer state of the file than the plan's: a row may
    be gone, or its number be given to other content, which its checksum tells. What a helper
    cannot read is read again on the plan's own connection; only that one's word counts.
    """

    def __init__(self, cache: LiveCache, steps: Sequence[LoadStep], *, path: Path) -> None:
        self._cache = cache
        self._steps = steps
        self._path = path
        items = [item for step in steps for item in step.items]
        self._todo = deque(_Task(number=number, item=item) for number, item in enumerate(items))
        self._given_back: list[_Task] = []
        self._placed: dict[int, LoadItem] = {}

    @property
    def n_steps(self) -> int:
        """How many steps from the first on are in place, whole and verified."""
        stop = 0
        for n_steps, step in enumerate(self._steps):
            start, stop = stop, stop + len(step.items)
            if any(number not in self._placed for number in range(start, stop)):
                return n_steps
        return len(self._steps)

    @property
    def raw_nbytes(self) -> int:
        """Bytes that were put in place."""
        tensors = self._cache.layout.tensors
        return sum(
            blob_raw_nbytes(tensors[item.row.tensor], item.start, item.stop)
            for item in self._placed.values()
        )

    @property
    def stored_nbytes(self) -> int:
        """Bytes that were read for them."""
        return sum(item.row.stored_nbytes for item in self._placed.values())

    def run(self, driver: sqlite3.Connection, crew: Crew) -> None:
        """Put all blobs in place; ``driver`` is the connection that they were planned on.

        When it returns or raises, no thread writes into the cache any more.

        Raises:
            StoreError: a blob cannot be read; all steps before its own are in place.
        """
        nbytes = sum(item.row.stored_nbytes for step in self._steps for item in step.items)
        with self._helped(crew, n_helpers=min(crew.n_threads - 1, nbytes // _NBYTES_A_HELPER)):
            failure = self._work(driver)
            if failure is not None:
                self._todo.clear()
        # No helper works any more. What they could not read may lie before a failure.
        self._todo.extend(sorted(self._given_back, key=lambda task: task.number))
        again = self._work(driver)
        failures = [one for one in (failure, again) if one is not None]
        if failures:
            error = min(failures, key=lambda one: one.task.number).error
            raise as_store_error(error, self._path) from error

    @contextmanager
    def _helped(self, crew: Crew, *, n_helpers: int) -> Iterator[None]:
        """Let others work on the same blobs meanwhile; they have all stopped at the end."""
        helpers: list[Future[None]] = []
        try:
            for _ in range(n_helpers):
                helper = crew.workers.submit(self._help, crew.readers)
                helpers.append(helper)  # at once: what was submitted is waited for
            yield
            for started in helpers:
                if not started.cancel():  # it may wait behind other calls' work
                    started.result()
        finally:
            self._todo.clear()
            _settle(helpers)

    def _help(self, readers: Readers) -> None:
        """Work on a connection of this thread's own, as long as it can be relied on."""
        if not self._todo:
            return
        try:
            with readers.lend() as driver:
                failure = self._work(driver)
                if failure is not None:
                    self._given_back.append(failure.task)
        except sqlite3.Error:
            return  # no connection to be had: the others go on without this one

    def _work(self, driver: sqlite3.Connection) -> _Failure | None:
        """Take blobs in order and put them in place, until none is left or one fails."""
        placer = _Placer(self._cache)
        while True:
            try:
                task = self._todo.popleft()
            except IndexError:
                return None
            try:
                placer.place(driver, task.item)
            except (CorruptStoreError, sqlite3.Error) as error:
                return _Failure(task=task, error=error)
            self._placed[task.number] = task.item


class _Placer:
    """Puts one blob after another in place; one scratch serves all that are not one run there."""

    def __init__(self, cache: LiveCache) -> None:
        self._cache = cache
        self._scratch: npt.NDArray[np.uint8] | None = None

    def place(self, driver: sqlite3.Connection, item: LoadItem) -> None:
        """Read and verify one blob, and put the wanted part of it in place."""
        row = item.row
        spec = self._cache.layout.tensors[row.tensor]
        buffer = self._cache.buffer(row.tensor)
        is_whole = (item.start, item.stop) == (row.start, row.stop)
        there = regions.in_place(spec, buffer, row.start, row.stop) if is_whole else None
        decoded = self._room(row.raw_nbytes) if there is None else there
        try:
            stored = blobs.read_payload(driver, row)
            decode_blob(row, item.key, spec, stored, decoded)
        except CorruptStoreError as error:
            raise CorruptStoreError(
                f"chunk {item.key.hex()[:12]}, {spec.name}, tokens [{row.start}, {row.stop}): "
                f"{error}"
            ) from error
        if there is None:
            first = (item.start - row.start) * spec.slot_nbytes
            nbytes = blob_raw_nbytes(spec, item.start, item.stop)
            regions.scatter(spec, buffer, item.start, item.stop, decoded[first : first + nbytes])

    def _room(self, nbytes: int) -> memoryview:
        """``nbytes`` of the scratch, which grows to what the largest blob needs."""
        import numpy as np

        if self._scratch is None or self._scratch.nbytes < nbytes:
            self._scratch = np.empty(nbytes, np.uint8)
        return self._scratch[:nbytes].data


def _settle(helpers: Sequence[Future[None]]) -> None:
    """Wait until none of them runs, also through further interrupts: that takes one blob each."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            wait([helper for helper in helpers if not helper.cancel()])
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
