"""A ``.ptd`` data file: its named tensors, bounds, and the digest of their content.

The format (``extension/flat_tensor``) is a flatbuffer ``FlatTensor`` with a header
``FH01`` at byte 8 and segments behind it. The few fields that we need are read
here with every offset checked, so that no exporter import is needed.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvstore.errors import CorruptProgramError, NotAProgramError, ProgramDataError
from runtime_adapter.pte.file import open_program, read_range

_IDENTIFIER = b"FT01"
_HEADER_MAGIC = b"FH01"
_HEADER_NBYTES = 40
_MAX_FLATBUFFER_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """The parts of a ``.ptd``.

    ``entries`` maps a key to ``(tensor layout, offset, size)``: the layout as text
    (dtype code, sizes, dim order; empty if the file has none), offset and size in
    bytes from the start of the file, inside it.
    """

    path: Path
    entries: dict[str, tuple[str, int, int]]


def read_data_file(path: Path) -> DataFile:
    """Parse the table of a ``.ptd`` and check that everything it names lies in the file.

    Raises:
        ProgramDataError: missing, not a ``.ptd``, truncated or damaged.
    """
    with _open(path) as stream:
        file_nbytes = os.fstat(stream.fileno()).st_size
        head = stream.read(8 + _HEADER_NBYTES)
        if len(head) < 8 + _HEADER_NBYTES or head[4:8] != _IDENTIFIER:
            raise ProgramDataError(
                f"{path}: expected a .ptd data file ('FT01' at byte 4), found another kind of "
                "file; pass the .ptd that was exported with the program"
            )
        if head[8:12] != _HEADER_MAGIC:
            raise _damaged(path, "no header 'FH01' at byte 8")
        table_start, table_nbytes, base, _ = struct.unpack_from("<4Q", head, 16)
        if table_nbytes > _MAX_FLATBUFFER_NBYTES or table_start + table_nbytes > file_nbytes:
            raise _damaged(path, f"a table of {table_nbytes} bytes in a file of {file_nbytes}")
        # The root's offset counts from the start of the file, header included.
        stream.seek(0)
        table = stream.read(table_start + table_nbytes)
    try:
        entries = _read_entries(table, base)
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
        raise _damaged(path, f"a table that cannot be read ({error})") from error
    for key, (_, offset, size) in entries.items():
        if offset + size > file_nbytes:
            raise _damaged(path, f"{key!r} up to byte {offset + size} in a file of {file_nbytes}")
    return DataFile(path=path, entries=entries)


def data_digest(path: Path) -> bytes:
    """BLAKE2b-256 over a ``.ptd``'s keys, layouts and content, in key order: 32 bytes.

    How the file packs its segments makes no difference.

    Raises:
        ProgramDataError: missing, not a ``.ptd``, truncated or damaged.
    """
    data = read_data_file(path)
    digest = hashlib.blake2b(digest_size=32, person=b"kvstore/ptd")
    with _open(path) as stream:
        for key, (layout, offset, size) in sorted(data.entries.items()):
            for text in (key.encode(), layout.encode()):
                digest.update(len(text).to_bytes(8, "little") + text)
            digest.update(size.to_bytes(8, "little"))
            try:
                for piece in read_range(stream, offset, size, path=path):
                    digest.update(piece)
            except CorruptProgramError as error:
                raise _damaged(path, f"an early end in {key!r}") from error
    return digest.digest()


def _open(path: Path) -> BinaryIO:
    try:
        return open_program(path, suffix=".ptd")
    except NotAProgramError as error:
        raise ProgramDataError(str(error)) from error


def _damaged(path: Path, found: str) -> ProgramDataError:
    return ProgramDataError(
        f"{path}: expected a whole .ptd data file, found {found}; copy or export it again"
    )


def _read_entries(table: bytes, base: int) -> dict[str, tuple[str, int, int]]:
    root = _u32(table, 0)
    segments = [
        (base + _number(table, item, 0, "<Q"), _number(table, item, 1, "<Q"))
        for item in _tables(table, root, 1)
    ]
    entries = {}
    for item in _tables(table, root, 2):
        key = _vector(table, item, 0, 1).decode("utf-8")
        segment = _number(table, item, 1, "<I")
        if not key or key in entries:
            raise ValueError(f"key {key!r} is empty or there twice")
        offset, size = segments[segment]
        layout = _field(table, item, 2)
        text = ""
        if layout is not None:
            inner = layout + _u32(table, layout)
            dtype = _number(table, inner, 0, "<b")
            sizes = struct.unpack(f"<{_count(table, inner, 1)}i", _vector(table, inner, 1, 4))
            text = f"{dtype} {list(sizes)} {list(_vector(table, inner, 2, 1))}"
        entries[key] = (text, offset, size)
    return entries


# --------------------------------------------- the few flatbuffer accesses that are needed


def _u32(table: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", table, at)[0])


def _field(table: bytes, item: int, index: int) -> int | None:
    """Place of field ``index`` of the table at ``item``, or None if it has its default."""
    vtable = item - int(struct.unpack_from("<i", table, item)[0])
    if vtable < 0:
        raise ValueError("a table points before the file")
    (vtable_nbytes,) = struct.unpack_from("<H", table, vtable)
    slot = 4 + 2 * index
    if slot + 2 > vtable_nbytes:
        return None
    (offset,) = struct.unpack_from("<H", table, vtable + slot)
    return item + offset if offset else None


def _number(table: bytes, item: int, index: int, form: str) -> int:
    at = _field(table, item, index)
    return 0 if at is None else int(struct.unpack_from(form, table, at)[0])


def _count(table: bytes, item: int, index: int) -> int:
    at = _field(table, item, index)
    return 0 if at is None else _u32(table, at + _u32(table, at))


def _vector(table: bytes, item: int, index: int, itemsize: int) -> bytes:
    at = _field(table, item, index)
    if at is None:
        return b""
    start = at + _u32(table, at)
    nbytes = _u32(table, start) * itemsize
    if start + 4 + nbytes > len(table):
        raise ValueError("a list is longer than the file")
    return table[start + 4 : start + 4 + nbytes]


def _tables(table: bytes, item: int, index: int) -> list[int]:
    at = _field(table, item, index)
    if at is None:
        return []
    start = at + _u32(table, at)
    count = _u32(table, start)
    if start + 4 + 4 * count > len(table):
        raise ValueError("a list is longer than the file")
    places = range(start + 4, start + 4 + 4 * count, 4)
    return [place + _u32(table, place) for place in places]
