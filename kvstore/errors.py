"""Every error that kvstore raises, in one tree, each with its own exit code.

    KVStoreError
    |-- InputError                  an argument is not usable
    |   |-- TokensError             token ids: empty, negative, not integers, too many
    |   `-- MetadataError           application metadata that cannot be stored
    |-- CacheError                  the live cache and the call disagree
    |   |-- CacheMismatchError      the cache holds fewer tokens than claimed, or other ones
    |   |-- CapacityError           more tokens than the cache has room for
    |   |-- PositionError           forward() at a start that is not the cache's length
    |   `-- RewindError             a ring or recurrent state cannot go back that far
    |-- StoreError                  the store as a whole
    |   |-- StorePathError          the path: a directory, missing folder, no permission
    |   |-- NotAStoreError          not SQLite, or SQLite that is not ours
    |   |-- SchemaMismatchError     ours, but its schema is not that version's schema
    |   |-- NewerFormatError        written by a newer kvstore
    |   |-- CorruptStoreError       the file, or a row in it, is damaged
    |   |   `-- DecodeError         stored bytes do not decode to what their row says
    |   |-- ReadOnlyStoreError      a write to a store that was opened read-only
    |   |-- DiskFullError           no room left for a write; nothing of it was kept
    |   |-- BudgetError             max_bytes cannot hold what was to be written
    |   |-- StoreBusyError          another process held the write lock too long
    |   |-- SaveTimeoutError        saves in the background were not done in time
    |   |-- ForkedStoreError        used in a child process after fork()
    |   `-- ClosedStoreError        used after close()
    |-- SessionError
    |   |-- SessionNotFoundError    no session has that name
    |   `-- SessionConflictError    the name is another model's, or was changed meanwhile
    `-- ProgramError                an ExecuTorch program
        |-- NotAProgramError        the file is not a .pte
        |-- CorruptProgramError     truncated or damaged
        |-- NoPersistentStateError  nothing in it outlives a call
        |-- DelegatedCacheError     a backend owns the cache
        |-- UnsupportedStateError   state of a kind that cannot be served
        |-- ProgramSignatureError   forward() does not take (tokens, position)
        |-- MissingOperatorError    an operator library is missing
        |-- ProgramDataError        a .ptd is missing or does not belong
        |-- RuntimeMissingError     ExecuTorch is not installed
        `-- ClosedModelError        used after close()

A message says what was expected, what was found and what to do next. Exit
codes are part of the command's interface: they are never reused. 0 is success,
1 a check that found something (``verify``, ``demo``), 2 a wrong command line.
"""

from __future__ import annotations

from typing import ClassVar


class KVStoreError(Exception):
    """Base of every error that kvstore raises on purpose."""

    exit_code: ClassVar[int] = 10


class InputError(KVStoreError):
    """An argument is not usable; nothing was read or written."""

    exit_code = 11


class TokensError(InputError):
    """Token ids are empty, negative, not integers, or too many."""

    exit_code = 12


class MetadataError(InputError):
    """Application metadata cannot be stored (type, depth or size)."""

    exit_code = 13


class CacheError(KVStoreError):
    """The live cache and the call disagree; the cache is unchanged."""

    exit_code = 20


class CacheMismatchError(CacheError):
    """The cache holds fewer tokens than claimed, or other ones."""

    exit_code = 21


class CapacityError(CacheError):
    """More tokens than the cache has room for."""

    exit_code = 23


class PositionError(CacheError):
    """``forward`` was called at a start that is not the cache's length."""

    exit_code = 24


class RewindError(CacheError):
    """A ring or a recurrent state cannot go back to that length."""

    exit_code = 26


class StoreError(KVStoreError):
    """The store as a whole cannot do what was asked."""

    exit_code = 30


class StorePathError(StoreError):
    """The path is a directory, lies in a missing folder, or may not be used."""

    exit_code = 31


class NotAStoreError(StoreError):
    """The file is not SQLite, or is SQLite that kvstore did not write."""

    exit_code = 32


class SchemaMismatchError(StoreError):
    """The file says it is ours, but its schema is not that version's schema."""

    exit_code = 33


class NewerFormatError(StoreError):
    """The file needs a newer kvstore; it was left untouched."""

    exit_code = 34


class CorruptStoreError(StoreError):
    """The database file, or a row in it, is damaged."""

    exit_code = 35


class DecodeError(CorruptStoreError):
    """Stored bytes do not decode to what their row says."""

    exit_code = 42


class ReadOnlyStoreError(StoreError):
    """A write to a store that is open read-only."""

    exit_code = 36


class DiskFullError(StoreError):
    """There is no room for a write; nothing of it was kept."""

    exit_code = 37


class BudgetError(StoreError):
    """``max_bytes`` cannot hold what was to be written."""

    exit_code = 38


class StoreBusyError(StoreError):
    """Another process held the write lock for longer than the wait allowed."""

    exit_code = 39


class SaveTimeoutError(StoreError):
    """Saves in the background were not in the file in time; they go on."""

    exit_code = 43


class ForkedStoreError(StoreError):
    """A store was used in a child process after ``fork()``."""

    exit_code = 40


class ClosedStoreError(StoreError):
    """A store was used after ``close()``."""

    exit_code = 41


class SessionError(KVStoreError):
    """A named session cannot be used as asked."""

    exit_code = 50


class SessionNotFoundError(SessionError):
    """No session has that name."""

    exit_code = 51


class SessionConflictError(SessionError):
    """The name belongs to another model's session, or another process changed it meanwhile."""

    exit_code = 52


class ProgramError(KVStoreError):
    """An ExecuTorch program cannot be used as asked."""

    exit_code = 60


class NotAProgramError(ProgramError):
    """The file is not an ExecuTorch program."""

    exit_code = 61


class CorruptProgramError(ProgramError):
    """The program file is truncated or damaged."""

    exit_code = 62


class NoPersistentStateError(ProgramError):
    """Nothing in the program outlives a call."""

    exit_code = 63


class DelegatedCacheError(ProgramError):
    """A backend delegate owns the cache, out of the planned arena."""

    exit_code = 64


class UnsupportedStateError(ProgramError):
    """The program keeps state of a kind that cannot be served."""

    exit_code = 65


class ProgramSignatureError(ProgramError):
    """The method does not take token ids and a position."""

    exit_code = 66


class MissingOperatorError(ProgramError):
    """The program needs an operator that no installed library provides."""

    exit_code = 67


class ProgramDataError(ProgramError):
    """A ``.ptd`` data file is missing, damaged or belongs to another program."""

    exit_code = 68


class RuntimeMissingError(ProgramError):
    """ExecuTorch (the ``executorch`` extra) is not installed."""

    exit_code = 69


class ClosedModelError(ProgramError):
    """A model, or its cache, was used after ``close()``."""

    exit_code = 70
