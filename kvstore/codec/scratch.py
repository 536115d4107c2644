"""Memory that a worker thread decodes into, used again for blob after blob."""

from __future__ import annotations

import threading

_per_thread = threading.local()


def scratch(use: str, nbytes: int) -> memoryview:
    """This thread's memory for one use; grows to what the largest blob needs.

    Its content is good until the same thread asks for the same use again.
    """
    held: dict[str, bytearray] = _per_thread.__dict__.setdefault("held", {})
    if use not in held or len(held[use]) < nbytes:
        held[use] = bytearray(nbytes)
    return memoryview(held[use])[:nbytes]
