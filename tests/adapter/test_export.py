"""The one-line export configuration."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvstore.errors import InputError
from runtime_adapter.export import kv_cache_config
from runtime_adapter.program.survey import analyze
from runtime_adapter.pte.file import read_program
from runtime_adapter.pte.instructions import read_method
from tests import programs

pytestmark = pytest.mark.adapter


@pytest.mark.slow
def test_an_export_with_it_needs_no_named_copy_and_has_its_cache_in_an_arena_of_its_own() -> None:
    path = programs.path("named")
    analysis = analyze(path)
    assert analysis.is_named
    graph = read_method(read_program(path).program.execution_plan[0], source=str(path))
    names = {tensor.name for tensor in analysis.layout.tensors}
    for tensor in graph.tensors.values():
        assert (tensor.memory_id == 2) == (tensor.name in names)


def test_overrides_win() -> None:
    config = kv_cache_config(emit_mutable_buffer_names=False, segment_alignment=4096)
    assert config.emit_mutable_buffer_names is False
    assert config.segment_alignment == 4096
    assert config.memory_planning_pass.share_mutable_buffers is True


def test_an_unknown_override_is_named() -> None:
    with pytest.raises(InputError, match="emit_names"):
        kv_cache_config(emit_names=True)


def test_importing_it_imports_no_exporter() -> None:
    code = "import sys, runtime_adapter.export; sys.exit('executorch.exir' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=programs.ROOT, check=True)
