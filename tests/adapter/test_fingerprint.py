"""What changes a fingerprint, and what does not."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from runtime_adapter.program.naming import write_named_copy
from runtime_adapter.program.survey import analyze
from runtime_adapter.pte.file import read_program
from runtime_adapter.pte.fingerprint import program_digest, weights_digest
from runtime_adapter.pte.ptd import data_digest, read_data_file
from tests import programs

pytestmark = pytest.mark.adapter
slow = pytest.mark.slow


def test_the_same_bytes_elsewhere_are_the_same_model(tmp_path: Path) -> None:
    other = tmp_path / "other.pte"
    shutil.copyfile(programs.path("stock_fp32"), other)
    assert analyze(other).fingerprint == analyze(programs.path("stock_fp32")).fingerprint


@slow
def test_the_same_shapes_with_other_weights_are_another_model() -> None:
    one, other = (analyze(programs.path(name)) for name in ("stock_fp32", "other_seed"))
    assert one.layout == other.layout
    assert one.fingerprint.program == other.fingerprint.program
    assert one.fingerprint.weights != other.fingerprint.weights
    assert one.fingerprint.model != other.fingerprint.model


@slow
def test_names_make_no_difference_from_the_exporter_or_from_us(tmp_path: Path) -> None:
    named, unnamed = programs.path("named"), programs.path("unnamed")
    ours = tmp_path / "ours.pte"
    write_named_copy(unnamed, ours)
    analyses = [analyze(path) for path in (named, unnamed, ours)]
    assert [analysis.is_named for analysis in analyses] == [True, False, True]
    assert len({analysis.fingerprint for analysis in analyses}) == 1
    assert len({analysis.layout for analysis in analyses}) == 1


def test_where_memory_is_planned_and_segments_lie_makes_no_difference() -> None:
    program = read_program(programs.path("stock_fp32")).program
    before = program_digest(program)
    moved = copy.deepcopy(program)
    moved.segments[0].offset += 4096
    plan = moved.execution_plan[0]
    plan.non_const_buffer_sizes = [0, 1 << 30]
    for value in plan.values:
        if getattr(value.val, "allocation_info", None) is not None:
            value.val.allocation_info.memory_offset_low += 64
    assert program_digest(moved) == before


@pytest.mark.parametrize("change", ["argument", "scalar", "operator", "shape", "order"])
def test_any_change_of_an_instruction_or_value_is_another_program(change: str) -> None:
    program = copy.deepcopy(read_program(programs.path("stock_fp32")).program)
    before = program_digest(program)
    plan = program.execution_plan[0]
    if change == "argument":
        plan.chains[0].instructions[3].instr_args.args[0] += 1
    elif change == "scalar":
        next(v.val for v in plan.values if type(v.val).__name__ == "Int").int_val += 1
    elif change == "operator":
        plan.operators[0].overload += "x"
    elif change == "shape":
        next(v.val for v in plan.values if type(v.val).__name__ == "Tensor").sizes[0] += 1
    else:
        steps = plan.chains[0].instructions
        steps[2], steps[3] = steps[3], steps[2]
    assert program_digest(program) != before


def test_numbers_of_other_types_and_infinities_are_told_apart() -> None:
    Double = type("Double", (), {})  # noqa: N806  it stands for the schema's class

    def double(number: Any) -> Any:
        value = dataclass(Double)()
        value.double_val = number
        return value

    assert program_digest(double("inf")) == program_digest(double(float("inf")))
    different = [1, 1.0, True, "1", b"1", None, [1], [[1]], double(1.0), double(-0.0), double(0.0)]
    assert len({program_digest(value) for value in different}) == len(different)


def test_a_field_that_a_later_version_adds_changes_nothing_while_it_has_its_default() -> None:
    @dataclass
    class Old:
        name: str

    @dataclass
    class New:
        name: str
        device: int = 0
        more: list[int] = field(default_factory=list)

    Old.__name__ = New.__name__ = "Record"
    assert program_digest(Old(name="a")) == program_digest(New(name="a"))
    assert program_digest(New(name="a")) != program_digest(New(name="a", device=1))


@slow
def test_weights_in_a_data_file_are_part_of_the_model(tmp_path: Path) -> None:
    path, data = programs.path("external_weights"), programs.data_path("external_weights")
    assert data is not None
    file = read_program(path)
    changed = tmp_path / "changed.ptd"
    content = bytearray(data.read_bytes())
    _, offset, _ = next(iter(read_data_file(data).entries.values()))
    content[offset] ^= 1
    changed.write_bytes(content)
    digests = {weights_digest(file, data_path=item) for item in (None, data, changed)}
    assert len(digests) == 3


@slow
def test_the_data_digest_covers_names_and_content_not_padding(tmp_path: Path) -> None:
    data = programs.data_path("external_weights")
    assert data is not None
    padded = tmp_path / "padded.ptd"
    padded.write_bytes(data.read_bytes() + b"\0" * 100)
    assert data_digest(padded) == data_digest(data)
    entries = read_data_file(data).entries
    assert "layers.0.attention.wq.weight" in entries
    layout, _, size = entries["layers.0.attention.wq.weight"]
    assert "[64, 64]" in layout
    assert size == 64 * 64 * 4
