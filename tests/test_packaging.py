"""What an installation promises: names, start-up, entry points, files that travel with the code."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kvstore
from kvstore import _bundle
from kvstore.errors import KVStoreError

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

HEAVY = ("alembic", "executorch", "runtime_adapter", "torch")


def run_python(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter that finds the same kvstore as this one."""
    place = str(Path(kvstore.__file__).resolve().parent.parent)
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {place!r})\n{code}", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def package_name(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0]


def test_migrations_and_schemas_are_found_from_any_folder(tmp_path):
    code = (
        "from kvstore import _bundle\n"
        "print(_bundle.migrations_dir() / 'env.py', _bundle.schemas_dir() / 'schema.sql')"
    )
    done = run_python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for path in done.stdout.split():
        assert Path(path).is_absolute()
        assert Path(path).is_file()


def test_an_incomplete_installation_says_what_is_missing(tmp_path, monkeypatch):
    package = tmp_path / "kvstore"
    (tmp_path / "migrations").mkdir()  # somebody else's: it has no env.py
    monkeypatch.setattr(_bundle, "_PACKAGE", package)
    with pytest.raises(KVStoreError, match=r"incomplete: expected .*env\.py") as caught:
        _bundle.migrations_dir()
    assert "reinstall" in str(caught.value)


def test_the_copy_inside_the_package_wins_over_a_folder_beside_it(tmp_path, monkeypatch):
    package = tmp_path / "kvstore"
    for folder in (package / "_bundle_data" / "schemas", tmp_path / "schemas"):
        folder.mkdir(parents=True)
        (folder / "schema.sql").touch()
    monkeypatch.setattr(_bundle, "_PACKAGE", package)
    assert _bundle.schemas_dir() == package / "_bundle_data" / "schemas"


def test_importing_kvstore_and_its_command_loads_nothing_heavy(tmp_path):
    code = (
        f"import kvstore, kvstore.cli\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = run_python(code, cwd=tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_listing_an_existing_store_loads_nothing_heavy(tmp_path):
    kvstore.open(tmp_path / "sessions.db").close()
    code = (
        "from kvstore.cli import main\n"
        "sys.argv = ['kvstore', 'ls', 'sessions.db']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as done:\n"
        "    code = done.code or 0\n"
        "else:\n"
        "    code = 0\n"
        f"print(code, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = run_python(code, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "0 []"  # above it: a summary line for people


def test_the_base_installation_asks_for_neither_torch_nor_executorch():
    names = {package_name(requirement) for requirement in PROJECT["dependencies"]}
    assert not names & {"torch", "executorch"}


def test_torch_is_pinned_exactly():
    assert "torch==2.13.0" in PROJECT["optional-dependencies"]["executorch"]


def test_the_installed_version_is_the_one_in_pyproject():
    assert importlib.metadata.version("kvstore") == PROJECT["version"]


def test_the_changelog_has_an_entry_for_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{PROJECT['version']}]" in text


def test_every_dependency_is_in_the_third_party_notices():
    text = (ROOT / "THIRD_PARTY_NOTICES.md").read_text(encoding="utf-8")
    extras = PROJECT["optional-dependencies"].values()
    wanted = {package_name(r) for group in (PROJECT["dependencies"], *extras) for r in group}
    assert sorted(name for name in wanted if f"[{name}]" not in text) == []


def test_every_decision_record_is_in_the_index():
    folder = ROOT / "docs" / "adr"
    index = (folder / "README.md").read_text(encoding="utf-8")
    records = sorted(path.name for path in folder.glob("[0-9]*.md"))
    assert records
    assert [name for name in records if f"({name})" not in index] == []


WITHOUT_TORCH = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "executorch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import pytest
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "tests"]))
"""


@pytest.mark.slow
@pytest.mark.checkout
def test_without_torch_and_executorch_the_adapters_tests_are_skipped_and_none_is_an_error():
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.adapter
def test_every_registered_command_loads_and_bears_its_name():
    registered = importlib.metadata.entry_points(group="kvstore.commands")
    assert {entry.name for entry in registered} == {"annotate", "bench", "demo", "inspect"}
    for entry in registered:
        assert entry.load().name == entry.name


@pytest.mark.adapter
def test_help_with_registered_commands_does_not_import_torch(tmp_path):
    code = (
        "from kvstore.cli import main\n"
        "sys.argv = ['kvstore', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "print([n for n in ('torch', 'executorch') if n in sys.modules], file=sys.stderr)"
    )
    done = run_python(code, cwd=tmp_path)
    assert done.stderr.strip() == "[]"
    assert "demo" in done.stdout


@pytest.mark.checkout
def test_git_ignores_nothing_that_is_shipped():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folders = ("kvstore", "migrations", "runtime_adapter", "schemas")
    files = [
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    # --no-index: the rules themselves, not what happens to be tracked already.
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""
