"""Every kind of cache that ExecuTorch exports, on really exported programs in the real runtime."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("executorch")

import kvstore  # noqa: E402  after the check that they are there
from kvstore import Kind  # noqa: E402
from kvstore.errors import ProgramError, RewindError  # noqa: E402
from kvstore.load import MissReason  # noqa: E402
from runtime_adapter import Model  # noqa: E402
from runtime_adapter.runtime import method  # noqa: E402
from tests import programs  # noqa: E402
from tests.adapter import journey  # noqa: E402

pytestmark = pytest.mark.adapter

ROOT = Path(__file__).resolve().parents[2]
RESUME = "from tests.adapter.journey import main; main()"
FAST = ("quantized_ring", "lfm2")
SLOW = (
    "stock_fp32",
    "quantized_cache",
    "static_quantized",
    "ring",
    "ring_only",
    "ring_one_token",
    "ring_xnnpack",
    "plain_ring",
    "sink",
    "plain_sink",
    "qwen35",
    "qwen35_one_token",
    "lfm2_xnnpack",
    "yoco_one_token",
    "two_methods",
    "two_shapes",
    "gemma4_one_token",
    "turboquant",
    "first_step",
    "head_dim_12",
    "stock_fp16",
    "stock_bf16",
    "plain",
    "plain_bf16",
    "plain_xnnpack",
    "plain_one_token",
    "plain_rings_xnnpack",
    "one_token",
    "full_logits",
    "xnnpack",
    "named",
    "unnamed",
    "external_weights",
    "external_xnnpack",
    "huggingface",
)
RINGS = ("quantized_ring", "ring", "ring_only", "plain_ring", "sink", "plain_sink")
RECURRENT = ("lfm2", "qwen35", "qwen35_one_token")


def each(names: tuple[str, ...]) -> list[Any]:
    """``names`` as parameters: slow unless they are in ``FAST``, skipped where not exportable."""
    return [
        pytest.param(
            name,
            marks=[
                *([] if name in FAST else [pytest.mark.slow]),
                pytest.mark.skipif(
                    not programs.is_available(name), reason="this ExecuTorch lacks the option"
                ),
                pytest.mark.skipif(
                    programs.SPECS[name].has_data_file and programs.version() < (1, 5),
                    reason="1.4 loads no .ptd in Python",
                ),
            ],
        )
        for name in names
    ]


def opened(name: str) -> Model:
    return Model.open(programs.path(name), data_path=programs.data_path(name))


def open_store(path: Path) -> kvstore.Store:
    return kvstore.open(path, chunk_n_tokens=journey.CHUNK_N_TOKENS, checkpoint_n_tokens=1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[kvstore.Store]:
    with open_store(tmp_path / "sessions.db") as store:
        yield store


@pytest.mark.parametrize("name", each((*FAST, *SLOW)))
def test_going_on_in_another_process_equals_never_having_stopped(name: str, tmp_path: Path) -> None:
    db, result = tmp_path / "sessions.db", tmp_path / "result.pt"
    record = journey.Record()
    with opened(name) as model, open_store(db) as store:
        stops = journey.stops_of(model)
        tokens = journey.tokens_of(stops)
        for index, stop in enumerate(stops):
            journey.go_on(model, tokens, stops[: index + 1], record)
            assert store.save_session(model.cache, tokens[:stop], name="chat").n_tokens == stop
        assert store.verify().ok
        path, data = model.path, programs.data_path(name) or ""
        # A fresh conversation begins as in a program that was just loaded.
        model.cache.truncate(0)
        again = journey.Record()
        journey.go_on(model, tokens, stops[:2], again)
        same(record, again, since=0)

    orders = [*stops[:-1]]
    random.Random(0).shuffle(orders)
    subprocess.run(
        [sys.executable, "-c", RESUME, path, data, db, result, *map(str, orders)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=300,
    )
    for stop, n_tokens, reason, resumed in torch.load(result, weights_only=False):
        assert (n_tokens, reason) == (stop, None)
        assert max(resumed.logits) == stops[-1]
        same(record, resumed, since=stop)


def same(expected: journey.Record, found: journey.Record, *, since: int) -> None:
    for stop, tensors in found.visible.items():
        for name, content in tensors.items():
            assert content == expected.visible[stop][name], (name, since, stop)
    for stop, logits in found.logits.items():
        assert torch.equal(logits, expected.logits[stop]), (since, stop)


@pytest.mark.parametrize("name", each(RINGS))
def test_a_window_that_was_never_saved_is_gone(name: str, store: kvstore.Store) -> None:
    with opened(name) as model:
        stops = journey.stops_of(model)
        tokens = journey.tokens_of(stops)
        last = stops[-1]
        journey.go_on(model, tokens, stops, journey.Record())
        store.save_session(model.cache, tokens[:last], name="at the end")
        rings = [spec for spec in model.layout.tensors if spec.kind is Kind.WINDOW]
        early = min(spec.sink_n_tokens + spec.capacity_n_tokens for spec in rings)
        with pytest.raises(RewindError):
            model.cache.truncate(early)
        assert model.cache.n_tokens == last
        hit = store.load_session(model.cache, tokens[: early + 1])
        # A sink is kept for ever, so a prompt of that length can still be served.
        sink_n_tokens = min(spec.sink_n_tokens for spec in rings)
        assert (hit.reason, hit.n_tokens) == (MissReason.WINDOW_GONE, sink_n_tokens)
        # Computed again, and saved while it is there: from now on it can be had.
        for start in range(hit.n_tokens, early, 7):
            model.forward(tokens[start : min(start + 7, early)], start=start)
        before = journey.visible(model)
        store.save_session(model.cache, tokens[:early], name="early")
        journey.go_on(model, tokens, [early, *range(early + 9, last, 9)], journey.Record())
        hit = store.load_session(model.cache, tokens[: early + 1])
        assert (hit.reason, hit.n_tokens) == (None, early)
        restored = journey.visible(model)
        assert all(restored[spec.name] == before[spec.name] for spec in rings)


@pytest.mark.parametrize("name", each(RINGS))
def test_a_prompt_at_once_equals_one_token_at_a_time(name: str) -> None:
    """A piece never overwrites what its first token still sees."""
    with opened(name) as model:
        tokens = journey.tokens_of([150])[:150]
        at_once = model.forward(tokens, start=0)
        model.cache.truncate(0)
        for position, token in enumerate(tokens):
            one_by_one = model.forward([token], start=position)
        # int8 rounds what the pieces' low bits move over an edge
        tolerance = 0.1 if "quantized" in name else 1e-3
        torch.testing.assert_close(at_once, one_by_one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", each(RECURRENT))
def test_loading_exactly_what_was_saved_needs_no_recompute(
    name: str, store: kvstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(name) as model:
        tokens = journey.tokens_of([40])[:40]
        logits = model.forward(tokens, start=0)
        assert torch.equal(model.logits, logits)
        store.save_session(model.cache, tokens, name="chat")
        after = model.forward([1], start=40)
        model.cache.truncate(0)
        assert model.logits is None
        with monkeypatch.context() as patch:
            patch.setattr(method.LoadedMethod, "execute", None)  # nothing runs
            hit = store.load_session(model.cache, name="chat")
            assert (hit.n_tokens, hit.has_logits, hit.reason) == (40, True, None)
            found = model.forward(tokens[hit.n_tokens :], start=hit.n_tokens)
        assert torch.equal(found, logits)
        assert torch.equal(model.logits, logits)
        assert torch.equal(model.forward([1], start=40), after)


@pytest.mark.parametrize("name", each(RECURRENT))
def test_recurrent_state_is_served_only_where_it_was_saved(name: str, store: kvstore.Store) -> None:
    with opened(name) as model:
        tokens = journey.tokens_of([60])
        for start, stop in ((0, 20), (20, 50)):
            model.forward(tokens[start:stop], start=start)
            store.save_session(model.cache, tokens[:stop], name="chat")
        with pytest.raises(RewindError):
            model.cache.truncate(49)
        hit = store.load_session(model.cache, tokens[:45])
        assert (hit.n_tokens, hit.reason) == (20, MissReason.NO_CHECKPOINT)
        assert not hit.has_logits
        resumed = model.forward(tokens[20:50], start=20)
        model.cache.truncate(0)
        model.forward(tokens[:20], start=0)
        assert torch.equal(model.forward(tokens[20:50], start=20), resumed)


@pytest.mark.parametrize("name", each(("first_step",)))
def test_a_tensor_of_the_first_step_is_not_stored_with_every_chunk(
    name: str, tmp_path: Path
) -> None:
    db = tmp_path / "sessions.db"
    with opened(name) as model, kvstore.open(db, chunk_n_tokens=8) as store:
        tokens = journey.tokens_of([200])
        roles = [spec.role for spec in model.layout.tensors]
        for start in range(0, 200, 40):
            model.forward(tokens[start : start + 40], start=start)
            store.save_session(model.cache, tokens[: start + 40], name="chat")
            assert store.verify().ok
        with contextlib.closing(sqlite3.connect(db)) as connection:
            rows = connection.execute("SELECT tensor, count(*) FROM blobs GROUP BY tensor")
            n_rows = {roles[tensor]: count for tensor, count in rows}
        # The newest one, and one in 2,048 tokens.
        assert n_rows == {"k": 25, "v": 25, "state": 2, "logits": 2}
        topic = model.cache.live(model.layout.tensors[roles.index("state")].name).clone()
        assert topic.any()
        model.cache.truncate(0)
        assert store.load_session(model.cache, name="chat").n_tokens == 200
        assert torch.equal(model.cache.live(model.layout.tensors[roles.index("state")].name), topic)


@pytest.mark.parametrize("name", each(FAST))
def test_a_ring_or_state_is_emptied_when_the_runtime_stops(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = method.LoadedMethod.execute
    with opened(name) as model:
        expected = model.forward([1, 2, 3], start=0)
        calls = []

        def stop_after_the_second(self: Any, inputs: Any) -> Any:
            calls.append(execute(self, inputs))
            if len(calls) == 2:
                raise ProgramError("the runtime stopped")
            return calls[-1]

        tokens = journey.tokens_of([300])
        with monkeypatch.context() as patch:
            patch.setattr(method.LoadedMethod, "execute", stop_after_the_second)
            with pytest.raises(ProgramError, match="the runtime stopped"):
                model.forward(tokens, start=3)
        assert (model.cache.tokens, model.logits) == ((), None)
        assert torch.equal(model.forward([1, 2, 3], start=0), expected)


@pytest.mark.slow
@pytest.mark.skipif(not programs.is_available("lora"), reason="this ExecuTorch lacks the option")
def test_a_method_of_other_weights_is_another_model(store: kvstore.Store) -> None:
    """Also in one file, over one cache: a LoRA adapter beside its base."""
    path = programs.path("lora")
    with Model.open(path) as base, Model.open(path, method="lora_forward") as lora:
        tokens = journey.tokens_of([40])
        base.forward(tokens[:40], start=0)
        store.save_session(base.cache, tokens[:40], name="chat")
        assert lora.layout.digest == base.layout.digest
        hit = store.load_session(lora.cache, tokens)
        assert (hit.n_tokens, hit.reason) == (0, MissReason.OTHER_MODEL)


@pytest.mark.slow
def test_a_session_goes_from_one_method_to_another(store: kvstore.Store) -> None:
    """Each has memory of its own in Python; the store carries the cache over."""
    path = programs.path("two_methods")
    with Model.open(path) as prefill, Model.open(path, method="decode") as decode:
        tokens = journey.tokens_of([60])
        prefill.forward(tokens[:60], start=0)
        store.save_session(prefill.cache, tokens[:60], name="chat")
        assert decode.fingerprint == prefill.fingerprint
        hit = store.load_session(decode.cache, tokens)
        assert (hit.n_tokens, hit.reason) == (60, None)
        assert journey.visible(decode) == journey.visible(prefill)
        expected = prefill.forward(tokens[60:61], start=60)
        found = decode.forward(tokens[60:61], start=60)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
