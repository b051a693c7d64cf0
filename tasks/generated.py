"""Generated images whose class lies in what is alike, wherever it is: recall, match, copy.

Nothing is downloaded: the images follow from ``--seed`` and the flags. They are made for asking
what a layer can relate over a distance; no class shows in any one place, nor in how often a color
or a shape occurs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataset import Data, build_array_data
from options import Options, option

__all__ = [
    "CopyOptions",
    "MatchOptions",
    "RecallOptions",
    "build_copy",
    "build_match",
    "build_recall",
]

ORIENTATIONS = ("horizontal", "vertical", "falling", "rising")
GAP = 1  # empty pixels between two cells


@dataclass(frozen=True)
class GeneratedOptions(Options):
    """How many images, and how hard they are."""

    title = "Generated images (recall, match, copy)"
    num_train: int = option(6000, "generated training images", least=1, most=10**7)
    num_test: int = option(2000, "generated test images", least=1, most=10**7)
    resize: int = option(
        None, "side of the square images are resized to", kind=int, least=1, most=4096
    )
    noise: float = option(
        0.0,
        "standard deviation of Gaussian noise on images in [0, 1], in training and testing",
        least=0,
    )


@dataclass(frozen=True)
class FigureOptions(GeneratedOptions):
    """Colored figures on a grid of cells."""

    grid: int = option(3, "recall and match: cells along a side of the image", least=2, most=64)
    cell: int = option(7, "recall and match: pixels from one cell to the next", least=5, most=64)
    jitter: float = option(
        0.05, "recall and match: how far a hue may lie off its place, in turns", least=0, most=0.25
    )

    def check_room(self, figures: int) -> None:
        """Refuse more figures than cells."""
        if figures > self.grid**2:
            raise ValueError(
                f"{figures} figures do not fit on a grid of {self.grid} x {self.grid} cells: "
                "raise grid, or lower distractors."
            )


@dataclass(frozen=True)
class RecallOptions(FigureOptions):
    """Bars, one of them in the color of a plus."""

    distractors: int = option(
        3, "recall: bars beside the one that is asked for", least=0, most=4096
    )
    repeat: bool = option(
        False, "recall: let several bars have one orientation (more than four bars always do)"
    )

    def __post_init__(self) -> None:
        """Refuse more figures than cells."""
        super().__post_init__()
        self.check_room(self.distractors + 2)


@dataclass(frozen=True)
class MatchOptions(FigureOptions):
    """Two framed patches of the same or of two colors."""

    distractors: int = option(
        0, "match: patches without a frame beside the two framed ones", least=0, most=4096
    )

    def __post_init__(self) -> None:
        """Refuse more figures than cells."""
        super().__post_init__()
        self.check_room(self.distractors + 2)


@dataclass(frozen=True)
class CopyOptions(GeneratedOptions):
    """Noise in which a block may be repeated."""

    side: int = option(20, "copy: side of the image", least=4, most=4096)
    block: int = option(4, "copy: side of the block that may be repeated", least=1, most=4096)

    def __post_init__(self) -> None:
        """Refuse blocks of which two do not fit."""
        super().__post_init__()
        if 2 * self.block > self.side:
            raise ValueError(
                f"block {self.block} is too large for side {self.side}: two blocks must fit side "
                f"by side. Try block {self.side // 2} or less."
            )


# ---------------------------------------------------------------------------------------------
# Drawing


def hue_colors(hues: Tensor) -> Tensor:
    """Return fully saturated colors of hues in turns: (...) -> (..., 3) in [0, 1]."""
    third = torch.tensor([0.0, 2.0, 4.0])
    return ((hues[..., None] * 6 - third + 3).remainder(6) - 3).abs().sub(1).clamp(0, 1).neg() + 1


def bar_stamps(size: int, thickness: int = 2) -> Tensor:
    """Draw the four bars and the plus: (5, size, size) bool, in the order of ORIENTATIONS."""
    position = torch.arange(size)
    low = (size - thickness) // 2
    middle = (position >= low) & (position < low + thickness)
    horizontal = middle[:, None].expand(size, size)
    falling = (position[:, None] - position[None, :]).abs() < thickness
    bars = [horizontal, horizontal.T, falling, falling.flip(1), horizontal | horizontal.T]
    return torch.stack(bars)


def draw_cells(count: int, options: FigureOptions, generator: torch.Generator) -> Tensor:
    """Draw dim uniform backgrounds: (count, 3, grid, cell, grid, cell), one row of cells a side."""
    shade = torch.rand(count, 3, generator=generator) * 0.2
    shape = (count, 3, options.grid, options.cell, options.grid, options.cell)
    return shade[:, :, None, None, None, None].expand(shape).clone()


def random_cells(
    count: int, figures: int, options: FigureOptions, generator: torch.Generator
) -> Tensor:
    """Choose different cells for the figures of each image: (count, figures)."""
    order = torch.rand(count, options.grid**2, generator=generator).argsort(1)
    return order[:, :figures]


def stamp(images: Tensor, cells: Tensor, masks: Tensor, colors: Tensor) -> None:
    """Draw one figure into every image.

    Args:
        images: (N, 3, grid, cell, grid, cell), written to.
        cells: (N,) numbers of cells.
        masks: (N, size, size) bool, the pixels of the figures.
        colors: (N, 3).
    """
    grid, size = images.shape[2], masks.shape[1]
    for number in range(grid * grid):
        mine = (cells == number).nonzero().flatten()
        row, column = divmod(number, grid)
        place = images[mine, :, row, :size, column, :size]  # (N', 3, size, size)
        drawn = torch.where(masks[mine, None], colors[mine, :, None, None], place)
        images[mine, :, row, :size, column, :size] = drawn


def as_pixels(images: Tensor) -> Tensor:
    """Join the cells and round to 8 bits: -> (N, 3, side, side) uint8."""
    if images.dim() == 6:
        n, c, grid, cell, _, _ = images.shape
        images = images.reshape(n, c, grid * cell, grid * cell)[:, :, :-GAP, :-GAP]
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------
# The three questions


def draw_recall(
    count: int, options: RecallOptions, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw bars of different hues and a plus in the hue of one of them, whose orientation counts.

    Args:
        count: Number of images.
        options: Their options.
        generator: What draws.

    Returns:
        Images (count, 3, side, side) uint8 and labels (count,): the orientation of the bar asked
        for, in the order of ORIENTATIONS. The hues lie evenly round the circle, off their places by
        the jitter; bars have different orientations as long as there are not more than four.
    """
    bars = options.distractors + 1
    images = draw_cells(count, options, generator)
    cells = random_cells(count, bars + 1, options, generator)
    if options.repeat or bars > len(ORIENTATIONS):
        kinds = torch.randint(len(ORIENTATIONS), (count, bars), generator=generator)
    else:
        kinds = torch.rand(count, len(ORIENTATIONS), generator=generator).argsort(1)[:, :bars]
    hues = torch.rand(count, 1, generator=generator) + torch.arange(bars) / bars
    hues = hues + options.jitter * (2 * torch.rand(count, bars, generator=generator) - 1)
    colors, stamps = hue_colors(hues), bar_stamps(options.cell - GAP)
    for bar in range(bars):
        stamp(images, cells[:, bar], stamps[kinds[:, bar]], colors[:, bar])
    plus = stamps[-1:].expand(count, -1, -1)
    stamp(images, cells[:, bars], plus, colors[:, 0])
    return as_pixels(images), kinds[:, 0].clone()


def draw_match(
    count: int, options: MatchOptions, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw two patches in white frames, of one hue or of two hues that lie well apart.

    Args:
        count: Number of images.
        options: Their options.
        generator: What draws.

    Returns:
        Images (count, 3, side, side) uint8 and labels (count,): 1 where the two are of one hue, off
        by the jitter at most; elsewhere they differ by a quarter to three quarters of a turn. Every
        third patch and on has no frame and a hue of its own.
    """
    figures, size = options.distractors + 2, options.cell - GAP
    images = draw_cells(count, options, generator)
    cells = random_cells(count, figures, options, generator)
    labels = torch.randint(2, (count,), generator=generator)
    hues = torch.rand(count, figures, generator=generator)
    near = options.jitter * (2 * torch.rand(count, generator=generator) - 1)
    far = 0.25 + 0.5 * torch.rand(count, generator=generator)
    hues[:, 1] = hues[:, 0] + torch.where(labels == 1, near, far)
    colors = hue_colors(hues)
    inner = torch.zeros(count, size, size, dtype=torch.bool)
    inner[:, 1:-1, 1:-1] = True
    whole, white = torch.ones_like(inner), torch.ones(count, 3)
    for figure in range(figures):
        if figure < 2:
            stamp(images, cells[:, figure], whole, white)
        stamp(images, cells[:, figure], inner, colors[:, figure])
    return as_pixels(images), labels


def draw_copy(
    count: int, options: CopyOptions, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw noise; in half of the images one block stands in two places that do not overlap.

    Args:
        count: Number of images.
        options: Their options.
        generator: What draws.

    Returns:
        Images (count, 3, side, side) uint8 and labels (count,): 1 where a block is repeated.
    """
    side, block = options.side, options.block
    images = torch.rand(count, 3, side, side, generator=generator)
    labels = torch.randint(2, (count,), generator=generator)
    room = side - block + 1
    for index in (labels == 1).nonzero().flatten().tolist():
        while True:
            y, x, v, u = torch.randint(room, (4,), generator=generator).tolist()
            if abs(y - v) >= block or abs(x - u) >= block:
                break
        source = images[index, :, y : y + block, x : x + block].clone()
        images[index, :, v : v + block, u : u + block] = source
    return as_pixels(images), labels


# ---------------------------------------------------------------------------------------------
# Data sets


def _builder(
    name: str,
    draw: Callable[..., tuple[Tensor, Tensor]],
    options_type: type[GeneratedOptions],
    class_names: Sequence[str],
) -> Callable[..., Data]:
    """Make the builder of a generated data set."""

    def build(*, seed: int, num_train: int, num_test: int, **others: Any) -> Data:
        """Generate the images of both sets, from seeds of their own."""
        names = ("min_side", "normalize", "resize", "noise")
        pixels = {name: others.pop(name) for name in names}
        options = options_type(num_train=num_train, num_test=num_test, **others)
        parts = [
            draw(count, options, torch.Generator().manual_seed(2 * seed + part))
            for part, count in enumerate((num_train, num_test))
        ]
        return build_array_data(
            name,
            *parts,
            class_names,
            augment=False,
            flip=False,
            seed=seed,
            **pixels,
        )

    return build


build_recall = _builder("recall", draw_recall, RecallOptions, ORIENTATIONS)
build_match = _builder("match", draw_match, MatchOptions, ("different", "alike"))
build_copy = _builder("copy", draw_copy, CopyOptions, ("all different", "a block repeated"))
