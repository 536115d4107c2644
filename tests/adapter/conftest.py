"""What the adapter's tests share: a cache directory of their own, and fresh processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

if os.environ.get("CI") and importlib.util.find_spec("executorch") is None:
    # Without it these tests would all be skipped, and nobody would notice.
    raise pytest.UsageError("tests/adapter: CI runs them with executorch, found none installed")


@pytest.fixture(scope="session")
def model_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache directory for all processes of a test run: each program is tried out once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "model-cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def _own_cache_dir(model_cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's cache directory out of the tests, also of processes they start."""
    monkeypatch.setenv("KVSTORE_CACHE_DIR", str(model_cache_dir))
    monkeypatch.delenv("KVSTORE_CACHE_MAX_BYTES", raising=False)


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python source in a fresh process; its arguments are ``sys.argv[1:]``."""

    def run(source: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", source, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=300,
        )

    return run
