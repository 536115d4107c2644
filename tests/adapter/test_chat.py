"""The terminal chat of the examples, used through a real terminal."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("torch")
pytest.importorskip("executorch")
pty = pytest.importorskip("pty")

import kvstore  # noqa: E402  after the check that they are there
from tests.programs import ROOT  # noqa: E402

pytestmark = [pytest.mark.adapter, pytest.mark.slow, pytest.mark.checkout]

PATIENCE_SECONDS = 60
IN_ITS_OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


_opened = []


@pytest.fixture(autouse=True)
def no_terminal_is_left():
    yield
    while _opened:
        _opened.pop().kill()


class Terminal:
    """A chat in a terminal of its own: type, and wait for what it prints."""

    def __init__(self, db, *options):
        self._main, other = pty.openpty()
        command = ["examples/chat.py", "--db", str(db), *options]
        self._process = subprocess.Popen(
            [sys.executable, "-c", IN_ITS_OWN_TERMINAL, *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
        )
        os.close(other)
        self._screen = ""
        _opened.append(self)
        self.wait_for("> $")

    def wait_for(self, pattern, seconds=PATIENCE_SECONDS):
        """What was printed up to ``pattern``, at the end of the screen."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self._screen):
            if time.monotonic() >= deadline:
                raise TimeoutError(self._screen)
            if select.select([self._main], [], [], 1)[0]:
                self._screen += os.read(self._main, 4096).decode(errors="replace")
        shown, self._screen = self._screen.replace("\r\n", "\n"), ""
        return shown

    def type(self, line, until="\n> $"):
        os.write(self._main, line.encode() + b"\n")
        shown = self.wait_for(until)
        return shown.removeprefix(line).removeprefix("\n").removesuffix("> ")

    def interrupt(self):
        """Press Ctrl-C until there is a prompt: one that comes between readline's own steps is
        seen with the next key only."""
        for _ in range(PATIENCE_SECONDS // 3):
            os.write(self._main, b"\x03")
            with contextlib.suppress(TimeoutError):
                return self.wait_for("> $", seconds=3)
        raise TimeoutError(self._screen)

    def text(self):
        return self.type("/text")

    def end(self, how=b"/quit\n"):
        os.write(self._main, how)
        try:
            with contextlib.suppress(OSError):  # the terminal goes with the process
                while os.read(self._main, 4096):
                    pass
            assert self._process.wait(PATIENCE_SECONDS) == 0
        finally:
            self.kill()

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(OSError):
            os.close(self._main)


@pytest.fixture
def db(tmp_path):
    yield tmp_path / "chat.db"
    with kvstore.open(tmp_path / "chat.db") as store:
        assert store.verify().ok


def test_a_chat_is_edited_forked_and_gone_on_with_tomorrow(db):
    chat = Terminal(db, "--max-new-tokens", "20")
    first = chat.type("import os")
    told = chat.text()
    assert told.startswith("import os\n")
    assert told.strip().endswith(first.strip())
    again = chat.type("/regenerate")
    assert again != first
    chat.type("def open(self):")
    both = chat.text()
    assert "[31 tokens" in chat.type("/rewind")
    assert chat.text() != both
    chat.type("/edit import sys")
    assert "import os" not in chat.text()
    assert "[b: 32 tokens]" in chat.type("/fork b")
    chat.type("class B:")
    forked = chat.text()
    assert "class B:" in forked
    assert "[chat: 32 tokens]" in chat.type("/switch chat")
    assert "class B:" not in chat.text()
    assert "expected a new name" in chat.type("/fork b")
    assert "[saved 31 tokens" in chat.type("/save")
    chat.type("x = 1")
    kept = chat.text()
    assert "tokens]" in chat.type("/load")
    assert "/regenerate" in chat.type("/help")
    assert "b: " in chat.type("/list")
    assert "invalid literal" in chat.type("/rewind all")
    chat.type("/switch b")
    assert chat.text() == forked
    chat.end()

    tomorrow = Terminal(db, "--max-new-tokens", "20", "--name", "b")
    assert tomorrow.text() == forked
    tomorrow.type("/regenerate")
    assert "class B:" in tomorrow.text()
    tomorrow.end(b"\x04")
    assert kept


def test_control_c_stops_the_answer_and_keeps_what_was_said(db):
    chat = Terminal(db, "--max-new-tokens", "3000", "--temperature", "1.0")
    os.write(chat._main, b"import os\n")
    chat.wait_for("import os\r?\n.{5}")
    chat.interrupt()
    said = chat.text()
    assert said.startswith("import os\n")
    assert len(said) < 3000
    chat.interrupt()
    chat.end()
    again = Terminal(db)
    assert again.text() == said
    again.end()


def test_a_chat_that_is_killed_has_lost_little(db):
    chat = Terminal(db, "--max-new-tokens", "700")
    os.write(chat._main, b"import os\n")
    chat.wait_for("(?s)import os\r?\n.{600}")
    chat.kill()
    again = Terminal(db)
    assert again.text().startswith("import os\n")
    assert len(again.text()) > 256
    again.end()
