"""Residual networks for images and signals, with any layer in place of the 3x3 convolutions.

Reference: He et al., Deep Residual Learning for Image Recognition, CVPR 2016,
https://arxiv.org/abs/1512.03385. Symbols: B batch, C channels, H/W height and width, L length, s
stride.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from models.ndim import AVERAGES, BATCH_NORMS, CONVS
from models.width import WidthOptions, scaled
from options import option

__all__ = ["ResBlock", "ResNet", "ResNet1d"]


@dataclass(frozen=True)
class ResNetOptions(WidthOptions):
    """How the resolution falls."""

    title = "ResNet"
    downsample: str = option(
        "stride",
        "ResNet: halve the resolution where the classic network does, "
        "or keep it (the published networks)",
        choices=("stride", "none"),
    )


def _without_bias(conv: nn.Module) -> nn.Module:
    """Drop the bias of a plain convolution: the BatchNorm after it takes it out again."""
    if type(conv) in CONVS.values():
        conv.register_parameter("bias", None)
    return conv


class ResBlock(nn.Module):
    """Add two layers' work to their input: relu(x' + BN(layer(relu(BN(layer(x)))))).

    `conv1` and `conv2` are also the first and fourth module of `conv_layer`, so their weights
    appear under both names, as in published checkpoints; loading needs only one of the two.

    Args:
        layer: `layer(in_channels=, out_channels=, stride=) -> nn.Module`.
        in_channels: C.
        out_channels: O.
        stride: s of the first layer and of the shortcut.
        shortcut_norm: whether a projecting shortcut ends in BatchNorm, as in the classic network.
        ndim: 1 for signals, 2 for images.

    Shape:
        (B, C, H, W) -> (B, O, ceil(H/s), ceil(W/s)), or (B, C, L) -> (B, O, ceil(L/s))

    Raises:
        ValueError: in forward, if the layers change the size of the map otherwise than by stride.
    """

    def __init__(
        self,
        layer: Callable[..., nn.Module],
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        shortcut_norm: bool = True,
        ndim: int = 2,
    ):
        super().__init__()
        self.conv1 = _without_bias(
            layer(in_channels=in_channels, out_channels=out_channels, stride=stride)
        )
        self.conv2 = _without_bias(layer(in_channels=out_channels, out_channels=out_channels))
        norm = BATCH_NORMS[ndim]
        self.conv_layer = nn.Sequential(
            self.conv1,
            norm(out_channels),
            nn.ReLU(inplace=True),
            self.conv2,
            norm(out_channels),
        )
        self.identity: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.identity = CONVS[ndim](in_channels, out_channels, 1, stride=stride, bias=False)
            if shortcut_norm:
                self.identity = nn.Sequential(self.identity, norm(out_channels))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x`."""
        identity, y = self.identity(_first_channels(x)), self.conv_layer(x)
        if y.shape != identity.shape:
            raise ValueError(
                f"the layers of a residual block made a map of {tuple(y.shape[2:])} positions, "
                f"its shortcut one of {tuple(identity.shape[2:])}: they cannot be added. "
                "Try shuffle_pattern BA or NA, a smaller shuffle_scale, or downsample none."
            )
        return self.relu(y + identity)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # A checkpoint may hold a layer under one of its two names alone.
        for name, alias in (("conv1.", "conv_layer.0."), ("conv2.", "conv_layer.3.")):
            for here, there in ((name, alias), (alias, name)):
                for key in [k for k in state_dict if k.startswith(prefix + there)]:
                    twin = prefix + here + key.removeprefix(prefix + there)
                    state_dict.setdefault(twin, state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _first_channels(x: Tensor) -> Tensor:
    """Lay a map of a CPU out with its channels first.

    oneDNN 3.12 (PyTorch 2.14) writes beyond the weights' gradient of a strided 1×1 convolution of
    few channels (8 and less, of maps of 64×64 and more) where they come last in memory.
    """
    return x.contiguous() if x.device.type == "cpu" else x


class ResNet(nn.Module):
    """Classify images by 18 or 34 weight layers in residual blocks.

    The stem is a single 3×3 convolution at full resolution, for small images; four stages of
    64, 128, 256 and 512 channels follow, and a global average.

    Args:
        layer: `layer(in_channels=, out_channels=, stride=1) -> nn.Module`; the stem and the
            shortcuts stay ordinary convolutions.
        depth: 18 or 34.
        in_channels: channels of the images.
        num_classes: number of outputs.
        downsample: "stride" halves the map at the head of stages 2-4, as the classic network;
            "none" keeps every stage at full resolution, as the published one (its shortcuts
            have no BatchNorm).
        width: factor of all channels.

    Shape:
        (B, in_channels, H, W) -> (B, num_classes); H, W at least 8.

    Raises:
        ValueError: for another depth or way of downsampling, or (in forward) smaller images.
    """

    Options = ResNetOptions
    family = "ResNet"
    tasks = ("classification",)
    training = "gradient"
    uses_layer = True
    min_input_size = 8
    blocks: ClassVar[dict[int, tuple[int, ...]]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
    widths = (64, 128, 256, 512)
    ndim = 2

    def __init__(
        self,
        *,
        layer: Callable[..., nn.Module],
        depth: int = 18,
        in_channels: int = 3,
        num_classes: int = 10,
        downsample: str = "stride",
        width: float = 1.0,
    ):
        super().__init__()
        if depth not in self.blocks:
            raise ValueError(
                f"depth must be one of {', '.join(map(str, self.blocks))} (got {depth})."
            )
        ResNetOptions(downsample=downsample, width=width)
        widths = [scaled(channels, width) for channels in self.widths]
        self.first_conv = nn.Sequential(
            CONVS[self.ndim](in_channels, widths[0], kernel_size=3, padding=1, bias=False),
            BATCH_NORMS[self.ndim](widths[0]),
            nn.ReLU(inplace=True),
        )
        strided = downsample == "stride"
        block = partial(ResBlock, layer, shortcut_norm=strided, ndim=self.ndim)
        channels = widths[0]
        for stage, (count, wide) in enumerate(zip(self.blocks[depth], widths, strict=True)):
            blocks = []
            for i in range(count):
                stride = 2 if strided and stage > 0 and i == 0 else 1
                blocks.append(block(channels, wide, stride=stride))
                channels = wide
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.classifier = nn.Sequential(
            AVERAGES[self.ndim](1), nn.Flatten(), nn.Linear(widths[-1], num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores of `x`."""
        if min(x.shape[2:]) < self.min_input_size:
            raise ValueError(
                f"{type(self).__name__} needs samples of at least {self.min_input_size} positions "
                f"along every side (got {' x '.join(map(str, x.shape[2:]))})."
            )
        x = self.first_conv(x)  # (B, C, H, W) -> (B, 64, H, W)
        for stage in range(1, len(self.widths) + 1):
            x = getattr(self, f"layer{stage}")(x)  # -> (B, 512, H/8, W/8) in the end
        return self.classifier(x)


class ResNet1d(ResNet):
    """Classify signals by 14 weight layers in residual blocks; see `ResNet`.

    Three stages of two blocks, of 64, 128 and 256 channels: `depth` 14.

    Shape:
        (B, in_channels, L) -> (B, num_classes); L at least 4.
    """

    family = "ResNet1d"
    inputs = ("signals",)
    layer_kind = "signals"
    defaults: ClassVar[dict] = {"dataset": "mnist1d"}
    min_input_size = 4
    blocks: ClassVar[dict[int, tuple[int, ...]]] = {14: (2, 2, 2)}
    widths = (64, 128, 256)
    ndim = 1
