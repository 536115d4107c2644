"""``kvstore annotate``: writes the named copy and says what it named."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvstore.errors import InputError, NotAProgramError
from runtime_adapter.commands.annotate import annotate
from runtime_adapter.program.survey import analyze
from tests import programs

pytestmark = pytest.mark.adapter


def run(*arguments: object) -> Result:
    return CliRunner().invoke(annotate, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_it_writes_the_copy_and_prints_the_names(tmp_path: Path) -> None:
    target = tmp_path / "out.pte"
    result = run(programs.path("stock_fp32"), target)
    assert result.exit_code == 0
    after = analyze(target)
    assert after.is_named
    assert after.fingerprint == analyze(programs.path("stock_fp32")).fingerprint
    assert result.stdout.splitlines() == [
        "forward: 4 tensors",
        *(f"  {tensor.name}" for tensor in after.layout.tensors),
    ]
    assert str(target) in result.stderr


def test_it_keeps_an_existing_file_unless_forced(tmp_path: Path) -> None:
    target = tmp_path / "out.pte"
    target.write_bytes(b"mine")
    assert isinstance(run(programs.path("stock_fp32"), target).exception, InputError)
    assert target.read_bytes() == b"mine"
    assert run(programs.path("stock_fp32"), target, "--force").exit_code == 0
    assert analyze(target).is_named


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_only_a_regular_file_is_ever_replaced(tmp_path: Path, force: list[str]) -> None:
    pipe, link = tmp_path / "pipe.pte", tmp_path / "link.pte"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "nowhere.pte")
    for target in (pipe, link, tmp_path / ("x" * 300)):
        assert isinstance(run(programs.path("stock_fp32"), target, *force).exception, InputError)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert link.is_symlink()


def test_a_pipe_is_no_program_and_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.pte"
    os.mkfifo(pipe)
    assert isinstance(run(pipe, tmp_path / "out.pte").exception, NotAProgramError)


def test_in_and_out_may_not_be_the_same(tmp_path: Path) -> None:
    source = tmp_path / "model.pte"
    source.write_bytes(programs.path("stock_fp32").read_bytes())
    result = run(source, tmp_path / "." / "model.pte", "--force")
    assert isinstance(result.exception, InputError)
    assert source.read_bytes() == programs.path("stock_fp32").read_bytes()


@pytest.mark.slow
def test_every_method_is_named(tmp_path: Path) -> None:
    result = run(programs.path("two_methods"), tmp_path / "out.pte")
    assert "forward: 4 tensors" in result.stdout
    assert "decode: 4 tensors" in result.stdout
