"""Kinds of state: one module each, registered here.

A kind says, in integers alone, which token positions a tensor holds, which it
needs, and in which slots they lie. A new kind is one module, one line below, one
member of ``kvstore.layout.Kind``, and its tests.
"""

from kvstore.kinds.base import Run, StateKind
from kvstore.kinds.checkpoint import Checkpoint
from kvstore.kinds.full import Full
from kvstore.kinds.positions import Positions
from kvstore.kinds.window import Window
from kvstore.layout import Kind, TensorSpec

KINDS: dict[Kind, StateKind] = {
    Kind.FULL: Full(),
    Kind.WINDOW: Window(),
    Kind.POSITIONS: Positions(),
    Kind.CHECKPOINT: Checkpoint(),
}
"""The arithmetic of every kind that this version can serve."""


def kind_of(spec: TensorSpec) -> StateKind:
    """The arithmetic of ``spec``'s kind."""
    return KINDS[spec.kind]


__all__ = ["KINDS", "Run", "StateKind", "kind_of"]
