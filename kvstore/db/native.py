"""SQLite's blob handles by its own C interface: the bytes go straight to where they belong.

The ``sqlite3`` module returns a blob's bytes in memory of its own, from which they have to be
copied once more, and lets go of the interpreter's lock in the shortest calls too. Here the
functions of https://www.sqlite.org/c3ref/blob.html are called in the very library that the module
has loaded: closing a file in a second copy of SQLite would break the first one's locks
(https://www.sqlite.org/howtocorrupt.html, "Multiple copies of SQLite"). Where that one
cannot be reached (Python with SQLite built in, Windows) the module's connections serve.
"""

from __future__ import annotations

import ctypes
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import Any

from kvstore.db.payloads import wrong_length

_OPEN_READWRITE, _OPEN_URI = 0x2, 0x40
_TABLE = (b"main", b"payloads", b"data")

_BRIEF: dict[str, tuple[Any, ...]] = {
    "sqlite3_libversion": (),
    "sqlite3_threadsafe": (),
    "sqlite3_errmsg": (ctypes.c_void_p,),
    "sqlite3_blob_bytes": (ctypes.c_void_p,),
    "sqlite3_blob_close": (ctypes.c_void_p,),
    "sqlite3_blob_reopen": (ctypes.c_void_p, ctypes.c_int64),
}
"""Functions that take no longer than handing over the interpreter's lock would, and arguments.

Finding a row is one of them, though it may read a page: the lock is held meanwhile.
"""

_LONG: dict[str, tuple[Any, ...]] = {
    "sqlite3_open_v2": (
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_int,
        ctypes.c_char_p,
    ),
    "sqlite3_close_v2": (ctypes.c_void_p,),
    "sqlite3_exec": (ctypes.c_void_p, ctypes.c_char_p, *[ctypes.c_void_p] * 3),
    "sqlite3_blob_open": (
        ctypes.c_void_p,
        *[ctypes.c_char_p] * 3,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_void_p),
    ),
    "sqlite3_blob_read": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
}
"""Functions during which other threads run."""


class NativeReader:
    """A connection of SQLite's own that only reads payloads (a ``PayloadReader``)."""

    def __init__(self, library: Library, uri: str, pragmas: Iterable[str]) -> None:
        """Open the file.

        Raises:
            sqlite3.OperationalError: it cannot be opened now.
        """
        self._connection, self._blob = ctypes.c_void_p(), ctypes.c_void_p()
        self._library = library
        flags = _OPEN_READWRITE | _OPEN_URI
        try:
            self._check(
                library.sqlite3_open_v2(uri.encode(), ctypes.byref(self._connection), flags, None)
            )
            for pragma in pragmas:
                self._execute(f"PRAGMA {pragma}")
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Begin a read transaction; what it sees is settled by the first row read."""
        self._execute("BEGIN")

    def end(self) -> None:
        """End it."""
        self._drop_blob()
        self._execute("ROLLBACK")

    def close(self) -> None:
        """Close the connection; nothing else may be called any more."""
        self._drop_blob()
        connection, self._connection = self._connection, ctypes.c_void_p()
        if connection.value:
            self._library.sqlite3_close_v2(connection)

    def __del__(self) -> None:
        # Else the file's last connection would never be closed, and its WAL be left behind.
        with suppress(AttributeError):  # interrupted before it was made
            self.close()

    def read_into(self, payload_id: int, destination: memoryview) -> None:
        """Other threads run while the bytes are copied, once."""
        library, blob = self._library, self._blob
        if blob.value:
            code = library.sqlite3_blob_reopen(blob, payload_id)
        else:
            code = library.sqlite3_blob_open(
                self._connection, *_TABLE, payload_id, 0, ctypes.byref(blob)
            )
        if code:
            raise self._error(code)
        nbytes = library.sqlite3_blob_bytes(blob)
        if nbytes != destination.nbytes:
            raise wrong_length(payload_id, nbytes, destination)
        # Not an array: its type would be made anew for each length.
        first = ctypes.c_char.from_buffer(destination)
        code = library.sqlite3_blob_read(blob, ctypes.byref(first), nbytes, 0)
        if code:
            raise self._error(code)

    def _execute(self, statement: str) -> None:
        self._check(
            self._library.sqlite3_exec(self._connection, statement.encode(), None, None, None)
        )

    def _drop_blob(self) -> None:
        # Forgotten first: an interrupt right behind the call must not lead to a second one.
        blob, self._blob = self._blob, ctypes.c_void_p()
        if blob.value:
            self._library.sqlite3_blob_close(blob)

    def _check(self, code: int) -> None:
        if code:
            raise self._error(code)

    def _error(self, code: int) -> sqlite3.OperationalError:
        text = self._library.sqlite3_errmsg(self._connection) if self._connection.value else b""
        error = sqlite3.OperationalError(text.decode(errors="replace"))
        error.sqlite_errorcode = code
        return error


class Library:
    """SQLite's functions by their names."""

    def __init__(self, path: str) -> None:
        """Find them in the library at ``path`` and in those that it is linked with.

        Raises:
            OSError: it cannot be loaded.
            AttributeError: it does not have them.
        """
        for loaded, functions in (
            (ctypes.PyDLL(path), _BRIEF),
            (ctypes.CDLL(path), _LONG),
        ):
            for name, argument_types in functions.items():
                function = getattr(loaded, name)
                function.argtypes = argument_types
                is_text = name in ("sqlite3_errmsg", "sqlite3_libversion")
                function.restype = ctypes.c_char_p if is_text else ctypes.c_int
                setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:  # for the type checker; all are set above
        raise AttributeError(name)


@cache
def library() -> Library | None:
    """The SQLite that the ``sqlite3`` module uses, or None if it cannot be reached.

    Its locks are the process's own only if it is the same one, and it must serve several threads.
    """
    import _sqlite3

    path = getattr(_sqlite3, "__file__", None)
    if path is None or sqlite3.Connection is not _sqlite3.Connection:  # another one in its place
        return None
    try:
        found = Library(path)
    except (OSError, AttributeError):
        return None
    is_same = found.sqlite3_libversion() == sqlite3.sqlite_version.encode()
    return found if is_same and found.sqlite3_threadsafe() else None
