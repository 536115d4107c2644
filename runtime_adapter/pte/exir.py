"""The exporter's reader and writer of program flatbuffers: the only module that imports them.

Importing ``executorch.exir`` takes 5 to 9 seconds and talks on stderr, so it is
imported when a program is analysed for the first time, and never to reopen one.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvstore.errors import CorruptProgramError, RuntimeMissingError


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Import or call parts of the exporter without their chatter.

    Raises:
        RuntimeMissingError: ExecuTorch or torch is not installed, or does not load.
    """
    # The talk goes through Python's logging and warnings (missing CUDA
    # libraries, deprecated registrations): nothing that a reader can act on.
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise RuntimeMissingError(
            f"expected the packages torch and executorch, found: {error}; "
            "install them with: pip install 'kvstore[executorch]'"
        ) from error
    finally:
        logging.disable(disabled)


def _load(name: str) -> Any:
    with quietly():
        return importlib.import_module(name)


def parse_flatbuffer(data: bytes, *, source: str) -> Any:
    """The program (``executorch.exir.schema.Program``) that the flatbuffer ``data`` holds.

    ``source`` names the file in error messages.

    Raises:
        CorruptProgramError: the bytes are not a whole flatbuffer program.
        RuntimeMissingError: ExecuTorch is not installed.
    """
    module = _load("executorch.exir._serialize._flatbuffer_program")
    try:
        return module._flatbuffer_to_program(data)  # noqa: SLF001  the exporter has no public reader
    except Exception as error:  # damaged bytes surface as any exception in there
        raise CorruptProgramError(
            f"{source}: expected a whole ExecuTorch program, found one whose tables cannot be read "
            f"({type(error).__name__}: {error}); copy or export the file again"
        ) from error


def build_flatbuffer(program: Any) -> tuple[bytes, int]:
    """The flatbuffer of ``program``, and the alignment in bytes that its content relies on."""
    module = _load("executorch.exir._serialize._flatbuffer_program")
    alignment = _load("executorch.exir.tensor").ALIGNMENT
    with quietly():  # it calls deprecated parts of the standard library
        result = module._program_to_flatbuffer(  # noqa: SLF001  the exporter has no public writer
            program, constant_tensor_alignment=alignment
        )
    return result.data, result.max_alignment


def tensor_name(name: str) -> Any:
    """An ``ExtraTensorInfo`` that gives a planned tensor its fully qualified ``name``."""
    schema = _load("executorch.exir.schema")
    return schema.ExtraTensorInfo(
        fully_qualified_name=name, location=schema.TensorDataLocation.SEGMENT
    )
