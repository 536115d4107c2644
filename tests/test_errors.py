from __future__ import annotations

import importlib
import pkgutil
import re
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa

import kvstore
from kvstore import errors
from kvstore.db.vendor import as_store_error, vendor_errors
from kvstore.errors import (
    CorruptStoreError,
    DiskFullError,
    KVStoreError,
    NotAStoreError,
    ReadOnlyStoreError,
    StoreBusyError,
    StoreError,
    StorePathError,
)
from tests.conftest import ROOT

PATH = Path("sessions.db")


def tree(root):
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


@pytest.fixture(scope="module")
def every_error():
    for module in pkgutil.walk_packages(kvstore.__path__, "kvstore."):
        importlib.import_module(module.name)
    return [one for one in tree(KVStoreError) if one.__module__.startswith("kvstore")]


def test_every_error_has_an_exit_code_of_its_own(every_error):
    codes = [error.exit_code for error in every_error]
    assert len(set(codes)) == len(codes)
    assert all(3 <= code <= 125 for code in codes)
    assert all("exit_code" in vars(error) for error in every_error)


def test_the_tree_at_the_top_of_the_module_is_the_tree():
    drawn = re.findall(r"([A-Z]\w+Error)", errors.__doc__)
    public = [one.__name__ for one in tree(KVStoreError) if one.__module__ == errors.__name__]
    assert sorted(drawn) == sorted(public)


def test_every_error_says_what_it_means(every_error):
    for error in every_error:
        assert error.__doc__, error
        assert error.__name__.endswith("Error")


SQLITE_CODES = {
    sqlite3.SQLITE_FULL: DiskFullError,
    sqlite3.SQLITE_BUSY: StoreBusyError,
    sqlite3.SQLITE_BUSY_SNAPSHOT: StoreBusyError,
    sqlite3.SQLITE_LOCKED: StoreBusyError,
    sqlite3.SQLITE_NOTADB: NotAStoreError,
    sqlite3.SQLITE_CORRUPT: CorruptStoreError,
    sqlite3.SQLITE_CORRUPT_VTAB: CorruptStoreError,
    sqlite3.SQLITE_READONLY: ReadOnlyStoreError,
    sqlite3.SQLITE_READONLY_DBMOVED: ReadOnlyStoreError,
    sqlite3.SQLITE_CANTOPEN: StorePathError,
    sqlite3.SQLITE_PERM: StorePathError,
    sqlite3.SQLITE_AUTH: StorePathError,
    sqlite3.SQLITE_IOERR_READ: StoreError,
    sqlite3.SQLITE_ERROR: StoreError,
    sqlite3.SQLITE_NOMEM: StoreError,
    sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY: StoreError,
}


@pytest.mark.parametrize(("code", "expected"), SQLITE_CODES.items())
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_sqlite_reports_becomes_an_error_of_ours_with_its_cause(code, expected, wrapped):
    cause = sqlite3.OperationalError("made up")
    cause.sqlite_errorcode = code
    if wrapped:
        cause = sa.exc.OperationalError("SELECT 1", {}, cause)
    with pytest.raises(StoreError) as caught, vendor_errors(PATH):
        raise cause
    assert type(caught.value) is expected
    assert caught.value.__cause__ is cause
    assert str(caught.value).startswith("sessions.db: ")


@pytest.mark.parametrize(
    "code",
    sorted(
        {
            value
            for name, value in vars(sqlite3).items()
            if re.fullmatch(r"SQLITE_[A-Z_]+", name) and isinstance(value, int)
        }
    ),
)
def test_every_code_of_sqlite_has_some_error_of_ours(code):
    error = sqlite3.DatabaseError("made up")
    error.sqlite_errorcode = code
    assert isinstance(as_store_error(error, PATH), StoreError)


@pytest.mark.parametrize(
    "error",
    [
        sa.exc.TimeoutError("no connection"),
        sa.exc.NoResultFound(),
        sa.exc.MultipleResultsFound(),
        sa.exc.ResourceClosedError(),
        sqlite3.InterfaceError("no code at all"),
    ],
)
def test_every_other_vendor_error_becomes_one_of_ours(error):
    with pytest.raises(StoreError), vendor_errors(PATH):
        raise error


def test_a_message_that_the_driver_cannot_read_is_corruption():
    with pytest.raises(CorruptStoreError, match="not UTF-8"), vendor_errors(PATH):
        b"\xd5".decode()


def test_our_own_errors_pass_as_they_are():
    error = CorruptStoreError("ours")
    with pytest.raises(CorruptStoreError) as caught, vendor_errors(PATH):
        raise error
    assert caught.value is error


@pytest.mark.checkout
def test_every_exit_code_is_in_the_commands_documentation(every_error):
    documented = (ROOT / "docs" / "command.md").read_text(encoding="utf-8")
    for error in every_error:
        assert f"| {error.exit_code} | `{error.__name__}` |" in documented
