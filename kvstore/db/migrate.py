"""Alembic, run on a connection that is already inside its write transaction."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from kvstore._bundle import migrations_dir


def upgrade(connection: sa.Connection, *, scripts: Path | None = None) -> None:
    """Run every migration that the file has not seen yet; the caller commits or rolls back.

    ``scripts`` is the folder of the migrations; the ones shipped with kvstore
    by default.
    """
    command.upgrade(_config(connection, scripts or migrations_dir()), "head")


def head_revision() -> str:
    """The newest migration's identifier."""
    head = ScriptDirectory(str(migrations_dir())).get_current_head()
    return head or ""


def _config(connection: sa.Connection, scripts: Path) -> Config:
    config = Config()
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
