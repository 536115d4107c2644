"""The checksum of a blob: XXH3-128 over what the blob is and what it decodes to."""

from __future__ import annotations

import struct

import xxhash

from kvstore.prefix import Key

CHECKSUM_NBYTES = 16


def blob_checksum(key: Key, tensor: int, start: int, stop: int, decoded: memoryview) -> bytes:
    """16 bytes, big-endian (XXH3's canonical form).

    Hashed: the chunk's 32-byte key, ``u32 tensor``, ``u64 start``, ``u64 stop``
    (little-endian), then the decoded bytes. The identity makes a row that was
    swapped with another one fail like a flipped bit. It catches accidents; it
    does not authenticate.
    """
    hasher = xxhash.xxh3_128(key + struct.pack("<IQQ", tensor, start, stop))
    hasher.update(decoded)
    return hasher.digest()
