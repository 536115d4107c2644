"""What importing costs, and what is public."""

from __future__ import annotations

import ast
import importlib.resources
import inspect
import json

import pytest

import kvstore

HEAVY = ("torch", "executorch", "numpy", "alembic", "runtime_adapter", "mako")
REPORT = (
    "import json, sys\n"
    f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)\n"
)


def imported_by(run_source, source, *arguments):
    output = run_source(
        f"import io, sys\nsys.stderr = io.StringIO()\n{source}\n{REPORT}\n"
        "print('HEAVY', sys.stderr.getvalue().splitlines()[-1])",
        *arguments,
    )
    return json.loads(output.rpartition("HEAVY ")[2])


def test_importing_the_library_imports_nothing_heavy(run_source):
    assert imported_by(run_source, "import kvstore") == []


@pytest.mark.parametrize("command", [["--help"], ["ls", "{}"], ["verify", "{}"]])
def test_a_command_that_only_looks_imports_nothing_heavy(run_source, store_path, command):
    with kvstore.open(store_path):
        pass
    arguments = [word.format(store_path) for word in command]
    if command == ["--help"]:
        arguments = ["ls", "--help"]
    source = f"from kvstore.cli import main\nmain({arguments!r}, standalone_mode=False)"
    assert imported_by(run_source, source) == []


def test_every_public_name_exists_and_the_list_is_sorted():
    constants_first = sorted(kvstore.__all__, key=lambda name: (not name.isupper(), name))
    assert kvstore.__all__ == constants_first
    assert len(set(kvstore.__all__)) == len(kvstore.__all__)
    for name in kvstore.__all__:
        assert getattr(kvstore, name) is not None


def test_every_name_that_the_package_imports_is_public():
    tree = ast.parse(inspect.getsource(kvstore))
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(kvstore.__all__)


def test_every_public_class_and_function_is_documented():
    for name in kvstore.__all__:
        public = getattr(kvstore, name)
        assert inspect.getdoc(public), name
        if inspect.isclass(public) and public.__module__.startswith("kvstore"):
            for member, value in vars(public).items():
                if not member.startswith("_") and inspect.isfunction(value):
                    assert inspect.getdoc(value), f"{name}.{member}"


def test_the_package_says_that_it_is_typed():
    assert importlib.resources.files("kvstore").joinpath("py.typed").is_file()
