#!/usr/bin/env python3
"""Makes, completes or reuses a virtual environment with kvstore installed for development.

    python3 .ci/make_env.py [--env .venv] [--executorch 1.5.1] [--dev] [--explicit]

A second call finds the stamp of the first and returns at once. This file is
run by whatever ``python3`` a machine has, so that an old one gets a clear
message: it uses the standard library only, and no syntax newer than 3.6.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Iterator  # noqa: UP035 - see above: old interpreters run this file

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 4.0
HEARTBEAT_SECONDS = 20.0
APT_LINE = "sudo apt install git make python3 python3-venv"


class SetupError(Exception):
    """The environment cannot be made; the message is for the person who asked."""


def say(text: str) -> None:
    """Print one line of progress at once, also into a pipe."""
    print("setup: " + text, flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default=".venv", help="folder, relative to the project")
    parser.add_argument("--executorch", default="1.5.1", help="exact version to install")
    parser.add_argument("--dev", action="store_true", help="linters and build tools too")
    parser.add_argument(
        "--explicit",
        action="store_true",
        help="this interpreter was chosen on purpose: rebuild an environment made by another",
    )
    return parser.parse_args()


def stamp_key(executorch: str) -> str:
    """What an environment depends on, as one hash.

    The project's path is part of it: scripts in an environment, and an editable
    install, hold absolute paths and break when the folder is moved.
    """
    parts = [(ROOT / "pyproject.toml").read_bytes(), Path(__file__).read_bytes()]
    parts += [str(ROOT).encode(), executorch.encode(), TORCH.encode()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def read_stamp(path: Path) -> dict:
    """The stamp of a finished setup, or an empty dict."""
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def check_interpreter() -> None:
    """Refuse a Python that is too old, or one without the venv module."""
    found = "{}.{}.{}".format(*sys.version_info[:3])
    if sys.version_info[:2] < OLDEST_PYTHON:
        newer = [name for name in ("python3.13", "python3.12", "python3.11") if shutil.which(name)]
        hint = "make setup PYTHON=" + (newer[0] if newer else "python3.12")
        raise SetupError(
            f"expected Python 3.11 or newer, found {found} ({sys.executable}). "
            f"Install one (Debian 12 or Ubuntu 24.04: {APT_LINE}) or name it: {hint}"
        )
    try:
        import ensurepip  # noqa: F401 - Debian leaves it out of python3; venv needs it
        import venv  # noqa: F401
    except ImportError:
        raise SetupError(
            f"Python {found} has no venv module. On Debian and Ubuntu: {APT_LINE} "
            "(or python{}.{}-venv for another Python)".format(*sys.version_info[:2])
        ) from None


def reachable(url: str) -> bool:
    """Whether ``url`` answers within a few seconds, name look-up included."""
    answers = []

    def probe() -> None:
        # Whatever goes wrong, the answer is the same: not reachable.
        with contextlib.suppress(Exception):
            answer = urllib.request.urlopen(url, timeout=PROBE_SECONDS)  # noqa: S310 - our constant
            answers.append(answer.status)
            answer.close()

    # A thread, because the name look-up obeys no socket timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers == [200]


class Installer:
    """Runs commands quietly, with a log and a heartbeat."""

    def __init__(self, env: Path) -> None:
        self.python = env / "bin" / "python"
        self.log = env / "setup.log"
        self._n_tail_lines = 25

    def has(self, pin: str) -> bool:
        """Whether the exact version ``pin`` is there, also as a local build (2.13.0+cpu)."""
        name, version = pin.split("==")
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        try:
            found = subprocess.check_output(
                [str(self.python), "-c", code], stderr=subprocess.DEVNULL
            )
        except subprocess.CalledProcessError:
            return False
        return found.decode().strip().split("+")[0] == version

    def pip_install(self, what: str, arguments: list) -> None:
        """Install ``arguments``; raise SetupError with the end of the log if that fails."""
        command = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check"]
        self.run(what, [*command, "--no-input", "--progress-bar=off", *arguments])

    def run(self, what: str, command: list) -> None:
        """Run ``command``, saying ``what`` is done and, every so often, that it still is."""
        say(what)
        start = time.monotonic()
        with self.log.open("a", encoding="utf-8") as log:
            log.write("$ " + " ".join(command) + "\n")
            log.flush()
            process = subprocess.Popen(
                command, cwd=str(ROOT), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            try:
                while True:
                    try:
                        code = process.wait(timeout=HEARTBEAT_SECONDS)
                        break
                    except subprocess.TimeoutExpired:
                        say(f"  ... still at it, {time.monotonic() - start:.0f} s")
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if code != 0:
            tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            raise SetupError(
                "failed: {}\n{}\n(the whole log: {})".format(
                    what, "\n".join("  | " + line for line in tail[-self._n_tail_lines :]), self.log
                )
            )


def install_torch(installer: Installer) -> None:
    """Install the pinned torch, from PyTorch's CPU builds where they can be reached."""
    if installer.has(TORCH):
        return
    index = os.environ.get("TORCH_INDEX_URL", "")
    wanted = sys.platform.startswith("linux")  # elsewhere PyPI's builds are CPU builds
    if not index and wanted and reachable(TORCH_CPU_INDEX + "/torch/"):
        index = TORCH_CPU_INDEX
    if index:
        try:
            installer.pip_install(f"installing {TORCH} from {index}", [TORCH, "--index-url", index])
        except SetupError as error:
            if "TORCH_INDEX_URL" in os.environ:
                raise
            say(f"that did not work; trying pip's own configuration. {error}")
        else:
            return
    elif wanted:
        say(f"{TORCH_CPU_INDEX} cannot be reached; using pip's own configuration")
        say("  (on Linux x86-64, PyPI's torch brings CUDA along and takes some gigabytes;")
        say("  TORCH_INDEX_URL=... names another index with CPU builds)")
    installer.pip_install(f"installing {TORCH}", [TORCH])


def python_of(env: Path) -> str:
    """The environment's Python as "3.12"; empty if it is broken, moved or too old."""
    try:
        # Scripts hold the absolute path of the interpreter that they were made for.
        if str(env).encode() not in (env / "bin" / "pip").read_bytes()[:4096]:
            return ""
    except OSError:
        return ""
    code = "import pip, sys; print('{}.{}'.format(*sys.version_info)); sys.exit(sys.version_info < "
    command = [str(env / "bin" / "python"), "-c", code + f"{OLDEST_PYTHON})"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL).decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def make(env: Path, options: argparse.Namespace, stamp_path: Path) -> None:
    """Make ``env`` or bring it up to date with ``pyproject.toml``, then stamp it."""
    start = time.monotonic()
    key = stamp_key(options.executorch)
    stamp = read_stamp(stamp_path)
    this_python = "{}.{}".format(*sys.version_info[:2])
    python = python_of(env)
    if not python or (options.explicit and python != this_python):
        check_interpreter()
        if env.exists():
            say(f"removing {env.name}: it is broken, moved, or made by another Python")
            # Moved out of the way first: an interrupted removal must not look like an environment.
            removed = env.with_name(env.name + "-removed")
            shutil.rmtree(str(removed), ignore_errors=True)
            env.rename(removed)
            shutil.rmtree(str(removed), ignore_errors=True)
        stamp = {}
        python = this_python
        say("making {} with Python {}.{}.{}".format(env.name, *sys.version_info[:3]))
        code = subprocess.call([sys.executable, "-m", "venv", str(env)], stdin=subprocess.DEVNULL)
        if code != 0:
            raise SetupError(f"python -m venv failed; on Debian and Ubuntu: {APT_LINE}")
    # A stamp says "finished": it goes before the first change and comes back last.
    with contextlib.suppress(FileNotFoundError):
        stamp_path.unlink()
    installer = Installer(env)
    if stamp.get("key") != key:
        install_torch(installer)
        installer.pip_install(
            f"installing kvstore in editable mode, with executorch {options.executorch}",
            ["-e", ".[executorch,test]", f"executorch=={options.executorch}"],
        )
    if options.dev:
        installer.pip_install("installing the linters and build tools", ["-e", ".[dev]"])
    dev = options.dev or (stamp.get("key") == key and stamp.get("dev", False))
    text = json.dumps({"dev": dev, "key": key, "python": python})
    partial = stamp_path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(stamp_path)
    say(f"{env.name} is ready, {time.monotonic() - start:.0f} s")


@contextlib.contextmanager
def lock(path: Path) -> "Iterator[None]":
    """Hold an exclusive lock on ``path``: two makes in one folder take turns."""
    import fcntl

    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another setup is running in this folder; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def is_ready(env: Path, options: argparse.Namespace, stamp_path: Path) -> bool:
    """Whether a finished setup can be used as it is."""
    stamp = read_stamp(stamp_path)
    version = "{}.{}".format(*sys.version_info[:2])
    return (
        stamp.get("key") == stamp_key(options.executorch)
        and (stamp.get("dev", False) or not options.dev)
        and (stamp.get("python") == version or not options.explicit)
        and os.access(str(env / "bin" / "python"), os.X_OK)
    )


def main() -> int:
    """Make the environment unless it is there; 0 on success."""
    options = parse_arguments()
    env = ROOT / options.env
    stamp_path = env / "kvstore-setup.json"
    if is_ready(env, options, stamp_path):
        return 0
    cache = ROOT / ".cache"
    try:
        cache.mkdir(exist_ok=True)
        with lock(cache / (env.name.lstrip(".") + ".lock")):
            if not is_ready(env, options, stamp_path):
                make(env, options, stamp_path)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"setup: {error}; is the project folder writable?", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
