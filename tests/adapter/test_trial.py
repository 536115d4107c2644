"""A program that was never opened takes its first steps in a child process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvstore.errors import CorruptProgramError, ProgramError
from tests import programs
from tests.adapter.test_program import first_call, with_another_argument

pytest.importorskip("executorch")

from runtime_adapter import Model
from runtime_adapter.runtime import trial


def _deadly(folder: Path) -> Path:
    """A program with a tensor of weights where the position should be read from.

    The argument is of the right kind, so only the kernel notices, and aborts.
    """
    source = programs.path("stock_fp32")
    weights = first_call(source, "aten::embedding.out")[0]
    path = folder / "model.pte"
    path.write_bytes(with_another_argument(source, "aten::_local_scalar_dense.", 0, weights))
    return path


def _interpreter(folder: Path, *, name: str, does: str) -> str:
    script = folder / name
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    return str(script)


def test_a_program_that_ends_its_process_is_corrupt(tmp_path: Path) -> None:
    path = _deadly(tmp_path)
    with pytest.raises(CorruptProgramError, match=r"ends its process \(SIGABRT\)"):
        Model.open(path, cache_dir=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/analyses/*"))  # the next time it is tried out again


def test_a_program_is_tried_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = programs.path("stock_fp32")
    Model.open(path, cache_dir=tmp_path / "cache").close()
    started = tmp_path / "started"
    fake = _interpreter(tmp_path, name="python3", does=f"touch {started}; kill -ABRT $$")
    monkeypatch.setattr(sys, "executable", fake)
    Model.open(path, cache_dir=tmp_path / "cache").close()
    assert not started.exists()
    with pytest.raises(CorruptProgramError):
        Model.open(path, cache_dir=tmp_path / "another")
    assert started.exists()


def test_a_path_that_python_ignores_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    with Model.open(programs.path("stock_fp32"), cache_dir=tmp_path / "cache") as model:
        assert len(model.forward([1], start=0)) == model.vocab_size


def test_a_killed_trial_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _interpreter(tmp_path, name="python3", does="kill -KILL $$")
    monkeypatch.setattr(sys, "executable", fake)
    with pytest.raises(ProgramError, match="enough memory"):
        Model.open(programs.path("stock_fp32"), cache_dir=tmp_path / "cache")


def test_a_trial_that_does_not_end_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _interpreter(tmp_path, name="python3", does="exec sleep 1000")
    monkeypatch.setattr(sys, "executable", fake)
    monkeypatch.setattr(trial, "_PATIENCE_S", 0.2)
    with pytest.raises(ProgramError, match="found them still under way"):
        Model.open(programs.path("stock_fp32"), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("python3", "exit 1"),  # does not get as far as the program
        ("some-app", "kill -ABRT $$"),  # Python is built into it
        ("python-gone", ""),
    ],
)
def test_where_no_child_can_be_started_the_program_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, does: str
) -> None:
    executable = _interpreter(tmp_path, name=name, does=does)
    if not does:
        Path(executable).unlink()
    monkeypatch.setattr(sys, "executable", executable)
    with Model.open(programs.path("stock_fp32"), cache_dir=tmp_path / "cache") as model:
        assert len(model.forward([1, 2, 3], start=0)) == model.vocab_size
