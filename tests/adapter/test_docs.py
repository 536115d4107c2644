"""What the documentation says to paste, pasted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("executorch")

from tests.programs import ROOT

pytestmark = [pytest.mark.adapter, pytest.mark.slow, pytest.mark.checkout]


def first_example(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)


def pasted(example, folder):
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    shutil.copy(ROOT / "runtime_adapter" / "demo" / "tiny-llama.pte", tmp_path / "llama.pte")
    return tmp_path


def test_the_readmes_example_restores_at_its_second_run(folder):
    example = first_example("README.md")
    assert example.count("\n") <= 18
    assert pasted(example, folder).startswith("0 restored of 24 no_match")
    assert pasted(example, folder).startswith("23 restored of 24")


def test_the_sessions_example_runs_again_and_again(folder):
    example = first_example("docs/session.md")
    assert len(pasted(example, folder)) > 20
    assert len(pasted(example, folder)) > 20
