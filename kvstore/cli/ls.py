"""``kvstore ls``: the sessions in a store."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from kvstore.cli.options import json_option, open_existing, print_json, store_argument
from kvstore.quantity import format_count, format_nbytes


def _shown(character: str) -> str:
    """What a terminal may be given: control characters would move its cursor."""
    return character if character.isprintable() else ascii(character)[1:-1]


@click.command("ls")
@store_argument
@json_option
def command(path: Path, *, as_json: bool) -> None:
    """List the sessions of STORE, the last saved first.

    CODEC is what a session was stored with, exact or lossy. TOKENS is what was saved,
    STORED how many of them still have K and V in the file (pruning takes those, and
    leaves the session).
    """
    with open_existing(path, read_only=True) as store:
        sessions = store.sessions(all_namespaces=True)
        stats = store.stats()
    if as_json:
        print_json(
            {
                "path": str(path),
                "file_nbytes": stats.file_nbytes,
                "stored_nbytes": stats.stored_nbytes,
                "bases_nbytes": stats.bases_nbytes,
                "n_chunks": stats.n_chunks,
                "sessions": [
                    {
                        "name": session.name,
                        "namespace": session.namespace,
                        "model": session.fingerprint,
                        "codec": session.codec,
                        "n_tokens": session.n_tokens,
                        "n_stored_tokens": session.n_stored_tokens,
                        "metadata": session.metadata,
                        "created_at_ms": session.created_at_ms,
                        "updated_at_ms": session.updated_at_ms,
                    }
                    for session in sessions
                ],
            }
        )
        return
    rows = [("NAME", "MODEL", "CODEC", "TOKENS", "STORED", "SAVED (UTC)")]
    for session in sessions:
        saved = datetime.fromtimestamp(session.updated_at_ms / 1000, UTC)
        name = f"{session.namespace}/{session.name}" if session.namespace else session.name
        name = "".join(_shown(character) for character in name)
        rows.append(
            (
                name,
                str(session.fingerprint)[:12],
                session.codec,
                str(session.n_tokens),
                str(session.n_stored_tokens),
                f"{saved:%Y-%m-%d %H:%M:%S}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, model, codec, n_tokens, n_stored, saved_at in rows:
        click.echo(
            f"{name:<{widths[0]}}  {model:<{widths[1]}}  {codec:<{widths[2]}}  "
            f"{n_tokens:>{widths[3]}}  {n_stored:>{widths[4]}}  {saved_at}"
        )
    click.echo(
        f"{format_count(len(sessions), 'session')}, {format_count(stats.n_chunks, 'chunk')}, "
        f"{format_nbytes(stats.stored_nbytes)} of K and V in a file of "
        f"{format_nbytes(stats.file_nbytes)}",
        err=True,
    )
