"""All benchmarks, one after the other, and the page of what they found: ``make bench``.

    python benchmarks/run.py [--quick] [--only restore save] [--codecs exact raw]

Each script runs in a process of its own. One that fails is reported at the end; the others go on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import peers
import report

HERE = Path(__file__).resolve().parent
_WITH_CODECS = ("restore", "disk", "save", "first_token")


def main() -> int:
    """The number of scripts that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument("--only", nargs="+", choices=report.ORDER, default=report.ORDER)
    parser.add_argument("--codecs", nargs="+", help="names for kvstore.open(codec=...)")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    arguments = parser.parse_args()
    for name in peers.NAMES:
        reason = peers.not_installed(name)
        print(f"peer {name}: {reason or 'installed'}", flush=True)
    arguments.results.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.only:
        target = arguments.results / f"{name}.json"
        target.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(target)]
        command += ["--quick"] if arguments.quick else []
        if arguments.codecs and name in _WITH_CODECS:
            command += ["--codecs", *arguments.codecs]
        print(f"\n=== {name}", flush=True)
        began = time.monotonic()
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
        print(f"--- {name}: {time.monotonic() - began:.0f} s", flush=True)
    subprocess.run(
        [sys.executable, str(HERE / "report.py"), "--results", str(arguments.results)], check=False
    )
    if failed:
        print(f"FAILED: {' '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
