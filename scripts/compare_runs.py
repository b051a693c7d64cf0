"""Compare finished runs: one table row a run, and their curves in one picture.

    python scripts/compare_runs.py Output/sweep/* --picture Output/sweep/curves.png

Columns: the best held-out value and where it was reached, the last one, parameters, seconds, and
every argument that is not the same in all runs. What is best, and which way, each run says itself
(summary.json).
"""

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import RunFolder, atomic_path, parse_args_text

UNINTERESTING = ("output_dir", "num_workers", "data_path", "device")


def read_run(folder: Path) -> dict:
    with open(folder / RunFolder.METRICS, newline="") as file:
        history = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    try:
        summary = json.loads((folder / RunFolder.SUMMARY).read_text("utf-8"))
        column, counter = summary["headline"], next(iter(history[0]))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{folder} holds no finished epoch, or no {RunFolder.SUMMARY}.") from error
    choose = max if summary["higher_is_better"] else min
    best = choose(history, key=lambda row: row[column])
    return {
        "folder": folder,
        "args": parse_args_text((folder / RunFolder.ARGS).read_text("utf-8")),
        "history": history,
        "column": column,
        "counter": counter,  # "epoch", or "K"
        "value": best[column] if summary["higher_is_better"] else -best[column],
        "cells": {
            "run": str(folder),
            f"best {column}": f"{best[column]:.2f}",
            "at": f"{counter} {best[counter]:.0f}",
            f"last {column}": f"{history[-1][column]:.2f}",
            "parameters": f"{summary['parameters']:,}",
            "seconds": f"{summary['seconds']:.1f}",
        },
    }


def format_table(rows: list[dict[str, str]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{c: row.get(c, "") for c in columns} for row in rows]
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    lines = [" | ".join(c.ljust(widths[c]) for c in columns)]
    lines.append(" | ".join("-" * widths[c] for c in columns))
    lines += [" | ".join(row[c].ljust(widths[c]) for c in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def draw(runs: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for run in runs:
        xs = [row[run["counter"]] for row in run["history"]]
        axis.plot(xs, [row[run["column"]] for row in run["history"]], "o-", markersize=3)
    axis.legend([run["folder"].name for run in runs], fontsize=8, loc="lower right")
    axis.set(xlabel=runs[0]["counter"], ylabel=runs[0]["column"])
    axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="run folders; others are skipped")
    parser.add_argument("--picture", type=Path, help="draw the curves here")
    args = parser.parse_args(argv)
    folders = [folder for folder in args.folders if (folder / RunFolder.METRICS).is_file()]
    try:
        runs = [read_run(folder) for folder in folders]
    except ValueError as error:
        parser.error(str(error))
    if not runs:
        parser.error(f"none of these folders holds a run ({RunFolder.METRICS}).")
    if len({run["column"] for run in runs}) > 1:
        parser.error("these runs were measured by different metrics: compare them apart.")
    names = dict.fromkeys(name for run in runs for name in run["args"])
    differing = [
        name
        for name in names
        if name not in UNINTERESTING and len({run["args"].get(name) for run in runs}) > 1
    ]
    runs.sort(key=lambda run: -run["value"])
    print(
        format_table(
            [run["cells"] | {n: run["args"].get(n, "") for n in differing} for run in runs]
        )
    )
    if args.picture:
        draw(runs, args.picture)
        print(f"Curves: {args.picture}")


if __name__ == "__main__":
    main()
