"""``kvstore annotate``: the copy of a program whose cache has names, for shipping."""

from __future__ import annotations

from pathlib import Path

import click

from runtime_adapter.commands.progress import working
from runtime_adapter.program.naming import write_named_copy


@click.command("annotate")
@click.argument("source", metavar="IN.pte", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT.pte", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace OUT.pte if it exists.")
def annotate(source: Path, target: Path, *, force: bool) -> None:
    """Write IN.pte to OUT.pte with a name on every tensor that outlives a call.

    C++ programs then reach the cache with Method::get_attribute, and Model.open needs
    no copy. Weights and delegates are copied as they are, and the fingerprint stays.
    """
    with working("writing the named copy"):
        copy = write_named_copy(source, target, replace=force)
    for method, names in copy.names.items():
        click.echo(f"{method}: {len(names)} tensors")
        for name in names:
            click.echo(f"  {name}")
    click.echo(f"{copy.path}: {copy.nbytes} bytes", err=True)
