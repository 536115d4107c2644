"""Surveying a program: all that can be known without running it.

Not needed for a program that was opened before, and so only imported where one is new.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore import Kind
from kvstore.errors import (
    ProgramError,
    ProgramSignatureError,
)
from kvstore.layout import UNLIMITED_N_TOKENS, Fingerprint, Layout, TensorSpec
from runtime_adapter.program.analysis import Metadata, ProgramAnalysis
from runtime_adapter.program.naming import NamedState, name_state
from runtime_adapter.program.problems import find_data_problem, find_problem
from runtime_adapter.program.signature import Signature, read_signature
from runtime_adapter.pte.arguments import SchemaOf, no_schemas
from runtime_adapter.pte.delegate_names import buffer_names
from runtime_adapter.pte.file import ProgramFile, read_program, whole_tables
from runtime_adapter.pte.fingerprint import method_digest, program_digest, weights_digest
from runtime_adapter.pte.instructions import MethodGraph, check_planned_memory, read_method
from runtime_adapter.state.arithmetic import Arithmetic
from runtime_adapter.state.companions import find_foreign_state, shares_cache
from runtime_adapter.state.dataflow import Dataflow
from runtime_adapter.state.endless import is_endless
from runtime_adapter.state.roles import find_state

LOGITS = "logits"
"""Role (and name) of the last token's logits in a layout with recurrent state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What is in a program, servable or not. ``analysis`` is None where ``problem`` is not."""

    path: Path
    method: str
    methods: tuple[str, ...]
    state: tuple[NamedState, ...]
    signature: Signature | None
    operators: tuple[str, ...]
    delegates: tuple[str, ...]
    metadata: Metadata
    analysis: ProgramAnalysis | None
    problem: ProgramError | None


def analyze(
    path: str | Path,
    *,
    data_path: str | Path | None = None,
    method: str = "forward",
    schema_of: SchemaOf = no_schemas,
) -> ProgramAnalysis:
    """Everything that a model needs to know about the program at ``path``.

    Calls of the operators that ``schema_of`` knows are checked against their schemas.

    Imports the exporter (5 to 9 s) and reads the whole file once for its digest:
    remember the result.

    Raises:
        NotAProgramError, CorruptProgramError: the file.
        ProgramDataError: the ``.ptd`` at ``data_path``.
        NoPersistentStateError, DelegatedCacheError, UnsupportedStateError: the cache.
        ProgramSignatureError: there is no such method, or it is not called with tokens
            and a position.
        RuntimeMissingError: ExecuTorch is not installed.
    """
    found = survey(path, data_path=data_path, method=method, schema_of=schema_of)
    if found.problem is not None:
        raise found.problem
    if found.analysis is None:
        raise ProgramError(f"{path}: expected an analysis or a reason, found neither; report this")
    return found.analysis


def survey(
    path: str | Path,
    *,
    data_path: str | Path | None = None,
    method: str = "forward",
    schema_of: SchemaOf = no_schemas,
) -> Survey:
    """What is in the program at ``path``, even where it cannot be served.

    Raises:
        NotAProgramError, CorruptProgramError, ProgramDataError, RuntimeMissingError:
            as ``analyze``; ProgramSignatureError only if there is no such method.
    """
    file = read_program(Path(path))
    with whole_tables(file.path):
        graphs, metadata = _read_methods(file, method, schema_of=schema_of)
        graph = graphs[method]
        flow = Dataflow(graph)
        state = name_state(find_state(flow))
        others = [Dataflow(other) for name, other in graphs.items() if name != method]
        digest = program_digest(file.program)
        weights_of = {
            plan.name: method_digest(plan, file.program)
            for plan in file.program.execution_plan
            if plan.name in graphs
        }
    signature: Signature | None = None
    problem = find_problem(
        graph,
        state,
        metadata,
        path=file.path,
        names_in=functools.partial(buffer_names, file),
    )
    problem = problem or find_foreign_state(flow, others, path=file.path)
    try:
        signature = read_signature(flow)
    except ProgramSignatureError as error:
        problem = problem or ProgramSignatureError(f"{file.path}: {error}")
    analysis = None
    data = Path(data_path) if data_path is not None else None
    problem = problem or find_data_problem(graph, path=file.path, data_path=data)
    if problem is None and signature is not None:
        layout = _layout(state, vocab_size=signature.vocab_size)
        analysis = ProgramAnalysis(
            method=method,
            fingerprint=Fingerprint(
                weights=weights_digest(
                    file,
                    data_path=data,
                    method=weights_of[method] if len(weights_of) > 1 else None,
                ),
                program=digest,
                layout=layout.digest,
            ),
            layout=layout,
            signature=signature,
            operators=graph.operators,
            delegates=tuple(dict.fromkeys(graph.delegates)),
            metadata=metadata,
            is_named=all(item.is_own_name for item in state),
            # Full tensors end anyway.
            is_endless=layout.capacity_n_tokens == UNLIMITED_N_TOKENS
            and is_endless(Arithmetic(flow)),
            companions=tuple(
                other.graph.name
                for other in others
                if shares_cache(flow, other) and weights_of[other.graph.name] == weights_of[method]
            ),
        )
    return Survey(
        path=file.path,
        method=method,
        methods=tuple(graphs),
        state=state,
        signature=signature,
        operators=graph.operators,
        delegates=tuple(dict.fromkeys(graph.delegates)),
        metadata=metadata,
        analysis=analysis,
        problem=problem,
    )


def _read_methods(
    file: ProgramFile, method: str, *, schema_of: SchemaOf
) -> tuple[dict[str, MethodGraph], Metadata]:
    """The methods by name, and the results of those that only give a constant."""
    metadata: dict[str, int | float | bool | str | None] = {}
    graphs: dict[str, MethodGraph] = {}
    planned: list[tuple[Any, MethodGraph]] = []
    for plan in file.program.execution_plan:
        graph = read_method(
            plan,
            source=str(file.path),
            read_constant=file.read_constant,
            schema_of=schema_of,
        )
        planned.append((plan, graph))
        if not graph.steps and not graph.inputs and len(graph.outputs) == 1:
            metadata[graph.name] = graph.scalars.get(graph.outputs[0])
        else:
            graphs[graph.name] = graph
    check_planned_memory(planned, source=str(file.path))
    if method not in graphs:
        raise ProgramSignatureError(
            f"{file.path}: expected a method {method!r}, found {', '.join(graphs) or 'none'}; "
            "choose one of these with method="
        )
    return graphs, metadata


def _layout(state: tuple[NamedState, ...], *, vocab_size: int) -> Layout:
    """The layout of a method's state, with the last logits behind a recurrent one.

    A checkpoint is good at one length only, so that the last token cannot be run
    again for its logits.
    """
    tensors = [spec for item in state if (spec := item.spec) is not None]
    if any(spec.token_axis is None for spec in tensors):
        taken = {spec.name for spec in tensors}
        name = LOGITS
        while name in taken:
            name += "_"
        tensors.append(
            TensorSpec(
                name=name,
                role=LOGITS,
                layer=0,
                kind=Kind.CHECKPOINT,
                dtype="float32",
                shape=(vocab_size,),
                token_axis=None,
            )
        )
    return Layout(tensors=tuple(tensors))
