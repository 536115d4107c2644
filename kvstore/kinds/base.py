"""What a kind of state has to answer. Integers in, integers out; no bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from kvstore.layout import Held, TensorSpec
from kvstore.ranges import Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """``n_slots`` slots from ``slot`` on, holding positions in ascending order."""

    slot: int
    n_slots: int


class StateKind(Protocol):
    """The arithmetic of one kind."""

    is_whole: ClassVar[bool]
    """A chunk has all of its own range, in one blob that is written with it."""

    is_thinned: ClassVar[bool]
    """A growing session drops most of what it saved on the way."""

    miss_reason: ClassVar[str | None]
    """Why fewer tokens can be served than match, if it is this kind that limits them."""

    def resident(self, spec: TensorSpec, held: Held) -> list[Range]:
        """The positions whose content the live tensor has now."""
        ...

    def required(self, spec: TensorSpec, n_tokens: int) -> list[Range]:
        """The positions that must be in place for the next token to see ``n_tokens`` tokens."""
        ...

    def servable(self, spec: TensorSpec, stored: list[Range], limit_n_tokens: int) -> int:
        """The largest ``n <= limit_n_tokens`` with ``required(n)`` within ``stored``; 0 if none."""
        ...

    def is_storable(self, spec: TensorSpec, start: int, stop: int) -> bool:
        """Whether one blob may hold positions ``[start, stop)``; no other row is believed."""
        ...

    def runs(self, spec: TensorSpec, start: int, stop: int) -> list[Run]:
        """Where positions ``[start, stop)`` lie, in position order."""
        ...

    def derived(self, spec: TensorSpec, n_tokens: int) -> list[int] | None:
        """The tensor's elements after a restore, if they follow from the length; else None."""
        ...

    def can_truncate(self, spec: TensorSpec, held: Held, n_tokens: int) -> bool:
        """Whether forgetting the tokens behind ``n_tokens`` leaves what ``n_tokens`` need."""
        ...
