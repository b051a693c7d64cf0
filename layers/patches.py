"""Patches of feature maps, and dense arithmetic between a patch and the patches around it.

An image is cut into `patch` × `patch` patches at `stride`, on a grid of `rows` × `cols`. Every
patch is compared with the `window` × `window` grid positions around it (the window slides inward
at the border, so that it always has the same size), and weighted sums of those patches are
averaged back into images. Three ideas keep this cheap:

1. *Blocks.* Where the stride divides the patch, a patch is r × r blocks of stride × stride pixels.
   The product of two patches is then the sum of r² block products along a diagonal, and
   fold-and-average of weighted patches is one product of diagonally summed weights with the
   blocks: nothing is unfolded. Other strides use whole patches as blocks (r = 1).
2. *Tiles.* Queries are taken in small rectangles which share one rectangle of keys, so that all
   products are batched matrix products; entries outside a query's own window are masked. On small
   images one tile is the whole grid.
3. *Hand-written backward.* Only blocks and weights are saved; products are formed anew.

Symbols: B batch, C channels, G blocks, F numbers in a block, T tiles, (a, b) query blocks and (c,
d) key blocks of a tile, (p, q) query patches and (u, v) key patches of a tile, K volumes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PatchGrid", "WindowTiles", "aggregate_tiles", "tile_distances"]

CHUNK_BYTES = 8 * 2**20  # intermediate products alive at a time; about what stays in cache


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
        """Average summed volumes (B, K, G, F) into images (B, K·channels, height, width)."""
        b, k = y.shape[:2]
        height, width = self.padded
        top, _, left, _ = self.pads
        count = self.counts(y.device, y.dtype)
        if self.patch % self.stride:
            columns = y.transpose(2, 3).reshape(b, k * y.shape[3], y.shape[2])
            images = F.fold(columns, (height, width), self.patch, stride=self.stride) / count
        else:
            s, g1, g2 = self.stride, self.block_rows, self.block_cols
            y = (y / count[:, None]).view(b, k, g1, g2, channels, s, s)
            images = y.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, k * channels, height, width)
        return images[:, :, top : top + self.height, left : left + self.width]


def _axis_tiles(n: int, window: int, ratio: int) -> tuple[list[int], list[int], int, int]:
    """Tile an axis of n patches: first query and first key of each tile, size in both."""

    def cost(t: int) -> int:
        return math.ceil(n / t) * (t + ratio - 1) * (min(n, t + window - 1) + ratio - 1)

    t = min(range(n, 0, -1), key=cost)
    keys = min(n, t + window - 1)
    queries = [min(k * t, n - t) for k in range(math.ceil(n / t))]
    return queries, [min(max(q - window // 2, 0), n - keys) for q in queries], t, keys


class WindowTiles:
    """Tiles of queries and keys that cover every patch of a grid and its window.

    The last tile of an axis is moved inward where it would pass the border; queries it shares with
    the tile before are marked as not `fresh` and contribute nothing.

    Args:
        rows: Rows of patches.
        cols: Columns of patches.
        window: Side of the window in patches (odd); it shrinks to the grid where the grid is
            smaller.
        ratio: Blocks along the side of a patch.
        device: Where the index tensors live.
    """

    def __init__(self, rows: int, cols: int, window: int, ratio: int, device: torch.device) -> None:
        self.ratio = ratio
        self.grid = (rows, cols)
        self.window = (min(window, rows), min(window, cols))
        axes = []
        for n, size in zip(self.grid, self.window, strict=True):
            q0, k0, t, keys = _axis_tiles(n, size, ratio)
            first = torch.tensor(q0, device=device)[:, None]
            query = first + torch.arange(t, device=device)
            key = torch.tensor(k0, device=device)[:, None] + torch.arange(keys, device=device)
            start = (query - size // 2).clamp(0, n - size)[:, :, None]
            inside = (key[:, None] >= start) & (key[:, None] < start + size)
            turn = torch.arange(len(q0), device=device)[:, None] * t
            axes.append((query, key, inside, query >= turn, q0))
        (self._query_r, self._key_r, self._in_r, self._fresh_r, first_r) = axes[0]
        (self._query_c, self._key_c, self._in_c, self._fresh_c, first_c) = axes[1]
        self.count = len(first_r) * len(first_c)
        self.has_repeats = rows % self._query_r.shape[1] != 0 or cols % self._query_c.shape[1] != 0
        self.query_shape = (self._query_r.shape[1], self._query_c.shape[1])
        self.key_shape = (self._key_r.shape[1], self._key_c.shape[1])
        tile = torch.arange(self.count, device=device)
        self._r = tile // len(first_c)
        self._c = tile % len(first_c)

    def _index(self, r: Tensor, c: Tensor, extra: int, cols: int) -> Tensor:
        """Flat positions of rows r (T, ·) and columns c (T, ·), each continued by `extra`."""
        if extra:
            more = torch.arange(1, extra + 1, device=r.device)
            r = torch.cat((r, r[:, -1:] + more), 1)
            c = torch.cat((c, c[:, -1:] + more), 1)
        return r[:, :, None] * cols + c[:, None]

    def part(self, start: int, stop: int) -> TileIndices:
        """Index tensors of tiles start … stop - 1."""
        r, c = self._r[start:stop], self._c[start:stop]
        query_r, query_c = self._query_r[r], self._query_c[c]
        key_r, key_c = self._key_r[r], self._key_c[c]
        more, cols = self.ratio - 1, self.grid[1]
        query = self._index(query_r, query_c, 0, cols)
        key = self._index(key_r, key_c, 0, cols)
        inside = self._in_r[r][:, :, None, :, None] & self._in_c[c][:, None, :, None, :]
        inside = inside & (query[:, :, :, None, None] != key[:, None, None])
        fresh = self._fresh_r[r][:, :, None] & self._fresh_c[c][:, None]
        return TileIndices(
            query=query,
            key=key,
            query_blocks=self._index(query_r, query_c, more, cols + more),
            key_blocks=self._index(key_r, key_c, more, cols + more),
            inside=inside,
            fresh=fresh if self.has_repeats else None,
            whole=self.count == 1,
        )

    def chunks(self, bytes_per_tile: int, budget: int = CHUNK_BYTES) -> list[tuple[int, int]]:
        """Ranges of tiles which stay within the byte budget, at least one tile each."""
        step = max(1, min(self.count, budget // max(1, bytes_per_tile)))
        return [(i, min(i + step, self.count)) for i in range(0, self.count, step)]


@dataclass(frozen=True)
class TileIndices:
    """Flat patch and block positions of some tiles.

    Attributes:
        query: Patches that ask (T, p, q).
        key: Patches that answer (T, u, v).
        query_blocks: Blocks of the queries (T, a, b).
        key_blocks: Blocks of the keys (T, c, d).
        inside: Which keys lie in the window of a query, itself excluded (T, p, q, u, v).
        fresh: Which queries are not answered by an earlier tile (T, p, q), or None: all.
        whole: The one tile is the whole grid, in order.
    """

    query: Tensor
    key: Tensor
    query_blocks: Tensor
    key_blocks: Tensor
    inside: Tensor
    fresh: Tensor | None
    whole: bool

    def take(self, rows: Tensor, index: Tensor) -> Tensor:
        """Rows (B, N, F) of each tile (B, T, n, F)."""
        if self.whole:
            return rows[:, None]
        b, _, f = rows.shape
        return rows.index_select(1, index.flatten()).view(b, index.shape[0], -1, f)


def diagonal_sum(x: Tensor, ratio: int) -> Tensor:
    """Sum r × r diagonal steps: (…, a, b, c, d) -> (…, p, q, u, v), p = a - r + 1 and so on."""
    if ratio == 1:
        return x
    a, b, c, d = x.shape[-4:]
    p, q, u, v = a - ratio + 1, b - ratio + 1, c - ratio + 1, d - ratio + 1
    rows = x[..., :p, :, :u, :] + x[..., 1 : p + 1, :, 1 : u + 1, :]
    for i in range(2, ratio):
        rows += x[..., i : p + i, :, i : u + i, :]
    out = rows[..., :q, :, :v] + rows[..., 1 : q + 1, :, 1 : v + 1]
    for i in range(2, ratio):
        out += rows[..., i : q + i, :, i : v + i]
    return out


def diagonal_spread(x: Tensor, ratio: int) -> Tensor:
    """Adjoint of `diagonal_sum`: (…, p, q, u, v) -> (…, a, b, c, d), always contiguous."""
    if ratio == 1:
        return x.contiguous()
    *lead, p, q, u, v = x.shape
    a, b, c, d = p + ratio - 1, q + ratio - 1, u + ratio - 1, v + ratio - 1
    rows = x.new_zeros(*lead, a, q, c, v)
    rows[..., :p, :, :u, :] = x
    for i in range(1, ratio):
        rows[..., i : p + i, :, i : u + i, :] += x
    out = x.new_zeros(*lead, a, b, c, d)
    out[..., :q, :, :v] = rows
    for i in range(1, ratio):
        out[..., i : q + i, :, i : v + i] += rows
    return out


def _patch_norms(blocks: Tensor, grid: tuple[int, int], ratio: int) -> Tensor:
    """Squared norms (B, M) of patches from blocks (B, G, F)."""
    rows, cols = grid[0] + ratio - 1, grid[1] + ratio - 1
    norms = blocks.square().sum(-1).view(-1, rows, cols)
    total = norms.unfold(1, ratio, 1).unfold(2, ratio, 1).sum((-1, -2)) if ratio > 1 else norms
    return total.flatten(1)


def distances_of_part(blocks: Tensor, norms: Tensor, part: TileIndices, ratio: int) -> Tensor:
    """Squared distances (B, T, p, q, u, v) of queries and keys of some tiles."""
    b = blocks.shape[0]
    t, n1, n2 = part.query_blocks.shape
    _, k1, k2 = part.key_blocks.shape
    query = part.take(blocks, part.query_blocks)
    key = part.take(blocks, part.key_blocks)
    products = torch.matmul(query * -2, key.transpose(-1, -2))  # (B, T, ab, cd)
    out = diagonal_sum(products.view(b, t, n1, n2, k1, k2), ratio)
    out += norms[:, part.query][..., None, None]
    out += norms[:, part.key][:, :, None, None]
    return out.clamp_(min=0)


class _TileDistances(torch.autograd.Function):
    """Squared distances within tiles; saves the blocks alone."""

    @staticmethod
    def forward(ctx, blocks: Tensor, tiles: WindowTiles) -> Tensor:
        norms = _patch_norms(blocks, tiles.grid, tiles.ratio)
        ctx.save_for_backward(blocks)
        ctx.tiles = tiles
        parts = [
            distances_of_part(blocks, norms, tiles.part(i, j), tiles.ratio)
            for i, j in tiles.chunks(_tile_bytes(tiles, blocks, 2))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (blocks,) = ctx.saved_tensors
        tiles: WindowTiles = ctx.tiles
        b, g, f = blocks.shape
        ratio = tiles.ratio
        out = torch.zeros_like(blocks)
        norms = blocks.new_zeros(b, tiles.grid[0] * tiles.grid[1])  # gradient of the squared norms
        for i, j in tiles.chunks(_tile_bytes(tiles, blocks, 2)):
            part = tiles.part(i, j)
            here = grad[:, i:j]
            norms.index_add_(1, part.query.flatten(), here.sum((-1, -2)).flatten(1))
            norms.index_add_(1, part.key.flatten(), here.sum((2, 3)).flatten(1))
            spread = diagonal_spread(here, ratio)  # (B, T, a, b, c, d)
            spread = spread.view(b, j - i, part.query_blocks[0].numel(), -1)
            query = part.take(blocks, part.query_blocks)
            key = part.take(blocks, part.key_blocks)
            for index, rows in (
                (part.query_blocks, spread @ key),
                (part.key_blocks, spread.transpose(-1, -2) @ query),
            ):
                if part.whole:
                    out.sub_(rows[:, 0], alpha=2)
                else:
                    out.index_add_(1, index.flatten(), rows.view(b, -1, f), alpha=-2)
        # A block takes part in every patch over it.
        norms = norms.view(b, 1, *tiles.grid)
        box = norms.new_ones(1, 1, ratio, ratio)
        norms = F.conv_transpose2d(norms, box) if ratio > 1 else norms
        return out.addcmul_(blocks, norms.reshape(b, g, 1), value=2), None


def _tile_bytes(tiles: WindowTiles, rows: Tensor, matrices: int) -> int:
    """Bytes of `matrices` products of one tile over a batch, and of its gathered keys."""
    more = tiles.ratio - 1
    query = math.prod(n + more for n in tiles.query_shape)
    key = math.prod(n + more for n in tiles.key_shape)
    gathered = 0 if tiles.count == 1 else key * rows.shape[-1]
    return rows.shape[0] * rows.element_size() * (matrices * query * key + gathered)


def tile_distances(blocks: Tensor, tiles: WindowTiles) -> Tensor:
    """Squared Euclidean distances of every patch and the keys of its tile.

    Args:
        blocks: Rows of features (B, G, F) from `PatchGrid.to_blocks`.
        tiles: Tiles of the grid.

    Returns:
        Distances (B, T, p, q, u, v), meaningful where `TileIndices.inside`.
    """
    return _TileDistances.apply(blocks, tiles)


def aggregate_part(
    weights: Tensor, blocks: Tensor, part: TileIndices, ratio: int, out: Tensor
) -> None:
    """Add the sums of some tiles under weights (K, B, T, p, q, u, v) to `out` (B, K, G, F)."""
    k, b, t = weights.shape[:3]
    f = blocks.shape[-1]
    spread = _spread_weights(weights, part, ratio)  # (B, T, K·ab, cd)
    sums = torch.matmul(spread, part.take(blocks, part.key_blocks)).view(b, t, k, -1, f)
    if part.whole:
        out += sums[:, 0]
    else:
        sums = sums.transpose(1, 2).reshape(b, k, -1, f)
        out.index_add_(2, part.query_blocks.flatten(), sums)


def _spread_weights(weights: Tensor, part: TileIndices, ratio: int) -> Tensor:
    """Weights of patches (K, B, T, p, q, u, v) as weights of blocks (B, T, K·ab, cd)."""
    if part.fresh is not None:
        weights = weights * part.fresh[..., None, None]
    weights = weights.permute(1, 2, 0, 3, 4, 5, 6)
    spread = diagonal_spread(weights, ratio)
    return spread.flatten(5).flatten(2, 4)


class _AggregateTiles(torch.autograd.Function):
    """Sums of blocks under the weights; saves weights and blocks, forms the spread weights anew."""

    @staticmethod
    def forward(ctx, weights: Tensor, blocks: Tensor, tiles: WindowTiles) -> Tensor:
        ctx.save_for_backward(weights, blocks)
        ctx.tiles = tiles
        k = weights.shape[0]
        out = blocks.new_zeros(blocks.shape[0], k, *blocks.shape[1:])
        for i, j in tiles.chunks(_tile_bytes(tiles, blocks, 2 * k)):
            aggregate_part(weights[:, :, i:j], blocks, tiles.part(i, j), tiles.ratio, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weights, blocks = ctx.saved_tensors
        tiles: WindowTiles = ctx.tiles
        k, b = weights.shape[:2]
        f = blocks.shape[-1]
        want_weights, want_blocks = ctx.needs_input_grad[:2]
        grad_weights = torch.empty_like(weights) if want_weights else None
        grad_blocks = torch.zeros_like(blocks) if want_blocks else None
        for i, j in tiles.chunks(_tile_bytes(tiles, blocks, 2 * k)):
            part = tiles.part(i, j)
            t, n1, n2 = part.query_blocks.shape
            _, k1, k2 = part.key_blocks.shape
            if part.whole:
                here = grad.reshape(b, 1, k * n1 * n2, f)
            else:
                here = grad.index_select(2, part.query_blocks.flatten())
                here = here.view(b, k, t, n1 * n2, f).transpose(1, 2).reshape(b, t, k * n1 * n2, f)
            if want_blocks:
                spread = _spread_weights(weights[:, :, i:j], part, tiles.ratio)
                rows = spread.transpose(-1, -2) @ here  # (B, T, cd, F)
                if part.whole:
                    grad_blocks += rows[:, 0]
                else:
                    grad_blocks.index_add_(1, part.key_blocks.flatten(), rows.view(b, -1, f))
                del spread
            if want_weights:
                products = here @ part.take(blocks, part.key_blocks).transpose(-1, -2)
                products = products.view(b, t, k, n1, n2, k1, k2)
                products = diagonal_sum(products, tiles.ratio).permute(2, 0, 1, 3, 4, 5, 6)
                if part.fresh is not None:
                    products = products * part.fresh[..., None, None]
                grad_weights[:, :, i:j] = products
        return grad_weights, grad_blocks, None


def aggregate_tiles(weights: Tensor, blocks: Tensor, tiles: WindowTiles) -> Tensor:
    """Sum, for every block of the image, the blocks that weighted patches put there.

    Args:
        weights: Weights (K, B, T, p, q, u, v), zero outside each query's window.
        blocks: Rows of values (B, G, F) from `PatchGrid.to_blocks`.
        tiles: Tiles of the grid.

    Returns:
        Sums (B, K, G, F) over all patches covering a block; `PatchGrid.from_blocks` divides by
        their number.
    """
    return _AggregateTiles.apply(weights, blocks, tiles)
