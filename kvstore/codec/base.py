"""What a codec promises: an exact one maps bytes to bytes, a lossy one numbers to codes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

from kvstore.codec.block import Block
from kvstore.errors import DecodeError


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


_HEAD = struct.Struct("<BHI")


@dataclass(frozen=True, slots=True)
class Head:
    """What stands before the codes.

    Which variant they are of, how many numbers share a scale, how many tokens at the start
    are stored as they are, and whatever else one quantizer needs to know.
    """

    variant: int
    group_size: int = 0
    n_exact_tokens: int = 0
    more: bytes = b""

    NBYTES: ClassVar[int] = _HEAD.size
    """Without ``more``."""

    def to_bytes(self) -> bytes:
        """``u8`` variant, ``u16`` group size, ``u32`` number of exact tokens, and ``more``."""
        return _HEAD.pack(self.variant, self.group_size, self.n_exact_tokens) + self.more

    @classmethod
    def from_bytes(cls, data: memoryview, more_nbytes: int = 0) -> Self:
        """The head at the start of ``data``, of which so many bytes are one quantizer's own.

        Raises:
            DecodeError: it is cut off.
        """
        nbytes = _HEAD.size + more_nbytes
        if data.nbytes < nbytes:
            raise DecodeError(f"codes: expected a head of {nbytes} bytes, found {data.nbytes}")
        variant, group_size, n_exact_tokens = _HEAD.unpack(data[: _HEAD.size])
        return cls(variant, group_size, n_exact_tokens, bytes(data[_HEAD.size : nbytes]))


@dataclass(frozen=True, slots=True)
class Codes:
    """A block's codes behind their head; ``runs`` are lengths of what is alike, if that matters."""

    head: Head
    body: memoryview
    runs: tuple[int, ...] = ()


class Quantizer(Protocol):
    """A lossy mapping between a block's numbers and *codes*, which an exact codec then stores.

    The codes say all that decides the numbers, so they are what the checksum covers: a second
    reader need not share a library's rounding. Called from worker threads, as a ``Codec`` is.
    """

    tag: ClassVar[int]
    """The number in the ``codec`` column."""

    name: ClassVar[str]
    """What people call it."""

    more_nbytes: ClassVar[int]
    """Bytes of its own in a head."""

    def encode(self, numbers: memoryview, block: Block) -> Codes | None:
        """The codes of ``numbers``, or None if they cannot be held.

        That is: not finite, beyond the range of what they become, or of a shape that does not fit.
        """
        ...

    def codes_nbytes(self, head: Head, block: Block) -> int:
        """How long the codes behind ``head`` are.

        Raises:
            DecodeError: there are no such codes of that block.
        """
        ...

    def decode_into(self, codes: Codes, block: Block, destination: memoryview) -> None:
        """Fill ``destination`` with the numbers that the codes stand for."""
        ...
