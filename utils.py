"""What a run leaves and what it needs: folders, checkpoints, text files, seeds, counts, curves.

Everything that a run leaves on disk goes through this file: text and checkpoints are written to a
temporary name beside their target and renamed, so that an interrupted write never damages what was
there before.
"""

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

__all__ = [
    "CsvLog",
    "Measured",
    "Pass",
    "Progress",
    "RunFolder",
    "atomic_path",
    "autocast",
    "compute_flops",
    "count_parameters",
    "describe_model",
    "distributed",
    "format_args",
    "get_random_state",
    "load_checkpoint",
    "load_pretrained",
    "load_weights",
    "memory_size",
    "parse_args_text",
    "plot_growth",
    "plot_learning_curves",
    "read_tensor_file",
    "read_text_file",
    "read_weights",
    "save_checkpoint",
    "save_panels",
    "seed_everything",
    "set_random_state",
    "world_size",
    "write_text",
]


# ---------------------------------------------------------------------------------------------
# Randomness


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries underneath still draw from the global state
    torch.manual_seed(seed)


def get_random_state() -> dict[str, Any]:
    """Collect the state of every global generator in types that load with ``weights_only=True``."""
    version, words, gauss = random.getstate()
    name, keys, pos, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), pos, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`get_random_state` collected."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), pos, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


# ---------------------------------------------------------------------------------------------
# The machine


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    """Mixed precision: float16 on GPUs, bfloat16 on the CPU."""
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def world_size() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def distributed(wanted: bool) -> Iterator[bool]:
    """Join the processes that torchrun started; yield whether this one writes files.

    Args:
        wanted: Whether the work can be shared; otherwise nothing is joined.
    """
    joins = wanted and world_size() > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("gloo")
    try:
        yield not dist.is_initialized() or dist.get_rank() == 0
    finally:
        if joins:
            dist.destroy_process_group()


def memory_size(device: torch.device) -> int | None:
    """Return the memory of a device in bytes, free or not; None where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return None


# ---------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to ``path`` when the block succeeds."""
    path = Path(path)
    # The suffix stays: writers such as matplotlib choose the file format by it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_checkpoint(path: str | os.PathLike, checkpoint: Mapping[str, Any]) -> None:
    """Save tensors and plain types atomically (they load with ``weights_only=True``)."""
    with atomic_path(path) as temporary:
        torch.save(dict(checkpoint), temporary)


def read_tensor_file(path: str | os.PathLike) -> Any:
    """Read what ``torch.save`` wrote, to the CPU; nothing but tensors and plain types is unpickled.

    Raises:
        ValueError: If the file is missing or damaged, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"there is no checkpoint {path}.") from error
    except Exception as error:  # torch.load documents no error types: zip, pickle, EOF, runtime
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error


MOST_TEXT = 2**30  # bytes


def read_text_file(path: str | os.PathLike) -> str:
    """Read a regular file of UTF-8 text.

    Raises:
        ValueError: If it is missing, no regular file (a pipe could wait for ever), or no text.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is no regular file")
        if found.st_size > MOST_TEXT:
            raise OSError(
                f"it has {found.st_size:,} bytes, and texts of up to {MOST_TEXT:,} are read"
            )
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}.") from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise ValueError(f"{path} cannot be read: {error}.") from error


def format_args(args: Mapping[str, Any]) -> str:
    """Word arguments as one ``name: value`` per line, lists and unusual strings as JSON.

    A string is unusual if a plain line would not give it back: line breaks, blanks at its ends,
    the word None, a quote at its beginning, characters that cannot be printed.
    :func:`parse_args_text` reads it back.
    """
    lines = []
    for name, value in args.items():
        if isinstance(value, list | tuple):
            value = json.dumps(list(value))
        elif isinstance(value, str) and (
            value == "None" or value[:1] == '"' or value != value.strip() or not value.isprintable()
        ):
            value = json.dumps(value)
        lines.append(f"{name}: {value}\n")
    return "".join(lines)


def parse_args_text(text: str) -> dict[str, str]:
    """Read ``name: value`` lines into strings; lines without a colon are ignored.

    Lines that begin with a space or ``#`` are ignored as well. What is written as JSON stays so.
    """
    values = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon and name and not name[0].isspace() and not name.startswith("#"):
            values[name.strip()] = value.strip()
    return values


class CsvLog:
    """A CSV file with one row per event, flushed as it is written.

    Args:
        path: The file. Rows already known are written anew, so that a resumed run holds each
            row once.
        rows: Rows to start with.
    """

    def __init__(self, path: str | os.PathLike, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        self.path = Path(path)
        self.fields: list[str] = list(rows[0]) if rows else []
        if rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, self.fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_text(self.path, text.getvalue())
        else:
            self.path.unlink(missing_ok=True)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; the first row decides the columns."""
        new = not self.fields
        if new:
            self.fields = list(row)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.fields, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


# ---------------------------------------------------------------------------------------------
# Checkpoints


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Load a checkpoint to the CPU, tensors and plain types only.

    Raises:
        ValueError: If the file is missing, damaged or no checkpoint.
    """
    checkpoint = read_tensor_file(path)
    if not isinstance(checkpoint, dict) or "model" not in checkpoint or "args" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of this program (it lacks 'model' and 'args').")
    for name in ("model", "args"):
        if not isinstance(checkpoint[name], Mapping):
            raise ValueError(f"{path} is no checkpoint of this program: '{name}' is no table.")
    return checkpoint


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights of a published checkpoint, of one of this program, or a plain state dict.

    Nothing but tensors and plain types is unpickled.

    Args:
        path: The file (`051_ckpt.t7`, `best.pt`, …).

    Returns:
        The weights by name, and the arguments of the run where the file holds them.

    Raises:
        ValueError: If the file is missing, damaged, or holds no weights.
    """
    content = read_tensor_file(path)
    weights: Any = content
    arguments: dict[str, Any] = {}
    if isinstance(content, Mapping):
        arguments = dict(content.get("args") or {}) if "model" in content else {}
        for name in ("net", "model", "state_dict"):
            if isinstance(content.get(name), Mapping):
                weights = content[name]
                break
    if (
        not isinstance(weights, Mapping)
        or not weights
        or not all(isinstance(value, Tensor) for value in weights.values())
    ):
        raise ValueError(
            f"{path} holds no weights: expected tensors by name, or such a table under "
            "'net' (published files) or 'model' (this program)."
        )
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights, arguments


def load_weights(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Load a checkpoint's weights; a mismatch becomes a ValueError that lists the names."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the model: {error}") from error


def load_pretrained(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Load weights by name; every one must arrive.

    Weights that published files hold and no forward pass applies (`model.dead_weights`, a regular
    expression) are left out, and counters of batches that older files lack stay at zero.

    Args:
        model: The network.
        weights: By name, as :func:`read_weights` gives them.

    Returns:
        Names that were left out.

    Raises:
        ValueError: If names are missing or unknown or shapes differ; lists all of them.
    """
    own = model.state_dict()
    pattern = getattr(model, "dead_weights", None)
    dead = [n for n in weights if pattern and re.fullmatch(pattern, n) and n not in own]
    found = {name: value for name, value in weights.items() if name not in dead}
    counter = "num_batches_tracked"
    problems = [
        f"missing: {name} {tuple(value.shape)}"
        for name, value in own.items()
        if name not in found and not name.endswith(counter)
    ]
    problems += [
        f"unknown: {name} {tuple(value.shape)}" for name, value in found.items() if name not in own
    ]
    problems += [
        f"other shape: {name} is {tuple(value.shape)} there and {tuple(own[name].shape)} here"
        for name, value in found.items()
        if name in own and value.shape != own[name].shape
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit this {type(model).__name__}; {len(problems)} names differ:\n  "
            + "\n  ".join(problems)
        )
    model.load_state_dict(found, strict=False)
    return dead


# ---------------------------------------------------------------------------------------------
# The folder of a run


@dataclass
class Progress:
    """What a run has done so far; part of every checkpoint."""

    epoch: int = 0
    best_epoch: int = 0
    best_value: float = float("-inf")
    history: list[dict[str, float]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    times: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Pass:
    """What the training part of an epoch did.

    Attributes:
        epoch: Its number.
        metrics: Training metrics, averaged over samples.
        samples: How many samples were learnt from.
        start: When it began, by `time.perf_counter`.
        seconds: How long it took.
    """

    epoch: int
    metrics: dict[str, float]
    samples: int
    start: float
    seconds: float


@dataclass
class Measured:
    """What the evaluation of an epoch found.

    Attributes:
        metrics: The metrics that decide on the best epoch.
        rows: Rows of metrics.csv.
        lines: Lines of the results file.
        times: Rows of timing.csv.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    lines: list[str]
    times: list[dict[str, Any]]


class RunFolder:
    """The files of one run: args.txt, model.txt, results, tables, checkpoints, pictures.

    Args:
        path: The folder; created by :meth:`start`.
        writes: Whether this process writes; of several processes only the first one does.
    """

    RESULTS, METRICS, TIMING = "train_eval_results.txt", "metrics.csv", "timing.csv"
    LAST, BEST, TEST, CURVES = "last.pt", "best.pt", "test_results.txt", "curves.png"
    ARGS, MODEL, SUMMARY = "args.txt", "model.txt", "summary.json"

    def __init__(self, path: str | os.PathLike, *, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes

    def holds_run(self) -> bool:
        """Say whether an earlier run left results here."""
        names = (self.LAST, self.BEST, self.METRICS, self.TEST)
        return any((self.path / name).exists() for name in names)

    def file(self, name: str) -> Path:
        """Return the path of a file that is about to be written; its folder is made."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def start(self, args_text: str, model_text: str, progress: Progress) -> None:
        """Write args.txt and model.txt, and the logs as far as they are known."""
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / self.ARGS, args_text)
        write_text(self.path / self.MODEL, model_text)
        if not progress.history:
            for name in (self.LAST, self.BEST, self.TEST, self.CURVES, self.SUMMARY):
                (self.path / name).unlink(missing_ok=True)
        write_text(self.path / self.RESULTS, "".join(f"{line}\n" for line in progress.lines))
        self.metrics = CsvLog(self.path / self.METRICS, progress.history)
        self.timing = CsvLog(self.path / self.TIMING, progress.times)

    def write_line(self, line: str) -> None:
        """Append a line to the results file and show it."""
        if not self.writes:
            return
        tqdm.write(line)
        with open(self.path / self.RESULTS, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def save(self, checkpoint: Mapping[str, Any], *, best: bool) -> None:
        """Save ``last.pt``, and let ``best.pt`` be the same file if it is the best so far."""
        if not self.writes:
            return
        save_checkpoint(self.path / self.LAST, checkpoint)
        if best:
            with atomic_path(self.path / self.BEST) as temporary:
                temporary.unlink()
                try:
                    os.link(self.path / self.LAST, temporary)
                except OSError:  # a file system without hard links
                    shutil.copyfile(self.path / self.LAST, temporary)

    def log(
        self,
        rows: Sequence[Mapping[str, Any]],
        lines: Sequence[str],
        times: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write what was measured: rows of the table, lines of the results, times."""
        if not self.writes:
            return
        for line in lines:
            self.write_line(line)
        for row in rows:
            self.metrics.append(row)
        for row in times:
            self.timing.append(row)

    def summarize(self, **facts: Any) -> None:
        """Write ``summary.json``: what scripts need to know of a run without guessing."""
        if self.writes:
            write_text(self.file(self.SUMMARY), json.dumps(facts, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------
# What a network is


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count parameters: (all, trainable)."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)


def compute_flops(model: nn.Module, inputs: Tensor) -> int:
    """Count floating-point operations of one forward pass (a multiply-add counts as two).

    Counts matrix products and convolutions, the similarity products of the search included;
    selection (top-K) and gathering do no arithmetic and count as zero.
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton: only where it is used

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return counter.get_total_flops()


def describe_model(model: nn.Module, inputs: Tensor) -> str:
    """Describe a network: module tree, torchinfo summary, parameters, FLOPs of one forward pass.

    Args:
        model: The network; its mode is left as it was.
        inputs: One sample with a batch dimension.
    """
    import torchinfo

    training = model.training
    model.eval()
    try:
        flops = compute_flops(model, inputs)
        with torch.no_grad():
            summary = torchinfo.summary(
                model,
                input_data=inputs,
                depth=6,
                verbose=0,
                col_names=("input_size", "output_size", "num_params", "kernel_size"),
            )
    finally:
        model.train(training)
    total, trainable = count_parameters(model)
    return (
        f"{model}\n\n{summary}\n\n"
        f"Parameters: {total:,} ({trainable:,} trainable)\n"
        f"FLOPs of one forward pass on {tuple(inputs.shape)}: {flops:,} "
        "(a multiply-add counts as two)\n"
    )


# ---------------------------------------------------------------------------------------------
# Pictures


def save_panels(path: str | os.PathLike, panels: Mapping[str, Tensor]) -> None:
    """Draw images side by side, each pixel as one pixel, captions above.

    Args:
        path: Where the PNG goes.
        panels: Images (C, H, W) by caption, clipped to [0, 1] for display.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    height, width = next(iter(panels.values())).shape[-2:]
    top, gap = 20, 4
    sheet = Image.new("RGB", ((width + gap) * len(panels) - gap, height + top), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, image) in enumerate(panels.items()):
        array = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        array = array.expand(3, -1, -1).permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(array), (i * (width + gap), top))
        draw.text((i * (width + gap) + 3, 2), caption, fill="black", font=font)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def plot_learning_curves(
    history: Sequence[Mapping[str, float]], path: str | os.PathLike, *, eval_name: str = "test"
) -> None:
    """Draw one panel per metric that a training run measured, both sets in it.

    Args:
        history: One mapping per epoch, with keys ``epoch``, ``train_<metric>``, ``test_<metric>``.
        path: Where the PNG goes.
        eval_name: Prefix of the held-out columns.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    names = [key.removeprefix("train_") for key in history[0] if key.startswith("train_")]
    names += [
        key.removeprefix(f"{eval_name}_")
        for key in history[0]
        if key.startswith(f"{eval_name}_") and key.removeprefix(f"{eval_name}_") not in names
    ]
    figure = Figure(figsize=(4.2 * max(1, len(names)), 3.4), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axis, name in zip(
        figure.subplots(1, max(1, len(names)), squeeze=False)[0], names, strict=False
    ):
        for prefix, style in (("train", "o-"), (eval_name, "s-")):
            values = [row.get(f"{prefix}_{name}") for row in history]
            if all(value is not None for value in values):
                axis.plot(epochs, values, style, markersize=3, label=prefix)
        axis.set(xlabel="epoch", title=name)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def plot_growth(rows: Sequence[Mapping[str, float]], path: str | os.PathLike) -> None:
    """Draw how a network grew: its centers, and how much of each batch it got right.

    Args:
        rows: One mapping a batch with ``layer``, ``samples``, ``centers``, ``seen`` (% right before
            the batch was learnt) and ``learnt`` (% right after).
        path: Where the PNG goes.
    """
    from matplotlib.figure import Figure

    seen_samples, total = [], 0
    for row in rows:
        total += row["samples"]
        seen_samples.append(total)
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number in sorted({row["layer"] for row in rows}):
        mine = [i for i, row in enumerate(rows) if row["layer"] == number]
        left.plot(
            [seen_samples[i] for i in mine],
            [rows[i]["centers"] for i in mine],
            label=f"layer {number}",
        )
    left.set(xlabel="samples", title="centers")
    left.legend()
    width = max(1, len(rows) // 100)  # batches are small: average some
    groups = [range(i, min(i + width, len(rows))) for i in range(0, len(rows), width)]
    for name, label in (("seen", "before it is learnt"), ("learnt", "after")):
        right.plot(
            [seen_samples[group[-1]] for group in groups],
            [sum(rows[i][name] for i in group) / len(group) for group in groups],
            label=label,
        )
    right.set(xlabel="samples", title="% right in a batch")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.locator_params(axis="x", nbins=5)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
