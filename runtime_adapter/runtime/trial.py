"""A program's first steps, taken in a process of their own.

Operators trust their arguments: a size or a number that a flipped bit changed can end the
process inside one (``SIGABRT``, ``SIGFPE``), in a program that is valid otherwise. So a file that
was never seen runs here first, where only a child process can die of it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from kvstore.errors import CorruptProgramError, KVStoreError, ProgramError
from runtime_adapter.runtime.libraries import ensure_operators
from runtime_adapter.runtime.method import (
    Argument,
    LoadedMethod,
    input_tensors,
    load_library,
    loaded_libraries,
)

log = logging.getLogger("runtime_adapter")

_CHILD = (
    "import json, sys\n"
    "sys.path[:] = json.loads(sys.argv[1])\n"
    "from runtime_adapter.runtime.trial import main\n"
    "main()\n"
)
_REFUSED = 3
"""How the child ends if the program gave an error, which the caller will then see itself."""

_PATIENCE_S = 120.0
_SLOWEST_NBYTES_PER_S = 10_000_000
"""How long it may take: so much, and what such a slow disk needs for the file."""


def try_out(
    path: Path,
    *,
    method: str,
    data_path: Path | None,
    operators: Collection[str],
    steps: Sequence[Sequence[Argument]],
) -> bool:
    """Load ``method`` of ``path`` and run it once with each of ``steps``, in a child process.

    Returns whether the steps were taken. They are not where the program ends in an error of its
    own, and where no child can be started (an application with Python built in).

    Raises:
        CorruptProgramError: the child died of it.
        ProgramError: the child was killed, or did not end.
    """
    if not _is_python(sys.executable):
        return False
    task = {
        "path": os.fspath(path),
        "method": method,
        "data_path": None if data_path is None else os.fspath(data_path),
        "libraries": loaded_libraries(),
        "operators": sorted(operators),
        "steps": steps,
    }
    paths = list(filter(_is_text, sys.path))  # Python ignores entries of any other kind
    files = [file for file in (path, data_path) if file is not None]
    longest_s = _PATIENCE_S + sum(file.stat().st_size for file in files) / _SLOWEST_NBYTES_PER_S
    command = [sys.executable, "-c", _CHILD, json.dumps(paths), json.dumps(task)]
    with tempfile.TemporaryFile() as errors:
        try:
            status = subprocess.run(  # noqa: S603  this interpreter, no shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                timeout=longest_s,
                check=False,
            ).returncode
        except OSError as error:
            log.info("%s is not tried out: no process can be started (%s)", path, error)
            return False
        except subprocess.TimeoutExpired as error:
            raise ProgramError(
                f"{path}: expected its first steps to end within {longest_s:.0f} s, found "
                "them still under way; copy or export the file again, or wait until this machine "
                "is less busy"
            ) from error
        errors.seek(0)
        told = errors.read().decode("utf-8", "replace")
    if status in (0, _REFUSED):
        return status == 0
    if status == 1:  # Python's own: the child did not come as far as the program
        log.info("%s is not tried out: %s", path, told.strip()[-400:])
        return False
    how = _name(status)
    if how == "SIGKILL":
        raise ProgramError(
            f"{path}: the process that took its first steps was killed; is there enough memory?"
        )
    raise CorruptProgramError(
        f"{path}: expected a program that runs, found one that ends its process ({how}) at its "
        "first steps. Copy or export the file again"
    )


def main() -> None:
    """The child: its task is ``sys.argv[2]``."""
    _leave_no_core_file()
    task: dict[str, Any] = json.loads(sys.argv[2])
    try:
        for library in task["libraries"]:
            load_library(Path(library))
        ensure_operators(task["operators"])
        data_path = None if task["data_path"] is None else Path(task["data_path"])
        loaded = LoadedMethod(Path(task["path"]), method=task["method"], data_path=data_path)
        for step in task["steps"]:
            loaded.execute(input_tensors(step))
    except (KVStoreError, OSError):
        os._exit(_REFUSED)
    os._exit(0)  # what the runtime does when it is torn down is no concern of the trial


def _leave_no_core_file() -> None:
    try:
        import resource
    except ModuleNotFoundError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _is_python(executable: str | None) -> bool:
    """Whether that is an interpreter: a frozen or embedding application names itself there."""
    return bool(executable) and Path(str(executable)).name.lower().startswith("python")


def _is_text(entry: object) -> bool:
    return isinstance(entry, str)


def _name(status: int) -> str:
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"exit status {status}"
