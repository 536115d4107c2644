from __future__ import annotations

import pytest

import kvstore
from kvstore import Layout
from tests import fakes

CHUNK_N_TOKENS = 16


def ring() -> Layout:
    """A full layer and a ring of 16 slots, of which a query sees 8 positions."""
    full = fakes.layout(n_layers=1).tensors
    return Layout(tensors=(*full, *fakes.ring_tensors(layer=1, window_n_tokens=8)))


def recurrent() -> Layout:
    full = fakes.layout(n_layers=1).tensors
    return Layout(tensors=(*full, *fakes.checkpoint_tensors(layer=1), fakes.logits_tensor()))


@pytest.mark.parametrize("cache_layout", [ring(), recurrent()], ids=["ring", "recurrent"])
@pytest.mark.parametrize("name", ["chat", None])
@pytest.mark.parametrize("early", [3, 17, 30])
@pytest.mark.parametrize("late", [31, 32, 33, 47, 60])
def test_what_was_saved_while_resident_survives_the_growth_of_its_session(
    tmp_path, cache_layout, name, early, late
):
    """A tail that grows or becomes a full chunk keeps what the cache no longer has."""
    tokens = list(range(80))
    with kvstore.open(
        tmp_path / "s.db", chunk_n_tokens=CHUNK_N_TOKENS, checkpoint_n_tokens=1
    ) as store:
        cache = fakes.BytesCache(cache_layout)
        for stop in (early, late, 64):
            cache.compute(tokens[len(cache.tokens) : stop])
            store.save_session(cache, tokens[:stop], name=name)
        for stop in (early, late):
            hit = store.load_session(cache, [*tokens[:stop], 99])
            assert (hit.n_tokens, hit.reason) == (stop, None)
            assert cache.wrong() == []
        assert store.verify().ok
