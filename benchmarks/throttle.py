"""A simulated slow disk: ``throttle.c``, compiled and preloaded into a process of its own.

What is simulated: files lie in the page cache, and every read (SQLite's, the C library's,
llama.cpp's, Python's) ends no sooner than a disk of the given rate would have delivered its bytes,
with a readahead of 512 KiB. What is not: seeks, queues, and what a busy disk does to a processor.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import CACHE

READAHEAD_NBYTES = 512 * 1024
_SOURCE = Path(__file__).with_name("throttle.c")


def unavailable() -> str | None:
    """Why there is none here, or None."""
    if not sys.platform.startswith("linux"):
        return "the throttled disk needs Linux (LD_PRELOAD)"
    if shutil.which("cc") is None:
        return "the throttled disk needs a C compiler (cc)"
    return None


def is_loaded() -> bool:
    """Whether this process runs on the throttled disk."""
    return hasattr(ctypes.CDLL(None), "throttle_set")


def restart() -> None:
    """Start this script again, with the disk preloaded; does not return."""
    library = CACHE / "throttle.so"
    if not library.exists() or library.stat().st_mtime < _SOURCE.stat().st_mtime:
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", partial, _SOURCE, "-ldl", "-lpthread"]
        subprocess.run(command, check=True)
        partial.replace(library)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


@contextmanager
def disk(rate: float | None) -> Iterator[None]:
    """Reads are served at ``rate`` bytes a second while the context lasts; None: unlimited."""
    library = ctypes.CDLL(None)
    library.throttle_set.argtypes = [ctypes.c_double, ctypes.c_double]
    library.throttle_set(rate or 0.0, float(READAHEAD_NBYTES))
    try:
        yield
    finally:
        library.throttle_set(0.0, 0.0)


def counted_nbytes() -> int:
    """Bytes that were charged since the disk was set."""
    counted = ctypes.CDLL(None).throttle_counted
    counted.restype = ctypes.c_ulonglong
    return int(counted())
