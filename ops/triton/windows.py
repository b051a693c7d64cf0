"""Image patches and the windows around them on a GPU; what `ops.patches.windows` does on a CPU.

A program takes BM neighboring patches of a row, which share the keys of each row of their windows:
BN = BM + window - 1 of them, rounded up. Their products are one matrix product, of whose entries
each patch has its own stretch. Patches are read where they lie in the image. Images are averaged
block by block (stride × stride pixels, each under ratio × ratio patches): every pixel is written
once. Gradients of images are atomic additions, whose last bits depend on the order. All is float32.

Symbols: B batch, C channels, M patches, O patches of a window, K volumes, F numbers in a patch or
block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.patches.grid import PatchGrid
from ops.triton.launch import next_power, on_device, precision, tuned

__all__ = ["aggregate", "aggregate_backward", "distances", "distances_backward"]

_BLOCK = 16  # patches of a program
_VOLUMES = 8  # of a program, at most
_SHAPES = (
    {"BF": 16},
    {"BF": 32, "num_warps": 4, "num_stages": 3},
    {"BF": 64, "num_warps": 4, "num_stages": 2},
    {"BF": 16, "num_warps": 4, "num_stages": 3},
    {"BF": 32, "num_warps": 8, "num_stages": 3},
)


@triton.jit
def _first_key(i, n, window):
    """Where the window of patch i of n begins along an axis."""
    return tl.minimum(tl.maximum(i - window // 2, 0), n - window)


@triton.jit
def _stretch(j, j0, cols, across, BN: tl.constexpr):
    """Columns of the keys (BN,) of patches j (BM,), their places in the windows, which exist."""
    u = _first_key(j0, cols, across) + tl.arange(0, BN)
    place = u[None, :] - _first_key(j, cols, across)[:, None]
    own = (place >= 0) & (place < across) & (u < cols)[None, :]
    return u, place, own & ((j >= 0) & (j < cols))[:, None]


@triton.jit
def _pixels(f, side, H, W):
    """Offsets of the numbers f of a square with this side from its corner, channels first."""
    c = (f // (side * side)).to(tl.int64)
    return (c * H + f // side % side) * W + f % side


@tuned(["C", "patch", "BN"], *_SHAPES)
@triton.jit
def _distances(
    image_ptr,
    out_ptr,
    begin,
    end,
    rows,
    cols,
    down,
    across,
    C,
    patch,
    stride,
    H,
    W,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
):
    """Squared distances of the patches in rows begin … end - 1, one row of their windows."""
    blocks = tl.cdiv(cols, BM)
    j0 = tl.program_id(0) % blocks * BM
    i = begin + tl.program_id(0) // blocks % (end - begin)
    b = (tl.program_id(0) // (blocks * (end - begin))).to(tl.int64)
    a = tl.program_id(1)
    j = j0 + tl.arange(0, BM)
    u, place, own = _stretch(j, j0, cols, across, BN)
    image = image_ptr + b * C * H * W
    query = (i * stride * W + j * stride).to(tl.int64)
    key = ((_first_key(i, rows, down) + a) * stride * W + u * stride).to(tl.int64)
    product = tl.zeros((BM, BN), tl.float32)
    q_square = tl.zeros((BM,), tl.float32)
    k_square = tl.zeros((BN,), tl.float32)
    F = C * patch * patch
    for f0 in range(0, F, BF):
        f = f0 + tl.arange(0, BF)
        at = _pixels(f, patch, H, W)
        q = tl.load(
            image + query[:, None] + at[None, :],
            mask=(j < cols)[:, None] & (f < F)[None, :],
            other=0.0,
        )
        k = tl.load(
            image + key[None, :] + at[:, None],
            mask=(u < cols)[None, :] & (f < F)[:, None],
            other=0.0,
        )
        product = tl.dot(q, k, product, input_precision="ieee")
        q_square += tl.sum(q * q, 1)
        k_square += tl.sum(k * k, 0)
    d = q_square[:, None] + k_square[None, :] - 2 * product
    d = tl.where(d < 0, 0.0, d)
    row = (b * (end - begin) + i - begin) * cols + j
    tl.store(out_ptr + row[:, None] * (down * across) + a * across + place, d, mask=own)


@tuned(["C", "patch", "BN"], *_SHAPES, reset_to_zero=["out_ptr"])
@triton.jit
def _distances_backward(
    grad_ptr,
    image_ptr,
    out_ptr,
    rows,
    cols,
    down,
    across,
    C,
    patch,
    stride,
    H,
    W,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
):
    """Add the gradients of the images that one row of windows gives; they are zero at first."""
    blocks = tl.cdiv(cols, BM)
    j0 = tl.program_id(0) % blocks * BM
    i = tl.program_id(0) // blocks % rows
    b = (tl.program_id(0) // (blocks * rows)).to(tl.int64)
    a = tl.program_id(1)
    j = j0 + tl.arange(0, BM)
    u, place, own = _stretch(j, j0, cols, across, BN)
    row = (b * rows + i) * cols + j
    at_grad = row[:, None] * (down * across) + a * across + place
    grad = 2 * tl.load(grad_ptr + at_grad, mask=own, other=0.0)
    image = image_ptr + b * C * H * W
    out = out_ptr + b * C * H * W
    query = (i * stride * W + j * stride).to(tl.int64)
    key = ((_first_key(i, rows, down) + a) * stride * W + u * stride).to(tl.int64)
    F = C * patch * patch
    for f0 in range(0, F, BF):
        f = f0 + tl.arange(0, BF)
        at = _pixels(f, patch, H, W)
        at_q = query[:, None] + at[None, :]
        at_k = key[:, None] + at[None, :]
        inside_q = (j < cols)[:, None] & (f < F)[None, :]
        inside_k = (u < cols)[:, None] & (f < F)[None, :]
        q = tl.load(image + at_q, mask=inside_q, other=0.0)
        k = tl.load(image + at_k, mask=inside_k, other=0.0)
        gq = q * tl.sum(grad, 1)[:, None] - tl.dot(grad, k, input_precision="ieee")
        gk = k * tl.sum(grad, 0)[:, None] - tl.dot(tl.trans(grad), q, input_precision="ieee")
        tl.atomic_add(out + at_q, gq, mask=inside_q, sem="relaxed")
        tl.atomic_add(out + at_k, gk, mask=inside_k, sem="relaxed")


@tuned(["C", "stride", "BN"], *_SHAPES)
@triton.jit
def _aggregate(
    w_ptr,
    image_ptr,
    out_ptr,
    begin,
    end,
    first,
    last,
    rows,
    cols,
    down,
    across,
    C,
    ratio,
    stride,
    H,
    W,
    height,
    width,
    top,
    left,
    K,
    KP: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
):
    """Write averaged volumes of BM blocks of rows first … last - 1, a part of their numbers.

    Weights (B, M, K, O) are those of the patches in rows begin … end - 1.
    """
    blocks = tl.cdiv(cols + ratio - 1, BM)
    g0 = tl.program_id(0) % blocks * BM
    g = first + tl.program_id(0) // blocks % (last - first)
    b = (tl.program_id(0) // (blocks * (last - first))).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    F = C * stride * stride
    at = _pixels(f, stride, H, W)
    image = image_ptr + b * C * H * W
    volume = tl.program_id(2) * KP + tl.arange(0, KP * BM) // BM
    column = g0 + tl.arange(0, KP * BM) % BM
    acc = tl.zeros((KP * BM, BF), tl.float32)
    for t in range(ratio * ratio * down):
        a, shift = t % down, t // down % ratio
        lower = t // (down * ratio)
        i = g - lower
        is_row = (i >= begin) & (i < end)
        j = column - shift
        u, place, own = _stretch(j, g0 - shift, cols, across, BN)
        row = (b * (end - begin) + i - begin) * cols + j
        at_w = (row * K + volume)[:, None] * (down * across) + a * across + place
        w = tl.load(w_ptr + at_w, mask=own & (volume < K)[:, None] & is_row, other=0.0)
        key = (_first_key(i, rows, down) + a + lower) * stride * W + (u + shift) * stride
        x = tl.load(
            image + key.to(tl.int64)[:, None] + at[None, :],
            mask=(u < cols)[:, None] & (f < F)[None, :] & is_row,
            other=0.0,
        )
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    over = tl.minimum(g, rows - 1) - tl.maximum(g - ratio + 1, 0) + 1
    across_it = tl.minimum(column, cols - 1) - tl.maximum(column - ratio + 1, 0) + 1
    acc = acc / tl.maximum(over * across_it, 1).to(tl.float32)[:, None]
    y = (g * stride + f // stride % stride - top)[None, :]
    x = (column * stride)[:, None] + (f % stride - left)[None, :]
    channel = (b * K + volume)[:, None] * C + (f // (stride * stride))[None, :]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    inside = inside & (column < cols + ratio - 1)[:, None] & (volume < K)[:, None]
    tl.store(out_ptr + (channel * height + y) * width + x, acc, mask=inside & (f < F)[None, :])


@tuned(["C", "patch", "BN"], *_SHAPES, reset_to_zero=["gx_ptr"])
@triton.jit
def _aggregate_backward(
    grad_ptr,
    w_ptr,
    image_ptr,
    gw_ptr,
    gx_ptr,
    rows,
    cols,
    down,
    across,
    C,
    patch,
    stride,
    H,
    W,
    height,
    width,
    top,
    left,
    K,
    KP: tl.constexpr,
    OF_WEIGHTS: tl.constexpr,
    OF_IMAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
):
    """Gradients of the weights, and added to those of the images, of one row of windows.

    `grad_ptr`: gradients of the averaged images over the counts (B, K·C, height, width).
    """
    blocks = tl.cdiv(cols, BM)
    j0 = tl.program_id(0) % blocks * BM
    i = tl.program_id(0) // blocks % rows
    b = (tl.program_id(0) // (blocks * rows)).to(tl.int64)
    a = tl.program_id(1)
    volume = tl.program_id(2) * KP + tl.arange(0, KP * BM) // BM
    j = j0 + tl.arange(0, KP * BM) % BM
    u, place, own = _stretch(j, j0, cols, across, BN)
    own = own & (volume < K)[:, None]
    row = (b * rows + i) * cols + j
    at_w = (row * K + volume)[:, None] * (down * across) + a * across + place
    w = tl.load(w_ptr + at_w, mask=own, other=0.0)
    key = ((_first_key(i, rows, down) + a) * stride * W + u * stride).to(tl.int64)
    acc = tl.zeros((KP * BM, BN), tl.float32)
    F = C * patch * patch
    for f0 in range(0, F, BF):
        f = f0 + tl.arange(0, BF)
        y = (i * stride + f // patch % patch - top)[None, :]
        x = (j * stride)[:, None] + (f % patch - left)[None, :]
        channel = (b * K + volume)[:, None] * C + (f // (patch * patch))[None, :]
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (f < F)[None, :]
        inside = inside & (j < cols)[:, None] & (volume < K)[:, None]
        grad = tl.load(grad_ptr + (channel * height + y) * width + x, mask=inside, other=0.0)
        at = b * C * H * W + key[:, None] + _pixels(f, patch, H, W)[None, :]
        is_key = (u < cols)[:, None] & (f < F)[None, :]
        if OF_WEIGHTS:
            keys = tl.load(image_ptr + at, mask=is_key, other=0.0)
            acc = tl.dot(grad, tl.trans(keys), acc, input_precision=PRECISION)
        if OF_IMAGES:
            gx = tl.dot(tl.trans(w), grad, input_precision=PRECISION)
            tl.atomic_add(gx_ptr + at, gx, mask=is_key, sem="relaxed")
    if OF_WEIGHTS:
        tl.store(gw_ptr + at_w, acc, mask=own)


def _keys(across: int) -> dict[str, int]:
    return {"BM": _BLOCK, "BN": max(16, next_power(_BLOCK + across - 1))}


def _axes(grid: PatchGrid, size: tuple[int, int]) -> tuple[int, int, int, int]:
    return grid.rows, grid.cols, *size


@on_device
def distances(
    images: Tensor, grid: PatchGrid, size: tuple[int, int], begin: int, end: int
) -> Tensor:
    """Squared distances (B, M, O) of the patches in rows begin … end - 1.

    Args:
        images: Padded images (B, C, Hp, Wp).
        grid: Their patches.
        size: Rows and columns of a window.
        begin: First row of patches.
        end: The one after the last.
    """
    images = images.contiguous()
    b, c, h, w = images.shape
    out = images.new_empty(b, (end - begin) * grid.cols, size[0] * size[1])
    programs = (b * (end - begin) * triton.cdiv(grid.cols, _BLOCK), size[0])
    _distances[programs](
        *(images, out, begin, end, *_axes(grid, size), c, grid.patch, grid.stride, h, w),
        **_keys(size[1]),
    )
    return out


@on_device
def distances_backward(
    grad: Tensor, images: Tensor, grid: PatchGrid, size: tuple[int, int]
) -> Tensor:
    """Gradient of padded images from that of all distances (B, M, O)."""
    grad, images = grad.contiguous(), images.contiguous()
    b, c, h, w = images.shape
    out = torch.zeros_like(images)
    programs = (b * grid.rows * triton.cdiv(grid.cols, _BLOCK), size[0])
    _distances_backward[programs](
        *(grad, images, out, *_axes(grid, size), c, grid.patch, grid.stride, h, w),
        **_keys(size[1]),
    )
    return out


@on_device
def aggregate(
    weights: Tensor,
    images: Tensor,
    out: Tensor,
    grid: PatchGrid,
    size: tuple[int, int],
    patches: tuple[int, int],
    blocks: tuple[int, int],
) -> None:
    """Write some rows of blocks of the averaged volumes; see `Windows.aggregate`."""
    weights, images = weights.contiguous(), images.contiguous()
    b, c, h, w = images.shape
    K, (top, _, left, _) = weights.shape[2], grid.pads
    columns = triton.cdiv(grid.block_cols, _BLOCK)
    numbers, volumes = c * grid.stride**2, min(_VOLUMES, next_power(K))
    _aggregate[
        lambda meta: (
            b * (blocks[1] - blocks[0]) * columns,
            triton.cdiv(numbers, meta["BF"]),
            triton.cdiv(K, volumes),
        )
    ](
        *(weights, images, out, *patches, *blocks, *_axes(grid, size), c, grid.ratio),
        *(grid.stride, h, w, grid.height, grid.width, top, left, K),
        **{"KP": volumes, "PRECISION": precision(), **_keys(size[1])},
    )


@on_device
def aggregate_backward(
    grad: Tensor,
    weights: Tensor,
    images: Tensor,
    grid: PatchGrid,
    size: tuple[int, int],
    want_weights: bool,
    want_images: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weights (B, M, K, O) and padded images, None where they are not wanted."""
    weights, images = weights.contiguous(), images.contiguous()
    b, c, h, w = images.shape
    K, (top, _, left, _) = weights.shape[2], grid.pads
    counts = grid.counts(images.device, images.dtype).view(grid.block_rows, grid.block_cols)
    counts = counts.repeat_interleave(grid.stride, 0).repeat_interleave(grid.stride, 1)
    grad = (grad / counts[top : top + grid.height, left : left + grid.width]).contiguous()
    gw = weights.new_empty(weights.shape if want_weights else 0)
    gx = images.new_zeros(images.shape if want_images else 0)
    volumes = min(_VOLUMES, next_power(K))
    programs = b * grid.rows * triton.cdiv(grid.cols, _BLOCK), size[0], triton.cdiv(K, volumes)
    _aggregate_backward[programs](
        *(grad, weights, images, gw, gx, *_axes(grid, size), c, grid.patch, grid.stride, h, w),
        *(grid.height, grid.width, top, left, K),
        **{"KP": volumes, "OF_WEIGHTS": want_weights, "OF_IMAGES": want_images},
        **{"PRECISION": precision(), **_keys(size[1])},
    )
    return gw if want_weights else None, gx if want_images else None
