"""Codecs: how a blob's token-major bytes are written down, by a tag stored beside each blob.

An *exact* codec maps bytes to bytes. A *quantizer* maps numbers to codes, and an exact codec writes
those: a chain of two. One module each. A new one gets the next free tag here and a section in
``schemas/FORMAT.md``; tags are never reused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from kvstore.codec.base import Codec, Codes, Head, Quantizer
from kvstore.codec.basis import Basis
from kvstore.codec.block import Block, block_of, may_lose
from kvstore.codec.choice import EXACT, LOSSY, NAMES, NEED_BASIS, RAW, CodecChoice, lossy_text
from kvstore.codec.half import Half
from kvstore.codec.int4 import Int4
from kvstore.codec.int8 import Int8
from kvstore.codec.integers import BY_CHANNEL, BY_TOKEN
from kvstore.codec.kernels import Expansion, Grid, Kernels, NumpyKernels, kernels, use_kernels
from kvstore.codec.pca import Pca, digest_in
from kvstore.codec.planes import ITEMSIZES_NBYTES, Planes
from kvstore.codec.raw import Raw
from kvstore.codec.rotation import Rotation
from kvstore.codec.scratch import scratch
from kvstore.codec.zstd import Zstd
from kvstore.errors import CorruptStoreError, DecodeError
from kvstore.layout import DTYPE_ITEMSIZE_NBYTES

CODECS: dict[int, Codec] = {codec.tag: codec for codec in (Raw(), Zstd(), Planes())}
"""Every exact codec that this version can read, by tag."""

QUANTIZERS: dict[int, Quantizer] = {one.tag: one for one in (Half(), Int8(), Int4(), Pca())}
"""Every quantizer that this version can read, by tag."""

QUICK = "quick"
"""The name of what is as ``exact``, for content that is going to be written anew: a tail."""

MIN_TRAINING_N_TOKENS, MAX_TRAINING_N_TOKENS = 1536, 4096
"""How many tokens a basis is learned from: from fewer it fits them alone."""

BasisLookup: TypeAlias = Callable[[bytes], Basis]
"""The basis of that digest; raises CorruptStoreError if it is not known, or damaged."""

_SAMPLE_NBYTES = 64 << 10
"""Codes whose first bytes do not lose a quarter are stored as they are, without trying the rest:
decompressing would take longer than all else that a restore does with them.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A blob as it is stored, and what its checksum covers.

    ``is_fallback``: it was to be lossy, but its numbers could not be held so, or would take more.
    """

    tag: int
    stored: memoryview
    checked: tuple[memoryview, ...]
    is_fallback: bool = False


def needs_basis(name: str) -> bool:
    """Whether the codec of that name needs a basis of the tensor to encode with."""
    return name in NEED_BASIS


def no_bases(digest: bytes) -> Basis:
    """A ``BasisLookup`` of where there are none."""
    raise CorruptStoreError(f"expected a basis {digest.hex()}, found none")


def encode(
    data: memoryview, block: Block, name: str, role: str = "", basis: Basis | None = None
) -> Encoded:
    """``data`` by the codec of that name; exactly, if a lossy one cannot hold its numbers.

    ``role`` is the tensor's: ``int4`` and ``int8-channel`` group keys by channel, values by token.
    ``basis`` is the tensor's too, for a codec that needs one: without it, it can hold nothing.
    """
    quantizer = _quantizer(name, role, basis)
    if quantizer is not None:
        codes = quantizer.encode(data, block)
        encoded = None if codes is None else _encode_codes(quantizer, codes)
        if encoded is not None and encoded.stored.nbytes <= data.nbytes:
            return encoded
    tag, stored = encode_exact(data, exact_codec(name, DTYPE_ITEMSIZE_NBYTES[block.dtype]))
    return Encoded(tag=tag, stored=stored, checked=(data,), is_fallback=quantizer is not None)


def decode_into(
    tag: int,
    stored: memoryview,
    block: Block,
    destination: memoryview,
    bases: BasisLookup = no_bases,
) -> tuple[memoryview, ...]:
    """Fill ``destination`` exactly with what ``stored`` decodes to; returns what to check.

    That is ``destination``, or the codes where they are lossy; they are good until this thread
    decodes again.

    Raises:
        DecodeError: unknown tag, or the bytes do not decode to such a block.
        CorruptStoreError: ``bases`` does not know the basis that is needed.
    """
    quantizer = QUANTIZERS.get(tag)
    if quantizer is None:
        decode_exact_into(tag, stored, destination)
        return (destination,)
    inner = stored[0] if stored.nbytes else -1
    head = Head.from_bytes(stored[1:], quantizer.more_nbytes)
    body = stored[1 + Head.NBYTES + quantizer.more_nbytes :]
    if isinstance(quantizer, Pca):
        quantizer = Pca(bases(digest_in(head.more)))
    nbytes = quantizer.codes_nbytes(head, block)
    if inner == Raw.tag:
        if body.nbytes != nbytes:
            raise DecodeError(f"codes: expected {nbytes} bytes, found {body.nbytes}")
        codes = body
    else:
        codes = scratch("codes", nbytes)
        decode_exact_into(inner, body, codes)
    quantizer.decode_into(Codes(head, codes), block, destination)
    return _tagged(tag, head), codes


def encode_exact(data: memoryview, codec: Codec) -> tuple[int, memoryview]:
    """``data`` as ``(tag, stored bytes)``: by ``codec``, or raw where that gains nothing.

    Less than one part in ten saved counts as nothing: decompressing takes
    several times as long as reading the bytes that it saves.
    """
    stored = codec.encode(data)
    if not _gains(stored, data):
        return Raw.tag, data
    return codec.tag, stored


def decode_exact_into(tag: int, stored: memoryview, destination: memoryview) -> None:
    """Fill ``destination`` exactly with what ``stored`` decodes to.

    Raises:
        DecodeError: unknown tag, or the bytes do not decode to exactly
            ``destination.nbytes`` bytes.
    """
    codec = CODECS.get(tag)
    if codec is None:
        raise DecodeError(f"unknown codec tag {tag}; known are {sorted({*CODECS, *QUANTIZERS})}")
    codec.decode_into(stored, destination)


def exact_codec(name: str, itemsize_nbytes: int) -> Codec:
    """The codec that writes numbers of so many bytes exactly."""
    if name == RAW:
        return Raw()
    if itemsize_nbytes in ITEMSIZES_NBYTES:
        return Planes(itemsize_nbytes, is_quick=name == QUICK)
    return Zstd()


def _encode_codes(quantizer: Quantizer, codes: Codes) -> Encoded:
    inner, body = Raw.tag, codes.body
    if isinstance(quantizer, Half):
        inner, body = encode_exact(codes.body, Planes(2))
    elif isinstance(quantizer, Pca):
        inner, body = _in_runs(codes)
    elif _gains(Zstd().encode(body[:_SAMPLE_NBYTES]), body[:_SAMPLE_NBYTES], one_part_in=4):
        inner, body = encode_exact(codes.body, Zstd())
    return Encoded(
        tag=quantizer.tag,
        stored=memoryview(b"".join([bytes([inner]), codes.head.to_bytes(), body])),
        checked=(_tagged(quantizer.tag, codes.head), codes.body),
    )


def _in_runs(codes: Codes) -> tuple[int, memoryview]:
    """As one frame with a code of its own for each run, or raw where that gains nothing."""
    stored = Zstd(long_matches_only=True).encode_runs(codes.body, codes.runs)
    return (Zstd.tag, stored) if _gains(stored, codes.body) else (Raw.tag, codes.body)


def _tagged(tag: int, head: Head) -> memoryview:
    """What says how codes are read: without it, codes of one quantizer may be those of another."""
    return memoryview(bytes([tag]) + head.to_bytes())


def _quantizer(name: str, role: str, basis: Basis | None) -> Quantizer | None:
    if name == "half":
        return Half()
    if name == "int8":
        return Int8()
    if name == "int8-channel":
        return Int8(BY_CHANNEL if role == "k" else BY_TOKEN)
    if name == "int4":
        return Int4(BY_CHANNEL if role == "k" else BY_TOKEN)
    if name == "pca":
        return Pca(basis)
    return None


def _gains(stored: memoryview, data: memoryview, *, one_part_in: int = 10) -> bool:
    return stored.nbytes <= data.nbytes - data.nbytes // one_part_in


__all__ = [
    "CODECS",
    "EXACT",
    "LOSSY",
    "MAX_TRAINING_N_TOKENS",
    "MIN_TRAINING_N_TOKENS",
    "NAMES",
    "QUANTIZERS",
    "QUICK",
    "RAW",
    "Basis",
    "BasisLookup",
    "Block",
    "Codec",
    "CodecChoice",
    "Encoded",
    "Expansion",
    "Grid",
    "Kernels",
    "NumpyKernels",
    "Pca",
    "Planes",
    "Quantizer",
    "Raw",
    "Rotation",
    "Zstd",
    "block_of",
    "decode_exact_into",
    "decode_into",
    "encode",
    "encode_exact",
    "exact_codec",
    "kernels",
    "lossy_text",
    "may_lose",
    "needs_basis",
    "no_bases",
    "scratch",
    "use_kernels",
]
