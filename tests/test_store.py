"""The store as a whole: opening, bad paths, bad files, closing, forking, full disks."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

import kvstore
from kvstore import Edit
from kvstore._bundle import migrations_dir
from kvstore.db.engine import APPLICATION_ID
from kvstore.db.tables import FORMAT_VERSION
from kvstore.errors import (
    ClosedStoreError,
    CorruptStoreError,
    DiskFullError,
    ForkedStoreError,
    InputError,
    KVStoreError,
    NewerFormatError,
    NotAStoreError,
    ReadOnlyStoreError,
    SchemaMismatchError,
    StoreError,
    StorePathError,
)
from tests.fakes import BytesCache, digest
from tests.oracle import assert_exact, big_layout, computed, load_exact, raw, save

TOKENS = list(range(100, 130))
NEWER = FORMAT_VERSION + 1


@pytest.fixture
def saved_path(store_path):
    """A closed file with one session."""
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        save(store, TOKENS, name="a")
    return store_path


# --------------------------------------------------------------------- opening


def test_a_new_path_becomes_a_store_and_is_found_again(store_path):
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        assert store.path == store_path
        assert not store.read_only
        save(store, TOKENS, name="a")
    with kvstore.open(str(store_path), chunk_n_tokens=8) as store:
        assert load_exact(store, name="a").n_tokens == 29


def test_after_closing_only_the_one_file_is_left(saved_path):
    assert [path.name for path in saved_path.parent.iterdir()] == ["sessions.db"]


def test_the_header_says_what_the_file_is(saved_path):
    with raw(saved_path) as connection:

        def pragma(name):
            return connection.execute(f"PRAGMA {name}").fetchone()[0]

        assert pragma("application_id") == APPLICATION_ID
        assert pragma("user_version") == FORMAT_VERSION
        assert pragma("auto_vacuum") == 2
        assert pragma("page_size") == 16384
        assert pragma("journal_mode") == "wal"


def test_a_fresh_empty_file_becomes_a_store(store_path):
    store_path.touch()
    with kvstore.open(store_path) as store:
        save(store, TOKENS, name="a")
        assert store.verify().ok


def test_a_path_with_special_characters_is_only_a_name(tmp_path):
    path = tmp_path / "a?mode=ro&x=%41#b 'é.db"
    with kvstore.open(path) as store:
        save(store, TOKENS, name="a")
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_relative_path_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with kvstore.open("a.db") as store:
        save(store, TOKENS)
    assert (tmp_path / "a.db").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        {"chunk_n_tokens": 0},
        {"chunk_n_tokens": -1},
        {"chunk_n_tokens": 65537},
        {"chunk_n_tokens": 1.5},
        {"chunk_n_tokens": True},
        {"chunk_n_tokens": None},
        {"namespace": None},
        {"namespace": 5},
        {"namespace": "\ud800"},
        {"namespace": "a\0"},
        {"max_bytes": -1},
        {"max_bytes": "lots"},
        {"max_bytes": 1.5},
        {"busy_timeout_seconds": -1},
        {"busy_timeout_seconds": "1"},
        {"busy_timeout_seconds": float("nan")},
    ],
    ids=ascii,
)
def test_an_argument_out_of_range_is_refused_and_makes_no_file(store_path, arguments):
    with pytest.raises(InputError):
        kvstore.open(store_path, **arguments)
    assert not store_path.exists()


@pytest.mark.parametrize("path", [None, 5, b"a.db", 1.5], ids=str)
def test_what_is_not_a_path_is_refused(path):
    with pytest.raises(InputError, match="expected a path"):
        kvstore.open(path)


@pytest.mark.parametrize("path", ["a\0b.db", "n" * 300, "n/" * 3000 + "a.db"], ids=len)
def test_a_path_that_no_file_can_have_is_refused(tmp_path, path):
    with pytest.raises(StorePathError):
        kvstore.open(tmp_path / path)


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(StorePathError, match="found a directory"):
        kvstore.open(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(StorePathError, match="does not exist"):
        kvstore.open(tmp_path / "missing" / "a.db")


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(StorePathError):
        kvstore.open(tmp_path / "file" / "a.db")


def test_a_fifo_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StorePathError, match="regular file"):
        kvstore.open(tmp_path / "fifo")


def test_a_link_that_leads_to_itself_is_refused(tmp_path):
    (tmp_path / "a.db").symlink_to("a.db")
    with pytest.raises(StorePathError):
        kvstore.open(tmp_path / "a.db")


# ------------------------------------------------------------ files not like ours


@pytest.mark.parametrize(
    "content", [b"x", b"text\n" * 5000, bytes(100), bytes(20000), b"SQLite format 3\0" + bytes(50)]
)
def test_a_file_that_is_not_sqlite_is_refused_and_left_alone(store_path, content):
    store_path.write_bytes(content)
    with pytest.raises((NotAStoreError, CorruptStoreError)):
        kvstore.open(store_path)
    assert store_path.read_bytes() == content


@pytest.mark.parametrize("statement", ["CREATE TABLE t (a)", "PRAGMA user_version = 1", "VACUUM"])
def test_another_programs_database_is_refused_and_left_alone(store_path, statement):
    with raw(store_path) as connection:
        connection.execute("PRAGMA user_version = 3")
        connection.execute(statement)
    before = store_path.read_bytes()
    with pytest.raises(NotAStoreError):
        kvstore.open(store_path)
    assert store_path.read_bytes() == before


@pytest.mark.parametrize("position", [0, 17, 500, 16384, 50000])
def test_a_cut_file_is_refused_or_found_damaged(saved_path, position):
    saved_path.write_bytes(saved_path.read_bytes()[:position])
    try:
        with kvstore.open(saved_path, chunk_n_tokens=8) as store:
            assert position == 0 or not store.verify().ok
    except StoreError:
        assert position > 0


@pytest.mark.parametrize(
    "tampering",
    [
        "CREATE TRIGGER evil AFTER INSERT ON chunks BEGIN DELETE FROM sessions; END",
        "CREATE VIEW evil AS SELECT * FROM chunks",
        "CREATE INDEX evil ON chunks (start)",
        "CREATE TABLE evil (a)",
        "CREATE VIRTUAL TABLE evil USING fts5(a)",
        "DROP INDEX chunks_by_tokens",
        "DROP INDEX leases_by_chunk",
        "DROP TABLE leases",
        "DROP TABLE format",
        "ALTER TABLE chunks ADD COLUMN evil",
        "ALTER TABLE sessions RENAME COLUMN metadata TO other",
        f"UPDATE format SET version = {NEWER}",
        "DELETE FROM format",
        "PRAGMA user_version = 0",
        "UPDATE alembic_version SET version_num = 'zzz'; PRAGMA user_version = 0",
        (
            f"PRAGMA user_version = {NEWER}; DROP TABLE format; CREATE VIEW format AS "
            f"WITH RECURSIVE r(version, min_reader) AS (SELECT {NEWER}, 1 UNION ALL "
            "SELECT version + 1, 1 FROM r) SELECT version, min_reader FROM r"
        ),
        (
            "PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = CAST(sql AS BLOB) "
            "WHERE name = 'chunks_by_tokens'"
        ),
    ],
)
@pytest.mark.parametrize("made_by", ["saved_path", "older_path"])
def test_a_tampered_schema_is_refused_and_left_alone(request, made_by, tampering):
    path = request.getfixturevalue(made_by)
    with raw(path) as connection:
        connection.executescript(tampering)
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises((SchemaMismatchError, ReadOnlyStoreError, NewerFormatError)):
            kvstore.open(path, read_only=read_only)
    assert path.read_bytes() == before


def test_a_schema_that_only_looks_alike_is_refused(saved_path):
    with raw(saved_path) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        changed = connection.execute(
            "UPDATE sqlite_schema SET sql = replace(sql, 'CHECK (stop > start)', '') "
            "WHERE name = 'chunks'"
        )
        assert changed.rowcount == 1
    with pytest.raises(SchemaMismatchError, match="chunks"):
        kvstore.open(saved_path)


def test_a_newer_file_is_refused_and_left_untouched(saved_path):
    with raw(saved_path) as connection:
        connection.execute(f"PRAGMA user_version = {NEWER}")
        connection.execute(f"UPDATE format SET version = {NEWER}, min_reader = {NEWER}")
    before = saved_path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(NewerFormatError, match="newer kvstore"):
            kvstore.open(saved_path, read_only=read_only)
    assert saved_path.read_bytes() == before


def test_a_newer_file_whose_known_objects_changed_is_refused(saved_path):
    with raw(saved_path) as connection:
        connection.execute(f"PRAGMA user_version = {NEWER}")
        connection.execute(f"UPDATE format SET version = {NEWER}, min_writer = {NEWER}")
        connection.execute("CREATE TABLE addition (a)")
        connection.execute("ALTER TABLE leases RENAME TO former_leases")
        connection.execute("ALTER TABLE former_leases RENAME TO leases")
    with raw(saved_path) as connection:
        before = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    with pytest.raises(SchemaMismatchError):  # ALTER rewrote the statement of leases
        kvstore.open(saved_path)
    with raw(saved_path) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_schema").fetchone() == before


def test_additions_of_a_newer_file_do_not_keep_this_version_from_reading(saved_path):
    with raw(saved_path) as connection:
        connection.execute(f"PRAGMA user_version = {NEWER}")
        connection.execute(f"UPDATE format SET version = {NEWER}, min_writer = {NEWER}")
        connection.execute("CREATE TABLE addition (a)")
    with kvstore.open(saved_path, chunk_n_tokens=8) as store:
        assert store.read_only
        assert load_exact(store, name="a").n_tokens == 29
        with pytest.raises(ReadOnlyStoreError):
            save(store, TOKENS, name="b")


def test_a_store_that_another_process_upgraded_meanwhile_writes_nothing(saved_path):
    with kvstore.open(saved_path, chunk_n_tokens=8) as store:
        with raw(saved_path) as connection:
            connection.execute(f"PRAGMA user_version = {NEWER}")
        for write in (
            lambda: save(store, [1, 2, 3], name="b"),
            lambda: store.delete_session("a"),
            lambda: store.prune(max_bytes=0),
        ):
            with pytest.raises(NewerFormatError, match=f"version is now {NEWER}"):
                write()
        assert [one.name for one in store.sessions()] == ["a"]


# ------------------------------------------------------------------- older files


def check_older(path):
    """The file of version 1 is read as it is, and nothing of it is changed."""
    before = path.read_bytes()
    with kvstore.open(path, read_only=True, chunk_n_tokens=32) as store:
        check_read_only(store)
    assert path.read_bytes() == before


def check_read_only(store):
    assert store.read_only
    assert store.verify().ok
    cache = BytesCache()
    hit = store.load_session(cache, name="turns")
    assert (hit.n_tokens, hit.reason, hit.edits) == (99, None, ())
    # There are no edits in such a file: what is before one is found, and nothing behind it.
    hit = store.load_session(cache, hit.tokens, edits=[Edit(40, digest("struck"))])
    assert (hit.n_tokens, hit.edits) == (40, ())
    for write in (
        lambda: store.save_session(cache, cache.tokens, name="b"),
        lambda: store.delete_session("turns"),
        lambda: store.prune(max_bytes=0),
    ):
        with pytest.raises(ReadOnlyStoreError):
            write()


def version_of(path):
    with raw(path) as connection:
        return connection.execute("PRAGMA user_version").fetchone()[0]


def test_an_older_file_is_upgraded_when_it_is_opened(older_path):
    with kvstore.open(older_path, chunk_n_tokens=32) as store:
        assert not store.read_only
        assert store.verify().ok
        cache = computed(TOKENS)
        cache.edit(13, "struck")
        store.save_session(cache, TOKENS, name="edited")
    assert version_of(older_path) == FORMAT_VERSION
    with kvstore.open(older_path, chunk_n_tokens=32) as store:
        assert store.load_session(BytesCache(), name="turns").n_tokens == 99
        assert store.load_session(BytesCache(), name="edited").edits == cache.edits
        assert store.load_session(BytesCache(), TOKENS).n_tokens == 13


def test_an_older_file_that_is_only_read_is_not_upgraded(older_path):
    check_older(older_path)
    assert version_of(older_path) == 1
    assert [path.name for path in older_path.parent.iterdir()] == [older_path.name]


def test_who_reads_an_older_file_goes_on_when_it_is_upgraded_meanwhile(older_path):
    with kvstore.open(older_path, read_only=True, chunk_n_tokens=32) as reader:
        assert reader.load_session(BytesCache(), name="turns").n_tokens == 99
        with kvstore.open(older_path, chunk_n_tokens=32) as store:
            cache = computed(TOKENS)
            cache.edit(13, "struck")
            store.save_session(cache, TOKENS, name="edited")
        assert reader.load_session(BytesCache(), name="turns").n_tokens == 99
        assert reader.load_session(BytesCache(), TOKENS).n_tokens == 13
        assert reader.load_session(BytesCache(), name="edited").edits == cache.edits
        assert reader.verify().ok


def test_several_that_open_an_older_file_at_once_upgrade_it_once(older_path):
    def use(number):
        with kvstore.open(older_path, chunk_n_tokens=32) as store:
            save(store, [number] * 20, name=str(number))
            return store.read_only

    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(use, range(4))] == [False] * 4
    with kvstore.open(older_path, read_only=True, chunk_n_tokens=32) as store:
        assert store.verify().ok
        assert {one.name for one in store.sessions()} >= {"0", "1", "2", "3", "turns"}


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE alembic_version SET version_num = '0002'",
        "UPDATE alembic_version SET version_num = 'zzz'",
        "UPDATE alembic_version SET version_num = ''",
        "UPDATE alembic_version SET version_num = 'head'",
        "UPDATE alembic_version SET version_num = CAST(x'ff' AS TEXT)",
        "UPDATE alembic_version SET version_num = x'30303031'",
        "INSERT INTO alembic_version VALUES ('0002')",
        "DELETE FROM alembic_version",
    ],
)
def test_an_older_file_of_other_migrations_is_refused_and_left_alone(older_path, tampering):
    with raw(older_path) as connection:
        connection.execute(tampering)
    before = older_path.read_bytes()
    with pytest.raises(SchemaMismatchError, match="alembic_version"):
        kvstore.open(older_path)
    assert older_path.read_bytes() == before
    check_older(older_path)  # a reader ignores what that table says


@pytest.mark.parametrize(
    ("script", "n_statements"),
    [*(("0002_edits.py", n) for n in range(6)), *(("0003_bases.py", n) for n in range(4))],
)
def test_an_upgrade_that_fails_leaves_the_older_file(
    older_path, script, n_statements, tmp_path_factory, monkeypatch
):
    scripts = tmp_path_factory.mktemp("scripts") / "migrations"
    shutil.copytree(migrations_dir(), scripts, ignore=shutil.ignore_patterns("__pycache__"))
    with (scripts / "versions" / script).open("a", encoding="utf-8") as changed:
        changed.write(f"\nSTATEMENTS = (*STATEMENTS[:{n_statements}], 'no statement')\n")
    monkeypatch.setattr("kvstore.db.migrate.migrations_dir", lambda: scripts)
    before = older_path.read_bytes()
    with pytest.raises(StoreError, match='near "no"'):
        kvstore.open(older_path)
    assert older_path.read_bytes() == before
    monkeypatch.undo()
    check_older(older_path)
    kvstore.open(older_path).close()
    assert version_of(older_path) == FORMAT_VERSION


# ------------------------------------------------------------------- read-only


def test_a_store_opened_read_only_reads_and_refuses_to_write(saved_path):
    before = saved_path.read_bytes()
    with kvstore.open(saved_path, read_only=True, chunk_n_tokens=8) as store:
        assert store.read_only
        assert load_exact(store, name="a").n_tokens == 29
        assert store.verify().ok
        assert store.prune(max_bytes=0, dry_run=True).dry_run
        for write in (
            lambda: save(store, TOKENS, name="b"),
            lambda: store.delete_session("a"),
            lambda: store.prune(max_bytes=0),
        ):
            with pytest.raises(ReadOnlyStoreError, match="read-only"):
                write()
    assert saved_path.read_bytes() == before


@pytest.mark.parametrize("thing", [None, object(), {}, [1, 2]])
def test_what_is_no_live_cache_is_refused(saved_path, thing):
    with kvstore.open(saved_path, chunk_n_tokens=8) as store:
        for call in (
            lambda: store.load_session(thing, [1]),
            lambda: store.save_session(thing, [1]),
        ):
            with pytest.raises(InputError, match="expected a live cache"):
                call()


def test_a_missing_file_is_not_made_by_a_read_only_open(store_path):
    with pytest.raises(StorePathError, match="found no file"):
        kvstore.open(store_path, read_only=True)
    assert not store_path.exists()


def as_nobody(action):
    """Run ``action`` in a forked child that dropped its privileges; its exception comes back."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "ok"
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            action()
        except BaseException as error:  # noqa: BLE001  # goes to the parent as text
            text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        os.write(writer, text.encode()[:60000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return text


@contextmanager
def published(saved):
    """A copy of a file where an unprivileged user reaches it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        path = Path(folder) / "sessions.db"
        shutil.copy(saved, path)
        path.chmod(0o666)
        yield path
        Path(folder).chmod(0o777)


@pytest.fixture
def public_path(saved_path):
    """The saved file where an unprivileged user reaches it."""
    with published(saved_path) as path:
        yield path


@pytest.fixture
def public_older_path(older_path):
    """The file of version 1 where an unprivileged user reaches it."""
    # That user may not reach kvstore itself: what it reads once for this version is read now.
    kvstore.open(older_path, read_only=True).close()
    with published(older_path) as path:
        yield path


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
class TestPermissions:
    def test_without_restrictions_an_unprivileged_user_reads_and_writes(self, public_path):
        def action():
            with kvstore.open(public_path, chunk_n_tokens=8) as store:
                load_exact(store, name="a")
                save(store, [1, 2, 3], name="b")

        assert as_nobody(action) == "ok"

    def test_a_read_only_file_opens_read_only(self, public_path):
        public_path.chmod(0o444)
        before = public_path.read_bytes()

        def action():
            with kvstore.open(public_path, chunk_n_tokens=8) as store:
                assert store.read_only
                load_exact(store, name="a")
                with pytest.raises(ReadOnlyStoreError):
                    save(store, [1, 2, 3], name="b")

        assert as_nobody(action) == "ok"
        assert public_path.read_bytes() == before

    def test_a_read_only_folder_without_a_wal_opens_read_only(self, public_path):
        public_path.parent.chmod(0o555)

        def action():
            with kvstore.open(public_path, chunk_n_tokens=8) as store:
                assert store.read_only
                load_exact(store, name="a")
                assert store.verify().ok

        assert as_nobody(action) == "ok"

    @pytest.mark.parametrize("what", ["file", "folder", "both"])
    def test_an_older_file_that_may_not_be_written_is_read_as_it_is(self, public_older_path, what):
        path = public_older_path
        before = path.read_bytes()
        if what != "folder":
            path.chmod(0o444)
        if what != "file":
            path.parent.chmod(0o555)

        def action():
            with kvstore.open(path, chunk_n_tokens=32) as store:
                check_read_only(store)

        assert as_nobody(action) == "ok"
        assert path.read_bytes() == before

    def test_a_tampered_older_file_that_may_not_be_written_is_refused(self, public_older_path):
        path = public_older_path
        with raw(path) as connection:
            connection.execute("ALTER TABLE chunks ADD COLUMN extras BLOB NOT NULL DEFAULT x''")
        path.parent.chmod(0o555)
        assert as_nobody(lambda: kvstore.open(path)).startswith("SchemaMismatchError")

    def test_a_read_only_folder_with_a_wal_has_its_own_error(self, public_path):
        wal = public_path.with_name("sessions.db-wal")
        wal.write_bytes(b"left by a process that died")
        public_path.parent.chmod(0o555)
        text = as_nobody(lambda: kvstore.open(public_path))
        assert text.startswith("StorePathError")
        assert "-wal" in text
        wal.write_bytes(b"")  # nothing in it: the file is whole
        assert as_nobody(lambda: kvstore.open(public_path).close()) == "ok"

    def test_a_new_store_in_a_read_only_folder_is_refused(self, public_path):
        public_path.parent.chmod(0o555)
        text = as_nobody(lambda: kvstore.open(public_path.with_name("new.db")))
        assert text.startswith("StorePathError")
        assert "may not be written" in text

    def test_a_file_that_may_not_be_read_is_refused(self, public_path):
        public_path.chmod(0o000)
        text = as_nobody(lambda: kvstore.open(public_path))
        assert text.startswith("StorePathError")
        assert "may not be read" in text

    def test_a_folder_that_may_not_be_searched_is_refused(self, public_path):
        public_path.parent.chmod(0o600)
        text = as_nobody(lambda: kvstore.open(public_path))
        assert text.startswith("StorePathError")

    def test_a_path_below_a_folder_that_may_not_be_searched_is_refused(self, public_path):
        (public_path.parent / "inner").mkdir()
        public_path.parent.chmod(0o600)
        text = as_nobody(lambda: kvstore.open(public_path.parent / "inner" / "a.db"))
        assert text.startswith("StorePathError")

    def test_a_store_used_after_fork_is_refused_and_the_parents_goes_on(self, open_store):
        store = open_store(chunk_n_tokens=8)
        save(store, TOKENS, name="a")

        def action():
            for use in (
                store.sessions,
                store.stats,
                store.verify,
                store.models,
                store.__enter__,
                lambda: store.load_session(BytesCache(), TOKENS),
                lambda: save(store, TOKENS, name="b"),
                lambda: store.delete_session("a"),
                lambda: store.prune(max_bytes=0),
            ):
                with pytest.raises(ForkedStoreError, match="open it again"):
                    use()
            store.close()

        assert as_nobody(action) == "ok"
        save(store, [1, 2, 3], name="c")
        assert load_exact(store, name="a").n_tokens == 29

    def test_a_child_opens_a_store_of_its_own(self, open_store, store_path):
        store = open_store(chunk_n_tokens=8)
        save(store, TOKENS, name="a")
        store_path.parent.chmod(0o777)

        pid = os.fork()
        if pid == 0:
            try:
                with kvstore.open(store_path, chunk_n_tokens=8) as own:
                    save(own, [7, 8, 9], name="child")
                os._exit(0)
            except BaseException:  # noqa: BLE001  # the child has no other way to say it
                traceback.print_exc()
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert {one.name for one in store.sessions()} == {"a", "child"}


# --------------------------------------------------------- closing, full disks


def test_a_closed_store_is_refused_and_may_be_closed_again(saved_path):
    store = kvstore.open(saved_path)
    store.close()
    store.close()
    for use in (
        store.sessions,
        store.stats,
        store.verify,
        store.__enter__,
        lambda: store.load_session(BytesCache(), TOKENS),
        lambda: save(store, TOKENS),
        lambda: store.delete_session("a"),
        lambda: store.prune(max_bytes=0),
    ):
        with pytest.raises(ClosedStoreError, match="closed"):
            use()


def test_a_context_manager_closes_also_after_an_exception(store_path):
    with pytest.raises(RuntimeError), kvstore.open(store_path) as store:
        raise RuntimeError
    with pytest.raises(ClosedStoreError):
        store.sessions()


def limit_pages(store, n_more):
    """A disk with room for ``n_more`` pages from now on."""
    engine = store._database.engine
    engine.dispose()

    @sa.event.listens_for(engine, "connect")
    def _limit(connection, _record):
        (n_pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {n_pages + n_more}")

    return lambda: (sa.event.remove(engine, "connect", _limit), engine.dispose())


@pytest.mark.parametrize("n_more", [0, 1, 3, 10])
def test_a_full_disk_is_an_error_that_leaves_everything_as_it_was(store_path, n_more):
    one = big_layout(n_kv_heads=4, head_dim=64)
    tokens = range(600)
    with kvstore.open(store_path, chunk_n_tokens=64) as store:
        store.save_session(computed(tokens[:100], one), tokens[:100], name="a", metadata={"n": 1})
        lift = limit_pages(store, n_more)
        with pytest.raises(DiskFullError, match="no room left"):
            store.save_session(computed(tokens, one), tokens, name="a", metadata={"n": 2})
        assert store.verify().problems == ()
        assert [(row.n_tokens, row.metadata) for row in store.sessions()] == [(100, {"n": 1})]
        load_exact(store, name="a", cache=BytesCache(one))
        with pytest.raises(DiskFullError):
            store.save_session(computed(tokens, one), tokens, name="b")
        lift()
        store.save_session(computed(tokens, one), tokens, name="a", metadata={"n": 2})
        assert load_exact(store, name="a", cache=BytesCache(one)).n_tokens == 599
        assert store.verify().problems == ()


def test_a_new_store_on_a_full_disk_is_an_error(store_path, monkeypatch):
    from kvstore.db import schema

    make_engine = schema.db.make_engine

    def full(*arguments, **options):
        engine = make_engine(*arguments, **options)
        sa.event.listen(engine, "connect", lambda one, _: one.execute("PRAGMA max_page_count = 3"))
        return engine

    monkeypatch.setattr(schema.db, "make_engine", full)
    with pytest.raises(DiskFullError):
        kvstore.open(store_path)
    monkeypatch.undo()
    with kvstore.open(store_path) as store:
        assert store.verify().ok


def test_a_store_whose_creation_was_cut_off_is_made_anew(store_path):
    """As a crash leaves it between writing the pages and deleting the rollback journal."""
    with kvstore.open(store_path):
        pass
    header = bytes.fromhex("d9d505f920a163d7") + bytes(8) + bytes(4)  # no records, 0 pages before
    header += (512).to_bytes(4, "big") + (16384).to_bytes(4, "big")
    with sqlite3.connect(store_path) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    store_path.with_name("sessions.db-journal").write_bytes(header.ljust(512, b"\0"))
    with kvstore.open(store_path) as store:
        save(store, TOKENS, name="a")
        assert store.verify().ok


def failing(store, code):
    error = sqlite3.OperationalError("made up")
    error.sqlite_errorcode = code

    @sa.event.listens_for(store._database.engine, "before_cursor_execute")
    def _fail(*_):
        raise error


@pytest.mark.parametrize(
    "code",
    [value for name, value in vars(sqlite3).items() if name.startswith("SQLITE_IOERR")]
    + [
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_INTERNAL,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_CORRUPT,
    ],
)
def test_whatever_sqlite_reports_arrives_as_an_error_of_ours(store_path, code):
    with kvstore.open(store_path) as store:
        cache = computed(TOKENS)
        failing(store, code)
        for use in (
            store.sessions,
            store.verify,
            lambda: store.load_session(cache, name="a"),
            lambda: store.save_session(cache, TOKENS),
            lambda: store.prune(max_bytes=0),
        ):
            with pytest.raises(KVStoreError):
                use()
        assert_exact(cache, TOKENS)
