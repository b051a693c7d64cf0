"""Ordinary convolutions that keep the size of the map, with optional shuffle and coordinates."""

from torch import Tensor, nn

from layers.coordinates import add_coordinates
from layers.options import (
    AGGREGATION_TYPES,
    check_at_least,
    check_choice,
    check_kernel_size,
    check_shuffle,
)
from layers.pixel_shuffle import pixel_shuffle, pixel_unshuffle

__all__ = ["Conv1d_New", "Conv2d_New", "same_conv"]

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d}


def same_conv(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, *, ndim: int = 2
) -> nn.Conv1d | nn.Conv2d:
    """Build a convolution that keeps the size of the map but for the stride.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: odd; the border of zeros is (kernel_size - 1) / 2 wide.
        stride: s; sides become ceil(side / s).
        ndim: 1 or 2 axes.

    Raises:
        ValueError: if the kernel is even or empty, or the stride below 1.
    """
    check_kernel_size(kernel_size)
    check_at_least("stride", stride, 1, "the step between output positions")
    return _CONVS[ndim](
        in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2
    )


class _ConvNew(nn.Module):
    """The convolution with shuffle and coordinates, for any number of axes."""

    ndim: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        shuffle_pattern: str = "NA",
        shuffle_scale: int = 0,
        aggregation_type: str = "Col",
    ):
        super().__init__()
        check_shuffle(shuffle_pattern, shuffle_scale)
        check_choice("aggregation_type", aggregation_type, AGGREGATION_TYPES)
        self.scale_in = shuffle_scale if shuffle_pattern in ("B", "BA") else 1
        self.scale_out = shuffle_scale if shuffle_pattern in ("A", "BA") else 1
        self.shuffle_pattern = shuffle_pattern
        self.aggregation_type = aggregation_type
        coords = self.ndim if aggregation_type == "Loc_Col" else 0
        c = in_channels * self.scale_in**self.ndim + coords
        o = out_channels * self.scale_out**self.ndim
        if padding is None:
            self.conv2d_layer = same_conv(c, o, kernel_size, stride, ndim=self.ndim)
        else:
            self.conv2d_layer = _CONVS[self.ndim](c, o, kernel_size, stride, padding)

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
        scale = max(self.scale_in, self.scale_out)
        shuffle = f"shuffle={self.shuffle_pattern} by {scale}, " if scale > 1 else ""
        return f"{shuffle}aggregation_type={self.aggregation_type}"


class Conv2d_New(_ConvNew):
    """Apply an ordinary convolution with the shuffle and coordinate channels of `Conv2d_NN`.

    The published layer could not be built with the defaults of its own options; this one can.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: odd, unless `padding` is given.
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
