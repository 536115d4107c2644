"""Whether a call's arguments are of the kinds that its operator's schema asks for.

The runtime's kernels unpack their arguments without looking: one of another kind ends the
process (``ET_CHECK`` in ExecuTorch's ``runtime/core/evalue.h``). A flipped bit can make
such a call, so calls are checked when a program is analysed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

SchemaOf = Callable[[str], "Sequence[str] | None"]
"""Operator name (``aten::add.out``) -> the type of each argument, as TorchScript writes it
(``Tensor``, ``Optional[int]``, ``List[int]``); None for an operator that is not known."""

_ACCEPTED: Mapping[str, frozenset[str]] = {
    "Tensor": frozenset({"Tensor"}),
    "int": frozenset({"Int"}),
    "bool": frozenset({"Bool"}),
    "float": frozenset({"Double"}),
    "number": frozenset({"Int", "Bool", "Double"}),
    "str": frozenset({"String"}),
    "List[int]": frozenset({"IntList"}),
    "List[bool]": frozenset({"BoolList"}),
    "List[float]": frozenset({"DoubleList"}),
    "List[Tensor]": frozenset({"TensorList"}),
    "List[Optional[Tensor]]": frozenset({"OptionalTensorList"}),
}
_OPTIONAL = "Optional["
_RETURNED = "returned"  # where the kernel puts what it returns, whatever is there before

_UNREGISTERED: Mapping[str, Sequence[str]] = {
    "executorch_prim::et_view.default": ("Tensor", "List[int]", "Tensor"),
}
"""Arguments of operators that only the runtime has: nothing registers a schema for them."""

LIST_ITEMS: Mapping[str, frozenset[str]] = {
    "IntList": frozenset({"Int"}),
    "TensorList": frozenset({"Tensor"}),
    "OptionalTensorList": frozenset({"Tensor", "Null"}),
}
"""Kinds of a list -> the kinds of value that its items may be."""


def no_schemas(operator: str) -> Sequence[str] | None:  # noqa: ARG001
    """For a reader that does not check calls."""
    return None


def find_mismatch(operator: str, kinds: Sequence[str], schema_of: SchemaOf) -> str | None:
    """What is wrong with a call of ``operator`` whose arguments have ``kinds``, or None."""
    wanted = _UNREGISTERED.get(operator)
    if wanted is None:
        types = schema_of(operator)
        if types is None:
            return None
        wanted = (*types, _RETURNED)
    if len(kinds) != len(wanted):
        return f"{len(kinds)} arguments instead of {len(wanted)}"
    for number, (type_, kind) in enumerate(zip(wanted, kinds, strict=True)):
        is_optional = type_.startswith(_OPTIONAL)
        accepted = _ACCEPTED.get(type_[len(_OPTIONAL) : -1] if is_optional else type_)
        if accepted is None or kind in accepted or (is_optional and kind == "Null"):
            continue
        return f"a value of kind {kind} where argument {number} is {type_}"
    return None
