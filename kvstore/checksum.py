"""The checksum of a blob: XXH3-128 over what the blob is and what it holds."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import xxhash

from kvstore.prefix import Key

CHECKSUM_NBYTES = 16

_IDENTITY = struct.Struct("<IQQ")


def blob_checksum(
    key: Key, tensor: int, start: int, stop: int, parts: Iterable[memoryview]
) -> bytes:
    """16 bytes, big-endian (XXH3's canonical form).

    Hashed: the chunk's 32-byte key, ``u32 tensor``, ``u64 start``, ``u64 stop``
    (little-endian), then the decoded bytes, or the head and the codes of a lossy codec, given in
    ``parts``. The identity makes a row that was
    swapped with another one fail like a flipped bit. It catches accidents; it
    does not authenticate.
    """
    hasher = xxhash.xxh3_128(key + _IDENTITY.pack(tensor, start, stop))
    for part in parts:
        hasher.update(part)
    return hasher.digest()
