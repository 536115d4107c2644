"""Code, document, vectors and the second reader agree on the file format."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path

import independent_reader
import jsonschema
import msgpack
import pytest
import sqlalchemy as sa
import zstandard
from fakes import (
    BytesCache,
    checkpoint_tensors,
    layout,
    logits_tensor,
    naive_is_visible,
    naive_slot,
    read_slot,
    ring_tensors,
    write_slot,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from independent_reader import Reader, Refused

import kvstore
from kvstore import Edit, Kind, codec, errors
from kvstore._bundle import migrations_dir, schemas_dir
from kvstore.checksum import blob_checksum
from kvstore.db import engine as db
from kvstore.db import tables
from kvstore.db.migrate import upgrade
from kvstore.errors import CorruptStoreError, KVStoreError, MetadataError
from kvstore.layout import DTYPE_ITEMSIZE_NBYTES, Fingerprint, Layout, TensorSpec
from kvstore.lineage import before, pack_extras, unpack_extras
from kvstore.manifest import pack_manifest, pack_metadata, unpack_manifest, unpack_metadata
from kvstore.prefix import chunk_key, root_key
from kvstore.tokens import from_big_endian, to_big_endian

SCHEMAS = schemas_dir()
VECTORS = SCHEMAS / "vectors"
GOLDEN = Path(__file__).with_name("golden")
SMALL = VECTORS / "v2" / "databases" / "accepted" / "small.db.zst"


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


KEYS = read_json(VECTORS / "v1" / "keys.json")
EXTRAS = read_json(VECTORS / "v2" / "keys.json")
BLOBS = {
    verdict: [
        vector
        for version in ("v1", "v2")
        for vector in read_json(VECTORS / version / "blobs.json")[verdict]
    ]
    for verdict in ("accepted", "rejected")
}
LOSSY = read_json(VECTORS / "v2" / "lossy.json")
PCA = read_json(VECTORS / "v3" / "pca.json")
REJECTED = {
    (version, name): expected
    for version in ("v1", "v2", "v3")
    for name, expected in read_json(
        VECTORS / version / "databases" / "rejected" / "expected.json"
    ).items()
}
FORMAT_MD = (schemas_dir() / "FORMAT.md").read_text(encoding="utf-8")
CHUNK_N_TOKENS = 32  # of the database vectors, unless they say otherwise


# Vectors that only a reader of their own version takes for newer: they say that they are of
# the next version, whose schema they do not have.
ONCE_NEWER = [
    (version, name)
    for version in ("v1", "v2")
    for name in (
        "newer_readable",
        "newer_readable_with_trigger",
        "newer_version",
        "newer_version_without_its_row",
    )
]


def files(pattern):
    """The vectors of all versions, but for those that ``ONCE_NEWER`` names."""
    found = sorted(VECTORS.glob(f"v*/{pattern}"))
    ids = [f"{path.relative_to(VECTORS).parts[0]}-{path.name.split('.')[0]}" for path in found]
    return [
        pytest.param(path, id=name)
        for path, name in zip(found, ids, strict=True)
        if name not in {"-".join(one) for one in ONCE_NEWER}
    ]


def description(packed: Path):
    return read_json(packed.with_name(packed.name.replace(".db.zst", ".json")))


def unpacked(packed: Path, folder: Path) -> Path:
    path = folder / packed.name.removesuffix(".zst")
    path.write_bytes(zstandard.ZstdDecompressor().decompress(packed.read_bytes()))
    return path


def cache_for(path: Path, session) -> BytesCache:
    """An empty cache of the session's model, its layout taken from the file."""
    connection = sqlite3.connect(path)
    manifest, *digests = connection.execute(
        "SELECT manifest, weights_digest, program_digest, layout_digest FROM models "
        "WHERE fingerprint = ?",
        (bytes.fromhex(session["model"]),),
    ).fetchone()
    connection.close()
    cache = BytesCache(unpack_manifest(manifest))
    cache.fingerprint = Fingerprint(weights=digests[0], program=digests[1], layout=digests[2])
    return cache


def lineage_of(session) -> tuple[Edit, ...]:
    """The session's edits; a description of version 1 knows none."""
    edits = session.get("edits", [])
    return tuple(Edit(edit["start"], bytes.fromhex(edit["digest"])) for edit in edits)


def check_against_description(path: Path, described) -> None:
    """Everything that the description says can be loaded, and nothing else is there."""
    with kvstore.open(path, read_only=True) as store:
        assert store.verify().problems == ()
        names = {(info.namespace, info.name) for info in store.sessions(all_namespaces=True)}
    assert names == {(one["namespace"], one["name"]) for one in described["sessions"]}
    for session in described["sessions"]:
        cache, lineage = cache_for(path, session), lineage_of(session)
        with kvstore.open(
            path,
            read_only=True,
            chunk_n_tokens=session["chunk_n_tokens"],
            namespace=session["namespace"],
        ) as store:
            by_name = store.load_session(cache, name=session["name"])
            assert list(by_name.tokens) == session["tokens"]
            assert by_name.metadata == unpack_metadata(bytes.fromhex(session["metadata"]))
            assert by_name.edits == cache.edits == before(lineage, by_name.n_tokens)
            # One more id, so that the last one may be restored too.
            hit = store.load_session(cache, [*session["tokens"], 2**62], edits=lineage)
            check_restored(session, cache, hit.n_tokens, restorable(session)[-1])
            for limit, n_tokens in enumerate(session.get("restored_n_tokens", []), start=1):
                cache.truncate(0)
                ids = session["tokens"][:limit]
                ids = ids if has_logits(cache) else [*ids, 2**62]
                hit = store.load_session(cache, ids, edits=lineage)
                check_restored(session, cache, hit.n_tokens, n_tokens)
            if lineage:
                hit = store.load_session(cache, [*session["tokens"], 2**62])
                assert hit.edits == cache.edits == ()
                exact = {**session, **session["exact"], "edits": []}
                exact["n_stored_tokens"] = exact["n_tokens"]
                check_restored(exact, cache, hit.n_tokens, exact["n_tokens"])


def restorable(session) -> list[int]:
    """How many tokens can be restored if at most 1, 2, ... may be; the last is for all."""
    return session.get("restored_n_tokens", [session["n_stored_tokens"]])


def has_logits(cache: BytesCache) -> bool:
    """Whether a load may bring back the last token too."""
    return any(spec.role == "logits" for spec in cache.layout.tensors)


def expected_tensors(session, n_tokens: int):
    """What the description says of a cache of ``n_tokens``, or None if nothing."""
    if n_tokens == session["n_stored_tokens"]:
        return session["tensors"]
    lengths = {one["n_tokens"]: one["tensors"] for one in session.get("lengths", [])}
    return lengths.get(n_tokens)


def check_restored(session, cache: BytesCache, n_tokens: int, expected_n_tokens: int) -> None:
    """The cache holds so many tokens, and what the description says of that many."""
    assert n_tokens == expected_n_tokens == len(cache.tokens)
    assert list(cache.tokens) == session["tokens"][:n_tokens]
    assert cache.edits == before(lineage_of(session), n_tokens)
    tensors = expected_tensors(session, n_tokens)
    for index, expected in enumerate(tensors or ()):
        restored = visible(cache, index)
        assert hashlib.sha256(restored).hexdigest() == expected["sha256"]
        assert expected.get("bytes", restored.hex()) == restored.hex()


def visible(cache: BytesCache, index: int) -> bytes:
    """What the next token sees of a tensor, token-major; all of a positions tensor."""
    spec, n_tokens = cache.layout.tensors[index], len(cache.tokens)
    if spec.kind is Kind.POSITIONS:
        return bytes(cache.memory[index])
    if spec.kind is Kind.CHECKPOINT:
        return bytes(cache.memory[index]) if n_tokens else b""
    return b"".join(
        read_slot(spec, cache.memory[index], naive_slot(spec, position))
        for position in range(n_tokens)
        if naive_is_visible(spec, position, query=n_tokens)
    )


def planned(cache: BytesCache, index: int) -> bytes:
    """A tensor's memory with that, and zeros everywhere else."""
    spec, n_tokens = cache.layout.tensors[index], len(cache.tokens)
    if spec.kind in {Kind.POSITIONS, Kind.CHECKPOINT}:
        return visible(cache, index) or bytes(spec.nbytes)
    memory = bytearray(spec.nbytes)
    for position in range(n_tokens):
        if naive_is_visible(spec, position, query=n_tokens):
            slot = naive_slot(spec, position)
            write_slot(spec, memory, slot, read_slot(spec, cache.memory[index], slot))
    return bytes(memory)


# ---------------------------------------------------------------- keys and digests


@pytest.mark.parametrize("vector", KEYS["layouts"], ids=lambda vector: vector["name"])
def test_layout_digests_are_those_of_the_vectors(vector):
    packed = msgpack.packb({"format": 1, "tensors": vector["tensors"]})
    assert unpack_manifest(packed).digest.hex() == vector["digest"]
    ours = independent_reader.layout_digest(independent_reader.read_manifest(packed))
    assert ours.hex() == vector["digest"]


@pytest.mark.parametrize("vector", KEYS["fingerprints"])
def test_fingerprints_are_those_of_the_vectors(vector):
    digests = {field: bytes.fromhex(vector[field]) for field in ("weights", "program", "layout")}
    assert Fingerprint(**digests).model.hex() == vector["model"]
    assert independent_reader.fingerprint(**digests).hex() == vector["model"]


@pytest.mark.parametrize("vector", KEYS["root_keys"])
def test_root_keys_are_those_of_the_vectors(vector):
    model, adapter = bytes.fromhex(vector["model"]), bytes.fromhex(vector["adapter"])
    size, namespace = vector["chunk_n_tokens"], vector["namespace"]
    key = root_key(model, chunk_n_tokens=size, namespace=namespace, adapter=adapter)
    assert key.hex() == vector["key"]
    assert independent_reader.root_key(model, size, namespace, adapter) == key


@pytest.mark.parametrize("vector", KEYS["chunk_keys"] + EXTRAS["chunk_keys"])
def test_chunk_keys_and_token_columns_are_those_of_the_vectors(vector):
    parent, extras = bytes.fromhex(vector["parent"]), bytes.fromhex(vector["extras"])
    ids = array("Q", vector["tokens"])
    assert chunk_key(parent, ids, extras=extras).hex() == vector["key"]
    assert independent_reader.chunk_key(parent, vector["tokens"], extras).hex() == vector["key"]
    assert to_big_endian(ids).hex() == vector["tokens_column"]
    assert from_big_endian(bytes.fromhex(vector["tokens_column"])) == ids


@pytest.mark.parametrize("vector", EXTRAS["chunk_keys"])
def test_extras_are_those_of_the_vectors(vector):
    start, stop = vector["start"], vector["start"] + len(vector["tokens"])
    extras, lineage = bytes.fromhex(vector["extras"]), lineage_of(vector)
    inside = tuple(edit for edit in lineage if start <= edit.start < stop)
    assert pack_extras(lineage, start, stop) == extras
    assert unpack_extras(extras, start, stop) == inside
    assert independent_reader.extras_of(as_pairs(lineage), start, stop) == extras
    assert independent_reader.read_extras(extras, start, stop) == as_pairs(inside)


@pytest.mark.parametrize("vector", EXTRAS["rejected_extras"], ids=lambda vector: vector["name"])
def test_rejected_extras_are_refused_by_both_readers(vector):
    row = (bytes.fromhex(vector["extras"]), vector["start"], vector["stop"])
    with pytest.raises(errors.InputError):
        unpack_extras(*row)
    with pytest.raises(Refused):
        independent_reader.read_extras(*row)


@pytest.mark.parametrize("vector", KEYS["checksums"])
def test_checksums_are_those_of_the_vectors(vector):
    identity = (bytes.fromhex(vector["key"]), vector["tensor"], vector["start"], vector["stop"])
    decoded = bytes.fromhex(vector["decoded"])
    assert blob_checksum(*identity, [memoryview(decoded)]).hex() == vector["checksum"]
    assert independent_reader.checksum(*identity, decoded).hex() == vector["checksum"]


def test_the_documents_example_is_what_the_vectors_say():
    example = FORMAT_MD[FORMAT_MD.index("## Example") :]
    assert KEYS["layouts"][0]["name"] == "example"
    for value in (
        KEYS["layouts"][0]["digest"],
        KEYS["fingerprints"][0]["model"],
        KEYS["root_keys"][0]["key"],
        KEYS["chunk_keys"][0]["key"],
        KEYS["chunk_keys"][0]["tokens_column"],
        KEYS["chunk_keys"][1]["key"],
        KEYS["checksums"][0]["checksum"],
    ):
        assert value in example
    manifest = (VECTORS / "v1" / "manifests" / "accepted" / "example.msgpack").read_bytes()
    assert f"{len(manifest)} bytes" in example
    assert manifest[:25].hex(" ") in example


def test_the_document_names_every_table_column_dtype_and_codec():
    for table in tables.metadata.tables.values():
        assert f"**{table.name}**" in FORMAT_MD
        for column in table.columns:
            if column.name not in ("id", "created_at_ms", "updated_at_ms"):
                assert f"`{column.name}`" in FORMAT_MD, f"{table.name}.{column.name}"
    for dtype in DTYPE_ITEMSIZE_NBYTES:
        assert f"`{dtype}`" in FORMAT_MD
    for tag, one in {**codec.CODECS, **codec.QUANTIZERS}.items():
        assert f"| {tag} | {one.name} |" in FORMAT_MD
    for kind in Kind:
        assert f"| `{kind}` |" in FORMAT_MD
    for field in dataclasses.fields(TensorSpec):
        assert f"| `{field.name}` |" in FORMAT_MD


def test_the_documents_layout_lines_are_what_is_hashed():
    lines = re.findall(r"`(\w+ \d+ \w+ \w+ \[[\d,]+\] (?:\d+|-)(?: \d+ \d+)?)`", FORMAT_MD)
    assert {line.split()[2] for line in lines} == {"full", "window", "checkpoint"}
    for line in lines:
        role, layer, kind, dtype, shape, axis, *ring = line.split()
        window, sink = map(int, ring or (0, 0))
        spec = TensorSpec(
            name="t",
            role=role,
            layer=int(layer),
            kind=Kind(kind),
            dtype=dtype,
            shape=tuple(json.loads(shape)),
            token_axis=None if axis == "-" else int(axis),
            window_n_tokens=window,
            sink_n_tokens=sink,
        )
        text = f"{line}\n".encode("ascii")
        expected = hashlib.blake2b(text, digest_size=32, person=b"kvstore/layout").digest()
        assert Layout(tensors=(spec,)).digest == expected


# ---------------------------------------------------------------- manifest and metadata


def _strict_integers(_checker, value):
    return isinstance(value, int) and not isinstance(value, bool)


SCHEMA = json.loads((SCHEMAS / "manifest.schema.json").read_text(encoding="utf-8"))
# JSON Schema takes 1.0 for an integer; msgpack tells them apart, and so do readers.
Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _strict_integers),
)
VALIDATOR = Validator(SCHEMA)


def is_accepted(reads, data) -> bool:
    try:
        reads(data)
    except (CorruptStoreError, Refused):
        return False
    return True


def test_the_json_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", files("manifests/accepted/*"))
def test_accepted_manifests_are_accepted_by_both_readers_and_the_schema(path):
    data = path.read_bytes()
    ours, theirs = unpack_manifest(data), independent_reader.read_manifest(data)
    assert ours.digest == independent_reader.layout_digest(theirs)
    assert [spec.slot_nbytes for spec in ours.tensors] == [one.slot_nbytes for one in theirs]
    assert VALIDATOR.is_valid(msgpack.unpackb(data))


@pytest.mark.parametrize("path", files("manifests/rejected/*"))
def test_rejected_manifests_are_refused_by_both_readers(path):
    data = path.read_bytes()
    assert not is_accepted(unpack_manifest, data)
    assert not is_accepted(independent_reader.read_manifest, data)


@pytest.mark.parametrize("path", files("metadata/accepted/*"))
def test_accepted_metadata_are_accepted_by_both_readers(path):
    data = path.read_bytes()
    assert unpack_metadata(data) == independent_reader.read_metadata(data)
    assert pack_metadata(unpack_metadata(data)) == data


@pytest.mark.parametrize("n_items", [100_000, 100_001])
def test_both_readers_and_the_writer_know_the_same_limit_of_items(n_items):
    metadata = {"a": [None] * n_items}
    data = msgpack.packb(metadata)
    is_within = n_items <= 100_000
    assert is_accepted(unpack_metadata, data) == is_within
    assert is_accepted(independent_reader.read_metadata, data) == is_within
    if is_within:
        assert pack_metadata(metadata) == data
    else:
        with pytest.raises(MetadataError, match="at most 100000 items"):
            pack_metadata(metadata)


@pytest.mark.parametrize("path", files("metadata/rejected/*"))
def test_rejected_metadata_are_refused_by_both_readers(path):
    data = path.read_bytes()
    assert not is_accepted(unpack_metadata, data)
    assert not is_accepted(independent_reader.read_metadata, data)


def tensors(name):
    sizes = st.integers(1, 5000)
    shapes = st.lists(sizes, min_size=1, max_size=5)

    @st.composite
    def tensor(draw):
        kind = draw(st.sampled_from(sorted(Kind)))
        shape = draw(shapes)
        axis = None if kind is Kind.CHECKPOINT else draw(st.integers(0, len(shape) - 1))
        if axis:
            shape[0] = 1
        ring = {}
        if kind in {Kind.WINDOW, Kind.POSITIONS}:
            sink = draw(st.integers(0, shape[axis] - 1))
            ring = {
                "sink_n_tokens": sink,
                "window_n_tokens": draw(st.integers(1, shape[axis] - sink)),
            }
        fields = {
            "dtype": draw(st.sampled_from(sorted(DTYPE_ITEMSIZE_NBYTES))),
            "kind": str(kind),
            "layer": draw(st.integers(0, 200)),
            "name": name,
            "role": draw(st.from_regex("[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True)),
            "shape": shape,
            "token_axis": axis,
            **ring,
        }
        return {field: fields[field] for field in sorted(fields)}

    return tensor()


@st.composite
def manifests(draw):
    n_tensors = draw(st.integers(1, 4))
    return {
        "format": 1,
        "tensors": [draw(tensors(f"tensor {number}")) for number in range(n_tensors)],
    }


@given(manifests())
@settings(deadline=None)
def test_every_layout_is_valid_in_code_schema_and_second_reader(manifest):
    VALIDATOR.validate(manifest)
    one = Layout(
        tensors=tuple(
            TensorSpec(**{**tensor, "shape": tuple(tensor["shape"]), "kind": Kind(tensor["kind"])})
            for tensor in manifest["tensors"]
        )
    )
    packed = pack_manifest(one)
    assert packed == msgpack.packb(manifest)  # hypothesis built it in canonical order
    assert unpack_manifest(packed) == one
    theirs = independent_reader.read_manifest(packed)
    assert independent_reader.layout_digest(theirs) == one.digest


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.floats(0, 3),
    st.sampled_from(
        ["", "k", "k v", "v\n", "ü", *map(str, Kind), "paged", "float32", "float8", "2x"]
    ),
    st.binary(max_size=3),
    st.lists(st.integers(-1, 3), max_size=18),
    st.just({}),
)


@given(manifests(), st.data())
@settings(deadline=None, max_examples=100)
def test_a_changed_manifest_is_judged_alike_by_code_schema_and_second_reader(manifest, data):
    target = data.draw(st.sampled_from([manifest, *manifest["tensors"]]))
    ring_fields = ["sink_n_tokens", "window_n_tokens"] if "kind" in target else []
    field = data.draw(st.sampled_from([*target, *ring_fields, "unknown"]))
    if data.draw(st.booleans()):
        target[field] = data.draw(ODD_VALUES)
    else:
        target.pop(field, None)
    verdict = VALIDATOR.is_valid(manifest)
    if verdict:  # the rules here that JSON Schema cannot state
        names = [tensor["name"] for tensor in manifest["tensors"]]
        verdict = len(set(names)) == len(names) and all(
            tensor["sink_n_tokens"] + tensor["window_n_tokens"]
            <= tensor["shape"][tensor["token_axis"]]
            for tensor in manifest["tensors"]
            if "window_n_tokens" in tensor
        )
    packed = msgpack.packb(manifest)
    assert is_accepted(unpack_manifest, packed) == verdict
    assert is_accepted(independent_reader.read_manifest, packed) == verdict


# ---------------------------------------------------------------- codecs


@pytest.mark.parametrize("vector", BLOBS["accepted"], ids=lambda vector: vector["name"])
def test_accepted_blobs_decode_in_both_readers(vector):
    stored, raw_nbytes = bytes.fromhex(vector["stored"]), vector["raw_nbytes"]
    destination = bytearray(raw_nbytes)
    codec.decode_exact_into(vector["codec"], memoryview(stored), memoryview(destination))
    assert destination.hex() == vector["decoded"]
    assert independent_reader.decode(vector["codec"], stored, raw_nbytes) == destination


@pytest.mark.parametrize("vector", BLOBS["rejected"], ids=lambda vector: vector["name"])
def test_rejected_blobs_are_refused_by_both_readers(vector):
    stored, raw_nbytes = bytes.fromhex(vector["stored"]), vector["raw_nbytes"]
    with pytest.raises(Refused):
        independent_reader.decode(vector["codec"], stored, raw_nbytes)
    if raw_nbytes > 1 << 20:
        return  # there is no destination of that size; rows that claim it are refused before
    with pytest.raises(codec.DecodeError):
        codec.decode_exact_into(
            vector["codec"], memoryview(stored), memoryview(bytearray(raw_nbytes))
        )


def block_of(vector):
    return codec.Block(
        dtype=vector["dtype"],
        start=0,
        n_tokens=vector["n_tokens"],
        n_channels=vector["n_channels"],
        head_dim=1,
    )


def read_lossy(vector):
    one = block_of(vector)
    simple = independent_reader.Block(one.dtype, one.n_tokens, one.n_channels)
    stored = bytes.fromhex(vector["stored"])
    return independent_reader.decode_lossy(vector["codec"], stored, simple)


@pytest.mark.parametrize("vector", LOSSY["accepted"], ids=lambda vector: vector["name"])
def test_accepted_lossy_blobs_decode_to_the_bit_in_both_readers(vector):
    assert [part.hex() for part in read_lossy(vector)] == [vector["decoded"], vector["checked"]]
    destination = bytearray(len(vector["decoded"]) // 2)
    checked = codec.decode_into(
        vector["codec"],
        memoryview(bytes.fromhex(vector["stored"])),
        block_of(vector),
        memoryview(destination),
    )
    assert destination.hex() == vector["decoded"]
    assert b"".join(checked).hex() == vector["checked"]


@pytest.mark.parametrize("vector", LOSSY["rejected"], ids=lambda vector: vector["name"])
def test_rejected_lossy_blobs_are_refused_by_both_readers(vector):
    with pytest.raises(Refused):
        read_lossy(vector)
    one = block_of(vector)
    nbytes = one.n_tokens * one.n_channels * DTYPE_ITEMSIZE_NBYTES[one.dtype]
    stored = memoryview(bytes.fromhex(vector["stored"]))
    with pytest.raises(codec.DecodeError):
        codec.decode_into(vector["codec"], stored, one, memoryview(bytearray(nbytes)))


def pca_read_by_both(vector):
    """Numbers and what is checked, by the second reader and by ours."""
    one = codec.Block(
        **{name: vector[name] for name in ("dtype", "start", "n_tokens", "n_channels", "head_dim")}
    )
    stored = bytes.fromhex(vector["stored"])
    basis = PCA["bases"][vector["basis"]]
    data = bytes.fromhex(basis["data"])

    def second():
        read = independent_reader.read_basis(data, basis["n_channels"])
        simple = independent_reader.Block(
            one.dtype, one.n_tokens, one.n_channels, one.start, one.head_dim
        )
        return independent_reader.decode_lossy(6, stored, simple, {read.digest: read})

    def ours():
        known = codec.Basis.from_bytes(memoryview(data), basis["n_channels"])
        nbytes = one.n_tokens * one.n_channels * DTYPE_ITEMSIZE_NBYTES[one.dtype]
        destination = bytearray(nbytes)

        def bases(digest):
            return known if digest == known.digest else codec.no_bases(digest)

        checked = codec.decode_into(6, memoryview(stored), one, memoryview(destination), bases)
        return bytes(destination), b"".join(checked)

    return second, ours


@pytest.mark.parametrize("vector", PCA["accepted"], ids=lambda vector: vector["name"])
def test_accepted_blobs_of_pca_decode_to_the_bit_in_both_readers(vector):
    for read in pca_read_by_both(vector):
        assert [part.hex() for part in read()] == [vector["decoded"], vector["checked"]]


@pytest.mark.parametrize("vector", PCA["rejected"], ids=lambda vector: vector["name"])
def test_rejected_blobs_of_pca_are_refused_by_both_readers(vector):
    second, ours = pca_read_by_both(vector)
    with pytest.raises(Refused):
        second()
    with pytest.raises(CorruptStoreError):
        ours()


@pytest.mark.parametrize("name", PCA["bases"])
def test_bases_are_read_and_written_again_under_the_same_digest(name):
    vector = PCA["bases"][name]
    data = bytes.fromhex(vector["data"])
    basis = codec.Basis.from_bytes(memoryview(data), vector["n_channels"])
    second = independent_reader.read_basis(data, vector["n_channels"])
    assert basis.digest.hex() == second.digest.hex() == vector["digest"]
    again = codec.Basis.from_bytes(memoryview(basis.to_bytes()), vector["n_channels"])
    assert again == basis


@pytest.mark.parametrize("vector", PCA["rejected_bases"], ids=lambda vector: vector["name"])
def test_rejected_bases_are_refused_by_both_readers(vector):
    data = bytes.fromhex(vector["data"])
    with pytest.raises(Refused):
        independent_reader.read_basis(data, vector["n_channels"])
    with pytest.raises(codec.DecodeError):
        codec.Basis.from_bytes(memoryview(data), vector["n_channels"])


def test_the_table_of_sines_is_the_one_that_the_format_names():
    sines = struct.pack("<65536h", *map(independent_reader.sine, range(65536)))
    digest = hashlib.blake2b(sines, digest_size=32).hexdigest()
    assert digest in FORMAT_MD


@pytest.mark.parametrize(
    ("version", "name", "one"),
    [
        ("v2", "lossy", layout(capacity_n_tokens=96, head_dim=32)),
        ("v3", "pca", layout(n_layers=1, capacity_n_tokens=256, n_kv_heads=1, head_dim=16)),
    ],
)
def test_a_file_with_lossy_key_spaces_restores_as_described(version, name, one, tmp_path):
    folder = VECTORS / version / "databases"
    path = unpacked(folder / f"{name}.db.zst", tmp_path)
    described = read_json(folder / f"{name}.json")["sessions"]
    with independent_reader.Reader(path) as reader:
        reader.verify()
        sessions = {session.name: session for session in reader.sessions()}
        assert len(sessions) == len(described)
        for expected in described:
            session = sessions[expected["name"]]
            assert (independent_reader.codec_text(session.adapter) or "exact") == expected["codec"]
            restored = reader.restore(session, expected["n_tokens"])
            digests = [hashlib.sha256(data).hexdigest() for data in restored.tensors]
            assert (restored.n_tokens, digests) == (expected["n_tokens"], expected["tensors"])
            cache = BytesCache(one)
            with kvstore.open(path, chunk_n_tokens=session.chunk_n_tokens) as store:
                assert store.verify().problems == ()
                hit = store.load_session(cache, name=session.name)
            assert (hit.n_tokens, list(hit.tokens)) == (expected["n_tokens"], expected["tokens"])
            digests = [
                hashlib.sha256(cache.buffer(index)[: hit.n_tokens * spec.slot_nbytes]).hexdigest()
                for index, spec in enumerate(cache.layout.tensors)
            ]
            assert digests == expected["tensors"]


OF_BASES = read_json(VECTORS / "v3" / "databases" / "rejected_bases" / "expected.json")


@pytest.mark.parametrize("name", OF_BASES)
def test_files_with_wrong_bases_give_what_needs_none_of_them(name, tmp_path):
    folder, expected = VECTORS / "v3" / "databases", OF_BASES[name]
    path = unpacked(folder / "rejected_bases" / f"{name}.db.zst", tmp_path)
    with Reader(path) as reader, pytest.raises(Refused):
        reader.verify()
    good, found = (
        BytesCache(layout(n_layers=1, capacity_n_tokens=256, n_kv_heads=1, head_dim=16))
        for _ in range(2)
    )
    with kvstore.open(path, read_only=True, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        assert not store.verify().ok
        assert store.load_session(found, name=expected["session"]).n_tokens == expected["n_tokens"]
    path = unpacked(folder / "pca.db.zst", tmp_path)
    with kvstore.open(path, read_only=True, chunk_n_tokens=CHUNK_N_TOKENS) as store:
        store.load_session(good, name=expected["session"])
    good.truncate(expected["n_tokens"])
    assert found.used() == good.used()


# ---------------------------------------------------------------- whole files


@pytest.mark.parametrize("packed", files("databases/accepted/*.zst"))
def test_accepted_files_load_as_described(packed, tmp_path):
    path = unpacked(packed, tmp_path)
    before_loads = path.read_bytes()
    check_against_description(path, description(packed))
    assert path.read_bytes() == before_loads


@pytest.mark.parametrize("packed", files("databases/accepted/*.zst"))
def test_the_second_reader_restores_accepted_files_as_described(packed, tmp_path):
    check_second_reader(unpacked(packed, tmp_path), description(packed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "packed", [one for one in files("databases/accepted/*.zst") if not one.id.startswith("v3-")]
)
def test_accepted_files_of_older_versions_hold_the_same_after_an_upgrade(packed, tmp_path):
    path = unpacked(packed, tmp_path)
    kvstore.open(path).close()
    (version,), _ = content(path)
    assert version == tables.FORMAT_VERSION
    check_against_description(path, description(packed))
    check_second_reader(path, description(packed))


def check_second_reader(path, described):
    """The second reader restores what the description says."""
    with Reader(path) as reader:
        reader.verify()
        sessions = reader.sessions()
        assert len(sessions) == len(described["sessions"])
        for session, expected in zip(sessions, described["sessions"], strict=True):
            lineage = as_pairs(lineage_of(expected))
            assert (session.namespace, session.name) == (expected["namespace"], expected["name"])
            assert session.tokens == expected["tokens"]
            assert session.model.hex() == expected["model"]
            assert session.metadata == unpack_metadata(bytes.fromhex(expected["metadata"]))
            assert reader.lineage(session) == lineage
            n_restored = restorable(expected)
            limits = range(1, len(n_restored) + 1) if len(n_restored) > 1 else [len(session.tokens)]
            for limit, n_tokens in zip(limits, n_restored, strict=True):
                restored = reader.restore(session, limit)
                assert restored.n_tokens == n_tokens
                tensors = expected_tensors(expected, n_tokens)
                for data, tensor in zip(
                    restored.tensors, tensors or (), strict=tensors is not None
                ):
                    assert hashlib.sha256(data).hexdigest() == tensor["sha256"]
            if lineage:
                exact = reader.look_up(session, session.tokens)
                assert exact.n_tokens == expected["exact"]["n_tokens"]
                for data, tensor in zip(exact.tensors, expected["exact"]["tensors"], strict=True):
                    assert hashlib.sha256(data).hexdigest() == tensor["sha256"]


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_every_rejected_file_has_an_expectation(version):
    found = (VECTORS / version / "databases" / "rejected").glob("*.zst")
    assert {(version, path.name.removesuffix(".db.zst")) for path in found} == {
        one for one in REJECTED if one[0] == version
    }


def rejected(found_by):
    """The rejected files that are found by ``found_by``, with their expectations."""
    return [
        pytest.param(packed, REJECTED[version, name], id=one.id)
        for one in files("databases/rejected/*.zst")
        for packed, (version, name) in [(one.values[0], one.id.split("-"))]
        if REJECTED[version, name]["found_by"] == found_by
    ]


@pytest.mark.parametrize("read_only", [False, True], ids=["writable", "read-only"])
@pytest.mark.parametrize(("packed", "expected"), rejected("opening"))
def test_rejected_files_are_refused_when_they_are_opened(packed, expected, read_only, tmp_path):
    check_refused(unpacked(packed, tmp_path), expected["error"], read_only=read_only)


@pytest.mark.parametrize("read_only", [False, True], ids=["writable", "read-only"])
@pytest.mark.parametrize(("version", "name"), ONCE_NEWER)
def test_what_was_newer_than_an_older_version_is_refused(version, name, read_only, tmp_path):
    (packed,) = VECTORS.glob(f"{version}/databases/*/{name}.db.zst")
    path = unpacked(packed, tmp_path)
    check_refused(path, "SchemaMismatchError", read_only=read_only)
    with pytest.raises(Refused):
        Reader(path)


def check_refused(path, error, *, read_only):
    before_opening = path.read_bytes()
    with pytest.raises(getattr(errors, error)) as caught:
        kvstore.open(path, read_only=read_only, chunk_n_tokens=CHUNK_N_TOKENS)
    assert type(caught.value).__name__ == error
    assert path.read_bytes() == before_opening
    assert [one.name for one in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("read_only", [False, True], ids=["writable", "read-only"])
@pytest.mark.parametrize(("packed", "expected"), rejected("content"))
def test_rejected_files_give_nothing_that_was_not_saved(packed, expected, read_only, tmp_path):
    """Read as they are, and (those of version 1) after an upgrade."""
    path = unpacked(packed, tmp_path)
    accepted = packed.parents[1] / "accepted" / f"{expected.get('base', 'small')}.db.zst"
    name = expected.get("session", "a")
    (session,) = (one for one in description(accepted)["sessions"] if one["name"] == name)
    before_loads = path.read_bytes()
    wanted = [(session, lineage_of(session), expected["n_tokens"])]
    if lineage_of(session):
        wanted.append((session["exact"], (), expected["exact_n_tokens"]))
    for described, lineage, n_tokens in wanted:
        cache = cache_for(unpacked(accepted, tmp_path), session)
        with kvstore.open(path, read_only=read_only, chunk_n_tokens=CHUNK_N_TOKENS) as store:
            assert not store.verify().ok
            hit = store.load_session(cache, [*session["tokens"], 0], edits=lineage)
            assert hit.n_tokens == n_tokens == len(cache.tokens)
            check_beginning(cache, described)
    if not cache.layout.is_full:
        assert hit.n_tokens == 0  # nothing before the damage is worth anything
    if read_only:
        assert path.read_bytes() == before_loads


@pytest.mark.parametrize(("packed", "expected"), rejected("content"))
def test_a_session_in_a_rejected_file_is_an_error_or_what_was_saved(packed, expected, tmp_path):
    path = unpacked(packed, tmp_path)
    accepted = packed.parents[1] / "accepted" / f"{expected.get('base', 'small')}.db.zst"
    good = unpacked(accepted, tmp_path)
    for session in description(accepted)["sessions"]:
        cache = cache_for(good, session)
        with kvstore.open(path, read_only=True, chunk_n_tokens=CHUNK_N_TOKENS) as store:
            with contextlib.suppress(errors.StoreError, errors.SessionError):
                store.load_session(cache, name=session["name"])
            if cache.edits == before(lineage_of(session), len(cache.tokens)):
                check_beginning(cache, session)
            else:
                assert not cache.edits
                check_beginning(cache, session["exact"])


def check_beginning(cache, described):
    """Whatever is in a cache of full tensors is the beginning of what was saved."""
    for tensor, slots in zip(described["tensors"], cache.used(), strict=cache.layout.is_full):
        if cache.layout.is_full:
            assert tensor["bytes"].startswith(b"".join(slots).hex())


@pytest.mark.parametrize(("packed", "expected"), rejected("opening") + rejected("content"))
def test_the_second_reader_refuses_rejected_files(packed, expected, tmp_path):
    path = unpacked(packed, tmp_path)
    if expected["found_by"] == "opening":
        with pytest.raises(Refused):
            Reader(path)
        return
    with Reader(path) as reader, pytest.raises(Refused):
        reader.verify()


def test_the_second_reader_follows_parents_to_an_end(tmp_path):
    packed = VECTORS / "v2" / "databases" / "rejected" / "parent_is_itself.db.zst"
    with Reader(unpacked(packed, tmp_path)) as reader:
        (session,) = (one for one in reader.sessions() if one.name == "edited")
        with pytest.raises(Refused, match="not the chunk before"):
            reader.restore(session)


def test_the_second_reader_works_as_a_script(tmp_path):
    path = unpacked(SMALL, tmp_path)
    done = subprocess.run(
        [sys.executable, independent_reader.__file__, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'' 'a': 55 of 55 tokens" in done.stdout
    for session in description(SMALL)["sessions"]:
        for tensor in session["tensors"]:
            assert tensor["sha256"] in done.stdout
        for edit in session["edits"]:
            assert f"edited from token {edit['start']} on: {edit['digest']}" in done.stdout


def test_the_second_reader_imports_nothing_of_kvstore():
    source = Path(independent_reader.__file__).read_text(encoding="utf-8")
    assert not re.search(
        r"^\s*(import|from)\s+(kvstore|runtime_adapter|fakes)", source, re.MULTILINE
    )


TURNS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", None]),
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 45)), min_size=1, max_size=3),
        st.sampled_from(["save", "save", "go on", "go on", "save fewer", "delete", "prune"]),
        st.none() | st.tuples(st.integers(0, 60), st.sampled_from("xy")),
    ),
    min_size=1,
    max_size=6,
)


def mixed(*extra):
    """A full layer and ``extra``; as many tokens fit as into the other layouts."""
    return Layout(tensors=(*layout(n_layers=1, capacity_n_tokens=160).tensors, *extra))


FULL_LAYOUTS = [
    layout(n_layers=1, dtype=dtype, head_major=head_major, capacity_n_tokens=160)
    for dtype in ("float32", "float16", "bfloat16", "int8")
    for head_major in (False, True)
]
MIXED_LAYOUTS = [
    mixed(*ring_tensors(layer=1, window_n_tokens=8)),
    mixed(
        *ring_tensors(layer=1, window_n_tokens=20, ring_n_slots=21, head_major=True),
        *ring_tensors(layer=2, window_n_tokens=5),
    ),
    Layout(tensors=ring_tensors(layer=0, window_n_tokens=8, sink_n_tokens=3)),
    mixed(*checkpoint_tensors(layer=1), logits_tensor()),
    mixed(*checkpoint_tensors(layer=1)),
    mixed(
        *ring_tensors(layer=1, window_n_tokens=8, sink_n_tokens=2, head_major=True),
        *checkpoint_tensors(layer=2),
        logits_tensor(),
    ),
]

STORES = (
    TURNS,
    st.one_of(st.sampled_from(MIXED_LAYOUTS), st.sampled_from(FULL_LAYOUTS)),
    st.sampled_from([8, 32]),
    st.sampled_from([1, 16, 1000]),
)


@given(*STORES)
@settings(deadline=None, max_examples=10)
def test_both_readers_agree_on_a_few_stores(turns, one, chunk_n_tokens, checkpoint_n_tokens):
    check_both_readers(turns, one, chunk_n_tokens, checkpoint_n_tokens)


@pytest.mark.slow
@given(*STORES)
@settings(deadline=None, max_examples=200)
def test_both_readers_agree_on_many_stores(turns, one, chunk_n_tokens, checkpoint_n_tokens):
    check_both_readers(turns, one, chunk_n_tokens, checkpoint_n_tokens)


def play(store, one, turns):
    """Saves (computed afresh, or on top of a load; of all tokens or of fewer) and deletions.

    Between the runs of tokens some caches are edited. Returns the edits of each session.
    """
    edits = {}
    for name, runs, action, edit in turns:
        names = {info.name for info in store.sessions()}
        if action == "delete" and name in names:
            store.delete_session(name)
        elif action == "prune":
            store.prune(max_bytes=store.stats().file_nbytes - 16384 * 2)
        else:
            ids = [token for token, n_tokens in runs for _ in range(n_tokens)]
            cache = BytesCache(one)
            if action == "go on":
                store.load_session(cache, ids, edits=edits.get(name, ()))
            if edit is not None:
                n_tokens = max(len(cache.tokens), runs[0][1])
                cache.compute(ids[len(cache.tokens) : n_tokens])
                cache.edit(edit[0] % n_tokens, edit[1])
            cache.compute(ids[len(cache.tokens) :])
            fewer = len(ids) - len(ids) // 4 if action == "save fewer" else len(ids)
            store.save_session(cache, ids[:fewer], name=name)
            edits[name] = before(cache.edits, fewer)
    return edits


def check_both_readers(turns, one, chunk_n_tokens, checkpoint_n_tokens):
    """Play ``turns``; then both readers must find the same, and what a model would compute."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.db"
        with kvstore.open(
            path, chunk_n_tokens=chunk_n_tokens, checkpoint_n_tokens=checkpoint_n_tokens
        ) as store:
            edits = play(store, one, turns)
            assert store.verify().problems == ()
            cache = BytesCache(one)
            with Reader(path) as reader:
                reader.verify()
                sessions = reader.sessions()
                n_stored = {info.name: info.n_stored_tokens for info in store.sessions()}
                assert {session.name for session in sessions} == n_stored.keys()
                for session in sessions:
                    # Those behind what is stored went with it.
                    lineage = before(edits[session.name], n_stored[session.name])
                    assert reader.lineage(session) == as_pairs(lineage)
                    n_tokens = session.n_tokens
                    for limit in {n_tokens, n_tokens - 1, n_tokens * 2 // 3, n_tokens // 3} - {0}:
                        ids = session.tokens[:limit]
                        restored = reader.restore(session, limit)
                        check_both_restored(store, cache, ids, lineage, restored)
                        if lineage:
                            exact = reader.look_up(session, ids)
                            check_both_restored(store, cache, ids, (), exact)


def as_pairs(lineage):
    """A lineage as the second reader has it."""
    return tuple((edit.start, edit.digest) for edit in lineage)


def check_both_restored(store, cache, ids, lineage, restored):
    """A load of ``ids`` and ``lineage`` gives what the second reader found."""
    cache.truncate(0)
    hit = store.load_session(cache, ids if has_logits(cache) else [*ids, 9], edits=lineage)
    assert hit.n_tokens == restored.n_tokens
    assert hit.has_logits == (has_logits(cache) and hit.n_tokens == len(ids))
    assert hit.edits == cache.edits == before(lineage, hit.n_tokens)
    assert cache.wrong() == []
    for index, (found, memory) in enumerate(zip(restored.tensors, restored.planned, strict=True)):
        assert found == visible(cache, index)
        assert memory == planned(cache, index)


# ---------------------------------------------------------------- migrations and golden files


def schema_objects(path):
    connection = sqlite3.connect(path)
    found = independent_reader.objects(connection)
    connection.close()
    return found


def test_migrations_schema_sql_and_tables_say_the_same(tmp_path):
    kvstore.open(tmp_path / "made.db").close()
    stated = sqlite3.connect(tmp_path / "stated.db")
    stated.executescript((SCHEMAS / "schema.sql").read_text(encoding="utf-8"))
    stated.close()
    assert schema_objects(tmp_path / "made.db") == schema_objects(tmp_path / "stated.db")

    made_file = sqlite3.connect(tmp_path / "made.db")
    inspector = sa.inspect(sa.create_engine(f"sqlite:///{tmp_path / 'made.db'}"))
    try:
        assert set(inspector.get_table_names()) == {*tables.metadata.tables, "alembic_version"}
        for table in tables.metadata.tables.values():
            made = {column["name"]: column for column in inspector.get_columns(table.name)}
            assert list(made) == [column.name for column in table.columns]
            for column in table.columns:
                assert made[column.name]["nullable"] == column.nullable, column
                assert bool(made[column.name]["primary_key"]) == column.primary_key, column
                assert made[column.name]["type"]._type_affinity is column.type._type_affinity
            references = {
                (row[3], row[2], row[6])
                for row in made_file.execute(f"PRAGMA foreign_key_list({table.name})")
            }
            assert references == {
                (column.name, key.column.table.name, "RESTRICT")
                for column in table.columns
                for key in column.foreign_keys
            }
    finally:
        made_file.close()
        inspector.engine.dispose()


def test_a_new_file_has_the_header_that_the_document_states(tmp_path):
    kvstore.open(tmp_path / "s.db").close()
    connection = sqlite3.connect(tmp_path / "s.db")
    header = {
        name: connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in (
            "application_id",
            "user_version",
            "page_size",
            "auto_vacuum",
            "journal_mode",
            "encoding",
        )
    }
    rows = connection.execute("SELECT * FROM format").fetchall()
    connection.close()
    assert header == {
        "application_id": 0x6B767331,
        "user_version": 3,
        "page_size": 16384,
        "auto_vacuum": 2,
        "journal_mode": "wal",
        "encoding": "UTF-8",
    }
    assert rows == [(1, 3, 2, 3)]


@pytest.fixture
def later_migrations(tmp_path):
    """The shipped migrations in a folder of their own, and a function that adds one."""
    scripts = tmp_path / "migrations"
    shutil.copytree(migrations_dir(), scripts, ignore=shutil.ignore_patterns("__pycache__"))

    def add(*statements):
        lines = "".join(f"    op.execute({statement!r})\n" for statement in statements)
        (scripts / "versions" / "0004_more.py").write_text(
            "from alembic import op\n\n"
            'revision = "0004"\ndown_revision = "0003"\n\n\n'
            f"def upgrade():\n{lines}",
            encoding="utf-8",
        )
        return scripts

    return add


def run_upgrade(path, scripts):
    engine = db.make_engine(path, access="write")
    try:
        with db.exclusive_transaction(engine) as connection:
            upgrade(connection, scripts=scripts)
    finally:
        engine.dispose()


def content(path):
    connection = sqlite3.connect(path)
    lines = list(connection.iterdump())
    version = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return version, lines


def test_a_migration_that_fails_half_way_changes_nothing(later_migrations, tmp_path):
    path = unpacked(GOLDEN / "v3.db.zst", tmp_path)
    content_before, objects_before = content(path), schema_objects(path)
    scripts = later_migrations(
        "CREATE TABLE more (id INTEGER NOT NULL PRIMARY KEY)",
        "INSERT INTO more (id) VALUES (1)",
        "DROP INDEX chunks_by_space",
        "UPDATE format SET version = 4",
        "PRAGMA user_version = 4",
        "INSERT INTO no_such_table VALUES (1)",
    )
    with pytest.raises(sa.exc.OperationalError, match="no_such_table"):
        run_upgrade(path, scripts)
    assert content(path) == content_before
    assert schema_objects(path) == objects_before
    with kvstore.open(path) as store:
        assert store.verify().ok


def test_a_later_migration_upgrades_and_this_version_then_only_reads(later_migrations, tmp_path):
    path = unpacked(GOLDEN / "v3.db.zst", tmp_path)
    run_upgrade(
        path,
        later_migrations(
            "CREATE TABLE more (id INTEGER NOT NULL PRIMARY KEY)",
            "UPDATE format SET version = 4",
            "PRAGMA user_version = 4",
        ),
    )
    (version,), _ = content(path)
    assert version == 4
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0004",)]
    connection.close()
    check_against_description(path, description(GOLDEN / "v3.db.zst"))
    with kvstore.open(path) as store:
        assert store.read_only
        assert store.verify().ok


@pytest.mark.parametrize("packed", sorted(GOLDEN.glob("*.zst")), ids=lambda path: path.name)
def test_golden_files_open_load_and_can_be_saved_into(packed, tmp_path):
    described = description(packed)
    path = unpacked(packed, tmp_path)
    check_against_description(path, described)
    kvstore.open(path).close()  # an older one is upgraded here
    check_against_description(path, described)
    for session in described["sessions"]:
        cache = cache_for(path, session)
        with kvstore.open(
            path, chunk_n_tokens=session["chunk_n_tokens"], namespace=session["namespace"]
        ) as store:
            lineage = lineage_of(session)
            store.load_session(cache, [*session["tokens"], 2**62], edits=lineage)
            cache.compute([1, 2, 3])
            saved = store.save_session(cache, cache.tokens, name="saved today")
            assert saved.n_new_tokens == 3
            other = cache_for(path, session)
            hit = store.load_session(other, [*cache.tokens, 0], edits=lineage)
            assert hit.n_tokens == len(cache.tokens)
            assert other.used() == cache.used()
            cache.edit(len(session["tokens"]), "struck")
            store.save_session(cache, cache.tokens, name="edited today")
            hit = store.load_session(other, [*cache.tokens, 0], edits=cache.edits)
            assert hit.n_tokens == len(cache.tokens)
            assert other.used() == cache.used()
            store.delete_session("edited today")
            store.delete_session("saved today")
            assert store.verify().ok
    check_against_description(path, described)


def test_every_error_that_the_vectors_name_exists():
    names = {one["error"] for one in REJECTED.values() if "error" in one}
    assert all(issubclass(getattr(errors, name), KVStoreError) for name in names)
