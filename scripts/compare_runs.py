"""Compare finished runs of any task: tables, curves, and one page to sort and to filter.

    python scripts/compare_runs.py Output --over_seeds
    python scripts/compare_runs.py Output/sweep/* --picture Output/sweep/curves.png --since 3
    python scripts/compare_runs.py Output --html Output/runs.html

Folders are searched for runs at any depth. Columns: the best held-out value and where it was
reached, the last one, the test value where the best was chosen on held-out training data,
parameters, seconds, and every argument that is not the same in all runs. What is best, and which
way, each run says itself (summary.json). Runs of different tasks, data sets or metrics get a table
each.
"""

import argparse
import base64
import csv
import html
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run_folder import RunFolder
from utils import atomic_path, csv_text, parse_args_text, write_text

UNINTERESTING = ("output_dir", "num_workers", "data_path", "device")
TABLES = ("markdown", "csv", "latex")
MARKERS, LINES = "osD^vPX", ("-", "--", "-.", ":")
MOST_LABELS = 14  # of curves that are named at their ends; more have a legend


# ---------------------------------------------------------------------------------------------
# Reading


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Return the run folders among these and below them, each once.

    Raises:
        ValueError: If a folder is not there.
    """
    folders = list(folders)
    if missing := [str(folder) for folder in folders if not folder.exists()]:
        raise ValueError(f"{', '.join(missing)}: there is no such folder.")
    found = [path.parent for folder in folders for path in sorted(folder.rglob(RunFolder.METRICS))]
    return list(dict.fromkeys(found))


def read_run(folder: Path) -> dict:
    """Read what a run left.

    Raises:
        ValueError: If it holds no finished epoch, or its files are damaged.
    """
    try:
        with open(folder / RunFolder.METRICS, newline="") as file:
            history = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        summary = json.loads((folder / RunFolder.SUMMARY).read_text("utf-8"))
        column, counter = summary["headline"], next(iter(history[0]))
        choose = max if summary["higher_is_better"] else min
        best = choose(history, key=lambda row: row[column])
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{folder} holds no finished epoch, or no {RunFolder.SUMMARY}.") from error
    args = folder / RunFolder.ARGS
    run = {
        "folder": folder,
        "about": ", ".join(filter(None, (summary.get("task"), summary.get("dataset"), column))),
        "args": parse_args_text(args.read_text("utf-8")) if args.is_file() else {},
        "history": history,
        "column": column,
        "counter": counter,  # "epoch", or "K"
        "sign": 1 if summary["higher_is_better"] else -1,
        "numbers": {
            f"best {column}": best[column],
            f"last {column}": history[-1][column],
            "parameters": summary["parameters"],
            "seconds": summary["seconds"],
        },
        "texts": {"run": str(folder), "at": f"{counter} {best[counter]:.0f}"},
    }
    metric = column.partition("_")[2]
    if metric in (summary.get("test") or {}):
        run["numbers"][f"test {metric}"] = summary["test"][metric]
    run["value"] = run["sign"] * run["numbers"].get(f"test {metric}", best[column])
    return run


def differing_arguments(runs: list[dict], leave_out: Iterable[str] = ()) -> list[str]:
    """Return the names of the arguments that are not the same in all runs."""
    names = dict.fromkeys(name for run in runs for name in run["args"])
    return [
        name
        for name in names
        if name not in (*UNINTERESTING, *leave_out)
        and len({run["args"].get(name) for run in runs}) > 1
    ]


# ---------------------------------------------------------------------------------------------
# Tables


def word(name: str, value: float) -> str:
    """Word a number as its column wants it."""
    return f"{value:,.0f}" if name == "parameters" else f"{value:.2f}"


def one_of_each_seed(group: list[dict]) -> list[dict]:
    """Return the runs of a row, the first one of every seed: one run twice is not two samples."""
    kept: dict[str, dict] = {}
    for run in group:
        first = kept.setdefault(run["args"].get("seed", run["texts"]["run"]), run)
        if first is not run:
            print(
                f"note: {run['folder']} has the flags and the seed of {first['folder']}, which "
                "alone counts.",
                file=sys.stderr,
            )
    return list(kept.values())


def rows_of(runs: list[dict], *, over_seeds: bool) -> list[dict[str, str]]:
    """Make the rows of a table, the best one first; all cells are text.

    Args:
        runs: Runs that were measured by one metric.
        over_seeds: One row for the runs that differ in their seed alone: mean ± standard deviation.
    """
    names = differing_arguments(runs, ("seed",) if over_seeds else ())
    groups: dict[tuple, list[dict]] = {}
    for number, run in enumerate(runs):
        same = tuple(run["args"].get(name, "") for name in names)
        groups.setdefault(same if over_seeds else (number,), []).append(run)
    found = [one_of_each_seed(group) if over_seeds else group for group in groups.values()]
    rows = []
    for group in sorted(found, key=lambda g: -statistics.mean(r["value"] for r in g)):
        row = {"first run" if over_seeds else "run": group[0]["texts"]["run"]}
        if over_seeds:
            row["seeds"] = str(len(group))
        else:
            row["at"] = group[0]["texts"]["at"]
        for name in dict.fromkeys(name for run in group for name in run["numbers"]):
            values = [run["numbers"][name] for run in group if name in run["numbers"]]
            row[name] = word(name, statistics.mean(values))
            if len(values) > 1 and name != "parameters":
                row[name] += f" ± {word(name, statistics.stdev(values))}"
        rows.append(row | {name: group[0]["args"].get(name, "") for name in names})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: name in names)  # arguments last
    return [{name: row.get(name, "") for name in columns} for row in rows]


def as_markdown(rows: list[dict[str, str]]) -> str:
    """Lay out rows as Markdown, padded so that it reads as text too."""
    columns = list(rows[0])
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    lines = [" | ".join(c.ljust(widths[c]) for c in columns)]
    lines.append(" | ".join("-" * widths[c] for c in columns))
    lines += [" | ".join(row[c].ljust(widths[c]) for c in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def as_csv(rows: list[dict[str, str]]) -> str:
    """Lay out rows as CSV."""
    return csv_text(rows).rstrip("\n")


def as_latex(rows: list[dict[str, str]]) -> str:
    """Lay out rows as a tabular of LaTeX."""
    escapes = {c: f"\\{c}" for c in "&%$#_{}"} | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
    }
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    text = [" & ".join(c.translate(str.maketrans(escapes)) for c in line) for line in lines]
    head, *body = [f"{line} \\\\" for line in text]
    begin = rf"\begin{{tabular}}{{{'l' * len(rows[0])}}}"
    return "\n".join([begin, r"\hline", head, r"\hline", *body, r"\hline", r"\end{tabular}"])


# ---------------------------------------------------------------------------------------------
# Pictures


def names_apart(folders: list[Path]) -> list[str]:
    """Name folders by the shortest ends of their paths that tell them apart: ResNet/ConvNN."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def spread_out(places: list[float], gap: float) -> list[float]:
    """Move places apart, as little as it takes, until neighbors keep a gap; their order stays."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[tuple[list[int], float]] = []  # members, and the middle of their places
    for i in order:
        members, middle = [i], places[i]
        while groups and middle - groups[-1][1] < gap * (len(members) + len(groups[-1][0])) / 2:
            others, _ = groups.pop()
            members = others + members
            middle = statistics.mean(places[m] for m in members)
        groups.append((members, middle))
    moved = list(places)
    for members, middle in groups:
        for step, i in enumerate(members):
            moved[i] = middle + gap * (step - (len(members) - 1) / 2)
    return moved


def label_points(axis, points: Sequence[tuple[float, float]], texts, colors) -> None:
    """Name points right of the axes, none over another, each with a line to its name."""
    low, high = axis.get_ylim()
    heights = [(y - low) / (high - low) for _, y in points]
    places = spread_out(heights, 0.06 * 4.2 / axis.figure.get_figheight())
    for point, text, color, height in zip(points, texts, colors, places, strict=True):
        axis.annotate(
            text,
            point,
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=color,
            fontsize=8,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.5},
        )


def draw(
    runs: list[dict], path: Path, since: float = 0, names: Sequence[str] | None = None
) -> None:
    """Draw the headline metric over epochs (or K), a curve a run, its name at its end.

    Args:
        runs: See `read_run`.
        path: Where the picture goes.
        since: Epochs before this one are left out: the first ones often hide the rest.
        names: What stands at the ends of the curves; not given: the folders.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    names = names or names_apart([run["folder"] for run in runs])
    lines = []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        rows = [row for row in run["history"] if row[run["counter"]] >= since]
        style = f"{MARKERS[i % len(MARKERS)]}{LINES[i % len(LINES)]}"
        xs, ys = ([row[run[key]] for row in rows] for key in ("counter", "column"))
        lines += axis.plot(xs, ys, style, markersize=4, alpha=0.85, label=name)
    axis.set(xlabel=runs[0]["counter"], ylabel=runs[0]["column"])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    shown = [line for line in lines if len(line.get_xdata())]
    if len(shown) <= MOST_LABELS:
        ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in shown]
        texts = [line.get_label() for line in shown]
        colors = [line.get_color() for line in shown]
        label_points(axis, ends, texts, colors)
    else:
        axis.legend(fontsize=8, loc="best")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


# ---------------------------------------------------------------------------------------------
# A page


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Runs</title><style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222; }}
table {{ border-collapse: collapse; margin: 0.6rem 0 1.6rem; }}
th, td {{ padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left; }}
th {{ cursor: pointer; background: #f3f5f7; position: sticky; top: 0; white-space: nowrap; }}
th[data-order="1"]::after {{ content: " \u25b2"; }}
th[data-order="-1"]::after {{ content: " \u25bc"; }}
tr:hover td {{ background: #f8fafc; }}
img {{ max-width: 100%; display: block; }}
input {{ font: inherit; padding: 0.3rem 0.5rem; width: 24rem; }}
</style></head><body>
<h1>Runs</h1>
<p><input id="filter" placeholder="show rows that hold all of these words" autofocus>
<span id="shown"></span></p>
{tables}
<script>
const filter = document.getElementById("filter");
function show() {{
  const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let count = 0, all = 0;
  for (const row of document.querySelectorAll("tbody tr")) {{
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
    count += !row.hidden; all += 1;
  }}
  document.getElementById("shown").textContent = count + " of " + all;
}}
filter.addEventListener("input", show);
const number = text => {{
  const value = parseFloat(text.replace(/,/g, "").replace(/^\\D+ (?=\\d)/, ""));
  return Number.isNaN(value) ? null : value;
}};
for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => {{
  const order = head.dataset.order === "1" ? -1 : 1;
  for (const other of head.parentNode.children) delete other.dataset.order;
  head.dataset.order = order;
  const body = head.closest("table").tBodies[0];
  const key = row => row.cells[head.cellIndex].textContent;
  const rows = [...body.rows].sort((a, b) => {{
    const [x, y] = [number(key(a)), number(key(b))];
    if (x !== null && y !== null) return order * (x - y);
    return order * key(a).localeCompare(key(b));
  }});
  body.append(...rows);
}});
show();
</script></body></html>
"""


def page(tables: dict[str, list[dict[str, str]]], folders: dict[str, Path]) -> str:
    """Write one page that needs nothing else: tables to sort and filter, each run's pictures.

    Args:
        tables: Rows by heading.
        folders: The folders of runs by what stands in the first column.
    """
    parts = []
    for heading, rows in tables.items():
        head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
        lines = []
        for row in rows:
            cells = [html.escape(value) for value in row.values()]
            cells[0] += pictures(folders[next(iter(row.values()))])
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        parts.append(
            f"<h2>{html.escape(heading)}</h2>\n<table><thead><tr>{head}</tr></thead>\n"
            "<tbody>\n" + "\n".join(lines) + "\n</tbody></table>"
        )
    return PAGE.format(tables="\n".join(parts))


def pictures(folder: Path) -> str:
    """Return the pictures of a run, folded away, as part of a page."""
    found = ""
    for path in sorted(folder.glob("*.png")):
        content = base64.b64encode(path.read_bytes()).decode("ascii")
        found += (
            f"<details><summary>{html.escape(path.stem)}</summary>"
            f'<img alt="{html.escape(path.name)}" src="data:image/png;base64,{content}"></details>'
        )
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="searched for runs, at any depth")
    parser.add_argument("--table", choices=TABLES, default="markdown", help="form of the tables")
    parser.add_argument(
        "--over_seeds", action="store_true", help="mean ± standard deviation over seeds, one row"
    )
    parser.add_argument("--picture", type=Path, help="draw the curves here (one metric only)")
    parser.add_argument("--since", type=float, default=0, help="leave out earlier epochs there")
    parser.add_argument("--html", type=Path, help="write a page here, to sort and to filter")
    args = parser.parse_args(argv)
    groups: dict[str, list[dict]] = {}
    try:
        found = find_runs(args.folders)
    except ValueError as error:
        parser.error(str(error))
    for folder in found:
        try:
            run = read_run(folder)
        except ValueError as error:
            print(f"note: {error} Left out.", file=sys.stderr)
            continue
        groups.setdefault(run["about"], []).append(run)
    if not groups:
        parser.error(f"none of these folders holds a run ({RunFolder.METRICS}).")
    if args.picture and len(groups) > 1:
        parser.error(
            f"--picture draws runs of one task, data set and metric; these are of "
            f"{'; '.join(groups)}: name the folders of one."
        )
    layouts = {"markdown": as_markdown, "csv": as_csv, "latex": as_latex}
    tables = {about: rows_of(runs, over_seeds=args.over_seeds) for about, runs in groups.items()}
    parts = []
    for about, rows in tables.items():
        title = f"{about}:\n\n" if args.table == "markdown" and len(tables) > 1 else ""
        parts.append(title + layouts[args.table](rows))
    print("\n\n".join(parts))
    if args.picture:
        draw(next(iter(groups.values())), args.picture, args.since)
        print(f"Curves: {args.picture}", file=sys.stderr)
    if args.html:
        folders = {run["texts"]["run"]: run["folder"] for runs in groups.values() for run in runs}
        write_text(args.html, page(tables, folders))
        print(f"Page: {args.html}", file=sys.stderr)


if __name__ == "__main__":
    main()
