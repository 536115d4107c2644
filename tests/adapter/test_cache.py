from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kvstore import Held, Kind  # noqa: E402  after the check that torch is there
from kvstore.errors import (  # noqa: E402
    CapacityError,
    ClosedModelError,
    InputError,
    RewindError,
)
from kvstore.layout import Fingerprint, Layout, TensorSpec  # noqa: E402
from runtime_adapter import PlannedCache  # noqa: E402

pytestmark = pytest.mark.adapter

CAPACITY = 8
FINGERPRINT = Fingerprint(weights=bytes(32), program=bytes(32), layout=bytes(32))


def spec(name: str, *, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(
        name=name,
        role=name,
        layer=0,
        kind=Kind.FULL,
        dtype=dtype,
        shape=(1, CAPACITY, 2, 3),
        token_axis=1,
    )


def ring(name: str, kind: Kind = Kind.WINDOW) -> TensorSpec:
    """A ring of 8 slots: a query sees 4 positions, itself included."""
    return TensorSpec(
        name=name,
        role=name,
        layer=0,
        kind=kind,
        dtype="float32" if kind is Kind.WINDOW else "int64",
        shape=(1, CAPACITY, 2, 3) if kind is Kind.WINDOW else (CAPACITY,),
        token_axis=1 if kind is Kind.WINDOW else 0,
        window_n_tokens=4,
    )


def checkpoint(name: str, shape: tuple[int, ...] = (1, 2, 3)) -> TensorSpec:
    return TensorSpec(
        name=name,
        role=name,
        layer=0,
        kind=Kind.CHECKPOINT,
        dtype="float32",
        shape=shape,
        token_axis=None,
    )


def wrap(specs: list[TensorSpec], **options: Any) -> tuple[PlannedCache, list[Any]]:
    """A cache over tensors of ones, and the tensors."""
    views = [torch.ones(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in specs]
    layout = Layout(tensors=tuple(specs))
    return PlannedCache(layout=layout, fingerprint=FINGERPRINT, views=views, **options), views


def live(dtype: Any = torch.float32) -> Any:
    return torch.zeros((1, CAPACITY, 2, 3), dtype=dtype)


@pytest.fixture
def k() -> Any:
    return live()


@pytest.fixture
def cache(k: Any) -> PlannedCache:
    layout = Layout(tensors=(spec("k"), spec("v", dtype="bfloat16")))
    return PlannedCache(layout=layout, fingerprint=FINGERPRINT, views=[k, live(torch.bfloat16)])


def test_a_buffer_is_the_live_tensors_bytes(cache: PlannedCache, k: Any) -> None:
    buffer = cache.buffer(0)
    assert (buffer.format, buffer.nbytes, buffer.readonly) == ("B", k.nbytes, False)
    assert buffer.contiguous
    buffer[0:4] = bytes([0, 0, 0x80, 0x3F])  # 1.0, little-endian
    assert k[0, 0, 0, 0] == 1
    k[0, -1, -1, -1] = 1
    assert bytes(buffer[-4:]) == bytes([0, 0, 0x80, 0x3F])


def test_a_bfloat16_buffer_is_bytes_too(cache: PlannedCache) -> None:
    cache.live("v")[0, 0, 0, 0] = 1
    assert bytes(cache.buffer(1)[:2]) == bytes([0x80, 0x3F])


def test_it_maps_names_to_live_tensors_in_layout_order(cache: PlannedCache, k: Any) -> None:
    assert list(cache) == ["k", "v"]
    assert len(cache) == 2
    assert "k" in cache
    assert "other" not in cache
    assert cache.live("k").data_ptr() == k.data_ptr()
    with pytest.raises(KeyError):
        cache["other"]


def test_tokens_are_recorded_and_forgotten(cache: PlannedCache) -> None:
    assert cache.tokens == ()
    cache.extend([5, 6, 7])
    cache.extend([8])
    assert (cache.tokens, cache.n_tokens) == ((5, 6, 7, 8), 4)
    cache.truncate(2)
    assert cache.tokens == (5, 6)
    cache.truncate(0)
    assert cache.tokens == ()


def test_more_tokens_than_the_capacity_are_refused(cache: PlannedCache) -> None:
    cache.extend(range(CAPACITY))
    with pytest.raises(CapacityError, match="room for 8 tokens: it holds 8, and 1 more"):
        cache.extend([1])
    assert cache.n_tokens == CAPACITY


def test_a_length_beyond_the_tokens_is_refused(cache: PlannedCache) -> None:
    cache.extend([1])
    with pytest.raises(CapacityError, match=r"from 0 to 1, .* found 2"):
        cache.truncate(2)


@pytest.mark.parametrize("length", [-1, True, 1.0, "1", None])
def test_a_length_that_is_no_whole_number_is_refused(cache: PlannedCache, length: Any) -> None:
    with pytest.raises(InputError, match="at least 0"):
        cache.truncate(length)


def test_an_emptied_cache_is_as_freshly_loaded_where_the_first_step_reads() -> None:
    cache, (k, positions, state) = wrap(
        [ring("k"), ring("positions", Kind.POSITIONS), checkpoint("state")]
    )
    for tensor in (k, positions, state):
        tensor.fill_(7)
    cache.extend([1, 2])
    cache.truncate(0)
    assert bool((positions == 1).all())  # as they were when the cache was made
    assert bool((state == 1).all())
    assert bool((k == 7).all())  # masked until it is written


def test_states_that_begin_as_zeros_are_zeroed() -> None:
    state = torch.zeros((1, 2, 3))
    layout = Layout(tensors=(checkpoint("state"),))
    cache = PlannedCache(layout=layout, fingerprint=FINGERPRINT, views=[state])
    cache.extend([1])
    state.fill_(3)
    cache.truncate(0)
    assert not bool(state.any())


def test_a_ring_goes_back_while_it_has_the_window_and_a_state_does_not() -> None:
    cache, _ = wrap([ring("k")])
    cache.extend(range(20))  # holds the positions 12 to 19
    cache.truncate(15)  # sees 12, 13, 14
    with pytest.raises(RewindError, match=r"load_session can"):
        cache.truncate(14)
    assert cache.held == Held(n_tokens=15, peak_n_tokens=20)
    cache, _ = wrap([spec("k"), checkpoint("state")])
    cache.extend([1, 2])
    cache.truncate(2)
    with pytest.raises(RewindError):
        cache.truncate(1)
    assert cache.tokens == (1, 2)


def test_what_a_load_put_in_place_is_adopted(cache: PlannedCache) -> None:
    cache.extend([1])
    cache.adopt([4, 5, 6])
    assert cache.tokens == (4, 5, 6)
    assert cache.held == Held(n_tokens=3, peak_n_tokens=3, restored_n_tokens=3)


def test_a_ring_has_the_programs_own_limit() -> None:
    cache, _ = wrap([ring("k")], capacity_n_tokens=30)
    cache.extend(range(30))
    with pytest.raises(CapacityError, match="room for 30 tokens"):
        cache.extend([1])
    cache, _ = wrap([spec("k")], capacity_n_tokens=30)
    assert cache.capacity_n_tokens == CAPACITY


def test_logits_are_held_from_the_first_token_to_the_last() -> None:
    cache, views = wrap([spec("k"), checkpoint("state"), checkpoint("logits", (5,))])
    assert cache.logits is None
    with pytest.raises(InputError, match=r"a tensor \[5\], found NoneType"):
        cache.extend([1])
    with pytest.raises(InputError, match=r"a tensor \[5\], found Tensor \[4\]"):
        cache.extend([1], logits=torch.zeros(4))
    assert cache.tokens == ()
    cache.extend([1], logits=torch.arange(5.0))
    assert torch.equal(cache.logits, torch.arange(5.0))
    cache.logits.zero_()  # a copy
    assert torch.equal(cache.logits, torch.arange(5.0))
    cache.truncate(0)
    assert cache.logits is None
    views[-1].fill_(2)  # what a load does
    cache.adopt([1, 2])
    assert torch.equal(cache.logits, torch.full((5,), 2.0))


def test_a_layout_without_logits_keeps_none(cache: PlannedCache) -> None:
    cache.extend([1], logits=torch.zeros(5))
    assert cache.logits is None


def test_setting_a_tensor_writes_it_and_is_an_edit(cache: PlannedCache, k: Any) -> None:
    cache.extend([1, 2])
    cache.set("k", torch.ones_like(k))
    assert bool((k == 1).all())
    (edit,) = cache.edits
    cache.set("k", torch.ones_like(k))
    assert cache.edits != (edit,)  # what was set by hand is like nothing else
    cache.truncate(1)
    assert cache.exact_n_tokens == 0  # what is left may be what was set
    cache.truncate(0)
    assert cache.edits == ()


def test_a_tensor_that_is_set_before_the_first_token_is_an_edit_too(
    cache: PlannedCache, k: Any
) -> None:
    cache.set("k", torch.ones_like(k))
    cache.extend([1, 2])
    assert [edit.start for edit in cache.edits] == [0]


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("other", live(), "no tensor 'other'; it has: k, v"),
        ("k", live(torch.float16), "expected float32 .*, found float16"),
        ("k", live()[:, :2], r"expected float32 \[1, 8, 2, 3\], found float32 \[1, 2, 2, 3\]"),
        ("k", [1.0], "found list"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(
    cache: PlannedCache, name: str, tensor: Any, told: str
) -> None:
    with pytest.raises(InputError, match=told):
        cache.set(name, tensor)
    assert cache.edits == ()


def test_a_closed_cache_refuses_and_what_it_handed_out_stays_readable(
    cache: PlannedCache, k: Any
) -> None:
    tensor, buffer = cache.live("k"), cache.buffer(0)
    cache.close()
    for use in (
        lambda: cache.live("k"),
        lambda: cache.buffer(0),
        lambda: cache.truncate(0),
        lambda: cache.extend([1]),
        lambda: cache.adopt([1]),
        lambda: cache.logits,
        lambda: cache.set("k", k),
        cache.mark_edited,
    ):
        with pytest.raises(ClosedModelError, match=r"Model\.open"):
            use()
    assert float(tensor.sum()) == 0
    assert buffer[0] == 0


def test_views_that_are_not_the_layouts_are_refused() -> None:
    layout = Layout(tensors=(spec("k"),))
    for views, told in (([], "found 0"), ([live(torch.float16)], "found float16")):
        with pytest.raises(InputError, match=told):
            PlannedCache(layout=layout, fingerprint=FINGERPRINT, views=views)


def test_what_a_caller_does_to_the_tensor_object_stays_with_the_caller(
    cache: PlannedCache, k: Any
) -> None:
    cache.live("k").set_(torch.ones(1))
    assert cache.live("k").data_ptr() == k.data_ptr()
    assert tuple(cache.live("k").shape) == (1, CAPACITY, 2, 3)
