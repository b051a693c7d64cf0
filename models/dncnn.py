"""DnCNN: a convolutional denoiser that predicts the noise.

K. Zhang et al., "Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image Denoising",
IEEE TIP 2017, https://arxiv.org/abs/1608.03981. Folding blocks of pixels into channels:
K. Zhang et al., "FFDNet", IEEE TIP 2018, https://arxiv.org/abs/1710.04026.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.cnn import channels_last, init_batch_norm
from options import Options, option

__all__ = [
    "DnCNN",
    "DnCNNOptions",
    "FoldOptions",
    "RestorationOptions",
    "add_shared",
    "fold_blocks",
    "momentum_for",
    "unfold_blocks",
]

# What `layer=None` stands for: no bias before a batch norm, as published.
OWN_LAYER = ("Conv2d", {"kernel_size": 3})


@dataclass(frozen=True)
class RestorationOptions(Options):
    """What networks of convolutions with batch norm take."""

    title = "Denoising networks (dncnn, n3net, nlrn)"
    features: int = option(64, "channels inside a DnCNN", least=1, most=10**10)
    bn_momentum: float = option(
        None,
        "weight of a new batch in the running statistics; not given: 20 / steps of the run, "
        "but from 0.001 (published) to 0.1",
        kind=float,
        least=0,
        fixed=False,
        most=1,
    )


@dataclass(frozen=True)
class FoldOptions(Options):
    """Blocks of pixels in place of pixels."""

    fold: int = option(
        1,
        "dncnn, nlrn: work on blocks of this side folded into channels (FFDNet: 2), with fewer "
        "products",
        least=1,
        most=64,
    )


@dataclass(frozen=True)
class DnCNNOptions(RestorationOptions):
    """One denoising CNN."""

    depth: int = option(17, "convolutions of (each) DnCNN", least=2, most=100)
    batch_norm: bool = option(True, "batch norm in the DnCNNs")
    residual: bool = option(True, "add the input of a DnCNN to its output")


def momentum_for(num_steps: int) -> float:
    """Return the momentum of batch norm for a run of so many steps; 0: published."""
    return min(0.1, max(0.001, 20 / num_steps)) if num_steps else 0.001


@dataclass(frozen=True)
class FoldedDnCNNOptions(FoldOptions, DnCNNOptions):
    """One denoising CNN that stands alone."""


def fold_blocks(x: Tensor, fold: int) -> Tensor:
    """Turn pixels of fold × fold blocks into channels: (B, C, H, W) -> (B, C·fold², ⌈H/fold⌉, …).

    Images are padded to whole blocks by their edge.
    """
    if fold == 1:
        return x
    edges = (0, -x.shape[3] % fold, 0, -x.shape[2] % fold)
    return F.pixel_unshuffle(F.pad(x, edges, mode="replicate"), fold)


def unfold_blocks(out: Tensor, fold: int, like: Tensor) -> Tensor:
    """Turn channels into pixels again: (B, C·fold², …) -> (B, C, H, W), as large as `like`."""
    if fold == 1:
        return out
    return F.pixel_shuffle(out, fold)[..., : like.shape[2], : like.shape[3]]


def add_shared(out: Tensor, x: Tensor, shared: int) -> Tensor:
    """Add the first `shared` channels of x (B, C', H, W) to those of out (B, C, H, W)."""
    if shared == out.shape[1] == x.shape[1]:
        return out + x
    if shared:
        return torch.cat((out[:, :shared] + x[:, :shared], out[:, shared:]), 1)
    return out


class DnCNN(nn.Module):
    """Convolution and ReLU, depth - 2 times convolution, batch norm and ReLU, convolution.

    The input is added to the output: to its first channels, where the two differ in number.

    Args:
        in_channels: Channels of the noisy image.
        out_channels: Channels of the output; None: as many as the input has.
        depth: Number of convolutions, at least 2.
        features: Channels between them.
        batch_norm: Batch norm after the inner convolutions; without it they have a bias.
        residual: Add the input to the output.
        bn_momentum: Weight of a new batch in the running statistics; None: see `momentum_for`.
        num_steps: Training steps of the run, which decide on bn_momentum if it is None.
        fold: Pixels of fold × fold blocks become channels before the first convolution, and
            pixels again after the last one; images are padded to whole blocks by their edge.
        layer: What takes the place of the inner convolutions, called with `in_channels` and
            `out_channels`; None: 3×3 convolutions.

    Shape:
        Noisy images (B, in_channels, H, W) in [0, 1], not clipped -> (B, out_channels, H, W).
    """

    Options = FoldedDnCNNOptions
    defaults: ClassVar[dict] = {"dataset": "photos"}
    own_layer = OWN_LAYER
    family = "DnCNN"
    tasks = ("denoising", "super_resolution")
    training = "gradient"
    uses_layer = True
    min_input_size = 1

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int | None = None,
        depth: int = 17,
        features: int = 64,
        batch_norm: bool = True,
        residual: bool = True,
        bn_momentum: float | None = None,
        num_steps: int = 0,
        fold: int = 1,
        layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        FoldedDnCNNOptions(
            depth=depth,
            features=features,
            batch_norm=batch_norm,
            residual=residual,
            bn_momentum=bn_momentum,
            fold=fold,
        )
        bn_momentum = momentum_for(num_steps) if bn_momentum is None else bn_momentum
        out_channels = in_channels if out_channels is None else out_channels
        self.shared = min(in_channels, out_channels) if residual else 0
        self.plain, self.fold = layer is None, fold
        self.conv1 = nn.Conv2d(in_channels * fold**2, features, 3, padding=1)
        inner: list[nn.Module] = []
        for _ in range(depth - 2):
            if layer is None:
                conv = nn.Conv2d(features, features, 3, padding=1, bias=not batch_norm)
                _init_conv(conv)
                inner.append(conv)
            else:
                inner.append(layer(in_channels=features, out_channels=features))
            if batch_norm:
                inner.append(nn.BatchNorm2d(features, momentum=bn_momentum))
                init_batch_norm(inner[-1])
            inner.append(nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(*inner)
        self.conv2 = nn.Conv2d(features, out_channels * fold**2, 3, padding=1)
        _init_conv(self.conv1)
        _init_conv(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """Denoise."""
        inner = fold_blocks(x, self.fold)
        inner = channels_last(inner) if self.plain else inner
        out = self.conv2(self.layer1(torch.relu_(self.conv1(inner))))
        return add_shared(unfold_blocks(out, self.fold, x), x, self.shared)


def _init_conv(conv: nn.Conv2d) -> None:
    """Draw weights with variance 2 / (9 · output channels); biases stay as torch draws them."""
    fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
    nn.init.normal_(conv.weight, 0, math.sqrt(2 / fan_out))
