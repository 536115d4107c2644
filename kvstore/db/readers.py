"""Connections that only read payloads: one for each thread that works on a load."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from kvstore.db import native
from kvstore.db.native import NativeReader
from kvstore.db.payloads import DriverReader, PayloadReader


class Readers:
    """Connections beside the engine's, so that no thread waits for one of its own load.

    There are as many as were ever lent at the same time; each is lent to one thread at a time.
    """

    def __init__(
        self, connect: Callable[[], sqlite3.Connection], *, uri: str, pragmas: Sequence[str]
    ) -> None:
        """``connect`` makes one by the driver, where SQLite itself cannot be reached."""
        self._connect = connect
        self._uri = uri
        self._pragmas = pragmas
        self._idle: deque[_Driven | NativeReader] = deque()

    @contextmanager
    def lend(self) -> Iterator[PayloadReader]:
        """A reader in a read transaction of its own.

        What it sees may be newer than what another connection sees: a row may be gone, or its
        number may belong to other content.

        Raises:
            sqlite3.Error: no connection can be had now.
        """
        try:
            reader = self._idle.pop()
        except IndexError:
            reader = self._open()
        try:
            reader.begin()
            yield reader
            reader.end()
        except BaseException:
            reader.close()
            raise
        self._idle.append(reader)

    def close(self) -> None:
        """Close what is not lent."""
        while self._idle:
            self._idle.pop().close()

    def _open(self) -> _Driven | NativeReader:
        library = native.library()
        if library is None:
            return _Driven(self._connect())
        return NativeReader(library, self._uri, self._pragmas)


class _Driven(DriverReader):
    """A connection of the driver that does nothing else."""

    def __init__(self, driver: sqlite3.Connection) -> None:
        super().__init__(driver)
        self.driver = driver

    def begin(self) -> None:
        self.driver.execute("BEGIN")

    def end(self) -> None:
        self.driver.rollback()

    def close(self) -> None:
        self.driver.close()
