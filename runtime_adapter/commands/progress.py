"""A line on stderr while something takes long, for people only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import click


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show ``what`` while the block runs, if stderr is a terminal; leave nothing behind."""
    shown = sys.stderr is not None and sys.stderr.isatty()
    if shown:
        click.echo(f"{what} ...", nl=False, err=True)
    try:
        yield
    finally:
        if shown:
            click.echo("\r\033[K", nl=False, err=True)
