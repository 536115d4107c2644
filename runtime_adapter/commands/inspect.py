"""``kvstore inspect``: what a program keeps between calls, and whether it can be stored."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from kvstore.errors import ProgramError
from kvstore.layout import DTYPE_ITEMSIZE_NBYTES, UNLIMITED_N_TOKENS
from runtime_adapter.commands.progress import working
from runtime_adapter.program.analysis import ProgramAnalysis
from runtime_adapter.program.naming import NamedState
from runtime_adapter.program.survey import Survey, survey
from runtime_adapter.runtime.libraries import operator_schema

_HEADINGS = (
    "TENSOR",
    "LAYER",
    "ROLE",
    "KIND",
    "DTYPE",
    "SHAPE",
    "TOKEN AXIS",
    "BYTES/TOKEN",
    "TOTAL BYTES",
    "KEPT",
    "SERVABLE",
)
_NUMBERS = frozenset({"LAYER", "TOKEN AXIS", "BYTES/TOKEN", "TOTAL BYTES"})


@click.command("inspect")
@click.argument("program", metavar="PROGRAM", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "data_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The .ptd file with the program's weights.",
)
@click.option("--method", default="forward", show_default=True, help="The method to look at.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(program: Path, *, data_path: Path | None, method: str, as_json: bool) -> None:
    """List the state of PROGRAM (a .pte): every tensor that outlives a call.

    Ends with an error's exit code if the cache cannot be stored; the table is
    printed all the same.
    """
    with working("reading the program"):
        found = survey(program, data_path=data_path, method=method, schema_of=operator_schema)
    if as_json:
        click.echo(json.dumps(_as_json(found), indent=2))
    else:
        _print_head(found)
        _print_table(found)
    if found.problem is not None:
        raise found.problem


def _print_head(found: Survey) -> None:
    lines = [("program", str(found.path)), ("method", _method(found))]
    signature = found.signature
    if signature is not None:
        n_tokens = signature.max_n_tokens
        lines.append(("tokens a call", "1" if n_tokens == 1 else f"1 to {n_tokens}"))
        lines.append(("vocabulary", str(signature.vocab_size)))
    if found.analysis is not None:
        analysis = found.analysis
        lines.append(("capacity", _capacity(analysis)))
        lines.append(("bytes a token", str(analysis.layout.token_nbytes)))
        whole = _checkpoint_nbytes(analysis)
        if whole:
            lines.append(("bytes a checkpoint", f"{whole} (the last logits included)"))
        if analysis.companions:
            lines.append(("same cache", f"method {', '.join(analysis.companions)}"))
        lines.append(("names", "in the program" if analysis.is_named else _NO_NAMES))
        lines.append(("fingerprint", str(analysis.fingerprint)))
        parts = ("weights", "program", "layout")
        lines += [(f"  {part}", getattr(analysis.fingerprint, part).hex()) for part in parts]
    if found.delegates:
        lines.append(("delegates", ", ".join(found.delegates)))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        click.echo(f"{name:<{width}}  {value}")
    click.echo()


_NO_NAMES = "none (a named copy is made when it is opened, or by `kvstore annotate`)"


def _capacity(analysis: ProgramAnalysis) -> str:
    n_tokens = analysis.capacity_n_tokens
    return "no limit" if n_tokens == UNLIMITED_N_TOKENS else f"{n_tokens} tokens"


def _checkpoint_nbytes(analysis: ProgramAnalysis) -> int:
    return sum(spec.nbytes for spec in analysis.layout.tensors if spec.token_axis is None)


def _method(found: Survey) -> str:
    others = [name for name in found.methods if name != found.method]
    return f"{found.method} (others: {', '.join(others)})" if others else found.method


def _print_table(found: Survey) -> None:
    if not found.state:
        click.echo("no tensor outlives a call")
        return
    rows = [_HEADINGS, *(_row(item) for item in found.state)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for row in rows:
        cells = [
            f"{cell:>{width}}" if heading in _NUMBERS else f"{cell:<{width}}"
            for cell, width, heading in zip(row, widths, _HEADINGS, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _row(item: NamedState) -> tuple[str, ...]:
    data = _tensor_json(item)
    row = {name: "-" if value is None else str(value) for name, value in data.items()}
    note = f" ({data['note']})" if data["note"] is not None else ""
    return (
        row["name"] if data["is_named"] else f"({row['name']})",
        row["layer"],
        row["role"],
        row["kind"],
        row["dtype"],
        row["shape"],
        row["token_axis"],
        row["token_nbytes"],
        row["nbytes"],
        row["kept"],
        f"yes{note}" if data["reason"] is None else f"no: {data['reason']}",
    )


def _tensor_json(item: NamedState) -> dict[str, Any]:
    tensor, spec = item.state.tensor, item.spec
    itemsize = DTYPE_ITEMSIZE_NBYTES.get(tensor.dtype)
    has_slots = spec is not None and spec.kind.rules.has_token_content
    return {
        "name": item.name,
        "is_named": item.is_own_name,
        "layer": item.state.layer,
        "role": item.state.role,
        "kind": str(spec.kind) if spec is not None else None,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "token_axis": item.state.token_axis,
        "window_n_tokens": spec.window_n_tokens if spec is not None else None,
        "sink_n_tokens": spec.sink_n_tokens if spec is not None else None,
        "token_nbytes": spec.slot_nbytes if spec is not None and has_slots else None,
        "nbytes": math.prod(tensor.shape) * itemsize if itemsize is not None else None,
        "kept": spec.kind.rules.kept(spec) if spec is not None else None,
        "has_initial_data": tensor.data_buffer > 0,
        "reason": item.state.reason,
        "note": item.state.note,
    }


def _as_json(found: Survey) -> dict[str, Any]:
    analysis = found.analysis
    return {
        "path": str(found.path),
        "method": found.method,
        "methods": list(found.methods),
        "servable": found.problem is None,
        "problem": _problem_json(found.problem),
        "signature": analysis.to_json()["signature"] if analysis is not None else None,
        "capacity_n_tokens": _capacity_json(analysis),
        "token_nbytes": analysis.layout.token_nbytes if analysis is not None else None,
        "checkpoint_nbytes": _checkpoint_nbytes(analysis) if analysis is not None else None,
        "companions": list(analysis.companions) if analysis is not None else None,
        "is_named": analysis.is_named if analysis is not None else None,
        "fingerprint": _fingerprint_json(found),
        "operators": list(found.operators),
        "delegates": list(found.delegates),
        "metadata": dict(found.metadata),
        "tensors": [_tensor_json(item) for item in found.state],
    }


def _capacity_json(analysis: ProgramAnalysis | None) -> int | None:
    """Tokens; None where nothing ends (or nothing is known)."""
    if analysis is None or analysis.capacity_n_tokens == UNLIMITED_N_TOKENS:
        return None
    return analysis.capacity_n_tokens


def _problem_json(problem: ProgramError | None) -> dict[str, Any] | None:
    if problem is None:
        return None
    return {
        "error": type(problem).__name__,
        "exit_code": problem.exit_code,
        "message": str(problem),
    }


def _fingerprint_json(found: Survey) -> dict[str, str] | None:
    if found.analysis is None:
        return None
    fingerprint = found.analysis.fingerprint
    return {
        "model": str(fingerprint),
        "weights": fingerprint.weights.hex(),
        "program": fingerprint.program.hex(),
        "layout": fingerprint.layout.hex(),
    }
