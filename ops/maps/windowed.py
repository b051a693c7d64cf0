"""Attention of every position of a map to its window, or to the K best of it.

Queries are taken in tiles of a map, whose windows lie in one rectangle of keys: scores are products
of matrices, and never more than a chunk of them exists. Where K is smaller than the window the K
best are chosen without gradient, and `ops.maps.attend` works on these alone; a whole window goes
through PyTorch's fused attention.

Symbols: B batch, (H, W) map, M = H·W positions, E channels compared, C channels summed, O positions
of a window, K neighbors.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.budget import chunk_bytes, pieces
from ops.maps.attend import attend_neighbors
from ops.topk import topk_rows

__all__ = ["MapWindows"]

_TILE = 16  # most queries along an axis that share a rectangle of keys


class _Tile(NamedTuple):
    """Queries first … last - 1 along one axis, and keys begin … end - 1 of all their windows.

    `starts` are the first positions of the queries' windows among these keys.
    """

    first: int
    last: int
    begin: int
    end: int
    starts: tuple[int, ...]


def _axis_tiles(n: int, size: int) -> list[_Tile]:
    """Tile an axis of n positions, with windows of `size` that stay inside."""
    starts = [min(max(i - size // 2, 0), n - size) for i in range(n)]
    tile = -(-n // -(-n // _TILE))
    tiles = []
    for first in range(0, n, tile):
        last = min(first + tile, n)
        mine = starts[first:last]
        own = tuple(start - mine[0] for start in mine)
        tiles.append(_Tile(first, last, mine[0], mine[-1] + size, own))
    return tiles


class MapWindows:
    """The windows of one size around every position of a map.

    At the border windows slide inward, so that all have the same size; on a map that is smaller
    they shrink to it.

    Args:
        shape: Sides (H, W) of the map.
        window: Side of a window, odd.
        device: Where the maps are.
    """

    def __init__(
        self, shape: tuple[int, int], window: int, device: torch.device | None = None
    ) -> None:
        self.shape, self.device = shape, device
        self.size = min(window, shape[0]), min(window, shape[1])
        self.area = self.size[0] * self.size[1]
        rows, cols = (_axis_tiles(n, size) for n, size in zip(shape, self.size, strict=True))
        self.tiles = [(down, across) for down in rows for across in cols]
        self._inside: dict[tuple, Tensor] = {}  # for each kind of tile: a few

    def _mask(self, down: _Tile, across: _Tile) -> Tensor | None:
        """Whether a key lies in a query's window (queries, keys); None: always."""
        if (down.end - down.begin) * (across.end - across.begin) == self.area:
            return None
        kind = down.starts, across.starts
        if kind not in self._inside:
            axes = []
            for tile, size in zip((down, across), self.size, strict=True):
                start = torch.tensor(tile.starts, device=self.device)[:, None]
                key = torch.arange(tile.end - tile.begin, device=self.device)
                axes.append((key >= start) & (key < start + size))
            pair = axes[0][:, None, :, None] & axes[1][:, None]
            self._inside[kind] = pair.flatten(2).flatten(0, 1)
        return self._inside[kind]

    def neighbors(self, q: Tensor, k: Tensor, K: int) -> Tensor:
        """Find the K positions of each window whose product with the query is largest.

        Args:
            q: Queries (B, M, E).
            k: Keys (B, M, E).
            K: At most O.

        Returns:
            Indices (B, M, K), best first; no gradient. Ties: the upper, then the left one.
        """
        q, k = (t.detach().unflatten(1, self.shape) for t in (q, k))
        out = q.new_empty(*q.shape[:3], K, dtype=torch.int64)
        width = self.shape[1]
        for tile in self.tiles:
            queries, (keys,), inside = self._parts(tile, q, k)
            here = out.new_empty(*queries.shape[:2], K)
            row_bytes = keys.shape[1] * keys.element_size()
            budget = chunk_bytes(q.device, None, row_bytes) // row_bytes
            for samples, part in pieces(len(q), queries.shape[1], budget):
                scores = queries[samples, part] @ keys[samples].mT
                if inside is not None:
                    scores.masked_fill_(~inside[part], -torch.inf)
                here[samples, part] = topk_rows(scores, K)[1]
            # From places in the rectangle to positions of the map.
            down, across = tile
            columns = across.end - across.begin
            here += (here // columns) * (width - columns) + (down.begin * width + across.begin)
            here = here.unflatten(1, (down.last - down.first, -1))
            out[:, down.first : down.last, across.first : across.last] = here
        return out.flatten(1, 2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, K: int, *, chosen: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Sum v over the K best positions j of each window by the softmax of q_i · k_j.

        Args:
            q: Queries (B, M, E).
            k: Keys (B, M, E).
            v: Values (B, M, C).
            K: Neighbors of a query; O or more: its whole window.
            chosen: Return the choice, too; memory O(B · M · K).

        Returns:
            Sums (B, M, C), and if wanted indices and weights (B, M, K), without gradient. Scores
            are computed in float32 (float64 for float64 input), also under autocast.
        """
        K, out_dtype, channels = min(K, self.area), v.dtype, v.shape[2]
        with torch.autocast(v.device.type, enabled=False):
            if out_dtype != torch.float64:
                q, k, v = q.float(), k.float(), v.float()
            whole = self.area <= K and not chosen
            indices = None if whole else self.neighbors(q, k, K)
            # Both kinds of attention want one number of channels; zeros change no product.
            more = channels - q.shape[2]
            q, k = (F.pad(t, (0, more)) if more > 0 else t for t in (q, k))
            v = F.pad(v, (0, -more)) if more < 0 else v
            if whole:
                y, weights = self._attend_all(q, k, v), None
            else:
                taps = v.new_ones(v.shape[2], K)
                y, weights = attend_neighbors(
                    k, q, v, indices, taps, metric="dot", self_score=None, with_attention=True
                )
            return y[..., :channels].to(out_dtype), indices, weights

    def _attend_all(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to whole windows: (B, M, C)."""
        q, k, v = (t.unflatten(1, self.shape)[:, None] for t in (q, k, v))  # one head
        rows: dict[int, list[Tensor]] = {}
        for tile in self.tiles:
            queries, (keys, values), inside = self._parts(tile, q, k, v)
            y = F.scaled_dot_product_attention(queries, keys, values, inside, scale=1.0)
            y = y[:, 0].unflatten(1, (len(tile[0].starts), -1))  # (B, rows, columns, C)
            rows.setdefault(tile[0].first, []).append(y)
        return torch.cat([torch.cat(tiles, 2) for tiles in rows.values()], 1).flatten(1, 2)

    def _parts(
        self, tile: tuple[_Tile, _Tile], q: Tensor, *keys: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Queries and keys (B, ..., positions, C) of a tile, and which of them belong together."""
        down, across = tile
        queries = q[..., down.first : down.last, across.first : across.last, :]
        rows, cols = slice(down.begin, down.end), slice(across.begin, across.end)
        parts = [t[..., rows, cols, :].flatten(-3, -2) for t in keys]
        return queries.flatten(-3, -2), parts, self._mask(*tile)
