"""Residual networks with any layer in place of the 3x3 convolutions.

Reference: He et al., Deep Residual Learning for Image Recognition, CVPR 2016,
https://arxiv.org/abs/1512.03385. Symbols: B batch, C channels, H/W height and width, s stride.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from models.width import WidthOptions, scaled
from options import option

__all__ = ["ResBlock", "ResNet"]

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
WIDTHS = (64, 128, 256, 512)


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
    if type(conv) is nn.Conv2d:
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

    Shape:
        (B, C, H, W) -> (B, O, ceil(H/s), ceil(W/s))

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
    ):
        super().__init__()
        self.conv1 = _without_bias(
            layer(in_channels=in_channels, out_channels=out_channels, stride=stride)
        )
        self.conv2 = _without_bias(layer(in_channels=out_channels, out_channels=out_channels))
        self.conv_layer = nn.Sequential(
            self.conv1,
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            self.conv2,
            nn.BatchNorm2d(out_channels),
        )
        self.identity: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.identity = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            if shortcut_norm:
                self.identity = nn.Sequential(self.identity, nn.BatchNorm2d(out_channels))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x`."""
        identity, y = self.identity(x), self.conv_layer(x)
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
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))} (got {depth}).")
        ResNetOptions(downsample=downsample, width=width)
        widths = [scaled(channels, width) for channels in WIDTHS]
        self.first_conv = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        strided = downsample == "stride"
        stages, channels = [], widths[0]
        for stage, (count, wide) in enumerate(zip(BLOCKS[depth], widths, strict=True)):
            blocks = []
            for i in range(count):
                stride = 2 if strided and stage > 0 and i == 0 else 1
                blocks.append(ResBlock(layer, channels, wide, stride=stride, shortcut_norm=strided))
                channels = wide
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(widths[-1], num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores of `x`."""
        if min(x.shape[2:]) < self.min_input_size:
            raise ValueError(
                f"ResNet needs images of at least {self.min_input_size} x {self.min_input_size} "
                f"pixels (got {x.shape[2]} x {x.shape[3]})."
            )
        x = self.first_conv(x)  # (B, C, H, W) -> (B, 64, H, W)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # -> (B, 512, H/8, W/8)
        return self.classifier(x)
