"""Alembic, run on a connection that is already inside its write transaction."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from kvstore._bundle import migrations_dir
from kvstore.errors import SchemaMismatchError


def upgrade(connection: sa.Connection, *, scripts: Path | None = None) -> None:
    """Run every migration that the file has not seen yet; the caller commits or rolls back.

    ``scripts`` is the folder of the migrations; the ones shipped with kvstore
    by default.

    Raises:
        SchemaMismatchError: what the file says of its migrations is none of ours.
    """
    try:
        command.upgrade(_config(connection, scripts or migrations_dir()), "head")
    except CommandError as error:
        raise SchemaMismatchError(
            f"expected a file that kvstore's migrations made, found one that they do not know "
            f"({error}); it was tampered with or damaged: restore a copy"
        ) from error


def _config(connection: sa.Connection, scripts: Path) -> Config:
    config = Config()
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
