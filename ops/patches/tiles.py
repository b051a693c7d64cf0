"""Dense arithmetic between a patch of a feature map and the patches around it, in tiles.

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

from ops.budget import CHUNK_BYTES, pieces
from ops.patches.grid import write_out

__all__ = [
    "TileIndices",
    "WindowTiles",
    "aggregate_part",
    "aggregate_tiles",
    "diagonal_spread",
    "diagonal_sum",
    "distances_of_part",
    "patch_norms",
    "tile_distances",
]


def _axis_tiles(n: int, window: int, ratio: int) -> tuple[list[int], list[int], int, int]:
    """Tile an axis of n patches: first query and first key of each tile, size in both."""

    def cost(t: int) -> int:
        return math.ceil(n / t) * (t + ratio - 1) * (min(n, t + window - 1) + ratio - 1)

    t = n  # the cheapest, found in a loop: torch 2.6 cannot compile min(key=)
    for smaller in range(n - 1, 0, -1):
        t = smaller if cost(smaller) < cost(t) else t
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
        dtype: Type of distances.
    """

    def __init__(
        self,
        rows: int,
        cols: int,
        window: int,
        ratio: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.ratio = ratio
        self.grid = (rows, cols)
        self.window = (min(window, rows), min(window, cols))
        self.axes = [
            _Axis(n, size, ratio, device, dtype)
            for n, size in zip(self.grid, self.window, strict=True)
        ]
        down, across = self.axes
        self.count = down.count * across.count
        self.has_repeats = down.has_repeats or across.has_repeats
        self.query_shape = (down.query.shape[1], across.query.shape[1])
        self.key_shape = (down.key.shape[1], across.key.shape[1])
        tile = torch.arange(self.count, device=device)
        self._r, self._c = tile // across.count, tile % across.count

    def pieces(self, rows: Tensor, matrices: int) -> list[tuple[slice, slice]]:
        """Cut samples and tiles into pieces: of few enough products to stay within the budget.

        Args:
            rows: Rows of blocks (B, G, F) that are multiplied.
            matrices: Products of a tile that are alive at a time.
        """
        more = self.ratio - 1
        query = (self.query_shape[0] + more) * (self.query_shape[1] + more)
        key = (self.key_shape[0] + more) * (self.key_shape[1] + more)
        gathered = 0 if self.count == 1 else key * rows.shape[-1]
        size = rows.element_size() * (matrices * query * key + gathered)
        return list(pieces(len(rows), self.count, CHUNK_BYTES // size))

    def part(self, some: slice) -> TileIndices:
        """Index tensors of some tiles."""
        r, c = self._r[some], self._c[some]
        down, across = self.axes
        more, cols = self.ratio - 1, self.grid[1]
        barred = down.barred[r][:, :, None, :, None] + across.barred[c][:, None, :, None]
        own = down.own[r][:, :, None] * self.key_shape[1] + across.own[c][:, None]
        barred.flatten(3).scatter_(3, own[..., None], -torch.inf)
        fresh = None
        if self.has_repeats:
            fresh = down.fresh[r][:, :, None] * across.fresh[c][:, None]
        return TileIndices(
            query=_positions(down.query[r], across.query[c], 0, cols),
            key=_positions(down.key[r], across.key[c], 0, cols),
            query_blocks=_positions(down.query[r], across.query[c], more, cols + more),
            key_blocks=_positions(down.key[r], across.key[c], more, cols + more),
            barred=barred,
            fresh=fresh,
            whole=self.count == 1,
        )


class _Axis:
    """Tiles along one axis of n patches.

    Attributes:
        query: Patches that ask (tiles, p).
        key: Patches that answer (tiles, u).
        barred: 0 where a key lies in the window of a query, -inf elsewhere (tiles, p, u).
        own: Place of a query among the keys (tiles, p).
        fresh: 1 where a query belongs to no earlier tile, else 0 (tiles, p).
    """

    def __init__(
        self, n: int, size: int, ratio: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        first_query, first_key, t, keys = _axis_tiles(n, size, ratio)
        self.count = len(first_query)
        self.has_repeats = n % t != 0
        query = torch.tensor(first_query, device=device)[:, None]
        key = torch.tensor(first_key, device=device)[:, None]
        self.query = query + torch.arange(t, device=device)
        self.key = key + torch.arange(keys, device=device)
        start = (self.query - size // 2).clamp(0, n - size)[:, :, None]
        inside = (self.key[:, None] >= start) & (self.key[:, None] < start + size)
        self.barred = torch.zeros(inside.shape, device=device, dtype=dtype)
        self.barred.masked_fill_(~inside, -torch.inf)
        self.own = self.query - key
        turn = torch.arange(self.count, device=device)[:, None] * t
        self.fresh = (self.query >= turn).to(dtype)


def _positions(r: Tensor, c: Tensor, more: int, cols: int) -> Tensor:
    """Flat positions of rows r (T, ·) and columns c (T, ·), each continued by `more`."""
    if more:
        further = torch.arange(1, more + 1, device=r.device)
        r = torch.cat((r, r[:, -1:] + further), 1)
        c = torch.cat((c, c[:, -1:] + further), 1)
    return r[:, :, None] * cols + c[:, None]


@dataclass(frozen=True)
class TileIndices:
    """Flat patch and block positions of some tiles.

    Attributes:
        query: Patches that ask (T, p, q).
        key: Patches that answer (T, u, v).
        query_blocks: Blocks of the queries (T, a, b).
        key_blocks: Blocks of the keys (T, c, d).
        barred: 0 where a key is a candidate of a query, -inf elsewhere (T, p, q, u, v); a query is
            no candidate of its own.
        fresh: 1 for queries that no earlier tile answers, else 0 (T, p, q); None: 1 for all.
        whole: The one tile is the whole grid, in order.
    """

    query: Tensor
    key: Tensor
    query_blocks: Tensor
    key_blocks: Tensor
    barred: Tensor
    fresh: Tensor | None
    whole: bool

    def by_query(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys (M, u·v) and the weights (B, M, K, u·v) of every patch, in order.

        Args:
            weights: Of all tiles (B, T, p, q, K, u, v).
        """
        query = self.query.flatten()
        each = self.query[0].numel()
        keys = self.key.flatten(1)[:, None].expand(-1, each, -1).flatten(0, 1)  # (T·p·q, u·v)
        rows = weights.flatten(-2).flatten(1, 3)  # (B, T·p·q, K, u·v)
        if self.fresh is not None:
            fresh = self.fresh.flatten() > 0
            query, keys, rows = query[fresh], keys[fresh], rows[:, fresh]
        order = query.argsort()
        return keys[order], rows[:, order]

    def take(self, rows: Tensor, index: Tensor) -> Tensor:
        """Rows (B, N, F) of each tile (B, T, n, F)."""
        if self.whole:
            return rows[:, None]
        b, _, f = rows.shape
        return rows.index_select(1, index.flatten()).view(b, index.shape[0], -1, f)

    def put(self, out: Tensor, index: Tensor, rows: Tensor) -> None:
        """Add rows of each tile (B, T, n, F) to `out` (B, N, F)."""
        if self.whole:
            out += rows[:, 0]
        else:
            out.index_add_(1, index.flatten(), rows.reshape(out.shape[0], -1, out.shape[-1]))


# In what follows, products have the shape (…, queries down, queries across, K, keys down, keys
# across): axes -5 and -2 move together down the image, -4 and -1 across.


def _diagonal_sum(x: Tensor, axis: int, ratio: int, out: Tensor | None = None) -> Tensor:
    """Sum `ratio` diagonal steps of axes `axis` and `axis` + 3."""
    n, m = x.shape[axis] - ratio + 1, x.shape[axis + 3] - ratio + 1
    parts = [x.narrow(axis, i, n).narrow(axis + 3, i, m) for i in range(ratio)]
    if out is None:
        out = parts[0] + parts[1]
    else:
        write_out(torch.add, parts[0], parts[1], out)
    for part in parts[2:]:
        out += part
    return out


def diagonal_sum(x: Tensor, ratio: int, out: Tensor | None = None) -> Tensor:
    """Sum r × r diagonal steps: (…, a, b, K, c, d) -> (…, p, q, K, u, v) with p = a - r + 1."""
    if ratio == 1:
        return x if out is None else out.copy_(x)
    return _diagonal_sum(_diagonal_sum(x, -5, ratio), -4, ratio, out)


def _diagonal_spread(x: Tensor, axis: int, ratio: int) -> Tensor:
    """Adjoint of `_diagonal_sum`."""
    shape = list(x.shape)
    n, m = shape[axis], shape[axis + 3]
    shape[axis] += ratio - 1
    shape[axis + 3] += ratio - 1
    if ratio != 2 or torch.compiler.is_compiling():
        out = x.new_zeros(shape)
        for i in range(ratio):
            out.narrow(axis, i, n).narrow(axis + 3, i, m).add_(x)
        return out
    # Each number is written once: sums inside, copies and zeros along the edges.
    out = x.new_empty(shape)

    def at(t: Tensor, i: int, rows: int, j: int, cols: int) -> Tensor:
        return t.narrow(axis, i, rows).narrow(axis + 3, j, cols)

    at(out, 0, 1, 0, m).copy_(at(x, 0, 1, 0, m))
    at(out, 0, 1, m, 1).zero_()
    at(out, n, 1, 1, m).copy_(at(x, n - 1, 1, 0, m))
    at(out, n, 1, 0, 1).zero_()
    if n > 1:
        inner = at(out, 1, n - 1, 1, m - 1)
        torch.add(at(x, 1, n - 1, 1, m - 1), at(x, 0, n - 1, 0, m - 1), out=inner)
        at(out, 1, n - 1, 0, 1).copy_(at(x, 1, n - 1, 0, 1))
        at(out, 1, n - 1, m, 1).copy_(at(x, 0, n - 1, m - 1, 1))
    return out


def diagonal_spread(x: Tensor, ratio: int, fresh: Tensor | None = None) -> Tensor:
    """Adjoint of `diagonal_sum`: (…, p, q, K, u, v) -> (…, a, b, K, c, d), contiguous.

    `fresh` (T, p, q), for x (B, T, p, q, K, u, v): factors 0 or 1 of the queries.
    """
    if fresh is not None:
        x = x * fresh[..., None, None, None]
    if ratio == 1:
        return x.contiguous()
    return _diagonal_spread(_diagonal_spread(x, -5, ratio), -4, ratio)


def patch_norms(blocks: Tensor, grid: tuple[int, int], ratio: int) -> Tensor:
    """Squared norms (B, M) of patches from blocks (B, G, F)."""
    norms = blocks.square().sum(-1).view(-1, grid[0] + ratio - 1, grid[1] + ratio - 1)
    if ratio > 1:
        norms = F.avg_pool2d(norms[:, None], ratio, stride=1, divisor_override=1)
    return norms.flatten(1)


def distances_of_part(blocks: Tensor, norms: Tensor, part: TileIndices, ratio: int) -> Tensor:
    """Squared distances (B, T, p, q, u, v) of queries and keys of some tiles."""
    b = blocks.shape[0]
    t, n1, n2 = part.query_blocks.shape
    _, k1, k2 = part.key_blocks.shape
    query = part.take(blocks, part.query_blocks) * -2
    products = torch.matmul(query, part.take(blocks, part.key_blocks).transpose(-1, -2))
    out = diagonal_sum(products.view(b, t, n1, n2, 1, k1, k2), ratio).squeeze(-3)
    out += norms[:, part.query][..., None, None]
    out += norms[:, part.key][:, :, None, None]
    return out.clamp_(min=0)


class _TileDistances(torch.autograd.Function):
    """Squared distances within tiles; saves the blocks alone."""

    @staticmethod
    def forward(ctx, blocks: Tensor, tiles: WindowTiles) -> Tensor:
        ctx.save_for_backward(blocks)
        ctx.tiles = tiles
        norms = patch_norms(blocks, tiles.grid, tiles.ratio)
        b = blocks.shape[0]
        out = blocks.new_empty(b, tiles.count, *tiles.query_shape, *tiles.key_shape)
        for s, some in tiles.pieces(blocks, 2):
            part = tiles.part(some)
            out[s, some] = distances_of_part(blocks[s], norms[s], part, tiles.ratio)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (blocks,) = ctx.saved_tensors
        tiles: WindowTiles = ctx.tiles
        b, g, _ = blocks.shape
        out = torch.zeros_like(blocks)
        norms = blocks.new_zeros(b, tiles.grid[0] * tiles.grid[1])  # gradient of the squared norms
        for s, some in tiles.pieces(blocks, 2):
            part = tiles.part(some)
            here = grad[s, some]
            norms[s].index_add_(1, part.query.flatten(), here.sum((-1, -2)).flatten(1))
            norms[s].index_add_(1, part.key.flatten(), here.sum((2, 3)).flatten(1))
            spread = diagonal_spread(here.unsqueeze(-3), tiles.ratio)  # (B, T, a, b, 1, c, d)
            spread = spread.flatten(5).flatten(2, 4)
            query = part.take(blocks[s], part.query_blocks)
            key = part.take(blocks[s], part.key_blocks)
            part.put(out[s], part.query_blocks, spread @ key)
            part.put(out[s], part.key_blocks, spread.transpose(-1, -2) @ query)
        # A block takes part in every patch over it.
        if tiles.ratio > 1:
            box = norms.new_ones(1, 1, tiles.ratio, tiles.ratio)
            norms = F.conv_transpose2d(norms.view(b, 1, *tiles.grid), box)
        return (norms.reshape(b, g, 1) * blocks).sub_(out).mul_(2), None


def tile_distances(blocks: Tensor, tiles: WindowTiles) -> Tensor:
    """Squared Euclidean distances of every patch and the keys of its tile.

    Args:
        blocks: Rows of features (B, G, F) from `PatchGrid.to_blocks`.
        tiles: Tiles of the grid.

    Returns:
        Distances (B, T, p, q, u, v), meaningful where `TileIndices.barred` is 0.
    """
    return _TileDistances.apply(blocks, tiles)


def _spread_weights(weights: Tensor, part: TileIndices, ratio: int) -> Tensor:
    """Weights of patches (B, T, p, q, K, u, v) as weights of blocks (B, T, ab·K, cd)."""
    return diagonal_spread(weights, ratio, part.fresh).flatten(5).flatten(2, 4)


def aggregate_part(
    weights: Tensor, blocks: Tensor, part: TileIndices, ratio: int, out: Tensor
) -> Tensor:
    """Add the sums of some tiles under weights (B, T, p, q, K, u, v) to `out` (B, G, K·F).

    Where one tile is the whole grid, `out` is overwritten. Returns the spread weights.
    """
    b, t = weights.shape[:2]
    spread = _spread_weights(weights, part, ratio)
    if part.whole:
        out = out.view(b, -1, blocks.shape[-1])
        write_out(torch.matmul, spread[:, 0], blocks, out)
    else:
        sums = torch.matmul(spread, part.take(blocks, part.key_blocks))  # (B, T, ab·K, F)
        part.put(out, part.query_blocks, sums.view(b, t, -1, out.shape[-1]))
    return spread


class _AggregateTiles(torch.autograd.Function):
    """Sums of blocks under weights; saves weights and blocks (spread weights if that is all)."""

    @staticmethod
    def forward(ctx, weights: Tensor, blocks: Tensor, tiles: WindowTiles) -> Tensor:
        ctx.tiles = tiles
        b, g, f = blocks.shape
        k = weights.shape[4]
        out = blocks.new_zeros(b, g, k * f) if tiles.count > 1 else blocks.new_empty(b, g, k * f)
        ctx.spread = tiles.count == 1
        kept = [
            aggregate_part(weights[s, some], blocks[s], tiles.part(some), tiles.ratio, out[s])
            for s, some in tiles.pieces(blocks, 2 * k)
        ]
        # On a small grid they cost little more than the weights themselves.
        ctx.save_for_backward(blocks, *(kept if ctx.spread else [weights]))
        return out.view(b, g, k, f)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        blocks, *kept = ctx.saved_tensors
        tiles: WindowTiles = ctx.tiles
        b, g, f = blocks.shape
        k = grad.shape[2]
        want_weights, want_blocks = ctx.needs_input_grad[:2]
        grad_weights, grad_blocks = None, None
        if want_weights:
            shape = (b, tiles.count, *tiles.query_shape, k, *tiles.key_shape)
            grad_weights = blocks.new_empty(shape)
        if want_blocks:
            grad_blocks = torch.zeros_like(blocks)
        for number, (s, some) in enumerate(tiles.pieces(blocks, 2 * k)):
            part = tiles.part(some)
            t, n1, n2 = part.query_blocks.shape
            _, k1, k2 = part.key_blocks.shape
            here = part.take(grad[s].reshape(-1, g, k * f), part.query_blocks)
            here = here.reshape(-1, t, n1 * n2 * k, f)
            if want_blocks:
                if ctx.spread:
                    spread = kept[number]
                else:
                    spread = _spread_weights(kept[0][s, some], part, tiles.ratio)
                part.put(grad_blocks[s], part.key_blocks, spread.transpose(-1, -2) @ here)
                del spread
            if want_weights:
                products = here @ part.take(blocks[s], part.key_blocks).transpose(-1, -2)
                products = products.view(-1, t, n1, n2, k, k1, k2)
                diagonal_sum(products, tiles.ratio, grad_weights[s, some])
                if part.fresh is not None:
                    grad_weights[s, some] *= part.fresh[..., None, None, None]
        return grad_weights, grad_blocks, None


def aggregate_tiles(weights: Tensor, blocks: Tensor, tiles: WindowTiles) -> Tensor:
    """Sum, for every block of the image, the blocks that weighted patches put there.

    Args:
        weights: Weights (B, T, p, q, K, u, v), zero outside each query's window.
        blocks: Rows of values (B, G, F) from `PatchGrid.to_blocks`.
        tiles: Tiles of the grid.

    Returns:
        Sums (B, G, K, F) over all patches covering a block; `PatchGrid.from_blocks` divides by
        their number.
    """
    return _AggregateTiles.apply(weights, blocks, tiles)
