"""Named copies of programs in the user's cache directory: made once, shared, size-capped.

    named/<key>.pte       the copy, by the program's fingerprint
    named/<key>.json      what the copy must look like; its mtime is the last use
    named/<key>.lock      held shared while a copy is opened, alone while it changes

A copy whose file is not exactly the one that was put there is made again.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from kvstore.errors import InputError, ProgramError
from runtime_adapter.userdir.filecache import (
    DIRECTORY_VARIABLE,
    ProgramIdentity,
    make_directory,
    plain,
    read_entry,
    write_entry,
)

log = logging.getLogger("runtime_adapter")

MAX_BYTES_VARIABLE = "KVSTORE_CACHE_MAX_BYTES"
"""Environment variable: most bytes that named copies may take together."""

DEFAULT_MAX_NBYTES = 8 << 30

_MIN_AGE_OF_LITTER_S = 24 * 3600


def max_nbytes() -> int:
    """Most bytes that named copies may take together: the variable's value, or 8 GiB.

    Raises:
        InputError: ``KVSTORE_CACHE_MAX_BYTES`` is not a whole number of at least 0.
    """
    text = os.environ.get(MAX_BYTES_VARIABLE)
    if not text:
        return DEFAULT_MAX_NBYTES
    if not text.isascii() or not text.isdigit():
        raise InputError(
            f"{MAX_BYTES_VARIABLE}: expected a number of bytes such as {DEFAULT_MAX_NBYTES}, "
            f"found {text!r}"
        )
    return int(text)


@contextlib.contextmanager
def named_copy(directory: Path, key: str, *, write: Callable[[Path], None]) -> Iterator[Path]:
    """The named copy ``key`` below ``directory``, which nobody evicts while the block runs.

    ``key`` says which program it is (its fingerprint). ``write(path)`` makes the copy, at a
    path that does not exist yet, if there is none or it is not as it was left. Then
    the least recently used copies go until all together fit the cap; this one
    stays even if it alone is larger. Where the directory cannot be written, the copy goes to
    a private temporary directory that is removed when the process ends.

    Raises:
        InputError: ``KVSTORE_CACHE_MAX_BYTES`` is not a number.
        ProgramError: there is no room or no place for the copy.
    """
    cap_nbytes = max_nbytes()
    folder = _writable_folder(directory / "named")
    path = folder / f"{key}.pte"
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(_Lock(folder / f"{key}.lock"))
            lock.shared()
            if not _is_as_left(path):
                lock.exclusive()
                if not _is_as_left(path):  # nobody made it while we waited
                    _make_copy(path, write=write)
                    log.info("wrote the named copy %s", path)
                    evict_copies(folder, cap_nbytes=cap_nbytes, keep=key)
            with contextlib.suppress(OSError):
                os.utime(_entry_of(path))
        except (OSError, InputError) as error:  # InputError: what `write` says of its target
            raise ProgramError(
                f"{path}: the named copy cannot be written: "
                f"{getattr(error, 'strerror', None) or error}. "
                f"Make room, or pass named_copy= or set {DIRECTORY_VARIABLE} to another place"
            ) from error
        yield path


def evict_copies(folder: Path, *, cap_nbytes: int, keep: str) -> None:
    """Remove the least recently used copies until all fit ``cap_nbytes``; never ``keep``.

    A copy that another process has open for loading is passed over.
    """
    copies = []
    total_nbytes = 0
    for path in folder.glob("*.pte"):
        with contextlib.suppress(OSError):  # gone meanwhile
            nbytes = path.stat().st_size
            total_nbytes += nbytes
            entry = _entry_of(path)
            used = entry.stat().st_mtime_ns if entry.exists() else 0
            copies.append((used, nbytes, path))
    for _, nbytes, path in sorted(copies):
        if total_nbytes <= cap_nbytes:
            break
        if path.stem == keep:
            continue
        with contextlib.suppress(OSError), _Lock(folder / f"{path.stem}.lock") as lock:
            if lock.try_exclusive():
                # The entry goes first: a copy without one is not trusted.
                _entry_of(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                total_nbytes -= nbytes
                log.info("evicted the named copy %s", path)
    _drop_litter(folder)


def _drop_litter(folder: Path) -> None:
    """Remove temporary files that a killed process left behind."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            is_ours = path.suffix in (".pte", ".json", ".lock") and ".tmp" not in path.name
            if not is_ours and time.time() - path.stat().st_mtime > _MIN_AGE_OF_LITTER_S:
                path.unlink(missing_ok=True)


def _make_copy(path: Path, *, write: Callable[[Path], None]) -> None:
    _entry_of(path).unlink(missing_ok=True)
    # Not *.pte, so that eviction in another process takes it for none of the copies.
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    write_entry(_entry_of(path), {"copy": plain(ProgramIdentity.of(path))})


def _is_as_left(path: Path) -> bool:
    """Whether the copy is the file that was put there, untouched since."""
    entry = read_entry(_entry_of(path))
    if entry is None:
        return False
    try:
        return bool(entry.get("copy") == plain(ProgramIdentity.of(path)))
    except (OSError, ProgramError):
        return False


def _entry_of(copy: Path) -> Path:
    return copy.with_suffix(".json")


def _writable_folder(folder: Path) -> Path:
    """``folder``, made if needed, or a private one where it cannot be written."""
    try:
        make_directory(folder)
        with tempfile.TemporaryFile(dir=folder):
            return folder  # a directory that exists may still not be writable
    except OSError as error:
        private = _private_directory()
        log.warning(
            "%s cannot be written (%s); the named copy goes to %s and is removed at exit. "
            "Set %s, or pass named_copy=, to keep it",
            folder,
            error.strerror,
            private,
            DIRECTORY_VARIABLE,
        )
        return private


@functools.cache
def _private_directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix="kvstore-"))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not when a forked child ends
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    return path


class _Lock:
    """An advisory lock between processes on one file; not there on Windows, where it does nothing.

    Without it two processes may both write a copy (the last rename wins, both copies
    are whole) and one may evict what another is about to open (which then fails to load).
    """

    __slots__ = ("_descriptor", "_path")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def __enter__(self) -> Self:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def shared(self) -> None:
        """Wait until nobody holds it alone, and hold it with others."""
        self._lock("LOCK_SH")

    def exclusive(self) -> None:
        """Wait until nobody else holds it, and hold it alone."""
        self._lock("LOCK_EX")

    def try_exclusive(self) -> bool:
        """Hold it alone, if nobody else holds it now."""
        try:
            self._lock("LOCK_EX", "LOCK_NB")
        except BlockingIOError:
            return False
        return True

    def _lock(self, *flags: str) -> None:
        try:
            import fcntl
        except ModuleNotFoundError:
            return
        bits = 0
        for flag in flags:
            bits |= getattr(fcntl, flag)
        fcntl.flock(self._descriptor, bits)
