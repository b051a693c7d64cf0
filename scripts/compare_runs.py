"""Compare finished runs: one table row a run, and their curves in one picture.

    python scripts/compare_runs.py Output/sweep/* --picture Output/sweep/curves.png

Columns: the best held-out value and its epoch, the last one, parameters, seconds per epoch, and
every argument that is not the same in all runs.
"""

import argparse
import csv
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import atomic_path, parse_args_text

HEADLINES = ("top1", "psnr", "accuracy", "fraction")
UNINTERESTING = ("output_dir", "num_workers", "data_path", "device")


def read_run(folder: Path) -> dict:
    with open(folder / "metrics.csv", newline="") as file:
        history = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    if not history:
        raise ValueError(f"{folder}/metrics.csv holds no epoch yet.")
    with open(folder / "timing.csv", newline="") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    column = next(
        f"{part}_{name}"
        for name in HEADLINES
        for part in ("val", "test")
        if f"{part}_{name}" in history[-1]
    )
    best = max(history, key=lambda row: row[column])
    counted = re.search(r"Parameters: ([\d,]+)", (folder / "model.txt").read_text("utf-8"))
    return {
        "folder": folder,
        "args": parse_args_text((folder / "args.txt").read_text("utf-8")),
        "history": history,
        "column": column,
        "cells": {
            "run": str(folder),
            f"best {column}": f"{best[column]:.2f}",
            "at epoch": f"{best['epoch']:.0f}",
            f"last {column}": f"{history[-1][column]:.2f}",
            "parameters": counted.group(1) if counted else "",
            "s/epoch": f"{sum(seconds) / len(seconds):.1f}",
        },
    }


def format_table(rows: list[dict[str, str]]) -> str:
    columns = list(rows[0])
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    lines = [" | ".join(c.ljust(widths[c]) for c in columns)]
    lines.append("-|-".join("-" * widths[c] for c in columns))
    lines += [" | ".join(row[c].ljust(widths[c]) for c in columns) for row in rows]
    return "\n".join(f"| {line} |".replace("-|-", " | ") for line in lines)


def draw(runs: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for run in runs:
        xs = [row["epoch"] for row in run["history"]]
        axis.plot(xs, [row[run["column"]] for row in run["history"]], "o-", markersize=3)
    axis.legend([run["folder"].name for run in runs], fontsize=8, loc="lower right")
    axis.set(xlabel="epoch", ylabel=runs[0]["column"])
    axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="run folders; others are skipped")
    parser.add_argument("--picture", type=Path, help="draw the curves here")
    args = parser.parse_args(argv)
    runs = [read_run(folder) for folder in args.folders if (folder / "metrics.csv").is_file()]
    if not runs:
        parser.error("none of these folders holds a run (metrics.csv).")
    if len({run["column"] for run in runs}) > 1:
        parser.error("these runs were measured by different metrics: compare them apart.")
    names = dict.fromkeys(name for run in runs for name in run["args"])
    differing = [
        name
        for name in names
        if name not in UNINTERESTING and len({run["args"].get(name) for run in runs}) > 1
    ]
    runs.sort(key=lambda run: -float(run["cells"][f"best {run['column']}"]))
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
