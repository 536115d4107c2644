"""``kvstore prune``: delete what was not used for longest, and give the space back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import click

from kvstore.cli.options import (
    find_model,
    json_option,
    open_existing,
    print_json,
    store_argument,
)
from kvstore.errors import InputError
from kvstore.quantity import format_count, format_nbytes, parse_age_seconds, parse_nbytes

_Number = TypeVar("_Number", int, float)


def _option(name: str, parse: Callable[[str], _Number], text: str | None) -> _Number | None:
    """``text`` parsed; an error names the option."""
    try:
        return None if text is None else parse(text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


@click.command("prune")
@store_argument
@click.option("--max-bytes", metavar="SIZE", help="Bring the file under this size: 500MB, 2GiB.")
@click.option("--older-than", metavar="AGE", help="Take what was not used for: 12h, 7d, 2w.")
@click.option("--model", metavar="HEX", help="Only this model's (start of its fingerprint).")
@click.option("--dry-run", is_flag=True, help="Say what would go; write nothing.")
@json_option
def command(
    path: Path,
    *,
    max_bytes: str | None,
    older_than: str | None,
    model: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete K and V from STORE, the least recently used first.

    Sessions stay, with their tokens and metadata; what was pruned is computed
    again when they are next used. Saves in progress are left alone.
    """
    if max_bytes is None and older_than is None and model is None:
        raise click.UsageError("say what may go: --max-bytes, --older-than or --model")
    max_nbytes = _option("--max-bytes", parse_nbytes, max_bytes)
    unused_for_seconds = _option("--older-than", parse_age_seconds, older_than)
    with open_existing(path, read_only=dry_run) as store:
        result = store.prune(
            max_bytes=max_nbytes,
            unused_for_seconds=unused_for_seconds,
            model=None if model is None else find_model(store, model),
            dry_run=dry_run,
        )
    if as_json:
        print_json({"path": str(path), **asdict(result)})
        return
    verb = "would delete" if dry_run else "deleted"
    freed = format_nbytes(result.freed_nbytes)
    before, after = (
        format_nbytes(result.file_nbytes_before),
        format_nbytes(result.file_nbytes_after),
    )
    click.echo(
        f"{verb} {format_count(result.n_chunks, 'chunk')}, {freed} of K and V; "
        f"the file {'would go' if dry_run else 'went'} from {before} to {after}"
    )
