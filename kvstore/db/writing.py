"""The one way to write rows: what must hold before the first write of any transaction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from kvstore.db import engine as db
from kvstore.db import leases
from kvstore.db.tables import FORMAT_VERSION
from kvstore.errors import NewerFormatError


@contextmanager
def write_transaction(engine: sa.Engine) -> Iterator[sa.Connection]:
    """The write lock on a file of our format version, without the leases of saves that died.

    Commits at the end, rolls back on any exception.

    Raises:
        NewerFormatError: another process upgraded the file meanwhile; nothing was written.
    """
    with db.exclusive_transaction(engine) as connection:
        version = db.pragma(connection, "user_version")
        if version != FORMAT_VERSION:
            raise NewerFormatError(
                f"the file's format version is now {version}, this kvstore writes "
                f"{FORMAT_VERSION}; another process upgraded it: update kvstore and open the "
                "store again"
            )
        leases.drop_expired(connection)
        yield connection
