"""Makes a page of tables and plots from what the benchmarks wrote.

    python benchmarks/report.py [--results .cache/bench/results] [--docs]

Writes ``report.md`` and ``*.png`` beside the results; with ``--docs`` the same as
``docs/benchmarks.md`` and ``docs/img/``. Plots need matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measure import CACHE, ROOT, shown, verdict

ORDER = ("restore", "disk", "save", "first_token", "overhead", "restart", "edit")
RESULTS = CACHE / "results"
BUSY = 1.6
"""Load a processor above which a run says that it was disturbed."""
_HEAD = """# Benchmarks

<!-- Written by benchmarks/report.py from the last run; edit that, not this. -->

`make bench` measures all of this on your machine, beside the peers, and writes the same page into
`.cache/bench/results`; `make bench BENCH_ARGS=--quick` does so in a few minutes, with fewer sizes
and rounds. The peers come with the extra `bench` (`pip install '.[executorch,bench]'`; `make bench`
installs it, one by one: llama.cpp is compiled, which needs a C++ compiler and some minutes). One
that cannot be installed is reported as such. `make bench-docs` refreshes this page from the last
run.

Every number is a median of interleaved runs; in brackets the least and the greatest. A ratio says
how many times as long (or as many bytes) the peer takes as what stands in that row: above 1 the row
wins, below 1 it loses. What is simulated is called so.
"""


def main() -> None:
    """Write the page, and say where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help="refresh docs/benchmarks.md")
    arguments = parser.parse_args()
    results = read(arguments.results)
    if not results:
        raise SystemExit(f"expected results in {arguments.results}, found none; run make bench")
    page, images = arguments.results / "report.md", arguments.results
    if arguments.docs:
        page, images = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "img"
    drawn = draw_all(results, images)
    links = {name: path.relative_to(page.parent).as_posix() for name, path in drawn.items()}
    page.write_text(markdown(results, links), encoding="utf-8")
    print(page)


def read(folder: Path) -> list[dict[str, Any]]:
    """The results that are there, in the page's order."""
    paths = (folder / f"{name}.json" for name in ORDER)
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def markdown(results: list[dict[str, Any]], images: dict[str, str]) -> str:
    """The page."""
    parts = [_HEAD, "## What was to be reached\n", targets(results), "## Where\n"]
    machine = results[-1]["machine"]
    parts.append("\n".join(f"- {what}: {found}" for what, found in machine.items()) + "\n")
    loads = [float(result["machine"].get("load average at the end", 0)) for result in results]
    if max(loads) > BUSY * float(machine["processors used"]):
        parts.append(
            f"**This machine was busy with other work (load average up to {max(loads):.0f}): all "
            "times are too long, and ratios between them uncertain.**\n"
        )
    for result in results:
        parts += [f"## {result['question']}\n", f"`benchmarks/{result['name']}.py`. "]
        parts[-1] += result["method"].strip() + "\n"
        parts += [note + "\n" for note in result["notes"]]
        for table in result["tables"]:
            if table["rows"]:
                parts.append(table_text(table))
        parts += [
            f"![{plot['title']}]({images[plot['name']]})\n"
            for plot in result["plots"]
            if plot["name"] in images
        ]
    return "\n".join(parts)


def targets(results: list[dict[str, Any]]) -> str:
    """What was wanted beside what was found, missed ones included."""
    lines = ["| wanted | found | |", "|---|---|---|"]
    lines += [
        f"| {target['wanted']} | {target['found']} | {verdict(target['is_met'])} |"
        for result in results
        for target in result["targets"]
    ]
    return "\n".join(lines) + "\n"


def table_text(table: dict[str, Any]) -> str:
    """One table, with its title; columns that are empty throughout are left out."""
    rows = table["rows"]
    columns = [
        column
        for column in table["columns"]
        if any(row.get(column["key"]) not in (None, "") for row in rows)
    ]
    lines = [f"**{table['title']}**", ""]
    lines.append("| " + " | ".join(column["label"] for column in columns) + " |")
    lines.append("|" + "|".join("---" if c["unit"] == "text" else "--:" for c in columns) + "|")
    for row in rows:
        cells = (shown(row.get(column["key"]), column["unit"]) for column in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------- plots


def draw_all(results: list[dict[str, Any]], folder: Path) -> dict[str, Path]:
    """PNG files by plot name; none without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("matplotlib is not installed: no plots")
        return {}
    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for result in results:
        for plot in result["plots"]:
            if any(plot["series"].values()):
                drawn[plot["name"]] = folder / f"bench-{plot['name']}.png"
                draw(plot, drawn[plot["name"]])
    return drawn


def draw(plot: dict[str, Any], path: Path) -> None:
    """One plot."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=90)
    series = {label: points for label, points in plot["series"].items() if points}
    if plot["kind"] == "bars":
        names = list(dict.fromkeys(x for points in series.values() for x, _ in points))
        width = 0.8 / len(series)
        for index, (label, points) in enumerate(series.items()):
            places = [names.index(x) + (index - (len(series) - 1) / 2) * width for x, _ in points]
            axes.bar(places, [y for _, y in points], width, label=label)
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axes.axhline(1.0, color="black", linewidth=0.8)
    else:
        for label, points in series.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        if plot["is_log"]:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            ticks = sorted({x for points in series.values() for x, _ in points})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks], rotation=30)
            axes.minorticks_off()
        else:
            axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_title(plot["title"], fontsize=10)
    axes.set_xlabel(plot["x_label"])
    axes.set_ylabel(plot["y_label"])
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
