"""A ``.pte`` file: its header, bounds and parsed program; the segments are never read here.

A file is ``[flatbuffer program with an extended header at byte 8][padding][segments]``.
Everything is checked against the file's size before it is used, because the
runtime itself trusts these numbers (a damaged file can crash it).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kvstore.errors import CorruptProgramError, NotAProgramError
from runtime_adapter.pte.exir import parse_flatbuffer

_IDENTIFIER = re.compile(rb"ET[0-9A-Za-z]{2}")
_HEADER_MAGIC = b"eh00"
_HEADER_MIN_NBYTES = 24
_HEADER_NBYTES = 32
# A flatbuffer's offsets are 32 bits wide; also what bounds our own memory.
_FLATBUFFER_MAX_NBYTES = 2**31 - 1
_READ_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileId:
    """Which file was read: it must not change between two reads of it."""

    device: int
    inode: int
    size_nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, stream: BinaryIO) -> FileId:
        """The identity of an open file."""
        status = os.fstat(stream.fileno())
        return cls(
            device=status.st_dev,
            inode=status.st_ino,
            size_nbytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Where the parts of a ``.pte`` lie, in bytes from the start of the file."""

    program_nbytes: int
    segment_base: int
    segment_nbytes: int
    is_extended: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramFile:
    """A parsed program and where its file's parts lie.

    ``program`` is an ``executorch.exir.schema.Program``; ``segments`` are
    ``(offset, size)`` in bytes from the start of the file, all inside it.
    """

    path: Path
    file_id: FileId
    header: Header
    program: Any
    segments: tuple[tuple[int, int], ...]

    def open(self) -> BinaryIO:
        """Open the file again for reading.

        Raises:
            CorruptProgramError: it changed since it was parsed.
        """
        stream = open_program(self.path)
        if FileId.of(stream) != self.file_id:
            stream.close()
            raise CorruptProgramError(
                f"{self.path}: expected the file to stay as it was, found that it changed while "
                "it was read; try again when its writer has finished"
            )
        return stream

    def read_constant(self, data_buffer: int, nbytes: int) -> bytes | None:
        """The first ``nbytes`` of a constant; None if the file does not hold so many.

        Raises:
            CorruptProgramError: the file changed since it was parsed.
        """
        constants = self.program.constant_segment
        if constants is None or not constants.offsets:
            buffers = self.program.constant_buffer or ()
            storage = buffers[data_buffer].storage if 0 <= data_buffer < len(buffers) else b""
            return bytes(storage[:nbytes]) if len(storage) >= nbytes else None
        if not 0 <= data_buffer < len(constants.offsets):
            return None
        start, size = self.segments[constants.segment_index]
        offset = constants.offsets[data_buffer]
        if offset + nbytes > size:
            return None
        with self.open() as stream:
            stream.seek(start + offset)
            data = stream.read(nbytes)
        return data if len(data) == nbytes else None


def open_program(path: Path, *, suffix: str = ".pte") -> BinaryIO:
    """Open ``path`` for reading; ``suffix`` says in messages what was expected there.

    Raises:
        NotAProgramError: missing, a directory, not a regular file, or not readable.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise NotAProgramError(
                f"{path}: expected a {suffix} file, found a directory; name the file inside it"
            )
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            raise NotAProgramError(
                f"{path}: expected a regular {suffix} file, found a device or pipe; name a file"
            )
        stream = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise NotAProgramError(
            f"{path}: expected a {suffix} file, found: {reason}; check the path"
        ) from error
    return stream


def read_header(stream: BinaryIO, *, path: Path) -> Header:
    """The header of an open ``.pte``, checked against the file's size.

    Raises:
        NotAProgramError: the file does not begin like a program.
        CorruptProgramError: it ends before its header says.
    """
    file_nbytes = os.fstat(stream.fileno()).st_size
    stream.seek(0)
    head = stream.read(8 + _HEADER_NBYTES)
    if len(head) < 8 or not _IDENTIFIER.fullmatch(head[4:8]):
        found = "an empty file" if not head else f"bytes 4 to 8 = {head[4:8]!r}"
        raise NotAProgramError(
            f"{path}: expected an ExecuTorch program (.pte, 'ET12' at byte 4), found {found}; "
            "export the model with executorch first"
        )
    if head[8:12] != _HEADER_MAGIC:
        # Programs without segments (no weights outside the flatbuffer) have no extended header.
        _check_flatbuffer_size(file_nbytes, path=path)
        return Header(
            program_nbytes=file_nbytes, segment_base=0, segment_nbytes=0, is_extended=False
        )
    length = int.from_bytes(head[12:16], "little")
    if len(head) < 8 + _HEADER_NBYTES or length < _HEADER_MIN_NBYTES:
        raise _damaged(path, f"a header of {length} bytes in a file of {file_nbytes} bytes")
    program_nbytes = int.from_bytes(head[16:24], "little")
    segment_base = int.from_bytes(head[24:32], "little")
    segment_nbytes = int.from_bytes(head[32:40], "little") if length >= _HEADER_NBYTES else 0
    _check_flatbuffer_size(program_nbytes, path=path)
    if program_nbytes < 8 + length or program_nbytes > file_nbytes:
        raise _damaged(path, f"a program of {program_nbytes} bytes in a file of {file_nbytes}")
    if segment_base and not program_nbytes <= segment_base <= file_nbytes:
        raise _damaged(path, f"segments from byte {segment_base} on in a file of {file_nbytes}")
    if segment_base + segment_nbytes > file_nbytes:
        raise _damaged(
            path, f"segments up to byte {segment_base + segment_nbytes} in a file of {file_nbytes}"
        )
    return Header(
        program_nbytes=program_nbytes,
        segment_base=segment_base,
        segment_nbytes=segment_nbytes,
        is_extended=True,
    )


def read_program(path: Path) -> ProgramFile:
    """Parse the program of a ``.pte`` and check every place that it points to.

    Reads the flatbuffer part only, never the segments (weights, delegates).

    Raises:
        NotAProgramError: missing, a directory, or not a ``.pte``.
        CorruptProgramError: truncated or damaged.
        RuntimeMissingError: ExecuTorch is not installed.
    """
    with open_program(path) as stream:
        file_id = FileId.of(stream)
        header = read_header(stream, path=path)
        stream.seek(0)
        data = stream.read(header.program_nbytes)
    if len(data) != header.program_nbytes:
        raise _damaged(path, f"{len(data)} of {header.program_nbytes} bytes of program")
    program = parse_flatbuffer(data, source=str(path))
    with whole_tables(path):
        segments = _check_segments(program, header=header, file_id=file_id, path=path)
        _check_references(program, path=path)
    return ProgramFile(
        path=path, file_id=file_id, header=header, program=program, segments=segments
    )


@contextlib.contextmanager
def whole_tables(path: Path) -> Iterator[None]:
    """Say that the program is damaged when a table in it lacks what every program has.

    A flipped bit can leave a flatbuffer that parses, with lists and fields missing;
    walking it then fails in any of these ways.

    Raises:
        CorruptProgramError: the block met such a table.
    """
    try:
        yield
    except (
        AttributeError,
        LookupError,
        OverflowError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise _damaged(path, f"an incomplete table ({error})") from error


def flatbuffer_digest(path: Path) -> bytes:
    """BLAKE2b-256 over the flatbuffer part of a ``.pte``: 32 bytes, without importing exir.

    Raises:
        NotAProgramError: missing, a directory, or not a ``.pte``.
        CorruptProgramError: it ends before its header says.
    """
    digest = hashlib.blake2b(digest_size=32, person=b"kvstore/pte")
    with open_program(path) as stream:
        header = read_header(stream, path=path)
        for piece in read_range(stream, 0, header.program_nbytes, path=path):
            digest.update(piece)
    return digest.digest()


def read_range(stream: BinaryIO, start: int, n_bytes: int, *, path: Path) -> Iterator[memoryview]:
    """Yield ``n_bytes`` from byte ``start`` on in pieces; a piece is valid until the next one.

    Raises:
        CorruptProgramError: the file ends earlier.
    """
    piece = memoryview(bytearray(min(_READ_NBYTES, max(n_bytes, 1))))
    stream.seek(start)
    left = n_bytes
    while left:
        # Opened buffered, so readinto fills the whole piece except at the end of the file.
        got = stream.readinto(piece[: min(len(piece), left)])  # type: ignore[attr-defined]  # BinaryIO lacks it
        if not got:
            raise _damaged(path, f"an end {left} bytes early")
        yield piece[:got]
        left -= got


def _damaged(path: Path, found: str) -> CorruptProgramError:
    return CorruptProgramError(
        f"{path}: expected a whole ExecuTorch program, found {found}; "
        "the file is truncated or damaged: copy or export it again"
    )


def _check_flatbuffer_size(n_bytes: int, *, path: Path) -> None:
    if n_bytes > _FLATBUFFER_MAX_NBYTES:
        raise _damaged(path, f"a program part of {n_bytes} bytes (at most 2 GiB is possible)")


def _check_segments(
    program: Any, *, header: Header, file_id: FileId, path: Path
) -> tuple[tuple[int, int], ...]:
    segments = []
    for index, segment in enumerate(program.segments or ()):
        start = header.segment_base + segment.offset
        if not header.segment_base or start + segment.size > file_id.size_nbytes:
            raise _damaged(
                path,
                f"segment {index} at bytes {start} to {start + segment.size} "
                f"in a file of {file_id.size_nbytes}",
            )
        segments.append((start, segment.size))
    return tuple(segments)


def _check_references(program: Any, *, path: Path) -> None:
    """Refuse indices of segments, buffers and delegates that point nowhere."""
    sizes = [segment.size for segment in program.segments or ()]
    if not program.execution_plan:
        raise _damaged(path, "a program without methods")

    def check(what: str, index: int, count: int) -> None:
        if not 0 <= index < count:
            raise _damaged(path, f"{what} {index} of {count}")

    for named in program.named_data or ():
        check(f"named data {named.key!r} in segment", named.segment_index, len(sizes))
    subsegments = list(program.mutable_data_segments or ())
    constants = program.constant_segment
    if constants is not None and constants.offsets:
        subsegments.append(constants)
    for part in subsegments:
        check("tensor data in segment", part.segment_index, len(sizes))
        for offset in part.offsets:
            check("tensor data at byte", offset, sizes[part.segment_index] + 1)
    for plan in program.execution_plan:
        for delegate in plan.delegates or ():
            where = delegate.processed
            count = len(sizes) if where.location == 1 else len(program.backend_delegate_data or ())
            check(f"data of delegate {delegate.id!r} in segment", where.index, count)
