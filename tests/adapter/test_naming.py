"""The named copy of a program: complete, atomic, cheap, and the same model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.errors import CorruptProgramError, InputError, NotAProgramError
from runtime_adapter.program import naming
from runtime_adapter.program.naming import write_named_copy
from runtime_adapter.program.survey import analyze, survey
from runtime_adapter.pte.file import read_program
from tests import programs

pytestmark = pytest.mark.adapter
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        "stock_fp32",
        "plain",
        pytest.param("stock_bf16", marks=slow),
        pytest.param("one_token", marks=slow),
        pytest.param("xnnpack", marks=slow),
        pytest.param("quantized_cache", marks=slow),
        pytest.param("external_weights", marks=slow),
        pytest.param("two_methods", marks=slow),
    ],
)
def test_the_copy_is_named_and_is_the_same_model(name: str, tmp_path: Path) -> None:
    source, target, data = programs.path(name), tmp_path / "named.pte", programs.data_path(name)
    copy = write_named_copy(source, target)
    before, after = analyze(source, data_path=data), analyze(target, data_path=data)
    assert after.is_named
    assert after.fingerprint == before.fingerprint
    assert after.layout == before.layout
    assert copy.nbytes == target.stat().st_size
    assert copy.names["forward"] == tuple(tensor.name for tensor in before.layout.tensors)


def test_the_segments_are_the_original_ones_at_the_same_place_in_a_block(tmp_path: Path) -> None:
    source, target = programs.path("stock_fp32"), tmp_path / "named.pte"
    write_named_copy(source, target)
    old, new = read_program(source), read_program(target)
    old_bytes, new_bytes = source.read_bytes(), target.read_bytes()
    for (old_start, size), (new_start, new_size) in zip(old.segments, new.segments, strict=True):
        assert size == new_size
        assert old_start % 4096 == new_start % 4096
        assert old_bytes[old_start : old_start + size] == new_bytes[new_start : new_start + size]


@slow
def test_the_runtime_finds_every_tensor_under_its_name(tmp_path: Path) -> None:
    from runtime_adapter.model import Model

    target = tmp_path / "named.pte"
    write_named_copy(programs.path("stock_fp32"), target)
    with Model.open(target, cache_dir=tmp_path / "cache") as model:
        assert set(model.cache) == {tensor.name for tensor in model.layout.tensors}


@slow
def test_one_cache_of_several_methods_has_the_same_names_in_each(tmp_path: Path) -> None:
    copy = write_named_copy(programs.path("two_methods"), tmp_path / "named.pte")
    assert copy.names["forward"] == copy.names["decode"]
    assert analyze(tmp_path / "named.pte", method="decode").is_named


@slow
def test_state_that_cannot_be_served_is_named_too_and_keeps_its_initial_data(
    tmp_path: Path,
) -> None:
    source, target = programs.path("sink"), tmp_path / "named.pte"
    write_named_copy(source, target)
    before, after = survey(source), survey(target)
    assert all(item.is_own_name for item in after.state)
    assert [item.state.tensor.data_buffer for item in before.state] == [
        item.state.tensor.data_buffer for item in after.state
    ]
    assert any(item.state.tensor.data_buffer for item in after.state)


@slow
def test_names_that_the_program_has_are_kept(tmp_path: Path) -> None:
    source, target = programs.path("named"), tmp_path / "copy.pte"
    write_named_copy(source, target)
    assert analyze(target).layout == analyze(source).layout


def test_the_original_is_never_the_target(tmp_path: Path) -> None:
    source = tmp_path / "model.pte"
    source.write_bytes(programs.path("stock_fp32").read_bytes())
    before = source.read_bytes()
    linked = tmp_path / "link.pte"
    linked.symlink_to(source)
    hard = tmp_path / "hard.pte"
    os.link(source, hard)
    for target in (source, linked, hard):
        with pytest.raises(InputError, match="found the same"):
            write_named_copy(source, target, replace=True)
    assert source.read_bytes() == before


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "named.pte"
    target.write_bytes(b"mine")
    with pytest.raises(InputError, match="existing one"):
        write_named_copy(programs.path("stock_fp32"), target)
    assert target.read_bytes() == b"mine"
    write_named_copy(programs.path("stock_fp32"), target, replace=True)
    assert analyze(target).is_named


def test_a_target_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="directory"):
        write_named_copy(programs.path("stock_fp32"), tmp_path)
    with pytest.raises(InputError, match="folder"):
        write_named_copy(programs.path("stock_fp32"), tmp_path / "missing" / "named.pte")


def test_a_failed_copy_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(naming, "copy_range", fail)
    with pytest.raises(InputError, match="No space left"):
        write_named_copy(programs.path("stock_fp32"), tmp_path / "named.pte")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_copy_ranges_is_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    write_named_copy(programs.path("stock_fp32"), tmp_path / "slowly.pte")
    monkeypatch.undo()
    write_named_copy(programs.path("stock_fp32"), tmp_path / "quickly.pte")
    assert (tmp_path / "slowly.pte").read_bytes() == (tmp_path / "quickly.pte").read_bytes()


def test_the_kernel_is_asked_for_whole_blocks_only_so_that_they_can_be_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def note(source: int, target: int, count: int, start: int, place: int) -> int:
        asked.append((start, place))
        os.pwrite(target, os.pread(source, count, start), place)
        return count

    monkeypatch.setattr(os, "copy_file_range", note, raising=False)
    write_named_copy(programs.path("stock_fp32"), tmp_path / "named.pte")
    assert asked
    assert [place % 4096 for places in asked for place in places] == [0] * 2 * len(asked)


def test_a_bad_original_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pte"
    bad.write_bytes(programs.path("stock_fp32").read_bytes()[:-5000])
    with pytest.raises(CorruptProgramError):
        write_named_copy(bad, tmp_path / "named.pte")
    with pytest.raises(NotAProgramError):
        write_named_copy(tmp_path / "missing.pte", tmp_path / "named.pte")
    assert list(tmp_path.iterdir()) == [bad]


_ANNOTATE_AND_TELL_MEMORY = """
import resource, sys
from runtime_adapter.program import naming
if sys.argv[3] == "plain loop":
    import os
    del os.copy_file_range
naming.write_named_copy(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("way", ["in the kernel", "plain loop"])
def test_two_gigabytes_of_weights_are_annotated_in_bounded_memory(tmp_path: Path, way: str) -> None:
    source = tmp_path / "large.pte"
    nbytes = 2 << 30 if way == "in the kernel" else 512 << 20
    _inflate(programs.path("stock_fp32"), source, nbytes)

    def annotate(original: Path) -> int:
        target = tmp_path / "named.pte"
        target.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", _ANNOTATE_AND_TELL_MEMORY, original, target, way],
            cwd=programs.ROOT,
            capture_output=True,
            check=True,
        )
        return int(done.stdout)

    small, large = annotate(programs.path("stock_fp32")), annotate(source)
    assert (tmp_path / "named.pte").stat().st_size > nbytes
    assert large - small < 32 << 10


def _inflate(source: Path, target: Path, nbytes: int) -> None:
    """A copy with one more, sparse segment of ``nbytes``: valid, large, and cheap on disk."""
    from executorch.exir.schema import DataSegment

    from runtime_adapter.pte.exir import build_flatbuffer

    file = read_program(source)
    content = source.read_bytes()[file.header.segment_base :]
    start = -(-len(content) // 128) * 128
    file.program.segments.append(DataSegment(offset=start, size=nbytes))
    data, alignment = build_flatbuffer(file.program)
    header_nbytes = -(-32 // alignment) * alignment
    size = len(data) + header_nbytes
    base = -(-size // 128) * 128
    numbers = b"".join(n.to_bytes(8, "little") for n in (size, base, start + nbytes))
    header = (b"eh00" + (32).to_bytes(4, "little") + numbers).ljust(header_nbytes, b"\0")
    root = int.from_bytes(data[:4], "little") + header_nbytes
    with target.open("wb") as stream:
        stream.write(root.to_bytes(4, "little") + data[4:8] + header + data[8:])
        stream.seek(base)
        stream.write(content)
        stream.truncate(base + start + nbytes)
