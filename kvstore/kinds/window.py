"""Ring layers: the last positions only, and before them a sink that is kept for ever.

ExecuTorch: ``CachePositionsManager`` (``examples/models/llama/attention.py``) and
``CachePositionsManagerWithSink`` (``source_transformation/attention_sink.py``).
Positions below ``sink_n_tokens`` lie in the slot of their number; position
``p`` above lies in slot ``sink + (p - sink) mod ring``, where ``ring`` is the
capacity less the sink. A query at position ``q`` sees the sink and ``(q - window, q]``.
"""

from __future__ import annotations

from typing import ClassVar

from kvstore.kinds.base import Held, Run, Slots
from kvstore.kinds.full import Full
from kvstore.ranges import Range, intersect, subtract, union


class Window:
    """A ring behind a sink (of 0 tokens for a plain sliding window)."""

    has_token_axis: ClassVar[bool] = True
    has_token_content: ClassVar[bool] = True
    is_ring: ClassVar[bool] = True
    is_whole: ClassVar[bool] = False
    is_thinned: ClassVar[bool] = False
    miss_reason: ClassVar[str | None] = "window_gone"

    def resident(self, spec: Slots, held: Held) -> list[Range]:
        """The sink, and what the ring has not overwritten.

        A ring remembers how far it has been written, also after the cache's
        length was cut back; and a restore brings back the window only.
        """
        sink = spec.sink_n_tokens
        oldest = max(sink, held.peak_n_tokens - _ring(spec))
        if held.restored_n_tokens:
            oldest = max(oldest, held.restored_n_tokens - spec.window_n_tokens + 1)
        return intersect([(0, held.n_tokens)], union([(0, sink), (oldest, held.n_tokens)]))

    def required(self, spec: Slots, n_tokens: int) -> list[Range]:
        """The sink and the window that the next token sees."""
        sink = spec.sink_n_tokens
        oldest = max(sink, n_tokens - spec.window_n_tokens + 1)
        return intersect([(0, n_tokens)], union([(0, sink), (oldest, n_tokens)]))

    def servable(self, spec: Slots, stored: list[Range], limit_n_tokens: int) -> int:
        """The largest length whose window is whole."""
        sink, window = spec.sink_n_tokens, spec.window_n_tokens
        if not subtract(self.required(spec, limit_n_tokens), stored):
            return limit_n_tokens
        if not stored or subtract([(0, min(sink, limit_n_tokens))], stored):
            # Without the whole sink, only a prefix without a gap can serve.
            return Full().servable(spec, stored, limit_n_tokens)
        return max(
            (
                n_tokens
                for start, stop in stored
                if (n_tokens := min(stop, limit_n_tokens)) > start
                and max(sink, n_tokens - window + 1) >= start
            ),
            default=0,
        )

    def is_storable(self, spec: Slots, start: int, stop: int) -> bool:
        """No more than the ring can hold at once, and some of the sink before it."""
        return stop - max(start, spec.sink_n_tokens) <= _ring(spec)

    def runs(self, spec: Slots, start: int, stop: int) -> list[Run]:
        """The sink's run, then up to two of the ring."""
        sink, ring = spec.sink_n_tokens, _ring(spec)
        found: list[Run] = []
        if start < sink:
            found.append(Run(slot=start, n_slots=min(stop, sink) - start))
            start = sink
        while start < stop:
            offset = (start - sink) % ring
            n_slots = min(stop - start, ring - offset)
            found.append(Run(slot=sink + offset, n_slots=n_slots))
            start += n_slots
        return found

    def derived(self, spec: Slots, n_tokens: int) -> list[int] | None:  # noqa: ARG002
        """Nothing follows from the length."""
        return None

    def can_truncate(self, spec: Slots, held: Held, n_tokens: int) -> bool:
        """While the ring still has the window that the shorter cache needs."""
        return not subtract(self.required(spec, n_tokens), self.resident(spec, held))

    def kept(self, spec: Slots) -> str:
        """The sink and the window."""
        last = f"the last {spec.window_n_tokens} tokens"
        return f"the first {spec.sink_n_tokens} and {last}" if spec.sink_n_tokens else last


def _ring(spec: Slots) -> int:
    return spec.capacity_n_tokens - spec.sink_n_tokens
