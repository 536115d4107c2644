"""Room in a context that is full: a sink is kept, and the older half of a window goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvstore.errors import CapacityError, InputError
from runtime_adapter.session.rope import RopeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Overflow:
    """The first ``n_sink`` tokens and the last ``window`` are kept; pure planning."""

    n_sink: int
    window: int
    told: Callable[[int, int], None] | None = None
    rope: RopeSpec | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: one is out of range.
        """
        if {type(self.n_sink), type(self.window)} != {int} or self.n_sink < 1 or self.window < 2:
            raise InputError(
                "keep_sink: expected a sink of at least 1 token and a window of at least 2, found "
                f"{self.n_sink!r}, {self.window!r}"
            )

    def plan(self, n_tokens: int, n_new: int) -> tuple[int, int] | None:
        """The range to strike out of ``n_tokens`` before ``n_new`` come; None while there is room.

        Raises:
            CapacityError: ``n_new`` alone do not fit into the window.
        """
        excess = n_tokens + n_new - (self.n_sink + self.window)
        if excess <= 0:
            return None
        if n_new >= self.window:
            raise CapacityError(
                f"keep_sink: expected fewer new tokens than the window of {self.window}, found "
                f"{n_new}; append them in parts"
            )
        n_struck = min(max(excess, self.window // 2), n_tokens - self.n_sink - 1)
        return self.n_sink, self.n_sink + n_struck
