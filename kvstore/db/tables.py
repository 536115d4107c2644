"""The tables of format version 3, as SQLAlchemy sees them.

``migrations/`` makes them, ``schemas/schema.sql`` states them, and a test holds
the three together. ``schemas/FORMAT.md`` says what each column means.
"""

from __future__ import annotations

import sqlalchemy as sa

FORMAT_VERSION = 3
MIN_READER = 2
MIN_WRITER = 3

metadata = sa.MetaData()

format_row = sa.Table(
    "format",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("min_reader", sa.Integer, nullable=False),
    sa.Column("min_writer", sa.Integer, nullable=False),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("fingerprint", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("weights_digest", sa.LargeBinary, nullable=False),
    sa.Column("program_digest", sa.LargeBinary, nullable=False),
    sa.Column("layout_digest", sa.LargeBinary, nullable=False),
    sa.Column("manifest", sa.LargeBinary, nullable=False),
    sa.Column("created_at_ms", sa.Integer, nullable=False),
)

spaces = sa.Table(
    "spaces",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("model_id", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("root_key", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("chunk_n_tokens", sa.Integer, nullable=False),
    sa.Column("namespace", sa.Text, nullable=False),
    sa.Column("adapter", sa.LargeBinary, nullable=False),
)

chunks = sa.Table(
    "chunks",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("space_id", sa.ForeignKey("spaces.id"), nullable=False),
    sa.Column("parent_id", sa.ForeignKey("chunks.id")),
    sa.Column("base_id", sa.ForeignKey("chunks.id")),
    sa.Column("base_n_tokens", sa.Integer, nullable=False),
    sa.Column("key", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("parent_key", sa.LargeBinary, nullable=False),
    sa.Column("start", sa.Integer, nullable=False),
    sa.Column("stop", sa.Integer, nullable=False),
    sa.Column("tokens", sa.LargeBinary, nullable=False),
    sa.Column("raw_nbytes", sa.Integer, nullable=False),
    sa.Column("stored_nbytes", sa.Integer, nullable=False),
    sa.Column("created_at_ms", sa.Integer, nullable=False),
    sa.Column("last_used_at_ms", sa.Integer, nullable=False),
    sa.Column("extras", sa.LargeBinary, nullable=False),
)

blobs = sa.Table(
    "blobs",
    metadata,
    sa.Column("chunk_id", sa.ForeignKey("chunks.id"), primary_key=True),
    sa.Column("tensor", sa.Integer, primary_key=True),
    sa.Column("start", sa.Integer, primary_key=True),
    sa.Column("stop", sa.Integer, nullable=False),
    sa.Column("codec", sa.Integer, nullable=False),
    sa.Column("raw_nbytes", sa.Integer, nullable=False),
    sa.Column("stored_nbytes", sa.Integer, nullable=False),
    sa.Column("checksum", sa.LargeBinary, nullable=False),
    sa.Column("payload_id", sa.ForeignKey("payloads.id"), nullable=False, unique=True),
)

payloads = sa.Table(
    "payloads",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("namespace", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("space_id", sa.ForeignKey("spaces.id"), nullable=False),
    sa.Column("head_id", sa.ForeignKey("chunks.id")),
    sa.Column("n_tokens", sa.Integer, nullable=False),
    sa.Column("metadata", sa.LargeBinary, nullable=False),
    sa.Column("created_at_ms", sa.Integer, nullable=False),
    sa.Column("updated_at_ms", sa.Integer, nullable=False),
)

session_tokens = sa.Table(
    "session_tokens",
    metadata,
    sa.Column("session_id", sa.ForeignKey("sessions.id"), primary_key=True),
    sa.Column("start", sa.Integer, primary_key=True),
    sa.Column("tokens", sa.LargeBinary, nullable=False),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("chunk_id", sa.ForeignKey("chunks.id"), nullable=False),
    sa.Column("expires_at_ms", sa.Integer, nullable=False),
)

bases = sa.Table(
    "bases",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("space_id", sa.ForeignKey("spaces.id"), nullable=False),
    sa.Column("tensor", sa.Integer, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint("space_id", "tensor"),
)
