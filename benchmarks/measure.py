"""Timing, and what a benchmark found: interleaved runs, medians with their spread, tables as JSON.

Every script of this folder asks one question, and has the same options:

    python benchmarks/NAME.py [--quick] [--json FILE]

It prints its tables; with ``--json`` it writes what ``report.py`` makes a page and plots of.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "bench"
"""What is made once and kept: exported programs, models, results."""

DASH = "\u2013"

N_CPUS = 2
"""Benchmarks are confined to so many processors where the system can do that."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some measurements, and the least and the greatest of them."""

    median: float
    low: float
    high: float

    def __truediv__(self, other: Spread) -> float:
        """How many times the other median this median is."""
        return self.median / other.median

    def per(self, amount: float) -> Spread:
        """``amount`` a second, where these are the seconds it takes."""
        return Spread(amount / self.median, amount / self.high, amount / self.low)


def spread(values: Iterable[float]) -> Spread:
    """Median and range of ``values``."""
    found = list(values)
    return Spread(statistics.median(found), min(found), max(found))


def timed(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """What is timed: ``run``, after ``before``, which is not."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None


def interleaved(
    contenders: Mapping[str, Contender], *, n_rounds: int, n_warmups: int = 1
) -> dict[str, Spread]:
    """Seconds of each contender: in every round each of them once, in an order that turns.

    So whatever else the machine does meets all of them alike.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(-n_warmups, n_rounds):
        turn = round_index % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            contender = contenders[name]
            if contender.before is not None:
                contender.before()
            gc.collect()
            took = timed(contender.run)
            if round_index >= 0:
                seconds[name].append(took)
    return {name: spread(values) for name, values in seconds.items()}


# ------------------------------------------------------------------ results


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. ``unit``: text, count, ms, s, MB, GB/s, x (a ratio)."""

    key: str
    label: str
    unit: str = "text"


@dataclass(slots=True)
class Table:
    """Rows of cells by column key; a cell is text, a number, a ``Spread`` or None (not measured).

    Seconds and bytes are stored as such, whatever unit the column shows.
    """

    title: str
    columns: tuple[Column, ...]
    note: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **cells: Any) -> None:
        """Add a row and print it."""
        if not self.rows:
            print("\n" + self.title)
            print("  ".join(f"{column.label:>{self._width(column)}}" for column in self.columns))
        self.rows.append(cells)
        texts = (f"{shown(cells.get(c.key), c.unit):>{self._width(c)}}" for c in self.columns)
        print("  ".join(texts), flush=True)

    def _width(self, column: Column) -> int:
        return max(len(column.label), 9 if column.unit == "count" else 18)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What was to be reached, and what was. ``is_met`` is None if it was not measured."""

    wanted: str
    found: str
    is_met: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Lines, ``{label: [(x, y), ...]}``, or bars (``x`` are names) if ``kind`` says so."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[Any, float]]]
    kind: str = "lines"
    is_log: bool = True


@dataclass(slots=True)
class Result:
    """All that one script found."""

    name: str
    question: str
    method: str
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def table(self, title: str, *columns: Column, note: str = "") -> Table:
        """A new table of this result."""
        self.tables.append(Table(title, columns, note))
        return self.tables[-1]

    def target(self, wanted: str, ratio: float | None, bound: float, *, found: str = "") -> None:
        """Judge ``ratio``: it is met at ``bound`` or above. None: it could not be measured."""
        if ratio is None:
            self.targets.append(Target(wanted=wanted, found=found or "not measured", is_met=None))
            return
        text = found or f"{shown(ratio, 'x')}"
        self.targets.append(Target(wanted=wanted, found=text, is_met=ratio >= bound))


def shown(cell: Any, unit: str) -> str:
    """A cell as text, in the column's unit, with its spread if it has one."""
    if cell is None:
        return DASH
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Mapping):
        cell = Spread(**cell)
    if isinstance(cell, Spread):
        return (
            f"{_number(cell.median, unit)} "
            f"({_number(cell.low, unit, bare=True)}{DASH}{_number(cell.high, unit, bare=True)})"
        )
    return _number(cell, unit)


def _number(value: float, unit: str, *, bare: bool = False) -> str:
    if unit == "count":
        return f"{value:,.0f}"
    scaled = value * {"ms": 1e3, "MB": 1e-6, "GB/s": 1e-9}.get(unit, 1.0)
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:,.{digits}f}" + ("x" if unit == "x" and not bare else "")


# ------------------------------------------------------------------ scripts


def arguments_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument("--json", type=Path, help="write the results here too")
    return parser


def confine(n_cpus: int = N_CPUS) -> None:
    """Keep this process, and the threads it will start, on ``n_cpus`` processors."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n_cpus])


def scratch() -> Path:
    """A folder on the disk for what a benchmark writes, beside what is kept."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE


def finish(result: Result, path: Path | None) -> None:
    """Print what was to be reached, and write the JSON."""
    print()
    for note in result.notes:
        print(note)
    for target in result.targets:
        print(f"{verdict(target.is_met):12} {target.wanted}: {target.found}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**asdict(result), "machine": machine()}, indent=1) + "\n")


def verdict(is_met: bool | None) -> str:  # noqa: FBT001  # the field of a Target
    """In one word."""
    return "not measured" if is_met is None else "met" if is_met else "MISSED"


def machine() -> dict[str, str]:
    """Where and with what it was measured."""
    names = ("torch", "executorch", "llama-cpp-python", "safetensors", "mlx", "mlx-lm", "numpy")
    return {
        "processor": _processor(),
        "processors used": str(_n_usable_cpus()),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "load average at the end": f"{os.getloadavg()[0]:.1f}",
        "kvstore": _commit(),
        **{name: version(name) for name in names},
    }


def version(package: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _n_usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version("kvstore")
    return f"{version('kvstore')} at {found}"


def written_nbytes() -> int | None:
    """Bytes that this process handed to the system to write so far; None where not counted."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))
