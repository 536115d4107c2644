"""Large files copied by range, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BLOCK_NBYTES = 4096
"""What file systems share: ranges that keep their place within a block can be reflinked."""

_COPY_NBYTES = 1 << 20
_KERNEL_NBYTES = 1 << 30


@contextlib.contextmanager
def replacing(target: Path, *, replace: bool) -> Iterator[BinaryIO]:
    """A temporary file beside ``target`` that becomes ``target`` when the block ends well."""
    descriptor, name = tempfile.mkstemp(
        prefix=f".{target.name[:100]}.", suffix=".tmp", dir=target.parent
    )
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp files are private; a program is shared like any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        if replace:
            temporary.replace(target)
        else:
            # A link does not overwrite what another process put there meanwhile.
            try:
                os.link(temporary, target)
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                temporary.replace(target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every platform opens folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def copy_range(source: BinaryIO, target: BinaryIO, *, start: int, n_bytes: int) -> None:
    """Append ``n_bytes`` from byte ``start`` of ``source`` on, in the kernel where it can.

    The file system shares the blocks (reflink) if it can and both places lie equally far
    from the start of a block.

    Raises:
        OSError: ``source`` ends early, or ``target`` cannot be written.
    """
    target.flush()
    place = target.seek(0, os.SEEK_END)
    # Only whole blocks are shared: Linux's generic_remap_checks asks for it.
    n_before = min(-start % BLOCK_NBYTES, n_bytes)
    _copy_bytes(source, target, start=start, n_bytes=n_before)
    target.flush()
    done = n_before
    if hasattr(os, "copy_file_range"):
        # EXDEV, ENOSYS, EINVAL, EOPNOTSUPP: these two files cannot; the loop below can.
        with contextlib.suppress(OSError):
            while done < n_bytes:
                copied = os.copy_file_range(
                    *(source.fileno(), target.fileno()),
                    *(min(n_bytes - done, _KERNEL_NBYTES), start + done, place + done),
                )
                if copied == 0:
                    break
                done += copied
    target.seek(place + done)
    _copy_bytes(source, target, start=start + done, n_bytes=n_bytes - done)


def _copy_bytes(source: BinaryIO, target: BinaryIO, *, start: int, n_bytes: int) -> None:
    source.seek(start)
    left = n_bytes
    while left:
        piece = source.read(min(_COPY_NBYTES, left))
        if not piece:
            raise OSError(f"the original ended {left} bytes early")
        target.write(piece)
        left -= len(piece)
