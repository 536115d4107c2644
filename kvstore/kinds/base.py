"""What a kind of state has to answer. Integers in, integers out; no bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from kvstore.ranges import Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """How a live cache came to hold what it holds; decides what its rings still have.

    ``n_tokens`` are in it now; it was once ``peak_n_tokens`` long since it was
    last empty or restored; ``restored_n_tokens`` is the length of that restore
    (0 if it was computed from the start).
    """

    n_tokens: int
    peak_n_tokens: int
    restored_n_tokens: int = 0


class Slots(Protocol):
    """The slots of one tensor: all that a kind may ask of it (see ``TensorSpec``)."""

    @property
    def capacity_n_tokens(self) -> int:
        """Number of slots."""
        ...

    @property
    def window_n_tokens(self) -> int:
        """A ring's window; 0 for other kinds."""
        ...

    @property
    def sink_n_tokens(self) -> int:
        """The positions before a ring that are kept for ever."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """``n_slots`` slots from ``slot`` on, holding positions in ascending order."""

    slot: int
    n_slots: int


class StateKind(Protocol):
    """The arithmetic of one kind, and what the rest of the project may ask about it."""

    has_token_axis: ClassVar[bool]
    """It has one slot a token, along one axis; else it is opaque."""

    has_token_content: ClassVar[bool]
    """Its slots hold what was computed of their tokens, and are masked until then; else
    a model's first step reads the tensor as it is."""

    is_ring: ClassVar[bool]
    """Slots are used again, behind a sink; the tensor has a window."""

    is_whole: ClassVar[bool]
    """A chunk has all of its own range, in one blob that is written with it."""

    is_thinned: ClassVar[bool]
    """A growing session drops most of what it saved on the way."""

    miss_reason: ClassVar[str | None]
    """Why fewer tokens can be served than match, if it is this kind that limits them."""

    def resident(self, spec: Slots, held: Held) -> list[Range]:
        """The positions whose content the live tensor has now."""
        ...

    def required(self, spec: Slots, n_tokens: int) -> list[Range]:
        """The positions that must be in place for the next token to see ``n_tokens`` tokens."""
        ...

    def servable(self, spec: Slots, stored: list[Range], limit_n_tokens: int) -> int:
        """The largest ``n <= limit_n_tokens`` with ``required(n)`` within ``stored``; 0 if none."""
        ...

    def is_storable(self, spec: Slots, start: int, stop: int) -> bool:
        """Whether one blob may hold positions ``[start, stop)``; no other row is believed."""
        ...

    def runs(self, spec: Slots, start: int, stop: int) -> list[Run]:
        """Where positions ``[start, stop)`` lie, in position order."""
        ...

    def derived(self, spec: Slots, n_tokens: int) -> list[int] | None:
        """The tensor's elements after a restore, if they follow from the length; else None."""
        ...

    def can_truncate(self, spec: Slots, held: Held, n_tokens: int) -> bool:
        """Whether forgetting the tokens behind ``n_tokens`` leaves what ``n_tokens`` need."""
        ...

    def kept(self, spec: Slots) -> str:
        """What a store keeps of such a tensor, for a person."""
        ...
