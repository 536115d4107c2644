from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("executorch")

import numpy as np  # noqa: E402

import kvstore  # noqa: E402
from kvstore import MissReason  # noqa: E402
from kvstore.errors import (  # noqa: E402
    CapacityError,
    ClosedModelError,
    InputError,
    KVStoreError,
    MissingOperatorError,
    NotAProgramError,
    PositionError,
    ProgramDataError,
    ProgramError,
    TokensError,
)
from runtime_adapter import Model  # noqa: E402
from runtime_adapter.runtime import method  # noqa: E402
from tests import programs  # noqa: E402

pytestmark = pytest.mark.adapter

CAPACITY = 512
slow = pytest.mark.slow
SERVED = [
    "stock_fp32",
    "plain",
    "named",
    *(
        pytest.param(name, marks=slow)
        for name in ("one_token", "stock_fp16", "stock_bf16", "full_logits", "quantized_cache")
    ),
]


@pytest.fixture
def model() -> Iterator[Model]:
    with Model.open(programs.path("stock_fp32")) as model:
        yield model


def prompt(n_tokens: int, *, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 96, n_tokens)]


def rows(model: Model, n_tokens: int) -> list[Any]:
    """Copies of the first ``n_tokens`` rows of every tensor."""
    return [
        model.cache.live(spec.name).narrow(spec.token_axis, 0, n_tokens).clone()
        for spec in model.layout.tensors
    ]


# ----------------------------------------------------------------------- open


@pytest.mark.parametrize("name", SERVED)
def test_every_kind_of_program_opens_and_runs_in_one_call_each(name: str) -> None:
    with Model.open(programs.path(name), data_path=programs.data_path(name)) as model:
        tokens = prompt(40)
        logits = model.forward(tokens, start=0)
        assert (tuple(logits.shape), logits.dtype) == ((model.vocab_size,), torch.float32)
        assert bool(logits.isfinite().all())
        assert model.cache.tokens == tuple(tokens)
        assert model.capacity_n_tokens == CAPACITY
        assert all(row.any() for row in rows(model, 40) if row.is_floating_point())


@pytest.mark.skipif(programs.version() < (1, 5), reason="1.4 loads no .ptd in Python")
def test_a_program_with_its_weights_in_a_data_file_opens_with_it(tmp_path: Path) -> None:
    path, data = programs.path("external_weights"), programs.data_path("external_weights")
    with Model.open(path, data_path=data) as model:
        model.forward(prompt(20), start=0)
        assert model.cache.n_tokens == 20
    with pytest.raises(ProgramDataError):
        Model.open(path)
    with pytest.raises(ProgramDataError):
        Model.open(path, data_path=tmp_path / "none.ptd")


@pytest.mark.parametrize("name", ["stock_fp32", "plain", pytest.param("full_logits", marks=slow)])
def test_a_prompt_in_pieces_gives_what_one_piece_gives(name: str) -> None:
    tokens = prompt(60)
    with Model.open(programs.path(name)) as one, Model.open(programs.path(name)) as two:
        expected = one.forward(tokens, start=0)
        for position, token in enumerate(tokens[:5]):
            two.forward([token], start=position)
        found = two.forward(tokens[5:], start=5)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_prompt_longer_than_the_program_takes_is_split(model: Model) -> None:
    max_seq = programs.params("stock_fp32")["max_seq"]
    tokens = prompt(2 * max_seq + 17)
    whole = model.forward(tokens, start=0)
    assert model.cache.tokens == tuple(tokens)
    before = rows(model, len(tokens))
    model.cache.truncate(0)
    for first in range(0, len(tokens), max_seq - 1):
        last = model.forward(tokens[first : first + max_seq - 1], start=first)
    torch.testing.assert_close(last, whole, rtol=1e-3, atol=1e-3)
    for row, again in zip(before, rows(model, len(tokens)), strict=True):
        torch.testing.assert_close(row, again, rtol=1e-3, atol=1e-3)


def test_a_cache_copied_row_by_row_continues_identically(model: Model) -> None:
    tokens = prompt(70)
    model.forward(tokens, start=0)
    with Model.open(programs.path("stock_fp32")) as other:
        for index, spec in enumerate(model.layout.tensors):
            nbytes = 70 * spec.slot_nbytes  # token axis 1: the rows are one run
            other.cache.buffer(index)[:nbytes] = model.cache.buffer(index)[:nbytes]
        other.cache.extend(tokens)
        for step in range(5):
            expected = model.forward([step], start=70 + step)
            assert torch.equal(other.forward([step], start=70 + step), expected)


def test_logits_own_their_memory(model: Model) -> None:
    first = model.forward(prompt(9), start=0)
    kept = first.clone()
    model.forward([1], start=9)
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    "tokens",
    [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3], dtype=np.uint8), torch.tensor([1, 2, 3])],
)
def test_tokens_come_in_several_forms(model: Model, tokens: Any) -> None:
    model.forward(tokens, start=0)
    assert model.cache.tokens == (1, 2, 3)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ([], "found none"),
        ([-1], "found -1 at index 0"),
        ([1, 1.0], r"found 1\.0 \(float\) at index 1"),
        ([True], "found True"),
        (torch.tensor([True]), "found True"),
        ([np.bool_(True)], r"bool\) at index 0"),
        ([torch.tensor(True)], r"\(Tensor\) at index 0"),
        ("abc", "tokenizer"),
        (torch.tensor([[1]]), r"shape \[1, 1\]; pass one sequence"),
        (torch.tensor(1), r"shape \[\]"),
        (torch.tensor([1.0]), r"found 1\.0"),
        (7, "found int"),
        ([1, 96], "vocabulary size 96, found 96 at index 1; is it another model's tokenizer"),
    ],
)
def test_bad_token_ids_are_refused_and_change_nothing(model: Model, tokens: Any, told: str) -> None:
    model.forward([1, 2], start=0)
    with pytest.raises(TokensError, match=told):
        model.forward(tokens, start=2)
    assert model.cache.tokens == (1, 2)


def test_more_tokens_than_the_capacity_are_refused_and_change_nothing(model: Model) -> None:
    with pytest.raises(CapacityError, match="room for 512 tokens: it holds 0, and 513 more"):
        model.forward(prompt(CAPACITY + 1), start=0)
    model.forward(prompt(CAPACITY), start=0)
    with pytest.raises(CapacityError):
        model.forward([1], start=CAPACITY)
    assert model.cache.n_tokens == CAPACITY


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (1, r"cache\.truncate\(1\)"),
        (3, "compute or load the tokens before it"),
        (-1, "expected start=2"),
        (True, "whole number"),
        (2.0, "whole number"),
    ],
)
def test_a_start_that_is_not_the_caches_length_is_refused(
    model: Model, start: Any, told: str
) -> None:
    model.forward([1, 2], start=0)
    with pytest.raises(PositionError, match=told):
        model.forward([3], start=start)
    assert model.cache.tokens == (1, 2)


def test_after_a_failure_the_cache_holds_the_pieces_that_were_done(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = programs.params("stock_fp32")["max_seq"] - 1
    execute = method.LoadedMethod.execute
    n_calls = 0

    def fail_the_second_time(self: Any, inputs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            raise ProgramError("the runtime stopped")
        return execute(self, inputs)

    tokens = prompt(300)
    monkeypatch.setattr(method.LoadedMethod, "execute", fail_the_second_time)
    with pytest.raises(ProgramError):
        model.forward(tokens, start=0)
    held = model.cache.n_tokens
    assert 0 < held <= piece
    assert model.cache.tokens == tuple(tokens[:held])
    resumed = model.forward(tokens[held:], start=held)
    model.cache.truncate(0)
    assert torch.equal(model.forward(tokens, start=0), resumed)


@slow
def test_two_programs_of_the_same_file_name_are_two_models(tmp_path: Path) -> None:
    """Also one after the other at the same place: a name says nothing."""
    tokens = prompt(30)
    paths = [tmp_path / folder / "model.pte" for folder in ("a", "b")]
    for path, name in zip(paths, ("stock_fp32", "one_token"), strict=True):
        path.parent.mkdir()
        shutil.copy(programs.path(name), path)
    with kvstore.open(tmp_path / "s.db") as store:
        with Model.open(paths[0]) as one, Model.open(paths[1]) as other:
            assert one.layout.digest == other.layout.digest
            one.forward(tokens, start=0)
            store.save_session(one.cache, tokens, name="chat")
            hit = store.load_session(other.cache, tokens)
            assert (hit.n_tokens, hit.reason) == (0, MissReason.OTHER_MODEL)
        shutil.copy(paths[1], paths[0])
        with Model.open(paths[0]) as replaced:
            assert store.load_session(replaced.cache, tokens).reason is MissReason.OTHER_MODEL


def test_files_that_are_no_programs_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.pte"
    text.write_text("not a program")
    for path in (text, tmp_path, tmp_path / "missing.pte"):
        with pytest.raises(NotAProgramError):
            Model.open(path)
    for wrong in (None, 7):
        with pytest.raises(InputError, match="expected a path"):
            Model.open(wrong)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize("keep", [100, 10_000, 100_000])
def test_a_truncated_program_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.pte"
    path.write_bytes(programs.path("stock_fp32").read_bytes()[:keep])
    with pytest.raises(ProgramError):
        Model.open(path)


@slow
def test_a_backend_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method, "registered_backends", lambda: frozenset({"OtherBackend"}))
    with pytest.raises(MissingOperatorError, match=r"XnnpackBackend.*OtherBackend"):
        Model.open(programs.path("xnnpack"))


# ----------------------------------------------------------------- named copy


def test_a_stock_program_is_loaded_from_a_named_copy_in_the_cache_directory(
    tmp_path: Path,
) -> None:
    with Model.open(programs.path("stock_fp32"), cache_dir=tmp_path) as model:
        assert model.named_copy is not None
        assert model.named_copy.parent == tmp_path / "named"
        written = model.named_copy.stat()
    with Model.open(programs.path("stock_fp32"), cache_dir=tmp_path) as again:
        assert again.named_copy == model.named_copy
        assert again.named_copy.stat().st_mtime_ns == written.st_mtime_ns


def test_a_program_with_names_needs_no_copy(tmp_path: Path) -> None:
    with Model.open(programs.path("named"), cache_dir=tmp_path) as model:
        assert model.named_copy is None
    assert not (tmp_path / "named").exists()


def test_the_copy_goes_where_the_caller_says_and_is_used_again(tmp_path: Path) -> None:
    copy = tmp_path / "named.pte"
    with Model.open(programs.path("stock_fp32"), named_copy=copy) as model:
        assert model.named_copy == copy
        fingerprint = model.fingerprint
    written = copy.stat().st_mtime_ns
    with Model.open(programs.path("stock_fp32"), named_copy=copy):
        assert copy.stat().st_mtime_ns == written
    with Model.open(copy) as model:
        assert model.named_copy is None
        assert model.fingerprint == fingerprint


def test_something_else_in_the_copys_place_is_left_alone(tmp_path: Path) -> None:
    copy = tmp_path / "mine.pte"
    shutil.copy(programs.path("named"), copy)
    before = copy.read_bytes()
    with pytest.raises(ProgramError, match="another program"):
        Model.open(programs.path("stock_fp32"), named_copy=copy)
    with pytest.raises(InputError, match="another place than the program itself"):
        Model.open(programs.path("stock_fp32"), named_copy=programs.path("stock_fp32"))
    assert copy.read_bytes() == before
    with pytest.raises(KVStoreError, match="folder"):
        Model.open(programs.path("stock_fp32"), named_copy=tmp_path / "none" / "copy.pte")


def test_an_unusable_cache_directory_does_not_stop_a_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with Model.open(programs.path("stock_fp32"), cache_dir=tmp_path / "file") as model:
        model.forward([1, 2], start=0)
    assert "removed at exit" in caplog.text


# ------------------------------------------------------- processes and closing


SECOND_OPEN = """
import sys
from runtime_adapter import Model
assert "torch" not in sys.modules, "importing the adapter imports torch"
model = Model.open(sys.argv[1])
model.forward([1, 2, 3], start=0)
print([name for name in sys.modules if name.startswith("executorch.exir")])
"""


def test_a_second_open_imports_no_exporter_and_says_nothing(model: Model, run_python: Any) -> None:
    done = run_python(SECOND_OPEN, model.path)  # the fixture has opened it before
    assert (done.stdout, done.stderr) == ("[]\n", "")


VIEW_OUTLIVES_MODEL = """
import gc, sys
from runtime_adapter import Model
model = Model.open(sys.argv[1])
model.forward(list(range(50)), start=0)
name = list(model.cache)[0]
k, part, buffer = model.cache.live(name), model.cache.live(name)[0, :3], model.cache.buffer(0)
before = (float(k.sum()), float(part.sum()), bytes(buffer))
if sys.argv[2] == "close":
    model.close()
del model
gc.collect()
import torch
junk = [torch.rand(1 << 20) for _ in range(50)]
assert (float(k.sum()), float(part.sum()), bytes(buffer)) == before
k.zero_()
assert not any(buffer)
print("alive")
"""


@pytest.mark.parametrize("how", ["close", pytest.param("drop", marks=pytest.mark.slow)])
def test_a_live_tensor_outlives_its_model(model: Model, run_python: Any, how: str) -> None:
    done = run_python(VIEW_OUTLIVES_MODEL, model.path, how)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_a_closed_model_refuses_everything(model: Model) -> None:
    tensor = model.cache.live(next(iter(model.cache)))
    model.forward([1, 2], start=0)
    model.close()
    model.close()
    gc.collect()
    for use in (
        lambda: model.forward([1], start=2),
        lambda: model.cache.buffer(0),
        lambda: model.cache.live(next(iter(model.cache))),
        lambda: model.cache.truncate(0),
    ):
        with pytest.raises(ClosedModelError):
            use()
    assert bool(tensor.any())


def test_a_set_tensor_is_an_edit_until_the_cache_is_empty(model: Model) -> None:
    model.forward([1, 2, 3], start=0)
    name = next(iter(model.cache))
    model.cache.set(name, torch.zeros_like(model.cache.live(name)))
    assert model.cache.exact_n_tokens == 0
    model.forward([4], start=3)
    assert model.cache.exact_n_tokens == 0
    model.cache.truncate(0)
    assert model.cache.edits == ()
