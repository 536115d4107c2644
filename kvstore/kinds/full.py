"""One slot a token for ever: any token range can be cut out and put back."""

from __future__ import annotations

from typing import ClassVar

from kvstore.kinds.base import Held, Run, Slots
from kvstore.ranges import Range, union


class Full:
    """Position ``p`` lies in slot ``p``."""

    has_token_axis: ClassVar[bool] = True
    has_token_content: ClassVar[bool] = True
    is_ring: ClassVar[bool] = False
    is_whole: ClassVar[bool] = True
    is_thinned: ClassVar[bool] = False
    miss_reason: ClassVar[str | None] = None

    def resident(self, spec: Slots, held: Held) -> list[Range]:  # noqa: ARG002
        """All that the cache holds."""
        return union([(0, held.n_tokens)])

    def required(self, spec: Slots, n_tokens: int) -> list[Range]:  # noqa: ARG002
        """Every token."""
        return union([(0, n_tokens)])

    def servable(self, spec: Slots, stored: list[Range], limit_n_tokens: int) -> int:  # noqa: ARG002
        """As far as nothing is missing from position 0 on."""
        if not stored or stored[0][0] > 0:
            return 0
        return min(stored[0][1], limit_n_tokens)

    def is_storable(self, spec: Slots, start: int, stop: int) -> bool:  # noqa: ARG002
        """As far as there are slots."""
        return stop <= spec.capacity_n_tokens

    def runs(self, spec: Slots, start: int, stop: int) -> list[Run]:  # noqa: ARG002
        """One run."""
        return [Run(slot=start, n_slots=stop - start)]

    def derived(self, spec: Slots, n_tokens: int) -> list[int] | None:  # noqa: ARG002
        """Nothing follows from the length."""
        return None

    def can_truncate(self, spec: Slots, held: Held, n_tokens: int) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def kept(self, spec: Slots) -> str:  # noqa: ARG002
        """Everything."""
        return "every token"
