"""Coordinate channels: where a position lies, as numbers a layer can compare and weigh."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from options import Options, option

__all__ = ["AggregationOptions", "add_coordinates", "coordinate_channels"]


AGGREGATION_TYPES = ("Col", "Loc_Col")


@dataclass(frozen=True)
class AggregationOptions(Options):
    """What is combined."""

    aggregation_type: str = option(
        "Col",
        "what is combined: features, or features and coordinates",
        choices=AGGREGATION_TYPES,
    )


def coordinate_channels(
    shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the coordinates of a grid, each running from -1 to 1 along its axis.

    Args:
        shape: (L,) or (H, W).
        dtype: of the result.
        device: of the result.

    Returns:
        (1, L) or (2, H, W): x (along the width) first, then y (along the height). An axis with a
        single position has coordinate -1.
    """
    axes = [torch.linspace(-1, 1, side, dtype=dtype, device=device) for side in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1])


def add_coordinates(x: Tensor) -> Tensor:
    """Append the coordinate channels: (B, C, L) -> (B, C+1, L), (B, C, H, W) -> (B, C+2, H, W)."""
    coords = coordinate_channels(x.shape[2:], dtype=x.dtype, device=x.device)
    return torch.cat([x, coords.expand(x.shape[0], *coords.shape)], dim=1)
