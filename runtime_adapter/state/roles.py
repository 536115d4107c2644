"""Which tensors of a method are its state, and what each of them is: from instructions alone.

Names are never looked at, so a stock export, a named one and a renamed one give
the same answer. A tensor's *kind* comes from the instructions that update it
(``classifiers``, one module a kind), its role and layer from those that read it
(``layers``).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore import Kind
from kvstore.layout import DTYPE_ITEMSIZE_NBYTES
from runtime_adapter.pte.instructions import TensorValue
from runtime_adapter.state.classifiers import Evidence, Verdict, classify
from runtime_adapter.state.dataflow import Dataflow
from runtime_adapter.state.layers import place, role_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTensor:
    """One persistent tensor. ``reason`` says why it cannot be served; None if it can.

    ``window_n_tokens`` and ``sink_n_tokens`` are a ring's (see ``TensorSpec``). ``note``
    is for a person: what is unusual about how the tensor is kept.
    """

    value: int
    tensor: TensorValue
    kind: Kind | None
    token_axis: int | None
    window_n_tokens: int
    sink_n_tokens: int
    role: str | None
    layer: int | None
    reason: str | None
    note: str | None


def find_state(flow: Dataflow) -> tuple[StateTensor, ...]:
    """The persistent tensors of a method: layer by layer in ``ROLE_ORDER``, refused ones last.

    What a method reads and never changes is no state of it (see ``constants_of``).
    """
    evidence = Evidence(flow)
    verdicts = {value: _judge(evidence, value) for value in flow.live_in if flow.updates.get(value)}
    served = {value: verdict for value, verdict in verdicts.items() if verdict.reason is None}
    places = place(evidence, served)
    found = [
        StateTensor(
            value=value,
            tensor=flow.graph.tensors[value],
            kind=verdict.kind,
            token_axis=verdict.token_axis,
            window_n_tokens=verdict.window_n_tokens,
            sink_n_tokens=verdict.sink_n_tokens,
            layer=places[value][0] if value in places else None,
            role=places[value][1] if value in places else None,
            reason=verdict.reason,
            note=verdict.note,
        )
        for value, verdict in verdicts.items()
    ]
    return tuple(sorted(found, key=_layout_order))


def constants_of(flow: Dataflow) -> tuple[TensorValue, ...]:
    """Planned tensors that the method reads and never changes: what another method left there."""
    return tuple(flow.graph.tensors[value] for value in flow.live_in if not flow.updates.get(value))


def _layout_order(state: StateTensor) -> tuple[int, int, int, int, int]:
    if state.layer is None or state.role is None:
        return (1, 0, 0, 0, state.value)
    return (0, state.layer, *role_rank(state.role), state.value)


def _judge(evidence: Evidence, value: int) -> Verdict:
    verdict = classify(evidence, value)
    if verdict is None:
        return Verdict(reason="no classifier knows how it is updated")
    return verdict if verdict.reason else _check_tensor(evidence.tensor(value), verdict)


def _check_tensor(tensor: TensorValue, verdict: Verdict) -> Verdict:
    """Refuse what cannot be stored, or cannot be cut along its token axis."""
    reason = None
    axis = verdict.token_axis
    if tensor.dtype not in DTYPE_ITEMSIZE_NBYTES:
        reason = f"its dtype {tensor.dtype} is not one that can be stored"
    elif tensor.dim_order != tuple(range(len(tensor.shape))):
        reason = f"its memory order {list(tensor.dim_order)} is not contiguous"
    elif axis is not None and not 0 <= axis < len(tensor.shape):
        reason = f"its token axis {axis} is not an axis of {list(tensor.shape)}"
    elif axis and tensor.shape[0] != 1:
        reason = f"batch size {tensor.shape[0]}; export with batch size 1"
    elif not tensor.shape or min(tensor.shape) < 1:
        reason = f"an empty shape {list(tensor.shape)}"
    return Verdict(reason=reason) if reason else verdict
