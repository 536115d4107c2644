"""Names for the state of a program, and the copy of a program that carries them.

``Method::get_attribute`` finds a tensor by the name in the file, and stock exports
have none. The copy differs in its flatbuffer part only: the segments (weights,
delegates; maybe gigabytes) are copied by the kernel, shared with the original where
the file system can.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.errors import InputError, ProgramError
from kvstore.layout import TensorSpec
from runtime_adapter.pte.copying import BLOCK_NBYTES, copy_range, replacing
from runtime_adapter.pte.exir import build_flatbuffer, parse_flatbuffer, tensor_name
from runtime_adapter.pte.file import ProgramFile, read_program, whole_tables
from runtime_adapter.pte.fingerprint import program_digest
from runtime_adapter.pte.instructions import read_method
from runtime_adapter.state.dataflow import Dataflow
from runtime_adapter.state.roles import StateTensor, find_state

_SUFFIX_OF_ROLE = {
    "k": "k_cache",
    "v": "v_cache",
    "k_scale": "k_cache_scales",
    "v_scale": "v_cache_scales",
    "k_zero_point": "k_cache_zero_points",
    "v_zero_point": "v_cache_zero_points",
    "positions": "cache_positions",
}
_CACHE_ROLES = frozenset({*_SUFFIX_OF_ROLE, "cache"})

_HEADER_NBYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedState:
    """A persistent tensor and its name; ``is_own_name`` if the file itself has it."""

    state: StateTensor
    name: str
    is_own_name: bool

    @property
    def spec(self) -> TensorSpec | None:
        """The tensor in a layout's terms, or None if it cannot be served."""
        state = self.state
        if state.kind is None or state.role is None or state.layer is None:
            return None
        return TensorSpec(
            name=self.name,
            role=state.role,
            layer=state.layer,
            kind=state.kind,
            dtype=state.tensor.dtype,
            shape=state.tensor.shape,
            token_axis=state.token_axis,
            window_n_tokens=state.window_n_tokens,
            sink_n_tokens=state.sink_n_tokens,
        )


def name_state(states: Iterable[StateTensor]) -> tuple[NamedState, ...]:
    """Each persistent tensor with its own name, or one made of its layer and role.

    The names are unique; the order stays.
    """
    states = tuple(states)
    own = [state.tensor.name for state in states if state.tensor.name]
    taken = set(own)
    named = []
    for index, state in enumerate(states):
        name = state.tensor.name
        is_own = name is not None and own.count(name) == 1
        if name is None or not is_own:
            name = _unused(_made_name(state, index), taken)
            taken.add(name)
        named.append(NamedState(state=state, name=name, is_own_name=is_own))
    return tuple(named)


def _made_name(state: StateTensor, index: int) -> str:
    if state.layer is None or state.role is None:
        return f"state.{index}"
    where = f"layers.{state.layer}.attention"
    role = state.role.rstrip("0123456789")
    if role not in _CACHE_ROLES:
        return f"{where}.{state.role}"
    number = state.role.removeprefix(role)  # where a layer has several of them
    return f"{where}.kv_cache.{_SUFFIX_OF_ROLE.get(role, role)}{number}"


def _unused(name: str, taken: set[str]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedCopy:
    """A named copy that was written: where, how large, and which names per method."""

    path: Path
    nbytes: int
    names: dict[str, tuple[str, ...]]


def write_named_copy(source: str | Path, target: str | Path, *, replace: bool = False) -> NamedCopy:
    """Write a copy of the program at ``source`` whose persistent tensors all have names.

    The copy appears under ``target`` whole or not at all; its fingerprint is the
    original's. Memory use is bounded by the program part, whatever the weights' size.
    Missing folders are not made.

    Raises:
        NotAProgramError, CorruptProgramError, RuntimeMissingError: ``source``.
        InputError: ``target`` is ``source``, exists (without ``replace``), is a
            directory, or cannot be written.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target, replace=replace)
    file = read_program(source)
    with whole_tables(source):
        names = _give_names(file)
        head, base = _build_head(file)
    try:
        with file.open() as original, replacing(target, replace=replace) as copy:
            copy.write(head)
            copy.write(bytes(base - len(head)) if file.segments else b"")
            if file.segments:
                start = file.header.segment_base
                end = max(offset + size for offset, size in file.segments)
                end = max(end, start + file.header.segment_nbytes)
                copy.flush()
                copy_range(original, copy, start=start, n_bytes=end - start)
            nbytes = os.fstat(copy.fileno()).st_size
    except OSError as error:
        raise InputError(
            f"{target}: expected to write a program there, found: {error.strerror or error}; "
            "choose another place"
        ) from error
    return NamedCopy(path=target, nbytes=nbytes, names=names)


def _check_target(source: Path, target: Path, *, replace: bool) -> None:
    try:
        is_directory = target.is_dir()
        is_there = os.path.lexists(target)
        is_other = is_there and not target.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise InputError(f"{target}: expected a path to write to, found: {error}") from error
    if is_directory:
        raise InputError(f"{target}: expected a file name, found a directory; name the copy in it")
    if not target.parent.is_dir():
        raise InputError(f"{target}: expected an existing folder, found none; make it first")
    if is_other:
        raise InputError(
            f"{target}: expected a new or a regular file, found a device, a pipe, or a link that "
            "leads nowhere; choose another name"
        )
    if is_there:
        if source.exists() and target.samefile(source):
            raise InputError(
                f"{target}: expected another file than the original, found the same; "
                "write the copy under another name"
            )
        if not replace:
            raise InputError(
                f"{target}: expected a new file, found an existing one; "
                "remove it, choose another name, or replace it with --force (replace=True)"
            )


def _give_names(file: ProgramFile) -> dict[str, tuple[str, ...]]:
    """Name the state of every method in ``file.program``; a shared tensor has one name."""
    names: dict[str, tuple[str, ...]] = {}
    for plan in file.program.execution_plan:
        graph = read_method(plan, source=str(file.path), read_constant=file.read_constant)
        named = name_state(find_state(Dataflow(graph)))
        for item in named:
            if not item.is_own_name:
                _set_name(plan.values[item.state.value].val, item.name)
        if named:
            names[graph.name] = tuple(item.name for item in named)
    return names


def _set_name(tensor: Any, name: str) -> None:
    if tensor.extra_tensor_info is None:
        tensor.extra_tensor_info = tensor_name(name)
    else:  # has initial data or a device: keep that
        tensor.extra_tensor_info.fully_qualified_name = name


def _build_head(file: ProgramFile) -> tuple[bytes, int]:
    """``(program part, new place of the segments)``; the part lacks its padding."""
    before = program_digest(file.program)
    data, alignment = build_flatbuffer(file.program)
    if program_digest(parse_flatbuffer(data, source=str(file.path))) != before:
        raise ProgramError(
            f"{file.path}: expected the named copy to be the same program, found another; "
            "it may come from a newer ExecuTorch: update executorch"
        )
    if not file.header.is_extended:
        return data, 0
    header_nbytes = -(-_HEADER_NBYTES // alignment) * alignment
    program_nbytes = header_nbytes + len(data)
    old_base = file.header.segment_base
    base = 0
    if file.segments:
        base = program_nbytes + (old_base - program_nbytes) % BLOCK_NBYTES
    header = b"eh00" + _HEADER_NBYTES.to_bytes(4, "little")
    for number in (program_nbytes, base, file.header.segment_nbytes):
        header += number.to_bytes(8, "little")
    root = int.from_bytes(data[:4], "little") + header_nbytes
    head = root.to_bytes(4, "little") + data[4:8] + header.ljust(header_nbytes, b"\0") + data[8:]
    return head, base
