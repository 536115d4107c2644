"""Live views of a cache: by tensor name and by layer, token by token whatever the layout."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("executorch")

from kvstore import Kind  # noqa: E402  after the check that they are there
from kvstore.errors import ClosedModelError, InputError  # noqa: E402
from runtime_adapter import Model  # noqa: E402
from tests import programs  # noqa: E402
from tests.adapter import journey  # noqa: E402
from tests.fakes import naive_slot  # noqa: E402

pytestmark = pytest.mark.adapter

NAMES = ["stock_fp32", "plain", "quantized_ring", "lfm2"]


@pytest.fixture(params=NAMES)
def model(request):
    if not programs.is_available(request.param):
        pytest.skip("this ExecuTorch does not export it")
    with Model.open(programs.path(request.param)) as model:
        yield model


def computed(model, n_tokens):
    tokens = journey.tokens_of([n_tokens])
    for start in range(0, n_tokens, 7):
        model.forward(tokens[start : min(start + 7, n_tokens)], start=start)


@pytest.mark.parametrize("n_tokens", [5, 61])
def test_get_copies_positions_out_token_by_token(model, n_tokens):
    computed(model, n_tokens)
    for spec in model.layout.tensors:
        view = model.cache[spec.name]
        assert (view.shape, str(view.dtype)) == (spec.shape, f"torch.{spec.dtype}")
        for start, stop in view.valid:
            found = view.get(start, stop)
            if spec.kind is Kind.CHECKPOINT:
                assert (start, stop) == (n_tokens - 1, n_tokens)
                assert torch.equal(found[0], view.tensor)
                continue
            for position in range(start, stop):
                slot = view.tensor.select(spec.token_axis, naive_slot(spec, position))
                assert torch.equal(found[position - start], slot[0])
            assert torch.equal(view.get(stop - 1, stop)[0], found[-1])


def test_get_has_one_shape_whatever_the_layout(model):
    computed(model, 9)
    for layer in {spec.layer for spec in model.layout.tensors if spec.role == "k"}:
        k = model.cache.layer(layer).k
        assert k.get(2, 6).shape == (4, 2, 16)
        assert k.spec.name == model.cache.layer(layer)["k"].spec.name


def test_set_writes_where_get_reads_and_is_an_edit(model):
    computed(model, 9)
    layer = next(spec.layer for spec in model.layout.tensors if spec.role == "v")
    view = model.cache.layer(layer).v
    before, values = view.get(0, 9), torch.ones_like(view.get(3, 5))
    view.set(3, values)
    assert torch.equal(view.get(3, 5), values)
    assert torch.equal(view.get(0, 3), before[:3])
    assert torch.equal(view.get(5, 9), before[5:])
    assert [edit.start for edit in model.cache.edits] == [3]


def test_what_was_set_by_hand_comes_back_by_name_only(model, tmp_path):
    import kvstore

    computed(model, 9)
    tokens = model.cache.tokens
    view = next(view for view in model.cache.values() if view.valid)
    start, stop = view.valid[0]
    values = torch.ones_like(view.get(start, stop))
    view.set(start, values)
    with kvstore.open(tmp_path / "sessions.db") as store:
        saved = store.save_session(model.cache, model.cache.tokens, name="mine")
        assert saved.n_exact_tokens == start
        model.cache.truncate(0)
        store.load_session(model.cache, [*tokens, 1])
        assert model.cache.n_tokens <= start
        assert model.cache.edits == ()
        hit = store.load_session(model.cache, name="mine")
        assert hit.n_tokens >= 8
        if view.spec.token_axis is not None:
            assert torch.equal(view.get(start, hit.n_tokens), values[: hit.n_tokens - start])
        else:
            assert torch.equal(view.get(start, stop), values)
        assert store.verify().ok


def test_what_is_not_there_or_does_not_fit_is_refused(model):
    computed(model, 9)
    layer = next(spec.layer for spec in model.layout.tensors if spec.role == "k")
    k = model.cache.layer(layer).k
    for start, stop in ((0, 10), (9, 10), (-1, 2), (4, 4), (0, "2")):
        with pytest.raises(InputError, match="expected positions"):
            k.get(start, stop)
    right = k.get(0, 2)
    wrongs = [right[0], right.double(), right[:, :, :3], [1.0], right.new_zeros(())]
    for wrong in wrongs:
        with pytest.raises(InputError, match="expected"):
            k.set(0, wrong)
    with pytest.raises(InputError, match="expected positions"):
        k.set(8, right)
    with pytest.raises(InputError, match="expected a layer among"):
        model.cache.layer(77)
    with pytest.raises(AttributeError, match="no tensor of role 'q'; it has: "):
        _ = model.cache.layer(layer).q
    assert model.cache.edits == ()


def test_a_view_used_after_close_is_an_error_and_no_crash():
    model = Model.open(programs.path("stock_fp32"))
    computed(model, 9)
    layer, view = model.cache.layer(0), model.cache.layer(0).k
    kept, cache = view.tensor, model.cache
    expected = kept.clone()
    model.close()
    for use in (
        lambda: view.get(0, 3),
        lambda: view.set(0, torch.zeros(1, 2, 16)),
        lambda: view.tensor,
        lambda: view.dtype,
        lambda: view.valid,
        lambda: layer.v.get(0, 1),
        lambda: cache.layer(0),
    ):
        with pytest.raises(ClosedModelError):
            use()
    del model
    assert torch.equal(kept, expected)
