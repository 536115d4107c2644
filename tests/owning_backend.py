"""A backend that takes mutable buffers over, as Core ML's, QNN's and others do by default.

A real partitioner and a real lowering, for ``tests.programs``; only what the backend would run
is missing, since no such backend runs where the tests do.
"""

from __future__ import annotations

from typing import Any

from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.backend.utils import tag_constant_data, tag_mutated_buffer


class QnnBackend(BackendDetails):
    """Stands in for the backend of that name; found by its class's name."""

    @staticmethod
    def preprocess(edge_program: Any, compile_specs: Any) -> PreprocessResult:  # noqa: ARG004
        return PreprocessResult(processed_bytes=b"nothing that could run")


class OwningPartitioner(Partitioner):
    """Delegates all computation, and takes over the buffers whose name has ``part`` in it."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._spec = DelegationSpec(QnnBackend.__name__, [])
        self._part = part

    def partition(self, exported_program: Any) -> PartitionResult:
        for node in exported_program.graph.nodes:
            if node.op == "call_function":
                node.meta["delegation_tag"] = "all"
        tag_constant_data(exported_program)
        tag_mutated_buffer(exported_program)
        signature = exported_program.graph_signature
        mutated = set(signature.buffers_to_mutate.values())
        for node in exported_program.graph.nodes:
            buffer = signature.inputs_to_buffers.get(node.name)
            if buffer in mutated and self._part not in buffer:
                node.meta.pop("delegation_tag", None)
        return PartitionResult(
            tagged_exported_program=exported_program, partition_tags={"all": self._spec}
        )
