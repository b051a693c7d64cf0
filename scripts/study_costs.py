"""What a training step costs, of some command lines side by side; `study.py --cost` uses it too.

    python scripts/study_costs.py "--model convnet --dataset digits" "--model vit_tiny --resize 32"

Everything is measured in one process on one thread, a step of every setting in turn and all over
again, so that what disturbs the machine disturbs all alike; the median counts. Memory is the peak
of a step above what the process holds before it (Linux).
"""

import argparse
import contextlib
import ctypes
import gc
import math
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from builders import build_model, build_task, chosen, load_data
from commandline import build_parser, parse_arguments
from dataset import build_loader
from ops.flops import register_flop_formulas
from trainers import build_optimizer
from utils import count_parameters, layer_rows

__all__ = ["measure_costs"]


def measure_costs(commands: dict[str, str], rounds: int) -> list[dict[str, Any]]:
    """Measure a training step of networks that learn by gradient.

    Args:
        commands: Flags by setting.
        rounds: Steps of each that are timed, beside the first one.

    Returns:
        A row a setting: setting, parameters, mflops (of one sample, forward), step_ms (median of
        a training step), quartiles of it, and step_mib. Settings that cannot be built are named
        and left out.
    """
    torch.set_num_threads(1)
    register_flop_formulas()
    steps, rows, data = {}, {}, {}
    for setting, flags in commands.items():
        try:
            step, row = prepare(flags, data)
            row["step_mib"] = peak_of(step)
        except (SystemExit, ValueError, RuntimeError) as error:  # the others are measured
            print(f"{setting} cannot be measured ({type(error).__name__}: {error})")
            continue
        steps[setting], rows[setting] = step, {"setting": setting, **row}
    times: dict[str, list[float]] = {setting: [] for setting in steps}
    for _ in range(rounds):
        for setting, step in steps.items():
            start = time.perf_counter()
            step()
            times[setting].append(1e3 * (time.perf_counter() - start))
    for setting, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4, method="inclusive")
        rows[setting] |= {"step_ms": middle, "step_ms_low": low, "step_ms_high": high}
    return list(rows.values())


def prepare(flags: str, loaded: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Build a setting's network: return its training step, and what it is.

    Args:
        flags: The setting's command line.
        loaded: Data by what decides on them, filled here.
    """
    values, _, _ = parse_arguments(build_parser(), shlex.split(flags))
    values |= {"device": "cpu", "limit_test": 1}
    choice = chosen(values)
    torch.manual_seed(values["seed"])
    task = build_task(values, choice)
    key = str((values["dataset"], choice.entry.Options.keywords(values), choice.trainer_type.name))
    if key not in loaded:
        loaded[key] = load_data(values, choice, task, torch.device("cpu"))
    data = loaded[key]
    model = build_model(values, choice, task.sizes(data))
    names = ("lr", "weight_decay", "momentum", "decay_bias")
    optimizer = build_optimizer(model, values["optimizer"], **{n: values[n] for n in names})
    batch = next(iter(build_loader(data.train, batch_size=values["batch_size"])))
    inputs, targets = task.prepare(batch, torch.device("cpu"))
    model.eval()
    flops = sum(row[4] for row in layer_rows(model, inputs[:1]))
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        optimizer.step()

    return step, {"parameters": count_parameters(model)[0], "mflops": flops / 1e6}


def peak_of(step: Any) -> float:
    """Return what a step adds to this process's memory at its peak, in MiB; else nan."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(kind: str) -> float:
    """Return VmRSS or VmHWM of this process in MiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines)
        return int(found[kind].split()[0]) / 1024
    except (OSError, KeyError):
        return math.nan


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commands", nargs="+", metavar="FLAGS", help="flags of a run, in quotes")
    parser.add_argument("--rounds", type=int, default=15, help="steps that are timed")
    args = parser.parse_args(argv)
    for row in measure_costs({flags: flags for flags in args.commands}, args.rounds):
        setting = row.pop("setting")
        print(setting, *(f"{name} {value:.4g}" for name, value in row.items()), sep="  ")


if __name__ == "__main__":
    main()
