"""Seeding, file writing, argument files, counts, image quality, pictures. No model code.

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
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "CsvLog",
    "atomic_path",
    "compute_flops",
    "count_parameters",
    "describe_model",
    "format_args",
    "get_random_state",
    "parse_args_text",
    "plot_confusion",
    "plot_growth",
    "plot_learning_curves",
    "plot_neighbors",
    "psnr",
    "read_tensor_file",
    "save_checkpoint",
    "save_panels",
    "seed_everything",
    "set_random_state",
    "ssim",
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


def format_args(args: Mapping[str, Any]) -> str:
    """Word arguments as one ``name: value`` per line, lists as JSON.

    :func:`parse_args_text` reads it back.
    """
    lines = []
    for name, value in args.items():
        if isinstance(value, list | tuple):
            value = json.dumps(list(value))
        lines.append(f"{name}: {value}\n")
    return "".join(lines)


def parse_args_text(text: str) -> dict[str, str]:
    """Read ``name: value`` lines into strings; lines without a colon are ignored.

    Lines that begin with a space or ``#`` are ignored as well.
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
# Image quality


def psnr(images: Tensor, clean: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, (B,), of images (B, C, H, W) in [0, 1].

    10 log10(1 / (MSE + 1e-10)) over all pixels and channels; nothing is clipped.
    """
    error = (images.float() - clean.float()).square().flatten(1).mean(1)
    return -10 * torch.log10(error + 1e-10)


def ssim(images: Tensor, clean: Tensor, *, border: str = "zeros") -> Tensor:
    """Return the structural similarity, (B,), of images (B, C, H, W) in [0, 1].

    Gaussian window of 11×11, σ 1.5; C1 = 0.01², C2 = 0.03². "zeros" averages over the full map,
    zeros around the image (the published denoising numbers); "valid" only where the window fits.
    """
    x = torch.cat((images, clean)).float()
    at = torch.arange(11, device=x.device, dtype=x.dtype) - 5
    window = torch.exp(-at.square() / (2 * 1.5**2))
    window = window / window.sum()
    b, channels = images.shape[:2]
    padding = 5 if border == "zeros" else 0

    def blur(maps: Tensor) -> Tensor:  # (n, C, H, W), separably
        maps = maps.flatten(0, 1)[:, None]
        maps = F.conv2d(maps, window.view(1, 1, 11, 1), padding=(padding, 0))
        maps = F.conv2d(maps, window.view(1, 1, 1, 11), padding=(0, padding))
        return maps.view(-1, channels, *maps.shape[-2:])

    mean = blur(x)
    squares = blur(x.square()) - mean.square()
    mean_a, mean_b = mean[:b], mean[b:]
    product = mean_a * mean_b
    covariance = blur(x[:b] * x[b:]) - product
    c1, c2 = 0.01**2, 0.03**2
    result = (2 * product + c1) / (mean_a.square() + mean_b.square() + c1)
    result = result * (2 * covariance + c2) / (squares[:b] + squares[b:] + c2)
    return result.flatten(1).mean(1)


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


def plot_confusion(counts: Tensor, class_names: Sequence[str], path: str | os.PathLike) -> None:
    """Draw how often samples of a class (row) are taken for each class (column).

    Args:
        counts: (C, C) numbers of samples.
        class_names: Their names.
        path: Where the PNG goes.
    """
    from matplotlib.figure import Figure

    shares = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    classes = len(counts)
    side = min(9.0, 2.5 + 0.42 * classes)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    # The square root makes rare confusions visible beside the diagonal.
    image = axis.imshow(shares.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="predicted", ylabel="true")
    if classes <= 25:
        axis.set_xticks(range(classes), class_names, rotation=90)
        axis.set_yticks(range(classes), class_names)
        for row in range(classes):
            for column in range(classes):
                if counts[row, column]:
                    dark = shares[row, column] > 0.4
                    axis.text(
                        *(column, row, str(int(counts[row, column]))),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if dark else "black",
                    )
    bar = figure.colorbar(image, ax=axis, shrink=0.7)
    ticks = (0, 0.01, 0.1, 0.5, 1)
    bar.set_ticks([t**0.5 for t in ticks], labels=[f"{100 * t:g}%" for t in ticks])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def plot_neighbors(
    rows: Sequence[Sequence[tuple[Tensor, str, bool | None]]], path: str | os.PathLike
) -> None:
    """Draw queries, each with its neighbors in a row.

    Args:
        rows: For every query the query itself and its neighbors: image (C, H, W) in [0, 1],
            caption, and whether its class is right (None for the query).
        path: Where the PNG goes.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(11)
    height, width = rows[0][0][0].shape[-2:]
    zoom = max(1, -(-56 // max(height, width)))
    cell, line = (width * zoom + 10, height * zoom + 24), 16
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (cell[0] * columns, cell[1] * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    colors = {None: "black", True: "green", False: "red"}
    for y, row in enumerate(rows):
        for x, (image, caption, right) in enumerate(row):
            picture = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
            picture = picture.expand(3, -1, -1) if len(picture) == 1 else picture[:3]
            tile = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            tile = tile.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            left, top = x * cell[0] + 5, y * cell[1] + line
            box = (left - 2, top - 2, left + tile.width + 1, top + tile.height + 1)
            draw.rectangle(box, outline=colors[right], width=2)
            sheet.paste(tile, (left, top))
            while caption and draw.textlength(caption, font) > cell[0] - 4:
                caption = caption[:-1]
            draw.text((left, top - line), caption, fill=colors[right], font=font)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


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
