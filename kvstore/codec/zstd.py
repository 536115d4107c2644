"""One Zstandard frame (RFC 8878)."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import ClassVar

import zstandard

from kvstore.errors import DecodeError

_MAX_WINDOW_NBYTES = 1 << 27
"""A frame that asks for a larger window is refused: its memory would not be bounded."""

_MAGIC = b"\x28\xb5\x2f\xfd"
_RLE_BLOCK = 1

_per_thread = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's decompressor: making one takes as long as decoding 50 KiB."""
    if not hasattr(_per_thread, "decompressor"):
        _per_thread.decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_NBYTES)
    decompressor: zstandard.ZstdDecompressor = _per_thread.decompressor
    return decompressor


def _compressor(level: int) -> zstandard.ZstdCompressor:
    """This thread's compressor of that level."""
    made: dict[int, zstandard.ZstdCompressor] = _per_thread.__dict__.setdefault("compressors", {})
    if level not in made:
        made[level] = zstandard.ZstdCompressor(level=level, write_content_size=True)
    return made[level]


@dataclass(frozen=True, slots=True)
class Zstd:
    """Tag 1: a single frame with its content size in the header, nothing behind it.

    Level 1: K and V in floating point hardly compress, and higher levels take
    several times as long for the last percent.
    """

    tag: ClassVar[int] = 1
    name: ClassVar[str] = "zstd"

    level: int = 1

    def encode(self, data: memoryview) -> memoryview:
        """One frame over ``data``."""
        return memoryview(_compressor(self.level).compress(data))

    def decode_into(self, stored: memoryview, destination: memoryview) -> None:
        """Decompress straight into ``destination``."""
        try:
            # The header is checked first: the decompressor would trust its size
            # over any limit that it is given.
            frame = zstandard.get_frame_parameters(stored)
            if frame.content_size != destination.nbytes:
                raise DecodeError(
                    f"zstd blob: expected a frame of {destination.nbytes} bytes, "
                    f"its header says {frame.content_size}"
                )
            # The decompressor's own limit does not hold where it decodes in one go.
            if frame.window_size > _MAX_WINDOW_NBYTES:
                raise DecodeError(
                    f"zstd blob does not decode: expected a window of at most "
                    f"{_MAX_WINDOW_NBYTES} bytes, found {frame.window_size}"
                )
            if (frame_nbytes := _frame_nbytes(stored, frame)) != stored.nbytes:
                raise DecodeError(
                    f"zstd blob: expected a single frame of {stored.nbytes} bytes, "
                    f"found one of {frame_nbytes}"
                )
            with _decompressor().stream_reader(stored, read_across_frames=True) as reader:
                filled_nbytes = 0
                while filled_nbytes < destination.nbytes:
                    count = reader.readinto(destination[filled_nbytes:])
                    if count == 0:
                        break
                    filled_nbytes += count
                left_over = reader.read(1)
        except zstandard.ZstdError as error:
            raise DecodeError(f"zstd blob does not decode: {error}") from error
        if filled_nbytes != destination.nbytes or left_over:
            raise DecodeError(
                f"zstd blob: expected exactly {destination.nbytes} bytes, found "
                f"{'more' if left_over else filled_nbytes}"
            )


def _frame_nbytes(stored: memoryview, frame: zstandard.FrameParameters) -> int:
    """Where the first frame ends, by its block headers; 0 if it is a skippable frame.

    The decompressor passes over skippable and empty frames without a word, so
    reading on behind the frame does not show whether there is more.
    """
    if bytes(stored[:4]) != _MAGIC:
        return 0
    position = zstandard.frame_header_size(stored)
    is_last = False
    while not is_last:
        header = int.from_bytes(stored[position : position + 3], "little")
        if position + 3 > stored.nbytes:
            break  # cut short: the decompressor says so
        is_last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        position += 3 + (1 if kind == _RLE_BLOCK else size)
    return position + (4 if frame.has_checksum else 0)
