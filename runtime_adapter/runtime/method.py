"""One loaded method of a program: live views of its buffers, and execution.

This is the only file that touches ExecuTorch's Python binding, which is marked
experimental. Nothing of it leaves this file: no object, no exception.

``executorch.extension.pybindings.portable_lib``, the documented door, imports the
whole exporter for one warning class (about 4 s). The compiled module beneath
it imports in milliseconds once torch is there: ``_C`` in ExecuTorch 1.5,
``_portable_lib`` before.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import importlib.metadata
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.errors import (
    ClosedModelError,
    CorruptProgramError,
    MissingOperatorError,
    ProgramDataError,
    ProgramError,
    ProgramSignatureError,
    RuntimeMissingError,
)
from runtime_adapter.runtime.quiet import CapturedLog, captured_stderr, written_somewhere

if TYPE_CHECKING:
    import torch

_BINDINGS = (
    "executorch.extension.pybindings._C",
    "executorch.extension.pybindings._portable_lib",
)
Argument = tuple[str, Sequence[Any]]
"""A dtype's name and the values, nested as the shape has it."""

_INSTALL = "install it with: pip install 'kvstore[executorch]'"
_SHOWN_N_OPERATORS = 8

# executorch/runtime/core/error.h; append-only there.
_OPERATOR_MISSING = 0x14
_NOT_FOUND = 0x20
_OUT_OF_MEMORY = (0x21, 0x25, 0x31)
_ACCESS_FAILED = 0x22
_INVALID_PROGRAM = 0x23
_INVALID_EXTERNAL_DATA = 0x24
_DELEGATE_INCOMPATIBLE = 0x30


@functools.cache
def _binding() -> Any:
    """The compiled binding, imported once.

    Raises:
        RuntimeMissingError: torch or ExecuTorch is missing, or they do not fit each other.
    """
    try:
        with _no_collection():
            importlib.import_module("torch")  # its libraries are what the binding links against
    except ImportError as error:
        raise RuntimeMissingError(f"PyTorch cannot be imported ({error}); {_INSTALL}") from error
    reasons = []
    for name in _BINDINGS:
        try:
            with captured_stderr():
                return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except ImportError as error:  # another torch than the one it was built for
            reasons.append(str(error))
    if reasons:
        raise RuntimeMissingError(
            f"ExecuTorch's runtime does not load beside this torch ({'; '.join(reasons)}); "
            "install the torch version that this executorch release names"
        )
    raise RuntimeMissingError(f"ExecuTorch is not installed; {_INSTALL}")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let the garbage collector rest: torch's hundreds of thousands of objects stay anyway.

    Looking through them again and again takes a tenth of its import.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def runtime_version() -> str:
    """The runtime's name and version, for messages."""
    try:
        return f"executorch {importlib.metadata.version('executorch')}"
    except importlib.metadata.PackageNotFoundError:
        return "executorch, version unknown"


def registered_operators() -> frozenset[str]:
    """Names of the operators that the runtime has now, such as ``aten::add.out``.

    Raises:
        RuntimeMissingError: ExecuTorch is not installed.
    """
    with written_somewhere():
        return frozenset(_binding()._get_operator_names())


def registered_backends() -> frozenset[str]:
    """Names of the delegates' backends that the runtime has, such as ``XnnpackBackend``.

    Raises:
        RuntimeMissingError: ExecuTorch is not installed.
    """
    with written_somewhere():
        return frozenset(_binding()._get_registered_backend_names())


def load_library(path: Path) -> None:
    """Load a shared library that registers operators.

    Raises:
        OSError: the library cannot be loaded.
        RuntimeMissingError: ExecuTorch is not installed.
    """
    _binding()  # the registry that the library writes itself into
    import torch

    with captured_stderr():
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def loaded_libraries() -> list[str]:
    """The shared libraries of operators that this process loaded through PyTorch."""
    _binding()
    import torch

    return sorted(torch.ops.loaded_libraries)


def argument_types(operator: str) -> tuple[str, ...] | None:
    """The types of the arguments of ``aten::add.out``, as its registered schema has them.

    None if nothing registered the operator with PyTorch.

    Raises:
        RuntimeMissingError: ExecuTorch or torch is not installed.
    """
    _binding()
    import torch

    namespace, _, name = operator.partition("::")
    packet, _, overload = name.partition(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
        return tuple(str(argument.type) for argument in found._schema.arguments)
    except (AttributeError, RuntimeError):
        return None


def missing_operators_error(
    missing: Collection[str], *, notes: Collection[str] = ()
) -> MissingOperatorError:
    """The error for operators that no library provides: expected, found, next step."""
    names = sorted(missing)
    shown = ", ".join(names[:_SHOWN_N_OPERATORS])
    more = f" and {len(names) - _SHOWN_N_OPERATORS} more" if len(names) > _SHOWN_N_OPERATORS else ""
    found = f" ({'; '.join(notes)})" if notes else ""
    return MissingOperatorError(
        f"the program needs operators that this runtime ({runtime_version()}) "
        f"does not have: {shown}{more}{found}. Load the library that registers them with "
        "torch.ops.load_library(path) before opening the model, or use the ExecuTorch "
        "version that exported the program"
    )


def input_tensors(arguments: Sequence[Argument]) -> list[torch.Tensor]:
    """Arguments as the tensors that ``LoadedMethod.execute`` takes."""
    import torch

    return [torch.tensor(values, dtype=getattr(torch, dtype)) for dtype, values in arguments]


class _Owner(ctypes.Array[ctypes.c_uint8]):
    """The bytes of one planned buffer, keeping the program and method alive while used.

    Made per length by ``_owner_type``. A tensor over it (``torch.frombuffer``)
    holds a reference to it in its storage, and so does every view of
    that tensor, so nobody can read memory that the runtime has freed.
    """

    _type_ = ctypes.c_uint8
    _length_ = 0
    handles: tuple[Any, ...]


@functools.lru_cache(maxsize=64)
def _owner_type(nbytes: int) -> type[_Owner]:
    return type("_Owner", (ctypes.Array,), {"_type_": ctypes.c_uint8, "_length_": nbytes})


class LoadedMethod:
    """A method that is loaded and can be executed, with live views of its buffers.

    The planned memory lives as long as this object is open *or* any view of it
    lives, whichever is longer. Not thread-safe.
    """

    __slots__ = ("_is_warm", "_method", "_name", "_path", "_program")

    def __init__(self, path: Path, *, method: str, data_path: Path | None = None) -> None:
        """Load ``method`` of the program at ``path``, with the weights in ``data_path`` if given.

        Raises:
            CorruptProgramError: the runtime finds the file damaged.
            MissingOperatorError: an operator is not registered.
            ProgramDataError: the ``.ptd`` is missing, damaged, or not this program's.
            ProgramError: anything else that the runtime refuses.
            RuntimeMissingError: ExecuTorch is not installed.
        """
        self._path = path
        self._name = method
        self._is_warm = False
        binding = _binding()
        # The default verification is minimal, and crashes the process on some damaged files.
        options: dict[str, Any] = {"program_verification": binding.Verification.InternalConsistency}
        if data_path is not None:
            options["data_path"] = os.fspath(data_path)
        with captured_stderr() as log:
            error: Exception | None = None
            try:
                self._program = binding._load_program(os.fspath(path), **options)
                self._method = self._program.load_method(method)
            except Exception as raised:  # noqa: BLE001  mostly RuntimeError; no list is documented
                error = raised
        if error is None:
            return
        if isinstance(error, TypeError) and data_path is not None:
            raise ProgramDataError(
                f"{path}: this runtime ({runtime_version()}) cannot load weights from a .ptd "
                "in Python; use executorch 1.5 or newer, or export with the weights inside"
            ) from error
        raise _load_error(error, log, path=path, data_path=data_path) from error

    @property
    def n_inputs(self) -> int:
        """Number of tensors that ``execute`` takes."""
        return int(self._open().method_meta().num_inputs())

    def view(self, name: str) -> torch.Tensor:
        """The live buffer called ``name``, zero-copy: writing into it changes the next execution.

        Shape and dtype are the planned ones. Its storage keeps the program alive.

        Raises:
            KeyError: the program has no buffer of that name (a stock export names none).
        """
        import torch

        method = self._open()
        with captured_stderr():
            try:
                planned = method.get_attribute(name)
            except Exception as error:
                raise KeyError(name) from error
        owner = _owner_type(planned.nbytes).from_address(planned.data_ptr())
        owner.handles = (self._program, self._method)
        flat = torch.frombuffer(owner, dtype=planned.dtype)
        return flat.view(planned.shape)

    def execute(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """Run once and return the outputs, as tensors that own their memory.

        Raises:
            ProgramError: the runtime stopped; the buffers may be half written.
            ProgramSignatureError: the inputs are not what the method takes.
        """
        method = self._open()
        error: Exception | None = None
        log = CapturedLog()
        try:
            if self._is_warm:
                with written_somewhere():
                    return list(method.call(inputs))
            # The first execution starts thread pools, which log.
            with captured_stderr() as log:
                outputs = list(method.call(inputs))
            self._is_warm = True
            return outputs
        except Exception as raised:  # noqa: BLE001  as in __init__
            error = raised
        told = f"{error}{f' ({log.tail})' if log.tail else ''}"
        if "set_inputs" in str(error):
            raise ProgramSignatureError(
                f"{self._path}: method {self._name!r} does not take inputs of shapes "
                f"{[tuple(getattr(tensor, 'shape', ())) for tensor in inputs]}: {told}. "
                "Look at its inputs with: kvstore inspect"
            ) from error
        raise ProgramError(
            f"{self._path}: the runtime stopped in method {self._name!r}: {told}"
        ) from error

    def close(self) -> None:
        """Let go of the program; its memory is freed when the last view of it is."""
        self._method = self._program = None

    def _open(self) -> Any:
        if self._method is None:
            raise ClosedModelError(
                f"{self._path}: the model was closed; open it again with Model.open"
            )
        return self._method


def _load_error(
    error: Exception, log: CapturedLog, *, path: Path, data_path: Path | None
) -> ProgramError:
    """The error of ours for one that the runtime raised while loading."""
    found = re.search(r"error:? 0x:?([0-9a-fA-F]+)", str(error))
    code = int(found.group(1), 16) if found else 0
    told = f"{error}{f' ({log.tail})' if log.tail else ''}"
    if code == _OPERATOR_MISSING:
        names = set(re.findall(r"Missing operator: \[\d+\] (\S+)", log.text))
        return missing_operators_error(names or {"(not named by the runtime)"})
    if code == _INVALID_EXTERNAL_DATA or (code == _NOT_FOUND and "named_data" in log.text):
        return ProgramDataError(
            f"{path}: its weights are not in {data_path or 'the file'}: {told}. "
            "Pass the .ptd that was exported with the program as data_path="
        )
    if code == _INVALID_PROGRAM:
        return CorruptProgramError(
            f"{path}: the runtime finds the program damaged: {told}. Copy or export the file again"
        )
    if code == _DELEGATE_INCOMPATIBLE or (code == _NOT_FOUND and "ackend" in log.text):
        backends = ", ".join(sorted(registered_backends())) or "none"
        return MissingOperatorError(
            f"{path}: a delegate of the program does not run here: {told}. This runtime "
            f"({runtime_version()}) has the backends: {backends}"
        )
    if code in _OUT_OF_MEMORY:
        return ProgramError(f"{path}: not enough memory to load the program: {told}")
    if "No method named" in log.text:
        return ProgramSignatureError(
            f"{path}: the program has no such method: {told}. List them with: kvstore inspect"
        )
    # The runtime cuts its message off at some length: behind a long path its code is lost.
    is_unreadable = code == _ACCESS_FAILED or "Failed to open" in log.text
    if is_unreadable and data_path is not None and os.fspath(data_path) in told:
        return ProgramDataError(f"{data_path}: the file cannot be read: {told}")
    if is_unreadable:
        return ProgramError(f"{path}: the file cannot be read: {told}")
    return ProgramError(f"{path}: the runtime does not load the program: {told}")
