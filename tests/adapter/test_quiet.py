from __future__ import annotations

import io
import os
import sys
import threading

import pytest

from runtime_adapter.runtime.quiet import captured_stderr, written_somewhere

RUNTIME_LINE = b"[method.cpp:822] Missing operator: [11] llama::update_cache.out\n"


def test_lines_of_the_runtime_are_kept_and_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_stderr() as log:
        os.write(2, RUNTIME_LINE)
    assert "llama::update_cache.out" in log.text
    assert capfd.readouterr().err == ""


def test_lines_of_others_are_shown_when_the_block_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_stderr() as log:
        os.write(2, b"an application's warning\n" + RUNTIME_LINE)
    assert capfd.readouterr().err == "an application's warning\n"
    assert "application" not in log.text


def test_what_python_writes_is_caught_and_sorted_too(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_stderr() as log:
        print(RUNTIME_LINE.decode(), end="", file=sys.stderr)
        print("an application's warning", file=sys.stderr)
    assert capfd.readouterr().err == "an application's warning\n"
    assert "llama::update_cache.out" in log.text


def test_blocks_can_be_nested(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_stderr() as outer:
        with captured_stderr() as inner:
            os.write(2, b"[a.cpp:1] inside\nother\n")
        os.write(2, b"[a.cpp:1] outside\n")
    assert (inner.text, outer.text) == ("[a.cpp:1] inside\n", "[a.cpp:1] outside\n")
    assert capfd.readouterr().err == "other\n"


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_a_process_without_stderr_does_no_harm(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None
) -> None:
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    with captured_stderr():
        os.write(2, b"lost\n")


def test_stderr_is_whole_again_after_an_exception(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), captured_stderr():
        raise KeyError
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_blocks_of_several_threads_do_not_mix(capfd: pytest.CaptureFixture[str]) -> None:
    found: dict[int, str] = {}

    def work(number: int) -> None:
        for _ in range(20):
            with captured_stderr() as log:
                os.write(2, b"[a.cpp:1] thread %d\n" % number)
            found[number] = found.get(number, "") + log.text

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: f"[a.cpp:1] thread {number}\n" * 20 for number in range(4)}
    assert capfd.readouterr().err == ""


def test_a_process_without_stderr_gets_a_place_to_write_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with written_somewhere():
        assert sys.stderr.write("[a.cpp:1] a line\n")
    assert sys.stderr is None


def test_the_tail_says_what_went_wrong() -> None:
    with captured_stderr() as log:
        os.write(2, b"[a.cpp:1] first\n[b.cpp:2] arg 0 with type id 1\n[c.cpp:3] last\n")
    assert log.tail == "first; last"


def test_importing_the_adapter_imports_nothing_that_only_new_programs_need(run_source):
    """A program that was opened before is not analysed again: a restarted app starts at once."""
    output = run_source("import sys, runtime_adapter\nprint(*sys.modules)")
    rooms = ("runtime_adapter.state", "runtime_adapter.program.survey", "torch", "executorch")
    assert [name for name in output.split() if name.startswith(rooms)] == []
