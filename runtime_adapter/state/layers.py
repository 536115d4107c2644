"""The layer and role of each state tensor: from the attention that reads it, or from its place.

Layers are numbered in the order of the method's instructions, over all layers
that keep state; a layer whose keys and values several others read comes once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from runtime_adapter.state.attention import AttentionMap
from runtime_adapter.state.classifiers import Evidence, Verdict
from runtime_adapter.state.dataflow import Dataflow

ROLE_ORDER = (
    "k",
    "k_scale",
    "k_zero_point",
    "v",
    "v_scale",
    "v_zero_point",
    "cache",
    "positions",
    "conv_state",
    "recurrent_state",
    "state",
)
"""Order of a layer's tensors in a layout. Append only: a layout's digest depends on it."""

_CONVOLUTIONS = frozenset({"aten::convolution", "aten::conv1d"})
_RECURRENCES = frozenset({"llama::gated_delta_rule"})
# Every layer projects its result: what lies behind belongs to another one.
_LAYER_ENDS = ("linear", "mm", "matmul")

Place = tuple[int, str]
"""A key that orders layers (a step of the method), and a role; later the layer itself."""


def role_rank(role: str) -> tuple[int, int]:
    """Where ``role`` stands in a layer; a number behind it counts equals (``state1``)."""
    name = role.rstrip("0123456789")
    return ROLE_ORDER.index(name), int(role[len(name) :] or 0)


def place(evidence: Evidence, verdicts: Mapping[int, Verdict]) -> dict[int, Place]:
    """``(layer, role)`` of each served tensor; roles are unique within a layer."""
    rules = {value: verdict.kind.rules for value, verdict in verdicts.items() if verdict.kind}
    slotted = {value: verdicts[value] for value, has in rules.items() if has.has_token_content}
    opaque = {value: verdicts[value] for value, has in rules.items() if not has.has_token_axis}
    books = {value: verdicts[value] for value in rules if value not in slotted | opaque}
    rings = {value: verdict for value, verdict in slotted.items() if rules[value].is_ring}
    keyed = _place_attention(evidence.flow, slotted)
    borders = {key for key, _ in keyed.values()}
    keyed.update(_place_opaque(evidence.flow, opaque, borders))
    keyed.update(_place_bookkeeping(books, rings, keyed))
    rank = {key: layer for layer, key in enumerate(sorted({key for key, _ in keyed.values()}))}
    return _unique({value: (rank[key], role) for value, (key, role) in keyed.items()})


def _unique(places: Mapping[int, Place]) -> dict[int, Place]:
    """Number the roles that several tensors of a layer have."""
    same: dict[Place, list[int]] = {}
    for value in sorted(places):
        same.setdefault(places[value], []).append(value)
    found: dict[int, Place] = {}
    for (layer, role), values in same.items():
        for number, value in enumerate(values):
            found[value] = (layer, role if len(values) == 1 else f"{role}{number}")
    return found


# ------------------------------------------------------------- keys and values


def _place_attention(flow: Dataflow, slotted: Mapping[int, Verdict]) -> dict[int, Place]:
    uses = AttentionMap(flow).uses(slotted)
    groups: dict[int, dict[str, list[int]]] = {}
    for value, (position, role) in uses.items():
        groups.setdefault(position, {}).setdefault(role, []).append(value)
    keyed: dict[int, Place] = {}
    for position, roles in groups.items():
        told = _tell_apart(flow, roles, slotted)
        if {"k", "v"} <= roles.keys() and told is not None:
            keyed.update({value: (position, role) for value, role in told.items()})
    left = [value for value in slotted if value not in keyed]
    keyed.update(_pair_by_order(flow, left, slotted))
    return keyed


def _tell_apart(
    flow: Dataflow, roles: Mapping[str, list[int]], slotted: Mapping[int, Verdict]
) -> dict[int, str] | None:
    """A role for each tensor of one attention; None if they cannot be told apart.

    Where content is unpacked by ordinary operators, norms and scales reach the
    attention as what they belong to: the widest is the content, the next its scale.
    """
    told: dict[int, str] = {}
    for role, values in roles.items():
        parts = (f"{role}_scale", f"{role}_zero_point")
        free = [role, *(name for name in parts if name not in roles)]
        if len(values) > len(free) or (len(values) > 1 and role not in {"k", "v"}):
            return None
        widths = {value: _width(flow, value, slotted[value]) for value in values}
        if len(set(widths.values())) != len(values):
            return None
        widest = sorted(values, key=lambda value: -widths[value])
        told.update(zip(widest, free, strict=False))
    return told


def _width(flow: Dataflow, value: int, verdict: Verdict) -> int:
    shape = flow.graph.tensors[value].shape
    return math.prod(size for axis, size in enumerate(shape) if axis != verdict.token_axis)


def _pair_by_order(
    flow: Dataflow, values: Iterable[int], verdicts: Mapping[int, Verdict]
) -> dict[int, Place]:
    """K and V of layers whose attention a delegate hides: K is updated before V."""
    ordered = sorted(values, key=lambda value: (verdicts[value].position, value))
    placed: dict[int, Place] = {}
    while ordered:
        first = ordered.pop(0)
        position = verdicts[first].position
        if ordered and _same_form(flow, first, ordered[0]):
            placed[first] = (position, "k")
            placed[ordered.pop(0)] = (position, "v")
        else:
            placed[first] = (position, "cache")
    return placed


def _same_form(flow: Dataflow, left: int, right: int) -> bool:
    one, other = flow.graph.tensors[left], flow.graph.tensors[right]
    return (one.shape, one.dtype) == (other.shape, other.dtype)


# ------------------------------------------------------------- bookkeeping of rings


def _place_bookkeeping(
    books: Mapping[int, Verdict], rings: Mapping[int, Verdict], keyed: Mapping[int, Place]
) -> dict[int, Place]:
    """Beside the ring that is written right behind it; alone in a layer if there is none.

    Where there are as many as layers with rings, they are in the same order: a delegate may
    have moved all of them before the first ring.
    """
    places = sorted((verdict.position, keyed[value][0]) for value, verdict in rings.items())
    found: dict[int, Place] = {}
    layers = sorted({key for _, key in places})
    if len(layers) == len(books):
        in_order = sorted(books, key=lambda value: (books[value].position, value))
        return {value: (key, "positions") for value, key in zip(in_order, layers, strict=True)}
    for value, verdict in books.items():
        behind = [key for position, key in places if position > verdict.position]
        before = [key for position, key in places if position <= verdict.position]
        key = behind[0] if behind else before[-1] if before else verdict.position
        found[value] = (key, "positions")
    return found


# ------------------------------------------------------------- recurrent state


def _place_opaque(
    flow: Dataflow, values: Mapping[int, Verdict], borders: set[int]
) -> dict[int, Place]:
    """Neighbours in one layer, until a form or an attention says that the next one begins."""
    firsts = {value: _first_step(flow, value, verdicts) for value, verdicts in values.items()}
    found: dict[int, Place] = {}
    key: int | None = None
    forms: set[tuple[str, tuple[int, ...], str]] = set()
    for value in sorted(values, key=lambda value: (firsts[value], value)):
        tensor, role = flow.graph.tensors[value], _state_role(flow, value)
        form = (tensor.dtype, tensor.shape, role)
        position = firsts[value]
        is_next = key is None or form in forms or any(key < border < position for border in borders)
        if is_next:
            key, forms = position, set()
            while key in borders or key in {taken for taken, _ in found.values()}:
                # One delegate call reads the state of several layers: keep their order.
                key += 1
        forms.add(form)
        found[value] = (key if key is not None else position, role)
    return found


def _first_step(flow: Dataflow, value: int, verdict: Verdict) -> int:
    consumers = flow.consumers.get(value, ())
    return min((step.position for step in consumers), default=verdict.position)


def _state_role(flow: Dataflow, value: int) -> str:
    """What the state is for, where an operator says so."""
    seen = {value, *flow.live_in}  # the next call's content is another story
    pending = [value]
    while pending:
        for step in flow.consumers.get(pending.pop(), ()):
            if step.op in _CONVOLUTIONS:
                return "conv_state"
            if step.op in _RECURRENCES:
                return "recurrent_state"
            if step.delegate is not None or any(word in step.op for word in _LAYER_ENDS):
                continue
            for output in flow.resolved(sorted(step.writes)):
                if output in flow.graph.tensors and output not in seen:
                    seen.add(output)
                    pending.append(output)
    is_hidden = all(step.delegate is not None for step in flow.consumers.get(value, ()))
    # Sums of outer products of keys and values: [1, heads, D_k, D_v].
    is_matrix = len(flow.graph.tensors[value].shape) >= 4
    return "recurrent_state" if is_matrix and not is_hidden else "state"
