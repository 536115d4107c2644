"""``kvstore rm``: delete sessions by name."""

from __future__ import annotations

from pathlib import Path

import click

from kvstore.cli.options import namespace_option, open_existing, store_argument
from kvstore.quantity import format_nbytes


@click.command("rm")
@store_argument
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@namespace_option
def command(path: Path, names: tuple[str, ...], *, namespace: str) -> None:
    """Delete the sessions NAME... from STORE, and give back what only they needed."""
    with open_existing(path, read_only=False, namespace=namespace) as store:
        before = store.stats().file_nbytes
        for name in names:
            store.delete_session(name)
            click.echo(f"deleted {name}")
        after = store.stats().file_nbytes
    click.echo(f"{format_nbytes(before - after)} given back", err=True)
