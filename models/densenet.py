"""Densely connected networks for small images, with any layer as their 3x3 convolutions.

Reference: Huang et al., Densely Connected Convolutional Networks, CVPR 2017,
https://arxiv.org/abs/1608.06993. Symbols: B batch, C channels, H/W height and width, g growth.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.width import WidthOptions, scaled
from options import option

__all__ = ["DenseNet"]

BLOCKS = {
    121: (6, 12, 24, 16),
    169: (6, 12, 32, 32),
    201: (6, 12, 48, 32),
    264: (6, 12, 64, 48),
}


@dataclass(frozen=True)
class DenseNetOptions(WidthOptions):
    """How a network grows."""

    growth: int = option(
        32, "channels that each layer of a DenseNet adds, before --width", least=1, most=10**6
    )


class DenseLayer(nn.Module):
    """Join new channels to the input: layer(relu(BN(conv1x1(relu(BN(x))))))."""

    def __init__(self, layer: Callable[..., nn.Module], in_channels: int, growth: int):
        super().__init__()
        self.bottleneck = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(inplace=True),
        )
        self.layer = layer(in_channels=4 * growth, out_channels=growth)

    def forward(self, x: Tensor) -> Tensor:
        """Add channels: (B, C, H, W) -> (B, C + g, H, W)."""
        return torch.cat([x, self.layer(self.bottleneck(x))], 1)


class DenseNet(nn.Module):
    """Classify images by 121, 169, 201 or 264 weight layers in dense blocks.

    The stem is a single 3×3 convolution at full resolution, for small images; between blocks half
    of the channels are kept and the map is halved.

    Args:
        layer: `layer(in_channels=, out_channels=) -> nn.Module`, keeping the map's size.
        depth: 121, 169, 201 or 264.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        growth: g, channels that each layer adds.
        width: Factor of g, and so of all channels.

    Shape:
        (B, in_channels, H, W) -> (B, num_classes); H, W at least 8.

    Raises:
        ValueError: for another depth, or (in forward) for smaller images.
    """

    Options = DenseNetOptions
    family = "DenseNet"
    tasks = ("classification",)
    training = "gradient"
    uses_layer = True
    min_input_size = 8

    def __init__(
        self,
        *,
        layer: Callable[..., nn.Module],
        depth: int = 121,
        in_channels: int = 3,
        num_classes: int = 10,
        growth: int = 32,
        width: float = 1.0,
    ):
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))} (got {depth}).")
        DenseNetOptions(growth=growth, width=width)
        growth = scaled(growth, width)
        channels = 2 * growth
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        steps: list[nn.Module] = []
        for stage, count in enumerate(BLOCKS[depth]):
            if stage:
                kept = max(1, channels // 2)
                steps += [
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(channels, kept, 1, bias=False),
                    nn.AvgPool2d(2),
                ]
                channels = kept
            for _ in range(count):
                steps.append(DenseLayer(layer, channels, growth))
                channels += growth
        steps += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*steps)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores of `x`."""
        if min(x.shape[2:]) < self.min_input_size:
            raise ValueError(
                f"DenseNet needs images of at least {self.min_input_size} x "
                f"{self.min_input_size} pixels (got {x.shape[2]} x {x.shape[3]})."
            )
        return self.classifier(self.features(self.stem(x)).mean((2, 3)))
