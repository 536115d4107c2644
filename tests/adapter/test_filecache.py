from __future__ import annotations

import json
import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest

from kvstore.errors import InputError, ProgramError
from runtime_adapter.userdir import copies, filecache
from runtime_adapter.userdir.copies import evict_copies, named_copy
from runtime_adapter.userdir.filecache import FileCache, ProgramIdentity, default_directory

ANALYSIS = {"method": "forward", "tensors": [1, 2, 3]}


def write_program(path: Path, text: bytes = b"instructions") -> Path:
    """A file that begins like a program; nothing here looks further."""
    path.write_bytes(b"\0\0\0\0ET12" + text)
    settle(path)
    return path


def settle(path: Path) -> None:
    """Wait until a further change of ``path`` would show in its times."""
    newest = max(path.stat().st_mtime_ns, path.stat().st_ctime_ns)
    while time.time_ns() <= newest + filecache._RACY_NS:
        time.sleep(0.001)


@pytest.fixture
def files(tmp_path: Path) -> FileCache:
    return FileCache(tmp_path / "cache")


def copy_of(text: bytes = b"a copy") -> copies.Callable[[Path], None]:
    def write(path: Path) -> None:
        assert not path.exists()
        path.write_bytes(b"\0\0\0\0ET12" + text)

    return write


def never(path: Path) -> None:
    raise AssertionError(f"{path} was written again")


# ------------------------------------------------------------------ directory


def test_the_variable_chooses_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_CACHE_DIR", "/somewhere/else")
    assert default_directory() == Path("/somewhere/else")


def test_the_platform_chooses_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSTORE_CACHE_DIR", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_directory() == Path("/xdg/kvstore")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert default_directory() == Path.home() / ".cache/kvstore"
    monkeypatch.setattr("sys.platform", "darwin")
    assert default_directory() == Path.home() / "Library/Caches/kvstore"


# ------------------------------------------------------------------- analyses


def test_an_analysis_is_recalled_for_the_same_file(tmp_path: Path, files: FileCache) -> None:
    identity = ProgramIdentity.of(write_program(tmp_path / "a.pte"))
    assert files.recall(identity, method="forward") is None
    files.remember(identity, method="forward", analysis=ANALYSIS)
    assert files.recall(identity, method="forward") == ANALYSIS
    assert files.recall(identity, method="decode") is None


def test_a_renamed_file_is_known_and_another_of_its_name_is_not(
    tmp_path: Path, files: FileCache
) -> None:
    path = write_program(tmp_path / "a.pte")
    files.remember(ProgramIdentity.of(path), method="forward", analysis=ANALYSIS)
    write_program(tmp_path / "b.pte").replace(path)
    assert files.recall(ProgramIdentity.of(path), method="forward") is None


def test_a_file_changed_in_place_with_size_and_mtime_kept_is_not_known(
    tmp_path: Path, files: FileCache
) -> None:
    path = write_program(tmp_path / "a.pte", b"one")
    before = path.stat()
    files.remember(ProgramIdentity.of(path), method="forward", analysis=ANALYSIS)
    path.write_bytes(b"\0\0\0\0ET12two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files.recall(ProgramIdentity.of(path), method="forward") is None


def test_the_data_file_is_part_of_the_identity(tmp_path: Path, files: FileCache) -> None:
    path = write_program(tmp_path / "a.pte")
    data = tmp_path / "a.ptd"
    data.write_bytes(b"weights")
    settle(data)
    files.remember(ProgramIdentity.of(path, data_path=data), method="forward", analysis=ANALYSIS)
    assert files.recall(ProgramIdentity.of(path), method="forward") is None
    data.write_bytes(b"others!")
    assert files.recall(ProgramIdentity.of(path, data_path=data), method="forward") is None


def test_a_file_written_this_instant_is_not_remembered(tmp_path: Path, files: FileCache) -> None:
    path = tmp_path / "a.pte"
    path.write_bytes(b"\0\0\0\0ET12")
    now = time.time_ns()
    os.utime(path, ns=(now, now))
    identity = ProgramIdentity.of(path)
    files.remember(identity, method="forward", analysis=ANALYSIS)
    assert files.recall(identity, method="forward") is None


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"null", b'{"format": 99}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_damaged_entry_is_ignored_and_written_again(
    tmp_path: Path, files: FileCache, damage: bytes
) -> None:
    identity = ProgramIdentity.of(write_program(tmp_path / "a.pte"))
    files.remember(identity, method="forward", analysis=ANALYSIS)
    (entry,) = (files.directory / "analyses").iterdir()
    entry.write_bytes(damage)
    assert files.recall(identity, method="forward") is None
    files.remember(identity, method="forward", analysis=ANALYSIS)
    assert files.recall(identity, method="forward") == ANALYSIS


def test_an_entry_moved_to_another_files_place_is_ignored(tmp_path: Path, files: FileCache) -> None:
    one = ProgramIdentity.of(write_program(tmp_path / "a.pte", b"one"))
    two = ProgramIdentity.of(write_program(tmp_path / "b.pte", b"two"))
    files.remember(one, method="forward", analysis=ANALYSIS)
    (entry,) = (files.directory / "analyses").iterdir()
    entry.rename(files._analysis_path(two, "forward"))
    assert files.recall(two, method="forward") is None


def test_an_entry_of_another_version_of_the_adapter_is_ignored(
    tmp_path: Path, files: FileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = ProgramIdentity.of(write_program(tmp_path / "a.pte"))
    files.remember(identity, method="forward", analysis=ANALYSIS)
    monkeypatch.setattr(filecache, "_adapter_hash", lambda: "another")
    assert files.recall(identity, method="forward") is None


def test_a_change_in_any_source_that_analyses_makes_another_version(tmp_path: Path) -> None:
    module = tmp_path / "layout.py"
    package = tmp_path / "package"
    (package / "classifiers").mkdir(parents=True)
    sources = [package / "roles.py", package / "classifiers" / "window.py", module]
    for source in sources:
        source.write_text("one")
    seen = {filecache.sources_hash(package, module)}
    for source in sources:
        source.write_text("two")
        seen.add(filecache.sources_hash(package, module))
    assert len(seen) == 1 + len(sources)


def test_analyses_do_not_pile_up(
    tmp_path: Path, files: FileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filecache, "_MAX_N_ANALYSES", 2)
    for number in range(4):
        identity = ProgramIdentity.of(write_program(tmp_path / "a.pte", b"%d" % number))
        files.remember(identity, method="forward", analysis=ANALYSIS)
        settle(files._analysis_path(identity, "forward"))
    assert len(list((files.directory / "analyses").iterdir())) == 2
    assert files.recall(identity, method="forward") == ANALYSIS


def test_what_cannot_be_remembered_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    files = FileCache(tmp_path / "file" / "cache")
    identity = ProgramIdentity.of(write_program(tmp_path / "a.pte"))
    files.remember(identity, method="forward", analysis=ANALYSIS)
    assert files.recall(identity, method="forward") is None


def test_only_the_user_can_look_into_the_folders(tmp_path: Path, files: FileCache) -> None:
    identity = ProgramIdentity.of(write_program(tmp_path / "a.pte"))
    files.remember(identity, method="forward", analysis=ANALYSIS)
    with named_copy(files.directory, "a", write=copy_of()):
        pass
    for folder in ("analyses", "named"):
        assert stat.S_IMODE((files.directory / folder).stat().st_mode) == 0o700


# --------------------------------------------------------------- named copies


def test_a_copy_is_made_once(tmp_path: Path) -> None:
    with named_copy(tmp_path, "a", write=copy_of()) as first:
        assert first.read_bytes().endswith(b"a copy")
    with named_copy(tmp_path, "a", write=never) as second:
        assert second == first


@pytest.mark.parametrize("loss", ["copy", "entry", "changed", "torn"])
def test_a_copy_that_is_not_as_it_was_left_is_made_again(tmp_path: Path, loss: str) -> None:
    with named_copy(tmp_path, "a", write=copy_of()) as path:
        pass
    if loss == "copy":
        path.unlink()
    elif loss == "entry":
        path.with_suffix(".json").unlink()
    elif loss == "changed":
        path.write_bytes(b"\0\0\0\0ET12b copy")
    else:
        path.write_bytes(b"")
    with named_copy(tmp_path, "a", write=copy_of(b"made again")) as path:
        assert path.read_bytes().endswith(b"made again")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ProgramError, match=r"No space left.*named_copy="):
        named_copy(tmp_path, "a", write=write).__enter__()
    assert [path.name for path in (tmp_path / "named").iterdir()] == ["a.lock"]


def test_the_least_recently_used_copies_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in "abc":
        with named_copy(tmp_path, key, write=copy_of(bytes(92))) as path:
            settle(path.with_suffix(".json"))
    with named_copy(tmp_path, "a", write=never):  # used again: now b is the oldest
        pass
    monkeypatch.setenv("KVSTORE_CACHE_MAX_BYTES", "300")
    with named_copy(tmp_path, "d", write=copy_of(bytes(92))):
        pass
    assert sorted(path.stem for path in (tmp_path / "named").glob("*.pte")) == ["a", "c", "d"]


def test_the_copy_being_opened_stays_even_if_it_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_CACHE_MAX_BYTES", "0")
    with named_copy(tmp_path, "a", write=copy_of()) as path:
        assert path.exists()
        evict_copies(path.parent, cap_nbytes=0, keep="another")
        assert path.exists()  # it is held by us
    evict_copies(path.parent, cap_nbytes=0, keep="another")
    assert not path.exists()


@pytest.mark.parametrize("text", ["8 GiB", "-1", "1e9", "\u0665"])
def test_a_cap_that_is_no_number_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("KVSTORE_CACHE_MAX_BYTES", text)
    with pytest.raises(InputError, match="expected a number of bytes"):
        named_copy(tmp_path, "a", write=never).__enter__()


def test_litter_of_a_killed_process_is_removed_after_a_day(tmp_path: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    old, young = folder / "a.1.tmp", folder / "b.2.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    with named_copy(tmp_path, "c", write=copy_of()):
        pass
    assert young.exists()
    assert not old.exists()


def test_an_unusable_directory_is_replaced_by_a_private_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with named_copy(tmp_path / "file", "a", write=copy_of()) as path:
        assert path.exists()
        assert tmp_path not in path.parents
    assert "removed at exit" in caplog.text
    path.unlink()


def _race(directory: str, barrier: object, results: object) -> None:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(b"\0\0\0\0ET12")
            for _ in range(20):
                file.write(b"x" * 1000)
                file.flush()
                time.sleep(0.001)
        results.put("written")  # type: ignore[attr-defined]

    barrier.wait()  # type: ignore[attr-defined]
    for _ in range(5):
        with named_copy(Path(directory), "a", write=write) as path:
            results.put(path.stat().st_size)  # type: ignore[attr-defined]


def test_racing_processes_make_one_whole_copy(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [
        context.Process(target=_race, args=(str(tmp_path), barrier, results)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in range(16)]
    for worker in workers:
        worker.join()
    assert found.count("written") == 1
    assert found.count(20_008) == 15


def test_entries_are_plain_json(tmp_path: Path, files: FileCache) -> None:
    identity = ProgramIdentity.of(write_program(tmp_path / "a.pte"))
    files.remember(identity, method="forward", analysis=ANALYSIS)
    (entry,) = (files.directory / "analyses").iterdir()
    assert json.loads(entry.read_text())["analysis"] == ANALYSIS
