from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("executorch")

from kvstore.errors import MissingOperatorError
from runtime_adapter.runtime import libraries as operators
from runtime_adapter.runtime.libraries import LIBRARIES, OperatorLibrary, ensure_operators

pytestmark = pytest.mark.adapter

LOADING = """
import sys
from runtime_adapter.runtime import method
from runtime_adapter.runtime.libraries import ensure_operators
before = method.registered_operators()
ensure_operators(sys.argv[1:])
print(sorted({name.split("::")[0] for name in method.registered_operators() - before}))
print([name for name in sys.modules if name.startswith(("executorch.exir", "executorch.kernels"))])
"""


@pytest.mark.parametrize(
    ("needed", "loaded"),
    [
        pytest.param(["aten::add.out"], [], marks=pytest.mark.slow),
        (["aten::add.out", "llama::update_cache.out"], ["llama", "preprocess"]),
        pytest.param(
            ["quantized_decomposed::add.out"], ["quantized_decomposed"], marks=pytest.mark.slow
        ),
    ],
)
def test_the_library_that_a_program_needs_is_loaded_and_no_other(
    run_python: Any, needed: list[str], loaded: list[str]
) -> None:
    done = run_python(LOADING, *needed)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [str(loaded), "[]"]


def test_every_library_is_in_the_installed_package() -> None:
    assert all(library.find() is not None for library in LIBRARIES)


def test_operators_of_no_known_library_are_named() -> None:
    needed = ["aten::add.out", "other::beta.out", "other::alpha.out"]
    with pytest.raises(
        MissingOperatorError, match=r"other::alpha\.out, other::beta\.out"
    ) as caught:
        ensure_operators(needed)
    assert "aten::add" not in str(caught.value)
    assert "torch.ops.load_library" in str(caught.value)


def test_a_long_list_of_operators_is_cut() -> None:
    with pytest.raises(MissingOperatorError, match="and 12 more"):
        ensure_operators([f"other::op{number}" for number in range(20)])


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    library = OperatorLibrary(folder="nowhere", stem="libnone", namespaces=frozenset({"special"}))
    monkeypatch.setattr(operators, "LIBRARIES", (library,))
    with pytest.raises(MissingOperatorError, match="libnone is not in the installed executorch"):
        ensure_operators(["special::op.out"])


def test_a_library_that_does_not_load_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"not a library")
    library = OperatorLibrary(folder="nowhere", stem="libbroken", namespaces=frozenset({"special"}))
    monkeypatch.setattr(operators, "LIBRARIES", (library,))
    monkeypatch.setattr(OperatorLibrary, "find", lambda _: broken)
    with pytest.raises(MissingOperatorError, match=r"libbroken\.so does not load"):
        ensure_operators(["special::op.out"])
