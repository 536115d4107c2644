"""Makes the vectors and the golden file of version 3: ``python tests/tools/make_vectors.py``.

What exists is left alone: a committed vector is what other readers were written
against, and never changes. A JSON file may gain entries; if an existing entry would
come out differently, that is an error. Review by eye what it makes, then commit it.
The vectors of version 1, and the databases of version 2, were made by earlier versions of this
script.
"""

from __future__ import annotations

import cmath
import hashlib
import itertools
import json
import operator
import random
import shutil
import sqlite3
import struct
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import zstandard

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import independent_reader  # noqa: E402
from fakes import (  # noqa: E402
    BytesCache,
    layout,
    naive_is_visible,
    naive_slot,
)
from independent_reader import Reader  # noqa: E402

import kvstore  # noqa: E402  # the checkout's own, found by the line above
from kvstore import Edit, Kind, Layout, codec  # noqa: E402
from kvstore.lineage import Lineage, pack_extras  # noqa: E402
from kvstore.manifest import pack_metadata  # noqa: E402
from kvstore.prefix import chunk_key  # noqa: E402
from kvstore.tokens import to_big_endian  # noqa: E402

V2 = ROOT / "schemas" / "vectors" / "v2"
VECTORS = ROOT / "schemas" / "vectors" / "v3"
GOLDEN = ROOT / "tests" / "golden"
CHUNK_N_TOKENS = 32
FIRST_MS = 1_700_000_000_000
METADATA = {
    "bytes": b"\x00\xff",
    "float": 0.5,
    "list": [1, -2, None, True],
    "map": {"a": {"b": "c"}},
    "text": "grüße",
}


class PatternCache(BytesCache):
    """As ``BytesCache``, but some roles compress: raw blobs and others occur in every file."""

    def truth(self, index: int, position: int) -> bytes:
        content = super().truth(index, position)
        is_plain = self.layout.tensors[index].role in {"k", "conv_state"}
        return content[:1] * len(content) if is_plain else content


def computed(
    cache_layout: Layout,
    tokens: list[int],
    *edits: tuple[int, int, str],
    weights: str = "weights",
) -> PatternCache:
    """A cache of ``tokens``; each edit ``(start, n_tokens, what)`` is made at that length."""
    cache = PatternCache(cache_layout, weights=weights)
    for start, n_tokens, what in edits:
        cache.compute(tokens[len(cache.tokens) : n_tokens])
        cache.edit(start, what)
    cache.compute(tokens[len(cache.tokens) :])
    return cache


def prompt(seed: int, n_tokens: int) -> list[int]:
    """Token ids that anyone can compute: a linear congruential sequence, one large id."""
    ids, state = [], seed
    for _ in range(n_tokens):
        state = (state * 1103515245 + 12345) % 2**31
        ids.append(state >> 16)
    if n_tokens > 5:
        ids[5] = 2**40 + seed
    return ids


@contextmanager
def fixed_clock() -> Iterator[None]:
    """Every look at the clock is one millisecond after the one before."""
    ticks = itertools.count(FIRST_MS)
    tick = lambda: next(ticks)  # noqa: E731
    with mock.patch("kvstore.clock.now_ms", tick):
        yield


# ---------------------------------------------------------------- keys.json


def item(offset: int, what: bytes, *, kind: int = 1, nbytes: int = 32) -> bytes:
    """An item of extras, right or wrong."""
    return struct.pack("<BII", kind, offset, nbytes) + what


def keys() -> dict[str, Any]:
    """Inputs and expected digests, as hex; extras that are accepted, and that are not."""
    first, second = bytes(range(32)), bytes(range(32, 64))
    lineages = [
        ([1, 2], 0, ()),
        ([1, 2], 0, (Edit(0, first),)),
        ([1, 2], 0, (Edit(1, first),)),
        ([1, 2], 0, (Edit(1, second),)),
        ([1, 2], 0, (Edit(0, first), Edit(1, second))),
        ([1, 2], 2**40, (Edit(2**40 - 1, first), Edit(2**40 + 1, second), Edit(2**40 + 2, first))),
        (list(range(256)), 256, (Edit(256, first), Edit(511, second))),
        ([1, 2], 0, (Edit(0, first), Edit(1, b""))),
        ([1, 2], 2, (Edit(0, first), Edit(2, b""), Edit(3, second))),
    ]
    one = item(1, first)
    rejected = {
        "cut_off_in_the_kind": one + one[:1],
        "cut_off_in_the_offset": one[:4],
        "cut_off_before_the_digest": one[:9],
        "cut_off_in_the_digest": one[:-1],
        "trailing_byte": one + b"\x00",
        "kind_0": item(1, first, kind=0),
        "kind_2": item(1, first, kind=2),
        "kind_2_behind_an_edit": one + item(2, first, kind=2),
        "digest_of_16_bytes": item(1, first[:16], nbytes=16),
        "digest_of_33_bytes": item(1, first + b"\x00", nbytes=33),
        "digest_of_4_gibibytes": item(1, first, nbytes=2**32 - 1),
        "offset_at_stop": item(4, first),
        "offset_of_32_bits": item(2**32 - 1, first),
        "offset_big_endian": b"\x01\x00\x00\x00\x01\x00\x00\x00\x20" + first,
        "out_of_order": item(2, first) + item(1, second),
        "two_at_one_offset": item(1, first) + item(1, second),
        "the_same_twice": one + one,
        "zeros": bytes(41),
    }
    return {
        "chunk_keys": [
            {
                "parent": bytes(32).hex(),
                "start": start,
                "tokens": ids,
                "tokens_column": to_big_endian(array("Q", ids)).hex(),
                "edits": as_json(lineage),
                "extras": (extras := pack_extras(lineage, start, start + len(ids))).hex(),
                "key": chunk_key(bytes(32), array("Q", ids), extras=extras).hex(),
            }
            for ids, start, lineage in lineages
        ],
        "rejected_extras": [
            {"name": name, "start": 8, "stop": 12, "extras": extras.hex()}
            for name, extras in rejected.items()
        ],
    }


# ---------------------------------------------------------------- blobs.json


def blobs() -> dict[str, list[dict[str, Any]]]:
    """Payloads of the codec that version 1 does not have."""
    plain, noise = bytes(100), random.Random(1).randbytes(100)
    frame = bytes(codec.Zstd().encode(memoryview(plain)))
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 20))

    def stored(*planes: tuple[int, bytes], k: int | None = None) -> bytes:
        headers = b"".join(struct.pack("<BI", how, len(body)) for how, body in planes)
        number = len(planes) if k is None else k
        return bytes([number]) + headers + b"".join(body for _, body in planes)

    def entry(name: str, payload: bytes, raw_nbytes: int, *planes: bytes) -> dict[str, Any]:
        decoded = bytes(byte for number in zip(*planes, strict=True) for byte in number)
        about = {"name": name, "codec": 2, "raw_nbytes": raw_nbytes, "stored": payload.hex()}
        return {**about, "decoded": decoded.hex()} if planes else about

    raw, packed = (0, noise), (1, frame)
    return {
        "accepted": [
            entry("planes_of_2", stored(raw, packed), 200, noise, plain),
            entry("planes_of_4", stored(raw, raw, raw, packed), 400, noise, noise, noise, plain),
            entry("planes_of_8", stored(*[raw, packed] * 4), 800, *[noise, plain] * 4),
            entry("planes_all_raw", stored(raw, (0, plain)), 200, noise, plain),
        ],
        "rejected": [
            entry("planes_empty", b"", 200),
            entry("planes_of_1", stored(raw), 100),
            entry("planes_of_3", stored(raw, raw, raw), 300),
            entry("planes_of_2_said_to_be_4", stored(raw, raw, k=4), 200),
            entry("planes_of_another_size", stored(raw, raw), 202),
            entry("planes_of_half_a_number", stored(raw, raw), 201),
            entry("planes_header_only", stored(raw, raw)[:11], 200),
            entry("planes_header_cut", stored(raw, raw)[:8], 200),
            entry("planes_truncated", stored(raw, raw)[:-1], 200),
            entry("planes_trailing_byte", stored(raw, raw) + b"\x00", 200),
            entry("planes_of_unequal_length", stored((0, noise[:99]), (0, noise + b"\x00")), 200),
            entry("planes_stored_otherwise", stored(raw, (2, noise)), 200),
            entry("planes_zstd_truncated", stored(raw, (1, frame[:-1])), 200),
            entry("planes_zstd_trailing_byte", stored(raw, (1, frame + b"\x00")), 200),
            entry("planes_zstd_bomb", stored(raw, (1, bomb)), 200),
            entry("planes_zstd_of_another_size", stored(packed, packed), 400),
        ],
    }


# ---------------------------------------------------------------- lossy.json


def gauss(seed: int, block: codec.Block, *, scale: float = 1.0) -> bytes:
    """Normally distributed numbers of the block's dtype; channels have means of their own."""
    generator = random.Random(seed)
    means = [generator.gauss(0, 3) for _ in range(block.n_channels)]
    floats = [
        scale * (means[channel] + generator.gauss(0, 1))
        for _ in range(block.n_tokens)
        for channel in range(block.n_channels)
    ]
    exact = struct.unpack(f"<{len(floats)}f", struct.pack(f"<{len(floats)}f", *floats))
    return independent_reader.from_floats(list(exact), block.dtype)


def lossy() -> dict[str, list[dict[str, Any]]]:
    """Payloads of lossy codecs, what they decode to, and what their checksum covers."""

    def block(dtype: str, n_tokens: int, *, start: int = 0, head_dim: int = 32) -> codec.Block:
        return codec.Block(
            dtype=dtype,
            start=start,
            n_tokens=n_tokens,
            n_channels=2 * head_dim,
            head_dim=head_dim,
        )

    def about(name: str, tag: int, one: codec.Block, stored: bytes) -> dict[str, Any]:
        where = {"dtype": one.dtype, "n_tokens": one.n_tokens, "n_channels": one.n_channels}
        return {"name": name, "codec": tag, **where, "stored": stored.hex()}

    def accepted(number: int, name: str, role: str, one: codec.Block, scale: float = 1.0) -> Any:
        data = memoryview(gauss(number, one, scale=scale))
        encoded = codec.encode(data, one, name, role)
        stored = bytes(encoded.stored)
        if encoded.is_fallback:
            raise SystemExit(f"{name}: not what it was to be")
        simple = independent_reader.Block(one.dtype, one.n_tokens, one.n_channels)
        decoded, checked = independent_reader.decode_lossy(encoded.tag, stored, simple)
        entry = about(f"{name}_{role}_{one.dtype}_{number}", encoded.tag, one, stored)
        return {**entry, "decoded": decoded.hex(), "checked": checked.hex()}

    cases: list[tuple[str, str, codec.Block, float]] = [
        ("half", "k", block("float32", 3), 1.0),
        ("half", "v", block("float32", 3), 1e6),
        ("half", "v", block("float32", 2), 1e-9),
    ]
    for dtype in ("float32", "float16", "bfloat16"):
        cases += [
            ("int8", "k", block(dtype, 3), 1.0),
            ("int8", "v", block(dtype, 1, start=7), 1e-3),
            ("int8-channel", "k", block(dtype, 70, head_dim=3), 1.0),
            ("int4", "k", block(dtype, 70, head_dim=3), 1.0),
            ("int4", "k", block(dtype, 16, start=4, head_dim=5), 1.0),
            ("int4", "v", block(dtype, 6), 1.0),
            ("int4", "v", block(dtype, 5, start=2), 100.0),
        ]
    one = block("float32", 4)
    (int8,) = (bytes(codec.encode(memoryview(gauss(1, one)), one, "int8", "k").stored),)
    int4 = bytes(codec.encode(memoryview(gauss(1, one)), one, "int4", "v").stored)
    late = block("float32", 6)
    int4_late = bytes(codec.encode(memoryview(gauss(1, late)), late, "int4", "v").stored)
    half = bytes([0, 1, 0, 0, 0, 0, 0, 0]) + bytes(2 * 4 * 64)
    rejected = {
        "empty": (4, one, b""),
        "head_cut": (4, one, int8[:7]),
        "head_only": (4, one, int8[:8]),
        "truncated": (4, one, int8[:-1]),
        "trailing_byte": (4, one, int8 + b"\x00"),
        "stored_otherwise": (4, one, b"\x03" + int8[1:]),
        "stored_as_itself": (4, one, b"\x04" + int8[1:]),
        "said_to_be_zstd": (4, one, b"\x01" + int8[1:]),
        "variant_0": (4, one, int8[:1] + b"\x00" + int8[2:]),
        "variant_3": (4, one, int8[:1] + b"\x03" + int8[2:]),
        "groups_of_0": (4, one, int8[:2] + b"\x00\x00" + int8[4:]),
        "groups_that_do_not_divide": (4, one, int8[:2] + b"\x1f\x00" + int8[4:]),
        "groups_of_another_size": (4, one, int8[:2] + b"\x10\x00" + int8[4:]),
        "int8_with_exact_tokens": (4, one, int8[:4] + b"\x01" + int8[5:]),
        "of_another_number_of_tokens": (4, late, int8),
        "int8_said_to_be_int4": (5, one, int8),
        "int4_more_exact_tokens_than_tokens": (
            *(5, late),
            int4_late[:4] + b"\x07" + int4_late[5:],
        ),
        "int4_exact_tokens_of_32_bits": (5, late, int4_late[:4] + b"\xff" * 4 + int4_late[8:]),
        "int4_groups_across_halves": (5, late, int4_late[:2] + b"\x40\x00" + int4_late[4:]),
        "half_of_variant_3": (3, one, half[:1] + b"\x03" + half[2:]),
        "half_with_groups": (3, one, half[:2] + b"\x01" + half[3:]),
        "half_with_exact_tokens": (3, one, half[:4] + b"\x01" + half[5:]),
        "half_truncated": (3, one, half[:-1]),
        "half_of_float16": (3, block("float16", 4), half),
        "int8_of_float64": (4, block("float64", 4), int8),
    }
    if not int4:
        raise SystemExit("int4: nothing was made")
    return {
        "accepted": [accepted(number, *case) for number, case in enumerate(cases)],
        "rejected": [about(name, *rest) for name, rest in rejected.items()],
    }


# ---------------------------------------------------------------- pca.json


def spoken(
    seed: int, block: codec.Block, *, pairing: int = 0, n_pairs: int = 0, scale: float = 1.0
) -> bytes:
    """Numbers whose channels go together; with a pairing turned by RoPE, theta 10000."""
    own = random.Random(f"pca {block.n_channels}")  # the tensor's: directions and means
    width, n_pairs = block.n_channels, n_pairs or block.head_dim // 2
    means = [own.gauss(0, 1) for _ in range(width)]
    ways = [[own.gauss(0, 1) * 0.6**rank for _ in range(width)] for rank in range(6)]
    generator = random.Random(seed)
    numbers: list[float] = []
    for token in range(block.n_tokens):
        amounts = [generator.gauss(0, 1) for _ in ways]
        one = [
            mean + 0.05 * generator.gauss(0, 1) + sum(map(operator.mul, amounts, along))
            for mean, *along in zip(means, *ways, strict=True)
        ]
        for head in range(0, width, block.head_dim) if pairing else ():
            for pair in range(n_pairs):
                a, b = (2 * pair, 2 * pair + 1) if pairing == 1 else (pair, pair + n_pairs)
                a, b = head + a, head + b
                angle = (block.start + token) * 10000 ** (-pair / n_pairs)
                turned = complex(one[a], one[b]) * cmath.exp(1j * angle)
                one[a], one[b] = turned.real, turned.imag
        numbers += [scale * number for number in one]
    exact = struct.unpack(f"<{len(numbers)}f", struct.pack(f"<{len(numbers)}f", *numbers))
    return independent_reader.from_floats(list(exact), block.dtype)


PCA_BASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "no_rotation": ("v", 16, {}),
    "neighbours": ("k", 16, {"pairing": 1}),
    "halves": ("k", 16, {"pairing": 2}),
    "half_of_a_head": ("k", 24, {"pairing": 2, "n_pairs": 6}),
}
"""Role, head_dim, and how keys are turned; learned from 400 tokens of 2 heads."""


def pca(old: dict[str, Any]) -> dict[str, Any]:
    """Bases, payloads that need them, what they decode to, and what their checksum covers.

    What was learned is a library's business and may differ from machine to machine, so bases
    that are there (``old``) are used again, and entries that are there are only checked.
    """

    def block(head_dim: int, n_tokens: int, start: int = 4, dtype: str = "float32") -> codec.Block:
        return codec.Block(
            *(),
            dtype=dtype,
            start=start,
            n_tokens=n_tokens,
            n_channels=2 * head_dim,
            head_dim=head_dim,
        )

    bases: dict[str, dict[str, Any]] = {}
    for name, (role, head_dim, how) in PCA_BASES.items():
        one = block(head_dim, 400)
        learned = codec.Basis.train(memoryview(spoken(1, one, **how)), one, role=role)
        if learned is None or (learned.rotation is None) != (role == "v"):
            raise SystemExit(f"{name}: not what was to be learned")
        bases[name] = {
            "n_channels": one.n_channels,
            "data": learned.to_bytes().hex(),
            "digest": learned.digest.hex(),
        }
    bases = old.get("bases", bases)
    known = {
        name: codec.Basis.from_bytes(memoryview(bytes.fromhex(one["data"])), one["n_channels"])
        for name, one in bases.items()
    }

    def about(name: str, basis: str, one: codec.Block, stored: bytes) -> dict[str, Any]:
        return {
            "name": name,
            "basis": basis,
            "dtype": one.dtype,
            "start": one.start,
            "n_tokens": one.n_tokens,
            "n_channels": one.n_channels,
            "head_dim": one.head_dim,
            "stored": stored.hex(),
        }

    def stored_of(basis: str, one: codec.Block, scale: float = 1.0) -> bytes:
        role, _, how = PCA_BASES[basis]
        data = memoryview(spoken(2, one, scale=scale, **how))
        encoded = codec.encode(data, one, "pca", role, known[basis])
        if encoded.is_fallback:
            raise SystemExit(f"{basis}, {one}, {scale}: not what it was to be")
        return bytes(encoded.stored)

    def accepted(name: str, basis: str, one: codec.Block, scale: float = 1.0) -> dict[str, Any]:
        before = {entry["name"]: entry for entry in old.get("accepted", [])}
        stored = stored_of(basis, one, scale)
        if name in before:
            stored = bytes.fromhex(before[name]["stored"])
        simple = independent_reader.Block(
            one.dtype, one.n_tokens, one.n_channels, one.start, one.head_dim
        )
        read = independent_reader.read_basis(bytes.fromhex(bases[basis]["data"]), one.n_channels)
        decoded, checked = independent_reader.decode_lossy(6, stored, simple, {read.digest: read})
        entry = about(name, basis, one, stored)
        return {**entry, "decoded": decoded.hex(), "checked": checked.hex()}

    cases = {
        f"{basis}_{dtype}": (basis, block(head_dim, 9, 256, dtype))
        for basis, (_, head_dim, _) in PCA_BASES.items()
        for dtype in ("float32", "float16", "bfloat16")
    }
    cases["from_the_start"] = ("neighbours", block(16, 11, 0))
    cases["within_the_first_tokens"] = ("halves", block(16, 6, 3))
    cases["far_away"] = ("neighbours", block(16, 5, 2**31 - 3))
    entries = [accepted(name, *case) for name, case in cases.items()]
    entries.append(accepted("large", "no_rotation", block(16, 6, 8), 2.0))
    entries.append(accepted("wide_codes", "no_rotation", block(16, 6, 8), 200.0))
    entries.append(accepted("wide_codes_turned", "neighbours", block(16, 6, 8), 500.0))
    entries.append(accepted("many_tokens", "neighbours", block(16, 300, 8), 1.0))

    if old:  # made from what another machine learned and encoded
        return {**old, "accepted": entries}

    one = block(16, 9, 256)
    good = stored_of("neighbours", one)
    basis = bytes.fromhex(bases["neighbours"]["data"])
    plain = independent_reader.decode(basis[22], basis[23:], _rest_nbytes(basis))
    flat = basis[:22] + b"\x00" + plain
    large = bytes(4 * 80) + b"\x05" * 80 + b"\xff" * 80 * 80 + b"\x7f" * 80 * 80
    too_large = struct.pack("<BBhHHHH5HB", 1, 0, 4, 80, 80, 0, 0, 0, 0, 0, 0, 80, 1)
    too_large += zstandard.ZstdCompressor(level=1).compress(large)
    wrong_bases = {
        "empty": b"",
        "head_only": basis[:22],
        "truncated": basis[:-1],
        "trailing_byte": flat + b"\x00",
        "version_2": b"\x02" + basis[1:],
        "pairing_3": basis[:1] + b"\x03" + basis[2:],
        "pairing_of_none": basis[:1] + b"\x00" + basis[2:],
        "exponent_too_large": basis[:2] + struct.pack("<h", 113) + basis[4:],
        "exponent_too_small": basis[:2] + struct.pack("<h", -65) + basis[4:],
        "of_other_numbers": basis[:4] + struct.pack("<H", 64) + basis[6:],
        "more_axes_than_numbers": basis[:6] + struct.pack("<H", 33) + basis[8:],
        "fewer_axes_than_rows": basis[:6] + struct.pack("<H", 31) + basis[8:],
        "no_heads": basis[:8] + struct.pack("<H", 0) + basis[10:],
        "heads_that_do_not_divide": basis[:8] + struct.pack("<H", 20) + basis[10:],
        "more_pairs_than_a_head_has": basis[:10] + struct.pack("<H", 9) + basis[12:],
        "stored_otherwise": basis[:22] + b"\x02" + basis[23:],
        "packing_0": flat[: 23 + 4 * 32 + 64] + b"\x00" + flat[24 + 4 * 32 + 64 :],
        "too_large": too_large,
    }
    wrong = {
        "empty": (one, b""),
        "head_cut": (one, good[:33]),
        "head_only": (one, good[:34]),
        "truncated": (one, good[:-1]),
        "trailing_byte": (one, good + b"\x00"),
        "stored_otherwise": (one, b"\x03" + good[1:]),
        "variant_2": (one, good[:1] + b"\x02" + good[2:]),
        "groups": (one, good[:2] + b"\x01" + good[3:]),
        "more_exact_tokens_than_tokens": (one, good[:4] + b"\x0a" + good[5:]),
        "exact_tokens_of_32_bits": (one, good[:4] + b"\xff" * 4 + good[8:]),
        "another_basis": (one, good[:8] + bytes(16) + good[24:]),
        "more_rows_than_axes": (one, good[:24] + b"\xff\xff" * 5 + good[34:]),
        "rows_of_another_packing": (one, good[:24] + good[26:34] + good[24:26] + good[34:]),
        "of_another_number_of_tokens": (block(16, 10, 256), good),
        "of_other_heads": (block(16, 9, 256, "float32"), good),
        "of_float64": (block(16, 9, 256, "float64"), good),
    }
    wrong["of_other_heads"] = (
        codec.Block(dtype="float32", start=256, n_tokens=9, n_channels=32, head_dim=8),
        good,
    )
    digits = bytes([0, 1]) + bytes(6) + bytes.fromhex(bases["neighbours"]["digest"])
    digits += struct.pack("<5H", 1, 0, 0, 0, 0) + b"\x01" + bytes(31)
    wrong["byte_that_is_no_sum"] = (one, digits + b"\xf3\x00")
    wrong["packing_6"] = (one, digits[:34] + b"\x06" + bytes(31) + b"\x79\x79")
    for packing, row in ((4, b"\x80" + bytes(8)), (5, bytes(9) + b"\x80" + bytes(8))):
        counts = struct.pack("<5H", *(1 if one == packing else 0 for one in range(1, 6)))
        least = digits[:24] + counts + bytes([packing]) + bytes(31) + row
        wrong[f"least_of_packing_{packing}"] = (one, least)
    return {
        "bases": bases,
        "accepted": entries,
        "rejected": [about(name, "neighbours", *rest) for name, rest in wrong.items()],
        "rejected_bases": [
            {"name": name, "n_channels": 80 if name == "too_large" else 32, "data": data.hex()}
            for name, data in wrong_bases.items()
        ],
    }


def _rest_nbytes(basis: bytes) -> int:
    _, _, _, c, k, _, n_pairs, *counts = struct.unpack("<BBhHHHH5H", basis[:22])
    sizes = independent_reader.packed_sizes(tuple(counts), c)
    return 4 * c + 8 * n_pairs + k + sum(sizes)


def as_json(lineage: Lineage) -> list[dict[str, Any]]:
    return [{"start": edit.start, "digest": edit.digest.hex()} for edit in lineage]


# ---------------------------------------------------------------- databases

SMALL = layout(n_layers=1, capacity_n_tokens=96, n_kv_heads=1, head_dim=2)


def make_small(path: Path) -> None:
    """Sessions that share a chunk and much of the next; two are exact, three edited there."""
    shared = prompt(1, 52)
    with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        for name, end, *edits in (
            ("a", [1, 2, 3]),
            ("b", [7, 8]),
            ("edited", [4, 5, 6], (40, 52, "struck")),
            ("edited twice", [1, 2, 3], (36, 44, "struck"), (48, 52, "set")),
            ("edited at the border", [1, 2, 3], (32, 52, "struck")),
        ):
            ids = [*shared, *end]
            cache = computed(SMALL, ids, *edits)
            store.save_session(cache, ids, name=name, metadata=METADATA)


def make_turns(path: Path) -> None:
    """A conversation saved turn by turn (tails borrow), one of them edited on the way, others."""
    one = layout()
    ids = prompt(2, 100)
    with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        cache = PatternCache(one)
        for stop in (20, 24, 50, 60, 100):
            cache.compute(ids[len(cache.tokens) : stop])
            store.save_session(cache, ids[:stop], name="turns", metadata={"stop": stop})
            if stop == 60:
                store.save_session(cache, ids[:56], name="turns: what if")
        cache = PatternCache(one)
        for stop in (20, 50, 60, 100):
            cache.compute(ids[len(cache.tokens) : stop])
            if stop in (50, 60):
                cache.edit(stop - 8, "struck")
            store.save_session(cache, ids[:stop], name="edited turns", metadata={"stop": stop})
        other = ids[:90] + prompt(3, 6)
        store.save_session(computed(one, other), other, name="other ending")
        unnamed = prompt(4, 40)
        store.save_session(computed(one, unnamed), unnamed)


PCA_LAYOUT = layout(n_layers=1, capacity_n_tokens=256, n_kv_heads=1, head_dim=16)


def make_pca(path: Path) -> None:
    """A conversation that begins before there are bases, goes on with them and after a restore."""
    ids = prompt(41, 250)
    cache = BytesCache(PCA_LAYOUT)

    def save(name: str, n_tokens: int, *, text: str = "pca") -> None:
        for index, spec in enumerate(PCA_LAYOUT.tensors):
            one = codec.block_of(spec, 0, n_tokens)
            numbers = spoken(index, one, pairing=2 if spec.role == "k" else 0)
            cache.buffer(index)[: len(numbers)] = numbers
        cache.adopt(ids[:n_tokens])
        with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS, codec=text) as store:
            store.save_session(cache, cache.tokens, name=name)

    with mock.patch("kvstore.training.MIN_TRAINING_N_TOKENS", 192):
        save("exact", 40, text="exact")
        save("short", 70)
        save("chat", 230)
        save("keys alone", 230, text="k=pca,v=int8")
        with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS, codec="pca") as store:
            again = BytesCache(PCA_LAYOUT)
            store.load_session(again, ids[:201])
            again.compute(ids[200:250])
            store.save_session(again, again.tokens, name="continued")


def describe_pca(path: Path) -> dict[str, Any]:
    """What a load of each session by name gives; the same as the second reader reads."""
    described = []
    with (
        kvstore.open(path, read_only=True, chunk_n_tokens=CHUNK_N_TOKENS) as store,
        Reader(path) as reader,
    ):
        for session in reader.sessions():
            cache = BytesCache(PCA_LAYOUT)
            hit = store.load_session(cache, name=session.name)
            tensors = [
                bytes(cache.buffer(index)[: hit.n_tokens * spec.slot_nbytes])
                for index, spec in enumerate(PCA_LAYOUT.tensors)
            ]
            if reader.restore(session, hit.n_tokens).tensors != tensors:
                raise SystemExit(f"{session.name}: the two readers differ")
            described.append(
                {
                    "name": session.name,
                    "codec": independent_reader.codec_text(session.adapter) or "exact",
                    "tokens": list(hit.tokens),
                    "n_tokens": hit.n_tokens,
                    "tensors": [hashlib.sha256(data).hexdigest() for data in tensors],
                }
            )
    return {"sessions": described}


def make_newer_readable(path: Path) -> None:
    """What a later version may look like to this one: additions, and permission to read."""
    make_small(path)
    sql(
        "CREATE TABLE pins (session_id INTEGER PRIMARY KEY)",
        "UPDATE format SET version = 4, min_reader = 3",
        "PRAGMA user_version = 4",
    )(path)


def make_empty(path: Path) -> None:
    kvstore.open(path).close()


ACCEPTED: dict[str, Callable[[Path], None]] = {
    "empty": make_empty,
    "newer_readable": make_newer_readable,
    "small": make_small,
}


def sql(*statements: str) -> Callable[[Path], None]:
    """A change of a file that SQLite itself would not let pass as data."""

    def change(path: Path) -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("PRAGMA foreign_keys = OFF")
            connection.execute("PRAGMA ignore_check_constraints = ON")
            for statement in statements:
                connection.execute(statement).fetchall()
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            connection.close()

    return change


def of_version_2(path: Path) -> None:
    """``empty`` of version 2, whose header says that it is of version 3."""
    packed = V2 / "databases" / "accepted" / "empty.db.zst"
    path.write_bytes(zstandard.ZstdDecompressor().decompress(packed.read_bytes()))
    sql(
        "UPDATE format SET version = 3, min_writer = 3",
        "UPDATE alembic_version SET version_num = '0003'",
        "PRAGMA user_version = 3",
    )(path)


_TRIGGER = "CREATE TRIGGER t AFTER INSERT ON chunks BEGIN DELETE FROM payloads; END"

# Changed copies of ``empty``, with the error that kvstore raises.
AT_OPENING: dict[str, tuple[Callable[[Path], None], str]] = {
    "newer_version": (
        sql("UPDATE format SET version = 4, min_reader = 4", "PRAGMA user_version = 4"),
        "NewerFormatError",
    ),
    "newer_version_without_its_row": (sql("PRAGMA user_version = 4"), "NewerFormatError"),
    "newer_readable_with_trigger": (
        sql(_TRIGGER, "UPDATE format SET version = 4", "PRAGMA user_version = 4"),
        "SchemaMismatchError",
    ),
    "newer_readable_without_bases": (
        sql("DROP TABLE bases", "UPDATE format SET version = 4", "PRAGMA user_version = 4"),
        "SchemaMismatchError",
    ),
    "older_version": (
        sql("UPDATE format SET version = 2", "PRAGMA user_version = 2"),
        "SchemaMismatchError",
    ),
    "schema_of_version_2": (of_version_2, "SchemaMismatchError"),
    "bases_without_their_rule": (
        sql(
            "DROP TABLE bases",
            "CREATE TABLE bases (id INTEGER NOT NULL PRIMARY KEY, space_id INTEGER NOT NULL "
            "REFERENCES spaces (id) ON DELETE RESTRICT, tensor INTEGER NOT NULL, "
            "digest BLOB NOT NULL, data BLOB NOT NULL, UNIQUE (space_id, tensor))",
        ),
        "SchemaMismatchError",
    ),
    "format_row_missing": (sql("DELETE FROM format"), "SchemaMismatchError"),
    "format_row_of_version_2": (sql("UPDATE format SET version = 2"), "SchemaMismatchError"),
    "extra_trigger": (sql(_TRIGGER), "SchemaMismatchError"),
    "missing_table": (sql("DROP TABLE bases"), "SchemaMismatchError"),
}


_ONE, _OTHER = (
    f"(SELECT id FROM bases WHERE tensor = {tensor} AND space_id = "
    "(SELECT space_id FROM sessions WHERE name = 'chat'))"
    for tensor in (0, 1)
)
_HERE = f"WHERE id = {_ONE}"

# Changed copies of ``pca``.
OF_BASES: dict[str, Callable[[Path], None]] = {
    "basis_missing": sql(f"DELETE FROM bases {_HERE}"),
    "basis_of_another_digest": sql(f"UPDATE bases SET digest = zeroblob(16) {_HERE}"),
    "basis_of_other_bytes": sql(
        f"UPDATE bases SET data = CAST(substr(data, 1, 60) || x'55aa' || substr(data, 63) AS BLOB) "
        f"{_HERE}"
    ),
    "basis_cut_off": sql(f"UPDATE bases SET data = substr(data, 1, length(data) - 1) {_HERE}"),
    "basis_is_text": sql(f"UPDATE bases SET data = CAST(data AS TEXT) {_HERE}"),
    "basis_of_another_tensor": sql(
        f"UPDATE bases SET (digest, data) = (SELECT digest, data FROM bases WHERE id = {_OTHER}) "
        f"{_HERE}"
    ),
    "basis_of_no_tensor": sql(f"UPDATE bases SET tensor = 2 {_HERE}"),
    "basis_where_all_is_exact": sql(
        "INSERT INTO bases (space_id, tensor, digest, data) SELECT s.space_id, 0, digest, data "
        f"FROM bases b, sessions s WHERE b.id = {_ONE} AND s.name = 'exact'"
    ),
}


def describe(path: Path) -> dict[str, Any]:
    """What a reader finds: every session with its tokens, its edits and its tensors' bytes."""
    caches = {
        cache.fingerprint.model: cache
        for weights in ("weights", "others")
        for one in (SMALL, layout())
        for cache in [PatternCache(one, weights=weights)]
    }
    with kvstore.open(path, read_only=True) as store:
        n_stored = {info.name: info.n_stored_tokens for info in store.sessions()}
    with Reader(path) as reader:
        found = [(session, reader.lineage(session)) for session in reader.sessions()]
    described = []
    for session, edits in found:
        template, ids = caches[session.model], session.tokens
        lineage = tuple(Edit(*edit) for edit in edits)
        with_bytes = path.stem == "small"
        n_tokens = n_stored[session.name]
        entry = {
            "namespace": session.namespace,
            "name": session.name,
            "model": session.model.hex(),
            "chunk_n_tokens": session.chunk_n_tokens,
            "tokens": ids,
            "edits": as_json(lineage),
            "n_stored_tokens": n_tokens,
            "metadata": pack_metadata(session.metadata).hex(),
            "tensors": tensors_after(template, ids, lineage, n_tokens, with_bytes=with_bytes),
        }
        if not template.layout.is_full:
            # [i] for a limit of i + 1 tokens.
            restored = [
                restored_n_tokens(path, template, ids[:limit], lineage)
                for limit in range(1, len(ids) + 1)
            ]
            entry["restored_n_tokens"] = restored
            entry["lengths"] = [
                {"n_tokens": length, "tensors": tensors_after(template, ids, lineage, length)}
                for length in some_of(sorted(set(restored) - {0}))
            ]
        if lineage:
            n_exact = restored_n_tokens(path, template, ids, ())
            tensors = tensors_after(template, ids, (), n_exact, with_bytes=with_bytes)
            entry["exact"] = {"n_tokens": n_exact, "tensors": tensors}
        described.append(entry)
    return {"sessions": described}


def some_of(lengths: list[int]) -> list[int]:
    """A few of them, the first and the last among them."""
    return sorted({*lengths[:: len(lengths) // 6 + 1], *lengths[-1:]})


def restored_n_tokens(path: Path, template: PatternCache, ids: list[int], lineage: Lineage) -> int:
    """How many tokens are restored when all of ``ids`` may be."""
    has_logits = any(spec.role == "logits" for spec in template.layout.tensors)
    cache = PatternCache(template.layout)
    cache.fingerprint = template.fingerprint
    with kvstore.open(path, read_only=True, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        hit = store.load_session(cache, ids if has_logits else [*ids, 2**62], edits=lineage)
    if cache.wrong():
        raise SystemExit(f"{path.name}: {cache.wrong()}")
    return hit.n_tokens


def tensors_after(
    template: PatternCache,
    ids: list[int],
    lineage: Lineage,
    n_tokens: int,
    *,
    with_bytes: bool = False,
) -> list[dict[str, str]]:
    """What each tensor needs for the next token to see ``n_tokens`` of ``ids`` and ``lineage``.

    Computed afresh, not read back: the vector says what must be there.
    """
    cache = PatternCache(template.layout)
    cache.fingerprint = template.fingerprint
    cache.adopt(ids, lineage)
    return [
        {
            "name": spec.name,
            "sha256": hashlib.sha256(content(cache, index, n_tokens)).hexdigest(),
            **({"bytes": content(cache, index, n_tokens).hex()} if with_bytes else {}),
        }
        for index, spec in enumerate(cache.layout.tensors)
    ]


def content(cache: PatternCache, index: int, n_tokens: int) -> bytes:
    """Token-major bytes of the positions that count, in order; all of a positions tensor."""
    spec = cache.layout.tensors[index]
    if spec.kind is Kind.CHECKPOINT:
        return cache.truth(index, n_tokens - 1) if n_tokens else b""
    seen = [
        position for position in range(n_tokens) if naive_is_visible(spec, position, query=n_tokens)
    ]
    if spec.kind is Kind.POSITIONS:
        slots = [-1] * spec.capacity_n_tokens
        for position in seen:
            slots[naive_slot(spec, position)] = position
        return struct.pack(f"<{len(slots)}q", *slots)
    return b"".join(cache.truth(index, position) for position in seen)


def put(path: Path, data: bytes) -> None:
    """Write a vector, unless it is there already."""
    if path.exists():
        print(f"kept     {path.relative_to(ROOT)}", file=sys.stderr)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    print(f"written  {path.relative_to(ROOT)} ({len(data)} bytes)", file=sys.stderr)


def put_json(path: Path, value: Any) -> None:
    """Write a JSON file, or add to the one that is there what it lacks."""
    data = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
    if path.exists() and path.read_bytes() != data:
        check_adds_only(json.loads(path.read_text(encoding="utf-8")), value, str(path))
        path.unlink()
    put(path, data)


def check_adds_only(old: Any, new: Any, where: str) -> None:
    """Exit unless ``new`` is ``old`` with more keys, or more items at a list's end."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() <= new.keys():
        for key, value in old.items():
            check_adds_only(value, new[key], f"{where}: {key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) <= len(new):
        for number, value in enumerate(old):
            check_adds_only(value, new[number], f"{where}: {number}")
    elif old != new:
        raise SystemExit(f"{where}: is {old!r}, would become {new!r}; a vector never changes")


def put_database(path: Path, database: Path) -> None:
    packed = zstandard.ZstdCompressor(level=19).compress(database.read_bytes())
    put(path, packed)


def vacuumed(path: Path) -> None:
    """Free pages may hold anything; none of it belongs into a vector."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA incremental_vacuum").fetchall()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()


def put_rejected(
    database: Path, base: Path, change: Callable[[Path], None], *, folder: str = "rejected"
) -> Path:
    """Store a changed copy of ``base`` as a vector; returns the copy."""
    shutil.copy(base, database)
    change(database)
    put_database(VECTORS / "databases" / folder / f"{database.stem}.db.zst", database)
    return database


def main() -> None:
    put_json(V2 / "keys.json", keys())
    put_json(V2 / "blobs.json", blobs())
    put_json(V2 / "lossy.json", lossy())
    path = VECTORS / "pca.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    put_json(path, pca(old))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        described: dict[str, Any] = {}
        for name, make in ACCEPTED.items():
            database = work / f"{name}.db"
            with fixed_clock():
                make(database)
            vacuumed(database)
            described[name] = describe(database)
            put_json(VECTORS / "databases" / "accepted" / f"{name}.json", described[name])
            put_database(VECTORS / "databases" / "accepted" / f"{name}.db.zst", database)
        expected: dict[str, Any] = {}
        rejected = work / "rejected"
        rejected.mkdir()
        for name, (change, error) in AT_OPENING.items():
            put_rejected(rejected / f"{name}.db", work / "empty.db", change)
            expected[name] = {"found_by": "opening", "error": error}
        put_json(VECTORS / "databases" / "rejected" / "expected.json", expected)
        database = work / "pca.db"
        packed = VECTORS / "databases" / "pca.db.zst"
        if packed.exists():  # what is learned is not the same to the bit on every machine
            database.write_bytes(zstandard.ZstdDecompressor().decompress(packed.read_bytes()))
        else:
            with fixed_clock():
                make_pca(database)
            vacuumed(database)
        put_json(VECTORS / "databases" / "pca.json", describe_pca(database))
        put_database(packed, database)
        expected = {}
        for name, change in OF_BASES.items():
            changed = work / f"{name}.db"
            put_rejected(changed, database, change, folder="rejected_bases")
            cache = BytesCache(PCA_LAYOUT)
            with kvstore.open(changed, read_only=True, chunk_n_tokens=CHUNK_N_TOKENS) as store:
                print(name, store.verify().problems[:1], file=sys.stderr)
                hit = store.load_session(cache, name="chat")
            expected[name] = {"session": "chat", "n_tokens": hit.n_tokens}
        put_json(VECTORS / "databases" / "rejected_bases" / "expected.json", expected)
        # The golden file of this version: one that has a bit of everything.
        database = work / "turns.db"
        with fixed_clock():
            make_turns(database)
        vacuumed(database)
        put_database(GOLDEN / "v3.db.zst", database)
        put_json(GOLDEN / "v3.json", describe(database))


if __name__ == "__main__":
    main()
