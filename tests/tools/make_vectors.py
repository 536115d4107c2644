"""Makes the committed vectors and the golden file: ``python tests/tools/make_vectors.py``.

What exists is left alone: a committed vector is what other readers were written
against, and never changes. A JSON file may gain entries; if an existing entry would
come out differently, that is an error. Review by eye what it makes, then commit it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import struct
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import msgpack
import zstandard

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fakes import (  # noqa: E402
    BytesCache,
    checkpoint_tensors,
    layout,
    logits_tensor,
    naive_is_visible,
    naive_slot,
    ring_tensors,
)

import kvstore  # noqa: E402  # the checkout's own, found by the line above
from kvstore import Fingerprint, Kind, Layout, TensorSpec  # noqa: E402
from kvstore.checksum import blob_checksum  # noqa: E402
from kvstore.manifest import pack_manifest, pack_metadata  # noqa: E402
from kvstore.prefix import chunk_key, root_key  # noqa: E402
from kvstore.tokens import to_big_endian  # noqa: E402

VECTORS = ROOT / "schemas" / "vectors" / "v1"
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
    """As ``BytesCache``, but some roles compress: both codecs occur in every file."""

    def truth(self, index: int, position: int) -> bytes:
        content = super().truth(index, position)
        is_plain = self.layout.tensors[index].role in {"k", "conv_state"}
        return content[:1] * len(content) if is_plain else content


def computed(cache_layout: Layout, tokens: list[int], *, weights: str = "weights") -> PatternCache:
    cache = PatternCache(cache_layout, weights=weights)
    cache.compute(tokens)
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
    ticks = count(FIRST_MS)
    tick = lambda: next(ticks)  # noqa: E731
    with mock.patch("kvstore.clock.now_ms", tick):
        yield


def with_full(*tensors: TensorSpec) -> Layout:
    """A full layer, then ``tensors``."""
    return Layout(tensors=(*layout(n_layers=1).tensors, *tensors))


EVERY_KIND_IDS = prompt(15, 80)
RING = with_full(*ring_tensors(layer=1, window_n_tokens=8))
SINK = Layout(tensors=ring_tensors(layer=0, window_n_tokens=8, sink_n_tokens=3, ring_n_slots=11))
RECURRENT = with_full(*checkpoint_tensors(layer=1), logits_tensor())
EVERY_KIND = with_full(
    *ring_tensors(layer=1, window_n_tokens=8, sink_n_tokens=2, head_major=True),
    *checkpoint_tensors(layer=2),
    logits_tensor(),
)


# ---------------------------------------------------------------- keys.json


def keys() -> dict[str, Any]:
    """Inputs and expected digests, as hex."""

    def example_tensor(role: str) -> TensorSpec:
        return TensorSpec(
            name=f"{role}_cache",
            role=role,
            layer=0,
            kind=Kind.FULL,
            dtype="float32",
            shape=(1, 4, 1, 2),
            token_axis=1,
        )

    layouts = {
        "example": Layout(tensors=(example_tensor("k"), example_tensor("v"))),
        "token_major_f32": layout(),
        "head_major_f16": layout(dtype="float16", head_major=True),
        "names_are_not_identity": Layout(
            tensors=tuple(
                TensorSpec(
                    name=f"tensor {number}",
                    role=spec.role,
                    layer=spec.layer,
                    kind=spec.kind,
                    dtype=spec.dtype,
                    shape=spec.shape,
                    token_axis=spec.token_axis,
                )
                for number, spec in enumerate(layout().tensors)
            )
        ),
        "ring": RING,
        "sink": SINK,
        "recurrent": RECURRENT,
        "every_kind": EVERY_KIND,
    }
    fingerprints = [
        Fingerprint(weights=b"\x11" * 32, program=b"\x22" * 32, layout=layouts["example"].digest),
        Fingerprint(weights=bytes(range(32)), program=bytes(range(32, 64)), layout=bytes(32)),
    ]
    roots = [
        (model.model, size, namespace, adapter)
        for model in fingerprints
        for size, namespace, adapter in (
            (2, "", b""),
            (256, "", b""),
            (256, "grüße", b""),
            (65536, "a", b"\x33" * 32),
        )
    ]
    example_root = root_key(fingerprints[0].model, chunk_n_tokens=2)
    first = chunk_key(example_root, array("Q", [1, 2]))
    chains = [
        (example_root, [1, 2], b""),
        (first, [3], b""),
        (bytes(32), [0], b""),
        (bytes(32), [2**63 - 1, 2**32, 256, 1], b""),
        (bytes(32), list(range(256)), b""),
        (bytes(32), [0], b"extras"),
    ]
    blobs = [
        (first, 0, 0, 2, bytes(range(16))),
        (first, 1, 0, 2, bytes(range(16))),
        (bytes(32), 4294967295, 2**40, 2**40 + 256, bytes(4096)),
        (bytes(range(32)), 7, 16, 32, bytes(number % 251 for number in range(1000))),
    ]
    return {
        "layouts": [
            {
                "name": name,
                "tensors": [tensor.to_manifest() for tensor in one.tensors],
                "digest": one.digest.hex(),
            }
            for name, one in layouts.items()
        ],
        "fingerprints": [
            {
                "weights": one.weights.hex(),
                "program": one.program.hex(),
                "layout": one.layout.hex(),
                "model": one.model.hex(),
            }
            for one in fingerprints
        ],
        "root_keys": [
            {
                "model": model.hex(),
                "chunk_n_tokens": size,
                "namespace": namespace,
                "adapter": adapter.hex(),
                "key": root_key(
                    model, chunk_n_tokens=size, namespace=namespace, adapter=adapter
                ).hex(),
            }
            for model, size, namespace, adapter in roots
        ],
        "chunk_keys": [
            {
                "parent": parent.hex(),
                "tokens": ids,
                "tokens_column": to_big_endian(array("Q", ids)).hex(),
                "extras": extras.hex(),
                "key": chunk_key(parent, array("Q", ids), extras=extras).hex(),
            }
            for parent, ids, extras in chains
        ],
        "checksums": [
            {
                "key": key.hex(),
                "tensor": tensor,
                "start": start,
                "stop": stop,
                "decoded": decoded.hex(),
                "checksum": blob_checksum(key, tensor, start, stop, memoryview(decoded)).hex(),
            }
            for key, tensor, start, stop, decoded in blobs
        ],
    }


# ---------------------------------------------------------------- msgpack


def manifests() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Accepted and rejected manifests, by name."""
    example = {
        "format": 1,
        "tensors": [
            {
                "dtype": "float32",
                "kind": "full",
                "layer": 0,
                "name": f"{role}_cache",
                "role": role,
                "shape": [1, 4, 1, 2],
                "token_axis": 1,
            }
            for role in ("k", "v")
        ],
    }
    accepted = {
        "example": msgpack.packb(example),
        "head_major_f16": pack_manifest(layout(dtype="float16", head_major=True)),
        "int8_32_layers": pack_manifest(layout(n_layers=32, dtype="int8")),
        "other_key_order": msgpack.packb(
            {
                "tensors": [dict(reversed(tensor.items())) for tensor in example["tensors"]],
                "format": 1,
            }
        ),
        "ring": pack_manifest(RING),
        "sink": pack_manifest(SINK),
        "recurrent": pack_manifest(RECURRENT),
        "every_kind": pack_manifest(EVERY_KIND),
    }

    def changed(**fields: Any) -> bytes:
        first, second = example["tensors"]
        return msgpack.packb({"format": 1, "tensors": [{**first, **fields}, second]})

    def ring(**fields: Any) -> bytes:
        return changed(
            **{"kind": "window", "window_n_tokens": 2, "sink_n_tokens": 1, **fields},
        )

    one = accepted["example"]
    rejected = {
        "empty": b"",
        "truncated": one[:-1],
        "trailing_byte": one + b"\x00",
        "not_a_map": msgpack.packb([1, []]),
        "format_2": msgpack.packb({**example, "format": 2}),
        "format_float": msgpack.packb({**example, "format": 1.0}),
        "format_true": msgpack.packb({**example, "format": True}),
        "missing_tensors": msgpack.packb({"format": 1}),
        "unknown_key": msgpack.packb({**example, "more": 1}),
        "duplicate_key": b"\x83" + one[1:] + one[1:9],
        "no_tensors": msgpack.packb({"format": 1, "tensors": []}),
        "tensors_not_an_array": msgpack.packb({"format": 1, "tensors": {}}),
        "huge_array_length": msgpack.packb({"format": 1}).replace(b"\x81", b"\x82", 1)
        + b"\xa7tensors\xdd\xff\xff\xff\xff",
        "key_is_bin": b"\x82" + msgpack.packb(b"format") + b"\x01" + one[9:],
        "extension_type": changed(layer=msgpack.ExtType(5, b"\x00")),
        "timestamp": changed(layer=msgpack.Timestamp(1)),
        "text_not_utf8": one.replace(b"k_cache", b"\xff_cache"),
        "tensor_without_role": msgpack.packb(
            {
                "format": 1,
                "tensors": [
                    {key: value for key, value in example["tensors"][0].items() if key != "role"}
                ],
            }
        ),
        "tensor_with_unknown_key": changed(more=1),
        "unknown_dtype": changed(dtype="float8"),
        "unknown_kind": changed(kind="window"),
        "layer_negative": changed(layer=-1),
        "layer_bool": changed(layer=False),
        "layer_text": changed(layer="0"),
        "name_is_bin": changed(name=b"k_cache"),
        "names_twice": changed(name="v_cache"),
        "role_empty": changed(role=""),
        "role_with_space": changed(role="k v"),
        "role_with_line_feed": changed(role="k\n"),
        "shape_empty": changed(shape=[]),
        "shape_zero": changed(shape=[1, 0, 1, 2]),
        "shape_negative": changed(shape=[1, -4, 1, 2]),
        "shape_float": changed(shape=[1, 4.0, 1, 2]),
        "shape_17_axes": changed(shape=[1] * 17),
        "shape_overflows": changed(shape=[1, 2**31, 2**31, 2**31]),
        "batch_2": changed(shape=[2, 4, 1, 2]),
        "token_axis_4": changed(token_axis=4),
        "token_axis_negative": changed(token_axis=-1),
        "kind_of_another_version": changed(kind="paged"),
        "full_without_token_axis": changed(token_axis=None),
        "full_with_window": ring(kind="full"),
        "full_with_window_of_0": ring(kind="full", window_n_tokens=0, sink_n_tokens=0),
        "checkpoint_with_token_axis": changed(kind="checkpoint"),
        "checkpoint_with_window": ring(kind="checkpoint", token_axis=None),
        "window_without_token_axis": ring(token_axis=None),
        "window_without_sink": changed(kind="window", window_n_tokens=2),
        "window_of_0": ring(window_n_tokens=0),
        "window_float": ring(window_n_tokens=2.0),
        "window_bool": ring(window_n_tokens=True),
        "window_larger_than_its_ring": ring(window_n_tokens=4),
        "sink_negative": ring(sink_n_tokens=-1),
        "sink_of_all_slots": ring(sink_n_tokens=4),
        "positions_without_window": changed(kind="positions"),
    }
    return accepted, rejected


def metadata() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Accepted and rejected session metadata, by name."""
    accepted = {
        "empty": pack_metadata(None),
        "every_type": pack_metadata(METADATA),
        "32_levels": b"\x81\xa1a" * 32 + b"\x01",
        "32_levels_the_last_empty": b"\x81\xa1a" * 31 + b"\x80",
    }
    rejected = {
        "not_a_map": msgpack.packb([1]),
        "trailing_byte": b"\x80\x00",
        "duplicate_key": b"\x82\xa1a\x01\xa1a\x02",
        "inner_duplicate_key": b"\x81\xa1x\x82\xa1a\x01\xa1a\x02",
        "integer_key": b"\x81\x01\x01",
        "bin_key": b"\x81\xc4\x01a\x01",
        "text_not_utf8": b"\x81\xa1a\xa1\xff",
        "extension_type": msgpack.packb({"a": msgpack.ExtType(5, b"\x00")}),
        "timestamp": msgpack.packb({"a": msgpack.Timestamp(1)}),
        "33_levels": b"\x81\xa1a" * 33 + b"\x01",
        "33_levels_the_last_empty": b"\x81\xa1a" * 32 + b"\x80",
    }
    return accepted, rejected


# ---------------------------------------------------------------- blobs.json


def blobs() -> dict[str, list[dict[str, Any]]]:
    """Payloads per codec, with what they decode to or why they do not."""
    content = bytes(number // 16 for number in range(1000))
    frame = zstandard.ZstdCompressor(level=1).compress(content)
    with_checksum = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(content)
    no_size = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(content)
    empty = zstandard.ZstdCompressor(level=1).compress(b"")
    skippable = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"abcd"
    zeros = zstandard.ZstdCompressor(level=1).compress(bytes(1000))
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 20))
    # A header for 2^40 bytes (no single segment, window 128 MiB), one empty last block.
    claim = b"\x28\xb5\x2f\xfd\xc0\x88" + struct.pack("<Q", 1 << 40) + b"\x01\x00\x00"
    # 1000 bytes with a window of 1 GiB: the header alone is at fault.
    window = b"\x28\xb5\x2f\xfd\x40\xa0" + struct.pack("<H", 1000 - 256) + b"\x43\x1f\x00\x00"
    dictionary = b"\x28\xb5\x2f\xfd\x61\x07" + struct.pack("<H", 1000 - 256) + b"\x43\x1f\x00\x00"

    def entry(name: str, codec: int, stored: bytes, raw_nbytes: int, **more: str) -> dict[str, Any]:
        return {
            "name": name,
            "codec": codec,
            "raw_nbytes": raw_nbytes,
            "stored": stored.hex(),
            **more,
        }

    return {
        "accepted": [
            entry("raw", 0, content, 1000, decoded=content.hex()),
            entry("zstd", 1, frame, 1000, decoded=content.hex()),
            entry("zstd_with_checksum", 1, with_checksum, 1000, decoded=content.hex()),
            entry("zstd_zeros", 1, zeros, 1000, decoded=bytes(1000).hex()),
        ],
        "rejected": [
            entry("raw_short", 0, content[:-1], 1000),
            entry("raw_long", 0, content + b"\x00", 1000),
            entry("unknown_codec", 2, content, 1000),
            entry("negative_codec", -1, content, 1000),
            entry("zstd_empty", 1, b"", 1000),
            entry("zstd_not_a_frame", 1, content, 1000),
            entry("zstd_truncated", 1, frame[:-1], 1000),
            entry("zstd_header_only", 1, frame[:8], 1000),
            entry("zstd_other_size", 1, frame, 999),
            entry("zstd_without_content_size", 1, no_size, 1000),
            entry("zstd_trailing_byte", 1, frame + b"\x00", 1000),
            entry("zstd_second_frame", 1, frame + frame, 1000),
            entry("zstd_empty_second_frame", 1, frame + empty, 1000),
            entry("zstd_skippable_behind", 1, frame + skippable, 1000),
            entry("zstd_skippable_before", 1, skippable + frame, 1000),
            entry("zstd_bomb", 1, bomb, 1000),
            entry("zstd_claims_a_tebibyte", 1, claim, 1000),
            entry("zstd_claims_what_it_lacks", 1, claim, 1 << 40),
            entry("zstd_window_of_a_gibibyte", 1, window, 1000),
            entry("zstd_needs_a_dictionary", 1, dictionary, 1000),
            entry("zstd_wrong_checksum", 1, with_checksum[:-1] + b"\x00", 1000),
        ],
    }


# ---------------------------------------------------------------- databases

SMALL = layout(n_layers=1, capacity_n_tokens=96, n_kv_heads=1, head_dim=2)


def make_small(path: Path) -> None:
    """Two sessions that share a chunk and 20 tokens of the next, one of them borrowed."""
    shared = prompt(1, 52)
    with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        for ids, name in (([*shared, 1, 2, 3], "a"), ([*shared, 7, 8], "b")):
            store.save_session(computed(SMALL, ids), ids, name=name, metadata=METADATA)


def make_turns(path: Path) -> None:
    """A conversation saved turn by turn (tails borrow), a second one, an unnamed save."""
    one = layout()
    ids = prompt(2, 100)
    with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        cache = PatternCache(one)
        for stop in (20, 24, 50, 60, 100):
            cache.compute(ids[len(cache.tokens) : stop])
            store.save_session(cache, ids[:stop], name="turns", metadata={"stop": stop})
            if stop == 60:
                store.save_session(cache, ids[:56], name="turns: what if")
        other = ids[:90] + prompt(3, 6)
        store.save_session(computed(one, other), other, name="other ending")
        unnamed = prompt(4, 40)
        store.save_session(computed(one, unnamed), unnamed)


def make_head_major(path: Path) -> None:
    one = layout(dtype="float16", head_major=True)
    with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        for n_tokens in (33, 70):
            ids = prompt(5, n_tokens)
            store.save_session(computed(one, ids), ids, name=f"{n_tokens} tokens")


def make_namespaces(path: Path) -> None:
    one, ids = layout(dtype="bfloat16"), prompt(6, 40)
    for namespace, weights in (("", "weights"), ("grüße", "weights"), ("grüße", "others")):
        with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS, namespace=namespace) as store:
            store.save_session(
                computed(one, ids, weights=weights), ids, name=f"{weights} in {namespace!r}"
            )


def make_int8(path: Path) -> None:
    one = layout(n_layers=3, dtype="int8", head_major=True)
    for size in (16, 64):
        with kvstore.open(path, chunk_n_tokens=size) as store:
            ids = prompt(7, 100)
            store.save_session(computed(one, ids), ids, name=f"chunks of {size}")


def make_evicted(path: Path) -> None:
    """One session lost its end, one lost everything; both keep ids and metadata."""
    one = layout(n_layers=1)
    with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        ids = prompt(8, 100)
        store.save_session(computed(one, ids), ids, name="lost its end", metadata=METADATA)
        gone = prompt(9, 40)
        store.save_session(computed(one, gone, weights="others"), gone, name="lost everything")
        store.prune(model=computed(one, gone, weights="others").fingerprint.model)
    with sqlite3.connect(path, isolation_level=None) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        tail = connection.execute("SELECT id FROM chunks ORDER BY stop DESC LIMIT 1").fetchone()[0]
        connection.execute("BEGIN")
        connection.execute(
            "UPDATE sessions SET head_id = (SELECT parent_id FROM chunks WHERE id = ?) "
            "WHERE head_id = ?",
            (tail, tail),
        )
        payload_ids = connection.execute(
            "DELETE FROM blobs WHERE chunk_id = ? RETURNING payload_id", (tail,)
        ).fetchall()
        connection.executemany("DELETE FROM payloads WHERE id = ?", payload_ids)
        connection.execute("DELETE FROM chunks WHERE id = ?", (tail,))
        connection.execute("COMMIT")
    connection.close()


def save_turns(store: kvstore.Store, one: Layout, ids: list[int], *stops: int) -> PatternCache:
    """Compute ``ids`` turn by turn, and save after each, as a chat does."""
    cache = PatternCache(one)
    for stop in stops:
        cache.compute(ids[len(cache.tokens) : stop])
        store.save_session(cache, ids[:stop], name="turns", metadata={"stop": stop})
    return cache


def make_ring_wrapped(path: Path) -> None:
    """A ring of 16 slots behind a full layer: turns (the windows of some remain), and one save."""
    ids = prompt(10, 100)
    with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        save_turns(store, RING, ids, 5, 20, 27, 60, 100)
        other = ids[:50] + prompt(11, 40)
        store.save_session(computed(RING, other), other, name="other ending")
        # What the first save no longer had of the shared tokens, this one adds.
        store.save_session(computed(RING, ids[:45]), ids[:45], name="filled in")


def make_sink(path: Path) -> None:
    """Nothing but a ring of 11 slots behind a sink of 3: its length has no limit."""
    ids = prompt(12, 200)
    with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        save_turns(store, SINK, ids, 2, 9, 40, 200)
        store.save_session(computed(SINK, ids[:14]), ids[:14], name="just full")


def make_recurrent(path: Path) -> None:
    """Recurrent state and the last logits; only some lengths have a checkpoint."""
    ids = prompt(13, 100)
    with kvstore.open(
        path, chunk_n_tokens=CHUNK_N_TOKENS, checkpoint_n_tokens=CHUNK_N_TOKENS
    ) as store:
        save_turns(store, RECURRENT, ids, 10, 20, 33, 50, 64, 100)
        store.save_session(computed(RECURRENT, ids[:45]), ids[:45], name="filled in")
        other = ids[:90] + prompt(14, 6)
        store.save_session(computed(RECURRENT, other), other, name="other ending")


def make_every_kind(path: Path) -> None:
    """All kinds in one layout; chunks that later saves filled in."""
    ids = EVERY_KIND_IDS
    with kvstore.open(path, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        for n_tokens in (80, 20, 52):
            store.save_session(
                computed(EVERY_KIND, ids[:n_tokens]), ids[:n_tokens], name=f"{n_tokens} tokens"
            )
        other = ids[:60] + prompt(16, 5)
        store.save_session(computed(EVERY_KIND, other), other, name="other ending")


def make_newer_readable(path: Path) -> None:
    """What a later version may look like to this one: additions, and permission to read."""
    make_small(path)
    sql(
        "CREATE TABLE pins (session_id INTEGER PRIMARY KEY)",
        "UPDATE format SET version = 2",
        "PRAGMA user_version = 2",
    )(path)


def make_empty(path: Path) -> None:
    kvstore.open(path).close()


ACCEPTED: dict[str, Callable[[Path], None]] = {
    "empty": make_empty,
    "every_kind": make_every_kind,
    "evicted": make_evicted,
    "head_major_f16": make_head_major,
    "int8_two_chunk_sizes": make_int8,
    "namespaces_bf16": make_namespaces,
    "newer_readable": make_newer_readable,
    "recurrent": make_recurrent,
    "ring_wrapped": make_ring_wrapped,
    "sink": make_sink,
    "small": make_small,
    "turns_f32": make_turns,
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


def payload(change: Callable[[bytes], bytes], *, codec: int) -> Callable[[Path], None]:
    """A change of the first payload of the first chunk that is stored with ``codec``."""

    def apply(path: Path) -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            row_id, data = connection.execute(
                "SELECT p.id, p.data FROM blobs b JOIN payloads p ON p.id = b.payload_id "
                "WHERE b.chunk_id = 1 AND b.codec = ?",
                (codec,),
            ).fetchone()
            data = change(data)
            connection.execute("UPDATE payloads SET data = ? WHERE id = ?", (data, row_id))
            connection.execute(
                "UPDATE blobs SET stored_nbytes = ? WHERE payload_id = ?", (len(data), row_id)
            )
            connection.execute(
                "UPDATE chunks SET stored_nbytes = "
                "(SELECT sum(stored_nbytes) FROM blobs WHERE chunk_id = 1) WHERE id = 1"
            )
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            connection.close()

    return apply


def first_chunk(
    tensor: int, *ranges: tuple[int, int], instead: bool = False, nbytes: int | None = None
) -> Callable[[Path], None]:
    """Blobs of ``EVERY_KIND``'s ``tensor``, beside those of the first chunk or ``instead``.

    They are sound in all but their ranges: content (cut to ``nbytes``), checksum,
    sizes and sums are what they must be.
    """

    def apply(path: Path) -> None:
        if instead:
            sql(
                "CREATE TEMP TABLE gone AS SELECT payload_id FROM blobs "
                f"WHERE chunk_id = 1 AND tensor = {tensor}",
                f"DELETE FROM blobs WHERE chunk_id = 1 AND tensor = {tensor}",
                "DELETE FROM payloads WHERE id IN (SELECT payload_id FROM gone)",
            )(path)
        cache = computed(EVERY_KIND, EVERY_KIND_IDS)
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            key = connection.execute("SELECT key FROM chunks WHERE id = 1").fetchone()[0]
            for start, stop in ranges:
                slots = b"".join(cache.truth(tensor, position) for position in range(start, stop))
                content = slots[:nbytes]
                payload_id = connection.execute(
                    "INSERT INTO payloads (data) VALUES (?)", (content,)
                ).lastrowid
                check = blob_checksum(key, tensor, start, stop, memoryview(content))
                connection.execute(
                    "INSERT INTO blobs (chunk_id, tensor, start, stop, codec, raw_nbytes, "
                    "stored_nbytes, checksum, payload_id) VALUES (1, ?, ?, ?, 0, ?, ?, ?, ?)",
                    (tensor, start, stop, len(content), len(content), check, payload_id),
                )
            connection.execute(
                "UPDATE chunks SET (raw_nbytes, stored_nbytes) = (SELECT sum(raw_nbytes), "
                "sum(stored_nbytes) FROM blobs WHERE chunk_id = 1) WHERE id = 1"
            )
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            connection.close()

    return apply


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def not_sqlite(path: Path) -> None:
    path.write_bytes(b"This is no database.\n" * 100)


_BOMB = zstandard.ZstdCompressor(level=19).compress(bytes(4096))
_BORROWER = "(SELECT id FROM chunks WHERE base_id IS NOT NULL)"

AT_OPENING: dict[str, tuple[Callable[[Path], None], str]] = {
    "not_sqlite": (not_sqlite, "NotAStoreError"),
    "truncated": (truncated, "CorruptStoreError"),
    "other_application_id": (sql("PRAGMA application_id = 1"), "NotAStoreError"),
    "newer_version": (
        sql("UPDATE format SET version = 2, min_reader = 2", "PRAGMA user_version = 2"),
        "NewerFormatError",
    ),
    "newer_version_without_its_row": (sql("PRAGMA user_version = 2"), "NewerFormatError"),
    "newer_readable_with_trigger": (
        sql(
            "CREATE TRIGGER t AFTER INSERT ON chunks BEGIN DELETE FROM payloads; END",
            "UPDATE format SET version = 2",
            "PRAGMA user_version = 2",
        ),
        "SchemaMismatchError",
    ),
    "version_0": (sql("PRAGMA user_version = 0"), "SchemaMismatchError"),
    "format_row_missing": (sql("DELETE FROM format"), "SchemaMismatchError"),
    "format_row_disagrees": (sql("UPDATE format SET version = 2"), "SchemaMismatchError"),
    "extra_trigger": (
        sql("CREATE TRIGGER t AFTER INSERT ON chunks BEGIN DELETE FROM payloads; END"),
        "SchemaMismatchError",
    ),
    "extra_view": (sql("CREATE VIEW v AS SELECT * FROM payloads"), "SchemaMismatchError"),
    "extra_table": (sql("CREATE TABLE more (id INTEGER)"), "SchemaMismatchError"),
    "extra_column": (sql("ALTER TABLE leases ADD COLUMN more TEXT"), "SchemaMismatchError"),
    "missing_index": (sql("DROP INDEX chunks_by_tokens"), "SchemaMismatchError"),
    "missing_table": (sql("DROP TABLE leases"), "SchemaMismatchError"),
}

IN_CONTENT: dict[str, Callable[[Path], None]] = {
    "base_cycle": sql(
        f"UPDATE chunks SET base_id = {_BORROWER}, base_n_tokens = 20 "
        f"WHERE id = (SELECT base_id FROM chunks WHERE id = {_BORROWER})"
    ),
    "base_is_itself": sql("UPDATE chunks SET base_id = id WHERE base_id IS NOT NULL"),
    "base_missing_but_borrowing": sql("UPDATE chunks SET base_id = NULL"),
    "base_n_tokens_negative": sql("UPDATE chunks SET base_n_tokens = -1 WHERE base_id IS NOT NULL"),
    "base_of_another_parent": sql("UPDATE chunks SET base_id = 1 WHERE base_id IS NOT NULL"),
    "blob_missing": sql(
        "DELETE FROM blobs WHERE chunk_id = 1 AND tensor = 1",
        "DELETE FROM payloads WHERE id = 2",
    ),
    "blob_of_no_tensor": sql("UPDATE blobs SET tensor = 9 WHERE chunk_id = 1 AND tensor = 1"),
    "blob_range": sql("UPDATE blobs SET stop = stop - 1 WHERE chunk_id = 1 AND tensor = 0"),
    "blobs_swapped": sql(
        "UPDATE blobs SET tensor = 9 WHERE chunk_id = 1 AND tensor = 0",
        "UPDATE blobs SET tensor = 0 WHERE chunk_id = 1 AND tensor = 1",
        "UPDATE blobs SET tensor = 1 WHERE chunk_id = 1 AND tensor = 9",
    ),
    "checksum": sql("UPDATE blobs SET checksum = zeroblob(16) WHERE chunk_id = 1"),
    "chunk_sizes": sql("UPDATE chunks SET raw_nbytes = raw_nbytes + 1 WHERE id = 1"),
    "codec_unknown": sql("UPDATE blobs SET codec = 2 WHERE chunk_id = 1"),
    "fingerprint": sql("UPDATE models SET weights_digest = zeroblob(32)"),
    "head_of_other_tokens": sql(
        "UPDATE sessions SET head_id = (SELECT head_id FROM sessions WHERE name = 'b') "
        "WHERE name = 'a'"
    ),
    "key": sql("UPDATE chunks SET key = zeroblob(32) WHERE id = 1"),
    "layout_digest": sql(
        "UPDATE models SET manifest = CAST(replace(manifest, 'float32', 'float64') AS BLOB)"
    ),
    "manifest_not_msgpack": sql("UPDATE models SET manifest = x'c1'"),
    "metadata_extension": sql("UPDATE sessions SET metadata = x'81a161d6ff00000001'"),
    "payload_bit": payload(lambda data: bytes([data[0] ^ 1]) + data[1:], codec=0),
    "payload_is_text": sql(
        "UPDATE payloads SET data = printf('%.*c', length(data), 'x') WHERE id = 2",
    ),
    "payload_orphan": sql("INSERT INTO payloads (data) VALUES (x'00')"),
    "payloads_swapped": sql(
        "UPDATE blobs SET payload_id = -1 WHERE payload_id = 2",
        "UPDATE blobs SET payload_id = 2 WHERE payload_id = 4",
        "UPDATE blobs SET payload_id = 4 WHERE payload_id = -1",
    ),
    "raw_nbytes_claim": sql(
        "UPDATE blobs SET raw_nbytes = 1099511627776 WHERE chunk_id = 1 AND tensor = 0"
    ),
    "root_key": sql("UPDATE spaces SET chunk_n_tokens = 64"),
    "session_namespace": sql("UPDATE sessions SET namespace = 'other'"),
    "session_token_gap": sql("DELETE FROM session_tokens WHERE start = 0"),
    "session_tokens_cut": sql("UPDATE session_tokens SET tokens = x'00' WHERE start = 0"),
    "session_tokens_other": sql(
        "UPDATE session_tokens SET tokens = zeroblob(length(tokens)) WHERE start = 0"
    ),
    "stored_nbytes_claim": sql(
        "UPDATE blobs SET stored_nbytes = 1099511627776 WHERE chunk_id = 1 AND tensor = 0"
    ),
    "tokens_cut": sql("UPDATE chunks SET tokens = x'00' WHERE id = 1"),
    "tokens_of_a_full_chunk": sql(
        "UPDATE chunks SET tokens = zeroblob(length(tokens)) WHERE id = 1"
    ),
    "tokens_of_a_tail": sql("UPDATE chunks SET tokens = zeroblob(length(tokens)) WHERE id > 1"),
    "zstd_bomb": payload(lambda _: _BOMB, codec=1),
    "zstd_truncated": payload(lambda data: data[:-1], codec=1),
}


# Changed copies of ``every_kind``, whose first chunk has [0, 2) and [4, 20) of its ring
# (of 16 slots) and a checkpoint of 20 tokens.
FULL_V, RING_K, POSITIONS, RECURRENT_STATE = 1, 2, 4, 6

IN_KINDS: dict[str, Callable[[Path], None]] = {
    "checkpoint_checksum": sql(
        f"UPDATE blobs SET checksum = zeroblob(16) WHERE tensor = {RECURRENT_STATE}"
    ),
    "checkpoint_of_two_lengths": first_chunk(
        RECURRENT_STATE, (4, 6), nbytes=EVERY_KIND.tensors[RECURRENT_STATE].nbytes
    ),
    "full_blob_in_two_parts": first_chunk(FULL_V, (0, 16), (16, 32), instead=True),
    "full_blob_missing": first_chunk(FULL_V, instead=True),
    "positions_blob": first_chunk(POSITIONS, (0, 8)),
    "window_blob_longer_than_its_ring": first_chunk(RING_K, (2, 20), instead=True),
    "window_blob_outside_its_chunk": first_chunk(RING_K, (28, 36)),
    "window_blobs_overlap": first_chunk(RING_K, (18, 24)),
    "window_checksum": sql(f"UPDATE blobs SET checksum = zeroblob(16) WHERE tensor = {RING_K}"),
}


def describe(path: Path) -> dict[str, Any]:
    """What a reader finds: every session with its tokens and its tensors' bytes."""
    connection = sqlite3.connect(path)
    sizes = dict(
        connection.execute(
            "SELECT sessions.id, chunk_n_tokens FROM sessions JOIN spaces ON spaces.id = space_id"
        ).fetchall()
    )
    connection.close()
    caches = {
        cache.fingerprint: cache
        for weights in ("weights", "others")
        for one in (
            SMALL,
            layout(),
            layout(n_layers=1),
            layout(dtype="float16", head_major=True),
            layout(dtype="bfloat16"),
            layout(n_layers=3, dtype="int8", head_major=True),
            RING,
            SINK,
            RECURRENT,
            EVERY_KIND,
        )
        for cache in [PatternCache(one, weights=weights)]
    }
    with kvstore.open(path, read_only=True) as store:
        found = store.sessions(all_namespaces=True)
    described = []
    for info in sorted(found, key=lambda info: info.id):
        template = caches[info.fingerprint]
        connection = sqlite3.connect(path)
        tokens = b"".join(
            row[0]
            for row in connection.execute(
                "SELECT tokens FROM session_tokens WHERE session_id = ? ORDER BY start", (info.id,)
            )
        )
        connection.close()
        ids = list(struct.unpack(f">{len(tokens) // 8}Q", tokens))
        n_stored = info.n_stored_tokens
        entry = {
            "namespace": info.namespace,
            "name": info.name,
            "model": info.fingerprint.model.hex(),
            "chunk_n_tokens": sizes[info.id],
            "tokens": ids,
            "n_stored_tokens": n_stored,
            "metadata": pack_metadata(info.metadata).hex(),
            "tensors": tensors_after(template, ids, n_stored, with_bytes=path.stem == "small"),
        }
        if not template.layout.is_full:
            # [i] for a limit of i + 1 tokens.
            restored = restored_n_tokens(path, template, info, ids, sizes[info.id])
            entry["restored_n_tokens"] = restored
            entry["lengths"] = [
                {"n_tokens": n_tokens, "tensors": tensors_after(template, ids, n_tokens)}
                for n_tokens in some_of(sorted(set(restored) - {0}))
            ]
        described.append(entry)
    return {"sessions": described}


def some_of(lengths: list[int]) -> list[int]:
    """A few of them, the first and the last among them."""
    return sorted({*lengths[:: len(lengths) // 6 + 1], *lengths[-1:]})


def restored_n_tokens(
    path: Path, template: PatternCache, info: kvstore.SessionInfo, ids: list[int], size: int
) -> list[int]:
    """How many tokens are restored when at most 1, 2, ... of ``ids`` may be."""
    has_logits = any(spec.role == "logits" for spec in template.layout.tensors)
    found = []
    with kvstore.open(path, read_only=True, chunk_n_tokens=size, namespace=info.namespace) as store:
        for limit in range(1, len(ids) + 1):
            cache = PatternCache(template.layout)
            cache.fingerprint = template.fingerprint
            wanted = ids[:limit] if has_logits else [*ids[:limit], 2**62]
            found.append(store.load_session(cache, wanted).n_tokens)
            if cache.wrong():
                raise SystemExit(f"{path.name}: {cache.wrong()}")
    return found


def tensors_after(
    template: PatternCache, ids: list[int], n_tokens: int, *, with_bytes: bool = False
) -> list[dict[str, str]]:
    """What each tensor needs for the next token to see ``n_tokens`` of ``ids``.

    Computed afresh, not read back: the vector says what must be there.
    """
    cache = PatternCache(template.layout)
    cache.fingerprint = template.fingerprint
    cache.compute(ids)
    return [
        {
            "name": spec.name,
            "sha256": hashlib.sha256(content(cache, index, n_tokens)).hexdigest(),
            **({"bytes": content(cache, index, len(ids)).hex()} if with_bytes else {}),
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


def expect_content(path: Path, one: Layout, ids: list[int]) -> dict[str, Any]:
    """How a load of ``ids`` has to end."""
    cache = PatternCache(one)
    with kvstore.open(path, read_only=True, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        hit = store.load_session(cache, [*ids, 0])
        found = store.verify()
        if found.ok:
            raise SystemExit(f"{path.name}: verify found nothing wrong")
        print(path.stem, hit.n_tokens, hit.reason, hit.detail, found.problems, file=sys.stderr)
    return {"found_by": "content", "n_tokens": hit.n_tokens}


def put_rejected(database: Path, base: Path, change: Callable[[Path], None]) -> Path:
    """Store a changed copy of ``base`` as a vector; returns the copy."""
    shutil.copy(base, database)
    change(database)
    put_database(VECTORS / "databases" / "rejected" / f"{database.stem}.db.zst", database)
    return database


def main() -> None:
    put_json(VECTORS / "keys.json", keys())
    put_json(VECTORS / "blobs.json", blobs())
    for kind, (accepted, rejected) in (("manifests", manifests()), ("metadata", metadata())):
        for verdict, files in (("accepted", accepted), ("rejected", rejected)):
            for name, data in files.items():
                put(VECTORS / kind / verdict / f"{name}.msgpack", data)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, make in ACCEPTED.items():
            database = work / f"{name}.db"
            with fixed_clock():
                make(database)
            vacuumed(database)
            put_json(VECTORS / "databases" / "accepted" / f"{name}.json", describe(database))
            put_database(VECTORS / "databases" / "accepted" / f"{name}.db.zst", database)
        expected: dict[str, Any] = {}
        rejected = work / "rejected"
        rejected.mkdir()
        for name, (change, error) in AT_OPENING.items():
            put_rejected(rejected / f"{name}.db", work / "small.db", change)
            expected[name] = {"found_by": "opening", "error": error}
        for name, change in IN_CONTENT.items():
            database = put_rejected(rejected / f"{name}.db", work / "small.db", change)
            expected[name] = expect_content(database, SMALL, [*prompt(1, 52), 1, 2, 3])
        for name, change in IN_KINDS.items():
            database = put_rejected(rejected / f"{name}.db", work / "every_kind.db", change)
            expected[name] = {
                **expect_content(database, EVERY_KIND, EVERY_KIND_IDS),
                "base": "every_kind",
                "session": "80 tokens",
            }
        put_json(VECTORS / "databases" / "rejected" / "expected.json", expected)
        # The golden file of this version: one that has a bit of everything.
        put_database(GOLDEN / "v1.db.zst", work / "turns_f32.db")
        put_json(GOLDEN / "v1.json", describe(work / "turns_f32.db"))


if __name__ == "__main__":
    main()
