"""Ordinary convolutions that keep the size of the map, with optional shuffle and coordinates."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from layers.coordinates import AggregationOptions, add_coordinates
from layers.pixel_shuffle import ShuffleOptions, pixel_shuffle, pixel_unshuffle
from layers.sampling import STEP, per_axis
from options import Options, option

__all__ = ["Conv1d_New", "Conv2d_New", "ConvNewOptions", "ConvOptions", "same_conv", "same_conv1d"]

WINDOW = "side of the window"
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d}


@dataclass(frozen=True)
class ConvOptions(Options):
    """A convolution that keeps the size of the map."""

    title = "Convolutions"
    kernel_size: int = option(
        3,
        "side of the window of plain convolutions and of the convolution branch; odd",
        least=1,
        most=255,
    )

    def __post_init__(self) -> None:
        """Refuse kernels that cannot keep the size of the map with equal padding on both sides."""
        super().__post_init__()
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd and at least 1 (got {self.kernel_size}): the convolution "
                "keeps the size of the map, which takes the same padding on both sides. "
                f"Try kernel_size {self.kernel_size + 1}."
            )


@dataclass(frozen=True)
class PlainConvOptions(ConvOptions):
    """An ordinary convolution."""

    dilation: int = option(
        1, "distance between the taps of Conv2d, in positions", least=1, most=1024
    )


@dataclass(frozen=True)
class ConvNewOptions(AggregationOptions, ShuffleOptions, ConvOptions):
    """A convolution with shuffle and coordinate channels."""


def same_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    *,
    dilation: int | Sequence[int] = 1,
    ndim: int = 2,
) -> nn.Conv1d | nn.Conv2d:
    """Build a convolution that keeps the size of the map but for the stride.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: odd; the border of zeros is dilation * (kernel_size - 1) / 2 wide. A pair is
            for each axis, here and in what follows.
        stride: s; sides become ceil(side / s).
        dilation: distance between two taps.
        ndim: 1 or 2 axes.

    Raises:
        ValueError: if the kernel is even or empty, or the stride below 1.
    """
    kernels = per_axis("kernel_size", kernel_size, ndim, WINDOW)
    dilations = per_axis("dilation", dilation, ndim, "distance between two taps")
    for kernel, distance in zip(kernels, dilations, strict=True):
        PlainConvOptions(kernel_size=kernel, dilation=distance)
    return _CONVS[ndim](
        in_channels,
        out_channels,
        kernels,
        stride=per_axis("stride", stride, ndim, STEP),
        padding=tuple(d * (k // 2) for k, d in zip(kernels, dilations, strict=True)),
        dilation=dilations,
    )


same_conv.Options = PlainConvOptions
same_conv1d = partial(same_conv, ndim=1)
same_conv1d.Options = PlainConvOptions
same_conv1d.__doc__ = "Build a convolution that keeps the length of a signal but for the stride."


class _ConvNew(nn.Module):
    """The convolution with shuffle and coordinates, for any number of axes."""

    ndim: int
    Options = ConvNewOptions

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        shuffle_pattern: str = "NA",
        shuffle_scale: int = 0,
        aggregation_type: str = "Col",
    ):
        super().__init__()
        kernels = per_axis("kernel_size", kernel_size, self.ndim, WINDOW)
        steps = per_axis("stride", stride, self.ndim, STEP)
        self.options = ConvNewOptions(  # of any kernel, which `same_conv` checks
            shuffle_pattern=shuffle_pattern,
            shuffle_scale=shuffle_scale,
            aggregation_type=aggregation_type,
        )
        self.scale_in, self.scale_out = self.options.scales
        self.aggregation_type = aggregation_type
        coords = self.ndim if aggregation_type == "Loc_Col" else 0
        c = in_channels * self.scale_in**self.ndim + coords
        o = out_channels * self.scale_out**self.ndim
        if padding is None:
            self.conv2d_layer = same_conv(c, o, kernels, steps, ndim=self.ndim)
        else:
            borders = per_axis("padding", padding, self.ndim, "width of the border of zeros", 0)
            self.conv2d_layer = _CONVS[self.ndim](c, o, kernels, steps, borders)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x`: (B, C, L) -> (B, O, L/s) or (B, C, H, W) -> (B, O, H/s, W/s)."""
        if self.scale_in > 1:
            x = pixel_unshuffle(x, self.scale_in)  # (B, C, H, W) -> (B, C·r², H/r, W/r)
        if self.aggregation_type == "Loc_Col":
            x = add_coordinates(x)  # (B, C, H, W) -> (B, C+2, H, W)
        y = self.conv2d_layer(x)
        return pixel_shuffle(y, self.scale_out) if self.scale_out > 1 else y

    def extra_repr(self) -> str:
        """Show the options that matter."""
        return self.options.describe(leave_out=("kernel_size",))  # the convolution says it


class Conv2d_New(_ConvNew):
    """Apply an ordinary convolution with the shuffle and coordinate channels of `Conv2d_NN`.

    The published layer could not be built with the defaults of its own options; this one can.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: odd, unless `padding` is given; a pair is for each axis, as are the next two.
        stride: s.
        padding: width of the border of zeros; None keeps the size of the map but for the stride.
        shuffle_pattern: "B", "A", "BA" or "NA", see `Conv2d_NN`.
        shuffle_scale: r.
        aggregation_type: "Loc_Col" appends two coordinate channels to the input of the
            convolution, "Col" none.

    Shape:
        (B, C, H, W) -> (B, O, ceil(H/s), ceil(W/s)); "B" divides the sides by r, "A" multiplies.

    Raises:
        ValueError: for options that cannot work; in forward, if r does not divide the map.
    """

    ndim = 2


class Conv1d_New(_ConvNew):
    """Apply an ordinary convolution to a sequence; see `Conv2d_New`.

    Shape:
        (B, C, L) -> (B, O, ceil(L/s)); one coordinate channel.
    """

    ndim = 1
