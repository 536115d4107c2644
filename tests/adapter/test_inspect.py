"""``kvstore inspect``: the table, the JSON object, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvstore.errors import NotAProgramError, UnsupportedStateError
from runtime_adapter.commands.inspect import inspect
from runtime_adapter.program.survey import analyze
from runtime_adapter.state import roles
from runtime_adapter.state.classifiers import Evidence, Verdict
from tests import programs

pytestmark = pytest.mark.adapter


def run(*arguments: object) -> Result:
    return CliRunner().invoke(inspect, [str(argument) for argument in arguments])


def test_the_table_has_a_row_a_tensor_and_says_that_it_is_servable() -> None:
    result = run(programs.path("stock_fp32"))
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    first = next(row for row in rows if row[:1] == ["(layers.0.attention.kv_cache.k_cache)"])
    assert first[1:5] == ["0", "k", "full", "float32"]
    assert "".join(first[5:9]) == "[1,512,2,16]"
    assert first[9:] == ["1", "128", "65536", "every", "token", "yes"]
    assert sum(row[-1:] == ["yes"] for row in rows) == 4


def test_the_head_says_method_limit_capacity_and_fingerprint() -> None:
    path = programs.path("stock_fp32")
    shown = run(path).stdout
    analysis = analyze(path)
    for told in ("forward", "1 to 127", "512 tokens", "512", str(analysis.fingerprint)):
        assert told in shown


def test_json_is_one_object_with_the_same_facts() -> None:
    path = programs.path("plain")
    found: dict[str, Any] = json.loads(run(path, "--json").stdout)
    analysis = analyze(path)
    assert found["servable"] is True
    assert found["problem"] is None
    assert found["fingerprint"]["model"] == str(analysis.fingerprint)
    assert found["capacity_n_tokens"] == 512
    assert found["signature"]["max_n_tokens"] == 127
    assert [tensor["name"] for tensor in found["tensors"]] == [
        tensor.name for tensor in analysis.layout.tensors
    ]
    assert {tensor["token_axis"] for tensor in found["tensors"]} == {2}


@pytest.mark.slow
def test_what_is_kept_of_each_tensor_stands_beside_it() -> None:
    lines = run(programs.path("ring")).stdout.splitlines()
    assert sum("every token" in line for line in lines) == 2
    assert sum("the last 64 tokens" in line for line in lines) == 2
    assert sum("nothing, it is derived" in line for line in lines) == 1
    found = json.loads(run(programs.path("ring"), "--json").stdout)
    assert [tensor["kind"] for tensor in found["tensors"]] == [
        *("full", "full", "window", "window", "positions")
    ]
    assert [tensor["window_n_tokens"] for tensor in found["tensors"]] == [0, 0, 64, 64, 64]


@pytest.mark.slow
def test_recurrent_state_is_counted_with_its_logits_and_not_by_the_token() -> None:
    found = json.loads(run(programs.path("lfm2"), "--json").stdout)
    state = [tensor for tensor in found["tensors"] if tensor["kind"] == "checkpoint"]
    assert {tensor["kept"] for tensor in state} == {"whole, at exact lengths"}
    assert {tensor["token_nbytes"] for tensor in state} == {None}
    assert found["checkpoint_nbytes"] == sum(tensor["nbytes"] for tensor in state) + 4 * 96


@pytest.mark.slow
def test_what_cannot_be_served_is_listed_with_its_reason_and_the_error_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def judge(evidence: Evidence, value: int) -> Verdict:
        return Verdict(reason="of no kind known")

    monkeypatch.setattr(roles, "classify", judge)
    result = run(programs.path("stock_fp32"))
    assert isinstance(result.exception, UnsupportedStateError)
    assert sum("no: of no kind known" in line for line in result.stdout.splitlines()) == 4
    found = json.loads(run(programs.path("stock_fp32"), "--json").stdout)
    assert found["servable"] is False
    assert found["problem"]["error"] == "UnsupportedStateError"
    assert found["problem"]["exit_code"] == UnsupportedStateError.exit_code


@pytest.mark.slow
def test_a_program_without_state_says_so() -> None:
    assert "no tensor outlives a call" in run(programs.path("no_cache")).stdout


@pytest.mark.slow
def test_weights_beside_the_program_are_given_with_data() -> None:
    path, data = programs.path("external_weights"), programs.data_path("external_weights")
    assert run(path, "--data", data).exit_code == 0
    assert run(path).exit_code != 0


def test_a_file_that_is_no_program_is_our_error(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_text("hello")
    assert isinstance(run(path).exception, NotAProgramError)


def test_listing_the_commands_imports_neither_torch_nor_executorch() -> None:
    code = (
        "import sys, runtime_adapter.commands.inspect, runtime_adapter.commands.annotate;"
        "sys.exit(any(name.split('.')[0] in ('torch', 'executorch') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=programs.ROOT, check=True)
