from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvstore.errors import CapacityError, NotAProgramError, ProgramError, TokensError
from runtime_adapter.commands import demo as module
from runtime_adapter.commands.demo import builtin_prompt, demo
from runtime_adapter.commands.prompt_ids import read_prompt_ids

pytestmark = pytest.mark.adapter

FACTS = {
    "capacity_n_tokens": 64,
    "vocab_size": 100,
    "token_nbytes": 32,
    "fingerprint": "00" * 32,
    "named_copy": None,
}
FIRST = {
    "generated": [11, 12, 13, 14],
    "n_saved_tokens": 4,
    "raw_nbytes": 128,
    "stored_nbytes": 100,
    "save_s": 0.1,
    "digest": "aa",
    "file_nbytes": 4096,
    "first_token_s": 1.0,
    "first_token_from_start_s": 3.0,
}
SECOND = {
    "generated": [13, 14],
    "n_restored_tokens": 4,
    "reason": None,
    "detail": "",
    "digest": "aa",
    "load_s": 0.01,
    "first_token_s": 0.1,
    "first_token_from_start_s": 2.0,
}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(demo, [str(argument) for argument in arguments])


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.json"
    path.write_text("[1, 2, 3]")
    return path


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What the processes answer; they are not started."""
    found = {"warm_up": dict(FACTS), "first": dict(FIRST), "second": dict(SECOND)}
    monkeypatch.setattr(module, "_process", lambda request: found[request["step"]])
    return found


@pytest.mark.slow
def test_the_built_in_demo_restores_and_goes_on_the_same(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    db = tmp_path / "sessions.db"
    result = invoke("--json", "--db", db, "--n-generate", 16)
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["problem"] is None
    assert (found["is_same_text"], found["is_same_bytes"]) == (True, True)
    assert found["n_prompt_tokens"] == 1500
    assert found["cold"]["n_computed_tokens"] == 1500
    assert found["restored"] | {"first_token_s": 0, "first_token_from_start_s": 0} == {
        "n_computed_tokens": 1,
        "n_restored_tokens": 1507,
        "first_token_s": 0,
        "first_token_from_start_s": 0,
    }
    assert found["restored"]["first_token_s"] < found["cold"]["first_token_s"]
    assert found["continued"] == found["generated"][8:]
    with sqlite3.connect(db) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


@pytest.mark.slow
def test_a_program_of_ones_own_is_shown_and_a_second_run_in_the_same_file_too(
    tmp_path: Path,
) -> None:
    pytest.importorskip("executorch")
    from tests import programs

    ids = tmp_path / "ids.txt"
    ids.write_text(" ".join(str(number % 96) for number in range(300)))
    arguments = ("--model", programs.path("plain"), "--prompt-ids", ids, "--db", tmp_path / "s.db")
    for _ in range(2):
        result = invoke(*arguments)
        assert (result.exit_code, result.stderr) == (0, "")
        assert "same: process 2 wrote the 48 tokens" in result.stdout
        assert f"store: {tmp_path / 's.db'}" in result.stdout


def test_the_report_stands_side_by_side(answers: dict[str, dict[str, Any]], ids: Path) -> None:
    result = invoke("--model", "m.pte", "--prompt-ids", ids, "--n-generate", 4)
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[:5] == [
        "cold restored",
        "time to first token, model open 1.00 s 100 ms 10.0 times faster",
        "time to first token, process start 3.00 s 2.00 s 1.5 times faster",
        "tokens computed for it 3 1",
        "tokens restored 0 4",
    ]
    assert "4,096 bytes for 4 tokens" in result.stdout
    assert "store:" not in result.stdout  # it was temporary, and is gone


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"generated": [13, 15]}, "token 1 of the continuation: process 1 wrote 14, .* wrote 15"),
        ({"generated": [13]}, "process 1 wrote 2 tokens, process 2 wrote 1"),
        ({"digest": "bb"}, "not byte for byte"),
        (
            {"n_restored_tokens": 2, "reason": "corrupt", "detail": "chunk 1"},
            "2 of 4 saved tokens were restored .corrupt: chunk 1",
        ),
        ({"n_restored_tokens": 0}, "no reason given"),
    ],
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_anything_that_differs_ends_with_1_and_says_what(
    answers: dict[str, dict[str, Any]], ids: Path, change: dict[str, Any], told: str, form: str
) -> None:
    answers["second"].update(change)
    options = ["--json"] if form == "json" else []
    result = invoke("--model", "m.pte", "--prompt-ids", ids, "--n-generate", 4, *options)
    assert result.exit_code == 1
    found = json.loads(result.stdout)["problem"] if form == "json" else result.stdout
    assert re.search(told, found)


def test_a_kept_store_is_named(answers: dict[str, dict[str, Any]], ids: Path) -> None:
    result = invoke("--model", "m.pte", "--prompt-ids", ids, "--n-generate", 4, "--keep")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("store: ")]
    folder = Path(line.removeprefix("store: ")).parent
    assert folder.is_dir()
    folder.rmdir()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "m.pte"),
        ("--prompt-ids", "ids.json"),
        ("--data", "x.ptd"),
        ("--n-generate", "1"),
        ("--n-generate", "many"),
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_a_prompt_that_does_not_fit_is_refused(
    answers: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "ids"
    path.write_text("1 " * 61)
    result = invoke("--model", "m.pte", "--prompt-ids", path, "--n-generate", 4)
    assert isinstance(result.exception, CapacityError)
    assert "room for 64 tokens: 61 of prompt and 4 to generate" in str(result.exception)


def test_a_prompt_of_another_vocabulary_is_refused(
    answers: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "ids"
    path.write_text("[1, 100]")
    result = invoke("--model", "m.pte", "--prompt-ids", path, "--n-generate", 4)
    assert isinstance(result.exception, TokensError)
    assert "found 100 at index 1" in str(result.exception)


def test_an_error_in_a_process_is_raised_as_it_was(ids: Path, tmp_path: Path) -> None:
    result = invoke("--model", tmp_path / "none.pte", "--prompt-ids", ids)
    assert isinstance(result.exception, NotAProgramError)


def test_a_process_that_dies_is_an_error_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, ids: Path
) -> None:
    monkeypatch.setattr(module, "_BOOT", "raise SystemExit('last words')")
    result = invoke("--model", "m.pte", "--prompt-ids", ids)
    assert isinstance(result.exception, ProgramError)
    assert "last words" in str(result.exception)


@pytest.mark.parametrize(
    "text", ["[1, 2, 3]", "1 2 3", "1,2,3", "1\n2\n3\n", " 1, 2,\t3 ", "\ufeff[1,2,3]"]
)
def test_prompt_ids_come_in_several_forms(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ids"
    path.write_text(text, encoding="utf-8")
    assert read_prompt_ids(path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "found no token ids"),
        (b"[]", "found no token ids"),
        (b"one two", "something else"),
        (b"1 2.5", "something else"),
        (b"[1, 2", "something else"),
        (b"[" * 100_000, "something else"),
        (b"\xff\xfe\x00", "something else"),
        (b'{"ids": [1]}', "a JSON dict"),
        (b"[1, -2]", "found -2 at index 1"),
        (b"-1", "found -1 at index 0"),
        (b"[1, true]", "found True at index 1"),
        (b"[1, 2.0]", "found 2.0 at index 1"),
        (b"[[1]]", r"found \[1\] at index 0"),
        ("\u0661".encode(), "at index 0"),
    ],
)
def test_other_prompt_ids_are_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "ids"
    path.write_bytes(content)
    with pytest.raises(TokensError, match=told):
        read_prompt_ids(path)


def test_a_missing_file_of_prompt_ids_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(TokensError, match="check the path"):
            read_prompt_ids(path)


def test_the_built_in_prompt_begins_as_the_model_was_trained() -> None:
    prompt = builtin_prompt()
    assert len(prompt) == 1500
    assert prompt[0] == 256
    assert all(token < 256 for token in prompt[1:])
