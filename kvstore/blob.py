"""One blob: positions of one tensor, encoded with a checksum, decoded and checked."""

from __future__ import annotations

import sqlalchemy as sa

from kvstore import codec
from kvstore.checksum import blob_checksum
from kvstore.codec import Basis, BasisLookup, Raw, block_of, scratch
from kvstore.db.basis_cache import SpaceBases
from kvstore.db.blobs import BlobRow, NewBlob
from kvstore.db.engine import driver_connection
from kvstore.db.payloads import DriverReader, PayloadReader
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
    basis: Basis | None = None,
) -> NewBlob:
    """The blob of ``[start, stop)`` of a tensor in chunk ``key``, ready to be inserted.

    ``decoded`` are the positions' bytes, token-major. Stored raw where the codec gains nothing,
    exactly where it needs a ``basis`` and there is none.
    """
    block = block_of(spec, start, stop)
    encoded = codec.encode(decoded, block, codec_name, spec.role, basis)
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


def read_blob(  # noqa: PLR0917  # all that decides what the bytes are
    reader: PayloadReader,
    row: BlobRow,
    key: Key,
    spec: TensorSpec,
    destination: memoryview,
    bases: BasisLookup,
) -> None:
    """Fill ``destination`` with what a blob decodes to, and check it.

    ``key`` is that of the chunk that owns the row, ``spec`` the tensor's; ``bases`` finds the one
    that the blob names, if it names any. What is stored as it is is read to where it belongs.

    Raises:
        CorruptStoreError: it is missing, or does not decode to as many bytes, or to others than
            were stored.
        sqlite3.Error: it cannot be read.
    """
    checked: tuple[memoryview, ...]
    if row.codec == Raw.tag:
        reader.read_into(row.payload_id, destination)
        checked = (destination,)
    else:
        stored = scratch("stored", row.stored_nbytes)
        reader.read_into(row.payload_id, stored)
        if row.codec in codec.QUANTIZERS:
            block = block_of(spec, row.start, row.stop)
            checked = codec.decode_into(row.codec, stored, block, destination, bases)
        else:
            codec.decode_exact_into(row.codec, stored, destination)
            checked = (destination,)
    if blob_checksum(key, row.tensor, row.start, row.stop, checked) != row.checksum:
        raise CorruptStoreError("the checksum does not match what is stored")


def check_blob(
    connection: sa.Connection, row: BlobRow, key: Key, spec: TensorSpec, bases: SpaceBases
) -> None:
    """Read and decode a blob for its checksum's sake.

    Raises:
        CorruptStoreError: it is missing or damaged.
    """
    driver = driver_connection(connection)
    lookup = bases.lookup(driver, row.tensor, spec)
    decoded = memoryview(bytearray(row.raw_nbytes))
    read_blob(DriverReader(driver), row, key, spec, decoded, lookup)
