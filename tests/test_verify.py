"""A problem that somebody makes in a sound file is found, and named."""

from __future__ import annotations

import pytest

import kvstore
from tests.fakes import BytesCache
from tests.oracle import computed, raw, save

PROBLEMS = {
    "payload that belongs to no blob": (
        "INSERT INTO payloads (id, data) VALUES (999, x'00')",
        "belong to no blob",
    ),
    "chunk without its parent": (
        "DELETE FROM chunks WHERE start = 0 AND stop = 64",
        "missing row of chunks",
    ),
    "chunk under another key": (
        "UPDATE chunks SET key = zeroblob(32) WHERE start = 0 AND stop = 64",
        "key",
    ),
    "chunk of another position": (
        "UPDATE chunks SET start = 32, stop = 64 + stop - start - 32 WHERE start = 64",
        "",
    ),
    "chunk that counts other bytes": (
        "UPDATE chunks SET stored_nbytes = stored_nbytes + 1 WHERE start = 64",
        "bytes",
    ),
    "blob that is missing": (
        "DELETE FROM blobs WHERE tensor = 2 AND start = 64",
        "layers.1.attention.kv_cache.k_cache: expected one blob of tokens [64, 70), found []",
    ),
    "blob with another checksum": (
        "UPDATE blobs SET checksum = zeroblob(16) WHERE tensor = 2 AND start = 64",
        "layers.1.attention.kv_cache.k_cache: the checksum does not match",
    ),
    "model with another fingerprint": (
        "UPDATE models SET weights_digest = zeroblob(32)",
        "fingerprint is not that of its three digests",
    ),
    "model with another manifest": (
        "UPDATE models SET manifest = x'80'",
        "manifest",
    ),
    "space with another root": (
        "UPDATE spaces SET root_key = zeroblob(32)",
        "another root key",
    ),
    "session with another count": (
        "UPDATE sessions SET n_tokens = n_tokens + 1 WHERE name = 'long'",
        "session 'long': expected 71 token ids, found 70",
    ),
    "session with other tokens": (
        "UPDATE session_tokens SET tokens = zeroblob(length(tokens)) WHERE start = 64",
        "holds other tokens",
    ),
    "session without some tokens": (
        "DELETE FROM session_tokens WHERE start = 0",
        "token ids are missing at 0",
    ),
    "session with broken metadata": (
        "UPDATE sessions SET metadata = x'c1' WHERE name = 'long'",
        "session 'long'",
    ),
    "session that ends in a chunk that is not there": (
        "UPDATE sessions SET head_id = 999 WHERE name = 'long'",
        "missing row of chunks",
    ),
    "index that does not fit its table": (
        (
            "PRAGMA writable_schema = ON; "
            "UPDATE sqlite_schema SET rootpage = (SELECT sum(rootpage) FROM sqlite_schema "
            "WHERE name IN ('chunks_by_parent', 'chunks_by_base')) - rootpage "
            "WHERE name IN ('chunks_by_parent', 'chunks_by_base')"
        ),
        "sqlite: ",
    ),
}


@pytest.fixture
def sound_path(store_path):
    with kvstore.open(store_path, chunk_n_tokens=64) as store:
        save(store, range(40), name="short")
        save(store, [*range(40), *range(500, 520)], name="borrower")
        cache = computed(range(70))
        store.save_session(cache, cache.tokens, name="long")
        report = store.verify()
        assert report.ok
        assert (report.n_models, report.n_sessions) == (1, 3)
        assert report.n_blobs == 4 * report.n_chunks
        assert report.raw_nbytes == store.stats().raw_nbytes
    return store_path


@pytest.mark.parametrize("problem", PROBLEMS)
def test_verify_finds_a(sound_path, problem):
    statements, expected = PROBLEMS[problem]
    with raw(sound_path) as connection:
        for statement in statements.split("; "):
            assert connection.execute(statement).rowcount != 0
    with kvstore.open(sound_path, read_only=True) as store:
        problems = store.verify().problems
    assert problems
    assert any(expected in one for one in problems), problems


def test_verify_of_an_empty_store_is_ok(store):
    report = store.verify()
    assert report.ok
    assert (report.n_models, report.n_chunks, report.n_blobs, report.raw_nbytes) == (0, 0, 0, 0)


def test_verify_changes_nothing(sound_path):
    before = sound_path.read_bytes()
    with kvstore.open(sound_path, read_only=True) as store:
        store.verify()
    assert sound_path.read_bytes() == before


def test_what_verify_found_is_what_a_load_does_not_use(sound_path):
    with raw(sound_path) as connection:
        connection.execute("UPDATE blobs SET checksum = zeroblob(16) WHERE start = 64")
    with kvstore.open(sound_path, chunk_n_tokens=64) as store:
        cache = BytesCache()
        assert store.load_session(cache, name="long").n_tokens == 64
        assert len(cache.tokens) == 64
