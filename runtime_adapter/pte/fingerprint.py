"""Digests of a program: its weights, and its instructions. Names change neither.

The program digest walks the parsed program, not the file's bytes: the same program
gives the same digest whichever ExecuTorch version parsed it, wherever its segments
lie, however its memory was planned, and whether or not its state has names.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from runtime_adapter.pte.file import ProgramFile, read_range
from runtime_adapter.pte.ptd import data_digest

_DIGEST_NBYTES = 32

# Left out of the program digest. Content and places of data belong to the weights
# digest, or to nothing; memory plans and stack traces do not change a result.
_SKIPPED: Mapping[str, frozenset[str]] = {
    "Program": frozenset({"segments", "constant_buffer", "backend_delegate_data"}),
    "ExecutionPlan": frozenset({"non_const_buffer_sizes", "non_const_buffer_device"}),
    "Chain": frozenset({"stacktrace"}),
    "AllocationDetails": frozenset({"memory_id", "memory_offset_low", "memory_offset_high"}),
}


def weights_digest(
    file: ProgramFile, *, data_path: Path | None = None, method: bytes | None = None
) -> bytes:
    """BLAKE2b-256 over all constant data: segments, inline buffers, and the ``.ptd``; 32 bytes.

    ``method`` is the ``method_digest`` of the method that runs, where the file has several.
    Streams the segments: memory stays at about a megabyte.

    Raises:
        CorruptProgramError: the file changed or ends early.
        ProgramDataError: the ``.ptd`` is missing or damaged.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_NBYTES, person=b"kvstore/weights")
    with file.open() as stream:
        for start, size in file.segments:
            digest.update(size.to_bytes(8, "little"))
            for piece in read_range(stream, start, size, path=file.path):
                digest.update(piece)
    inline = [buffer.storage for buffer in file.program.constant_buffer or ()]
    inline += [blob.data for blob in file.program.backend_delegate_data or ()]
    for data in inline:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    if data_path is not None:
        digest.update(data_digest(data_path))
    if method is not None:
        digest.update(method)
    return digest.digest()


def method_digest(plan: Any, program: Any) -> bytes:
    """BLAKE2b-256 over which constants and delegates an ``ExecutionPlan`` uses; 32 bytes.

    Methods of one file with equal digests compute with the same weights (prefill and decode of
    a model); a LoRA adapter's method has others than its base's.
    """
    used: set[bytes] = set()
    for value in plan.values:
        tensor = value.val
        if type(tensor).__name__ != "Tensor":
            continue
        extra = tensor.extra_tensor_info
        if extra is not None and int(extra.location) == 1:
            used.add(b"external " + str(extra.fully_qualified_name).encode("utf-8"))
        elif tensor.allocation_info is None and tensor.data_buffer_idx:
            used.add(b"constant %d" % tensor.data_buffer_idx)
    for delegate in plan.delegates or ():
        processed = delegate.processed
        if int(processed.location) == 1:
            used.add(b"segment %d" % processed.index)
        else:
            data = bytes(program.backend_delegate_data[processed.index].data)
            used.add(b"inline " + hashlib.blake2b(data, digest_size=_DIGEST_NBYTES).digest())
    digest = hashlib.blake2b(digest_size=_DIGEST_NBYTES, person=b"kvstore/method")
    for name in sorted(used):
        digest.update(len(name).to_bytes(8, "little") + name)
    return digest.digest()


def program_digest(program: Any) -> bytes:
    """BLAKE2b-256 over the instructions and values of every method; 32 bytes.

    ``program`` is an ``executorch.exir.schema.Program`` of any supported version.
    """
    pieces: list[bytes] = []
    _encode(program, pieces)
    return hashlib.blake2b(
        b"".join(pieces), digest_size=_DIGEST_NBYTES, person=b"kvstore/program"
    ).digest()


def _encode(value: Any, pieces: list[bytes]) -> None:
    """Append a prefix-free encoding of ``value``: a tag, a length where needed, the content."""
    if value is None:
        pieces.append(b"n")
    elif isinstance(value, bool):
        pieces.append(b"b1" if value else b"b0")
    elif isinstance(value, (int, enum.Enum)):
        text = str(int(value)).encode("ascii")  # type: ignore[arg-type]  # exir's enums are IntEnum
        pieces.append(b"i%d:%b" % (len(text), text))
    elif isinstance(value, float):
        pieces.append(b"f" + struct.pack("<d", value))
    elif isinstance(value, str):
        data = value.encode("utf-8")
        pieces.append(b"s%d:%b" % (len(data), data))
    elif isinstance(value, (bytes, bytearray, memoryview)):
        pieces.append(b"y%d:%b" % (len(value), bytes(value)))
    elif isinstance(value, (list, tuple)):
        pieces.append(b"l%d:" % len(value))
        for item in value:
            _encode(item, pieces)
    elif is_dataclass(value):
        _encode_record(value, pieces)
    else:
        _encode(str(value), pieces)


def _encode_record(record: Any, pieces: list[bytes]) -> None:
    """Fields that differ from their default, by name: fields added later change nothing."""
    kind = type(record).__name__
    pieces.append(b"d%d:%b" % (len(kind), kind.encode("ascii")))
    if kind == "Double":
        # The parser turns infinities into text; the number is what counts.
        pieces.append(b"f" + struct.pack("<d", float(record.double_val)) + b"e")
        return
    for name, default in _counted_fields(kind, record.__class__):
        value = getattr(record, name)
        if value is None or value == default:
            continue
        if isinstance(value, (list, tuple)) and not value:
            continue
        if name == "extra_tensor_info":
            value = _without_state_name(record)
            if value is None:
                continue
        pieces.append(b"k%d:%b" % (len(name), name.encode("ascii")))
        _encode(value, pieces)
    pieces.append(b"e")


def _without_state_name(tensor: Any) -> list[Any] | None:
    """What counts of a tensor's extra information: not the name of a planned tensor."""
    extra = tensor.extra_tensor_info
    is_planned = tensor.allocation_info is not None
    name = None if is_planned and int(extra.location) == 0 else extra.fully_qualified_name
    # device_type and device_index describe where memory is planned; a CPU is (0, 0).
    device = [int(getattr(extra, "device_type", 0)), int(getattr(extra, "device_index", 0))]
    kept = [extra.mutable_data_segments_idx, int(extra.location), name or "", device]
    return None if kept == [0, 0, "", [0, 0]] else kept


@lru_cache(maxsize=64)
def _counted_fields(name: str, kind: type) -> tuple[tuple[str, Any], ...]:
    """``(field, default)`` of the dataclass ``kind``, without what is left out of the digest."""
    skipped = _SKIPPED.get(name, frozenset())
    found = fields(kind)
    return tuple((item.name, _default(item)) for item in found if item.name not in skipped)


def _default(item: Field[Any]) -> Any:
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else MISSING
