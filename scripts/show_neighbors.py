r"""Show what the neighbor layers of a trained network take.

    python scripts/show_neighbors.py Output/ConvNet/Branching --sample 3
    python scripts/show_neighbors.py Output/N3Net/Conv2d --image photo.jpg --positions 40,60 90,20

docs/neighbors.png is what the first neighbor layer of a small denoiser takes on scikit-learn's
china.jpg (20 minutes of training on one thread of a busy machine; Train400 are the 400 gray
photographs that denoisers are usually trained on):

    python main.py --model dncnn --layer Branching --depth 5 --features 24 --dataset denoise \
        --train_dir Train400 --test_dir Set12 --limit_test 2 --sigma 25 --crop_size 40 \
        --crops_per_image 4 --num_epochs 5 --batch_size 16 --device cpu
    python scripts/show_neighbors.py Output/DnCNN/Branching --image china.jpg --side 60 \
        --layers layer1.0.branch1 --positions 20,19 35,54 9,47 --output docs/neighbors.png

Every row of the picture is a layer, every color a position. First comes what the other similarity
takes ("Loc": the closest positions, which are the taps of a convolution), then what the layer
takes; layers with heads, and nonlocal blocks with their volumes, have a panel for each. Where
neighbors have weights, the heavier they are the less transparent. The numbers lie in a .csv file
beside the picture.

Networks compare every position with every other: pictures are reduced to --side pixels first.
Denoisers get the noise they were trained for (--as_is: none).
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from builders import OpenRun, open_run
from dataset import IMAGENET_MEAN, IMAGENET_STD, Data
from files import read_image
from layers.record import Neighbors, Seen, record_neighbors
from utils import atomic_path

LETTERS = 13  # of a title, an inch
COLORS = ("#ff3b30", "#00c8ff", "#ffd60a", "#34e04a", "#ff6bff", "#ff9500")
TITLES = {
    "Loc": "Loc: the {} closest positions, the taps of a convolution",
    "Col": "Col: the {} most similar positions",
    "Loc_Col": "Loc_Col: the {} positions most similar and close",
}


@dataclass(frozen=True)
class Shown:
    """A picture as people and as the network see it, (C, H, W) each."""

    picture: Tensor
    inputs: Tensor


def statistics(data: Data) -> tuple[Tensor, Tensor]:
    """Return the mean and deviation that a network's images are normalised by, (C, 1, 1)."""
    base = data.test.dataset if isinstance(data.test, Subset) else data.test
    if getattr(base, "mean", None) is not None:
        return base.mean, base.std
    return (torch.tensor(v).view(-1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))


def take_sample(run: OpenRun, number: int, side: int, as_is: bool) -> Shown:
    """Take a test sample; pictures to restore are reduced, as those of files are."""
    data = run.load_data()
    if not 0 <= number < len(data.test):
        raise ValueError(
            f"--sample {number}: there are {len(data.test)} test samples, counted from 0."
        )
    inputs, targets = data.test[number]
    if run.task.name == "classification":
        mean, std = statistics(data)
        return Shown(inputs * std + mean, inputs)
    if not hasattr(run.task, "visible"):
        raise ValueError(
            f"--sample: the samples of --dataset {run.values['dataset']} are no pictures."
        )
    if run.values["dataset"] == "pairs":  # noise that a camera made
        return prepare(run, run.task.visible(inputs[None])[0], side, True)
    clean = targets if isinstance(targets, Tensor) else targets[0]
    return prepare(run, clean[: run.task.channels], side, as_is)


def read_picture(run: OpenRun, path: str, side: int, as_is: bool) -> Shown:
    """Read a picture in as many channels as the network takes."""
    channels = run.task.channels if hasattr(run.task, "degrade") else run.shape[0]
    return prepare(run, read_image(path, color=channels == 3)[0].float() / 255, side, as_is)


def prepare(run: OpenRun, picture: Tensor, side: int, as_is: bool) -> Shown:
    """Reduce a picture (C, H, W), and make of it what the network takes."""
    height, width = picture.shape[1:]
    smallest = run.choice.model_type.min_input_size
    factor = max(min(1.0, side / max(height, width)), smallest / min(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    size = getattr(run.model, "image_size", size)  # a ViT takes no other
    picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    if not hasattr(run.task, "degrade"):
        mean, std = statistics(run.load_data())
        return Shown(picture, (picture - mean) / std)
    if as_is and run.task.extra_channels:
        raise ValueError("--as_is: this network is told the noise by a channel; leave it out.")
    if as_is or run.task.name != "denoising":
        return Shown(picture, picture)
    generator = torch.Generator().manual_seed(run.values["seed"])
    return Shown(picture, run.task.degrade(picture[None], generator)[0])


def striking_positions(picture: Tensor, count: int = 3) -> list[tuple[int, int]]:
    """Choose positions that stand out from what surrounds them, apart from each other."""
    height, width = picture.shape[1:]
    gap = max(2, min(height, width) // 3)
    around = F.avg_pool2d(picture[None], 2 * (gap // 2) + 1, 1, gap // 2, count_include_pad=False)
    contrast = F.avg_pool2d((picture - around[0]).square().mean(0)[None], 3, 1, 1)[0]
    found = []
    for _ in range(count):
        row, col = divmod(int(contrast.argmax()), width)
        found.append((row, col))
        near = (slice(max(0, row - gap), row + gap + 1), slice(max(0, col - gap), col + gap + 1))
        contrast[near] = -1
    return found


def read_position(text: str) -> tuple[int, int]:
    try:
        row, col = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a position is its row and column, counted from 0, as in 12,30 (got {text!r})"
        ) from None
    return row, col


def choose_records(records: Sequence[Neighbors], names: Sequence[str] | None) -> list[Neighbors]:
    """Return the records to show, of the layers asked for."""
    there = [record for record in records if len(record.map_shape) == 2]
    if not there:
        raise ValueError(
            "this network has no layer that chooses neighbors on a map: train one with --layer "
            "ConvNN, Branching, ConvNN_Attn or Branching_Attn, --model vit or --model n3net."
        )
    if names is None:
        return there
    known = [record.name for record in there]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"--layers {' '.join(unknown)}: no such layer. There is: {', '.join(known)}."
        )
    return [record for record in there if record.name in names]


# ---------------------------------------------------------------------------------------------
# Drawing


def panels_of(record: Neighbors, most: int) -> list[tuple[str, str | int]]:
    """Return what each panel of a layer shows: its title, and another similarity or a group."""
    count = record.indices.shape[-1]
    panels: list[tuple[str, str | int]] = [
        (TITLES[name].format(count), name) for name in record.beside
    ]
    for group in range(min(most, record.num_groups)):
        if record.group:
            title = f"{record.group} {group + 1}"
        else:
            title = TITLES.get(record.taken, f"the {{}} positions by {record.taken}, with weights")
        panels.append((title.format(count), group))
    return panels


def share_shown(seen: Sequence[Seen], what: str | int, most: int) -> str:
    """Say which part of the weights the drawn neighbors have, if it is not all."""
    if isinstance(what, str) or seen[0].weights is None:
        return ""
    shares = [float(one.weights[what][:most].sum() / one.weights[what].sum()) for one in seen]
    least, largest = min(shares), max(shares)
    if least > 0.999:
        return ""
    span = (
        f"{least:.0%}" if round(least, 2) == round(largest, 2) else f"{least:.0%} to {largest:.0%}"
    )
    return f" (drawn: {span} of the weight)"


def draw_square(axes, center: Tensor, extent: Tensor, **style) -> None:
    """Draw the rectangle that a position covers, its edge set off from a picture of its color."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    top, left = (center - extent / 2).tolist()
    height, width = extent.tolist()
    around = [withStroke(linewidth=style["linewidth"] + 1.2, foreground="white")]
    axes.add_patch(Rectangle((left, top), width, height, path_effects=around, **style))


def draw_panel(axes, picture: Tensor, seen: Sequence[Seen], what: str | int, most: int) -> None:
    """Draw the picture, and what every position takes."""
    color = picture.shape[0] == 3
    image = picture.permute(1, 2, 0) if color else picture[0]
    axes.imshow(image.clamp(0, 1).numpy(), cmap=None if color else "gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    low, high = torch.full((2,), -0.5), torch.tensor(picture.shape[1:]) - 0.5
    for one, tint in zip(seen, [COLORS[i % len(COLORS)] for i in range(len(seen))], strict=True):
        positions = one.beside[what] if isinstance(what, str) else one.positions[what]
        weights = None if isinstance(what, str) or one.weights is None else one.weights[what]
        drawn = positions[:most]
        strength = torch.ones(len(drawn)) if weights is None else weights[:most] / weights.max()
        for center, share in zip(drawn, strength.tolist(), strict=True):
            if share < 0.02 or center.isnan().any():
                continue
            (row, col), (to_row, to_col) = one.query.tolist(), center.tolist()
            axes.plot(
                [col, to_col],
                [row, to_row],
                color=tint,
                linewidth=0.8,
                alpha=0.2 + 0.6 * share,
            )
            style = {"edgecolor": tint, "linewidth": 1.3, "alpha": 0.25 + 0.75 * share}
            draw_square(axes, center, one.extent, facecolor="none", **style)
            low = torch.minimum(low, center - one.extent / 2)
            high = torch.maximum(high, center + one.extent / 2)
        draw_square(axes, one.query, one.extent, facecolor=tint, edgecolor="black", linewidth=1)
    axes.set_xlim(float(low[1]), float(high[1]))
    axes.set_ylim(float(high[0]), float(low[0]))
    axes.set_facecolor("#555555")  # the border of zeros, where somebody looks there


def draw(
    path: Path,
    picture: Tensor,
    records: Sequence[Neighbors],
    positions: Sequence[tuple[int, int]],
    *,
    most_groups: int,
    most_neighbors: int,
    names: bool = True,
) -> None:
    """Draw a row of panels for each layer."""
    from matplotlib.figure import Figure

    rows = [panels_of(record, most_groups) for record in records]
    columns = max(map(len, rows))
    height, width = picture.shape[1:]
    size = 3.6 if columns <= 3 else 2.6
    figure = Figure(
        figsize=(columns * size, len(rows) * (size * min(2.0, height / width) + 0.5)),
        layout="constrained",
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for record, panels, line in zip(records, rows, grid, strict=True):
        seen = [record.at(*position, shape=(height, width)) for position in positions]
        for axes in line[len(panels) :]:
            axes.axis("off")
        for axes, (title, what) in zip(line, panels, strict=False):
            draw_panel(axes, picture, seen, what, most_neighbors)
            title += share_shown(seen, what, most_neighbors)
            axes.set_title(fill(title, int(LETTERS * size)), fontsize=9)
        if names:
            line[0].set_ylabel(record.name, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def write_table(
    path: Path,
    shape: tuple[int, int],
    records: Sequence[Neighbors],
    positions: Sequence[tuple[int, int]],
    most_neighbors: int,
) -> None:
    """Write the numbers behind the picture."""
    head = ["layer", "taken", "group", "row", "col", "rank", "neighbor_row", "neighbor_col"]
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*head, "weight"])
        for record in records:
            for position in positions:
                seen = record.at(*position, shape=shape)
                sets = [(name, 0, found, None) for name, found in seen.beside.items()]
                for group, found in enumerate(seen.positions):
                    weights = None if seen.weights is None else seen.weights[group].tolist()
                    sets.append((record.taken, group, found, weights))
                for taken, group, found, weights in sets:
                    for rank, (row, col) in enumerate(found[:most_neighbors].tolist()):
                        place = ["", ""] if row != row else [f"{row:g}", f"{col:g}"]
                        weight = "" if weights is None else f"{weights[rank]:.6g}"
                        start = [record.name, taken, group + 1, *position, rank + 1]
                        writer.writerow([*start, *place, weight])


# ---------------------------------------------------------------------------------------------
# The command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a trained network, or a file of weights/")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--image", metavar="FILE", help="picture to look at")
    source.add_argument(
        "--sample", type=int, metavar="N", help="test sample to look at (without --image: 0)"
    )
    parser.add_argument(
        "--positions",
        type=read_position,
        nargs="+",
        metavar="R,C",
        help="rows and columns of pixels that ask; not given: three that stand out",
    )
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="layers to show; else all")
    parser.add_argument(
        "--side", type=int, default=96, help="longer side a picture is reduced to (default 96)"
    )
    parser.add_argument("--as_is", action="store_true", help="add no noise to a picture")
    parser.add_argument(
        "--groups", type=int, default=4, help="heads or volumes to show at most (default 4)"
    )
    parser.add_argument(
        "--most", type=int, default=9, help="neighbors of a position to show at most (default 9)"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="picture to write (not given: neighbors.png in the run)"
    )
    return parser


def show(args: argparse.Namespace) -> Path:
    """Run the network once, and write the picture and its table."""
    for name in ("side", "groups", "most"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1 (got {getattr(args, name)}).")
    run = open_run(args.run)
    if args.image is not None:
        shown = read_picture(run, args.image, args.side, args.as_is)
    else:
        shown = take_sample(run, args.sample or 0, args.side, args.as_is)
    shape = tuple(shown.picture.shape[1:])
    positions = args.positions or striking_positions(shown.picture)
    for row, col in positions:
        if not (0 <= row < shape[0] and 0 <= col < shape[1]):
            raise ValueError(
                f"--positions {row},{col}: the picture has {shape[0]} rows and {shape[1]} columns "
                "(after --side), counted from 0."
            )
    with torch.no_grad(), record_neighbors(run.model) as records:
        run.model(shown.inputs[None])
    records = choose_records(records, args.layers)
    folder = Path(args.run) if Path(args.run).is_dir() else Path(".")
    path = Path(args.output) if args.output else folder / "neighbors.png"
    if path.suffix != ".png":
        raise ValueError(f"--output {path}: the picture is a .png file.")
    draw(
        path,
        shown.picture,
        records,
        positions,
        most_groups=args.groups,
        most_neighbors=args.most,
    )
    write_table(path.with_suffix(".csv"), shape, records, positions, args.most)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        path = show(args)
    except ValueError as error:
        parser.error(str(error))
    print(f"{path} and {path.with_suffix('.csv')}")


if __name__ == "__main__":
    main()
