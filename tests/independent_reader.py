"""A second reader of the file format, written from ``schemas/FORMAT.md`` alone.

It imports nothing of ``kvstore``: if it restores what ``kvstore`` stored and
refuses what ``kvstore`` refuses, the document is complete. As a script,
``python tests/independent_reader.py sessions.db`` verifies a file and prints
each session with a digest of every restored tensor.
"""

from __future__ import annotations

import hashlib
import math
import re
import sqlite3
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import msgpack
import xxhash
import zstandard

SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"
APPLICATION_ID = 0x6B767331
VERSION = 3
SCHEMA_SQL = {
    1: SCHEMAS / "schema_v1.sql",
    2: SCHEMAS / "schema_v2.sql",
    VERSION: SCHEMAS / "schema.sql",
}
RINGS = ("window", "positions")
MAX_WINDOW_NBYTES = 2**27
ITEMSIZES = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys(("int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "float32"), 4),
    **dict.fromkeys(("int64", "float64"), 8),
}


class Refused(Exception):  # noqa: N818
    """The file, or a part of it, breaks a rule of FORMAT.md."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise Refused(message)


# ---------------------------------------------------------------- hashes


def blake2b(person: bytes, *parts: bytes) -> bytes:
    hasher = hashlib.blake2b(digest_size=32, person=person.ljust(16, b"\0"))
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def root_key(model: bytes, chunk_n_tokens: int, namespace: str, adapter: bytes) -> bytes:
    text = namespace.encode()
    return blake2b(
        b"kvstore/root",
        *(u32(1), model, u32(chunk_n_tokens), u32(len(text)), text, u32(len(adapter)), adapter),
    )


def chunk_key(parent: bytes, ids: list[int], extras: bytes = b"") -> bytes:
    packed = struct.pack(f"<{len(ids)}Q", *ids)
    return blake2b(b"kvstore/chunk", parent, u32(len(ids)), packed, u32(len(extras)), extras)


def checksum(key: bytes, tensor: int, start: int, stop: int, decoded: bytes) -> bytes:
    identity = key + struct.pack("<IQQ", tensor, start, stop)
    return xxhash.xxh3_128_intdigest(identity + decoded, seed=0).to_bytes(16, "big")


def fingerprint(weights: bytes, program: bytes, layout: bytes) -> bytes:
    return blake2b(b"kvstore/model", weights, program, layout)


# ---------------------------------------------------------------- edits

Lineage: TypeAlias = tuple[tuple[int, bytes], ...]
"""``(position, digest)`` of each edit, in ascending order of position."""


def read_extras(extras: bytes, start: int, stop: int) -> Lineage:
    """The edits that begin in a chunk ``[start, stop)``."""
    edits: list[tuple[int, bytes]] = []
    at = 0
    while at < len(extras):
        require(len(extras) >= at + 9, "extras: an item is cut off")
        kind, offset, n = struct.unpack_from("<BII", extras, at)
        require(kind == 1, "extras: an unknown kind")
        require(n in {0, 32}, "extras: the length of a digest")
        digest = extras[at + 9 : at + 9 + n]
        require(len(digest) == n, "extras: a digest is cut off")
        at += 9 + n
        require(start + offset < stop, "extras: an edit outside of the chunk")
        require(not edits or edits[-1][0] < start + offset, "extras: the order of edits")
        edits.append((start + offset, digest))
    return tuple(edits)


def extras_of(lineage: Lineage, start: int, stop: int) -> bytes:
    """The extras of a chunk ``[start, stop)`` of that lineage."""
    return b"".join(
        b"\x01" + u32(position - start) + u32(len(digest)) + digest
        for position, digest in lineage
        if start <= position < stop
    )


# ---------------------------------------------------------------- layout


@dataclass(frozen=True)
class Tensor:
    name: str
    role: str
    layer: int
    kind: str
    dtype: str
    shape: tuple[int, ...]
    token_axis: int | None
    window_n_tokens: int = 0
    sink_n_tokens: int = 0

    @property
    def capacity(self) -> int:
        return 1 if self.token_axis is None else self.shape[self.token_axis]

    @property
    def ring(self) -> int:
        return self.capacity - self.sink_n_tokens

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZES[self.dtype]

    @property
    def outer(self) -> int:
        return math.prod(self.shape[: self.token_axis or 0])

    @property
    def slot_nbytes(self) -> int:
        return self.nbytes // self.capacity

    def slot(self, position: int) -> int:
        """Where a position lies."""
        if self.kind == "checkpoint":
            return 0
        if self.kind == "full" or position < self.sink_n_tokens:
            return position
        return self.sink_n_tokens + (position - self.sink_n_tokens) % self.ring

    def seen(self, n_tokens: int) -> list[int]:
        """The positions that the token at ``n_tokens`` sees of a tensor of this kind."""
        if self.kind == "checkpoint":
            return [n_tokens - 1] if n_tokens else []
        if self.kind == "full":
            return list(range(n_tokens))
        return [
            position
            for position in range(n_tokens)
            if position < self.sink_n_tokens or n_tokens - position < self.window_n_tokens
        ]

    def required(self, n_tokens: int) -> list[int]:
        """The positions that must be stored to serve ``n_tokens``."""
        return [] if self.kind == "positions" else self.seen(n_tokens)

    def holds(self, start: int, stop: int) -> bool:
        """Whether a blob of this kind may have these positions."""
        if self.kind == "positions":
            return False
        if self.kind == "checkpoint":
            return stop - start == 1
        if self.kind == "full":
            return stop <= self.capacity
        return stop - max(start, self.sink_n_tokens) <= self.ring

    def content(self, n_tokens: int, stored: dict[int, bytes]) -> bytes:
        """What a restore of ``n_tokens`` brings: required slots in order, or all positions."""
        if self.kind != "positions":
            return b"".join(stored[position] for position in self.required(n_tokens))
        require(self.dtype in {"int32", "int64"} and len(self.shape) == 1, "odd positions tensor")
        held = [-1] * self.capacity
        for position in self.seen(n_tokens):
            held[self.slot(position)] = position
        return struct.pack(f"<{self.capacity}{'i' if self.dtype == 'int32' else 'q'}", *held)

    def planned(self, n_tokens: int, content: bytes) -> bytes:
        """The tensor's whole memory after that restore; zeros where nothing was put."""
        if self.kind == "positions":
            return content
        memory = bytearray(self.nbytes)
        inner = self.slot_nbytes // self.outer
        for number, position in enumerate(self.required(n_tokens)):
            for row in range(self.outer):
                target = (row * self.capacity + self.slot(position)) * inner
                source = number * self.slot_nbytes + row * inner
                memory[target : target + inner] = content[source : source + inner]
        return bytes(memory)


def layout_digest(layout: list[Tensor]) -> bytes:
    text = "".join(
        f"{one.role} {one.layer} {one.kind} {one.dtype} "
        f"[{','.join(str(size) for size in one.shape)}] "
        f"{'-' if one.token_axis is None else one.token_axis}"
        f"{f' {one.window_n_tokens} {one.sink_n_tokens}' if one.kind in RINGS else ''}\n"
        for one in layout
    )
    return blake2b(b"kvstore/layout", text.encode("ascii"))


# ---------------------------------------------------------------- msgpack


def unpack(data: object) -> Any:
    def unique(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        require(all(type(key) is str for key, _ in pairs), "a map key is not text")
        require(len({key for key, _ in pairs}) == len(pairs), "a key twice")
        return dict(pairs)

    def extension(_code: int, _data: bytes) -> None:
        raise Refused("an extension type")

    def no_timestamp(value: Any) -> None:
        require(not isinstance(value, msgpack.Timestamp), "an extension type")
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, dict | list | msgpack.Timestamp):
                no_timestamp(item)

    require(type(data) is bytes, "msgpack that is not a BLOB")
    try:
        value = msgpack.unpackb(
            data,
            object_pairs_hook=unique,
            ext_hook=extension,
            max_array_len=100_000,
            max_map_len=100_000,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise Refused(f"not msgpack: {error}") from error
    if isinstance(value, dict | list):
        no_timestamp(value)
    return value


def read_manifest(data: object) -> list[Tensor]:
    manifest = unpack(data)
    require(type(manifest) is dict and set(manifest) == {"format", "tensors"}, "not a manifest")
    require(type(manifest["format"]) is int and manifest["format"] == 1, "manifest format")
    require(type(manifest["tensors"]) is list and manifest["tensors"], "manifest tensors")
    layout = [_read_tensor(entry) for entry in manifest["tensors"]]
    require(len({one.name for one in layout}) == len(layout), "a tensor name twice")
    return layout


def _read_tensor(entry: Any) -> Tensor:
    types = {
        "dtype": str,
        "kind": str,
        "layer": int,
        "name": str,
        "role": str,
        "shape": list,
        "token_axis": int,
    }
    require(type(entry) is dict and type(entry.get("kind")) is str, "not a tensor")
    kind = entry["kind"]
    require(kind in {"full", "checkpoint", *RINGS}, "tensor: kind")
    if kind in RINGS:
        types |= {"window_n_tokens": int, "sink_n_tokens": int}
    if kind == "checkpoint":
        types["token_axis"] = type(None)
    require(set(entry) == set(types), "not a tensor of this kind")
    for key, expected in types.items():
        require(type(entry[key]) is expected, f"tensor: the type of {key}")
    shape, axis = entry["shape"], entry["token_axis"]
    require(entry["dtype"] in ITEMSIZES, "tensor: dtype")
    require(entry["layer"] >= 0, "tensor: layer")
    require(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", entry["role"]), "tensor: role")
    require(1 <= len(shape) <= 16, "tensor: number of axes")
    require(all(type(size) is int and size >= 1 for size in shape), "tensor: shape")
    require(math.prod(shape) * ITEMSIZES[entry["dtype"]] < 2**63, "tensor: size")
    if axis is not None:
        require(0 <= axis < len(shape) and (axis == 0 or shape[0] == 1), "tensor: token axis")
    one = Tensor(**{**entry, "shape": tuple(shape)})
    if kind in RINGS:
        require(one.sink_n_tokens >= 0, "tensor: sink")
        require(1 <= one.window_n_tokens <= one.ring, "tensor: window")
    return one


def read_metadata(data: object) -> dict[str, Any]:
    def levels(value: Any) -> int:
        items = value.values() if isinstance(value, dict) else value
        inner = [levels(item) for item in items if isinstance(item, dict | list)]
        return 1 + max(inner, default=0)

    metadata = unpack(data)
    require(type(metadata) is dict, "metadata is not a map")
    require(len(data) <= 2**20 and levels(metadata) <= 32, "metadata is too large or deep")
    return metadata


# ---------------------------------------------------------------- codecs

LOSSY = {3, 4, 5, 6}
FLOATS = {"float32": "f", "float16": "e", "bfloat16": "H"}


@dataclass(frozen=True)
class Block:
    """The numbers of a lossy blob."""

    dtype: str
    n_tokens: int
    n_channels: int
    start: int = 0
    head_dim: int = 1


def may_lose(tensor: Tensor) -> bool:
    return (
        tensor.role in {"k", "v"}
        and tensor.dtype in FLOATS
        and tensor.kind in {"full", "window"}
        and len(tensor.shape) > 1
    )


def codec_text(adapter: object) -> str:
    """The lossy codec that a key space is of, or nothing."""
    require(type(adapter) is bytes, "adapter: a type")
    if not adapter:
        return ""
    match = re.fullmatch(rb"\x01(....)([a-z0-9.,=-]+)", adapter, re.DOTALL)
    require(match is not None and match[1] == u32(len(match[2])), "an unknown adapter")
    return match[2].decode("ascii")


def decode_lossy(
    codec: int, stored: bytes, block: Block, bases: dict[bytes, Basis] | None = None
) -> tuple[bytes, bytes]:
    """The numbers, and what the checksum covers: tag, head and codes."""
    if codec == 6:
        return decode_pca(stored, block, bases or {})
    require(len(stored) >= 8, "codes: cut short")
    inner, head = stored[0], stored[1:8]
    variant, g, e = struct.unpack("<BHI", head)
    require(block.dtype in FLOATS, "codes of numbers that may not lose")
    n, c = block.n_tokens, block.n_channels
    require(variant in {1, 2} and inner in {0, 1, 2}, "codes: variant, or how they are stored")
    if codec == 3:
        require(block.dtype == "float32" and g == e == 0, "half: head")
        codes = decode(inner, stored[8:], 2 * n * c)
        form = "e" if variant == 1 else "H"
        numbers = [as_float(one, form) for one in struct.unpack(f"<{n * c}{form}", codes)]
        return from_floats(numbers, "float32"), bytes([codec]) + head + codes
    m = n - e
    require(g > 0 and m >= 0 and (codec == 5 or e == 0), "integers: head")
    require(variant == 2 or c % g == 0, "integers: groups")
    require(codec == 4 or (c % 2 == 0 and (variant == 2 or c // 2 % g == 0)), "int4: groups")
    n_groups = -(-m // g) * c if variant == 2 else m * (c // g)
    exact = e * c * ITEMSIZES[block.dtype]
    n_zeros = n_groups if codec == 5 else 0
    size = m * c if codec == 4 else m * c // 2
    codes = decode(inner, stored[8:], exact + 2 * n_groups + 2 * n_zeros + size)
    at = exact + 2 * n_groups
    scales = struct.unpack(f"<{n_groups}H", codes[exact:at])
    zeros = struct.unpack(f"<{n_zeros}h", codes[at : at + 2 * n_zeros]) or (0,) * n_groups
    packed = codes[at + 2 * n_zeros :]
    numbers = []
    for token in range(m):
        for channel in range(c):
            group = token // g * c + channel if variant == 2 else (token * c + channel) // g
            if codec == 4:
                code = int.from_bytes(packed[token * c + channel :][:1], signed=True)
            else:
                byte = packed[token * (c // 2) + channel % (c // 2)]
                code = byte >> 4 if channel >= c // 2 else byte & 15
            numbers.append((code + zeros[group]) * as_float(scales[group], "H"))
    return codes[:exact] + from_floats(numbers, block.dtype), bytes([codec]) + head + codes


PACKINGS = {1: (1, 5), 2: (2, 3), 3: (7, 2)}
"""Largest magnitude, and how many integers are in a byte."""


def sine(place: int) -> int:
    return round(2**14 * math.sin(2 * math.pi * (place % 65536) / 65536))


@dataclass(frozen=True)
class Basis:
    digest: bytes
    exponent: int
    mean: list[int]
    axes: list[list[int]]
    pairing: int
    head_dim: int
    frequencies: list[int]

    def turned(self, numbers: list[int], position: int) -> list[int]:
        """The numbers of one token in units of ``2 ** -(exponent + 14)``."""
        found = [number << 14 for number in numbers]
        n_pairs = len(self.frequencies)
        for first in range(0, len(numbers), self.head_dim) if self.pairing else ():
            for pair, frequency in enumerate(self.frequencies):
                place = ((frequency * position + 2**47) % 2**64) >> 48
                cosine, s = sine(place + 16384), sine(place)
                a, b = (2 * pair, 2 * pair + 1) if self.pairing == 1 else (pair, pair + n_pairs)
                a, b = first + a, first + b
                found[a] = numbers[a] * cosine - numbers[b] * s
                found[b] = numbers[b] * cosine + numbers[a] * s
        return found


def packed_sizes(counts: tuple[int, ...], n: int) -> list[int]:
    """Bytes of the rows of each packing."""
    return [
        2 * rows * n if packing == 5 else -(-rows * n // PACKINGS.get(packing, (127, 1))[1])
        for packing, rows in enumerate(counts, 1)
    ]


def unpacked(packings: bytes, counts: tuple[int, ...], data: bytes, n: int) -> list[list[int]]:
    """All rows of ``n`` integers."""
    require(max(packings, default=0) <= 5, "packed rows: a packing")
    rows = [[0] * n for _ in packings]
    for packing, (count, nbytes) in enumerate(zip(counts, packed_sizes(counts, n), strict=True), 1):
        section, data = data[:nbytes], data[nbytes:]
        which = [row for row, one in enumerate(packings) if one == packing]
        require(len(which) == count, "packed rows: how many")
        if packing == 5:
            half = nbytes // 2
            pairs = zip(section[:half], section[half:], strict=True)
            flat = [int.from_bytes(bytes(pair), "little", signed=True) for pair in pairs]
        elif packing == 4:
            flat = [int.from_bytes(bytes([byte]), signed=True) for byte in section]
        else:
            limit, n_digits = PACKINGS[packing]
            base = 2 * limit + 1
            require(max(section, default=0) < base**n_digits, "packed rows: a byte")
            digits = range(n_digits)
            flat = [byte // base**digit % base - limit for byte in section for digit in digits]
        require(packing < 4 or min(flat, default=0) >= 1 - 2 ** (8 * packing - 25), "packed rows")
        for number, row in enumerate(which):
            rows[row] = flat[number * n : (number + 1) * n]
    return rows


def read_basis(data: bytes, n_channels: int) -> Basis:
    require(len(data) > 22, "basis: cut short")
    one, pairing, exponent, c, k, head_dim, n_pairs, *rows = struct.unpack("<BBhHHHH5H", data[:22])
    counts = tuple(rows)
    require(one == 1 and c == n_channels <= 2048, "basis: of what")
    require(1 <= k <= c and sum(counts) == k, "basis: axes")
    require(-64 <= exponent <= 112, "basis: exponent")
    if pairing == 0:
        require(head_dim == n_pairs == 0, "basis: a rotation that is none")
    else:
        require(pairing in {1, 2} and head_dim > 0 and head_dim % 2 == 0, "basis: rotation")
        require(c % head_dim == 0 and 1 <= n_pairs <= head_dim // 2, "basis: pairs")
    sizes = packed_sizes(counts, c)
    require(data[22] in {0, 1}, "basis: how it is stored")
    rest = decode(data[22], data[23:], 4 * c + 8 * n_pairs + k + sum(sizes))
    at = 4 * c + 8 * n_pairs
    axes = unpacked(rest[at : at + k], counts, rest[at + k :], c)
    sums = [sum(abs(axis[place]) for axis in axes) for place in range(c)]
    require(max(sums) <= 2**21, "basis: too large")
    return Basis(
        digest=hashlib.blake2b(
            data[:22] + rest, digest_size=16, person=b"kvstore/basis".ljust(16, b"\0")
        ).digest(),
        exponent=exponent,
        mean=list(struct.unpack(f"<{c}i", rest[: 4 * c])),
        axes=axes,
        pairing=pairing,
        head_dim=head_dim,
        frequencies=list(struct.unpack(f"<{n_pairs}Q", rest[4 * c : at])),
    )


def decode_pca(stored: bytes, block: Block, bases: dict[bytes, Basis]) -> tuple[bytes, bytes]:
    """As ``decode_lossy``."""
    require(len(stored) >= 34 and stored[0] in {0, 1, 2}, "pca: head")
    variant, g, e, digest, *rows = struct.unpack("<BHI16s5H", stored[1:34])
    n, c, counts = block.n_tokens, block.n_channels, tuple(rows)
    require(block.dtype in FLOATS and (variant, g) == (1, 0) and e <= n, "pca: head")
    require(digest in bases, "pca: no such basis")
    basis = bases[digest]
    require(len(basis.mean) == c, "pca: a basis of other numbers")
    require(basis.pairing == 0 or basis.head_dim == block.head_dim, "pca: heads")
    n_axes, m, exact = len(basis.axes), n - e, e * c * ITEMSIZES[block.dtype]
    require(sum(counts) <= n_axes, "pca: rows")
    codes = decode(stored[0], stored[34:], exact + n_axes + sum(packed_sizes(counts, m)))
    packed = codes[exact + n_axes :]
    components = unpacked(codes[exact : exact + n_axes], counts, packed, m)
    numbers = []
    for token in range(m):
        sums = list(basis.mean)
        for row, axis in zip(components, basis.axes, strict=True):
            if row[token]:
                sums = [one + row[token] * of_axis for one, of_axis in zip(sums, axis, strict=True)]
        turned = basis.turned(sums, block.start + e + token)
        numbers += [math.ldexp(one, -(basis.exponent + 14)) for one in turned]
    singles = list(struct.unpack(f"<{m * c}f", struct.pack(f"<{m * c}f", *numbers)))
    return codes[:exact] + from_floats(singles, block.dtype), b"\x06" + stored[1:34] + codes


def as_float(stored: float, form: str) -> float:
    """A number of that struct format; ``H`` are a bfloat16's 16 bits."""
    return struct.unpack("<f", struct.pack("<I", int(stored) << 16))[0] if form == "H" else stored


def from_floats(numbers: list[float], dtype: str) -> bytes:
    """Rounded to nearest, half to even; all are exact in a float32, and in range."""
    if dtype != "bfloat16":
        return struct.pack(f"<{len(numbers)}{FLOATS[dtype]}", *numbers)
    bits = struct.unpack(f"<{len(numbers)}I", struct.pack(f"<{len(numbers)}f", *numbers))
    return struct.pack(f"<{len(numbers)}H", *(b + 0x7FFF + (b >> 16 & 1) >> 16 for b in bits))


def decode(codec: int, stored: bytes, raw_nbytes: int) -> bytes:
    """Exactly ``raw_nbytes`` bytes; nothing is allocated by a number in ``stored``."""
    if codec == 0:
        require(len(stored) == raw_nbytes, "raw: length")
        return stored
    if codec == 1:
        return zstd_frame(stored, raw_nbytes)
    require(codec == 2, f"codec {codec} is unknown")
    k = stored[0] if stored else 0
    require(k in {2, 4, 8} and raw_nbytes % k == 0, "planes: their number")
    require(len(stored) >= 1 + 5 * k, "planes: cut short")
    planes, at = [], 1 + 5 * k
    for how, n in struct.iter_unpack("<BI", stored[1:at]):
        require(how in {0, 1}, "planes: how one is stored")
        plane = stored[at : at + n]
        at += n
        plane = zstd_frame(plane, raw_nbytes // k) if how else plane
        require(len(plane) == raw_nbytes // k, "planes: the length of one")
        planes.append(plane)
    require(at == len(stored), "planes: the length of all")
    return bytes(byte for number in zip(*planes, strict=True) for byte in number)


def zstd_frame(stored: bytes, raw_nbytes: int) -> bytes:
    """What a single frame has, exactly ``raw_nbytes``."""
    try:
        require(stored[:4] == b"\x28\xb5\x2f\xfd", "zstd: no frame")
        frame = zstandard.get_frame_parameters(stored)
        require(frame.content_size == raw_nbytes, "zstd: content size")
        require(frame.window_size <= MAX_WINDOW_NBYTES, "zstd: window")
        require(frame.dict_id == 0, "zstd: dictionary")
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        decoded = decompressor.decompress(stored)
    except zstandard.ZstdError as error:
        raise Refused(f"zstd: {error}") from error
    require(decompressor.eof, "zstd: cut short")
    require(not decompressor.unused_data, "zstd: more behind the frame")
    require(len(decoded) == raw_nbytes, "zstd: length")
    return decoded


# ---------------------------------------------------------------- the file


@dataclass(frozen=True)
class Chunk:
    id: int
    space_id: int
    parent_id: int | None
    base_id: int | None
    base_n_tokens: int
    key: bytes
    parent_key: bytes
    start: int
    stop: int
    tokens: bytes
    extras: bytes
    raw_nbytes: int
    stored_nbytes: int

    @property
    def ids(self) -> list[int]:
        return ids_of(self.tokens)

    @property
    def edits(self) -> Lineage:
        return read_extras(self.extras, self.start, self.stop)

    @property
    def has_its_key(self) -> bool:
        return self.key == chunk_key(self.parent_key, self.ids, self.extras)


@dataclass(frozen=True)
class Session:
    """A session's row, with what its key space says."""

    id: int
    namespace: str
    name: str
    head_id: int | None
    n_tokens: int
    space_id: int
    adapter: bytes
    root: bytes
    chunk_n_tokens: int
    tokens: list[int]
    metadata: dict[str, Any]
    model: bytes
    layout: list[Tensor]


@dataclass(frozen=True)
class Restored:
    """What each tensor needs for the next token to see ``n_tokens`` tokens.

    ``tensors`` are token-major, the required positions in order (all of a positions
    tensor); ``planned`` is the same put in place, in memory that was zero.
    """

    n_tokens: int
    tensors: list[bytes]
    planned: list[bytes]


def ids_of(tokens: bytes) -> list[int]:
    return list(struct.unpack(f">{len(tokens) // 8}Q", tokens))


def objects(connection: sqlite3.Connection) -> set[tuple[str, ...]]:
    def fold(sql: str | None) -> str:
        return re.sub(r" ?([(),]) ?", r"\1", re.sub(r"\s+", " ", sql or "").strip())

    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema")
    return {(*row[:3], fold(row[3])) for row in rows}


class Reader:
    """One read transaction on one file; close it, or use it in a ``with``."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None
        )
        try:
            self._connection.execute("PRAGMA trusted_schema = OFF")
            self._connection.execute("BEGIN")
            self._check_header()
        except sqlite3.Error as error:
            self._connection.close()
            raise Refused(f"SQLite: {error}") from error
        except Refused:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise Refused(f"SQLite: {error}") from error

    def _number(self, query: str) -> int:
        return self._rows(query)[0][0]

    def _check_header(self) -> None:
        require(self._number("PRAGMA application_id") == APPLICATION_ID, "application id")
        version = self._number("PRAGMA user_version")
        require(version >= 1, "user_version")
        found = objects(self._connection)
        require("format" in {name for _, name, _, _ in found}, "no table format")
        rows = self._rows("SELECT version, min_reader FROM format")
        require(len(rows) == 1 and rows[0][0] == version, "the row of format")
        require(version <= VERSION or rows[0][1] <= VERSION, "a newer format")
        schema = SCHEMA_SQL[min(version, VERSION)]
        expected_in = sqlite3.connect(":memory:")
        expected_in.executescript(schema.read_text(encoding="utf-8"))
        expected = objects(expected_in)
        expected_in.close()
        require(expected <= found, "something is missing in the schema")
        added = {kind for kind, *_ in found - expected}
        allowed = {"table", "index"} if version > VERSION else set()
        require(added <= allowed, "something was added to the schema")
        # A file of version 1 is as one whose extras are all empty, one of version 2 without bases.
        self._extras = "x''" if version == 1 else "extras"
        self._has_bases = version >= 3
        self._read_bases: dict[tuple[int, int], dict[bytes, Basis]] = {}

    # -- sessions

    def sessions(self) -> list[Session]:
        rows = self._rows(
            "SELECT s.id, s.namespace, s.name, s.head_id, s.n_tokens, s.metadata, p.id, "
            "p.root_key, p.chunk_n_tokens, p.namespace, m.fingerprint, m.manifest, p.adapter "
            "FROM sessions s JOIN spaces p ON p.id = s.space_id "
            "JOIN models m ON m.id = p.model_id ORDER BY s.id"
        )
        found = []
        for row in rows:
            require(row[1] == row[9], "the session's namespace is not its space's")
            ids = self._session_ids(row[0])
            require(len(ids) == row[4], "the number of session tokens")
            found.append(
                Session(
                    id=row[0],
                    namespace=row[1],
                    name=row[2],
                    head_id=row[3],
                    n_tokens=row[4],
                    metadata=read_metadata(row[5]),
                    space_id=row[6],
                    root=row[7],
                    chunk_n_tokens=row[8],
                    tokens=ids,
                    model=row[10],
                    layout=read_manifest(row[11]),
                    adapter=row[12],
                )
            )
        return found

    def _session_ids(self, session_id: int) -> list[int]:
        ids: list[int] = []
        for start, tokens in self._rows(
            "SELECT start, tokens FROM session_tokens WHERE session_id = ? ORDER BY start",
            session_id,
        ):
            require(start == len(ids), "a gap in the session's tokens")
            require(type(tokens) is bytes and tokens and len(tokens) % 8 == 0, "session tokens")
            ids += ids_of(tokens)
        return ids

    def lineage(self, session: Session) -> Lineage:
        """The edits on the path from the session's head to the root."""
        edits: Lineage = ()
        chunk_id, stop = session.head_id, None
        while chunk_id is not None:
            found = self._chunks("WHERE id = ?", chunk_id)
            require(found, "a chunk on the path is missing")
            # Each ends where the one behind it starts: there is an end to the path.
            require(stop in {None, found[0].stop}, "the parent is not the chunk before")
            edits = found[0].edits + edits
            chunk_id, stop = found[0].parent_id, found[0].start
        return edits

    def restore(self, session: Session, limit: int | None = None) -> Restored:
        """The longest prefix of the session's tokens and edits that every tensor can serve.

        At most ``limit`` tokens: one less than the prompt has, or all of it where
        the layout has the last logits.
        """
        return self.look_up(session, session.tokens[:limit], self.lineage(session))

    def look_up(self, session: Session, ids: list[int], lineage: Lineage = ()) -> Restored:
        """The longest prefix of ``ids`` with that lineage that every tensor can serve.

        Whosever it is, in the model and the key space of ``session``.
        """
        layout, size = session.layout, session.chunk_n_tokens
        stored: list[dict[int, bytes]] = [{} for _ in layout]
        for chunk, stop in self.longest_prefix(session.root, size, ids, lineage):
            is_lossy = codec_text(session.adapter) != ""
            for index, slots in enumerate(self.slots(chunk, stop, layout, is_lossy=is_lossy)):
                stored[index].update(slots)
        n_tokens = len(ids)
        while not all(
            slots.keys() >= set(one.required(n_tokens))
            for one, slots in zip(layout, stored, strict=True)
        ):
            n_tokens -= 1
        tensors = [one.content(n_tokens, slots) for one, slots in zip(layout, stored, strict=True)]
        return Restored(
            n_tokens=n_tokens,
            tensors=tensors,
            planned=[
                one.planned(n_tokens, content) for one, content in zip(layout, tensors, strict=True)
            ],
        )

    # -- chunks

    def _chunks(self, where: str, *values: Any) -> list[Chunk]:
        columns = ", ".join(Chunk.__dataclass_fields__).replace("extras", self._extras)
        return [
            self._checked(Chunk(*row))
            for row in self._rows(f"SELECT {columns} FROM chunks {where}", *values)
        ]

    @staticmethod
    def _checked(chunk: Chunk) -> Chunk:
        integers = (chunk.id, chunk.start, chunk.stop, chunk.base_n_tokens)
        require(all(type(number) is int for number in integers), "chunk: a type")
        texts = (chunk.key, chunk.parent_key, chunk.tokens, chunk.extras)
        require(all(type(data) is bytes for data in texts), "chunk: a type")
        require(len(chunk.key) == len(chunk.parent_key) == 32, "chunk: a key's length")
        require(0 <= chunk.start < chunk.stop, "chunk: range")
        n_tokens = chunk.stop - chunk.start
        require(len(chunk.tokens) == 8 * n_tokens, "chunk: number of tokens")
        require(0 <= chunk.base_n_tokens <= n_tokens, "chunk: base_n_tokens")
        require((chunk.base_id is None) == (chunk.base_n_tokens == 0), "chunk: base")
        read_extras(chunk.extras, chunk.start, chunk.stop)
        return chunk

    def longest_prefix(
        self, root: bytes, chunk_n_tokens: int, ids: list[int], lineage: Lineage
    ) -> Iterator[tuple[Chunk, int]]:
        """Chunks in token order, each with the position up to which it matches."""
        parent, position = root, 0
        while position + chunk_n_tokens <= len(ids):
            stop = position + chunk_n_tokens
            wanted = ids[position:stop]
            key = chunk_key(parent, wanted, extras_of(lineage, position, stop))
            found = self._chunks("WHERE key = ?", key)
            if not found or found[0].start != position or found[0].ids != wanted:
                break
            position = stop
            yield found[0], position
            parent = key
        stop = min(position + chunk_n_tokens, len(ids))
        edits = [edit for edit, _ in lineage if position <= edit < stop]
        best: tuple[int, Chunk] | None = None
        # Without extras, then with those of the first edit, of the first two, ...
        for known, end in zip(
            [position, *(edit + 1 for edit in edits)], [*edits, stop], strict=True
        ):
            extras = extras_of(lineage, position, known)
            for chunk, common in self._neighbours(parent, position, ids[position:end], extras):
                if common > (best[0] if best else 0):
                    best = common, chunk
        if best is not None:
            yield best[1], position + best[0]

    def _neighbours(
        self, parent: bytes, position: int, rest: list[int], extras: bytes
    ) -> Iterator[tuple[Chunk, int]]:
        """The chunks beside ``rest`` in the order of tokens, and how many ids they share."""
        packed = struct.pack(f">{len(rest)}Q", *rest)
        where = f"WHERE parent_key = ? AND {self._extras} = ? AND tokens"
        for condition, order in (("<=", "DESC"), (">", "ASC")) if rest else ():
            for chunk in self._chunks(
                f"{where} {condition} ? ORDER BY tokens {order} LIMIT 1", parent, extras, packed
            ):
                if not chunk.has_its_key or chunk.start != position:
                    continue
                common = 0
                for mine, theirs in zip(rest, chunk.ids, strict=False):
                    if mine != theirs:
                        break
                    common += 1
                yield chunk, common

    def slots(
        self, chunk: Chunk, limit: int, layout: list[Tensor], *, is_lossy: bool
    ) -> list[dict[int, bytes]]:
        """The slots that are stored of ``[chunk.start, limit)``, of each tensor by position."""
        found: list[dict[int, bytes]] = [{} for _ in layout]
        owner = chunk
        while True:
            own = owner.start + owner.base_n_tokens
            if limit > own:
                for index, slots in enumerate(self.own_blobs(owner, layout, is_lossy=is_lossy)):
                    found[index].update(
                        (position, slot) for position, slot in slots.items() if position < limit
                    )
                limit = own
            if owner.base_id is None:
                break
            owner = self._base(owner)
        return found

    def _base(self, chunk: Chunk) -> Chunk:
        found = self._chunks("WHERE id = ?", chunk.base_id)
        require(found, "the base is missing")
        base, n_tokens = found[0], chunk.base_n_tokens
        require(base.parent_key == chunk.parent_key, "the base has another parent")
        require(base.space_id == chunk.space_id, "the base is in another space")
        require(base.start == chunk.start, "the base starts elsewhere")
        require(base.tokens[: 8 * n_tokens] == chunk.tokens[: 8 * n_tokens], "the base's tokens")
        require(base.has_its_key, "the base's key")
        edits, limit = (base.edits, chunk.edits), chunk.start + n_tokens
        shared = [[edit for edit in some if edit[0] < limit] for some in edits]
        require(shared[0] == shared[1], "the base has other edits")
        require(base.base_n_tokens < n_tokens, "bases that do not borrow less")
        return base

    def own_blobs(
        self, chunk: Chunk, layout: list[Tensor], *, is_lossy: bool
    ) -> list[dict[int, bytes]]:
        """The slots in the chunk's own blobs, verified, of each tensor by position."""
        rows = self._rows(
            "SELECT b.tensor, b.start, b.stop, b.codec, b.raw_nbytes, b.stored_nbytes, "
            "b.checksum, length(p.data), b.payload_id FROM blobs b "
            "LEFT JOIN payloads p ON p.id = b.payload_id WHERE b.chunk_id = ? "
            "ORDER BY b.tensor, b.start",
            chunk.id,
        )
        start, stop = chunk.start + chunk.base_n_tokens, chunk.stop
        ranges: list[list[tuple[int, int]]] = [[] for _ in layout]
        for row in rows:
            require(all(type(number) is int for number in row[:6]), "blob: a type")
            index, first, last, _, raw, stored, _, n, _ = row
            require(0 <= index < len(layout), "blob: tensor")
            require(start <= first < last <= stop, "blob: range")
            require(layout[index].holds(first, last), "blob: range for its kind")
            require(raw == (last - first) * layout[index].slot_nbytes, "blob: raw_nbytes")
            require(stored == n and stored <= raw, "blob: stored_nbytes")
            require(not ranges[index] or ranges[index][-1][1] <= first, "blobs overlap")
            ranges[index].append((first, last))
        for tensor, found in zip(layout, ranges, strict=True):
            if tensor.kind == "full":
                require(found == ([(start, stop)] if start < stop else []), "one blob if full")
        decoded: list[dict[int, bytes]] = [{} for _ in layout]
        for index, first, last, codec, raw, _, expected, _, payload in rows:
            data = self._rows("SELECT data FROM payloads WHERE id = ?", payload)[0][0]
            require(type(data) is bytes, "payload: a type")
            tensor = layout[index]
            if codec in LOSSY:
                require(is_lossy and may_lose(tensor), "a lossy blob where all is exact")
                n_channels = math.prod(tensor.shape) // tensor.capacity
                others = [n for axis, n in enumerate(tensor.shape) if axis != tensor.token_axis]
                block = Block(tensor.dtype, last - first, n_channels, first, others[-1])
                bases = self._bases(chunk.space_id, index, n_channels) if codec == 6 else {}
                content, checked = decode_lossy(codec, data, block, bases)
            else:
                content = checked = decode(codec, data, raw)
            require(checksum(chunk.key, index, first, last, checked) == expected, "checksum")
            nbytes = tensor.slot_nbytes
            for position in range(first, last):
                at = (position - first) * nbytes
                decoded[index][position] = content[at : at + nbytes]
        return decoded

    def _bases(self, space_id: int, tensor: int, n_channels: int) -> dict[bytes, Basis]:
        """The basis of a tensor in a key space, if there is one, by its digest."""
        where = space_id, tensor
        if self._has_bases and where not in self._read_bases:
            found = {}
            question = "SELECT digest, data FROM bases WHERE space_id = ? AND tensor = ?"
            for digest, data in self._rows(question, *where):
                require(type(digest) is type(data) is bytes, "basis: a type")
                basis = read_basis(data, n_channels)
                require(basis.digest == digest, "basis: its digest")
                found[digest] = basis
            self._read_bases[where] = found
        return self._read_bases.get(where, {})

    def _verify_bases(self, spaces: dict[int, tuple[bytes, int, list[Tensor], bool]]) -> None:
        for space_id, tensor in self._rows("SELECT space_id, tensor FROM bases"):
            *_, layout, is_lossy = spaces[space_id]
            require(is_lossy, "a basis where all is exact")
            require(type(tensor) is int and tensor < len(layout), "a basis of no tensor")
            require(may_lose(layout[tensor]), "a basis of a tensor that may not lose")
            n_channels = math.prod(layout[tensor].shape) // layout[tensor].capacity
            self._bases(space_id, tensor, n_channels)

    # -- everything

    def verify(self) -> None:
        """Check every rule; raises ``Refused`` at the first that is broken."""
        require(self._rows("PRAGMA integrity_check") == [("ok",)], "integrity_check")
        require(not self._rows("PRAGMA foreign_key_check"), "foreign_key_check")
        orphans = "SELECT 1 FROM payloads WHERE id NOT IN (SELECT payload_id FROM blobs)"
        require(not self._rows(orphans), "a payload without a blob")
        layouts, models = {}, {}
        for row in self._rows(
            "SELECT id, fingerprint, weights_digest, program_digest, layout_digest, manifest "
            "FROM models"
        ):
            layouts[row[0]], models[row[0]] = read_manifest(row[5]), row[1]
            require(layout_digest(layouts[row[0]]) == row[4], "the layout digest")
            require(fingerprint(*row[2:5]) == row[1], "the fingerprint")
        spaces = {}
        for space_id, model_id, root, size, namespace, adapter in self._rows(
            "SELECT id, model_id, root_key, chunk_n_tokens, namespace, adapter FROM spaces"
        ):
            require(root_key(models[model_id], size, namespace, adapter) == root, "a root key")
            spaces[space_id] = root, size, layouts[model_id], codec_text(adapter) != ""
        if self._has_bases:
            self._verify_bases(spaces)
        for chunk in self._chunks("ORDER BY id"):
            self._verify_chunk(chunk, *spaces[chunk.space_id])
        for session in self.sessions():
            self._verify_head(session)

    def _verify_chunk(
        self, chunk: Chunk, root: bytes, size: int, layout: list[Tensor], is_lossy: bool
    ) -> None:
        require(chunk.has_its_key, "a chunk's key")
        require(chunk.start % size == 0 and chunk.stop - chunk.start <= size, "a chunk's slice")
        if chunk.parent_id is None:
            require(chunk.start == 0 and chunk.parent_key == root, "a first chunk's parent")
        else:
            parent = self._chunks("WHERE id = ?", chunk.parent_id)[0]
            require(parent.key == chunk.parent_key, "the parent's key")
            require(parent.stop == chunk.start, "the parent is not the chunk before")
            require(parent.space_id == chunk.space_id, "the parent is in another space")
        if chunk.base_id is not None:
            self._base(chunk)
        self.own_blobs(chunk, layout, is_lossy=is_lossy)
        sums = self._rows(
            "SELECT coalesce(sum(raw_nbytes), 0), coalesce(sum(stored_nbytes), 0) "
            "FROM blobs WHERE chunk_id = ?",
            chunk.id,
        )
        require(sums == [(chunk.raw_nbytes, chunk.stored_nbytes)], "a chunk's sums")

    def _verify_head(self, session: Session) -> None:
        if session.head_id is None:
            return
        head = self._chunks("WHERE id = ?", session.head_id)[0]
        require(head.space_id == session.space_id, "the head is in another space")
        require(head.stop <= session.n_tokens, "the head is behind the session's end")
        lineage = self.lineage(session)
        key, starts = session.root, range(0, head.stop, session.chunk_n_tokens)
        for start in starts:
            stop = min(start + session.chunk_n_tokens, head.stop)
            key = chunk_key(key, session.tokens[start:stop], extras_of(lineage, start, stop))
        require(key == head.key, "the head holds other tokens than the session")


def main(paths: list[str]) -> int:
    for path in paths:
        try:
            with Reader(Path(path)) as reader:
                reader.verify()
                for session in reader.sessions():
                    restored = reader.restore(session)
                    print(
                        f"{session.namespace!r} {session.name!r}: {restored.n_tokens} of "
                        f"{session.n_tokens} tokens, model {session.model.hex()[:12]}"
                    )
                    for position, digest in reader.lineage(session):
                        print(f"  edited from token {position} on: {digest.hex()}")
                    for tensor, data in zip(session.layout, restored.tensors, strict=True):
                        print(f"  {hashlib.sha256(data).hexdigest()}  {tensor.name}")
        except Refused as error:
            print(f"{path}: refused: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
