"""The grid of patches of a padded image, and the way from images to blocks and back.

An image is cut into `patch` × `patch` patches at `stride`, on a grid of `rows` × `cols`. Where the
stride divides the patch, a patch is r × r blocks of stride × stride pixels, shared with its
neighbors; other strides use whole patches as blocks (r = 1).

Symbols: B batch, C channels, G blocks, F numbers in a block, K volumes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PatchGrid", "write_out"]


def write_out(operation: Callable[..., Tensor], a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write operation(a, b) to `out`, in one pass where that is no compiled graph."""
    if torch.compiler.is_compiling():
        out.copy_(operation(a, b))
    else:
        operation(a, b, out=out)


@dataclass(frozen=True)
class PatchGrid:
    """Positions of the patches of a padded image, and the way to blocks and back.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        patch: Side of a patch in pixels.
        stride: Distance of neighboring patches in pixels, at most `patch`.
        pad_start: Rows and columns of padding at the top and left; None puts half of what is
            needed there (rounded down).
        pad_mode: "zeros" (published) or "reflect".
    """

    height: int
    width: int
    patch: int = 10
    stride: int = 5
    pad_start: tuple[int, int] | None = None
    pad_mode: str = "zeros"

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """Padding as (top, bottom, left, right): the least that lets patches cover every pixel."""
        out: list[int] = []
        for axis, side in enumerate((self.height, self.width)):
            if self.pad_start is None:
                total = max(self.patch - side, -(side - self.patch) % self.stride)
                start = total // 2
            else:
                start = self.pad_start[axis]
                total = start + max(
                    self.patch - side - start, -(side + start - self.patch) % self.stride
                )
            out += [start, total - start]
        return out[0], out[1], out[2], out[3]

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the padded image."""
        top, bottom, left, right = self.pads
        return self.height + top + bottom, self.width + left + right

    @property
    def rows(self) -> int:
        """Rows of patches."""
        return (self.padded[0] - self.patch) // self.stride + 1

    @property
    def cols(self) -> int:
        """Columns of patches."""
        return (self.padded[1] - self.patch) // self.stride + 1

    @property
    def ratio(self) -> int:
        """Blocks along the side of a patch: patch / stride, or 1 where that is no whole number."""
        return self.patch // self.stride if self.patch % self.stride == 0 else 1

    @property
    def block_rows(self) -> int:
        """Rows of blocks."""
        return self.rows + self.ratio - 1

    @property
    def block_cols(self) -> int:
        """Columns of blocks."""
        return self.cols + self.ratio - 1

    def pad(self, x: Tensor) -> Tensor:
        """Pad images (B, C, height, width) to `padded`."""
        top, bottom, left, right = self.pads
        if not any(self.pads):
            return x
        if self.pad_mode == "zeros":
            return F.pad(x, (left, right, top, bottom))
        return F.pad(x, (left, right, top, bottom), mode=self.pad_mode)

    def to_blocks(self, x: Tensor) -> Tensor:
        """Cut padded images (B, C, Hp, Wp) into rows (B, G, F)."""
        b, c = x.shape[:2]
        if self.patch % self.stride:
            return F.unfold(x, self.patch, stride=self.stride).transpose(1, 2)
        s = self.stride
        x = x.reshape(b, c, self.block_rows, s, self.block_cols, s)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(b, self.block_rows * self.block_cols, c * s * s)

    def counts(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Number of patches over each block (G,), or each pixel (Hp, Wp) if blocks are patches."""

        def axis(n: int, size: int, step: int, span: int) -> Tensor:
            starts = torch.arange(n, device=device)[:, None] * step
            at = torch.arange(size, device=device)
            return ((at >= starts) & (at < starts + span)).sum(0).to(dtype)

        if self.patch % self.stride:
            height, width = self.padded
            down = axis(self.rows, height, self.stride, self.patch)
            across = axis(self.cols, width, self.stride, self.patch)
            return down[:, None] * across
        down = axis(self.rows, self.block_rows, 1, self.ratio)
        across = axis(self.cols, self.block_cols, 1, self.ratio)
        return (down[:, None] * across).flatten()

    def from_blocks(self, y: Tensor, channels: int) -> Tensor:
        """Average summed volumes (B, G, K, F) into images (B, K·channels, height, width)."""
        b, g, k, f = y.shape
        height, width = self.padded
        top, _, left, _ = self.pads
        if self.patch % self.stride:
            columns = y.permute(0, 2, 3, 1).reshape(b, k * f, g)
            images = F.fold(columns, (height, width), self.patch, stride=self.stride)
            images = images / self.counts(y.device, y.dtype)
        else:
            images = _BlocksToImages.apply(y, self, channels)
        return images[:, :, top : top + self.height, left : left + self.width]


class _BlocksToImages(torch.autograd.Function):
    """Rows of blocks (B, G, K, F) over their counts as images (B, K·C, Hp, Wp), in one pass."""

    @staticmethod
    def forward(ctx, y: Tensor, grid: PatchGrid, channels: int) -> Tensor:
        ctx.grid, ctx.channels = grid, channels
        out = y.new_empty(y.shape[0], y.shape[2] * channels, *grid.padded)
        _scale_between(y, out, grid, channels, back=False)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        grid, c = ctx.grid, ctx.channels
        b, channels = grad.shape[:2]
        g, s = grid.block_rows * grid.block_cols, grid.stride
        out = grad.new_empty(b, g, channels // c, c * s * s)
        _scale_between(out, grad.contiguous(), grid, c, back=True)
        return out, None, None


def _scale_between(
    rows: Tensor, images: Tensor, grid: PatchGrid, channels: int, back: bool
) -> None:
    """Fill images from rows, or `back` rows from images, dividing by the counts of blocks."""
    b, _, k, _ = rows.shape
    s, g1, g2 = grid.stride, grid.block_rows, grid.block_cols
    scale = 1 / grid.counts(rows.device, rows.dtype)
    rows = rows.view(b, g1, g2, k, channels, s, s).permute(0, 3, 4, 1, 5, 2, 6)
    images = images.view(b, k, channels, g1, s, g2, s)
    scale = scale.view(g1, 1, g2, 1)
    if back:
        write_out(torch.mul, images, scale, rows)
    else:
        write_out(torch.mul, rows, scale, images)
