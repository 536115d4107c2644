from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402  after the check that torch is there

import kvstore  # noqa: E402
from kvstore import Kind  # noqa: E402
from kvstore.errors import CapacityError, InputError, TokensError  # noqa: E402
from kvstore.load import MissReason  # noqa: E402
from runtime_adapter import TensorCache, fingerprint_of, tensor_spec  # noqa: E402

pytestmark = pytest.mark.adapter

ROOT = Path(__file__).resolve().parents[2]
N_SLOTS = 32
MODEL = fingerprint_of(b"weights", program="program")


def two_tensors(kind: Any = torch) -> dict[str, Any]:
    """K as ``[1, S, H, D]`` of one layer, and V."""
    return {name: kind.zeros((1, N_SLOTS, 2, 3)) for name in ("layers.0.k", "layers.0.v")}


def compute(cache: TensorCache, tokens: list[int]) -> None:
    """A model: slot ``p`` of every tensor holds the token at ``p``."""
    for token in tokens:
        for name in cache:
            cache.live(name)[:, cache.n_tokens] = token
        cache.extend([token])


@pytest.mark.parametrize("kind", [torch, np])
def test_tensors_of_the_caller_are_stored_and_written_in_place(kind: Any, tmp_path: Path) -> None:
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    with kvstore.open(tmp_path / "s.db") as store:
        cache = TensorCache.from_tensors(two_tensors(kind), token_axis=1, fingerprint=MODEL)
        compute(cache, tokens)
        store.save_session(cache, tokens, name="chat")
        mine = two_tensors(kind)
        cache = TensorCache.from_tensors(mine, token_axis=1, fingerprint=MODEL)
        hit = store.load_session(cache, [*tokens, 7])
    assert (hit.n_tokens, cache.tokens) == (8, tuple(tokens))
    for tensor in mine.values():
        assert tensor[0, :8, 0, 0].tolist() == tokens
        assert not tensor[:, 8:].any()


def test_no_more_is_loaded_than_the_caller_says_there_is_room_for(tmp_path: Path) -> None:
    tokens = list(range(20))
    with kvstore.open(tmp_path / "s.db") as store:
        cache = TensorCache.from_tensors(two_tensors(), token_axis=1, fingerprint=MODEL)
        compute(cache, tokens)
        store.save_session(cache, tokens, name="chat")
        small = TensorCache.from_tensors(
            two_tensors(), token_axis=1, fingerprint=MODEL, capacity_n_tokens=16
        )
        hit = store.load_session(small, tokens)
    assert (hit.n_tokens, hit.reason, small.n_tokens) == (16, MissReason.CAPACITY, 16)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="capacity_n_tokens"):
            TensorCache.from_tensors(
                two_tensors(), token_axis=1, fingerprint=MODEL, capacity_n_tokens=wrong
            )


def test_a_step_may_return_new_tensors(tmp_path: Path) -> None:
    cache = TensorCache.from_tensors(two_tensors(), token_axis=1, fingerprint=MODEL)
    old = cache.live("layers.0.k")
    new = {name: torch.full((1, N_SLOTS, 2, 3), 5.0) for name in cache}
    cache.replace(new)
    cache.extend([5])
    assert cache.live("layers.0.k").data_ptr() == new["layers.0.k"].data_ptr()
    with kvstore.open(tmp_path / "s.db") as store:
        store.save_session(cache, [5])
        cache.truncate(0)
        new["layers.0.k"].zero_()
        store.load_session(cache, [5, 6])
    assert float(new["layers.0.k"][0, 0].sum()) == 30
    assert float(old.sum()) == 0
    for name, tensor, told in (
        ("layers.1.k", torch.zeros(1), "no tensor 'layers.1.k'"),
        ("layers.0.k", torch.zeros(1), "as before"),
        ("layers.0.k", torch.zeros((1, N_SLOTS, 2, 3), dtype=torch.float16), "found torch.float16"),
    ):
        with pytest.raises(InputError, match=told):
            cache.replace({"layers.0.v": new["layers.0.v"], name: tensor})


def test_other_weights_another_program_and_another_layout_share_nothing(tmp_path: Path) -> None:
    def cache_of(fingerprint: Any = MODEL, n_slots: int = N_SLOTS) -> TensorCache:
        tensors = {name: tensor[:, :n_slots].clone() for name, tensor in two_tensors().items()}
        return TensorCache.from_tensors(tensors, token_axis=1, fingerprint=fingerprint)

    with kvstore.open(tmp_path / "s.db") as store:
        cache = cache_of()
        compute(cache, [1, 2, 3])
        store.save_session(cache, [1, 2, 3])
        assert store.load_session(cache_of(), [1, 2, 3, 4]).n_tokens == 3
        for other, reason in (
            (cache_of(fingerprint_of(b"other", program="program")), MissReason.OTHER_MODEL),
            (cache_of(fingerprint_of(b"weights", program="other")), MissReason.OTHER_MODEL),
            (cache_of(n_slots=16), MissReason.OTHER_LAYOUT),
        ):
            assert store.load_session(other, [1, 2, 3, 4]).reason is reason


def test_every_kind_of_state_can_be_the_callers(tmp_path: Path) -> None:
    """A ring of 8 slots and a sum over all tokens, with the logits that a recurrence needs."""

    def make() -> TensorCache:
        tensors = {
            "layers.0.k": torch.zeros(1, 8, 1),
            "layers.1.state": torch.ones(3),
            "logits": torch.zeros(4),
        }
        ring = {"kind": Kind.WINDOW, "window_n_tokens": 4}
        return TensorCache(
            tensors,
            specs=[
                tensor_spec("layers.0.k", tensors["layers.0.k"], token_axis=1, **ring),
                tensor_spec(
                    "layers.1.state",
                    tensors["layers.1.state"],
                    token_axis=None,
                    kind=Kind.CHECKPOINT,
                ),
                tensor_spec("logits", tensors["logits"], token_axis=None, kind=Kind.CHECKPOINT),
            ],
            fingerprint=MODEL,
            capacity_n_tokens=100,
        )

    def step(cache: TensorCache, token: int) -> None:
        cache.live("layers.0.k")[0, cache.n_tokens % 8] = token
        cache.live("layers.1.state").add_(token)
        cache.extend([token], logits=torch.full((4,), float(token)))

    tokens = list(range(1, 21))
    with kvstore.open(tmp_path / "s.db") as store:
        cache = make()
        for token in tokens:
            step(cache, token)
        store.save_session(cache, tokens, name="chat")
        cache = make()
        hit = store.load_session(cache, name="chat")
    assert (hit.n_tokens, hit.has_logits) == (20, True)
    assert cache.live("layers.0.k").flatten().tolist() == [0, 18, 19, 20, 0, 0, 0, 0]
    assert cache.live("layers.1.state").tolist() == [211, 211, 211]
    assert cache.logits.tolist() == [20] * 4
    cache.truncate(0)
    assert cache.live("layers.1.state").tolist() == [1, 1, 1]
    with pytest.raises(CapacityError, match="room for 100"):
        cache.extend([1] * 101, logits=torch.zeros(4))


def test_token_ids_of_a_step_are_checked() -> None:
    cache = TensorCache.from_tensors(two_tensors(), token_axis=1, fingerprint=MODEL)
    cache.extend(np.array([1, 2]))
    for wrong in ([], [-1], "ab", [1.5]):
        with pytest.raises(TokensError):
            cache.extend(wrong)  # type: ignore[arg-type]  # that is the point
    assert cache.tokens == (1, 2)


# ----------------------------------------------------------------------- specs


def test_role_and_layer_come_from_the_name_or_from_the_caller() -> None:
    tensor = torch.zeros((1, 4, N_SLOTS, 2), dtype=torch.bfloat16)
    spec = tensor_spec("model.layers.3.attn.k_cache", tensor, token_axis=-2)
    assert (spec.role, spec.layer, spec.token_axis, spec.dtype) == ("k_cache", 3, 2, "bfloat16")
    spec = tensor_spec("cache", tensor, token_axis=2, role="v", layer=7)
    assert (spec.role, spec.layer) == ("v", 7)
    assert tensor_spec("cache", tensor, token_axis=2).layer == 0


def read_only() -> Any:
    array = np.zeros((1, N_SLOTS, 6), dtype=np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (torch.zeros(1, 6, N_SLOTS).transpose(1, 2), "not contiguous; use tensor.contiguous"),
        (torch.zeros((1, N_SLOTS, 6), device="meta"), "on meta"),
        (np.zeros((1, 6, N_SLOTS)).transpose(0, 2, 1), "not contiguous; use numpy"),
        (read_only(), "read-only"),
        (np.zeros((1, N_SLOTS, 6), dtype=">f4"), "dtype"),
        (torch.zeros((1, N_SLOTS, 6), dtype=torch.complex64), "dtype among .*, found complex64"),
        (torch.zeros((2, N_SLOTS, 6)), "batch size 1, found 2"),
        (torch.zeros(()), "positive sizes"),
    ],
)
def test_a_tensor_that_cannot_be_shared_is_refused(tensor: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        TensorCache.from_tensors({"k": tensor}, token_axis=1, fingerprint=MODEL)


def test_specs_and_tensors_have_the_same_names() -> None:
    tensors = two_tensors()
    spec = tensor_spec("layers.0.k", tensors["layers.0.k"], token_axis=1)
    with pytest.raises(InputError, match=r"named layers\.0\.k, found"):
        TensorCache(tensors, specs=[spec], fingerprint=MODEL)
    with pytest.raises(InputError, match="found list"):
        TensorCache({"layers.0.k": [1.0]}, specs=[spec], fingerprint=MODEL)
    unnamed: Any = {7: tensors["layers.0.k"]}
    with pytest.raises(InputError, match="as text, found 7"):
        TensorCache.from_tensors(unnamed, token_axis=1, fingerprint=MODEL)


# ----------------------------------------------------------------- fingerprints


def test_a_fingerprint_is_of_content_and_of_nothing_else(tmp_path: Path) -> None:
    state = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    same = {"b": state["b"].clone(), "a": np.ones(3, dtype=np.float32)}
    base = fingerprint_of(state, program="p")
    assert fingerprint_of(same, program=b"p") == base
    changed = [
        {**state, "a": torch.full((3,), 1.5)},
        {**state, "a": torch.ones((3, 1))},
        {**state, "a": torch.ones(3).view(torch.int32)},
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"]},
    ]
    assert len({fingerprint_of(other, program="p").weights for other in [state, *changed]}) == 6
    assert fingerprint_of(state, program="q").weights == base.weights
    assert fingerprint_of(state, program="q").program != base.program
    file, copy = tmp_path / "one.bin", tmp_path / "two.bin"
    file.write_bytes(b"content")
    copy.write_bytes(b"content")
    assert fingerprint_of(file, program=file) == fingerprint_of(copy, program=copy)
    assert fingerprint_of(file, program="p") == fingerprint_of(b"content", program="p")


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({}, "found nothing"),
        (b"", "found nothing"),
        ("llama-3.2-1b", "a name says nothing"),
        (7, "found int"),
        ({7: torch.ones(3), "a": torch.ones(3)}, "under names"),
        ({"a": 1.0}, "expected a tensor for 'a', found float"),
        ({"a": torch.ones(2, 2).to_sparse()}, "plain numbers for 'a'"),
        (Path("missing.bin"), "missing.bin"),
    ],
)
def test_what_has_no_content_is_refused(weights: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        fingerprint_of(weights, program="p")
    if not isinstance(weights, (dict, str)):
        with pytest.raises(InputError):
            fingerprint_of(b"weights", program=weights)


# --------------------------------------------------------------------- examples


@pytest.mark.slow
@pytest.mark.checkout
@pytest.mark.parametrize(
    "example",
    # The chat has a test of its own, through a terminal.
    sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "chat"),
    ids=lambda path: path.stem,
)
def test_the_examples_run(example: Path) -> None:
    if "huggingface" in example.stem:
        pytest.importorskip("transformers")
    else:
        pytest.importorskip("executorch")
    done = subprocess.run(
        [sys.executable, example],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "the next logits are the same" in done.stdout
