"""Alembic's entry: runs the migrations on the connection that the library hands over.

By hand: ``alembic -c migrations/alembic.ini -x db=sessions.db upgrade head``.
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import context

from kvstore.db.engine import exclusive_transaction, make_engine


def run() -> None:
    connection = context.config.attributes.get("connection")
    if connection is not None:
        migrate(connection)
        return
    path = context.get_x_argument(as_dictionary=True).get("db")
    if path is None:
        message = "name the file: alembic -c migrations/alembic.ini -x db=sessions.db upgrade head"
        raise SystemExit(message)
    with exclusive_transaction(make_engine(Path(path), access="create")) as own_connection:
        migrate(own_connection)


def migrate(connection: sa.Connection) -> None:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()


run()
