"""The caches of transformers; importing it takes long, so all of this is slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import kvstore  # noqa: E402  after the check that torch is there
from kvstore.errors import CacheMismatchError, CapacityError, InputError  # noqa: E402
from runtime_adapter import fingerprint_of  # noqa: E402
from runtime_adapter.huggingface import (  # noqa: E402
    DynamicHuggingFaceCache,
    StaticHuggingFaceCache,
)

pytestmark = [
    pytest.mark.adapter,
    pytest.mark.slow,
    # transformers and what it imports warn about each other.
    pytest.mark.filterwarnings("ignore"),
]

FINGERPRINT = fingerprint_of(b"weights", program="program")
PARAMS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
TOKENS = [(7 * position) % 96 for position in range(40)]


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def config(transformers: Any) -> Any:
    return transformers.LlamaConfig(**PARAMS)


@pytest.fixture(scope="module")
def model(transformers: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def dynamic(past: Any) -> DynamicHuggingFaceCache:
    return DynamicHuggingFaceCache(
        past,
        n_layers=2,
        n_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
        capacity_n_tokens=64,
        fingerprint=FINGERPRINT,
    )


def static(past: Any) -> StaticHuggingFaceCache:
    return StaticHuggingFaceCache(past, fingerprint=FINGERPRINT)


def initialised(past: Any) -> Any:
    past.early_initialization(
        batch_size=1, num_heads=2, head_dim=8, dtype=torch.float32, device="cpu"
    )
    return past


@pytest.fixture(params=["dynamic", "dynamic of a configuration", "static"])
def make(request: pytest.FixtureRequest, transformers: Any, config: Any) -> Any:
    """Make an empty cache of transformers, and ours over it."""

    def cache() -> tuple[Any, Any]:
        if request.param == "static":
            past = initialised(transformers.StaticCache(config=config, max_cache_len=64))
            return past, static(past)
        has_config = request.param != "dynamic"
        past = transformers.DynamicCache(**({"config": config} if has_config else {}))
        return past, dynamic(past)

    return cache


def forward(model: Any, past: Any, cache: Any, tokens: list[int]) -> Any:
    with torch.no_grad():
        output = model(torch.tensor([tokens]), past_key_values=past)
    cache.extend(tokens)
    return output.logits[0, -1]


def test_going_on_from_a_load_or_a_cut_equals_never_having_stopped(
    model: Any, make: Any, tmp_path: Path
) -> None:
    past, cache = make()
    forward(model, past, cache, TOKENS[:12])
    expected_short = forward(model, past, cache, TOKENS[12:30])
    expected = forward(model, past, cache, TOKENS[30:])
    cache.truncate(30)
    assert int(past.get_seq_length()) == 30
    assert torch.equal(forward(model, past, cache, TOKENS[30:]), expected)
    with kvstore.open(tmp_path / "s.db", chunk_n_tokens=8) as store:
        store.save_session(cache, TOKENS, name="chat")
        past, cache = make()
        for stop in (30, 12, 30):  # also over what is live
            hit = store.load_session(cache, [*TOKENS[:stop], 95])
            assert (hit.n_tokens, hit.reason) == (stop, None)
            assert int(past.get_seq_length()) == stop
            following = TOKENS[12:30] if stop == 12 else TOKENS[30:]
            found = forward(model, past, cache, following)
            assert torch.equal(found, expected_short if stop == 12 else expected)
        assert store.load_session(cache, [95, 94]).n_tokens == 0
    assert int(past.get_seq_length()) == 0
    assert torch.equal(
        forward(model, past, cache, TOKENS[:12]), forward(model, *make(), TOKENS[:12])
    )


def test_steps_that_were_not_told_are_noticed(model: Any, transformers: Any) -> None:
    past = transformers.DynamicCache()
    cache = dynamic(past)
    with pytest.raises(CacheMismatchError, match="after 1 tokens, found None"):
        cache.extend([1])
    forward(model, past, cache, [1, 2])
    with torch.no_grad():
        model(torch.tensor([[3]]), past_key_values=past)
    with pytest.raises(CacheMismatchError, match=r"after 4 tokens, found .*3, 8"):
        cache.extend([3, 4])
    assert cache.tokens == (1, 2)
    cache.extend([3])
    with pytest.raises((CapacityError, CacheMismatchError)):
        cache.extend([1] * 64)
    assert cache.tokens == (1, 2, 3)


def test_what_cannot_be_served_is_refused(model: Any, transformers: Any, config: Any) -> None:
    sliding = transformers.MistralConfig(**PARAMS, sliding_window=8)
    empty = transformers.StaticCache(config=config, max_cache_len=64)
    used = initialised(transformers.StaticCache(config=config, max_cache_len=64))
    grown = transformers.DynamicCache()
    with torch.no_grad():
        for past in (used, grown):
            model(torch.tensor([[3]]), past_key_values=past)
    for make, past, told in (
        (static, empty, "early_initialization"),
        (static, used, "empty cache"),
        (static, grown, "are StaticLayer, found DynamicLayer"),
        (dynamic, grown, "2 layers of 1 tokens"),
        (dynamic, used, "are DynamicLayer, found StaticLayer"),
        (dynamic, transformers.DynamicCache(config=sliding), "found DynamicSlidingWindowLayer"),
        (static, transformers.StaticCache(config=sliding, max_cache_len=64), "SlidingWindowLayer"),
        (static, None, "found NoneType"),
    ):
        with pytest.raises(InputError, match=told):
            make(past)
