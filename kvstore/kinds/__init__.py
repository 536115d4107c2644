"""Kinds of state: one module each, registered here.

A kind says, in integers alone, which token positions a tensor holds, which it
needs, and in which slots they lie. A new kind is one module, its two lines below,
and its tests.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from kvstore.kinds.base import Held, Run, Slots, StateKind
from kvstore.kinds.checkpoint import Checkpoint
from kvstore.kinds.full import Full
from kvstore.kinds.positions import Positions
from kvstore.kinds.window import Window


class Kind(StrEnum):
    """How a tensor's content depends on the tokens seen so far."""

    FULL = "full"
    """One slot a token for ever: any token range can be cut out and put back."""

    WINDOW = "window"
    """A ring: the last positions only, behind a sink that is kept for ever."""

    POSITIONS = "positions"
    """Which position each slot of a ring holds; derived, never stored."""

    CHECKPOINT = "checkpoint"
    """Opaque state that is good at exactly the length it was computed for."""

    @property
    def rules(self) -> StateKind:
        """The arithmetic of this kind, and what may be asked about it."""
        return _RULES[self]


_RULES: dict[Kind, StateKind] = {
    Kind.FULL: Full(),
    Kind.WINDOW: Window(),
    Kind.POSITIONS: Positions(),
    Kind.CHECKPOINT: Checkpoint(),
}


class _OfKind(Protocol):
    @property
    def kind(self) -> Kind: ...


def kind_of(spec: _OfKind) -> StateKind:
    """The arithmetic of ``spec``'s kind."""
    return spec.kind.rules


__all__ = ["Held", "Kind", "Run", "Slots", "StateKind", "kind_of"]
