"""U-Net with any layer in place of its 3x3 convolutions, for restoration.

Ronneberger et al., U-Net, MICCAI 2015, https://arxiv.org/abs/1505.04597, with instance norm and
LeakyReLU of Zbontar et al., fastMRI, https://arxiv.org/abs/1811.08839. Symbols: B batch,
C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.width import WidthOptions, scaled
from options import option

__all__ = ["UNet"]


@dataclass(frozen=True)
class UNetOptions(WidthOptions):
    """Size of the network."""

    channels: int = option(
        32, "channels of the first level of a U-Net, before --width", least=1, most=10**6
    )
    num_levels: int = option(4, "poolings of a U-Net", least=1, most=16)


class DoubleLayer(nn.Sequential):
    """Twice a layer, instance norm and LeakyReLU."""

    def __init__(self, layer: Callable[..., nn.Module], in_channels: int, out_channels: int):
        steps: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            steps.append(layer(in_channels=channels, out_channels=out_channels))
            # A map of one position has no spread: there the norm has nothing to divide by.
            steps += [InstanceNorm(out_channels), nn.LeakyReLU(0.2, inplace=True)]
        super().__init__(*steps)


class InstanceNorm(nn.InstanceNorm2d):
    """Instance norm that passes maps of one position on, instead of refusing them in training."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return x if x.shape[2] * x.shape[3] == 1 else super().forward(x)


class UNet(nn.Module):
    """Halve the map level by level, then double it again, joining what each level had.

    Images of any size: a map with an odd side is pooled downward, and what comes up is padded by
    its last row or column.

    Args:
        layer: `layer(in_channels=, out_channels=) -> nn.Module`, keeping the map's size.
        in_channels: Channels of the images.
        channels: Channels of the first level; each further one has twice as many.
        num_levels: Poolings.
        width: Factor of all channels.

    Shape:
        (B, in_channels, H, W) -> the same; H, W at least 2^num_levels.

    Raises:
        ValueError: in forward, for smaller images.
    """

    Options = UNetOptions
    defaults: ClassVar[dict] = {"dataset": "photos"}
    family = "UNet"
    tasks = ("denoising",)
    training = "gradient"
    uses_layer = True
    min_input_size = 1

    def __init__(
        self,
        *,
        layer: Callable[..., nn.Module],
        in_channels: int = 1,
        channels: int = 32,
        num_levels: int = 4,
        width: float = 1.0,
    ):
        super().__init__()
        UNetOptions(channels=channels, num_levels=num_levels, width=width)
        widths = [scaled(channels * 2**level, width) for level in range(num_levels + 1)]
        self.down = nn.ModuleList(
            DoubleLayer(layer, c, o)
            for c, o in zip([in_channels, *widths], widths[:-1], strict=False)
        )
        self.bottom = DoubleLayer(layer, widths[-2], widths[-1])
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.grow = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(c, o, 2, stride=2, bias=False),
                InstanceNorm(o),
                nn.LeakyReLU(0.2, inplace=True),
            )
            for c, o in pairs
        )
        self.up = nn.ModuleList(DoubleLayer(layer, 2 * o, o) for _, o in pairs)
        self.out = nn.Conv2d(widths[0], in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Restore."""
        smallest = 2 ** len(self.down)
        if min(x.shape[2:]) < smallest:
            raise ValueError(
                f"a U-Net of {len(self.down)} levels needs images of at least {smallest} x "
                f"{smallest} pixels (got {x.shape[2]} x {x.shape[3]}): every level halves them. "
                "Try a smaller num_levels or a larger patch."
            )
        joined = []
        for level in self.down:
            x = level(x)
            joined.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for grow, level in zip(self.grow, self.up, strict=True):
            x, beside = grow(x), joined.pop()
            missing = [b - s for b, s in zip(beside.shape[2:], x.shape[2:], strict=True)]
            if any(missing):
                x = F.pad(x, [0, missing[1], 0, missing[0]], mode="replicate")
            x = level(torch.cat([x, beside], 1))
        return self.out(x)
