"""Write the table of README.md and docs/results.md, where neighbors win, from docs/studies/*.csv.

python scripts/results_tables.py            # print it
python scripts/results_tables.py --write    # put it between the markers of both
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import write_text

STUDIES = ROOT / "docs" / "studies"
LAYERS = ("Conv2d", "ConvNN", "Branching")
QUESTIONS = {
    "recall": "generated: the bar in the color of the plus (chance 25)",
    "recall_repeat": "the same, orientations may repeat (counting alone 53)",
    "recall_noise": "the same with pixel noise of 0.1",
    "match": "generated: are two framed patches of one hue (chance 50)",
    "copy": "generated: is a block of noise repeated (chance 50)",
    "digits": "digits of 8 x 8",
    "mnist": "MNIST, 5,000 images of 14 x 14",
    "cifar": "CIFAR-10, 5,000 images of 16 x 16",
}
START, END = "<!-- results -->\n", "<!-- /results -->\n"


def read_values(study: str) -> dict[str, list[float]]:
    """Read the test value of every run, at the epoch chosen on held-out images, by setting."""
    found: dict[str, list[float]] = {}
    with open(STUDIES / f"{study}.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["chosen_test_top1"]:
                found.setdefault(row["setting"], []).append(float(row["chosen_test_top1"]))
    return found


def cell(values: list[float], *, best: bool) -> str:
    """Word mean and standard deviation."""
    if not values:
        return ""
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.1f}"
    return f"**{text}**" if best else text


def results_table(folder: str) -> str:
    """Word the table; links to studies begin with `folder`."""
    lines = [
        f"| test accuracy in %, mean ± sd over seeds | {' | '.join(LAYERS)} | seeds |",
        "|---|--:|--:|--:|--:|",
    ]
    for study, question in QUESTIONS.items():
        if not (STUDIES / f"{study}.csv").exists():
            continue
        values = [read_values(study).get(layer, []) for layer in LAYERS]
        means = [statistics.mean(v) if v else 0 for v in values]
        cells = [cell(v, best=m == max(means)) for v, m in zip(values, means, strict=True)]
        seeds = min(len(v) for v in values if v)
        lines.append(
            f"| [{study}]({folder}{study}.md): {question} | {' | '.join(cells)} | {seeds} |"
        )
    return "\n".join(lines) + "\n"


PAGES = {"README.md": "docs/studies/", "docs/results.md": "studies/"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into README and results.md")
    if not parser.parse_args(argv).write:
        print(results_table("docs/studies/"), end="")
        return
    for name, folder in PAGES.items():
        page = ROOT / name
        before, _, rest = page.read_text(encoding="utf-8").partition(START)
        _, _, after = rest.partition(END)
        write_text(page, before + START + results_table(folder) + END + after)


if __name__ == "__main__":
    main()
