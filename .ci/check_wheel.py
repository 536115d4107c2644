"""Builds sdist and wheel, installs the wheel into a clean environment, and uses it there.

    python .ci/check_wheel.py        (from an environment with the ``dev`` extra)

What is proven: the wheel is built from the sdist alone; it carries migrations,
schemas and the demo's files; nothing but ``kvstore`` and ``runtime_adapter``
becomes importable; the command works without torch and starts fast; and the tests of
what the wheel carries (migrations, schemas, the command) pass against it, far
from the checkout. Then, with the ``executorch`` extra, the demo.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

import make_env  # beside this file

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"kvstore", "runtime_adapter"}
CARRIED = (
    "kvstore/py.typed",
    "kvstore/_bundle_data/migrations/env.py",
    "kvstore/_bundle_data/migrations/script.py.mako",
    "kvstore/_bundle_data/schemas/FORMAT.md",
    "kvstore/_bundle_data/schemas/schema.sql",
    "runtime_adapter/py.typed",
    "runtime_adapter/demo/prompt.txt",
)
TESTS = ("store", "format", "packaging", "imports", "cli", "verify")
"""The tests that stand or fall with the wheel's content; the others read code alone."""

NEVER_IMPORTED = ("alembic", "executorch", "runtime_adapter", "torch")
START_SECONDS = 0.5
START_RATIO = 2.0


class CheckError(Exception):
    """Something about the wheel is not as promised."""


def run(*command: str | Path, cwd: Path, quiet: bool = False) -> str:
    """Standard output of ``command``; CheckError with all output if it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if not quiet or done.returncode != 0:
        print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        shown = " ".join(str(part) for part in command)
        raise CheckError(f"exit code {done.returncode} from: {shown}")
    return done.stdout


def fastest(*command: str | Path, cwd: Path) -> float:
    """The wall time of the fastest of five runs of ``command``, in seconds."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run(*command, cwd=cwd, quiet=True)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def build(out: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it; return both paths."""
    # The build backend comes with the dev extra: no second download.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out, quiet=True)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def check_names(wheel: Path) -> None:
    """The wheel has what it must carry, and nothing that it must not."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    strangers = {top for top in tops - PACKAGES if not top.endswith(".dist-info")}
    if strangers:
        raise CheckError(f"expected only {sorted(PACKAGES)} at the top, found {sorted(strangers)}")
    missing = [name for name in CARRIED if name not in names]
    if not any(
        name.startswith("runtime_adapter/demo/") and name.endswith(".pte") for name in names
    ):
        missing.append("runtime_adapter/demo/*.pte")
    if not any("/_bundle_data/migrations/versions/" in name for name in names):
        missing.append("kvstore/_bundle_data/migrations/versions/*.py")
    if missing:
        raise CheckError(f"the wheel lacks {', '.join(missing)}")
    litter = [name for name in names if "__pycache__" in name or name.startswith("tests")]
    if litter:
        raise CheckError(f"the wheel carries {', '.join(litter)}")
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 2**20:.1f} MiB")


def check_imports(python: Path, cwd: Path) -> None:
    """No torch in the environment, and no new top-level name but ours."""
    code = f"""
import importlib.metadata, importlib.util, sys
import kvstore
loaded = [name for name in {NEVER_IMPORTED!r} if name in sys.modules]
present = [name for name in ("torch", "executorch") if importlib.util.find_spec(name)]
leaked = [name for name in ("migrations", "schemas", "tests") if importlib.util.find_spec(name)]
files = importlib.metadata.files("kvstore")
tops = {{file.parts[0] for file in files if file.suffix == ".py"}}
if loaded or present or leaked or tops != {PACKAGES!r}:
    sys.exit(f"loaded {{loaded}}, present {{present}}, leaked {{leaked}}, top level {{tops}}")
"""
    run(python, "-c", code, cwd=cwd)


def check_command(binary: Path, python: Path, cwd: Path) -> None:
    """``kvstore --help`` and ``kvstore ls`` work and start fast."""
    run(binary, "--help", cwd=cwd, quiet=True)
    code = "import kvstore; kvstore.open('wheel.db').close()"
    run(python, "-c", code, cwd=cwd)
    seconds = fastest(binary, "ls", "wheel.db", cwd=cwd)
    yardstick = fastest(python, "-c", "import sqlalchemy.dialects.sqlite", cwd=cwd)
    print(f"kvstore ls: {seconds:.2f} s (importing SQLAlchemy alone: {yardstick:.2f} s)")
    # A busy machine slows both: then the ratio has to do.
    if seconds > START_SECONDS and seconds > START_RATIO * yardstick:
        raise CheckError(
            f"expected kvstore ls within {START_SECONDS} s or {START_RATIO} times the import "
            f"of SQLAlchemy, found {seconds:.2f} s and {seconds / yardstick:.1f} times; "
            "look for a new import with python -X importtime"
        )


def check_tests(sdist: Path, python: Path, cwd: Path) -> None:
    """The sdist's own ``TESTS`` pass against the installed wheel."""
    with tarfile.open(sdist) as archive:
        archive.extractall(cwd / "sdist", filter="data")
    (tree,) = (cwd / "sdist").iterdir()
    # Only the installed wheel is left to import from and to find migrations in.
    for name in ("kvstore", "runtime_adapter", "migrations"):
        shutil.rmtree(tree / name)
    run(
        *(python, "-m", "pytest", "-q", "-m", "not slow and not adapter and not checkout"),
        *("-p", "no:cacheprovider", "-n", "auto"),
        *(f"tests/test_{name}.py" for name in TESTS),
        cwd=tree,
    )


def check_executorch_extra(python: Path, wheel: Path, cwd: Path) -> None:
    """With the ``executorch`` extra the same wheel opens and runs a program: the demo."""
    installer = make_env.Installer(python.parent.parent)
    make_env.install_torch(installer)  # a CPU build where one can be had
    installer.pip_install("installing the executorch extra", [f"{wheel}[executorch]"])
    shown = run(python.parent / "kvstore", "demo", "--json", cwd=cwd, quiet=True)
    result = json.loads(shown)
    if not (result["is_same_text"] and result["is_same_bytes"] and result["problem"] is None):
        raise CheckError(f"the demo from the wheel: {result['problem']}")
    print(f"kvstore demo: {result['restored']['n_restored_tokens']} tokens restored, all the same")


def main() -> int:
    """Run every check; 0 if all hold."""
    with tempfile.TemporaryDirectory(prefix="kvstore-wheel-") as folder:
        work = Path(folder)
        try:
            sdist, wheel = build(work)
            check_names(wheel)
            venv.create(work / "env", with_pip=True)
            binaries = work / "env" / "bin"
            python = binaries / "python"
            pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
            run(*pip, wheel, cwd=work, quiet=True)
            check_imports(python, work)
            check_command(binaries / "kvstore", python, work)
            run(*pip, f"{wheel}[test]", cwd=work, quiet=True)
            check_tests(sdist, python, work)
            check_executorch_extra(python, wheel, work)
        except make_env.SetupError as error:
            print(f"check_wheel: {error}", file=sys.stderr)
            return 1
        except CheckError as error:
            print(f"check_wheel: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
