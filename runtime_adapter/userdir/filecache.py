"""The user's cache directory, and the analyses that are remembered in it.

Everything here can be deleted at any time; it is made again when needed. Files
appear by renaming, so no process ever sees half of one, and are checked when
they are read, so a damaged one is made again.

    <directory>/analyses/<key>.json   one program's analysis, by the file's identity
    <directory>/named/                named copies of programs, see `copies`

A program is recognised by device, inode, size, mtime and ctime in nanoseconds and
a hash of its instructions; never by its name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore import layout
from runtime_adapter.pte.file import flatbuffer_digest

log = logging.getLogger("runtime_adapter")

DIRECTORY_VARIABLE = "KVSTORE_CACHE_DIR"
"""Environment variable: the directory to use instead of the platform's."""

_ENTRY_FORMAT = 1
_MAX_N_ANALYSES = 256
_MAX_ENTRY_NBYTES = 16 << 20
# A file that changed this recently could change again within one tick of its clock, unseen.
_RACY_NS = 20_000_000


def default_directory() -> Path:
    """The cache directory: ``KVSTORE_CACHE_DIR``, or the platform's place for caches."""
    if chosen := os.environ.get(DIRECTORY_VARIABLE):
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData/Local") / "kvstore" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/kvstore"
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: a relative path is to be ignored.
    if base and Path(base).is_absolute():
        return Path(base) / "kvstore"
    return Path.home() / ".cache/kvstore"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramIdentity:
    """Which files were looked at: one row of numbers each, and a hash of the instructions."""

    files: tuple[tuple[int, int, int, int, int], ...]
    instructions: str
    seen_ns: int = field(compare=False)

    @classmethod
    def of(cls, path: Path, *, data_path: Path | None = None) -> ProgramIdentity:
        """Look at the files now.

        Raises:
            OSError: one of them cannot be read.
            ProgramError: ``path`` is not a ``.pte``, or is cut off.
        """
        seen_ns = time.time_ns()
        files = [_file_identity(file) for file in (path, data_path) if file is not None]
        return cls(files=tuple(files), instructions=flatbuffer_digest(path).hex(), seen_ns=seen_ns)

    @property
    def key(self) -> str:
        """A file name for what is remembered about these files."""
        text = json.dumps([self.files, self.instructions])
        return hashlib.blake2b(text.encode("ascii"), digest_size=20).hexdigest()

    @property
    def is_settled(self) -> bool:
        """Whether a change after this look would have shown in the files' times."""
        return all(max(mtime, ctime) + _RACY_NS < self.seen_ns for *_, mtime, ctime in self.files)


class FileCache:
    """The cache directory; every method may be called by several processes at once."""

    __slots__ = ("_directory",)

    def __init__(self, directory: Path | None = None) -> None:
        """Use ``directory``, or the user's. It is made when something is written."""
        self._directory = directory if directory is not None else default_directory()

    @property
    def directory(self) -> Path:
        """Where things are kept."""
        return self._directory

    def recall(self, identity: ProgramIdentity, *, method: str) -> Mapping[str, Any] | None:
        """The analysis remembered for exactly these files, or None."""
        entry = read_entry(self._analysis_path(identity, method))
        if entry is None or entry.get("identity") != plain(identity):
            return None
        analysis = entry.get("analysis")
        return analysis if isinstance(analysis, dict) else None

    def remember(
        self, identity: ProgramIdentity, *, method: str, analysis: Mapping[str, Any]
    ) -> None:
        """Keep an analysis for next time; silently not, if the directory cannot be written."""
        if not identity.is_settled:
            return
        path = self._analysis_path(identity, method)
        try:
            make_directory(path.parent)
            write_entry(path, {"identity": plain(identity), "analysis": dict(analysis)})
            _drop_oldest_analyses(path.parent)
        except OSError as error:
            log.info("the analysis is not remembered: %s", error)

    def _analysis_path(self, identity: ProgramIdentity, method: str) -> Path:
        name = hashlib.blake2b(method.encode("utf-8"), digest_size=4).hexdigest()
        return self._directory / "analyses" / f"{identity.key}-{name}.json"


def _drop_oldest_analyses(folder: Path) -> None:
    with contextlib.suppress(OSError):
        entries = list(folder.glob("*.json"))
        if len(entries) > _MAX_N_ANALYSES:
            entries.sort(key=lambda entry: entry.stat().st_mtime_ns)
            for entry in entries[: len(entries) - _MAX_N_ANALYSES]:
                entry.unlink(missing_ok=True)


def plain(identity: ProgramIdentity) -> dict[str, Any]:
    """An identity as JSON gives it back."""
    return {
        "files": [list(file) for file in identity.files],
        "instructions": identity.instructions,
    }


def read_entry(path: Path) -> dict[str, Any] | None:
    """A JSON object that this version wrote, or None: absent, damaged or another version's."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_ENTRY_NBYTES + 1)
        entry = json.loads(text) if len(text) <= _MAX_ENTRY_NBYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.get("format") != _ENTRY_FORMAT:
        return None
    return entry if entry.get("adapter") == _adapter_hash() else None


def write_entry(path: Path, content: Mapping[str, Any]) -> None:
    """Put a JSON object at ``path`` in one step."""
    entry = {"format": _ENTRY_FORMAT, "adapter": _adapter_hash(), **content}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            json.dump(entry, file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _file_identity(path: Path) -> tuple[int, int, int, int, int]:
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.cache
def _adapter_hash() -> str:
    """A hash of the sources that analyse: what another version analysed is analysed again."""
    return sources_hash(Path(__file__).parents[1], Path(layout.__file__))


def sources_hash(package: Path, *modules: Path) -> str:
    """A hash of all Python files below ``package``, and of ``modules``."""
    digest = hashlib.blake2b(digest_size=16)
    for path in (*sorted(package.rglob("*.py")), *modules):
        name = path.relative_to(package).as_posix() if path.is_relative_to(package) else path.name
        digest.update(name.encode("utf-8") + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def make_directory(path: Path) -> None:
    """Make ``path`` and what is above it; only the user may look into it."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
