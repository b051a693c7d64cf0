"""The small networks of 3×3 convolutions that denoisers and their blocks are made of."""

import math

import torch
from torch import Tensor, nn

__all__ = ["channels_last", "feature_cnn", "init_batch_norm"]


def init_batch_norm(bn: nn.BatchNorm2d) -> None:
    """Draw the published starting gains: |N(0, 2 / (9·features))|, none below 0.025."""
    nn.init.normal_(bn.weight, 0, math.sqrt(2 / (9 * bn.num_features)))
    with torch.no_grad():
        bn.weight.abs_().clamp_(min=0.025)
    nn.init.zeros_(bn.bias)


def feature_cnn(
    in_channels: int,
    out_channels: int,
    features: int = 64,
    depth: int = 3,
    bn_momentum: float = 0.001,
) -> nn.Sequential:
    """Build the CNN that makes embeddings or log temperatures: 3×3 convolutions, batch norm."""
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}.")
    steps: list[nn.Module] = []
    for _ in range(depth - 1):
        steps.append(nn.Conv2d(in_channels, features, 3, padding=1, bias=False))
        steps.append(nn.BatchNorm2d(features, momentum=bn_momentum))
        init_batch_norm(steps[-1])
        steps.append(nn.ReLU(inplace=True))
        in_channels = features
    steps.append(nn.Conv2d(in_channels, out_channels, 3, padding=1))
    return nn.Sequential(*steps)


def channels_last(x: Tensor) -> Tensor:
    """On a CPU, where that makes convolutions faster, images (B, C, H, W) with channels last."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x
