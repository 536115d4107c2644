"""The bytes as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvstore.errors import DecodeError


@dataclass(frozen=True, slots=True)
class Raw:
    """Tag 0: stored bytes are the decoded bytes."""

    tag: ClassVar[int] = 0
    name: ClassVar[str] = "raw"

    def encode(self, data: memoryview) -> memoryview:
        """``data`` itself."""
        return data

    def decode_into(self, stored: memoryview, destination: memoryview) -> None:
        """Copy ``stored``."""
        if stored.nbytes != destination.nbytes:
            raise DecodeError(
                f"raw blob: expected {destination.nbytes} bytes, found {stored.nbytes}"
            )
        import numpy as np

        # Unlike a memoryview's own copy, it lets other threads run meanwhile.
        np.copyto(np.frombuffer(destination, np.uint8), np.frombuffer(stored, np.uint8))
