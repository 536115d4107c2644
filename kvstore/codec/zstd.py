"""One Zstandard frame (RFC 8878)."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import zstandard

from kvstore.errors import DecodeError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]

_MAX_WINDOW_NBYTES = 1 << 27
"""A frame that asks for a larger window is refused: its memory would not be bounded."""

_MAGIC = b"\x28\xb5\x2f\xfd"
_RLE_BLOCK = 1

_MIN_PIECE_NBYTES, _MAX_N_PIECES = 128, 8
"""What is looked at when a run is cut into blocks."""

_BLOCK_NBYTES, _SYMBOL_NBYTES = 30, 0.6
"""About what a block costs by itself, and for each byte that occurs in it (measured)."""

_per_thread = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's decompressor: making one takes as long as decoding 50 KiB."""
    if not hasattr(_per_thread, "decompressor"):
        _per_thread.decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_NBYTES)
    decompressor: zstandard.ZstdDecompressor = _per_thread.decompressor
    return decompressor


def _compressor(one: Zstd) -> zstandard.ZstdCompressor:
    """This thread's compressor of that kind."""
    made: dict[Zstd, zstandard.ZstdCompressor] = _per_thread.__dict__.setdefault("compressors", {})
    if one not in made:
        made[one] = (
            zstandard.ZstdCompressor(
                compression_params=_without_chance(with_long_matches=one.long_matches_only)
            )
            if one.long_matches_only or one.entropy_only
            else zstandard.ZstdCompressor(level=1, write_content_size=True)
        )
    return made[one]


def _without_chance(*, with_long_matches: bool) -> zstandard.ZstdCompressionParameters:
    """Matches of 16 bytes or more from anywhere, or none; what is left is entropy.

    The finder of short matches cannot be turned off; with so small a table it finds none by chance.
    """
    long_matches = (
        {
            "enable_ldm": True,
            "ldm_min_match": 16,
            "ldm_hash_log": 13,
            "ldm_bucket_size_log": 2,
            "ldm_hash_rate_log": 0,
        }
        if with_long_matches
        else {"enable_ldm": False}
    )
    return zstandard.ZstdCompressionParameters(
        write_content_size=True,
        strategy=zstandard.STRATEGY_FAST,
        window_log=17,
        hash_log=6,
        min_match=7,
        target_length=0,
        **long_matches,
    )


@dataclass(frozen=True, slots=True)
class Zstd:
    """Tag 1: a single frame with its content size in the header, nothing behind it.

    Level 1: K and V in floating point hardly compress, and higher levels take several times as
    long for the last percent. ``long_matches_only`` is for bytes of few values in no order, such
    as exponents: short matches between them are chance, and cost more than they save.
    ``entropy_only`` does not look for the long ones either, which takes most of the time.
    """

    tag: ClassVar[int] = 1
    name: ClassVar[str] = "zstd"

    long_matches_only: bool = False
    entropy_only: bool = False

    def encode(self, data: memoryview) -> memoryview:
        """One frame over ``data``."""
        return memoryview(_compressor(self).compress(data))

    def encode_runs(self, data: memoryview, runs: Iterable[int]) -> memoryview:
        """One frame over ``data``, with Huffman codes of their own for runs of so many bytes.

        And within a run, wherever that pays: a frame's blocks have a code each.
        """
        frame = _compressor(self).compressobj(size=data.nbytes)
        parts = []
        for nbytes in filter(None, runs):
            for block in _alike(data[:nbytes]):
                parts += [frame.compress(block), frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
            data = data[nbytes:]
        return memoryview(b"".join([*parts, frame.compress(data), frame.flush()]))

    def decode_into(self, stored: memoryview, destination: memoryview) -> None:
        """Decompress straight into ``destination``."""
        try:
            _check_header(stored, destination.nbytes)
            # The decompressor passes over skippable and empty frames without a word, so reading on
            # behind the frame does not show whether there is more.
            if (frame_nbytes := _frame_nbytes(stored)) != stored.nbytes:
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

    def decode(self, stored: memoryview, nbytes: int) -> bytes:
        """What ``stored`` decompresses to, in memory of its own.

        One call where ``decode_into`` takes several, each of which lets other threads run and has
        to wait for its turn to go on.

        Raises:
            DecodeError: that is not one frame of ``nbytes`` bytes.
        """
        try:
            _check_header(stored, nbytes)
            decoded = _decompressor().decompress(stored, nbytes, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise DecodeError(f"zstd blob does not decode: {error}") from error
        if len(decoded) != nbytes:
            raise DecodeError(f"zstd blob: expected {nbytes} bytes, found {len(decoded)}")
        return decoded


def _alike(data: memoryview) -> Iterator[memoryview]:
    """``data`` in pieces whose Huffman codes, tables and all, are about the shortest together."""
    import numpy as np

    size = max(_MIN_PIECE_NBYTES, -(-data.nbytes // _MAX_N_PIECES))
    n_pieces = -(-data.nbytes // size)
    places = np.arange(data.nbytes) // size << 8 | np.frombuffer(data, np.uint8)
    counts = np.bincount(places, minlength=n_pieces << 8).reshape(n_pieces, 256)
    first = 0
    for last in _cuts(counts):
        yield data[first * size : last * size]
        first = last


def _cuts(counts: Array) -> list[int]:
    """Where to cut pieces of so many of each byte, ``[n_pieces, 256]``; the end is the last one."""
    total = counts.cumsum(axis=0)
    apart = _code_nbytes(total[:-1]) + _code_nbytes(total[-1] - total[:-1])
    if not apart.size or apart.min() >= _code_nbytes(total[-1]):
        return [len(counts)]
    cut = int(apart.argmin()) + 1
    return [*_cuts(counts[:cut]), *(cut + other for other in _cuts(counts[cut:]))]


def _code_nbytes(counts: Array) -> Array:
    """About how long bytes that occur so often get, ``[..., 256]``, with their table."""
    import numpy as np

    n = counts.sum(axis=-1)
    bits = n * np.log2(np.maximum(n, 1)) - (counts * np.log2(np.maximum(counts, 1))).sum(axis=-1)
    table_nbytes = _BLOCK_NBYTES + _SYMBOL_NBYTES * np.count_nonzero(counts, axis=-1)
    found: Array = bits / 8 + table_nbytes
    return found


def _check_header(stored: memoryview, nbytes: int) -> None:
    """Whether a frame says that it holds ``nbytes`` bytes, and decodes in bounded memory.

    The decompressor would trust its header over any limit that it is given.

    Raises:
        DecodeError: it does not say so.
        zstandard.ZstdError: it has no header.
    """
    frame = zstandard.get_frame_parameters(stored)
    if frame.content_size != nbytes:
        raise DecodeError(
            f"zstd blob: expected a frame of {nbytes} bytes, its header says {frame.content_size}"
        )
    # The decompressor's own limit does not hold where it decodes in one go.
    if frame.window_size > _MAX_WINDOW_NBYTES:
        raise DecodeError(
            f"zstd blob does not decode: expected a window of at most "
            f"{_MAX_WINDOW_NBYTES} bytes, found {frame.window_size}"
        )


def _frame_nbytes(stored: memoryview) -> int:
    """Where the first frame ends, by its block headers; 0 if it is a skippable frame."""
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
    return position + (4 if zstandard.get_frame_parameters(stored).has_checksum else 0)
