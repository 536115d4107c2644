from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("executorch")

from kvstore.errors import (  # noqa: E402
    ClosedModelError,
    KVStoreError,
    ProgramError,
    ProgramSignatureError,
)
from runtime_adapter.runtime import libraries as operators  # noqa: E402
from runtime_adapter.runtime.method import LoadedMethod  # noqa: E402
from tests import programs  # noqa: E402

pytestmark = pytest.mark.adapter

OPERATORS = ("llama::update_cache.out", "llama::custom_sdpa.out")


@pytest.fixture(scope="module")
def named() -> Path:
    """A program whose exporter named the buffers."""
    operators.ensure_operators(OPERATORS)
    return programs.path("named")


@pytest.fixture
def method(named: Path) -> LoadedMethod:
    return LoadedMethod(named, method="forward")


def inputs(tokens: list[int], start: int) -> list[Any]:
    return [torch.tensor([tokens]), torch.tensor([start])]


def first_view(method: LoadedMethod) -> Any:
    return method.view(buffer_name())


def buffer_name() -> str:
    from runtime_adapter.program.survey import analyze

    return analyze(programs.path("named")).layout.tensors[0].name


def test_a_view_shows_what_the_program_writes_and_changes_what_it_reads(
    method: LoadedMethod,
) -> None:
    view = first_view(method)
    assert not view.any()
    method.execute(inputs([1, 2, 3], 0))
    assert view.any()
    exact = method.execute(inputs([4], 3))[0]
    view.zero_()
    assert not torch.equal(method.execute(inputs([4], 3))[0], exact)


def test_outputs_own_their_memory(method: LoadedMethod) -> None:
    first = method.execute(inputs([1, 2, 3], 0))[0]
    kept = first.clone()
    method.execute(inputs([9], 3))
    assert torch.equal(first, kept)


def test_a_buffer_without_that_name_is_a_key_error(method: LoadedMethod) -> None:
    with pytest.raises(KeyError, match="nothing"):
        method.view("nothing")


def test_a_closed_method_refuses_and_its_views_live_on(method: LoadedMethod) -> None:
    view = first_view(method)
    method.execute(inputs([1, 2, 3], 0))
    total = float(view.sum())
    method.close()
    gc.collect()
    assert float(view.sum()) == total
    with pytest.raises(ClosedModelError):
        method.view("any")
    with pytest.raises(ClosedModelError):
        method.execute(inputs([1], 0))


VIEWS_OUTLIVE = """
import gc, sys
from pathlib import Path
import torch
from runtime_adapter.runtime import libraries as operators
from runtime_adapter.runtime.method import LoadedMethod
operators.ensure_operators(["llama::update_cache.out"])
kept = []
for _ in range(4):
    method = LoadedMethod(Path(sys.argv[1]), method="forward")
    view = method.view(sys.argv[2])
    method.execute([torch.tensor([[1, 2, 3]]), torch.tensor([0])])
    kept += [view[0, :2], view.reshape(-1).view(torch.uint8).numpy().data, view.detach()]
    kept.append(view.numpy()[:, 1:])
    if len(kept) == 4:
        first = [bytes(memoryview(torch.as_tensor(v).contiguous().numpy()).cast("B")) for v in kept]
    del method, view
    gc.collect()
junk = [torch.rand(1 << 20) for _ in range(50)]
last = [bytes(memoryview(torch.as_tensor(v).contiguous().numpy()).cast("B")) for v in kept[:4]]
assert first == last
kept.clear()
gc.collect()
print("alive")
"""


@pytest.mark.slow
def test_views_of_any_kind_outlive_method_and_program(named: Path, run_python: Any) -> None:
    done = run_python(VIEWS_OUTLIVE, named, buffer_name())
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


WITHOUT_LIBRARY = """
import sys
from pathlib import Path
from kvstore.errors import MissingOperatorError
from runtime_adapter.runtime.method import LoadedMethod
try:
    LoadedMethod(Path(sys.argv[1]), method="forward")
except MissingOperatorError as error:
    print(error)
"""


def test_an_operator_that_is_missing_is_named_without_pages_of_log(
    run_python: Any,
) -> None:
    done = run_python(WITHOUT_LIBRARY, programs.path("stock_fp32"))
    assert done.stderr == ""
    for operator in OPERATORS:
        assert operator in done.stdout


def test_a_method_that_does_not_exist_is_refused(named: Path) -> None:
    with pytest.raises(ProgramSignatureError, match="nonesuch"):
        LoadedMethod(named, method="nonesuch")


def test_inputs_that_do_not_fit_are_refused_and_the_method_stays_usable(
    method: LoadedMethod,
) -> None:
    with pytest.raises(ProgramSignatureError, match=r"shapes \[\(1, 4096\), \(1,\)\]"):
        method.execute(inputs([1] * 4096, 0))
    assert method.execute(inputs([1], 0))


def test_a_runtime_that_stops_is_our_error_and_the_method_stays_usable(
    method: LoadedMethod,
) -> None:
    with pytest.raises(ProgramError, match=r"stopped in method 'forward'.*indices"):
        method.execute(inputs([10_000], 0))
    assert method.execute(inputs([1], 0))


@pytest.mark.parametrize("keep", [0, 7, 64, 4096])
def test_a_file_that_is_cut_off_is_our_error(named: Path, tmp_path: Path, keep: int) -> None:
    damaged = tmp_path / "cut.pte"
    damaged.write_bytes(named.read_bytes()[:keep])
    with pytest.raises(ProgramError, match=re.escape(str(damaged))):
        LoadedMethod(damaged, method="forward")


def test_a_missing_file_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="cannot be read"):
        LoadedMethod(tmp_path / "none.pte", method="forward")


def test_no_other_error_escapes_the_binding(method: LoadedMethod) -> None:
    for wrong in ([None, None], ["text"], [torch.ones(1)], [1, 2, 3]):
        with pytest.raises(KVStoreError):
            method.execute(wrong)  # type: ignore[arg-type]  # that is the point


def test_a_runtime_that_is_not_installed_is_named(run_python: Any) -> None:
    done = run_python(
        "import sys; sys.modules['torch'] = None\n"
        "from kvstore.errors import RuntimeMissingError\n"
        "from runtime_adapter.runtime import method\n"
        "try: method.registered_operators()\n"
        "except RuntimeMissingError as error: print(error)\n"
    )
    assert "pip install 'kvstore[executorch]'" in done.stdout
