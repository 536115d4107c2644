"""Bases of transform codecs, learned once a tensor of a key space: format version 3."""

from alembic import op

revision = "0003"
down_revision = "0002"

STATEMENTS = (
    """
    CREATE TABLE bases (
        id INTEGER NOT NULL PRIMARY KEY,
        space_id INTEGER NOT NULL REFERENCES spaces (id) ON DELETE RESTRICT,
        tensor INTEGER NOT NULL CHECK (tensor >= 0),
        digest BLOB NOT NULL CHECK (length(digest) = 16),
        data BLOB NOT NULL CHECK (length(data) > 0),
        UNIQUE (space_id, tensor)
    )
    """,
    "UPDATE format SET version = 3, min_reader = 2, min_writer = 3",
    "PRAGMA user_version = 3",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
