"""What a codec promises."""

from __future__ import annotations

from typing import ClassVar, Protocol


class Codec(Protocol):
    """A lossless mapping between a blob's bytes and its stored bytes.

    Called from worker threads: an instance holds no mutable state.
    """

    tag: ClassVar[int]
    """The number in the ``codec`` column."""

    name: ClassVar[str]
    """What people call it."""

    def encode(self, data: memoryview) -> memoryview:
        """The stored form of ``data``."""
        ...

    def decode_into(self, stored: memoryview, destination: memoryview) -> None:
        """Fill ``destination`` exactly; never allocate by a number found in ``stored``.

        Raises:
            DecodeError: the bytes decode to anything but ``destination.nbytes`` bytes.
        """
        ...
