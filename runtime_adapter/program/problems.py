"""Why a program's cache cannot be served, as the error that says what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvstore.errors import (
    DelegatedCacheError,
    NoPersistentStateError,
    ProgramDataError,
    ProgramError,
    UnsupportedStateError,
)
from runtime_adapter.program.naming import NamedState
from runtime_adapter.pte.instructions import MethodGraph
from runtime_adapter.pte.ptd import read_data_file

Metadata = Mapping[str, int | float | bool | str | None]

_SHOWN_N_TENSORS = 3

_OWNERS: Mapping[str, str] = {
    "CoreAIBackend": "partition so that it does not take mutable buffers over",
    "CoreMLBackend": "partition with CoreMLPartitioner(take_over_mutable_buffer=False)",
    "MLXBackend": "lower with XNNPACK or the portable kernels instead",
    "QnnBackend": "lower with XNNPACK instead; this backend keeps the cache in its own memory",
    "VulkanBackend": "keep the cache update out of the Vulkan partition, or lower with XNNPACK",
    "NativeBackend": "lower with XNNPACK instead; this backend keeps the cache in its own memory",
    "CudaBackend": "lower with XNNPACK instead; this backend keeps the cache on the device",
    "MetalBackend": "lower with XNNPACK instead; this backend keeps the cache on the device",
    "AotiBackend": "lower with XNNPACK instead; the compiled library keeps the cache",
}
"""Backends that take mutable buffers over, and what to change at export."""

_ADVICE = "lower with XNNPACK instead, or keep the cache update out of it"

_NEVER_OWNERS = frozenset({"XnnpackBackend"})


NamesIn = Callable[[str], Sequence[str]]
"""Backend -> the names of the buffers that its delegates took over, where their data says."""


def no_names(backend: str) -> Sequence[str]:  # noqa: ARG001
    """For a graph without its file."""
    return ()


def find_problem(
    graph: MethodGraph,
    state: tuple[NamedState, ...],
    metadata: Metadata,
    *,
    path: Path,
    names_in: NamesIn = no_names,
) -> ProgramError | None:
    """Why the state of a method cannot be served, or None."""
    where = f"{path}, method {graph.name!r}"
    owners = sorted({name for name in graph.delegates if name in _OWNERS})
    others = sorted(set(graph.delegates) - _NEVER_OWNERS)
    refused = [item for item in state if item.state.reason is not None]
    if not state and (owners or (others and metadata.get("use_kv_cache"))):
        name = (owners or others)[0]
        advice = _OWNERS.get(name, _ADVICE)
        return DelegatedCacheError(
            f"{where}: expected a cache in the planned memory, found none there and the delegate "
            f"{name}, which keeps mutable buffers to itself{_told(names_in(name))}; "
            f"export again: {advice}"
        )
    if not state:
        n_inputs = len(graph.inputs)
        hint = (
            f" (it has {n_inputs} inputs: a cache that is passed in and out is the caller's)"
            if n_inputs > 2
            else ""
        )
        return NoPersistentStateError(
            f"{where}: expected a KV cache in the planned memory, found nothing that outlives a "
            f"call{hint}; export with a KV cache (model.use_kv_cache=True)"
        )
    if refused:
        told = "; ".join(
            f"{item.name} ({item.state.tensor.dtype} {list(item.state.tensor.shape)}): "
            f"{item.state.reason}"
            for item in refused[:_SHOWN_N_TENSORS]
        )
        n_more = len(refused) - _SHOWN_N_TENSORS
        more = f"; and {n_more} more" if n_more > 0 else ""
        return UnsupportedStateError(
            f"{where}: expected state that can be stored, found {told}{more}; "
            "see `kvstore inspect`, or export without that option"
        )
    n_layers = metadata.get("get_n_layers")
    n_visible = len(_visible_layers(state)) + len(_opaque_caches(state, metadata)) // 2
    if others and not (isinstance(n_layers, int) and n_visible >= n_layers):
        name = (owners or others)[0]
        total = (
            n_layers if isinstance(n_layers, int) else "all (get_n_layers does not say how many)"
        )
        return DelegatedCacheError(
            f"{where}: expected the cache of {total} layers in the planned memory, found that of "
            f"{n_visible}; the delegate {name} may keep the others to itself"
            f"{_told(names_in(name))}; export again: {_OWNERS.get(name, _ADVICE)}"
        )
    return None


def _visible_layers(state: tuple[NamedState, ...]) -> set[int]:
    """The layers whose state is there and known for what it is."""
    roles: dict[int, set[str]] = {}
    for item in state:
        if item.state.layer is not None and item.state.role is not None:
            roles.setdefault(item.state.layer, set()).add(item.state.role)
    return {layer for layer, found in roles.items() if {"k", "v"} <= found or "conv_state" in found}


def _opaque_caches(state: tuple[NamedState, ...], metadata: Metadata) -> list[NamedState]:
    """Planned keys and values that a delegate reads and gives back whole.

    Where a token goes in them cannot be seen, so they are kept whole; what they are
    shows in an axis as long as the context, and more than a number a token.
    """
    context = metadata.get("get_max_context_len")
    return [
        item
        for item in state
        if item.state.token_axis is None
        and context in item.state.tensor.shape[1:-1]
        and item.state.tensor.shape[-1] > 1
    ]


def _told(names: Sequence[str]) -> str:
    if not names:
        return ""
    n_more = len(names) - _SHOWN_N_TENSORS
    more = f" and {n_more} more" if n_more > 0 else ""
    return f" ({', '.join(names[:_SHOWN_N_TENSORS])}{more})"


def find_data_problem(
    graph: MethodGraph, *, path: Path, data_path: Path | None
) -> ProgramDataError | None:
    """Whether the ``.ptd`` has the tensors that the method says lie outside the program."""
    needed = sorted(tensor.name or "?" for tensor in graph.tensors.values() if tensor.is_external)
    if not needed:
        return None
    if data_path is None:
        return ProgramDataError(
            f"{path}: expected the .ptd file with its weights ({needed[0]} and "
            f"{len(needed) - 1} more are not in the program), found none given; "
            "pass data_path= (--data on the command line)"
        )
    there = read_data_file(data_path).entries
    missing = [name for name in needed if name not in there]
    if missing:
        return ProgramDataError(
            f"{data_path}: expected {len(needed)} tensors of {path}, found that "
            f"{len(missing)} are missing ({missing[0]}...); pass the .ptd of this program"
        )
    return None
