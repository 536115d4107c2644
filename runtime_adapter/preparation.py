"""What happens to a program before it is loaded: analysed, tried out, its buffers named.

The analysis is remembered and the named copy kept, so that all of this takes
milliseconds for a program that was opened before.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvstore.errors import InputError, MissingOperatorError, ProgramError
from runtime_adapter.program.analysis import ProgramAnalysis
from runtime_adapter.runtime import method as runtime
from runtime_adapter.runtime.libraries import ensure_operators, operator_schema
from runtime_adapter.runtime.trial import try_out
from runtime_adapter.userdir.copies import named_copy as cached_copy
from runtime_adapter.userdir.filecache import FileCache, ProgramIdentity

log = logging.getLogger("runtime_adapter")

_TRIAL_N_TOKENS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedProgram:
    """A program that can be loaded now. ``named_copy`` is None if the program has names itself."""

    path: Path
    data_path: Path | None
    analysis: ProgramAnalysis
    named_copy: Path | None
    identity: ProgramIdentity | None

    @property
    def load_path(self) -> Path:
        """The file to load: the copy if there is one."""
        return self.named_copy or self.path

    def check_unchanged(self) -> None:
        """Make sure that what was loaded is what was analysed.

        Raises:
            ProgramError: the program's files changed meanwhile.
        """
        if self.identity != _identity(self.path, data_path=self.data_path):
            raise ProgramError(
                f"{self.path}: the file changed while it was opened; open it again when "
                "whatever writes it has finished"
            )


@contextlib.contextmanager
def prepared(
    path: str | os.PathLike[str],
    *,
    data_path: str | os.PathLike[str] | None,
    named_copy: str | os.PathLike[str] | None,
    method: str,
    cache_dir: str | os.PathLike[str] | None,
) -> Iterator[PreparedProgram]:
    """Make ``path`` ready to load inside the block; arguments and errors as ``Model.open``."""
    if not isinstance(method, str):
        raise InputError(f"method: expected a method's name, found {type(method).__name__}")
    program = _path("path", path)
    data = None if data_path is None else _path("data_path", data_path)
    files = FileCache(None if cache_dir is None else _path("cache_dir", cache_dir))
    identity = _identity(program, data_path=data)
    analysis = _remembered(identity, method=method, files=files)
    is_new = analysis is None
    if analysis is None:
        analysis = _analyze(program, data_path=data, method=method)
    _check_backends(analysis, path=program)
    ensure_operators(analysis.operators)
    if is_new:
        _try_out(program, analysis, data_path=data, method=method)
        _remember(identity, analysis, program, data_path=data, method=method, files=files)
    with contextlib.ExitStack() as stack:
        copy: Path | None = None
        if not analysis.is_named:
            if named_copy is None:
                copy = stack.enter_context(_cached_copy(program, analysis, files=files))
            else:
                copy = _path("named_copy", named_copy)
                _ensure_copy(program, copy, analysis, method=method, data=data, files=files)
            log.info("%s names no buffers; loading its named copy %s", program, copy)
        yield PreparedProgram(
            path=program, data_path=data, analysis=analysis, named_copy=copy, identity=identity
        )


def _path(what: str, value: str | os.PathLike[str]) -> Path:
    try:
        path = Path(value)
    except TypeError as error:
        raise InputError(f"{what}: expected a path, found {type(value).__name__}") from error
    if "\0" in str(path) or not os.fspath(value):
        raise InputError(f"{what}: expected a path, found {value!r}")
    return path


def _identity(path: Path, *, data_path: Path | None) -> ProgramIdentity | None:
    """The files as they are now; None if they cannot be looked at (the analysis says why)."""
    try:
        return ProgramIdentity.of(path, data_path=data_path)
    except (OSError, ValueError, ProgramError):
        return None


def _remembered(
    identity: ProgramIdentity | None, *, method: str, files: FileCache
) -> ProgramAnalysis | None:
    """The analysis of these very files, if they were opened before."""
    entry = None if identity is None else files.recall(identity, method=method)
    if entry is not None:
        with contextlib.suppress(InputError):  # written by another version
            return ProgramAnalysis.from_json(entry)
    return None


def _remember(
    identity: ProgramIdentity | None,
    analysis: ProgramAnalysis,
    path: Path,
    *,
    data_path: Path | None,
    method: str,
    files: FileCache,
) -> None:
    """Keep an analysis for the next time, if the files are still those that were analysed."""
    if identity is not None and identity == _identity(path, data_path=data_path):
        files.remember(identity, method=method, analysis=analysis.to_json())


def _analyze(path: Path, *, data_path: Path | None, method: str) -> ProgramAnalysis:
    # Not at the top: what reads programs is not needed for one that was opened before.
    from runtime_adapter.program.survey import analyze

    return analyze(path, data_path=data_path, method=method, schema_of=operator_schema)


def _write_named_copy(path: Path, copy: Path) -> None:
    from runtime_adapter.program.naming import write_named_copy  # as above

    write_named_copy(path, copy)


def _try_out(path: Path, analysis: ProgramAnalysis, *, data_path: Path | None, method: str) -> None:
    """Let a program that was never opened take its first steps where it can do no harm."""
    signature = analysis.signature
    n_tokens = min(_TRIAL_N_TOKENS, signature.max_n_tokens, analysis.capacity_n_tokens - 1)
    try_out(
        path,
        method=method,
        data_path=data_path,
        operators=analysis.operators,
        # A prompt and, where there is room, a token behind it.
        steps=[
            signature.arguments([0] * max(n_tokens, 1), start=0),
            *([signature.arguments([0], start=n_tokens)] if n_tokens else []),
        ],
    )


@contextlib.contextmanager
def _cached_copy(path: Path, analysis: ProgramAnalysis, *, files: FileCache) -> Iterator[Path]:
    def write(copy: Path) -> None:
        _write_named_copy(path, copy)

    key = str(analysis.fingerprint)
    with cached_copy(files.directory, key, write=write) as copy:
        yield copy


def _ensure_copy(
    path: Path,
    copy: Path,
    analysis: ProgramAnalysis,
    *,
    method: str,
    data: Path | None,
    files: FileCache,
) -> None:
    """Make the named copy at the place that the caller chose, or use what is there already.

    Raises:
        InputError: it cannot be written there.
        ProgramError: something else is there.
    """
    if copy.exists() and copy.samefile(path):
        raise InputError(
            f"named_copy: expected another place than the program itself, found {copy}; "
            "choose another path, or leave it out"
        )
    if not copy.exists():
        try:
            _write_named_copy(path, copy)
        except InputError:
            if not copy.exists():  # else another process made it meanwhile: look at that
                raise
        else:
            return
    identity = _identity(copy, data_path=data)
    remembered = _remembered(identity, method=method, files=files)
    there = remembered or _analyze(copy, data_path=data, method=method)
    # The layouts are compared too, because a fingerprint says nothing about names.
    if not there.is_named or (there.fingerprint, there.layout) != (
        analysis.fingerprint,
        analysis.layout,
    ):
        raise ProgramError(
            f"{copy}: expected nothing there, or the named copy of {path}; found another "
            "program. Remove it, or choose another path for named_copy="
        )
    if remembered is None:  # equal to a program that was tried out
        _remember(identity, there, copy, data_path=data, method=method, files=files)


def _check_backends(analysis: ProgramAnalysis, *, path: Path) -> None:
    """Name the delegates' backends that are missing, before the runtime fails with a number."""
    missing = sorted(frozenset(analysis.delegates) - runtime.registered_backends())
    if missing:
        raise MissingOperatorError(
            f"{path}: the program runs parts on {', '.join(missing)}, which this runtime "
            f"({runtime.runtime_version()}) does not have: it has "
            f"{', '.join(sorted(runtime.registered_backends())) or 'none'}. Export it for one of "
            "these, for example with backend.xnnpack.enabled=True"
        )
