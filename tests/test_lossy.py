"""Lossy codecs in a store: how close, never in place of exact content, and said where it counts."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from fakes import BytesCache, checkpoint_tensors, layout, logits_tensor, ring_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

import kvstore
from kvstore import Edit, Layout, TensorSpec, codec
from kvstore.codec import Block, CodecChoice, lossy_text
from kvstore.errors import CorruptStoreError, InputError
from kvstore.lineage import before, computed
from kvstore.lossy import adapter_of, codec_text_of, mark_of, marked, unmarked

SIZE = 32
LAYOUT = layout(n_layers=2, capacity_n_tokens=192, n_kv_heads=2, head_dim=32)
WITHOUT_BASIS = tuple(name for name in codec.LOSSY if not codec.needs_basis(name))
EVERY = pytest.mark.parametrize("name", [*WITHOUT_BASIS, "k=int8,v=int4", "0=exact,k=int4"])


def floats(cache, index, n_tokens):
    spec = cache.layout.tensors[index]
    return np.frombuffer(cache.buffer(index)[: n_tokens * spec.slot_nbytes], "<f4")


class NumbersCache(BytesCache):
    """Slots of plausible numbers, which tokens, tensor and edits decide as ever."""

    def truth(self, index, position):
        content = super().truth(index, position)
        if self.layout.tensors[index].dtype != "float32":
            return content
        seeded = np.random.default_rng(list(content[:16]))
        return seeded.standard_normal(len(content) // 4, dtype=np.float32).tobytes()


def filled(n_tokens, *, one=LAYOUT, seed=1):
    cache = NumbersCache(one)
    cache.compute([random.Random(seed).randrange(1000) for _ in range(n_tokens)])
    return cache


@pytest.fixture
def opened(tmp_path):
    stores = []

    def open_one(**options):
        store = kvstore.open(tmp_path / "s.db", chunk_n_tokens=SIZE, **options)
        stores.append(store)
        return store

    yield open_one
    assert stores[-1].verify().problems == ()
    for store in stores:
        store.close()


# how far each number may be from the one saved, as a part of the largest in its group
REACH = {"half": 2**-11, "int8": 1 / 252, "int8-channel": 1 / 252, "int4": 1 / 13}


@EVERY
def test_full_chunks_come_back_nearly_and_the_tail_exactly(opened, name):
    cache = filled(80)
    store = opened(codec=name)
    saved = store.save_session(cache, cache.tokens, name="chat")
    assert (saved.codec, saved.n_exact_tokens, saved.n_fallback_blobs) == (
        lossy_text(CodecChoice(name).names(LAYOUT), LAYOUT),
        0,
        0,
    )
    target = NumbersCache(LAYOUT)
    hit = store.load_session(target, [*cache.tokens, 5])
    assert (hit.n_tokens, hit.codec) == (80, saved.codec)
    for index, by in enumerate(CodecChoice(name).names(LAYOUT)):
        was, now = floats(cache, index, 80), floats(target, index, 80)
        tail = 64 * LAYOUT.tensors[index].slot_nbytes // 4
        assert np.array_equal(was[tail:], now[tail:])
        assert np.array_equal(was, now) == (by == "exact")
        reach = REACH.get(by, 0) * np.abs(was).max() * 2
        assert np.abs(was - now).max() <= reach


def test_the_first_tokens_are_exact_in_int4(opened):
    cache = filled(64)
    store = opened(codec="int4")
    store.save_session(cache, cache.tokens)
    target = NumbersCache(LAYOUT)
    store.load_session(target, [*cache.tokens, 5])
    for index in range(4):
        n = 4 * LAYOUT.tensors[index].slot_nbytes // 4
        was, now = floats(cache, index, 64), floats(target, index, 64)
        assert np.array_equal(was[:n], now[:n])
        assert not np.array_equal(was[n : 2 * n], now[n : 2 * n])


@EVERY
def test_lossy_content_never_answers_an_exact_look_up(opened, name):
    cache = filled(80)
    opened(codec=name).save_session(cache, cache.tokens, name="chat")
    others = [one for one in ("exact", "raw", "half", "int8", "int4") if one != name]
    for other in others:
        hit = opened(codec=other).load_session(NumbersCache(LAYOUT), cache.tokens)
        assert (hit.n_tokens, hit.reason, hit.codec) == (0, kvstore.MissReason.NO_MATCH, "exact")


@EVERY
def test_exact_content_answers_a_lossy_look_up(opened, name):
    cache = filled(80)
    opened().save_session(cache, cache.tokens)
    target = NumbersCache(LAYOUT)
    hit = opened(codec=name).load_session(target, [*cache.tokens, 5])
    assert (hit.n_tokens, hit.codec, hit.edits) == (80, "exact", ())
    assert target.memory == cache.memory


def test_a_lossy_look_up_takes_what_is_longer_and_what_is_exact_if_both_are_as_long(opened):
    cache = filled(100)
    opened(codec="int8").save_session(cache, cache.tokens)
    lossy, ids = opened(codec="int8"), [*cache.tokens, 5]
    cache.truncate(70)
    opened().save_session(cache, cache.tokens)
    hit = lossy.load_session(NumbersCache(LAYOUT), ids)
    assert (hit.n_tokens, hit.codec) == (100, "int8")
    hit = lossy.load_session(NumbersCache(LAYOUT), ids[:71])
    assert (hit.n_tokens, hit.codec) == (70, "exact")


def test_a_session_says_what_it_was_stored_with_and_comes_back_by_name_in_any_store(opened):
    cache = filled(80)
    opened(codec="k=int8,v=int4").save_session(cache, cache.tokens, name="chat")
    store = opened()
    assert [one.codec for one in store.sessions()] == ["k=int8,v=int4"]
    hit = store.load_session(NumbersCache(LAYOUT), name="chat")
    assert (hit.n_tokens, hit.codec) == (79, "k=int8,v=int4")


def test_what_was_restored_with_loss_is_not_saved_as_exact(opened):
    cache = filled(80)
    opened(codec="int8").save_session(cache, cache.tokens, name="chat")
    target = NumbersCache(LAYOUT)
    store = opened()
    hit = store.load_session(target, name="chat")
    assert target.edits == hit.edits != ()
    target.compute([7, 8, 9])
    saved = store.save_session(target, target.tokens, name="chat")
    assert (saved.codec, saved.n_exact_tokens) == ("exact", 0)
    assert store.load_session(NumbersCache(LAYOUT), target.tokens).n_tokens == 0
    again = NumbersCache(LAYOUT)
    assert store.load_session(again, name="chat").n_tokens == 81
    for index in range(4):
        assert np.array_equal(floats(again, index, 81), floats(target, index, 81))


def test_a_session_goes_on_in_the_key_space_of_its_codec(opened):
    cache = filled(80)
    store = opened(codec="int8")
    store.save_session(cache, cache.tokens, name="chat")
    target = NumbersCache(LAYOUT)
    store.load_session(target, name="chat")
    target.compute([7] * 40)
    saved = store.save_session(target, target.tokens, name="chat")
    assert (saved.codec, saved.n_new_tokens) == ("int8", len(target.tokens) - 79)
    again = NumbersCache(LAYOUT)
    hit = store.load_session(again, [*target.tokens, 5])
    assert (hit.n_tokens, hit.codec) == (len(target.tokens), "int8")
    # What is live already and from there is kept.
    target.compute([1])
    hit = store.load_session(target, [*target.tokens, 5])
    assert (hit.n_kept_tokens, hit.raw_nbytes) == (len(target.tokens), 0)


def test_a_chunk_is_encoded_once_from_what_was_computed(opened):
    """A tail is exact: what was restored of it is encoded as if there had been no restart."""
    whole, parted = filled(64), filled(40)
    opened(codec="int4").save_session(whole, whole.tokens)
    with_restart = kvstore.open(
        opened(codec="int4").path.with_name("other.db"), chunk_n_tokens=SIZE, codec="int4"
    )
    with with_restart as store:
        store.save_session(parted, parted.tokens, name="chat")
        target = NumbersCache(LAYOUT)
        store.load_session(target, whole.tokens)
        assert len(target.tokens) == 40
        target.compute(whole.tokens[40:])
        store.save_session(target, target.tokens, name="chat")
        again = NumbersCache(LAYOUT)
        store.load_session(again, [*whole.tokens, 5])
        assert store.verify().problems == ()
    once = NumbersCache(LAYOUT)
    opened(codec="int4").load_session(once, [*whole.tokens, 5])
    token = LAYOUT.tensors[1].slot_nbytes
    was_in_the_tail = slice(32 * token, 40 * token)
    assert once.memory[1][was_in_the_tail] == again.memory[1][was_in_the_tail]
    assert once.memory[1][was_in_the_tail] != whole.memory[1][was_in_the_tail]


def test_an_edit_and_a_lossy_codec_go_together(opened):
    cache = filled(80)
    cache.edit(70, "struck")
    store = opened(codec="int8")
    store.save_session(cache, cache.tokens, name="edited")
    assert store.load_session(NumbersCache(LAYOUT), [*cache.tokens, 5]).n_tokens == 70
    target = NumbersCache(LAYOUT)
    hit = store.load_session(target, [*cache.tokens, 5], edits=cache.edits)
    assert (hit.n_tokens, hit.codec) == (80, "int8")
    assert unmarked(target.edits) == cache.edits
    # The edits of a result are good for the next look-up.
    hit = store.load_session(NumbersCache(LAYOUT), [*cache.tokens, 5], edits=hit.edits)
    assert hit.n_tokens == 80


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), -float("inf"), 3.39e38])
@pytest.mark.parametrize("name", WITHOUT_BASIS)
def test_numbers_that_cannot_be_held_are_stored_exactly_and_it_is_said(opened, name, worst):
    cache = filled(64)
    struct.pack_into("<f", cache.memory[1], 40, worst)
    store = opened(codec=name)
    assert store.save_session(cache, cache.tokens).n_fallback_blobs == 1
    target = NumbersCache(LAYOUT)
    store.load_session(target, [*cache.tokens, 5])
    n = SIZE * LAYOUT.tensors[1].slot_nbytes
    assert target.memory[1][:n] == cache.memory[1][:n]
    assert target.memory[0][:n] != cache.memory[0][:n]


def test_half_takes_bfloat16_where_float16_would_overflow(opened):
    cache = filled(32)
    struct.pack_into("<f", cache.memory[0], 40, 65505.0)
    store = opened(codec="half")
    assert store.save_session(cache, cache.tokens).n_fallback_blobs == 0
    target = NumbersCache(LAYOUT)
    store.load_session(target, [*cache.tokens, 5])
    assert struct.unpack_from("<f", target.memory[0], 40) == (65536.0,)


def test_recurrent_state_logits_and_rings_bookkeeping_are_exact(opened):
    one = Layout(
        tensors=(
            *layout(n_layers=1, head_dim=32).tensors,
            *ring_tensors(layer=1, window_n_tokens=16),
            *checkpoint_tensors(layer=2),
            logits_tensor(),
        )
    )
    cache = filled(64, one=one)
    store = opened(codec="int8")
    saved = store.save_session(cache, cache.tokens)
    assert saved.codec == "0.k=int8,1.k=exact,0.v=int8,1.v=exact"  # the ring's heads are too small
    target = NumbersCache(one)
    assert store.load_session(target, cache.tokens).n_tokens == 64
    kinds = {spec.kind for spec in one.tensors}
    for index, spec in enumerate(one.tensors):
        if spec.role not in ("k", "v") and spec.kind is not kvstore.Kind.POSITIONS:
            assert target.memory[index] == cache.memory[index], spec.name
    assert len(kinds) == 4


def test_what_cannot_lose_anything_is_exact_altogether(opened):
    one = layout(n_layers=1, dtype="int8", head_dim=32)
    cache = filled(64, one=one)
    assert opened(codec="int4").save_session(cache, cache.tokens).codec == "exact"
    assert opened().load_session(NumbersCache(one), [*cache.tokens, 5]).n_tokens == 64
    sixteen = layout(n_layers=1, dtype="bfloat16", head_dim=32)
    cache = filled(64, one=sixteen)
    assert opened(codec="half").save_session(cache, cache.tokens).codec == "exact"


def test_a_lossy_blob_in_an_exact_key_space_is_damage(opened):
    cache = filled(64)
    store = opened(codec="int8")
    store.save_session(cache, cache.tokens, name="chat")
    with store._database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE spaces SET adapter = x'', root_key = zeroblob(32)")
    assert any("lossy blob" in problem for problem in store.verify().problems)
    store.delete_session("chat")
    store.prune(model=cache.fingerprint.model)


def errors_after(path, turns, codecs):
    """How far a conversation is from what was computed after each of several restarts."""
    whole = filled(160)
    found = []
    for turn in range(turns):
        name = codecs[min(turn, len(codecs) - 1)]
        with kvstore.open(path, chunk_n_tokens=SIZE, codec=name) as store:
            target = NumbersCache(LAYOUT)
            if turn == 0:
                store.save_session(whole, whole.tokens, name="chat")
                continue
            store.load_session(target, name="chat")
            target.compute([7])
            saved = store.save_session(target, target.tokens, name="chat")
            assert store.verify().problems == ()
            error = np.abs(floats(whole, 0, 128) - floats(target, 0, 128)).max()
            found.append((saved.n_new_tokens, round(float(error), 6)))
    return found


def test_a_restart_neither_writes_again_nor_loses_more(tmp_path):
    first, *others = errors_after(tmp_path / "one.db", 5, ["int4"])
    assert {error for _, error in others} == {first[1]}
    assert all(n_new <= 1 for n_new, _ in others)


def test_nor_does_a_change_of_codecs_but_for_the_first_time(tmp_path):
    _, second, *others = errors_after(tmp_path / "one.db", 6, ["int8", "int4"])
    assert {error for _, error in others} == {second[1]}
    assert all(n_new <= 1 for n_new, _ in others)


def test_a_branch_within_a_full_chunk_borrows_what_was_lost_once(opened):
    store = opened(codec="int4")
    origin = filled(32)
    store.save_session(origin, origin.tokens, name="origin")
    ids, worst = list(origin.tokens), []
    for turn in range(5):
        target = NumbersCache(LAYOUT)
        store.load_session(target, [*ids[: 24 - turn], 2000 + turn, 5])
        target.compute([2000 + turn])
        store.save_session(target, target.tokens, name="branch")
        target.compute(range(32 - len(target.tokens)))
        store.save_session(target, target.tokens, name="branch")
        ids = list(target.tokens)
        again = NumbersCache(LAYOUT)
        assert store.load_session(again, [*ids, 5]).n_tokens == 32
        worst.append(np.abs(floats(origin, 0, 18) - floats(again, 0, 18)).max())
    assert len(set(worst)) == 1


def test_damage_and_eviction_of_lossy_content_are_told_and_mended(opened):
    cache = filled(80)
    store, ids = opened(codec="int8"), [*cache.tokens, 5]
    store.save_session(cache, cache.tokens, name="chat")
    with store._database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE blobs SET raw_nbytes = raw_nbytes + 1 WHERE start = 0")
    hit = store.load_session(NumbersCache(LAYOUT), name="chat")
    assert (hit.n_tokens, hit.reason) == (0, kvstore.MissReason.CORRUPT)
    store.save_session(cache, cache.tokens, name="chat")
    assert store.load_session(NumbersCache(LAYOUT), ids).n_tokens == 80
    store.prune(model=cache.fingerprint.model)
    hit = store.load_session(NumbersCache(LAYOUT), ids)
    assert (hit.n_tokens, hit.reason) == (0, kvstore.MissReason.EVICTED)


def test_what_two_caches_got_from_other_content_is_not_taken_for_the_same(opened):
    """[32, 36) once from an exact tail, once from a full chunk: two marks, two keys."""
    full, part = filled(64), filled(64)
    part.truncate(40)
    lossy, exact = opened(codec="int8"), opened()
    caches = []
    for source, name in ((part, "a"), (full, "b")):
        lossy.save_session(source, source.tokens, name=f"from {name}")
        cache = NumbersCache(LAYOUT)
        exact.load_session(cache, name=f"from {name}")
        cache.truncate(36)
        exact.save_session(cache, cache.tokens, name=name)
        caches.append(cache)
    for name, cache in zip("ab", caches, strict=True):
        again = NumbersCache(LAYOUT)
        exact.load_session(again, name=name)
        n = 35 * LAYOUT.tensors[0].slot_nbytes
        assert again.memory[0][:n] == cache.memory[0][:n]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_group_whose_span_is_too_large_is_stored_exactly(dtype):
    block = Block(dtype="float32", start=9, n_tokens=32, n_channels=64, head_dim=32)
    numbers = np.zeros((32, 64), np.float32)
    numbers[0], numbers[1] = 2e38, -2e38
    data = memoryview(numbers.tobytes())
    if dtype == "bfloat16":
        block = Block(dtype=dtype, start=9, n_tokens=32, n_channels=64, head_dim=32)
        data = memoryview((numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    for name in ("int4", "int8"):
        assert codec.encode(data, block, name, "k").is_fallback


def test_shapes_that_a_codec_would_not_make_smaller_are_exact_from_the_start():
    def names(heads, head_dim, name):
        one = layout(n_layers=1, n_kv_heads=heads, head_dim=head_dim)
        return CodecChoice(name).names(one)

    assert names(2, 16, "int4") == ("int4", "int4")  # groups of 16 channels
    assert names(1, 5, "int4") == ("exact", "exact")
    assert names(2, 3, "int4") == ("int4", "exact")
    assert names(1, 2, "int8") == ("exact", "exact")
    assert names(1, 70_000, "int8") == ("exact", "exact")
    assert names(1, 70_000, "int8-channel") == ("int8-channel", "exact")


def test_the_text_of_a_mix_gives_the_same_mix_whatever_the_order_of_layers():
    tensors = layout(n_layers=3, head_dim=32).tensors
    shuffled = Layout(tensors=(*tensors[:2], *tensors[4:], *tensors[2:4]))
    for text in ("1=exact,k=int8,v=int8", "0=int4,2=int8", "0-1.k=int8,2.v=half"):
        names = CodecChoice(text).names(shuffled)
        assert CodecChoice(lossy_text(names, shuffled)).names(shuffled) == names


def test_damage_in_exact_content_leaves_a_lossy_store_what_it_stored_itself(opened):
    cache = filled(80)
    exact = opened()
    exact.save_session(cache, cache.tokens)
    with exact._database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE payloads SET data = zeroblob(length(data)) WHERE id = 1")
    store, ids = opened(codec="int8"), [*cache.tokens, 5]
    assert store.load_session(NumbersCache(LAYOUT), ids).reason is kvstore.MissReason.CORRUPT
    again = opened(codec="int8")
    again.save_session(cache, cache.tokens)
    hit = again.load_session(NumbersCache(LAYOUT), ids)
    assert (hit.n_tokens, hit.reason, hit.codec) == (80, None, "int8")
    again.save_session(cache, cache.tokens)  # it drops what the load found damaged


def test_codes_are_not_taken_for_those_of_another_codec(tmp_path):
    """Four tokens by channel have as many bytes in 8 bits as in 4: the checksum knows the tag."""
    one = layout(n_layers=1, capacity_n_tokens=64, head_dim=64)
    cache = filled(32, one=one)
    with kvstore.open(tmp_path / "s.db", chunk_n_tokens=4, codec="int8-channel") as store:
        store.save_session(cache, cache.tokens)
        with store._database.engine.begin() as connection:
            changed = connection.exec_driver_sql(
                "UPDATE blobs SET codec = 5 WHERE codec = 4 AND tensor = 0 AND start = 8"
            )
            assert changed.rowcount == 1
        assert store.verify().problems
        hit = store.load_session(NumbersCache(one), [*cache.tokens, 5])
        assert (hit.n_tokens, hit.reason) == (8, kvstore.MissReason.CORRUPT)


def test_a_session_in_an_unknown_key_space_is_named_and_can_be_deleted(opened):
    cache = filled(40)
    store = opened(codec="int8")
    store.save_session(cache, cache.tokens, name="odd")
    with store._database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE spaces SET adapter = x'0201000000ff'")
    with pytest.raises(CorruptStoreError, match=r"'odd'.*unknown adapter.*kvstore rm"):
        store.sessions()
    store.delete_session("odd")
    store.prune(model=cache.fingerprint.model)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "int9",
        "k=int9",
        "k",
        "k=",
        "=int8",
        "q=int8",
        "k=int8,",
        "1-=int8",
        "-1=int8",
        "1.=int8",
    ],
)
def test_a_codec_that_is_none_is_refused(tmp_path, text):
    with pytest.raises(InputError, match="codec: expected one of exact, raw"):
        kvstore.open(tmp_path / "s.db", codec=text)
    assert not (tmp_path / "s.db").exists()


@pytest.mark.parametrize(
    ("text", "names", "canonical"),
    [
        ("int8", "int8 int8 int8 int8", "int8"),
        ("k=int8, v=int8", "int8 int8 int8 int8", "int8"),
        ("v=int4", "exact int4 exact int4", "k=exact,v=int4"),
        ("0=exact,int8", None, None),
        ("0=exact,k=int8", "exact exact int8 exact", "0.k=exact,1.k=int8,v=exact"),
        ("0-1.v=half,k=int4", "int4 half int4 half", "k=int4,v=half"),
        ("k=raw,v=exact", "raw exact raw exact", ""),
        ("5=int8", "exact exact exact exact", ""),
    ],
)
def test_a_mix_says_each_tensors_codec_and_equal_mixes_are_one_key_space(text, names, canonical):
    if names is None:
        with pytest.raises(InputError):
            CodecChoice(text)
        return
    found = CodecChoice(text).names(LAYOUT)
    assert " ".join(found) == names
    assert lossy_text(found, LAYOUT) == canonical
    if canonical:
        assert lossy_text(CodecChoice(canonical).names(LAYOUT), LAYOUT) == canonical


def test_layers_from_high_to_low_are_refused():
    with pytest.raises(InputError, match="from low to high"):
        CodecChoice("5-2=int8")


@pytest.mark.parametrize(
    "adapter", [b"\x00", b"\x01", adapter_of("int8")[:-1], adapter_of("int8") + b"x", "int8", None]
)
def test_an_adapter_that_is_none_is_damage(adapter):
    with pytest.raises(CorruptStoreError, match="unknown adapter"):
        codec_text_of(adapter)
    assert codec_text_of(adapter_of("k=int8,v=int4")) == "k=int8,v=int4"


def lineages(max_size=4):
    digests = st.sampled_from([bytes([n]) * 32 for n in range(3)])
    starts = st.lists(st.integers(0, 40), unique=True, max_size=max_size).map(sorted)
    return st.builds(
        lambda where, what: tuple(map(Edit, where, what[: len(where)])),
        starts,
        st.lists(digests, min_size=max_size, max_size=max_size),
    )


MARK = mark_of("int8", bytes(32))


@given(stored=lineages(), start=st.integers(0, 50), grown=st.integers(0, 20))
def test_marks_are_taken_off_again(stored, start, grown):
    """Restore with loss, then compute: without its marks the lineage is the stored one, goes on."""
    stop = 51
    lineage = marked(before(stored, start), stored, MARK, start=start, stop=stop)
    if {edit.start for edit in stored} >= set(range(start + 1)):
        return  # every position is edited: one edit stands for two, see below
    marks = [edit.start for edit in lineage if edit.digest == MARK]
    assert len(marks) == 1
    assert marks[0] <= start
    assert unmarked(lineage) == before(stored, stop)
    if grown:
        plain = computed(stored, stop) if stored and stored[-1].start >= start else None
        if plain is not None:
            assert unmarked(computed(lineage, stop)) == plain


def test_where_every_position_is_edited_one_edit_stands_for_two_and_stays_the_same():
    stored = (Edit(0, bytes(32)),)
    once = marked((), stored, MARK, start=0, stop=9)
    assert len(once) == 1
    assert once != stored
    assert unmarked(once) == once
    assert marked((), once, mark_of("int8", bytes([1]) * 32), start=0, stop=9) == once


def test_marks_of_any_codec_are_taken_off():
    assert unmarked((Edit(0, MARK), Edit(7, b""), Edit(9, mark_of("int4", bytes(32))))) == ()


@settings(deadline=None)
@given(st.data())
def test_a_flipped_bit_in_codes_is_an_error_or_caught_by_the_checksum(data):
    n_tokens = data.draw(st.integers(5, 20))
    block = Block(dtype="float32", start=0, n_tokens=n_tokens, n_channels=64, head_dim=32)
    numbers = np.random.default_rng(n_tokens).standard_normal((n_tokens, 64), dtype=np.float32)
    name = data.draw(st.sampled_from(WITHOUT_BASIS))
    encoded = codec.encode(
        memoryview(numbers.tobytes()), block, name, data.draw(st.sampled_from("kv"))
    )
    stored = bytearray(encoded.stored)
    bit = data.draw(st.integers(0, len(stored) * 8 - 1))
    stored[bit // 8] ^= 1 << bit % 8
    destination = memoryview(bytearray(numbers.nbytes))
    try:
        checked = codec.decode_into(encoded.tag, memoryview(stored), block, destination)
    except codec.DecodeError:
        return
    assert b"".join(checked) != b"".join(encoded.checked)


@settings(deadline=None)
@given(
    n_tokens=st.integers(1, 150),
    name=st.sampled_from(["int8", "int8-channel", "int4"]),
    role=st.sampled_from("kv"),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    offset=st.sampled_from([0.0, 1.0, -50.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_number_is_further_off_than_half_a_step(n_tokens, name, role, scale, offset, seed):  # noqa: PLR0917
    block = Block(dtype="float32", start=9, n_tokens=n_tokens, n_channels=64, head_dim=32)
    numbers = np.random.default_rng(seed).standard_normal((n_tokens, 64)) + offset
    numbers = (numbers * scale).astype(np.float32)
    encoded = codec.encode(memoryview(numbers.tobytes()), block, name, role)
    destination = memoryview(bytearray(numbers.nbytes))
    codec.decode_into(encoded.tag, encoded.stored, block, destination)
    restored = np.frombuffer(destination, "<f4").reshape(numbers.shape)
    by_channel = role == "k" and name != "int8"
    size = 32 if not by_channel else 64
    starts = range(0, n_tokens if by_channel else 64, size)
    for start in starts:
        part = np.s_[start : start + size] if by_channel else np.s_[:, start : start + size]
        was, now = numbers[part].astype(np.float64), restored[part].astype(np.float64)
        axis = 0 if by_channel else 1
        if name == "int4":
            reach = np.abs(was).max(axis=axis, keepdims=True) / 32767
            step = np.maximum(np.ptp(was, axis=axis, keepdims=True) / 15, reach)
        else:
            step = np.abs(was).max(axis=axis, keepdims=True) / 127
        # A scale is rounded up by a part in 128 at most; the ends of int4 by half a step more.
        limit = step * (1 + 1 / 128) * (1.0 if name == "int4" else 0.5) * 1.0001 + 2**-126
        assert (np.abs(was - now) <= limit).all()


def test_the_tensor_spec_decides_what_may_lose():
    spec = LAYOUT.tensors[0]
    assert codec.may_lose(spec)
    for change in ({"role": "k_scale"}, {"dtype": "float64"}, {"dtype": "int8"}):
        fields = {name: getattr(spec, name) for name in TensorSpec.__slots__} | change
        assert not codec.may_lose(TensorSpec(**fields))


def test_a_lossy_save_in_the_background_is_the_same(opened):
    cache = filled(80)
    store = opened(codec="int4")
    pending = store.save_session(cache, cache.tokens, name="chat", background=True)
    tokens = list(cache.tokens)
    cache.truncate(0)
    cache.compute([9] * 80)
    saved = pending.result()
    assert (saved.codec, saved.n_new_tokens, saved.n_fallback_blobs) == ("int4", 80, 0)
    target = NumbersCache(LAYOUT)
    assert store.load_session(target, [*tokens, 5]).n_tokens == 80
    other = kvstore.open(store.path.with_name("other.db"), chunk_n_tokens=SIZE, codec="int4")
    with other as foreground:
        foreground.save_session(filled(80), tokens)
        again = NumbersCache(LAYOUT)
        foreground.load_session(again, [*tokens, 5])
        assert foreground.verify().problems == ()
    assert again.memory == target.memory
