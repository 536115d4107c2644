"""``kvstore verify``: check everything that a store says of itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from kvstore.cli.options import json_option, open_existing, print_json, store_argument
from kvstore.quantity import format_count, format_nbytes


@click.command("verify")
@store_argument
@json_option
@click.pass_context
def command(ctx: click.Context, path: Path, *, as_json: bool) -> None:
    """Check STORE: SQLite's structures, every key, every blob's checksum.

    Exits with 1 if anything is wrong. Writes nothing.
    """
    with open_existing(path, read_only=True) as store:
        report = store.verify()
    if as_json:
        print_json({"path": str(path), "ok": report.ok, **asdict(report)})
    else:
        for problem in report.problems:
            click.echo(problem)
        summary = "ok" if report.ok else format_count(len(report.problems), "problem")
        click.echo(
            f"{path}: {summary} ({format_count(report.n_models, 'model')}, "
            f"{format_count(report.n_sessions, 'session')}, "
            f"{format_count(report.n_chunks, 'chunk')}, {format_count(report.n_blobs, 'blob')}, "
            f"{format_nbytes(report.raw_nbytes)} decoded)",
            err=not report.ok,
        )
        if not report.ok:
            click.echo(
                "what is damaged is never restored: a save of the same tokens writes its chunks "
                "anew, a copy of the file brings back the rest",
                err=True,
            )
    ctx.exit(0 if report.ok else 1)
