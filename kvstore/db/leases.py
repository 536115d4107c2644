"""Rows of ``leases``: a save in progress holds its newest chunk, and so all before it."""

from __future__ import annotations

import sqlalchemy as sa

from kvstore import clock
from kvstore.db.engine import insert_row
from kvstore.db.tables import leases

LEASE_MS = 120_000
"""How long a save may pause between two transactions; a dead one is forgotten after it."""


def hold(connection: sa.Connection, lease_id: int | None, chunk_id: int, *, now_ms: int) -> int:
    """Let the lease (a new one if None) hold ``chunk_id`` from now on; returns its id."""
    values = {"chunk_id": chunk_id, "expires_at_ms": now_ms + LEASE_MS}
    if lease_id is not None:
        renewed = connection.execute(
            sa.update(leases).where(leases.c.id == lease_id).values(**values)
        )
        if renewed.rowcount:
            return lease_id
    return insert_row(connection, leases, **values)


_IS_LIVE = leases.c.expires_at_ms.between(sa.bindparam("now_ms"), sa.bindparam("latest_ms"))


def now() -> dict[str, int]:
    """The parameters of statements with ``holding``."""
    now_ms = clock.now_ms()
    return {"now_ms": now_ms, "latest_ms": now_ms + LEASE_MS}


def holding(chunk_id: sa.ColumnElement[int]) -> sa.Exists:
    """Whether a save in progress holds that very chunk, as an SQL condition; see ``now``."""
    return sa.exists().where(leases.c.chunk_id == chunk_id, _IS_LIVE)


def drop(connection: sa.Connection, lease_id: int) -> None:
    """End a lease."""
    connection.execute(sa.delete(leases).where(leases.c.id == lease_id))


_DROP_EXPIRED = sa.delete(leases).where(~_IS_LIVE)


def drop_expired(connection: sa.Connection) -> None:
    """Forget the leases of saves that never finished, or that began while the clock was wrong."""
    connection.execute(_DROP_EXPIRED, now())
