"""Keep the runtime's own log lines away from people, and keep them for error messages.

ExecuTorch writes its log to stderr from C++. Loading a program on an ordinary
machine prints lines such as ``[cpuinfo_utils.cpp:125] CPU info and manual query
on # of cpus dont match.``, and a missing operator prints pages. There is no
switch for it; redirecting the descriptor is the only way to catch them.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_LOCK = threading.RLock()

_RUNTIME_LINE = re.compile(
    r"\[\w+\.(?:cpp|cc|c|h|hpp):\d+\]"  # [method.cpp:822] Missing operator: ...
    r"|[DIEF] [\d:.]+ executorch:"  # E 00:00:00.000000 executorch:method.cpp:822] ...
    r"|(?:Error|Warning|Note|Info|Debug) (?:in|\()[\w ]*cpuinfo"
)


class CapturedLog:
    """What the runtime logged inside one ``captured_stderr`` block; filled when it ends."""

    __slots__ = ("text",)

    def __init__(self) -> None:
        self.text = ""

    @property
    def tail(self) -> str:
        """What went wrong: the log's last telling lines, joined, at most 400 characters."""
        lines = [re.sub(_RUNTIME_LINE, "", line).strip() for line in self.text.splitlines()]
        told = [line for line in lines if line and "type id" not in line and "CPU info" not in line]
        return "; ".join(told[-3:])[-400:]


@contextlib.contextmanager
def captured_stderr() -> Iterator[CapturedLog]:
    """Catch what is written to stderr while the block runs.

    Both ways are caught: file descriptor 2, and ``sys.stderr``, to which some of the binding's
    calls send the log (in a notebook or under pytest the two differ). Lines in
    the runtime's log format are kept in the yielded object; every other line (another
    thread's, another library's) is written on to ``sys.stderr`` when the block ends. Stderr
    belongs to the whole process, so blocks exclude each other across threads, and a child
    process started by another thread meanwhile inherits the capture: keep blocks short.
    """
    log = CapturedLog()
    with _LOCK, contextlib.ExitStack() as stack:
        try:
            saved = os.dup(2)
            stack.callback(os.close, saved)
            capture = stack.enter_context(tempfile.TemporaryFile(buffering=0))
        except OSError:  # a daemon without stderr, or no folder to write in: nothing is caught
            with written_somewhere():
                yield log
            return
        python_stderr = stack.enter_context(
            # A duplicate shares the file's offset, so that neither overwrites the other.
            os.fdopen(os.dup(capture.fileno()), "w", encoding="utf-8", errors="backslashreplace")
        )
        _flush(sys.stderr)
        os.dup2(capture.fileno(), 2)
        try:
            with contextlib.redirect_stderr(python_stderr):
                yield log
        finally:
            _flush(python_stderr)
            os.dup2(saved, 2)
            capture.seek(0)
            others = _split(log, capture.read().decode("utf-8", "replace"))
            if others:
                _pass_on(others)


@contextlib.contextmanager
def written_somewhere() -> Iterator[None]:
    """Give ``sys.stderr`` a place while the block runs, where the process has none.

    The binding writes its log there and fails if it is None (a daemon, pythonw).
    """
    if sys.stderr is not None:
        yield
        return
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _split(log: CapturedLog, text: str) -> str:
    """Put the runtime's lines of ``text`` into ``log`` and return the others."""
    mine: list[str] = []
    others: list[str] = []
    for line in text.splitlines(keepends=True):
        (mine if _RUNTIME_LINE.match(line) or not line.strip() else others).append(line)
    log.text = "".join(mine)
    return "".join(others)


def _flush(stream: TextIO | None) -> None:
    # sys.stderr may be None (pythonw) or already closed by the application.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if stream is not None:
            stream.flush()


def _pass_on(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()
