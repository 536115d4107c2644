"""Payloads: the stored bytes of a blob, read into memory that is given."""

from __future__ import annotations

import sqlite3
from typing import Protocol

from kvstore.errors import CorruptStoreError


class PayloadReader(Protocol):
    """Whatever reads payloads, in a transaction of its own; for one thread at a time."""

    def read_into(self, payload_id: int, destination: memoryview) -> None:
        """Fill ``destination``, as long as the payload is, with its bytes.

        Raises:
            CorruptStoreError: there is no such payload, or not one of that length.
            sqlite3.Error: it cannot be read.
        """
        ...


class DriverReader:
    """Through the blob handles of the driver's connection, which copies once more."""

    def __init__(self, driver: sqlite3.Connection) -> None:
        self._driver = driver

    def read_into(self, payload_id: int, destination: memoryview) -> None:
        """Other threads run while the bytes are read, and while they are copied."""
        import numpy as np  # not at the top: `kvstore ls` must start fast

        try:
            with self._driver.blobopen("payloads", "data", payload_id, readonly=True) as blob:
                if len(blob) != destination.nbytes:
                    raise wrong_length(payload_id, len(blob), destination)
                data = np.frombuffer(blob.read(), np.uint8)
        except sqlite3.OperationalError as error:
            # What cannot be opened as a blob; anything that goes wrong below has a code of its own.
            if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
                raise
            raise CorruptStoreError(f"payload {payload_id} is missing ({error})") from error
        np.copyto(np.frombuffer(destination, np.uint8), data)


def wrong_length(payload_id: int, found_nbytes: int, expected: memoryview) -> CorruptStoreError:
    """What is wrong with a payload of ``found_nbytes``."""
    return CorruptStoreError(
        f"payload {payload_id}: expected {expected.nbytes} bytes, found {found_nbytes}"
    )
