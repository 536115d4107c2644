"""What a delegate calls the buffers that it took over, as far as its data says.

A delegate's data is in its backend's own format. Some of them (Core ML's, for one) have the
names of buffers in plain text; these are for messages only, nothing is decided by a name.
"""

from __future__ import annotations

import re

from runtime_adapter.pte.file import ProgramFile, read_range

_ENDINGS = (b"k_cache", b"v_cache", b"conv_state", b"recurrent_state")
_NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_.]*(?:" + b"|".join(_ENDINGS) + rb")(?![A-Za-z0-9_.])")
_NAME_MAX_NBYTES = 256


def buffer_names(file: ProgramFile, backend: str) -> tuple[str, ...]:
    """The names of caches in the data of ``backend``'s delegates, sorted; reads all of it."""
    found: dict[str, str] = {}
    for name in sorted(_names(file, backend), key=lambda name: (-name.count("."), name)):
        found.setdefault(name.replace(".", "_").removeprefix("b_"), name)
    return tuple(sorted(found.values()))


def _names(file: ProgramFile, backend: str) -> set[str]:
    found: set[bytes] = set()
    for plan in file.program.execution_plan:
        for delegate in plan.delegates or ():
            if delegate.id != backend:
                continue
            where = delegate.processed
            if where.location == 1:
                found |= _names_in_segment(file, where.index)
            else:
                found |= set(_NAME.findall(file.program.backend_delegate_data[where.index].data))
    return {name.decode("ascii") for name in found}


def _names_in_segment(file: ProgramFile, index: int) -> set[bytes]:
    start, size = file.segments[index]
    found: set[bytes] = set()
    end = b""
    with file.open() as stream:
        for piece in read_range(stream, start, size, path=file.path):
            data = end + piece
            # Much faster than the expression, and a gigabyte of weights has none.
            if any(ending in data for ending in _ENDINGS):
                found.update(_NAME.findall(data))
            end = data[-_NAME_MAX_NBYTES:]
    return found
