"""Pixel shuffle and unshuffle along one axis, the twins of `torch.nn.PixelShuffle` in 1-D.

Reference: Shi et al., Real-Time Single Image and Video Super-Resolution Using an Efficient
Sub-Pixel Convolutional Neural Network, CVPR 2016, https://arxiv.org/abs/1609.05158.
Symbols: B batch, C channels, L length, r scale.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from options import Options, option

__all__ = [
    "PixelShuffle1D",
    "PixelUnshuffle1D",
    "ShuffleOptions",
    "pixel_shuffle",
    "pixel_unshuffle",
]


SHUFFLE_PATTERNS = ("BA", "NA", "B", "A")
_SHUFFLED = {"shuffle_pattern": ("B", "A", "BA")}


@dataclass(frozen=True)
class ShuffleOptions(Options):
    """Pixel shuffle around a layer."""

    shuffle_pattern: str = option(
        "NA",
        "pixel-unshuffle before (B) and pixel-shuffle after (A) the layer, or neither (NA)",
        choices=SHUFFLE_PATTERNS,
        when=_SHUFFLED,
    )
    shuffle_scale: int = option(
        0, "factor of the shuffle; 0 is off", least=0, when=_SHUFFLED, most=64
    )

    def __post_init__(self) -> None:
        """Refuse a shuffle without a scale."""
        super().__post_init__()
        if self.shuffle_pattern != "NA" and self.shuffle_scale < 1:
            raise ValueError(
                f"shuffle_pattern {self.shuffle_pattern} needs shuffle_scale >= 1 (got "
                f"{self.shuffle_scale}): it is the factor by which the map shrinks. Try "
                "shuffle_scale 2, or shuffle_pattern NA."
            )

    @property
    def scales(self) -> tuple[int, int]:
        """Scales before and after the layer; 1 does nothing."""
        before = self.shuffle_scale if self.shuffle_pattern in ("B", "BA") else 1
        return before, self.shuffle_scale if self.shuffle_pattern in ("A", "BA") else 1


def _check_scale(scale: int, name: str) -> None:
    if scale < 1:
        raise ValueError(f"{name} must be at least 1 (got {scale}).")


def pixel_shuffle(x: Tensor, scale: int) -> Tensor:
    """Move channels into positions: (B, C·r, L) -> (B, C, L·r), or the same on two axes.

    Args:
        x: (B, C·r, L) or (B, C·r², H, W).
        scale: how many times longer each axis becomes.

    Raises:
        ValueError: if the channels cannot be divided among the new positions.
    """
    dims = x.dim() - 2
    if x.shape[1] % scale**dims:
        raise ValueError(
            f"{x.shape[1]} channels cannot be shuffled by a scale of {scale}: "
            f"their number must be a multiple of {scale**dims}."
        )
    if dims == 2:
        return F.pixel_shuffle(x, scale)
    b, c, n = x.shape
    return x.reshape(b, c // scale, scale, n).transpose(2, 3).reshape(b, c // scale, n * scale)


def pixel_unshuffle(x: Tensor, scale: int) -> Tensor:
    """Move positions into channels: (B, C, L·r) -> (B, C·r, L), or the same on two axes.

    Args:
        x: (B, C, L·r) or (B, C, H·r, W·r).
        scale: how many times shorter each axis becomes.

    Raises:
        ValueError: if the scale does not divide every side of the map.
    """
    sides = x.shape[2:]
    if any(side % scale for side in sides):
        raise ValueError(
            f"shuffle_scale={scale} does not divide the map of {' x '.join(map(str, sides))} "
            "positions: every side must be a multiple of it. "
            "Try another shuffle_scale, another input size, or shuffle_pattern NA."
        )
    if len(sides) == 2:
        return F.pixel_unshuffle(x, scale)
    b, c, n = x.shape
    return x.reshape(b, c, n // scale, scale).transpose(2, 3).reshape(b, c * scale, n // scale)


class PixelShuffle1D(nn.Module):
    """Interleave groups of channels along the length, as `nn.PixelShuffle` does on two axes.

    y[b, c, i·r + a] = x[b, c·r + a, i]. The published layer laid the channels of a group end to
    end, so that neighbors in the output were not neighbors in the input; here they are.

    Args:
        upscale_factor: r, how many times longer the output is.

    Shape:
        (B, C·r, L) -> (B, C, L·r)

    Raises:
        ValueError: if r < 1, or (in forward) if r does not divide the channels.
    """

    def __init__(self, upscale_factor: int):
        super().__init__()
        _check_scale(upscale_factor, "upscale_factor")
        self.upscale_factor = upscale_factor

    def forward(self, x: Tensor) -> Tensor:
        """Shuffle `x`."""
        if x.dim() != 3:
            raise ValueError(f"PixelShuffle1D expects (B, C, L), got {tuple(x.shape)}.")
        return pixel_shuffle(x, self.upscale_factor)

    def extra_repr(self) -> str:
        """Show the scale."""
        return f"upscale_factor={self.upscale_factor}"


class PixelUnshuffle1D(nn.Module):
    """Undo `PixelShuffle1D`: y[b, c·r + a, i] = x[b, c, i·r + a].

    Args:
        downscale_factor: r, how many times shorter the output is.

    Shape:
        (B, C, L·r) -> (B, C·r, L)

    Raises:
        ValueError: if r < 1, or (in forward) if r does not divide the length.
    """

    def __init__(self, downscale_factor: int):
        super().__init__()
        _check_scale(downscale_factor, "downscale_factor")
        self.downscale_factor = downscale_factor

    def forward(self, x: Tensor) -> Tensor:
        """Unshuffle `x`."""
        if x.dim() != 3:
            raise ValueError(f"PixelUnshuffle1D expects (B, C, L), got {tuple(x.shape)}.")
        return pixel_unshuffle(x, self.downscale_factor)

    def extra_repr(self) -> str:
        """Show the scale."""
        return f"downscale_factor={self.downscale_factor}"
