"""Recurrent state: opaque, and only good at exactly the length that it was computed for.

Position ``n - 1`` stands for "after ``n`` tokens": a checkpoint of ``n`` tokens
is stored as ``[n - 1, n)``. The last logits are one more such tensor.
"""

from __future__ import annotations

from typing import ClassVar

from kvstore.kinds.base import Held, Run, Slots
from kvstore.ranges import Range


class Checkpoint:
    """The whole tensor, at one length."""

    has_token_axis: ClassVar[bool] = False
    has_token_content: ClassVar[bool] = False
    is_ring: ClassVar[bool] = False
    is_whole: ClassVar[bool] = False
    is_thinned: ClassVar[bool] = True
    miss_reason: ClassVar[str | None] = "no_checkpoint"

    def resident(self, spec: Slots, held: Held) -> list[Range]:  # noqa: ARG002
        """The state after the last token."""
        return [(held.n_tokens - 1, held.n_tokens)] if held.n_tokens else []

    def required(self, spec: Slots, n_tokens: int) -> list[Range]:  # noqa: ARG002
        """The state after exactly ``n_tokens``."""
        return [(n_tokens - 1, n_tokens)] if n_tokens else []

    def servable(self, spec: Slots, stored: list[Range], limit_n_tokens: int) -> int:  # noqa: ARG002
        """The last checkpoint at or before the limit."""
        return max(
            (min(stop, limit_n_tokens) for start, stop in stored if start < limit_n_tokens),
            default=0,
        )

    def is_storable(self, spec: Slots, start: int, stop: int) -> bool:  # noqa: ARG002
        """One length a blob."""
        return stop - start == 1

    def runs(self, spec: Slots, start: int, stop: int) -> list[Run]:  # noqa: ARG002
        """The whole tensor."""
        return [Run(slot=0, n_slots=1)]

    def derived(self, spec: Slots, n_tokens: int) -> list[int] | None:  # noqa: ARG002
        """Nothing follows from the length."""
        return None

    def can_truncate(self, spec: Slots, held: Held, n_tokens: int) -> bool:  # noqa: ARG002
        """Only to nothing: a recurrence cannot be undone."""
        return n_tokens in (0, held.n_tokens)

    def kept(self, spec: Slots) -> str:  # noqa: ARG002
        """All of it, now and then."""
        return "whole, at exact lengths"
