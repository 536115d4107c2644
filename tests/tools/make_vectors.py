"""Makes the vectors and the golden file of version 2: ``python tests/tools/make_vectors.py``.

What exists is left alone: a committed vector is what other readers were written
against, and never changes. A JSON file may gain entries; if an existing entry would
come out differently, that is an error. Review by eye what it makes, then commit it.
The vectors of version 1 were made by an earlier version of this script.
"""

from __future__ import annotations

import hashlib
import itertools
import json
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
    checkpoint_tensors,
    digest,
    layout,
    logits_tensor,
    naive_is_visible,
    naive_slot,
    ring_tensors,
)
from independent_reader import Reader  # noqa: E402

import kvstore  # noqa: E402  # the checkout's own, found by the line above
from kvstore import Edit, Kind, Layout, TensorSpec, codec  # noqa: E402
from kvstore.checksum import blob_checksum  # noqa: E402
from kvstore.lineage import Lineage, pack_extras  # noqa: E402
from kvstore.manifest import pack_metadata  # noqa: E402
from kvstore.prefix import chunk_key  # noqa: E402
from kvstore.tokens import from_big_endian, to_big_endian  # noqa: E402

V1 = ROOT / "schemas" / "vectors" / "v1"
VECTORS = ROOT / "schemas" / "vectors" / "v2"
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


def with_full(*tensors: TensorSpec) -> Layout:
    """A full layer, then ``tensors``."""
    return Layout(tensors=(*layout(n_layers=1).tensors, *tensors))


RING = with_full(*ring_tensors(layer=1, window_n_tokens=8))
RECURRENT = with_full(*checkpoint_tensors(layer=1), logits_tensor())


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


def make_edited(path: Path) -> None:
    """Edits at every place where they can be, beside the same tokens as they are and alone."""
    ids, alone = prompt(21, 70), prompt(22, 50)
    with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS) as store:

        def save(name: str, *edits: tuple[int, int, str], n_tokens: int = 70) -> None:
            cache = computed(SMALL, ids[:n_tokens], *edits)
            store.save_session(cache, cache.tokens, name=name)

        save("exact")
        save("in the middle", (45, 60, "struck"))
        save("another edit there", (45, 60, "set"))
        save("in one chunk", (40, 50, "struck"), (52, 60, "set"))
        save("in three chunks", (31, 35, "struck"), (45, 60, "struck"), (69, 70, "set"))
        save("the last replaces those behind it", (50, 60, "struck"), (45, 70, "struck"))
        save("at a border", (32, 40, "struck"))
        save("from the start", (0, 70, "struck"))
        save("of the last token", (63, 64, "struck"), n_tokens=64)
        cache = computed(SMALL, ids[:50], (41, 50, "grown"))
        for stop in (50, 54, 66, 70):
            cache.compute(ids[len(cache.tokens) : stop])
            store.save_session(cache, ids[:stop], name="grown", metadata={"stop": stop})
        store.save_session(computed(SMALL, alone, (40, 50, "struck")), alone, name="alone")
        gone = computed(SMALL, alone, (40, 50, "struck"), weights="others")
        store.save_session(gone, alone, name="lost everything")
        store.prune(model=gone.fingerprint.model)


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


def save_turns(store: kvstore.Store, cache: PatternCache, ids: list[int], *stops: int) -> None:
    """Compute ``ids`` turn by turn, and save after each, as a chat does."""
    name = "edited turns" if cache.edits else "turns"
    for stop in stops:
        cache.compute(ids[len(cache.tokens) : stop])
        store.save_session(cache, ids[:stop], name=name, metadata={"stop": stop})


def make_edited_ring(path: Path) -> None:
    """A ring of 16 slots behind a full layer; edits before the window, and within it."""
    ids = prompt(23, 80)
    with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        save_turns(store, PatternCache(RING), ids, 5, 20, 60, 80)
        save_turns(store, computed(RING, ids[:60], (40, 60, "struck")), ids, 60, 70, 80)
        within = computed(RING, ids[:64], (58, 60, "struck"))
        store.save_session(within, ids[:64], name="within the window")


def make_edited_recurrent(path: Path) -> None:
    """Recurrent state and the last logits, before an edit and behind it."""
    ids = prompt(24, 70)
    with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS, checkpoint_n_tokens=8) as store:
        save_turns(store, PatternCache(RECURRENT), ids, 10, 33, 45, 70)
        save_turns(store, computed(RECURRENT, ids[:50], (45, 50, "struck")), ids, 50, 64, 70)


LOSSY_LAYOUT = layout(n_layers=2, capacity_n_tokens=96, n_kv_heads=2, head_dim=32)


def make_lossy(path: Path) -> None:
    """One conversation as each codec writes it, and two that went on after a restore."""
    ids = prompt(31, 90)

    def filled(n_tokens: int) -> BytesCache:
        cache = BytesCache(LOSSY_LAYOUT)
        cache.compute(ids[:n_tokens])
        for index, spec in enumerate(LOSSY_LAYOUT.tensors):
            one = codec.block_of(spec, 0, n_tokens)
            cache.buffer(index)[: n_tokens * spec.slot_nbytes] = gauss(index, one)
        return cache

    with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        store.save_session(computed(LOSSY_LAYOUT, prompt(32, 40)), prompt(32, 40), name="exact")
    for name in ("half", "int8", "int4", "k=int8-channel,v=int4", "0=exact,1=int8"):
        with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS, codec=name) as store:
            store.save_session(filled(80), ids[:80], name=name)
            if name in ("int8", "int4"):
                cache = BytesCache(LOSSY_LAYOUT)
                store.load_session(cache, ids[:71])
                cache.compute(ids[70:90])
                store.save_session(cache, ids, name=f"{name}, continued")
    with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        cache = BytesCache(LOSSY_LAYOUT)
        store.load_session(cache, name="int8")
        store.save_session(cache, cache.tokens, name="exact copy of int8")


def describe_lossy(path: Path) -> dict[str, Any]:
    """What a load of each session by name gives; the same as the second reader reads."""
    described = []
    with kvstore.open(path, read_only=True, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        for info in sorted(store.sessions(), key=lambda one: one.id):
            cache = BytesCache(LOSSY_LAYOUT)
            hit = store.load_session(cache, name=info.name)
            tensors = [
                bytes(cache.buffer(index)[: hit.n_tokens * spec.slot_nbytes])
                for index, spec in enumerate(LOSSY_LAYOUT.tensors)
            ]
            with Reader(path) as reader:
                (session,) = (one for one in reader.sessions() if one.name == info.name)
                if reader.restore(session, hit.n_tokens).tensors != tensors:
                    raise SystemExit(f"{info.name}: the two readers differ")
            described.append(
                {
                    "name": info.name,
                    "codec": info.codec,
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
        "UPDATE format SET version = 3",
        "PRAGMA user_version = 3",
    )(path)


def make_empty(path: Path) -> None:
    kvstore.open(path).close()


ACCEPTED: dict[str, Callable[[Path], None]] = {
    "edited": make_edited,
    "edited_recurrent": make_edited_recurrent,
    "edited_ring": make_edited_ring,
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


def changed(session: str, change: Callable[[sqlite3.Connection, int], None]) -> Any:
    """A change of the last chunk of a session, whose row id is given."""

    def apply(path: Path) -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            change(connection, head_of(connection, session))
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            connection.close()

    return apply


def head(session: str) -> str:
    """The row id of a session's last chunk, in SQL."""
    return f"(SELECT head_id FROM sessions WHERE name = '{session}')"


def head_of(connection: sqlite3.Connection, session: str) -> int:
    return int(connection.execute(f"SELECT {head(session)}").fetchone()[0])


def extras(value: bytes, *, session: str = "edited") -> Callable[[Path], None]:
    """Other extras of a session's last chunk; its key and checksums are what they then must be."""

    def change(connection: sqlite3.Connection, chunk_id: int) -> None:
        parent_key, tokens = connection.execute(
            "SELECT parent_key, tokens FROM chunks WHERE id = ?", (chunk_id,)
        ).fetchone()
        key = chunk_key(parent_key, from_big_endian(tokens), extras=value)
        connection.execute(
            "UPDATE chunks SET extras = ?, key = ? WHERE id = ?", (value, key, chunk_id)
        )
        for tensor, start, stop, tag, raw_nbytes, data in connection.execute(
            "SELECT b.tensor, b.start, b.stop, b.codec, b.raw_nbytes, p.data FROM blobs b "
            "JOIN payloads p ON p.id = b.payload_id WHERE b.chunk_id = ?",
            (chunk_id,),
        ).fetchall():
            decoded = memoryview(bytearray(raw_nbytes))
            codec.decode_exact_into(tag, memoryview(data), decoded)
            connection.execute(
                "UPDATE blobs SET checksum = ? WHERE chunk_id = ? AND tensor = ? AND start = ?",
                (blob_checksum(key, tensor, start, stop, [decoded]), chunk_id, tensor, start),
            )

    return changed(session, change)


def all_borrowed(*, session: str, base: str) -> Callable[[Path], None]:
    """A session's last chunk has no blobs of its own: all of its tokens are those of ``base``."""

    def change(connection: sqlite3.Connection, chunk_id: int) -> None:
        payload_ids = connection.execute(
            "DELETE FROM blobs WHERE chunk_id = ? RETURNING payload_id", (chunk_id,)
        ).fetchall()
        connection.executemany("DELETE FROM payloads WHERE id = ?", payload_ids)
        connection.execute(
            "UPDATE chunks SET base_id = ?, base_n_tokens = stop - start, raw_nbytes = 0, "
            "stored_nbytes = 0 WHERE id = ?",
            (head_of(connection, base), chunk_id),
        )

    return changed(session, change)


def of_version_1(path: Path) -> None:
    """``empty`` of version 1, whose header says that it is of version 2."""
    packed = V1 / "databases" / "accepted" / "empty.db.zst"
    path.write_bytes(zstandard.ZstdDecompressor().decompress(packed.read_bytes()))
    sql(
        "UPDATE format SET version = 2, min_reader = 2, min_writer = 2",
        "UPDATE alembic_version SET version_num = '0002'",
        "PRAGMA user_version = 2",
    )(path)


_TRIGGER = "CREATE TRIGGER t AFTER INSERT ON chunks BEGIN DELETE FROM payloads; END"

# Changed copies of ``empty``, with the error that kvstore raises.
AT_OPENING: dict[str, tuple[Callable[[Path], None], str]] = {
    "other_application_id": (sql("PRAGMA application_id = 1"), "NotAStoreError"),
    "newer_version": (
        sql("UPDATE format SET version = 3, min_reader = 3", "PRAGMA user_version = 3"),
        "NewerFormatError",
    ),
    "newer_version_without_its_row": (sql("PRAGMA user_version = 3"), "NewerFormatError"),
    "newer_readable_with_trigger": (
        sql(_TRIGGER, "UPDATE format SET version = 3", "PRAGMA user_version = 3"),
        "SchemaMismatchError",
    ),
    "newer_readable_without_extras": (
        sql(
            "DROP INDEX chunks_by_tokens",
            "ALTER TABLE chunks DROP COLUMN extras",
            "UPDATE format SET version = 3",
            "PRAGMA user_version = 3",
        ),
        "SchemaMismatchError",
    ),
    "older_version": (
        sql("UPDATE format SET version = 1, min_reader = 1", "PRAGMA user_version = 1"),
        "SchemaMismatchError",
    ),
    "schema_of_version_1": (of_version_1, "SchemaMismatchError"),
    "index_of_version_1": (
        sql(
            "DROP INDEX chunks_by_tokens",
            "CREATE UNIQUE INDEX chunks_by_tokens ON chunks (parent_key, tokens)",
        ),
        "SchemaMismatchError",
    ),
    "version_0": (sql("PRAGMA user_version = 0"), "SchemaMismatchError"),
    "format_row_missing": (sql("DELETE FROM format"), "SchemaMismatchError"),
    "format_row_disagrees": (sql("UPDATE format SET version = 3"), "SchemaMismatchError"),
    "format_row_of_version_1": (sql("UPDATE format SET version = 1"), "SchemaMismatchError"),
    "extra_trigger": (sql(_TRIGGER), "SchemaMismatchError"),
    "extra_view": (sql("CREATE VIEW v AS SELECT * FROM payloads"), "SchemaMismatchError"),
    "extra_table": (sql("CREATE TABLE more (id INTEGER)"), "SchemaMismatchError"),
    "extra_column": (sql("ALTER TABLE chunks ADD COLUMN more TEXT"), "SchemaMismatchError"),
    "missing_index": (sql("DROP INDEX chunks_by_tokens"), "SchemaMismatchError"),
    "missing_table": (sql("DROP TABLE leases"), "SchemaMismatchError"),
}

_FIRST, _SECOND = digest("struck"), digest("set")

# Changed copies of ``small``, by the session whose tokens are looked for.
IN_CONTENT: dict[str, dict[str, Callable[[Path], None]]] = {
    "a": {
        "base_is_edited": all_borrowed(session="a", base="edited at the border"),
        "extras_added": sql(
            f"UPDATE chunks SET extras = x'{item(3, _FIRST).hex()}' WHERE id = {head('a')}"
        ),
    },
    "edited": {
        "base_has_other_edits": sql(
            f"UPDATE chunks SET base_id = {head('edited at the border')} "
            f"WHERE id = {head('edited')}"
        ),
        "extras_are_text": sql(
            f"UPDATE chunks SET extras = '{'1' * 41}' WHERE id = {head('edited')}"
        ),
        "extras_changed": sql(
            f"UPDATE chunks SET extras = x'{item(8, _SECOND).hex()}' WHERE id = {head('edited')}"
        ),
        "extras_cut_off": extras(item(8, _FIRST)[:-1]),
        "extras_digest_of_16_bytes": extras(item(8, _FIRST[:16], nbytes=16)),
        "extras_of_unknown_kind": extras(item(8, _FIRST) + item(9, _SECOND, kind=2)),
        "extras_offset_at_stop": extras(item(23, _FIRST)),
        "extras_removed": sql(f"UPDATE chunks SET extras = x'' WHERE id = {head('edited')}"),
        "parent_is_itself": sql(f"UPDATE chunks SET parent_id = id WHERE id = {head('edited')}"),
    },
    "edited twice": {
        "base_behind_the_edit": all_borrowed(session="edited twice", base="a"),
        "extras_out_of_order": extras(item(16, _SECOND) + item(4, _FIRST), session="edited twice"),
        "extras_two_at_one_offset": extras(
            item(4, _FIRST) + item(4, _SECOND), session="edited twice"
        ),
        "extras_without_the_second": sql(
            f"UPDATE chunks SET extras = substr(extras, 1, 41) WHERE id = {head('edited twice')}"
        ),
    },
}


def describe(path: Path) -> dict[str, Any]:
    """What a reader finds: every session with its tokens, its edits and its tensors' bytes."""
    caches = {
        cache.fingerprint.model: cache
        for weights in ("weights", "others")
        for one in (SMALL, layout(), RING, RECURRENT)
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


def expect_content(path: Path, described: dict[str, Any], name: str) -> dict[str, Any]:
    """How loads of a session's tokens have to end, with its edits and without."""
    (session,) = (one for one in described["sessions"] if one["name"] == name)
    lineage = tuple(Edit(one["start"], bytes.fromhex(one["digest"])) for one in session["edits"])
    template = PatternCache(SMALL)
    with kvstore.open(path, read_only=True, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        found = store.verify()
    if found.ok:
        raise SystemExit(f"{path.name}: verify found nothing wrong")
    print(path.stem, found.problems, file=sys.stderr)
    expected = {"found_by": "content", "session": name}
    expected["n_tokens"] = restored_n_tokens(path, template, session["tokens"], lineage)
    if lineage:
        expected["exact_n_tokens"] = restored_n_tokens(path, template, session["tokens"], ())
    return expected


def put_rejected(database: Path, base: Path, change: Callable[[Path], None]) -> Path:
    """Store a changed copy of ``base`` as a vector; returns the copy."""
    shutil.copy(base, database)
    change(database)
    put_database(VECTORS / "databases" / "rejected" / f"{database.stem}.db.zst", database)
    return database


def main() -> None:
    put_json(VECTORS / "keys.json", keys())
    put_json(VECTORS / "blobs.json", blobs())
    put_json(VECTORS / "lossy.json", lossy())
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
        for session, changes in IN_CONTENT.items():
            for name, change in changes.items():
                database = put_rejected(rejected / f"{name}.db", work / "small.db", change)
                expected[name] = expect_content(database, described["small"], session)
        put_json(VECTORS / "databases" / "rejected" / "expected.json", expected)
        database = work / "lossy.db"
        with fixed_clock():
            make_lossy(database)
        vacuumed(database)
        put_json(VECTORS / "databases" / "lossy.json", describe_lossy(database))
        put_database(VECTORS / "databases" / "lossy.db.zst", database)
        # The golden file of this version: one that has a bit of everything.
        database = work / "turns.db"
        with fixed_clock():
            make_turns(database)
        vacuumed(database)
        put_database(GOLDEN / "v2.db.zst", database)
        put_json(GOLDEN / "v2.json", describe(database))


if __name__ == "__main__":
    main()
