"""A ring's bookkeeping: which position each slot holds. Derived, never stored.

ExecuTorch's ``cache_positions``, int64 ``[S]``: the position in a slot, or -1.
What a slot holds follows from the cache's length, so a restore writes it anew.
"""

from __future__ import annotations

from typing import ClassVar

from kvstore.kinds.base import Held, Run, Slots
from kvstore.kinds.window import Window
from kvstore.ranges import Range

EMPTY = -1
"""What a slot says that holds no position."""


class Positions:
    """Nothing to read, nothing required; slots are a ring's."""

    has_token_axis: ClassVar[bool] = True
    has_token_content: ClassVar[bool] = False
    is_ring: ClassVar[bool] = True
    is_whole: ClassVar[bool] = False
    is_thinned: ClassVar[bool] = False
    miss_reason: ClassVar[str | None] = None

    def resident(self, spec: Slots, held: Held) -> list[Range]:  # noqa: ARG002
        """Nothing to store."""
        return []

    def required(self, spec: Slots, n_tokens: int) -> list[Range]:  # noqa: ARG002
        """Nothing to read."""
        return []

    def servable(self, spec: Slots, stored: list[Range], limit_n_tokens: int) -> int:  # noqa: ARG002
        """Any length."""
        return limit_n_tokens

    def is_storable(self, spec: Slots, start: int, stop: int) -> bool:  # noqa: ARG002
        """Never."""
        return False

    def runs(self, spec: Slots, start: int, stop: int) -> list[Run]:
        """The slots of the ring that it describes."""
        return Window().runs(spec, start, stop)

    def derived(self, spec: Slots, n_tokens: int) -> list[int] | None:
        """The position in each slot, or ``EMPTY``."""
        return slot_positions(spec, n_tokens)

    def can_truncate(self, spec: Slots, held: Held, n_tokens: int) -> bool:
        """As the ring can."""
        return Window().can_truncate(spec, held, n_tokens)

    def kept(self, spec: Slots) -> str:  # noqa: ARG002
        """Nothing."""
        return "nothing, it is derived"


def slot_positions(spec: Slots, n_tokens: int) -> list[int]:
    """The content for a cache of ``n_tokens`` that holds what they require: one int a slot."""
    slots = [EMPTY] * spec.capacity_n_tokens
    for start, stop in Window().required(spec, n_tokens):
        position = start
        for run in Window().runs(spec, start, stop):
            slots[run.slot : run.slot + run.n_slots] = range(position, position + run.n_slots)
            position += run.n_slots
    return slots
