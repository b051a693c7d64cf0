"""What a run needs everywhere: seeds, the machine's memory, files, counts of a network, curves.

Whatever is left on disk goes through this file: it is written to a temporary name beside its target
and renamed, so that an interrupted write never damages what was there before.
"""

import contextlib
import csv
import io
import json
import os
import random
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "CsvLog",
    "WriteError",
    "atomic_path",
    "autocast",
    "compute_flops",
    "count_parameters",
    "csv_text",
    "describe_model",
    "format_args",
    "free_memory",
    "get_random_state",
    "layer_rows",
    "lonely_norms",
    "memory_size",
    "parse_args_text",
    "plot_growth",
    "plot_learning_curves",
    "read_text_file",
    "save_panels",
    "seed_everything",
    "set_random_state",
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
        there = state["cuda"][: torch.cuda.device_count()]
        torch.cuda.set_rng_state_all([s.cpu() for s in there])


# ---------------------------------------------------------------------------------------------
# The machine


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    """Mixed precision: float16 on GPUs, bfloat16 on the CPU."""
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def memory_size(device: torch.device) -> int | None:
    """Return the memory of a device in bytes, free or not; None where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return None


def free_memory(device: torch.device) -> int:
    """Return the bytes of a device that nobody uses; half of the machine's if it does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return (memory_size(device) or 4 * 2**30) // 2
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


# ---------------------------------------------------------------------------------------------
# Files


class WriteError(RuntimeError):
    """A file that cannot be written; the message names it and says why."""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn what the system says of a file that cannot be written into a :class:`WriteError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(
            f"{path} cannot be written: {reason}. Make room there or give yourself the right to "
            "write, or name another folder."
        ) from error


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to ``path`` when the block succeeds.

    Raises:
        WriteError: If the file cannot be written.
    """
    path = Path(path)
    with writing(path):
        # The suffix stays: writers such as matplotlib choose the file format by it.
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem[:100]}-", suffix=path.suffix
        )
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


LEFT_OVER = re.compile(r"\.\w+-[a-z0-9_]{8}\.(pt|txt|csv|png|json)")  # names of `atomic_path`


def remove_left_overs(folder: Path) -> None:
    """Remove what writes that were killed left in a folder, and in the folders in it."""
    for path in [*folder.glob(".*-*"), *folder.glob("*/.*-*")]:
        if LEFT_OVER.fullmatch(path.name) and path.is_file():
            with writing(path):
                path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out rows as CSV; the first one decides the columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


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
            write_text(self.path, csv_text(rows))
        else:
            self.path.unlink(missing_ok=True)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; the first row decides the columns."""
        new = not self.fields
        if new:
            self.fields = list(row)
        with writing(self.path), open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.fields, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


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


def layer_rows(model: nn.Module, inputs: Tensor) -> list[tuple[str, str, str, int, int]]:
    """Measure every module that has parameters, or does arithmetic, of its own.

    A module's children are left out of its numbers, and shared ones are counted once: the columns
    add up to the totals of the network.

    Args:
        model: The network, in evaluation mode.
        inputs: One sample with a batch dimension.

    Returns:
        Name, class, shape of the last output ("" if it is not called by itself), parameters and
        FLOPs of one forward pass of each.
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton: only where it is used

    shapes: dict[nn.Module, str] = {}
    flops: dict[nn.Module, int] = {}
    open_calls: list[list[int]] = []  # FLOPs when the call began, and those of its children
    handles = []

    def begin(module: nn.Module, _: Any) -> None:
        open_calls.append([counter.get_total_flops(), 0])

    def end(module: nn.Module, _: Any, output: Any) -> None:
        start, below = open_calls.pop()
        spent = counter.get_total_flops() - start
        flops[module] = flops.get(module, 0) + spent - below
        if open_calls:
            open_calls[-1][1] += spent
        shapes[module] = str(tuple(output.shape)) if isinstance(output, Tensor) else ""

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(begin))
            handles.append(module.register_forward_hook(end))
        try:
            model(inputs)
        finally:
            for handle in handles:
                handle.remove()
    rows, seen = [], set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        count, spent = sum(p.numel() for p in own), flops.get(module, 0)
        if count or spent:
            rows.append(
                (name or "(itself)", type(module).__name__, shapes.get(module, ""), count, spent)
            )
    return rows


def lonely_norms(model: nn.Module, inputs: Tensor) -> list[str]:
    """Return the names of batch norms that see one value per channel of these inputs.

    In training they would have no variance to divide by.

    Args:
        model: The network; its mode is left as it was.
        inputs: One sample with a batch dimension.
    """
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(_: nn.Module, arguments: tuple) -> None:
            x = arguments[0]
            if x.numel() == x.shape[1] and name not in found:
                found.append(name)

        return look

    norms = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in norms]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def describe_model(model: nn.Module, inputs: Tensor) -> str:
    """Describe a network: module tree, and one table of shapes, parameters and FLOPs.

    Args:
        model: The network; its mode is left as it was.
        inputs: One sample with a batch dimension.
    """
    training = model.training
    model.eval()
    try:
        rows = layer_rows(model, inputs)
    finally:
        model.train(training)
    total, trainable = count_parameters(model)
    lines = [("module", "class", "output", "parameters", "FLOPs")]
    lines += [(*row[:3], f"{row[3]:,}", f"{row[4]:,}") for row in rows]
    lines.append(("total", "", "", f"{total:,}", f"{sum(row[4] for row in rows):,}"))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    table = "\n".join(
        "  ".join(
            cell.rjust(width) if i > 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return (
        f"{model}\n\n{table}\n\n"
        f"Parameters: {total:,} ({trainable:,} trainable), {4 * total / 1e6:,.2f} MB in float32\n"
        f"FLOPs of one forward pass on {tuple(inputs.shape)}: {sum(row[4] for row in rows):,} "
        "(a multiply-add counts as two; the similarities of a search are in it; normalization, "
        "activations, and picking and gathering neighbors count as zero)\n"
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
        if len(epochs) == 1:  # around a single value the locator has fractions
            axis.set_xticks(epochs)
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
