"""The export configuration for programs whose cache is to be kept: one line for the exporter.

    program = edge_manager.to_executorch(kv_cache_config())

It puts the mutable buffers (the KV cache) on a memory id of their own, shared by
all methods, and writes their names into the program, so that no named copy is
needed later.
"""

from __future__ import annotations

from typing import Any

from kvstore.errors import InputError
from runtime_adapter.pte.exir import quietly


def kv_cache_config(**overrides: Any) -> Any:
    """An ``ExecutorchBackendConfig`` with named mutable buffers on memory id 2.

    ``overrides`` are fields of ``ExecutorchBackendConfig``; they win. Inputs
    stay outside the planned memory, so that they are not copied into it.

    Raises:
        InputError: an override is not a field of this ExecuTorch's configuration.
        RuntimeMissingError: ExecuTorch is not installed.
    """
    with quietly():
        from executorch.exir import ExecutorchBackendConfig
        from executorch.exir.passes import MemoryPlanningPass
        from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
    settings: dict[str, Any] = {
        "emit_mutable_buffer_names": True,
        "memory_planning_pass": MemoryPlanningPass(
            alloc_graph_input=False, share_mutable_buffers=True
        ),
        # Keeps the upper bound of dynamic shapes, as the stock LLM exporter does.
        "sym_shape_eval_pass": ConstraintBasedSymShapeEvalPass(),
    }
    settings.update(overrides)
    try:
        return ExecutorchBackendConfig(**settings)
    except TypeError as error:
        raise InputError(
            f"kv_cache_config: expected fields of ExecutorchBackendConfig, found: {error}; "
            "check the names against the installed executorch"
        ) from error
