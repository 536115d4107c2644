"""Restoring: planned blobs -> rows -> codec -> live buffers, on several threads.

Each thread reads a row on a connection of its own, decodes it straight into the live buffer and
checks it there, then takes the next: nobody waits for a reader, and no thread holds more than one
row. The caller's thread is one of them.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvstore import regions
from kvstore.blob import read_blob
from kvstore.codec import Basis, scratch
from kvstore.db.basis_cache import BasisCache, SpaceBases
from kvstore.db.payloads import DriverReader, PayloadReader
from kvstore.db.readers import Readers
from kvstore.db.vendor import as_store_error
from kvstore.errors import CorruptStoreError
from kvstore.layout import LiveCache
from kvstore.load_plan import LoadItem, LoadStep
from kvstore.match import blob_raw_nbytes

_NBYTES_A_HELPER = 1 << 20
"""Stored bytes that are worth waking one more thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Who restores: ``n_threads`` with the caller's own; the others are ``workers``."""

    workers: Executor
    readers: Readers
    bases: BasisCache
    n_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """A blob that could not be put in place, its place in the plan, and why."""

    number: int
    item: LoadItem
    error: CorruptStoreError | sqlite3.Error


class Restore:
    """The blobs of a plan on their way into a live cache.

    Readers may see a newer state of the file than the plan's: a row may be gone, or its number be
    given to other content, which its checksum tells. What they cannot read is read again on the
    plan's own connection; only that one's word counts.
    """

    def __init__(
        self,
        cache: LiveCache,
        steps: Sequence[LoadStep],
        *,
        driver: sqlite3.Connection,
        bases: SpaceBases,
        path: Path,
    ) -> None:
        """``driver`` is the connection that the blobs were planned on."""
        self._cache = cache
        self._steps = steps
        self._driver = driver
        self._bases = bases
        self._path = path
        self._reading_a_basis = threading.Lock()
        items = [item for step in steps for item in step.items]
        self._todo = deque(enumerate(items))
        self._given_back: list[tuple[int, LoadItem]] = []
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
            item.row.raw_nbytes
            if item.is_whole
            else blob_raw_nbytes(tensors[item.row.tensor], item.start, item.stop)
            for item in self._placed.values()
        )

    @property
    def stored_nbytes(self) -> int:
        """Bytes that were read for them."""
        return sum(item.row.stored_nbytes for item in self._placed.values())

    def run(self, crew: Crew) -> None:
        """Put all blobs in place.

        When it returns or raises, no thread writes into the cache any more.

        Raises:
            StoreError: a blob cannot be read; all steps before its own are in place.
        """
        nbytes = sum(item.row.stored_nbytes for _, item in self._todo)
        with self._helped(crew, n_helpers=min(crew.n_threads - 1, nbytes // _NBYTES_A_HELPER)):
            self._help(crew.readers)
            # Only what is left because no connection could be had.
            failure = self._work(DriverReader(self._driver))
            if failure is not None:
                self._todo.clear()
        # No helper works any more. What they could not read may lie before a failure.
        self._todo.extend(sorted(self._given_back, key=_number))
        again = self._work(DriverReader(self._driver))
        failures = [one for one in (failure, again) if one is not None]
        if failures:
            error = min(failures, key=_number_failed).error
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
            with readers.lend() as reader:
                failure = self._work(reader)
                if failure is not None:
                    self._given_back.append((failure.number, failure.item))
        except sqlite3.Error:
            return  # no connection to be had: the others go on without this one

    def _basis(self, tensor: int, digest: bytes) -> Basis:
        """The basis that a blob of that tensor names, from the state that was planned on."""
        with self._reading_a_basis:
            spec = self._cache.layout.tensors[tensor]
            return self._bases.lookup(self._driver, tensor, spec)(digest)

    def _work(self, reader: PayloadReader) -> _Failure | None:
        """Take blobs in order and put them in place, until none is left or one fails."""
        placer = _Placer(self._cache, reader, self._basis)
        while True:
            try:
                number, item = self._todo.popleft()
            except IndexError:
                return None
            try:
                placer.place(item)
            except (CorruptStoreError, sqlite3.Error) as error:
                return _Failure(number=number, item=item, error=error)
            self._placed[number] = item


class _Placer:
    """Puts one blob after another in place."""

    def __init__(
        self, cache: LiveCache, reader: PayloadReader, basis: Callable[[int, bytes], Basis]
    ) -> None:
        self._reader = reader
        self._basis = basis
        self._tensors = cache.layout.tensors
        self._buffers = [cache.buffer(tensor) for tensor in range(len(self._tensors))]

    def place(self, item: LoadItem) -> None:
        """Read and verify one blob, and put the wanted part of it in place.

        What is not one run of memory there passes through a scratch.
        """
        row = item.row
        spec, buffer = self._tensors[row.tensor], self._buffers[row.tensor]
        there = regions.in_place(spec, buffer, row.start, row.stop) if item.is_whole else None
        decoded = scratch("decoded", row.raw_nbytes) if there is None else there
        try:
            bases = partial(self._basis, row.tensor)
            read_blob(self._reader, row, item.key, spec, decoded, bases)
        except CorruptStoreError as error:
            raise CorruptStoreError(
                f"chunk {item.key.hex()[:12]}, {spec.name}, tokens [{row.start}, {row.stop}): "
                f"{error}"
            ) from error
        if there is None:
            first = (item.start - row.start) * spec.slot_nbytes
            nbytes = blob_raw_nbytes(spec, item.start, item.stop)
            regions.scatter(spec, buffer, item.start, item.stop, decoded[first : first + nbytes])


def _number(one: tuple[int, LoadItem]) -> int:
    return one[0]


def _number_failed(one: _Failure) -> int:
    return one.number


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
