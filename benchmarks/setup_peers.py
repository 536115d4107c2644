"""Installs the extra ``bench`` into this environment, one package at a time.

    .venv/bin/python benchmarks/setup_peers.py

A peer that cannot be installed (llama.cpp is compiled: no compiler) is named, and left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib

from measure import ROOT

_CMAKE_ARGS = "-DLLAMA_BUILD_TOOLS=OFF -DGGML_NATIVE=ON"


def main() -> None:
    """Install what can be installed, and say what cannot."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    torch = [pin for pin in extras["executorch"] if pin.startswith("torch==")]
    environment = {
        "CMAKE_ARGS": _CMAKE_ARGS,
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
        **os.environ,
    }
    for requirement in extras["bench"]:
        name = requirement.partition(";")[0]
        print(f"setup: installing the peer {name}", flush=True)
        # torch is named again, so that no peer brings another one along.
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, requirement, *torch],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"setup: {name} cannot be installed, and is left out: {last:.300}")


if __name__ == "__main__":
    main()
