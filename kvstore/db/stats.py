"""Sizes and counts, from metadata tables alone."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from kvstore.db import bases
from kvstore.db.engine import size_nbytes
from kvstore.db.tables import chunks, models, sessions


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """How much is in the file.

    ``raw_nbytes`` of K and V take ``stored_nbytes`` encoded, beside ``bases_nbytes`` of what codecs
    learned; ``file_nbytes`` is the whole database as SQLite counts it, without the WAL.
    """

    n_models: int
    n_sessions: int
    n_chunks: int
    raw_nbytes: int
    stored_nbytes: int
    bases_nbytes: int
    file_nbytes: int


def read_stats(connection: sa.Connection) -> StoreStats:
    """The numbers as this transaction sees them."""

    def count(table: sa.Table) -> int:
        n_rows: int = connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
        return n_rows

    def total(column: sa.Column[int]) -> int:
        summed: int = connection.execute(
            sa.select(sa.func.coalesce(sa.func.sum(column), 0))
        ).scalar_one()
        return summed

    return StoreStats(
        n_models=count(models),
        n_sessions=count(sessions),
        n_chunks=count(chunks),
        raw_nbytes=total(chunks.c.raw_nbytes),
        stored_nbytes=total(chunks.c.stored_nbytes),
        bases_nbytes=bases.total_nbytes(connection),
        file_nbytes=size_nbytes(connection),
    )
