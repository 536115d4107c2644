from __future__ import annotations

import hashlib
import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvstore
from kvstore import MissReason
from kvstore.errors import InputError, KVStoreError, SessionNotFoundError
from kvstore.layout import DTYPE_ITEMSIZE_NBYTES
from tests.fakes import BytesCache, layout
from tests.oracle import assert_exact, computed, load_exact, raw, save

TOKENS = list(range(100, 130))


# ------------------------------------------------------------------- exactness


@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("dtype", DTYPE_ITEMSIZE_NBYTES)
def test_every_prefix_length_is_restored_byte_for_byte(store, dtype, head_major):
    one = layout(dtype=dtype, head_major=head_major)
    whole = computed(TOKENS, one)
    store.save_session(whole, TOKENS, name="a")
    cache = BytesCache(one)
    for length in range(1, len(TOKENS) + 1):
        cache.truncate(0)
        result = store.load_session(cache, TOKENS[:length])
        assert (result.n_tokens, result.reason) == (length - 1, None)
        assert cache.used() == [slots[: length - 1] for slots in whole.used()]


@pytest.mark.parametrize("chunk_n_tokens", [*range(1, 17), 29, 30, 31, 32, 33, 63, 64])
def test_every_chunk_size_restores_every_length(open_store, chunk_n_tokens):
    store = open_store(chunk_n_tokens=chunk_n_tokens)
    cache = computed([], layout(n_layers=1))
    for stop in (1, 5, 12, 29, 30, 47):  # saved as the session grows
        cache.compute(range(len(cache.tokens), stop))
        store.save_session(cache, cache.tokens, name="a")
    for length in (*range(2, 48, 3), 47):
        other = BytesCache(cache.layout)
        result = load_exact(store, range(length), cache=other)
        assert (result.n_tokens, result.reason) == (length - 1, None)


@pytest.mark.parametrize("head_major", [False, True])
def test_another_process_restores_the_same_bytes(open_store, run_source, head_major):
    store = open_store(chunk_n_tokens=8)
    one = layout(head_major=head_major, dtype="bfloat16")
    cache = computed(TOKENS, one)
    store.save_session(cache, TOKENS, name="a", metadata={"turn": 1})
    output = run_source(
        "import sys, hashlib, kvstore\n"
        "from tests.fakes import BytesCache, layout\n"
        "cache = BytesCache(layout(head_major=sys.argv[2] == 'True', dtype='bfloat16'))\n"
        "with kvstore.open(sys.argv[1], chunk_n_tokens=8) as store:\n"
        "    hit = store.load_session(cache, name='a')\n"
        "    cache.compute([7])\n"
        "    store.save_session(cache, cache.tokens, name='b')\n"
        "digest = hashlib.sha256(repr(cache.used()).encode()).hexdigest()\n"
        "print(hit.n_tokens, hit.metadata, digest)",
        store.path,
        head_major,
    )
    cache.truncate(29)
    cache.compute([7])
    digest = hashlib.sha256(repr(cache.used()).encode()).hexdigest()
    assert output.split() == ["29", "{'turn':", "1}", digest]
    load_exact(store, name="b", cache=BytesCache(one))


@given(data=st.data())
def test_what_is_loaded_is_the_longest_common_prefix_of_all_that_was_saved(data, tmp_path_factory):
    """Checked against every saved sequence, one by one."""
    path = tmp_path_factory.mktemp("stores") / "sessions.db"
    chunk_n_tokens = data.draw(st.integers(1, 9), label="chunk_n_tokens")
    sequences = st.lists(st.integers(0, 1), min_size=1, max_size=40)
    saved: list[list[int]] = []
    with kvstore.open(path, chunk_n_tokens=chunk_n_tokens) as store:
        for number in range(data.draw(st.integers(1, 5), label="sessions")):
            tokens = data.draw(sequences, label="tokens")
            if saved and data.draw(st.booleans(), label="continue"):
                former = data.draw(st.sampled_from(saved), label="former")
                tokens = [*former[: data.draw(st.integers(0, len(former)))], *tokens]
            cache = computed(tokens, SMALL)
            name = data.draw(st.sampled_from([None, str(number)]), label="name")
            store.save_session(cache, tokens, name=name)
            saved.append(tokens)
        prompt = [*data.draw(st.sampled_from(saved), label="saved")]
        prompt = [*prompt[: data.draw(st.integers(0, len(prompt)))], *data.draw(sequences)]
        cache = BytesCache(SMALL)
        if data.draw(st.booleans(), label="live"):
            cache.compute(data.draw(st.sampled_from([prompt, *saved])))
        live = list(cache.tokens)
        result = load_exact(store, prompt, cache=cache)
        expected = max(common(prompt[:-1], one) for one in [live, *saved])
        assert result.n_tokens == expected
        assert result.n_kept_tokens == common(prompt[:-1], live)
        assert store.verify().problems == ()


SMALL = layout(n_layers=1, n_kv_heads=1, dtype="float16", capacity_n_tokens=128)


def common(left, right):
    n_tokens = 0
    while n_tokens < min(len(left), len(right)) and left[n_tokens] == right[n_tokens]:
        n_tokens += 1
    return n_tokens


# ------------------------------------------------------------------- semantics


def test_at_most_all_but_the_last_token_are_restored(store):
    save(store, TOKENS, name="a")
    assert load_exact(store, TOKENS).n_tokens == 29
    assert load_exact(store, [*TOKENS, 1]).n_tokens == 30
    assert load_exact(store, TOKENS[:1]).n_tokens == 0


@pytest.mark.parametrize("by_name", [False, True])
def test_the_last_token_is_restored_too_if_all_is_asked_for(store, by_name):
    save(store, TOKENS, name="a")
    asked = {"name": "a"} if by_name else {"tokens": TOKENS}
    cache = BytesCache()
    result = store.load_session(cache, **asked, whole=True)
    assert (result.n_tokens, result.n_requested, result.reason) == (30, 30, None)
    assert not result.has_logits
    assert_exact(cache, TOKENS)
    longer = store.load_session(BytesCache(), [*TOKENS, 1], whole=True)
    assert (longer.n_tokens, longer.reason) == (30, MissReason.NO_MATCH)
    small = store.load_session(BytesCache(layout(capacity_n_tokens=30)), TOKENS, whole=True)
    assert small.reason is MissReason.OTHER_LAYOUT
    assert store.verify().ok


def test_a_prompt_that_leaves_a_chunk_half_way_gets_the_half(open_store):
    store = open_store(chunk_n_tokens=16)
    save(store, TOKENS, name="a")
    for position in range(1, 30):
        result = load_exact(store, [*TOKENS[:position], 1, 2, 3])
        assert result.n_tokens == position
        assert result.reason is MissReason.NO_MATCH
        assert f"at {position}" in result.detail


def test_a_result_says_what_served_it(store):
    save(store, TOKENS, name="a")
    result = load_exact(store, TOKENS[:20])
    assert (result.n_tokens, result.n_requested, result.n_kept_tokens) == (19, 20, 0)
    assert result.session == "a"
    assert len(result.chunks) == 3
    assert all(len(bytes.fromhex(key)) == 32 for key in result.chunks)
    assert result.raw_nbytes == 19 * layout().token_nbytes
    assert result.stored_nbytes >= result.raw_nbytes
    assert result.metadata is None
    assert list(result.tokens) == TOKENS[:20]
    assert result.seconds > 0


def test_a_load_by_name_brings_tokens_and_metadata(store):
    save(store, TOKENS, name="a", metadata={"turn": 3})
    result = load_exact(store, name="a")
    assert (list(result.tokens), result.metadata) == (TOKENS, {"turn": 3})
    assert (result.n_tokens, result.n_requested, result.session) == (29, 30, "a")


def test_a_name_that_is_not_there_is_an_error_and_the_cache_is_unchanged(store):
    cache = computed(TOKENS)
    with pytest.raises(SessionNotFoundError, match="no session is named 'a'"):
        store.load_session(cache, name="a")
    assert_exact(cache, TOKENS)


@pytest.mark.parametrize("arguments", [{}, {"tokens": [1], "name": "a"}])
def test_either_tokens_or_a_name_must_be_given(store, arguments):
    with pytest.raises(InputError, match="either tokens or name"):
        store.load_session(BytesCache(), **arguments)


def test_an_empty_store_is_a_miss_that_leaves_an_empty_cache(store):
    cache = computed([1, 2, 3])
    result = load_exact(store, TOKENS, cache=cache)
    assert (result.n_tokens, result.reason) == (0, MissReason.NO_MATCH)
    assert result.detail == "the store is empty"
    assert list(cache.tokens) == []


def test_a_miss_empties_the_cache(store):
    save(store, TOKENS, name="a")
    cache = computed([1, 2, 3])
    result = load_exact(store, [9, 8, 7], cache=cache)
    assert (result.n_tokens, result.reason) == (0, MissReason.NO_MATCH)
    assert (result.session, result.chunks) == (None, ())


def test_what_is_live_and_matches_further_is_kept_without_reading(store):
    save(store, TOKENS[:12], name="a")
    cache = computed([*TOKENS, 5, 6])
    result = load_exact(store, [*TOKENS, 7], cache=cache)
    assert (result.n_tokens, result.n_kept_tokens, result.reason) == (30, 30, None)
    assert (result.raw_nbytes, result.stored_nbytes) == (0, 0)


def test_only_what_is_not_live_is_read(store):
    save(store, TOKENS, name="a")
    cache = computed([*TOKENS[:13], 1, 2])
    result = load_exact(store, TOKENS, cache=cache)
    assert (result.n_tokens, result.n_kept_tokens) == (29, 13)
    assert result.raw_nbytes == 16 * layout().token_nbytes


def test_an_edited_cache_keeps_what_lies_before_the_edit(store):
    save(store, TOKENS, name="a")
    cache = computed(TOKENS)
    cache.edit(13, "set by hand")
    result = load_exact(store, TOKENS, cache=cache)
    assert (result.n_tokens, result.n_kept_tokens) == (29, 13)
    assert cache.edits == result.edits == ()


def test_a_load_writes_nothing_behind_what_it_restored(store):
    save(store, TOKENS, name="a")
    cache = BytesCache()
    store.load_session(cache, TOKENS[:20])
    spec = cache.layout.tensors[0]
    assert set(cache.memory[0][19 * spec.slot_nbytes :]) == {0xEE}


def test_other_weights_are_a_miss_with_that_reason(store):
    save(store, TOKENS, name="a")
    result = load_exact(store, TOKENS, cache=BytesCache(weights="other"))
    assert (result.n_tokens, result.reason) == (0, MissReason.OTHER_MODEL)
    assert result.detail == "the same program is stored with other weights"


def test_a_session_of_another_model_loaded_by_name_is_a_miss_with_its_tokens(store):
    save(store, TOKENS, name="a", metadata={"turn": 1})
    result = load_exact(store, name="a", cache=BytesCache(weights="other"))
    assert (result.n_tokens, result.reason) == (0, MissReason.OTHER_MODEL)
    assert (list(result.tokens), result.metadata) == (TOKENS, {"turn": 1})


@pytest.mark.parametrize(
    "other",
    [{"n_layers": 3}, {"dtype": "float16"}, {"head_major": True}, {"capacity_n_tokens": 64}],
)
def test_another_layout_is_a_miss_with_that_reason(store, other):
    save(store, TOKENS, name="a")
    result = load_exact(store, TOKENS, cache=BytesCache(layout(**other)))
    assert (result.n_tokens, result.reason) == (0, MissReason.OTHER_LAYOUT)


def test_more_than_the_capacity_is_restored_up_to_it(store):
    small = layout(capacity_n_tokens=16)
    store.save_session(computed(TOKENS[:16], small), TOKENS[:16], name="a")
    result = load_exact(store, TOKENS, cache=BytesCache(small))
    assert (result.n_tokens, result.reason) == (16, MissReason.CAPACITY)
    assert "room for 16 tokens" in result.detail


def test_what_was_pruned_is_a_miss_with_that_reason(store):
    save(store, TOKENS, name="a")
    store.prune(model=BytesCache().fingerprint.model)
    for arguments in ({"tokens": TOKENS}, {"name": "a"}):
        cache = BytesCache()
        result = store.load_session(cache, **arguments)
        assert (result.n_tokens, result.reason) == (0, MissReason.EVICTED)
        assert "'a'" in result.detail
        assert list(cache.tokens) == []
    assert load_exact(store, [9, 9]).reason is MissReason.NO_MATCH


def test_another_chunk_size_is_a_miss_that_says_so(open_store):
    save(open_store(chunk_n_tokens=8), TOKENS, name="a")
    result = load_exact(open_store(chunk_n_tokens=16), TOKENS)
    assert (result.n_tokens, result.reason) == (0, MissReason.NO_MATCH)
    assert "chunk size" in result.detail


# ------------------------------------------------------------------ corruption


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory):
    """A store with full chunks, tails, and tails that borrow from tails, as bytes."""
    path = tmp_path_factory.mktemp("sound") / "sessions.db"
    with kvstore.open(path, chunk_n_tokens=32) as store:
        for number, stop in enumerate((52, 56, 64, 70)):
            tokens = [*range(stop - 2), 500 + number]
            store.save_session(computed(tokens, SMALL), tokens, name=f"s{number}")
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    return path.read_bytes()


PROMPT = [*range(68), 503]


def load_damaged(path):
    """Load the damaged file every way; never a wrong byte, never a vendor's exception.

    Returns the problems that ``verify`` found.
    """
    try:
        store = kvstore.open(path, chunk_n_tokens=32)
    except KVStoreError as error:
        return [str(error)]
    with store:
        for arguments in (
            {"tokens": PROMPT},
            {"tokens": [*range(54), 501, 1]},
            *({"name": f"s{number}"} for number in range(4)),
        ):
            cache = computed(range(3), SMALL)
            try:
                result = store.load_session(cache, **arguments)
            except KVStoreError:
                assert_exact(cache, list(cache.tokens))
                continue
            assert_exact(cache, list(result.tokens[: result.n_tokens]))
        try:
            store.sessions()
            store.stats()
        except KVStoreError:
            pass
        try:
            return list(store.verify().problems)
        except KVStoreError as error:
            return [str(error)]


def test_the_sound_file_is_sound(store_path, sound_file):
    store_path.write_bytes(sound_file)
    assert load_damaged(store_path) == []
    with kvstore.open(store_path, chunk_n_tokens=32) as store:
        result = load_exact(store, PROMPT, cache=BytesCache(SMALL))
        assert result.n_tokens == 68
        with raw(store_path) as connection:
            (n_borrowing,) = connection.execute(
                "SELECT count(*) FROM chunks WHERE base_id IS NOT NULL"
            ).fetchone()
        assert n_borrowing >= 2


BLOB_DAMAGE = {
    "a flipped payload byte": """UPDATE payloads SET data = CAST(
        substr(data, 1, 5) || CASE substr(data, 6, 1) WHEN x'00' THEN x'01' ELSE x'00' END
        || substr(data, 7) AS BLOB) WHERE id = :payload""",
    "a cut payload": "UPDATE payloads SET data = substr(data, 2) WHERE id = :payload",
    "a longer payload": "UPDATE payloads SET data = data || x'00' WHERE id = :payload",
    "an empty payload": "UPDATE payloads SET data = x'' WHERE id = :payload",
    "a payload of text": "UPDATE payloads SET data = 'text' WHERE id = :payload",
    "a payload that is a number": "UPDATE payloads SET data = 5 WHERE id = :payload",
    "a missing payload": "DELETE FROM payloads WHERE id = :payload",
    "a missing blob": "DELETE FROM blobs WHERE payload_id = :payload",
    "a wrong checksum": """UPDATE blobs SET checksum = zeroblob(16)
        WHERE payload_id = :payload""",
    "a checksum of text": "UPDATE blobs SET checksum = 'x' WHERE payload_id = :payload",
    "the other codec": "UPDATE blobs SET codec = 1 - codec WHERE payload_id = :payload",
    "an unknown codec": "UPDATE blobs SET codec = 77 WHERE payload_id = :payload",
    "a codec of text": "UPDATE blobs SET codec = 'zstd' WHERE payload_id = :payload",
    "a huge raw size": "UPDATE blobs SET raw_nbytes = 1 << 50 WHERE payload_id = :payload",
    "a negative raw size": "UPDATE blobs SET raw_nbytes = -1 WHERE payload_id = :payload",
    "a huge stored size": "UPDATE blobs SET stored_nbytes = 1 << 50 WHERE payload_id = :payload",
    "another range": """UPDATE blobs SET start = start + 1, stop = stop + 1
        WHERE payload_id = :payload""",
    "a huge range": "UPDATE blobs SET stop = 1 << 40 WHERE payload_id = :payload",
    "another tensor": "UPDATE blobs SET tensor = tensor + 7 WHERE payload_id = :payload",
    "a payload of a row that does not exist": """UPDATE blobs SET payload_id = 9999
        WHERE payload_id = :payload""",
}


@pytest.mark.parametrize("damage", BLOB_DAMAGE)
def test_a_damaged_blob_is_never_restored_and_always_found(store_path, sound_file, damage):
    store_path.write_bytes(sound_file)
    with raw(store_path) as connection:
        payloads = [row[0] for row in connection.execute("SELECT id FROM payloads ORDER BY id")]
    for payload in payloads[::5]:
        store_path.write_bytes(sound_file)
        with raw(store_path) as connection:
            cursor = connection.execute(BLOB_DAMAGE[damage], {"payload": payload})
            assert cursor.rowcount == 1
        assert load_damaged(store_path) != []


def test_a_failed_load_keeps_what_came_before_the_damage_and_says_so(store_path):
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        save(store, TOKENS, name="a")
        with raw(store_path) as connection:
            connection.execute(BLOB_DAMAGE["a flipped payload byte"], {"payload": 9})
        result = load_exact(store, TOKENS)
        assert (result.n_tokens, result.reason) == (16, MissReason.CORRUPT)
        assert "layers.0.attention.kv_cache.k_cache, tokens [16, 24)" in result.detail
        kept = load_exact(store, TOKENS, cache=computed(TOKENS[:19]))
        assert (kept.n_tokens, kept.n_kept_tokens, kept.reason) == (19, 19, MissReason.CORRUPT)


def test_swapped_payloads_are_caught_like_flipped_bits(store_path, sound_file):
    with_payloads = "SELECT payload_id, chunk_id, tensor FROM blobs ORDER BY payload_id"
    store_path.write_bytes(sound_file)
    with raw(store_path) as connection:
        ids = [row[0] for row in connection.execute(with_payloads)]
    for left, right in zip(ids[::2], [*ids[1::2], ids[0]], strict=False):
        store_path.write_bytes(sound_file)
        with raw(store_path) as connection:
            connection.execute("UPDATE blobs SET payload_id = -1 WHERE payload_id = ?", (left,))
            connection.execute(
                "UPDATE blobs SET payload_id = ? WHERE payload_id = ?", (left, right)
            )
            connection.execute("UPDATE blobs SET payload_id = ? WHERE payload_id = -1", (right,))
        assert load_damaged(store_path) != []


FEW_VALUES = ["3", "'text'"]
MORE_VALUES = [
    *("NULL", "zeroblob(32)", "-1", "0", "1", "2", "5", "33", "1 << 32", "1 << 62", "1.5"),
    *("''", "x''", "x'00'", "zeroblob(64)"),
]
COLUMNS = {
    "models": "fingerprint weights_digest program_digest layout_digest manifest created_at_ms",
    "spaces": "model_id root_key chunk_n_tokens namespace adapter",
    "chunks": """space_id parent_id base_id base_n_tokens key parent_key start stop tokens
        raw_nbytes stored_nbytes created_at_ms last_used_at_ms""",
    "blobs": "chunk_id tensor start stop codec raw_nbytes stored_nbytes checksum payload_id",
    "sessions": """namespace name space_id head_id n_tokens metadata created_at_ms
        updated_at_ms""",
    "session_tokens": "session_id start tokens",
    "format": "version min_reader min_writer",
}
EVERY_COLUMN = [(table, column) for table, columns in COLUMNS.items() for column in columns.split()]


def damage_column(path, sound, table, column, values):
    identity = {"blobs": "payload_id", "session_tokens": "session_id"}.get(table, "id")
    path.write_bytes(sound)
    with raw(path) as connection:
        ids = [row[0] for row in connection.execute(f"SELECT {identity} FROM {table}")]
    for number, value in enumerate(values):
        path.write_bytes(sound)
        with raw(path) as connection:
            try:
                connection.execute(
                    f"UPDATE {table} SET {column} = {value} WHERE {identity} = ?",
                    (ids[number % len(ids)],),
                )
            except sqlite3.Error:
                continue  # a UNIQUE or NOT NULL that cannot be switched off
        load_damaged(path)


@pytest.mark.parametrize(("table", "column"), EVERY_COLUMN)
def test_no_value_in_any_column_gives_wrong_bytes_or_a_vendors_exception(
    store_path, sound_file, table, column
):
    damage_column(store_path, sound_file, table, column, FEW_VALUES)


@pytest.mark.slow
@pytest.mark.parametrize(("table", "column"), EVERY_COLUMN)
def test_more_values_in_any_column_give_no_wrong_bytes_and_no_vendors_exception(
    store_path, sound_file, table, column
):
    damage_column(store_path, sound_file, table, column, MORE_VALUES)


@pytest.mark.parametrize("length", [1, 2])
def test_chunks_that_borrow_from_one_another_in_a_circle_are_corrupt(
    store_path, sound_file, length
):
    store_path.write_bytes(sound_file)
    with raw(store_path) as connection:
        ids = [
            row[0] for row in connection.execute("SELECT id FROM chunks WHERE base_id IS NOT NULL")
        ][:length]
        for chunk, base in zip(ids, [*ids[1:], ids[0]], strict=True):
            connection.execute("UPDATE chunks SET base_id = ? WHERE id = ?", (base, chunk))
    assert load_damaged(store_path) != []


def test_a_chunk_with_other_tokens_than_its_key_says_is_not_used(store_path):
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        save(store, TOKENS, name="a")
        with raw(store_path) as connection:
            connection.execute(
                "UPDATE chunks SET tokens = zeroblob(length(tokens)) WHERE start = 8"
            )
        assert load_exact(store, TOKENS).n_tokens == 8
        assert load_exact(store, [*TOKENS[:8], 0, 0, 0]).n_tokens == 8
        assert not store.verify().ok


@pytest.mark.slow
def test_no_flipped_bit_in_the_file_gives_wrong_bytes(store_path, sound_file):
    written = [position for position, byte in enumerate(sound_file) if byte]
    for position in written[::61]:
        damaged = bytearray(sound_file)
        damaged[position] ^= 1 << position % 8
        store_path.write_bytes(damaged)
        load_damaged(store_path)
        for suffix in ("-wal", "-shm", "-journal"):
            store_path.with_name(store_path.name + suffix).unlink(missing_ok=True)


@pytest.mark.parametrize("by_name", [False, True])
def test_of_many_sessions_that_were_pruned_the_last_ones_are_known(open_store, by_name):
    store = open_store(chunk_n_tokens=8)
    one = layout(n_layers=1, n_kv_heads=1)
    for number in range(130):
        tokens = range(1000 * number, 1000 * number + 9)
        store.save_session(computed(tokens, one), tokens, name=str(number))
    store.prune(max_bytes=0)
    for number in (0, 129) if by_name else (129,):
        asked = [*range(1000 * number, 1000 * number + 9), 5]
        how = {"name": str(number)} if by_name else {"tokens": asked}
        assert store.load_session(BytesCache(one), **how).reason is MissReason.EVICTED
    assert store.verify().ok


def test_an_empty_payload_is_damage_like_any_other(store_path):
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        save(store, TOKENS, name="chat")
    with raw(store_path) as driver:
        driver.execute("PRAGMA ignore_check_constraints = ON")
        (payload_id,) = driver.execute(
            "SELECT payload_id FROM blobs ORDER BY chunk_id, tensor LIMIT 1 OFFSET 5"
        ).fetchone()
        driver.execute("UPDATE payloads SET data = x'' WHERE id = ?", (payload_id,))
        driver.execute("UPDATE blobs SET stored_nbytes = 0 WHERE payload_id = ?", (payload_id,))
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        assert load_exact(store, TOKENS).reason is MissReason.CORRUPT
