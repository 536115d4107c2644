"""${message}: format version N."""

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    # Bump PRAGMA user_version and the row in `format` here, and schemas/schema.sql with it.
    ${upgrades if upgrades else "pass"}
