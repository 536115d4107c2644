"""``kvstore verify``: check everything that a store says of itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from kvstore.cli.options import json_option, open_existing, print_json, store_argument
from kvstore.quantity import format_nbytes


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
        summary = "ok" if report.ok else f"{len(report.problems)} problems"
        click.echo(
            f"{path}: {summary} ({report.n_models} models, {report.n_sessions} sessions, "
            f"{report.n_chunks} chunks, {report.n_blobs} blobs, "
            f"{format_nbytes(report.raw_nbytes)} decoded)",
            err=not report.ok,
        )
    ctx.exit(0 if report.ok else 1)
