"""Which attention reads a cache tensor, and as what: K, V, or a scale or zero point of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from runtime_adapter.pte.instructions import Step
from runtime_adapter.state.dataflow import Dataflow

FUSED_ATTENTION: Mapping[str, Mapping[int, str]] = {
    "llama::custom_sdpa": {1: "k", 2: "v"},
    "llama::sdpa_with_kv_cache": {3: "k", 4: "v"},
    "llama::custom_quantized_sdpa": {
        1: "k",
        2: "v",
        10: "k_zero_point",
        11: "k_scale",
        12: "v_zero_point",
        13: "v_scale",
    },
}
"""Role by argument of the operators that do a whole attention."""

_MATMULS = frozenset({"aten::bmm", "aten::mm", "aten::matmul", "aten::linear", "aten::addmm"})
_SOFTMAXES = frozenset({"aten::_softmax", "aten::softmax", "aten::_safe_softmax"})
# What a dequantize operator takes: (input, scales, zero points, ...).
_DEQUANTIZE_SUFFIX = {0: "", 1: "_scale", 2: "_zero_point"}
_SCALE_ROLES = frozenset({"k", "v"})


class AttentionMap:
    """Finds, for cache tensors of one method, the attention that reads each and its role there.

    In an attention written out as ``bmm, softmax, bmm`` the product with K goes into
    the softmax, and V is multiplied by its result; the softmax's step stands for
    the attention.
    """

    def __init__(self, flow: Dataflow) -> None:
        self._flow = flow
        self._softmaxed: dict[int, int] = {}
        for step in flow.graph.steps:
            if step.op in _SOFTMAXES:
                for value in self._spread(step.writes):
                    self._softmaxed.setdefault(value, step.position)

    def uses(self, values: Iterable[int]) -> dict[int, tuple[int, str]]:
        """``(step of the attention, role)`` per tensor, without those that none visibly reads.

        A tensor that several layers read (shared K and V) belongs to the first.
        """
        found = {}
        for value in values:
            hits = self._hits(value)
            if hits:
                found[value] = min(hits)
        return found

    def _hits(self, value: int) -> list[tuple[int, str]]:
        flow = self._flow
        hits: list[tuple[int, str]] = []
        carried = {value: ""}
        pending = [value]
        while pending:
            current = pending.pop()
            suffix = carried[current]
            for step in flow.consumers.get(current, ()):
                places = [
                    index for index, arg in enumerate(flow.resolved(step.args)) if arg == current
                ]
                role = self._role(step, current, places)
                if role is not None:
                    position, name = role
                    hits.append((position, name + suffix if name in _SCALE_ROLES else name))
                    continue
                passed = self._passed(step, places)
                if passed is None:
                    continue
                for output in flow.resolved(sorted(step.writes)):
                    if output in flow.graph.tensors and output not in carried:
                        carried[output] = suffix + passed
                        pending.append(output)
        return hits

    def _role(self, step: Step, current: int, places: list[int]) -> tuple[int, str] | None:
        """The role that ``step`` gives to the value at argument ``places``, if it is attention."""
        table = FUSED_ATTENTION.get(step.op)
        if table is None and "scaled_dot_product" in step.op:
            table = {1: "k", 2: "v"}
        if table is not None:
            roles = [table[place] for place in places if place in table]
            return (step.position, roles[0]) if roles else None
        if step.op not in _MATMULS:
            return None
        for other in self._flow.resolved(step.args):
            if other != current and other in self._softmaxed:
                return self._softmaxed[other], "v"
        softmax = self._next_softmax(step)
        return (softmax, "k") if softmax is not None else None

    def _passed(self, step: Step, places: list[int]) -> str | None:
        """What is added to the role when content goes through ``step``; None where it ends."""
        if step.delegate is not None or step.op in _SOFTMAXES:
            return None
        if step.op in _MATMULS:
            return "" if self._is_by_constant(step, places) else None
        if step.op in FUSED_ATTENTION or "scaled_dot_product" in step.op:
            return None
        if "dequantize" in step.op:
            return _DEQUANTIZE_SUFFIX.get(places[0]) if places else None
        if step.op.removesuffix("_") in {"aten::index_put", "aten::copy"}:
            # Content stays what it is only where it is the base, not where it is written.
            return "" if 0 in places else None
        return ""

    def _is_by_constant(self, step: Step, places: list[int]) -> bool:
        """Whether the product is with weights, as when packed content is rotated back."""
        flow = self._flow
        changing = {*flow.graph.inputs, *flow.live_in}
        others = [
            arg
            for place, arg in enumerate(step.args)
            if place not in places and arg in flow.graph.tensors
        ]
        return not any(flow.depends_on(other)[1] & changing for other in others)

    def _next_softmax(self, step: Step) -> int | None:
        for value in self._spread(step.writes):
            for consumer in self._flow.consumers.get(value, ()):
                if consumer.op in _SOFTMAXES:
                    return consumer.position
        return None

    def _spread(self, values: Iterable[int]) -> list[int]:
        """``values`` and everything made of them before the next matrix product or softmax."""
        flow = self._flow
        seen = dict.fromkeys(flow.resolved(sorted(values)))
        pending = list(seen)
        while pending:
            for step in flow.consumers.get(pending.pop(), ()):
                if step.op in _MATMULS or step.op in _SOFTMAXES or step.delegate is not None:
                    continue
                for output in flow.resolved(sorted(step.writes)):
                    if output not in seen:
                        seen[output] = None
                        pending.append(output)
        return list(seen)
