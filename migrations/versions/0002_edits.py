"""Extras of chunks, which keep what was edited apart from what is exact: format version 2."""

from alembic import op

revision = "0002"
down_revision = "0001"

STATEMENTS = (
    "ALTER TABLE chunks ADD COLUMN extras BLOB NOT NULL DEFAULT x''",
    "DROP INDEX chunks_by_tokens",
    "CREATE UNIQUE INDEX chunks_by_tokens ON chunks (parent_key, extras, tokens)",
    "UPDATE format SET version = 2, min_reader = 2, min_writer = 2",
    "PRAGMA user_version = 2",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
