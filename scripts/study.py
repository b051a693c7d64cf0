"""Run a study: every setting with several seeds, then its table and its figure.

    python scripts/study.py --list                 # what each study answers and costs
    python scripts/study.py recall                 # run what is missing, then report
    DRY_RUN=1 python scripts/study.py recall       # print the commands and run nothing
    python scripts/study.py recall --minutes 30    # begin no further run after half an hour
    python scripts/study.py family --cost          # what a step of every setting costs, then report

Runs go to Output/studies/<study>/<setting>/seed<n>. A finished run is kept, an interrupted one gone
on with; one that fails is named at the end and does not stop the rest. Seeds come in the outer
loop: a study cut short has the same seeds of every setting.

The best epoch is chosen on held-out training data, and its test value is taken once. The report
lies in docs/studies: <study>.md (mean ± standard deviation over seeds, the difference to the
reference, and whether it is more than two standard deviations), <study>.csv (every epoch of every
run) and <study>.png. Runs on a shared machine say nothing about time: `--cost` measures
time, FLOPs and memory of a training step of all settings in one process, when the machine is quiet,
into <study>_cost.csv; the report then shows them, and <study>_cost.png draws accuracy over time.
"""

import argparse
import csv
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compare_runs import draw, label_points, read_run

from run_folder import RunFolder
from utils import atomic_path, write_text

SMALL = (
    "--model convnet --device cpu --batch_size 64 --num_epochs 6 --optimizer adam --lr 3e-3 "
    "--scheduler cosine --val_split 0.1"
)
BRANCHING = "--layer Branching --width 22"
TRANSFORMER = (
    "--model vit_tiny --resize 20 --patch_size 2 --num_layers 4 --num_heads 2 --d_hidden 24 "
    "--d_mlp 48 --pos_encoding learned"
)
CIFAR = (
    "--dataset npz --data_path Data/cifar10.npz --resize 16 --limit_train 5000 --val_split 0.1 "
    "--device cpu --batch_size 64 --num_epochs 6 --optimizer adam --lr 3e-3 --scheduler cosine"
)
NETWORK = "--model convnet --depth 4 --pool_after 2"
TOKENS = (
    "--model vit_tiny --patch_size 4 --num_layers 2 --num_heads 3 --d_hidden 24 --d_mlp 96 "
    "--dropout 0 --weight_decay 1e-6"
)


PLACES = ("--data_path", "--train_dir", "--test_dir")  # flags of data that a study needs


@dataclass(frozen=True)
class Study:
    """One question.

    Attributes:
        answers: The question.
        cost: What a seed of all settings takes.
        base: Flags of every run.
        settings: Further flags by name.
        reference: The setting that others are compared with; not given: the first.
        seeds: How many seeds.
        table: File of every run that has a row for each test sample, if one is shown.
        measures: Its columns that are averaged over samples, by their titles.
        by_folder: Column with names "folder/sample": a measure is averaged for every folder.
        curves: Draw the metric over epochs too, from this one on, into <study>_curves.png.
        digits: Behind the point.
    """

    answers: str
    cost: str
    base: str
    settings: dict[str, str] = field(default_factory=dict)
    seeds: int = 3
    table: str = ""
    measures: dict[str, str] = field(default_factory=dict)
    by_folder: str = ""
    curves: int = 0
    digits: int = 1
    reference: str = ""


RIVALS = {
    "Conv2d": "--layer Conv2d --width 24",
    "Branching": BRANCHING,
    "Branching, neighbors by location": f"{BRANCHING} --similarity_type Loc",
    "Branching, ratio 0 (no neighbors)": f"{BRANCHING} --branch_ratio 0",
    "ConvNN": "--layer ConvNN --width 24",
    "Conv2d, 8 layers": "--layer Conv2d --depth 8 --width 16",
    "Conv2d, dilation 3": "--layer Conv2d --width 24 --dilation 3",
    "Conv2d, 7x7": "--layer Conv2d --width 10 --kernel_size 7",
    "Conv2d, pooled twice": "--layer Conv2d --width 24 --pool_after 1,2",
    "ConvNN_Attn": "--layer ConvNN_Attn --width 31",
    "Branching_Attn": "--layer Branching_Attn --width 23",
}

RATIOS = {f"ratio {eighths / 8:g}": f"--branch_ratio {eighths / 8:g}" for eighths in range(9)}
GRAPHS = "--model vig_tiny --patch_size 4 --width 0.04 --K 4 --drop_path 0 --weight_decay 1e-6"
FAMILY = {
    "Conv2d": f"{NETWORK} --layer Conv2d --width 24",
    "Conv2d_New, Loc_Col": f"{NETWORK} --layer Conv2d_New --width 23 --aggregation_type Loc_Col",
    "ConvNN, Col": f"{NETWORK} --layer ConvNN --width 24",
    "ConvNN, Loc_Col": (
        f"{NETWORK} --layer ConvNN --width 23 --similarity_type Loc_Col --aggregation_type Loc_Col"
    ),
    "ConvNN_Attn": f"{NETWORK} --layer ConvNN_Attn --width 31",
    "Branching": f"{NETWORK} --layer Branching --width 22",
    "Branching_Attn": f"{NETWORK} --layer Branching_Attn --width 23",
    "ViT, Attention": f"{TOKENS} --layer Attention",
    "ViT, ConvNNAttention": f"{TOKENS} --layer ConvNNAttention",
    "ViT, KvtAttention": f"{TOKENS} --layer KvtAttention",
    "ViT, LocalAttention": f"{TOKENS} --layer LocalAttention --window_size 4",
    "ViT, NeighborhoodAttention": f"{TOKENS} --layer NeighborhoodAttention",
    "ViT, BranchConv": f"{TOKENS} --layer BranchConv --d_mlp 112",
    "ViT, BranchAttention": f"{TOKENS} --layer BranchAttention --d_mlp 112",
    "ViG, MaxRelative": f"{GRAPHS} --layer MaxRelative",
    "ViG, EdgeConv": f"{GRAPHS} --layer EdgeConv",
    "ViG, GraphSAGE": f"{GRAPHS} --layer GraphSAGE",
    "ViG, GIN": f"{GRAPHS} --layer GIN",
}

STUDIES = {
    "recall": Study(
        "Which bar has the color of the plus: what finds it, at equal parameters?",
        "about 28 minutes on one thread",
        f"{SMALL} --dataset recall",
        RIVALS,
        seeds=5,
    ),
    "recall_repeat": Study(
        "The same where orientations may repeat (counting alone gives 53 %)",
        "about 2 minutes on one thread",
        f"{SMALL} --dataset recall --repeat",
        {name: RIVALS[name] for name in list(RIVALS)[:4]},
    ),
    "recall_noise": Study(
        "The same with pixel noise of 0.1",
        "about 1 minute on one thread",
        f"{SMALL} --dataset recall --noise 0.1",
        {name: RIVALS[name] for name in list(RIVALS)[:2]},
    ),
    "recall_large": Study(
        "Do other and larger networks manage without neighbors? (first row: the small network)",
        "about 19 minutes on one thread",
        f"{SMALL} --dataset recall",
        {
            "Branching": BRANCHING,
            "ResNet18, a quarter of its width": "--model resnet18 --layer Conv2d --width 0.25",
            "DenseNet121, a quarter of its width": (
                "--model densenet121 --layer Conv2d --width 0.25"
            ),
            "ViT, dense attention": f"{TRANSFORMER} --layer Attention",
            "ViT, attention to 9 neighbors": f"{TRANSFORMER} --layer ConvNNAttention --K 9",
        },
    ),
    "recall_resnet": Study(
        "Does a network of 11 million parameters need neighbors?",
        "about 13 minutes on one thread",
        f"{SMALL} --dataset recall --model resnet18",
        {"Conv2d": "--layer Conv2d"},
        seeds=1,
    ),
    "match": Study(
        "Are two framed patches of one hue?",
        "about 2 minutes on one thread",
        f"{SMALL} --dataset match",
        {
            name: RIVALS[name]
            for name in (
                *("Conv2d", "Branching", "Branching, neighbors by location", "ConvNN"),
                "Conv2d, dilation 3",
            )
        },
    ),
    "match_rivals": Study(
        "Are two framed patches of one hue?",
        "about 23 minutes on one thread",
        f"{SMALL} --dataset match",
        RIVALS,
        seeds=1,
    ),
    "copy": Study(
        "Is a block of noise repeated somewhere?",
        "about 4 minutes on one thread",
        f"{SMALL} --dataset copy",
        {name: RIVALS[name] for name in ("Conv2d", "Branching", "ConvNN")},
    ),
    "digits": Study(
        "Digits of 8 x 8 pixels: local shape, where neighbors are not expected to help",
        "about 5 minutes on one thread",
        f"{SMALL} --dataset digits --num_epochs 20",
        {name: RIVALS[name] for name in ("Conv2d", "Branching", "ConvNN", "ConvNN_Attn")},
    ),
    "mnist": Study(
        "5,000 images of MNIST at 14 x 14: local shape again",
        "about 8 minutes on one thread",
        f"{SMALL} --dataset mnist --resize 14 --limit_train 5000",
        {name: RIVALS[name] for name in ("Conv2d", "Branching", "ConvNN", "ConvNN_Attn")},
    ),
    "cifar": Study(
        "5,000 images of CIFAR-10 at 16 x 16, from an .npz file: natural images",
        "about 8 minutes on one thread",
        f"{SMALL} --dataset npz --data_path Data/cifar10.npz --resize 16 --limit_train 5000",
        {name: RIVALS[name] for name in ("Conv2d", "Branching", "ConvNN", "ConvNN_Attn")},
    ),
    "family": Study(
        "Everything that looks at the most similar, on 5,000 images of CIFAR-10 at 16 x 16 (from "
        "an .npz file), at equal epochs and 12,500 to 17,300 parameters",
        "about 44 minutes on one thread",
        CIFAR,
        FAMILY,
    ),
    "mnist1d": Study(
        "MNIST-1D: which layer for signals, at about 10,000 parameters? (published CNN: 94 %)",
        "about 5 minutes on one thread",
        "--model cnn1d --dataset mnist1d --device cpu --batch_size 64 --num_epochs 20 "
        "--optimizer adam --lr 3e-3 --scheduler cosine --val_split 0.1",
        {
            "Conv1d": "--layer Conv1d --width 32",
            "ConvNN": "--layer ConvNN --width 19",
            "ConvNN_Attn": "--layer ConvNN_Attn --width 23",
            "Branching": "--layer Branching --width 21",
            "Branching_Attn": "--layer Branching_Attn --width 21",
        },
    ),
    "branch_ratio": Study(
        "Which part of the channels should neighbors make? (published: 0.5 on CIFAR-10)",
        "about 17 minutes on one thread",
        f"{SMALL} {BRANCHING} --dataset recall",
        RATIOS,
        reference="ratio 0.5",
    ),
    "branch_ratio_cifar": Study(
        "The same on natural images, where the paper found 0.5 best",
        "about 5 minutes on one thread",
        f"{SMALL} {BRANCHING} --dataset npz --data_path Data/cifar10.npz --resize 16 "
        "--limit_train 5000",
        RATIOS,
        reference="ratio 0.5",
    ),
    "branch_ratio_digits": Study(
        "The same on digits",
        "about 2 minutes on one thread",
        f"{SMALL} {BRANCHING} --dataset digits --num_epochs 20",
        RATIOS,
        reference="ratio 0.5",
    ),
    "K": Study(
        "How many neighbors, at about 16,000 parameters?",
        "about 6 minutes on one thread",
        f"{SMALL} --layer Branching --dataset recall",
        {
            "K 9": "--K 9 --width 22",
            "K 4": "--K 4 --width 26",
            "K 16": "--K 16 --width 19",
            "K 25": "--K 25 --width 17",
        },
    ),
    "sampling": Study(
        "What do fewer candidates cost?",
        "about 6 minutes on one thread",
        f"{SMALL} {BRANCHING} --dataset recall",
        {
            "all": "",
            **{f"random {n}": f"--sampling_type random --num_samples {n}" for n in (32, 64, 128)},
            **{f"spatial {n}": f"--sampling_type spatial --num_samples {n}" for n in (5, 8)},
        },
    ),
    "similarity": Study(
        "What to compare, and what to aggregate?",
        "about 8 minutes on one thread",
        f"{SMALL} {BRANCHING} --dataset recall",
        {
            f"{compared}, {taken}": f"--similarity_type {compared} --aggregation_type {taken}"
            for compared in ("Col", "Loc", "Loc_Col")
            for taken in ("Col", "Loc_Col")
        },
    ),
    "lambda": Study(
        "How to weigh features against coordinates?",
        "about 5 minutes on one thread",
        f"{SMALL} {BRANCHING} --dataset recall --similarity_type Loc_Col",
        {f"lambda {value}": f"--lambda_param {value}" for value in (0.5, 0.0, 0.25, 0.75, 1.0)},
    ),
    "lr": Study(
        "Which learning rate?",
        "about 11 minutes on one thread",
        f"{SMALL} {BRANCHING} --dataset recall",
        {f"lr {value}": f"--lr {value}" for value in ("3e-3", "3e-4", "1e-3", "1e-2")},
    ),
    "denoising": Study(
        "Which layer inside a small DnCNN? (sigma 25, Train400; seven images of Set12, 256 x 256)",
        "about 10 minutes on one thread",
        "--model dncnn --depth 6 --dataset denoise --train_dir Data/Train400 --test_dir Data/Set12 "
        "--limit_test 7 --sigma 25 --crop_size 40 --crops_per_image 1 --batch_size 8 "
        "--val_split 0.02 --device cpu --num_epochs 10 --lr 2e-3 --scheduler cosine",
        {
            "Conv2d": "--layer Conv2d --features 24",
            "ConvNN": "--layer ConvNN --features 24",
            "Branching": "--layer Branching --features 22",
            "Branching, neighbors by location": (
                "--layer Branching --features 22 --similarity_type Loc"
            ),
        },
    ),
    "denoisers": Study(
        "Which denoiser learns most from equally many steps? (sigma 25, Train400; Set12 and BSD68)",
        "about 4 hours on one thread",
        "--preset dncnn17 --dataset denoise --train_dir Data/Train400 "
        "--test_dir Data/Set12 Data/BSD68 --sigma 25 --crop_size 48 --crops_per_image 4 "
        "--batch_size 2 --val_split 0.02 --device cpu --num_epochs 10 --lr 1e-3 "
        "--scheduler cosine",
        {
            "DnCNN-17": "--preset dncnn17",
            "KNN block": "--preset knn_dncnn",
            "N3Net light": "--preset n3net_light",
            "N3Net": "--preset n3net",
            "NLRN small": "--preset nlrn_small",
        },
        seeds=1,
        table="per_image.csv",
        measures={"PSNR, noisy": "noisy_psnr", "PSNR": "psnr", "SSIM": "ssim"},
        by_folder="image",
        curves=4,
        digits=2,
    ),
    "shapes3d": Study(
        "Which neighbors for points: by the features of each layer, or by location?",
        "about 28 minutes on one thread",
        "--model dgcnn --dataset shapes3d --device cpu --num_points 128 --num_train 4500 "
        "--width 0.25 --K 10 --dropout 0.2 --batch_size 32 --num_epochs 4 "
        "--optimizer adam --lr 2e-3 --scheduler cosine --val_split 0.1",
        {
            "EdgeConv, by location": "--layer EdgeConv --similarity_type Loc",
            "EdgeConv, by features": "--layer EdgeConv --similarity_type Col",
            "MaxRelative, by location": "--layer MaxRelative --similarity_type Loc",
            "MaxRelative, by features": "--layer MaxRelative --similarity_type Col",
        },
    ),
    "shapes3d_256": Study(
        "Points where neighborhoods are small (256 points, 5 neighbors): by features or location?",
        "about 10 minutes on one thread",
        "--model dgcnn --dataset shapes3d --device cpu --num_points 256 --num_train 4500 "
        "--num_test 2000 --width 0.25 --K 5 --dropout 0.2 --batch_size 32 --num_epochs 10 "
        "--optimizer adam --lr 2e-3 --scheduler cosine --val_split 0.1",
        {
            "EdgeConv, by location": "--layer EdgeConv --similarity_type Loc",
            "EdgeConv, by features": "--layer EdgeConv --similarity_type Col",
        },
    ),
    "correspondence": Study(
        "Which of 128 matches are right (70 % are wrong): do neighbors among them help?",
        "about 15 minutes on one thread",
        "--model cnnet --dataset scenes --device cpu --depth 8 --features 32 --num_matches 128 "
        "--outliers 0.7 --num_scenes 1680 --test_scenes 100 --val_split 0.05 --batch_size 16 "
        "--num_epochs 4 --lr 3e-3 --scheduler cosine --ransac --ransac_threshold 0.003",
        {
            "no block": "--nonlocal_block none",
            "hard nearest neighbors": "--nonlocal_block knn",
            "neural nearest neighbors": "--nonlocal_block n3",
        },
        table="per_pair.csv",
        measures={
            f"{title}{name}": f"{start}{column}"
            for start, title in (
                ("", ""),
                ("kept_ransac_", "RANSAC on those kept: "),
                ("ransac_", "RANSAC on all: "),
            )
            for column, name in {
                "precision": "precision",
                "recall": "recall",
                "f1": "F1",
                "below5": "pose within 5°",
                "below10": "pose within 10°",
                "below20": "pose within 20°",
            }.items()
        },
    ),
    "growing": Study(
        "Which kernel should a growing network take?",
        "about 1 minute on one thread",
        "--model dynamic --dataset digits --device cpu --num_epochs 3 --val_split 0.1",
        {
            f"{kernel}, {predictor}": f"--kernel_type {kernel} --predictor {predictor}"
            for kernel in ("cosine", "euclidean", "euclidean_pyramid", "dot", "influence_cone")
            for predictor in ("interp", "nearest")
        },
    ),
}


# ---------------------------------------------------------------------------------------------
# Running


def slug(name: str) -> str:
    """Return a name that folders may have."""
    return "_".join("".join(c if c.isalnum() or c in ".-" else " " for c in name).split())


def folder_of(study: str, setting: str, seed: int) -> Path:
    return ROOT / "Output" / "studies" / study / slug(setting) / f"seed{seed}"


def is_finished(folder: Path) -> bool:
    results = folder / RunFolder.RESULTS
    lines = results.read_text("utf-8").splitlines() if results.is_file() else []
    return any(line.startswith(("Max ", "Min ")) for line in lines)


def command_of(study: str, setting: str, seed: int) -> list[str]:
    """Return the command that begins a run, or goes on with it."""
    folder = folder_of(study, setting, seed)
    place = ["--output_dir", str(folder.relative_to(ROOT))]
    if (folder / RunFolder.LAST).exists():
        return ["main.py", "--resume", *place]
    table = STUDIES[study]
    flags = shlex.split(f"{table.base} {table.settings[setting]}")
    return ["main.py", *flags, "--seed", str(seed), *place]


def run_study(
    name: str, seeds: int, only: list[str] | None, *, dry: bool, until: float
) -> list[str]:
    """Run what is missing; return the runs that failed."""
    failed = []
    words = shlex.split(STUDIES[name].base)
    for flag, place in itertools.pairwise(words):
        if flag in PLACES and not dry and not (ROOT / place).exists():
            raise SystemExit(f"error: {name} needs {place}, which is not there; see docs/data.md.")
    for seed in range(seeds):
        for setting in STUDIES[name].settings:
            folder = folder_of(name, setting, seed)
            if is_finished(folder) or (only and setting not in only):
                continue
            command = command_of(name, setting, seed)
            if dry:
                print(shlex.join(["python", *command]))
                continue
            if time.monotonic() > until:
                return failed
            print(f"{name}: {setting}, seed {seed}", flush=True)
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
            )
            if done.returncode:
                said = done.stderr.strip().splitlines() or ["no message"]
                last = next((line for line in said if line.startswith("error")), said[-1])
                failed.append(f"{setting}, seed {seed}: {last}")
                print(f"  failed: {last}", flush=True)
    return failed


# ---------------------------------------------------------------------------------------------
# Reporting


def read_results(name: str) -> dict[str, list[dict]]:
    """Read the finished runs of a study: summaries with "history" and "seed", by setting."""
    found: dict[str, list[dict]] = {}
    for setting in STUDIES[name].settings:
        for folder in sorted(folder_of(name, setting, 0).parent.glob("seed*")):
            if not is_finished(folder):
                continue
            summary = json.loads((folder / RunFolder.SUMMARY).read_text("utf-8"))
            with open(folder / RunFolder.METRICS, newline="") as file:
                summary["history"] = list(csv.DictReader(file))
            summary["seed"] = int(folder.name.removeprefix("seed"))
            test = summary.get("test")
            metric = summary["headline"].partition("_")[2]
            summary["value"] = summary["best"] if test is None else test[metric]
            summary["measures"] = read_measures(name, folder)
            found.setdefault(setting, []).append(summary)
    return found


def read_measures(name: str, folder: Path) -> dict[str, float]:
    """Average the columns that a study asks for over the test samples of a run, by title."""
    study = STUDIES[name]
    if not study.measures:
        return {}
    with open(folder / study.table, newline="") as file:
        rows = list(csv.DictReader(file))
    parts: dict[str, list[dict]] = {}
    for row in rows:
        part = f"{row[study.by_folder].rpartition('/')[0]}: " if study.by_folder else ""
        parts.setdefault(part, []).append(row)
    return {
        f"{part}{title}": statistics.mean(float(row[column]) for row in chosen)
        for part, chosen in parts.items()
        for title, column in study.measures.items()
    }


def measure_lines(results: dict[str, list[dict]], digits: int) -> list[str]:
    """Word further measures, mean ± standard deviation over seeds, as a table: a row a measure."""
    titles = next(iter(results.values()))[0]["measures"]
    if not titles:
        return []
    lines = [
        "Further measures of the same test samples:",
        "",
        f"| measure | {' | '.join(results)} |",
        f"|---|{'--:|' * len(results)}",
    ]
    for title in titles:
        cells = []
        for runs in results.values():
            values = [run["measures"][title] for run in runs if title in run["measures"]]
            few = 4 if max(values, default=1) < 1 else digits
            cells.append(mean_and_spread(values, few) if values else "not measured")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return [*lines, ""]


def spread(values: list[float]) -> float:
    """Return the standard deviation over seeds; NaN for a single one."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def mean_and_spread(values: list[float], digits: int) -> str:
    """Word the mean over seeds, and the standard deviation of several."""
    deviation = f" ± {spread(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def verdict(values: list[float], reference: list[float], *, higher: bool) -> str:
    """Say whether two settings differ by more than two standard deviations of the difference."""
    if min(len(values), len(reference)) < 3:
        return "fewer than 3 seeds"
    difference = statistics.mean(values) - statistics.mean(reference)
    noise = math.hypot(spread(values), spread(reference))
    if abs(difference) <= 2 * noise:
        return "within the noise"
    return "better" if (difference > 0) == higher else "worse"


def read_costs(folder: Path, name: str) -> dict[str, dict[str, float]]:
    """Read what `--cost` has measured, by setting; empty if it has not run."""
    path = folder / f"{name}_cost.csv"
    if not path.is_file():
        return {}
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {row.pop("setting"): {k: float(v) for k, v in row.items()} for row in rows}


def measure_costs(name: str, folder: Path, rounds: int) -> None:
    """Measure a training step of every setting of a study, and write it as CSV."""
    from study_costs import measure_costs as measure

    study = STUDIES[name]
    commands = {setting: f"{study.base} {flags}" for setting, flags in study.settings.items()}
    rows = measure(commands, rounds)
    if not rows:
        raise SystemExit(f"{name}: no setting can be measured; the reasons are above")
    path = folder / f"{name}_cost.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    print(f"{name}: {path}")


def cost_lines(name: str, costs: dict[str, dict[str, float]]) -> list[str]:
    """Word what `--cost` has measured as a table."""
    if not costs:
        return []
    lines = [
        "What one training step costs (one thread, all settings in turn in one process, median and "
        f"quartiles; `python scripts/study.py {name} --cost`). FLOPs are those of a forward pass "
        "of one sample, memory is the peak of a step:",
        "",
        "| setting | parameters | MFLOP | ms a step | MiB a step |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {setting} | {row['parameters']:,.0f} | {row['mflops']:.1f} | {row['step_ms']:.0f} "
        f"({row['step_ms_low']:.0f} - {row['step_ms_high']:.0f}) | {row['step_mib']:.0f} |"
        for setting, row in costs.items()
    ]
    return [*lines, "", f"![accuracy over time]({name}_cost.png)", ""]


def report_table(
    name: str, results: dict[str, list[dict]], costs: dict[str, dict[str, float]]
) -> str:
    """Word a study as a page of Markdown."""
    study, first = STUDIES[name], next(iter(results.values()))[0]
    of = study.reference if study.reference in results else next(iter(results))
    reference = [run["value"] for run in results[of]]
    against = "the first row" if of == next(iter(results)) else of
    lines = [
        f"# {name}",
        "",
        f"{study.answers}",
        "",
        f"Every run: `python main.py {study.base} --seed <n>` and the flags of the row. "
        f"Cost of one seed of all rows: {study.cost}.",
        "",
        f"| setting | flags | parameters | {first['headline_name']} {first['headline_unit']}, "
        f"mean ± sd | each seed | against {against} | seconds |",
        "|---|---|--:|--:|---|---|--:|",
    ]
    for setting, flags in study.settings.items():
        runs = results.get(setting)
        if not runs:
            lines.append(f"| {setting} | `{flags}` | | not run | | | |")
            continue
        values = [run["value"] for run in runs]
        judged = verdict(values, reference, higher=first["higher_is_better"])
        lines.append(
            f"| {setting} | `{flags}` | {runs[0]['parameters']:,} "
            f"| {mean_and_spread(values, study.digits)} "
            f"| {', '.join(f'{value:.{study.digits}f}' for value in values)} "
            f"| {'reference' if setting == of else judged} "
            f"| {statistics.mean(run['seconds'] for run in runs):.0f} |"
        )
    lines += [
        "",
        "Seconds are those of training and validation on a shared machine: they rank nothing.",
        f"Every epoch of every run is in [{name}.csv]({name}.csv).",
        "",
        f"![{name}]({name}.png)",
        "",
        *([f"![{name} over epochs]({name}_curves.png)", ""] if study.curves else []),
        *measure_lines(results, study.digits),
        *cost_lines(name, costs),
    ]
    return "\n".join(lines)


def write_history(path: Path, results: dict[str, list[dict]]) -> None:
    """Write every epoch of every run as one small CSV file."""
    rows = []
    for setting, runs in results.items():
        for run in runs:
            for row in run["history"]:
                short = {key: f"{float(value):.6g}" for key, value in row.items() if value}
                rows.append({"setting": setting, "seed": run["seed"], **short})
            metric = run["headline"].partition("_")[2]
            rows[-1][f"chosen_test_{metric}"] = f"{run['value']:.6g}"
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def metric_of(run: dict) -> str:
    """Word what a run was measured by: "accuracy, %"."""
    name = run["headline_name"].strip()
    return f"{name if name.isupper() else name.lower()}, {run['headline_unit'].strip()}"


def draw_figure(name: str, path: Path, results: dict[str, list[dict]]) -> None:
    """Draw the mean of every setting, its deviation and a point for every seed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(7.2, 0.9 + 0.36 * len(results)), layout="constrained")
    axis, first = figure.subplots(), next(iter(results.values()))[0]
    from_zero = first["headline_unit"].strip() == "%"
    kinds: dict[str, str] = {}
    for place, (setting, runs) in enumerate(results.items()):
        values = [run["value"] for run in runs]
        plain = re.search(r"--layer Conv[12]d\b", STUDIES[name].settings[setting])
        color = "tab:orange" if plain else "tab:blue"
        kinds[color] = "convolution" if plain else "other layers"
        mean, error = statistics.mean(values), spread(values) if len(values) > 1 else 0.0
        if from_zero:
            axis.barh(place, mean, xerr=error, color=color, alpha=0.6, capsize=3)
        else:
            axis.errorbar(mean, place, xerr=error, fmt="o", color=color, capsize=3, markersize=7)
        axis.plot(values, [place] * len(values), "k.", markersize=4)
    axis.set_yticks(range(len(results)), list(results))
    axis.set_ylim(len(results) - 0.5, -0.5)
    axis.set_xlabel(f"test {metric_of(first)}: mean, sd, seeds")
    figure.suptitle(fill(STUDIES[name].answers, 90), fontsize=9)
    if len(kinds) > 1:
        handles = [Patch(color=color, alpha=0.6, label=text) for color, text in kinds.items()]
        figure.legend(handles=handles, loc="outside lower right", ncols=2, fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def draw_curves(name: str, path: Path, results: dict[str, list[dict]]) -> None:
    """Draw the metric by which the best epoch was chosen, a curve a run."""
    runs, names = [], []
    for setting, found in results.items():
        for run in found:
            runs.append(read_run(folder_of(name, setting, run["seed"])))
            names.append(setting if len(found) == 1 else f"{setting}, seed {run['seed']}")
    draw(runs, path, STUDIES[name].curves, names)


def draw_costs(
    path: Path, results: dict[str, list[dict]], costs: dict[str, dict[str, float]]
) -> None:
    """Draw the metric over the time of a step, a point a setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axis = figure.subplots()
    points, colors = [], []
    for setting, runs in results.items():
        values = [run["value"] for run in runs]
        error = spread(values) if len(values) > 1 else 0.0
        place = (costs[setting]["step_ms"], statistics.mean(values))
        marker = "s" if setting.startswith("Vi") else "o"
        drawn = axis.errorbar(*place, yerr=error, marker=marker, capsize=3, linestyle="none")
        points.append(place)
        colors.append(drawn[0].get_color())
    first = next(iter(results.values()))[0]
    axis.set(
        xscale="log",
        xlabel="milliseconds of a training step, one thread",
        ylabel=f"test {metric_of(first)}",
    )
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.xaxis.set_minor_formatter("{x:.0f}")
    axis.grid(alpha=0.3, which="both")
    label_points(axis, points, list(results), colors)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def report(name: str, folder: Path) -> None:
    """Write the page, the numbers and the figure of a study, of what is finished."""
    results = read_results(name)
    if not results:
        print(f"{name}: no run is finished yet")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_history(folder / f"{name}.csv", results)
    draw_figure(name, folder / f"{name}.png", results)
    if STUDIES[name].curves:
        draw_curves(name, folder / f"{name}_curves.png", results)
    costs = {row: cost for row, cost in read_costs(folder, name).items() if row in results}
    if costs:
        measured = {row: runs for row, runs in results.items() if row in costs}
        draw_costs(folder / f"{name}_cost.png", measured, costs)
    write_text(folder / f"{name}.md", report_table(name, results, costs))
    print(f"{name}: {folder / f'{name}.md'}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="which; see --list")
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    parser.add_argument("--seeds", type=int, help="seeds 0 … N-1 instead of the study's own number")
    parser.add_argument(
        "--only", action="extend", nargs="+", metavar="SETTING", help="run these rows alone"
    )
    parser.add_argument("--minutes", type=float, help="begin no further run after so many")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    parser.add_argument("--cost", action="store_true", help="run nothing, time a step of each row")
    parser.add_argument("--rounds", type=int, default=15, help="steps that --cost times")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "studies", help="for reports")
    args = parser.parse_args(argv)
    if args.list:
        for name, study in STUDIES.items():
            runs = len(study.settings) * study.seeds
            print(f"{name:20} {study.answers} ({runs} runs; {study.cost} a seed of all rows)")
        return
    if unknown := [name for name in args.studies if name not in STUDIES]:
        parser.error(f"there is no study {', '.join(unknown)}. There are: {', '.join(STUDIES)}.")
    if not args.studies:
        parser.error(f"name a study, or several. There are: {', '.join(STUDIES)}.")
    dry = os.environ.get("DRY_RUN") == "1"
    until = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    failed = []
    for name in args.studies:
        if args.cost:
            measure_costs(name, args.docs, args.rounds)
        elif not args.report:
            seeds = args.seeds or STUDIES[name].seeds
            found = run_study(name, seeds, args.only, dry=dry, until=until)
            failed += [f"{name}: {line}" for line in found]
        if not dry:
            report(name, args.docs)
    if failed:
        print("failed:", *failed, sep="\n  ")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
