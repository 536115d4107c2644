"""Keys of token prefixes: every chunk's key hashes its parent's key and its token ids.

The same tokens under the same model give the same keys in every process and on
every machine. ``schemas/FORMAT.md`` ("Keys") specifies the bytes; the vectors
in ``schemas/vectors`` pin them.
"""

from __future__ import annotations

import hashlib
import struct
from typing import NewType

from kvstore.lineage import Lineage, pack_extras
from kvstore.tokens import TokenIds, to_little_endian

Key = NewType("Key", bytes)
"""A BLAKE2b-256 digest: 32 bytes."""

KEY_NBYTES = 32
KEY_VERSION = 1
DEFAULT_CHUNK_N_TOKENS = 256

_ROOT_PERSON = b"kvstore/root"
_CHUNK_PERSON = b"kvstore/chunk"


def root_key(
    model: bytes, *, chunk_n_tokens: int, namespace: str = "", adapter: bytes = b""
) -> Key:
    """The key that all chains of one key space start from.

    ``model`` is the fingerprint's 32 bytes, ``adapter`` the digest of a LoRA
    adapter or empty. Hashed: ``u32 KEY_VERSION``, ``model``,
    ``u32 chunk_n_tokens``, then ``namespace`` (UTF-8) and ``adapter``, each
    behind its length as ``u32``. Integers are little-endian.
    """
    hasher = hashlib.blake2b(digest_size=KEY_NBYTES, person=_ROOT_PERSON)
    hasher.update(struct.pack("<I", KEY_VERSION))
    hasher.update(model)
    hasher.update(struct.pack("<I", chunk_n_tokens))
    for field in (namespace.encode("utf-8"), adapter):
        hasher.update(struct.pack("<I", len(field)))
        hasher.update(field)
    return Key(hasher.digest())


def chunk_key(parent: Key, ids: TokenIds, *, extras: bytes = b"") -> Key:
    """The key of the chunk that holds ``ids`` directly behind ``parent``.

    ``extras`` is the encoding of whatever else decides the chunk's content
    (``kvstore.lineage``); empty for plain tokens. Hashed:
    ``parent``, ``u32`` number of ids, the ids as ``u64``, ``u32`` length of
    ``extras``, ``extras``. Integers are little-endian.
    """
    hasher = hashlib.blake2b(digest_size=KEY_NBYTES, person=_CHUNK_PERSON)
    hasher.update(parent)
    hasher.update(struct.pack("<I", len(ids)))
    hasher.update(to_little_endian(ids))
    hasher.update(struct.pack("<I", len(extras)))
    hasher.update(extras)
    return Key(hasher.digest())


def full_chunk_keys(
    root: Key, ids: TokenIds, lineage: Lineage = (), *, chunk_n_tokens: int
) -> list[Key]:
    """The keys of all full chunks of ``ids``, first chunk first (a tail has none here)."""
    keys: list[Key] = []
    parent = root
    for start in range(0, len(ids) - chunk_n_tokens + 1, chunk_n_tokens):
        stop = start + chunk_n_tokens
        extras = pack_extras(lineage, start, stop)
        parent = chunk_key(parent, ids[start:stop], extras=extras)
        keys.append(parent)
    return keys
