"""Which positions of a padded map take part: queries, and candidates for neighbors.

Positions are numbered row by row on the padded map. Symbols: N padded positions, M queries,
N' candidates, p padding, s stride.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from options import Options, check_at_least, option

__all__ = [
    "SamplingOptions",
    "count_candidates",
    "count_queries",
    "per_axis",
    "query_index",
    "random_index",
    "spatial_index",
]

# Constants of the fixed order: x -> x^5 permutes the integers modulo this prime.
_PRIME = 2**31 - 1
_SHIFT = 20251117


STEP = "step between output positions"
SAMPLING_TYPES = ("all", "random", "spatial")


@dataclass(frozen=True)
class SamplingOptions(Options):
    """Which positions are candidates."""

    sampling_type: str = option(
        "all",
        "which positions are candidates: all, --num_samples drawn at random in every forward "
        "pass, or a regular grid of --num_samples x --num_samples",
        choices=SAMPLING_TYPES,
    )
    num_samples: int = option(
        -1,
        "candidates of random sampling, or side of the grid of spatial sampling; "
        "-1 with --sampling_type all",
        when={"sampling_type": ("random", "spatial")},
        most=10**6,
    )
    sample_padding: int = option(
        0,
        "distance of the spatial grid from the border, in positions",
        least=0,
        when={"sampling_type": ("spatial",)},
        most=1024,
    )

    def __post_init__(self) -> None:
        """Refuse a number of samples that does not belong to the way of sampling."""
        super().__post_init__()
        if self.sampling_type == "all" and self.num_samples != -1:
            raise ValueError(
                f"sampling_type all needs num_samples -1 (got {self.num_samples}): every position "
                "is a candidate, there is nothing to count. Leave num_samples out, or try "
                "sampling_type random or spatial."
            )
        if self.sampling_type != "all" and self.num_samples < 1:
            what, try_this = {
                "random": ("the number of candidates drawn", 64),
                "spatial": ("the side of the sampling grid", 8),
            }[self.sampling_type]
            raise ValueError(
                f"sampling_type {self.sampling_type} needs num_samples >= 1 (got "
                f"{self.num_samples}): it is {what}. Try num_samples {try_this}."
            )


def _grid_index(axes: Sequence[Tensor], key_shape: Sequence[int]) -> Tensor:
    """Number the crossings of the lines `axes` on a map of `key_shape`."""
    index = axes[0]
    for axis, side in zip(axes[1:], key_shape[1:], strict=True):
        index = (index[:, None] * side + axis).flatten()
    return index


def per_axis(
    name: str, value: int | Sequence[int], ndim: int, meaning: str, least: int = 1
) -> tuple[int, ...]:
    """Return one whole number for each axis from one for all, or from as many.

    Raises:
        ValueError: for other numbers of them, or smaller ones.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * ndim
    if len(values) != ndim or any(isinstance(v, bool | float | str) for v in values):
        raise ValueError(
            f"{name} takes one whole number, or {ndim}, one for each axis (got {value!r}): it is "
            f"the {meaning}."
        )
    for each in values:
        check_at_least(name, each, least, f"the {meaning}")
    return values


def count_queries(key_shape: Sequence[int], padding: int, stride: int | Sequence[int]) -> list[int]:
    """Count the queries along each axis: ceil(side / s)."""
    steps = per_axis("stride", stride, len(key_shape), STEP)
    return [-(-(side - 2 * padding) // s) for side, s in zip(key_shape, steps, strict=True)]


def query_index(
    key_shape: Sequence[int],
    padding: int,
    stride: int | Sequence[int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Number the queries: every s-th position of the unpadded map along each axis; (M,)."""
    steps = per_axis("stride", stride, len(key_shape), STEP)
    axes = [
        torch.arange(padding, side - padding, s, device=device)
        for side, s in zip(key_shape, steps, strict=True)
    ]
    return _grid_index(axes, key_shape)


def _grid_sides(
    key_shape: Sequence[int], padding: int, num_samples: int, sample_padding: int
) -> list[int] | None:
    """Return the distinct grid lines along each axis; None where all positions compete."""
    sides = [side - 2 * padding for side in key_shape]
    inner = [side - 2 * sample_padding for side in sides]
    if num_samples > min(sides) or min(inner) < 1:
        return None
    return [min(num_samples, side) for side in inner]


def count_candidates(
    key_shape: Sequence[int],
    padding: int,
    sampling_type: str,
    num_samples: int,
    sample_padding: int,
) -> int:
    """Count the positions that may become neighbors of a query, itself included."""
    total = math.prod(key_shape)
    if sampling_type == "random":
        return min(num_samples, total)
    if sampling_type == "spatial":
        lines = _grid_sides(key_shape, padding, num_samples, sample_padding)
        return total if lines is None else math.prod(lines)
    return total


def spatial_index(
    key_shape: Sequence[int],
    padding: int,
    num_samples: int,
    sample_padding: int,
    device: torch.device | str | None = None,
) -> Tensor | None:
    """Number the crossings of a regular grid over the unpadded map; (N',).

    Along each axis the lines are `linspace(sample_padding, side - 1 - sample_padding)`, rounded
    down, each counted once. With more lines asked for than an axis has positions, all positions
    compete: None.
    """
    lines = _grid_sides(key_shape, padding, num_samples, sample_padding)
    if lines is None:
        return None
    axes = []
    for count, padded in zip(lines, key_shape, strict=True):
        span = padded - 2 * padding - 1 - 2 * sample_padding
        steps = torch.arange(count, device=device) * span // max(1, count - 1)
        axes.append(steps + sample_padding + padding)
    return _grid_index(axes, key_shape)


def _fixed_order(total: int, device: torch.device | str | None) -> Tensor:
    """Shuffle 0 … total-1, always the same way; plain arithmetic, so that compilers follow it."""
    x = (torch.arange(total, device=device) + _SHIFT) % _PRIME
    square = x * x % _PRIME
    return (square * square % _PRIME * x % _PRIME).argsort()


def random_index(
    total: int, num_samples: int, training: bool, device: torch.device | str | None = None
) -> Tensor | None:
    """Draw `num_samples` distinct positions, in ascending order; (N',).

    In training anew at each call, from the global random state; else always the same ones, so
    that evaluation is repeatable. None where all positions compete.
    """
    if num_samples >= total:
        return None
    order = torch.randperm(total, device=device) if training else _fixed_order(total, device)
    return order[:num_samples].sort().values
