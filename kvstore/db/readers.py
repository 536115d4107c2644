"""Connections that only read payloads: one for each thread that helps with a load."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Readers:
    """Connections beside the engine's, so that a helper never waits for one of its own load.

    There are as many as were ever lent at the same time; each is lent to one thread at a time.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._idle: deque[sqlite3.Connection] = deque()

    @contextmanager
    def lend(self) -> Iterator[sqlite3.Connection]:
        """A connection in a read transaction of its own.

        What it sees may be newer than what another connection sees: a row may be gone, or its
        number may belong to other content.

        Raises:
            sqlite3.Error: no connection can be had now.
        """
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            connection.execute("BEGIN")
            yield connection
            connection.rollback()
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)

    def close(self) -> None:
        """Close what is not lent."""
        while self._idle:
            self._idle.pop().close()
