"""Compiled arithmetic of image patches and the windows around them; what N3 layers use.

It does what `ops.patches.tiles` does in tiles, a window at a time: every patch has exactly the
candidates of its own window, block products and sums of weights stay in cache, and averaged images
are written at once. Nothing larger than the weights is ever stored. Works in float32 where the
stride divides the patch and a compiler is at hand (`ops.cpu`), or a GPU that runs Triton's kernels
(`ops.triton.windows`; these read images as they are: their "rows" and "columns").

Symbols: B batch, C channels, G1 × G2 blocks, F = C·stride² numbers in a block, M patches, O patches
of a window (the query among them: `Windows.barred` says which it is), K volumes.
"""

from __future__ import annotations

import ctypes
import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpu import build
from ops.patches.grid import PatchGrid
from ops.triton.launch import kernels

__all__ = ["Windows", "window_aggregate", "window_distances"]

_SLACK = 64  # floats that the kernels may read beyond the columns
_MAX_RATIO = 4
_MAX_PARTS = 8  # summands of a gradient that threads gather apart


def _on_gpu(*tensors: Tensor) -> ModuleType | None:
    """Triton's kernels for tensors on a GPU, where there are any."""
    if tensors[0].device.type != "cuda" or torch.compiler.is_compiling():
        return None
    if torch.are_deterministic_algorithms_enabled():  # gradients are sums in no fixed order
        return None
    return kernels("windows", *tensors)


class Windows:
    """Patches of images of one size, and the window of candidates of each.

    Args:
        grid: Positions of the patches.
        window: Side of the window in patches; it shrinks to the grid where the grid is smaller.
        device: Where the images are.
    """

    def __init__(self, grid: PatchGrid, window: int, device: torch.device | None = None) -> None:
        self.grid, self.device = grid, device
        self.size = min(window, grid.rows), min(window, grid.cols)
        self.blocks = grid.block_rows, grid.block_cols

    @staticmethod
    def usable(grid: PatchGrid, *tensors: Tensor) -> bool:
        """Tell whether there are kernels for these patches."""
        fits = grid.patch % grid.stride == 0 and grid.ratio <= _MAX_RATIO
        if not fits:
            return False
        return bool(_on_gpu(*tensors) or build.kernel("window_distances", *tensors))

    def sizes(self, samples: int, channels: int, volumes: int) -> ctypes.Array:
        """Sizes in the order of the kernels."""
        grid = self.grid
        top, _, left, _ = grid.pads
        numbers = [samples, grid.rows, grid.cols, grid.ratio, *self.size, channels, grid.stride]
        numbers += [volumes, grid.height, grid.width, top, left]
        return (ctypes.c_int64 * len(numbers))(*numbers)

    def _starts(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """First rows of the windows of rows begin … end - 1, first columns of all columns."""
        spans = ((begin, end, self.grid.rows), (0, self.grid.cols, self.grid.cols))
        down, across = (
            (torch.arange(*span, device=self.device) - size // 2).clamp(0, n - size)
            for (*span, n), size in zip(spans, self.size, strict=True)
        )
        return down, across

    def barred(self, begin: int, end: int) -> Tensor:
        """-inf where a patch of rows begin … end - 1 meets itself, else 0 (M, O)."""
        down, across = self._starts(begin, end)
        row = torch.arange(begin, end, device=self.device) - down
        col = torch.arange(self.grid.cols, device=self.device) - across
        place = (row[:, None] * self.size[1] + col).view(-1, 1)
        zeros = torch.zeros(len(place), math.prod(self.size), device=self.device)
        return zeros.scatter_(1, place, -torch.inf)

    def candidates(self) -> Tensor:
        """Patches of the window of every patch (M, O), the patch itself among them."""
        rows, cols = (
            start[:, None] + torch.arange(size, device=self.device)
            for start, size in zip(self._starts(0, self.grid.rows), self.size, strict=True)
        )
        found = rows[:, None, :, None] * self.grid.cols + cols[None, :, None, :]
        return found.flatten(2).flatten(0, 1)

    def _pack_sizes(self, samples: int, channels: int) -> ctypes.Array:
        """Sizes of padded images, which have nothing to be cut off."""
        sizes = self.sizes(samples, channels, 1)
        sizes[-4:] = (*self.grid.padded, 0, 0)
        return sizes

    def rows_shape(self, samples: int, channels: int) -> tuple[int, ...]:
        """Shape of rows of blocks (B, G1, G2, F up to a multiple of 16)."""
        return samples, *self.blocks, math.ceil(channels * self.grid.stride**2 / 16) * 16

    def rows(self, images: Tensor) -> Tensor:
        """Padded images (B, C, Hp, Wp) as rows of blocks (B, G1, G2, F up to a multiple of 16)."""
        if _on_gpu(images):
            return images
        b, c = images.shape[:2]
        out = images.new_empty(self.rows_shape(b, c))
        sizes = self._pack_sizes(b, c)
        build.kernel("window_rows")(sizes, images.contiguous(), out, 0)
        return out

    def from_rows(self, parts: Tensor, channels: int) -> Tensor:
        """Images (B, C, Hp, Wp) of the sum of rows (parts, B, G1, G2, F up to …)."""
        rows = parts.sum(0) if len(parts) > 1 else parts[0]
        b = len(rows)
        out = rows.new_empty(b, channels, *self.grid.padded)
        build.kernel("window_rows")(self._pack_sizes(b, channels), out, rows, 1)
        return out

    def columns(self, images: Tensor) -> Tensor:
        """Padded images (B, C, Hp, Wp) as columns of blocks (B, G1, F, G2), with slack behind."""
        if _on_gpu(images):
            return images
        b, c = images.shape[:2]
        flat = images.new_empty(images.numel() + _SLACK)
        out, slack = flat[: images.numel()], flat[images.numel() :]
        slack.zero_()
        sizes = self._pack_sizes(b, c)
        build.kernel("window_columns")(sizes, images.contiguous(), out)
        return out.view(b, self.blocks[0], -1, self.blocks[1])

    def parts(self, samples: int) -> int:
        """Summands of a gradient of the blocks: as many as give each thread the same work."""
        threads = torch.get_num_threads()
        return min(threads // math.gcd(samples, threads), _MAX_PARTS, self.grid.rows)

    def distances(self, columns: Tensor, begin: int, end: int) -> Tensor:
        """Squared distances (B, M, O) of the patches in rows begin … end - 1."""
        if gpu := _on_gpu(columns):
            return gpu.distances(columns, self.grid, self.size, begin, end)
        b, _, features, _ = columns.shape
        grid = self.grid
        norms = F.avg_pool2d(columns.square().sum(2), grid.ratio, 1, divisor_override=1)
        out = columns.new_empty(b, (end - begin) * grid.cols, math.prod(self.size))
        sizes = self.sizes(b, features // grid.stride**2, 1)
        build.kernel("window_distances")(sizes, columns, norms, out, begin, end)
        return out

    def aggregate(
        self,
        weights: Tensor,
        rows: Tensor,
        out: Tensor,
        patches: tuple[int, int],
        blocks: tuple[int, int],
    ) -> None:
        """Write some rows of blocks of the averaged volumes.

        Args:
            weights: Weights (B, M, K, O) of the patches in rows `patches` (begin, end), among them
                all over the blocks.
            rows: What is summed, from `rows`.
            out: Images (B, K·C, height, width).
            patches: First row of patches, and the one after the last.
            blocks: First row of blocks to be written, and the one after the last.
        """
        if gpu := _on_gpu(weights):
            return gpu.aggregate(weights, rows, out, self.grid, self.size, patches, blocks)
        b, _, volumes, _ = weights.shape
        sizes = self.sizes(b, out.shape[1] // volumes, volumes)
        native = build.kernel("window_aggregate")
        native(sizes, rows, weights, out, *patches, *blocks)
        return None


class _WindowDistances(torch.autograd.Function):
    """Squared distances; saves the images alone."""

    @staticmethod
    def forward(ctx, images: Tensor, windows: Windows) -> Tensor:
        ctx.save_for_backward(images)
        ctx.windows = windows
        return windows.distances(windows.columns(images), 0, windows.grid.rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (images,) = ctx.saved_tensors
        windows: Windows = ctx.windows
        if gpu := _on_gpu(images):
            return gpu.distances_backward(grad, images, windows.grid, windows.size), None
        b, c = images.shape[:2]
        rows = windows.rows(images)
        out = rows.new_zeros(windows.parts(b), *rows.shape)
        native = build.kernel("window_distances_backward")
        native(windows.sizes(b, c, 1), rows, grad.contiguous(), out, len(out))
        return windows.from_rows(out, c), None


def window_distances(images: Tensor, windows: Windows) -> Tensor:
    """Squared Euclidean distances (B, M, O) of every patch and those of its window.

    Args:
        images: Padded images (B, C, Hp, Wp).
        windows: Their patches.
    """
    return _WindowDistances.apply(images, windows)


class _WindowAggregate(torch.autograd.Function):
    """Averaged weighted patches; saves weights and images."""

    @staticmethod
    def forward(ctx, weights: Tensor, images: Tensor, windows: Windows) -> Tensor:
        weights = weights.contiguous()
        ctx.save_for_backward(weights, images)
        ctx.windows, grid = windows, windows.grid
        b, c = images.shape[:2]
        out = images.new_empty(b, weights.shape[2] * c, grid.height, grid.width)
        patches, blocks = (0, grid.rows), (0, grid.block_rows)
        windows.aggregate(weights, windows.rows(images), out, patches, blocks)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weights, images = ctx.saved_tensors
        windows: Windows = ctx.windows
        b, c = images.shape[:2]
        want_weights, want_images = ctx.needs_input_grad[:2]
        if gpu := _on_gpu(images):
            sizes = (windows.grid, windows.size, want_weights, want_images)
            return *gpu.aggregate_backward(grad, weights, images, *sizes), None
        grad_weights = torch.empty_like(weights) if want_weights else None
        parts, grad_rows = windows.parts(b), None
        if want_images:
            grad_rows = images.new_zeros(parts, *windows.rows_shape(b, c))
        sizes = windows.sizes(b, c, weights.shape[2])
        tensors = (windows.columns(images), weights, grad.contiguous(), grad_weights, grad_rows)
        build.kernel("window_aggregate_backward")(sizes, *tensors, parts)
        grad_images = windows.from_rows(grad_rows, c) if want_images else None
        return grad_weights, grad_images, None


def window_aggregate(weights: Tensor, images: Tensor, windows: Windows) -> Tensor:
    """Sum the patches of every window under its weights, and average where the sums overlap.

    Args:
        weights: Weights (B, M, K, O).
        images: Padded images (B, C, Hp, Wp) that the patches are taken of.
        windows: Their patches.

    Returns:
        Images (B, K·C, height, width), volume-major, without the padding.
    """
    return _WindowAggregate.apply(weights, images, windows)
