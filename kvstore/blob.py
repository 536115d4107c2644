"""One blob: positions of one tensor, encoded with a checksum, decoded and checked."""

from __future__ import annotations

import sqlalchemy as sa

from kvstore import codec
from kvstore.checksum import blob_checksum
from kvstore.codec import block_of
from kvstore.db import blobs
from kvstore.db.blobs import BlobRow, NewBlob
from kvstore.db.engine import driver_connection
from kvstore.errors import CorruptStoreError
from kvstore.layout import TensorSpec
from kvstore.prefix import Key


def encode_blob(
    key: Key,
    tensor: int,
    spec: TensorSpec,
    start: int,
    stop: int,
    *,
    decoded: memoryview,
    codec_name: str,
) -> NewBlob:
    """The blob of ``[start, stop)`` of a tensor in chunk ``key``, ready to be inserted.

    ``decoded`` are the positions' bytes, token-major. Stored raw where the codec gains nothing.
    """
    encoded = codec.encode(decoded, block_of(spec, start, stop), codec_name, spec.role)
    return NewBlob(
        tensor=tensor,
        start=start,
        stop=stop,
        codec=encoded.tag,
        raw_nbytes=decoded.nbytes,
        checksum=blob_checksum(key, tensor, start, stop, encoded.checked),
        stored=encoded.stored,
        is_fallback=encoded.is_fallback,
    )


def decode_blob(
    row: BlobRow, key: Key, spec: TensorSpec, stored: bytes, destination: memoryview
) -> None:
    """Fill ``destination`` with what ``stored`` decodes to, and check it.

    ``key`` is that of the chunk that owns the row, ``spec`` the tensor's.

    Raises:
        CorruptStoreError: it does not decode to as many bytes, or to others than were stored.
    """
    block = block_of(spec, row.start, row.stop)
    checked = codec.decode_into(row.codec, memoryview(stored), block, destination)
    if blob_checksum(key, row.tensor, row.start, row.stop, checked) != row.checksum:
        raise CorruptStoreError("the checksum does not match what is stored")


def check_blob(connection: sa.Connection, row: BlobRow, key: Key, spec: TensorSpec) -> None:
    """Read and decode a blob for its checksum's sake.

    Raises:
        CorruptStoreError: it is missing or damaged.
    """
    stored = blobs.read_payload(driver_connection(connection), row)
    decode_blob(row, key, spec, stored, memoryview(bytearray(row.raw_nbytes)))
