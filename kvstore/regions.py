"""Token ranges of a planned tensor: gather them token-major, scatter them back.

The stored form of a range ``[start, stop)`` is token-major whatever the planned
layout is: for ``[1, S, H_kv, D]`` and for ``[1, H_kv, S, D]`` alike it is
``[n, H_kv, D]``. Where a range is one run of memory, no copy is made. A
checkpoint is its tensor, byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvstore.kinds import Run, kind_of
from kvstore.layout import TensorSpec

if TYPE_CHECKING:
    import numpy as np


def in_place(spec: TensorSpec, buffer: memoryview, start: int, stop: int) -> memoryview | None:
    """The bytes of positions ``[start, stop)`` where they lie, or None if not in one run."""
    runs = kind_of(spec).runs(spec, start, stop)
    if len(runs) != 1 or not _is_slot_major(spec):
        return None
    return _run_bytes(spec, buffer, runs[0])


def gather(spec: TensorSpec, buffer: memoryview, start: int, stop: int) -> memoryview:
    """The bytes of positions ``[start, stop)``, token-major; a view where that is one run."""
    view = in_place(spec, buffer, start, stop)
    if view is not None:
        return view
    import numpy as np  # not at the top: `kvstore ls` must start fast

    slots = _slot_major(spec, buffer)
    runs = kind_of(spec).runs(spec, start, stop)
    parts = [slots[run.slot : run.slot + run.n_slots] for run in runs]
    return np.concatenate(parts).reshape(-1).data


def copy(spec: TensorSpec, buffer: memoryview, start: int, stop: int) -> memoryview:
    """The bytes of positions ``[start, stop)``, token-major, in memory of their own."""
    view = in_place(spec, buffer, start, stop)
    return gather(spec, buffer, start, stop) if view is None else memoryview(bytes(view))


def scatter(spec: TensorSpec, buffer: memoryview, start: int, stop: int, data: memoryview) -> None:
    """Put the token-major bytes ``data`` into positions ``[start, stop)`` of ``buffer``."""
    view = in_place(spec, buffer, start, stop)
    if view is not None:
        view[:] = data
        return
    import numpy as np  # not at the top: `kvstore ls` must start fast

    slots = _slot_major(spec, buffer)
    source = np.frombuffer(data, dtype=np.uint8).reshape(stop - start, *slots.shape[1:])
    for run, first in _with_offsets(kind_of(spec).runs(spec, start, stop)):
        slots[run.slot : run.slot + run.n_slots] = source[first : first + run.n_slots]


def _is_slot_major(spec: TensorSpec) -> bool:
    """Whether every run of slots is one run of memory."""
    return spec.token_axis is None or math.prod(spec.shape[: spec.token_axis]) == 1


def _run_bytes(spec: TensorSpec, buffer: memoryview, run: Run) -> memoryview:
    return buffer[run.slot * spec.slot_nbytes : (run.slot + run.n_slots) * spec.slot_nbytes]


def _with_offsets(runs: Sequence[Run]) -> list[tuple[Run, int]]:
    """Each run with the number of slots before it."""
    offsets = [sum(run.n_slots for run in runs[:number]) for number in range(len(runs))]
    return list(zip(runs, offsets, strict=True))


def _slot_major(spec: TensorSpec, buffer: memoryview) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """``buffer`` as bytes of shape ``[S, ..., itemsize]``, a view with the token axis first."""
    import numpy as np  # not at the top: `kvstore ls` must start fast

    elements = np.frombuffer(buffer, dtype=np.uint8).reshape(*spec.shape, spec.itemsize_nbytes)
    return np.moveaxis(elements, spec.token_axis or 0, 0)
