"""What the store's tests share: a path, stores that are verified at the end, fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import zstandard

import kvstore

# No deadline: the machines that run the tests are shared. HYPOTHESIS_PROFILE=thorough digs deeper.
# In CI the examples are the same every time: red means the change, not luck. Elsewhere they vary.
hypothesis.settings.register_profile(
    "fast", deadline=None, max_examples=20, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """Where a test's store goes; there is no file yet."""
    return tmp_path / "sessions.db"


@pytest.fixture
def older_path(store_path: Path) -> Path:
    """A closed file of format version 1, with a session ``turns`` of 100 tokens in chunks of 32."""
    golden = ROOT / "tests" / "golden" / "v1.db.zst"
    store_path.write_bytes(zstandard.ZstdDecompressor().decompress(golden.read_bytes()))
    return store_path


@pytest.fixture
def open_store(store_path: Path) -> Iterator[Callable[..., kvstore.Store]]:
    """Open stores at ``store_path``; when the test ends they are closed and the file verified.

    A test that damages the file on purpose opens it by ``kvstore.open`` instead.
    """
    opened: list[kvstore.Store] = []

    def open_one(path: Path = store_path, **options: Any) -> kvstore.Store:
        store = kvstore.open(path, **options)
        opened.append(store)
        return store

    yield open_one
    paths = {store.path for store in opened}
    for store in opened:
        store.close()
    for path in paths:
        with kvstore.open(path, read_only=True) as store:
            assert store.verify().problems == ()


@pytest.fixture
def store(open_store: Callable[..., kvstore.Store]) -> kvstore.Store:
    """A store with chunks of 8 tokens, so that small sessions have several."""
    return open_store(chunk_n_tokens=8)


def start_python(source: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python source in a fresh process; its arguments are ``sys.argv[1:]``."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", source, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def run_source() -> Callable[..., str]:
    """Run Python source in a fresh process and return what it printed; it must succeed."""

    def run(source: str, *arguments: object) -> str:
        process = start_python(source, *arguments)
        try:
            output, errors = process.communicate(timeout=120)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 0, errors
        return output

    return run
