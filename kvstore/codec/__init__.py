"""Codecs: how a blob's token-major bytes are written down, by a tag stored beside each blob.

One module a codec. A new one gets the next free tag here and a section in
``schemas/FORMAT.md``; tags are never reused.
"""

from kvstore.codec.base import Codec
from kvstore.codec.planes import ITEMSIZES_NBYTES, Planes
from kvstore.codec.raw import Raw
from kvstore.codec.zstd import Zstd
from kvstore.errors import DecodeError

CODECS: dict[int, Codec] = {codec.tag: codec for codec in (Raw(), Zstd(), Planes())}
"""Every codec that this version can read, by tag."""


EXACT, RAW = "exact", "raw"
NAMES = (EXACT, RAW)
"""What a store can be told to write with."""


def codec_for(name: str, *, itemsize_nbytes: int) -> Codec:
    """The codec that ``name`` stands for, for numbers of so many bytes."""
    if name == RAW:
        return Raw()
    return Planes(itemsize_nbytes) if itemsize_nbytes in ITEMSIZES_NBYTES else Zstd()


def encode(data: memoryview, codec: Codec) -> tuple[int, memoryview]:
    """``data`` as ``(tag, stored bytes)``: by ``codec``, or raw where that gains nothing.

    Less than one part in ten saved counts as nothing: decompressing takes
    several times as long as reading the bytes that it saves.
    """
    stored = codec.encode(data)
    if stored.nbytes > data.nbytes - data.nbytes // 10:
        return Raw.tag, data
    return codec.tag, stored


def decode_into(tag: int, stored: memoryview, destination: memoryview) -> None:
    """Fill ``destination`` exactly with what ``stored`` decodes to.

    Raises:
        DecodeError: unknown tag, or the bytes do not decode to exactly
            ``destination.nbytes`` bytes.
    """
    codec = CODECS.get(tag)
    if codec is None:
        raise DecodeError(f"unknown codec tag {tag}; known are {sorted(CODECS)}")
    codec.decode_into(stored, destination)


__all__ = [
    "CODECS",
    "EXACT",
    "NAMES",
    "RAW",
    "Codec",
    "Planes",
    "Raw",
    "Zstd",
    "codec_for",
    "decode_into",
    "encode",
]
